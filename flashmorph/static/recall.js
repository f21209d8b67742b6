// Recall over depth and length, for one or more models.
function render({ model, el }) {
  const get = k => model.get(k), grids = get("maps");
  const chart = make("div", { class: "fm-chart" }), note = make("div", { class: "fm-note", role: "status" });
  const tabs = grids.map((g, n) => make("button", { text: g.name, onclick: () => { model.set("shown", n); model.save_changes(); paint(); } }));
  el.append(own(make("div", { class: "fm fm-recall-map" }, make("div", { class: "fm-row top" }, make("span", { class: "fm-title", text: "Recall" }), ...(grids.length > 1 ? tabs : [])), chart, note)));
  function paint(width = Math.round(chart.clientWidth)) {
    const g = grids[get("shown")], cols = g.lengths.length, rows = g.recall.length, left = 92, right = 64, step = Math.min(96, (width - left - right) / cols), lane = clamp(220 / rows, 16, 34), top = 4, height = top + lane * rows + 40;
    tabs.forEach((t, n) => put(t, { "aria-pressed": n === get("shown") ? "true" : "false" }));
    if (!(width > 0)) return;
    const svg = make("svg", { height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `recall of ${g.name}` });
    g.recall.forEach((row, d) => {
      const from = d / rows, to = (d + 1) / rows;
      if (lane >= 18 || d % 2 === 0) svg.append(make("text", { class: "soft", x: left - 10, y: top + lane * (d + 0.5) + 4, "text-anchor": "end", text: `${Math.round(100 * from)}–${Math.round(100 * to)} %` }));
      row.forEach((v, c) => {
        const [x, y] = [left + step * c, top + lane * d], tell = v === null ? "no passkey here" : `${percent(v, 1)} of the answer tokens, ${plural(g.counts[d][c], "passkey")}`;
        const said = `${g.name}, ${g.lengths[c].toLocaleString("en")} tokens, depth ${Math.round(100 * from)}–${Math.round(100 * to)} %: ${tell}`;
        svg.append(make("rect", { class: "fm-cell", x: x + 1, y: y + 1, width: step - 2, height: lane - 2, rx: 2, fill: v === null ? "none" : `color-mix(in oklab, #0072B2 ${Math.round(4 + 96 * v)}%, var(--fm-linear))`, stroke: v === null ? "var(--fm-line)" : "none",
          onmouseenter: () => put(note, { text: said }), onmouseleave: () => put(note, { text: "" }) }, make("title", { text: said })));
        if (v !== null && step >= 34) svg.append(make("text", { x: x + step / 2, y: y + lane / 2 + 4, "text-anchor": "middle", "pointer-events": "none", style: v > 0.55 ? "fill: #fff" : "", text: Math.round(100 * v) }));
      });
    });
    g.lengths.forEach((n, c) => svg.append(make("text", { class: "soft", x: left + step * (c + 0.5), y: top + lane * rows + 16, "text-anchor": "middle", text: n.toLocaleString("en") })));
    svg.append(make("text", { x: left + step * cols / 2, y: height - 4, "text-anchor": "middle", text: "length, tokens" }), make("text", { x: 0, y: top + lane * rows / 2, transform: `rotate(-90 10 ${top + lane * rows / 2})`, "text-anchor": "middle", text: "depth of the passkey" }));
    chart.replaceChildren(svg);
  }
  const stops = [fit(chart, paint), follow(model, ["shown"], () => paint())];
  paint();
  return () => stops.forEach(f => f());
}
export default { render };
