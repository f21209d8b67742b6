// Methods by layers at one budget, and how often each layer is kept.
function render({ model, el }) {
  const get = k => model.get(k), L = get("num_layers");
  const slider = make("input", { type: "range", min: 0, max: L, step: 1, class: "fm-slider", "aria-label": "budget",
    oninput: e => { model.set("budget", +e.target.value); model.save_changes(); paint(); } });
  const count = make("span", { class: "fm-count" }), chart = make("div", { class: "fm-chart" }), note = make("div", { class: "fm-note", role: "status" });
  el.append(own(make("div", { class: "fm fm-compare" }, make("div", { class: "fm-row top" }, make("span", { class: "fm-title", text: "Budget" }), make("div", { class: "fm-grow" }, slider), count), chart, note)));
  let rows = null, votes = null;
  function build(width) {
    const methods = get("methods"), c = columns(width, L, 104, 120), top = 18, lane = 24, tall = 44, y = n => top + tall + 14 + n * lane, height = y(methods.length) + 16;
    const svg = make("svg", { height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "which layers each method keeps" });
    svg.append(make("text", { x: 0, y: top + tall / 2 + 4, text: "kept by" }), make("line", { class: "grid", x1: c.left - 4, x2: c.end, y1: top + tall, y2: top + tall }), make("text", { x: 0, y: height - 2, class: "soft", text: "layer" }));
    for (const i of labelled(L, c.step)) svg.append(make("text", { class: "soft", x: c.mid(i), y: height - 2, "text-anchor": "middle", text: i }));
    votes = range(L).map(i => ({ bar: svg.appendChild(make("rect", { class: "full", x: c.x(i), width: c.width, rx: 1.5 })), label: c.step >= 16 ? svg.appendChild(make("text", { class: "soft", x: c.mid(i), "text-anchor": "middle" })) : null, base: top + tall, tall }));
    rows = methods.map((m, n) => {
      svg.append(make("text", { x: 0, y: y(n) + 13, text: m.name.length > 15 ? m.name.slice(0, 14) + "…" : m.name, "font-weight": n ? 400 : 600 }));
      const cells = range(L).map(i => svg.appendChild(make("rect", { x: c.x(i), width: c.width, y: y(n), height: 17, rx: 1.5,
        onmouseenter: () => put(note, { text: `layer ${i}: ${m.name} ${(m.sets[get("budget")] || "")[i] === "1" ? "keeps full attention" : "makes it linear"}` }), onmouseleave: () => put(note, { text: "" }) })));
      return { cells, remark: svg.appendChild(make("text", { class: "soft", x: Math.min(c.end + 10, width - 112), y: y(n) + 13 })) };
    });
    chart.replaceChildren(svg); paint();
  }
  function paint() {
    const k = get("budget"), methods = get("methods"), masks = methods.map(m => m.sets[k]);
    slider.value = k; put(slider, { "aria-valuetext": `${k} of ${L}` }); put(count, { text: `${k} of ${plural(L, "layer")} full` });
    if (!rows) return;
    votes.forEach((v, i) => {
      const n = masks.filter(m => m && m[i] === "1").length, tall = v.tall * n / masks.length;
      put(v.bar, { y: v.base - tall, height: tall }); if (v.label) put(v.label, { y: v.base - tall - 4, text: n || "" });
    });
    rows.forEach((row, n) => {
      row.cells.forEach((cell, i) => put(cell, { class: masks[n] && masks[n][i] === "1" ? "full" : "linear", opacity: masks[n] ? 1 : 0.25 }));
      const shared = masks[n] && masks[0] ? [...masks[n]].filter((c, i) => c === "1" && masks[0][i] === "1").length : 0, either = 2 * k - shared;
      put(row.remark, { text: !masks[n] ? "not at this budget" : n === 0 ? "" : `${shared} of ${k} shared, ${percent(either ? shared / either : 1)}` });
    });
  }
  const stops = [fit(chart, build), follow(model, ["budget"], () => paint())];
  paint();
  return () => stops.forEach(f => f());
}
export default { render };
