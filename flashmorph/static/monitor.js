// The monitor of a training: one curve a layer (or a heat map), the loss below, and the set that the gates would give at a budget.
const CIVIDIS = [[0, 34, 78], [18, 53, 112], [59, 73, 108], [87, 93, 109], [112, 113, 115], [138, 134, 120], [165, 156, 116], [195, 179, 105], [225, 204, 85], [254, 232, 56]];
function cividis(v) {
  const p = clamp(v, 0, 1) * (CIVIDIS.length - 1), i = Math.min(CIVIDIS.length - 2, Math.floor(p));
  return CIVIDIS[i].map((c, n) => Math.round(c + (CIVIDIS[i + 1][n] - c) * (p - i)));
}
const DASHES = ["", "6 3", "2 3"];

function render({ model, el }) {
  const get = k => model.get(k);
  let at = null, kind = null, timer = 0, hover = "", drawn = 0;      // `at`: the column looked at, null is the newest
  const status = make("span", { class: "fm-status" }), facts = make("span", { class: "soft fm-facts" }), bar = make("div");
  const toggle = make("button", { class: "fm-toggle", onclick: () => { kind = shownKind() === "lines" ? "heat" : "lines"; paint(); } });
  const chart = make("div", { class: "fm-chart" }), note = make("div", { class: "fm-note", role: "status" });
  const slider = make("input", { type: "range", min: 0, step: 1, class: "fm-scrub", "aria-label": "step of the training", oninput: e => { halt(); look(+e.target.value); } });
  const play = make("button", { class: "fm-play", text: "▶", "aria-label": "play", onclick: () => (timer ? halt() : start()) });
  const budget = make("input", { type: "number", min: 0, step: 1, class: "fm-budget", "aria-label": "budget",
    onchange: e => { model.set("budget", clamp(Math.round(+e.target.value) || 0, 0, get("num_layers"))); model.save_changes(); paint(); } });
  const budgetRow = make("label", { class: "fm-row" }, make("span", { class: "soft", text: "set at budget" }), budget), chosen = make("span", { class: "fm-set" });
  const scrub = make("div", { class: "fm-row" }, play, make("div", { class: "fm-grow" }, slider), budgetRow, chosen);
  el.append(own(make("div", { class: "fm fm-monitor" }, make("div", { class: "fm-row" }, status, make("div", { class: "fm-grow" }, make("div", { class: "fm-thin" }, bar)), facts, toggle), chart, scrub, note)));

  const columnsKept = () => get("kept").length, last = () => columnsKept() - 1, here = () => (at === null ? last() : Math.min(at, last()));
  const shownKind = () => kind || (get("num_layers") <= 12 ? "lines" : "heat");
  function look(n) { at = n >= last() ? null : n; paint(); }
  function halt() { clearInterval(timer); timer = 0; put(play, { text: "▶", "aria-label": "play" }); }
  function start() {
    if (here() >= last()) at = 0;
    put(play, { text: "❚❚", "aria-label": "pause" });
    timer = setInterval(() => { look(here() + 1); if (at === null) halt(); }, Math.max(30, Math.min(120, 6000 / columnsKept())));
  }
  function orderAt(n) {
    const L = get("num_layers"), all = unpack(get("orders"), 2);
    return all.length >= (n + 1) * L ? Array.from(all.subarray(n * L, (n + 1) * L)) : get("order");
  }

  function paint(width = Math.round(chart.clientWidth)) {
    const L = get("num_layers"), n = here(), kept = get("kept"), step = kept[n] ?? 0, total = get("total"), gates = get("what") === "gate";
    put(status, { text: get("stage") ? `${get("stage")}: step ${get("done")} of ${total}` : "waiting for a training" });
    bar.style.width = total ? `${100 * get("done") / total}%` : "0";
    const rate = get("rate"), speed = rate ? (rate >= 1 ? `${rate.toPrecision(3)} steps/s` : `${(1 / rate).toPrecision(3)} s/step`) : "";
    put(facts, { text: [speed, get("running") && rate ? `${duration((total - get("done")) / rate)} left` : "", !get("running") && get("seconds") ? `took ${duration(get("seconds"))}` : ""].filter(Boolean).join(" · ") });
    toggle.style.display = L ? "" : "none"; scrub.style.display = columnsKept() > 1 ? "" : "none";
    budgetRow.style.display = chosen.style.display = gates ? "" : "none";
    put(toggle, { text: shownKind() === "lines" ? "heat map" : "lines" });
    put(slider, { max: Math.max(0, last()), "aria-valuetext": `step ${step}` }); slider.value = n;
    const order = gates && L && columnsKept() ? orderAt(n) : range(L), set = gates ? order.slice(0, get("budget")) : [];
    if (document.activeElement !== budget) budget.value = get("budget");
    put(budget, { max: L });
    put(chosen, { text: gates ? `layers ${[...set].sort((a, b) => a - b).join(", ") || "none"}` : "" });
    put(note, { text: hover || (at === null ? "" : `at step ${step}`) + (gates && get("running") ? " the set is that of now, not final" : "") });
    if (width > 0 && columnsKept()) draw(width, n, order, new Set(set));
    el.firstChild.dataset.drawn = ++drawn;
  }

  function draw(width, n, order, set) {
    const L = get("num_layers"), kept = get("kept"), N = kept.length, values = unpack(get("matrix")), [low, high] = get("span"), log = get("log");
    const left = 58, right = L && L <= 12 ? 116 : 40, x0 = kept[0], x1 = Math.max(kept[N - 1], get("running") ? get("total") : 0, x0 + 1);
    const x = s => left + (width - left - right) * (s - x0) / (x1 - x0), value = (i, l) => values[i * L + l] / 255;
    const shown = v => { const raw = low + v * (high - low); return log ? 10 ** raw : raw; };
    const tall = L ? (shownKind() === "lines" ? 220 : clamp(6 * L, 150, 330)) : 0, top = 12, y = v => top + tall * (1 - v), under = L ? top + tall + 28 : top + 14, deep = L ? 84 : 200, height = under + deep + 22;
    const svg = make("svg", { height, viewBox: `0 0 ${width} ${height}` }), now = kept[n];
    const named = v => (Math.abs(v) >= 100 ? v.toFixed(0) : Math.abs(v) >= 0.01 ? v.toPrecision(2) : v === 0 ? "0" : v.toExponential(0));
    if (L && shownKind() === "lines") {
      for (const v of [0, 0.5, 1]) svg.append(make("line", { class: "grid", x1: left, x2: width - right, y1: y(v), y2: y(v) }), make("text", { class: "soft", x: left - 8, y: y(v) + 4, "text-anchor": "end", text: named(shown(v)) }));
      for (const l of range(L)) {
        const path = kept.map((s, i) => `${i ? "L" : "M"}${x(s).toFixed(1)} ${y(value(i, l)).toFixed(1)}`).join("");
        svg.append(make("path", { d: path, fill: "none", stroke: OKABE_ITO[l % 7], "stroke-dasharray": DASHES[Math.floor(l / 7) % 3], "stroke-width": 2, class: "fm-line", "data-layer": l }));
      }
      if (L <= 12) order.forEach((l, place) => {      // a legend that is the ranking
        const ly = top + 6 + place * Math.min(18, tall / L), lx = width - right + 14;
        svg.append(make("line", { x1: lx, x2: lx + 20, y1: ly, y2: ly, stroke: OKABE_ITO[l % 7], "stroke-width": 3, "stroke-dasharray": DASHES[Math.floor(l / 7) % 3] }),
          make("text", { x: lx + 26, y: ly + 4, text: `${l}   ${get("what") === "gate" ? value(n, l).toFixed(2) : named(shown(value(n, l)))}`, "font-weight": set.has(l) ? 700 : 400, class: set.has(l) || get("what") !== "gate" ? "" : "soft", style: "white-space: pre" }));
        if (set.has(l)) svg.append(make("rect", { class: "full", x: width - 10, y: ly - 5, width: 10, height: 10, rx: 1.5 }));
      });
    } else if (L) {
      const canvas = make("canvas", { width: N, height: L }), ctx = canvas.getContext("2d"), image = ctx.createImageData(N, L);
      for (let i = 0; i < N; i++) for (let l = 0; l < L; l++) image.data.set([...cividis(value(i, l)), 255], 4 * (l * N + i));
      ctx.putImageData(image, 0, 0);
      svg.append(make("image", { href: canvas.toDataURL(), x: x(kept[0]), y: top, width: Math.max(2, x(kept[N - 1]) - x(kept[0])), height: tall, preserveAspectRatio: "none", style: "image-rendering: pixelated" }));
      for (const l of labelled(L, tall / L)) svg.append(make("text", { class: "soft", x: left - 8, y: top + tall * (l + 0.5) / L + 4, "text-anchor": "end", text: l }));
      for (const l of set) svg.append(make("rect", { class: "full", x: width - right + 8, y: top + tall * l / L, width: 12, height: Math.max(1, tall / L - 1), rx: 1 }));
    }
    if (L) svg.append(make("text", { x: 0, y: top + tall / 2, transform: `rotate(-90 10 ${top + tall / 2})`, "text-anchor": "middle", text: shownKind() === "heat" ? "layer" : get("what") }));
    // the loss and its parts
    const curves = Object.entries(get("losses")), all = curves.flatMap(([, v]) => v).filter(v => v !== null), lo = Math.min(...all), hi = Math.max(...all);
    if (all.length) {
      const ly = v => under + 6 + (deep - 6) * (hi > lo ? (hi - v) / (hi - lo) : 0.5);
      for (const v of hi > lo ? [lo, hi] : [lo]) svg.append(make("line", { class: "grid", x1: left, x2: width - right, y1: ly(v), y2: ly(v) }), make("text", { class: "soft", x: left - 8, y: ly(v) + 4, "text-anchor": "end", text: named(v) }));
      curves.forEach(([name, v], c) => {
        let pen = "M";
        const path = v.map((z, i) => { if (z === null) { pen = "M"; return ""; } const d = `${pen}${x(kept[i]).toFixed(1)} ${ly(z).toFixed(1)}`; pen = "L"; return d; }).join("");
        svg.append(make("path", { d: path, fill: "none", stroke: c ? OKABE_ITO[1] : "currentColor", "stroke-width": 1.6 }));
        svg.append(make("text", { x: left + 6 + 110 * c, y: under - 1, style: c ? `fill: ${OKABE_ITO[1]}` : "", text: `${name} ${v[n] === null || v[n] === undefined ? "—" : v[n].toPrecision(3)}` }));
      });
      svg.append(make("text", { x: 0, y: under + deep / 2, transform: `rotate(-90 10 ${under + deep / 2})`, "text-anchor": "middle", text: "loss" }));
    }
    const foot = under + deep + 16;
    for (const [s, anchor] of [[x0, "start"], [x1, "end"]]) svg.append(make("text", { class: "soft", x: x(s), y: foot, "text-anchor": anchor, text: s }));
    svg.append(make("text", { class: "soft", x: x((x0 + x1) / 2), y: foot, "text-anchor": "middle", text: "step" }));
    svg.append(make("line", { x1: x(now), x2: x(now), y1: top, y2: under + deep, stroke: "var(--fm-mark)", "stroke-width": 1.5, "stroke-dasharray": "4 3" }));
    svg.onmousemove = e => {
      const box = svg.getBoundingClientRect(), px = e.clientX - box.left, py = e.clientY - box.top, s = x0 + (px - left) / (width - left - right) * (x1 - x0);
      if (s < x0 || s > kept[N - 1] || py > under + deep) { hover = ""; return put(note, { text: "" }); }
      const i = kept.reduce((b, t, j) => (Math.abs(t - s) < Math.abs(kept[b] - s) ? j : b), 0);
      const l = !L || py > top + tall ? -1 : shownKind() === "heat" ? clamp(Math.floor((py - top) / tall * L), 0, L - 1) : range(L).reduce((b, j) => (Math.abs(y(value(i, j)) - py) < Math.abs(y(value(i, b)) - py) ? j : b), 0);
      hover = `step ${kept[i]}` + (l >= 0 ? `: layer ${l}, ${get("what")} ${shown(value(i, l)).toPrecision(3)}` : `: ${curves.map(([name, v]) => `${name} ${v[i] === null || v[i] === undefined ? "—" : v[i].toPrecision(4)}`).join(", ")}`);
      put(note, { text: hover });
    };
    svg.onmouseleave = () => { hover = ""; put(note, { text: "" }); };
    chart.replaceChildren(svg);
  }
  const stops = [fit(chart, paint), follow(model, ["frame", "running", "budget", "stage", "orders"], () => paint())];
  paint();
  return () => { halt(); stops.forEach(f => f()); };
}
export default { render };
