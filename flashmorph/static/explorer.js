// The budget explorer. Everything seen follows from (budget, pins, context); the kernel is asked only to measure, to count and to commit.
function choose(order, budget, full, linear) {
  const free = order.filter(i => !full.includes(i) && !linear.includes(i));
  return [...full, ...free.slice(0, budget - full.length)].sort((a, b) => a - b);
}
const maskOf = (layers, L) => range(L).map(i => (layers.includes(i) ? "1" : "0")).join("");
const layersOf = mask => [...mask].flatMap((c, i) => (c === "1" ? [i] : []));

function render({ model, el }) {
  const get = k => model.get(k), L = get("order").length, live = !model.alone;
  let told = "", hint = "", sent = 0;
  const rank = []; get("order").forEach((layer, place) => { rank[layer] = place + 1; });

  const picked = () => choose(get("order"), get("budget"), get("pinned_full"), get("pinned_linear"));
  const others = () => get("others");
  const pinOf = i => (get("pinned_full").includes(i) ? "full" : get("pinned_linear").includes(i) ? "linear" : "");
  const recallOf = mask => get("recalls")[mask];

  // ---- changes: each is remembered, so that it can be undone
  function change(values) {
    const now = { budget: get("budget"), pinned_full: get("pinned_full"), pinned_linear: get("pinned_linear") };
    if (Object.entries(values).every(([k, v]) => JSON.stringify(now[k]) === JSON.stringify(v))) return;
    const past = get("history"), dragging = sent && past.length;
    if (!dragging) model.set("history", [...past, now].slice(-100));
    for (const [k, v] of Object.entries(values)) model.set(k, v);
    model.save_changes();
    paint();
  }
  function setBudget(k, drag = false) {
    const low = get("pinned_full").length, high = L - get("pinned_linear").length, to = clamp(k, low, high);
    told = k < low ? `${plural(low, "layer")} pinned full: the budget cannot be lower` : k > high ? `${plural(L - high, "layer")} pinned linear: the budget cannot be higher` : "";
    if (!drag) sent = 0;
    change({ budget: to });
    sent = drag ? 1 : 0;
    paint();
  }
  function pin(i, wanted) {
    const full = get("pinned_full").filter(j => j !== i), linear = get("pinned_linear").filter(j => j !== i), k = get("budget");
    if (wanted === "full" && full.length >= k) { told = `all ${k} of the budget are pinned already: raise the budget to pin layer ${i} full`; return paint(), false; }
    if (wanted === "linear" && linear.length >= L - k) { told = `budget ${k} needs layer ${i}: lower the budget to pin it linear`; return paint(), false; }
    told = ""; sent = 0;
    change({ pinned_full: wanted === "full" ? [...full, i].sort((a, b) => a - b) : full,
      pinned_linear: wanted === "linear" ? [...linear, i].sort((a, b) => a - b) : linear });
    return true;
  }
  const cycle = i => { const states = ["", "full", "linear"], at = states.indexOf(pinOf(i)); pin(i, states[(at + 1) % 3]) || pin(i, states[(at + 2) % 3]); };
  function undo() {
    const past = get("history");
    if (!past.length) return;
    model.set("history", past.slice(0, -1));
    for (const [k, v] of Object.entries(past[past.length - 1])) model.set(k, v);
    model.save_changes(); told = ""; sent = 0; paint();
  }
  const reset = () => { told = ""; sent = 0; change(get("begun")); };

  // ---- the frame
  const slider = make("input", { type: "range", min: 0, max: L, step: 1, "aria-label": "budget: layers that keep full attention", class: "fm-slider",
    oninput: e => setBudget(+e.target.value, true), onchange: () => { sent = 0; } });
  const count = make("span", { class: "fm-count" });
  const undoButton = make("button", { text: "Undo", class: "fm-undo", title: "take back the last change", onclick: undo });
  const resetButton = make("button", { text: "Reset", class: "fm-reset", title: "back to how it began", onclick: reset });
  const commitButton = make("button", { text: "Commit", class: "main fm-commit", onclick: () => { told = "committing …"; model.send({ do: "commit" }); paint(); } });
  const chart = make("div", { class: "fm-chart" });
  const note = make("div", { class: "fm-note", role: "status", "aria-live": "polite" });
  const costs = make("div", { class: "fm-panel fm-cost-panel" }), recall = make("div", { class: "fm-panel fm-recall-panel" });
  const root = make("div", { class: "fm fm-explorer" },
    make("div", { class: "fm-row top" }, make("span", { class: "fm-title", text: "Budget" }), make("div", { class: "fm-grow" }, slider), count,
      undoButton, resetButton, live ? commitButton : null),
    chart, note, make("div", { class: "fm-panels" }, get("costs").metrics ? costs : null, live && get("can_measure") || Object.keys(get("recalls")).length ? recall : null));
  el.append(own(root));

  // ---- the chart: gates as bars, this set and those of the others as strips below, one column a layer
  let parts = null;
  function build(width) {
    const names = ["this set", ...others().map(o => o.name)], c = columns(width, L, 104, 104), top = 12, bars = 104, strip = 15, lane = 22;
    const y = n => top + bars + 12 + n * lane, axis = y(names.length) + 12, height = axis + 4;
    const svg = make("svg", { height, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": "layers: arrow keys move, Enter pins" });
    for (const [v, name] of [[0, "0"], [1, "1"]]) {
      svg.append(make("line", { class: "grid", x1: c.left - 4, x2: c.end, y1: top + bars * (1 - v), y2: top + bars * (1 - v) }),
        make("text", { class: "soft", x: c.left - 10, y: top + bars * (1 - v) + 4, "text-anchor": "end", text: name }));
    }
    svg.append(make("text", { x: 0, y: top + bars / 2 + 4, text: get("score_name") }), make("text", { x: 0, y: axis, class: "soft", text: "layer" }));
    names.forEach((name, n) => svg.append(make("text", { x: 0, y: y(n) + 12, text: name.length > 15 ? name.slice(0, 14) + "…" : name, "font-weight": n ? 400 : 600 })));
    for (const i of labelled(L, c.step)) svg.append(make("text", { class: "soft", x: c.mid(i), y: axis, "text-anchor": "middle", text: i }));
    const low = Math.min(0, ...get("scores")), high = Math.max(1, ...get("scores"));
    const cells = range(L).map(i => {
      const tall = Math.max(1.5, bars * (get("scores")[i] - low) / (high - low));
      const bar = make("rect", { x: c.x(i), width: c.width, y: top + bars - tall, height: tall, rx: 1.5 });
      const cut = names.map((_, n) => make("rect", { x: c.x(i), width: c.width, y: y(n), height: strip, rx: 1.5, "data-row": n }));
      const mark = make("path", { fill: "var(--fm-mark)" }), ring = make("rect", { class: "ring", x: c.left + c.step * i, width: c.step, y: top - 10, height: y(1) - top + 6, rx: 3 });
      const g = make("g", { role: "button", tabindex: i ? -1 : 0, "data-layer": i, onclick: () => { cells.forEach((d, j) => put(d.g, { tabindex: j === i ? 0 : -1 })); cycle(i); },
        onkeydown: e => key(e, i), onmouseenter: () => { hint = i; say(); }, onmouseleave: () => { hint = ""; say(); },
        onfocus: () => { hint = i; say(); }, onblur: () => { hint = ""; say(); } }, ring, bar, ...cut, mark);
      svg.append(g);
      return { g, bar, cut, mark, at: c.mid(i), y: y(0) + strip / 2, size: Math.min(5, c.width / 2.4), top: top + bars - tall };
    });
    const remarks = names.map((_, n) => svg.appendChild(make("text", { class: "soft", x: Math.min(c.end + 10, width - 96), y: y(n) + 12 })));
    parts = { cells, remarks };
    chart.replaceChildren(svg);
    paint();
  }
  function key(e, i) {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[e.key], act = { Enter: () => cycle(i), " ": () => cycle(i), f: () => pin(i, "full"), l: () => pin(i, "linear"),
      Delete: () => pin(i, ""), Backspace: () => pin(i, ""), z: () => undo() }[e.key];
    if (move || act) { e.preventDefault(); e.stopPropagation(); }
    if (move) { const next = parts.cells[clamp(i + move, 0, L - 1)].g; put(parts.cells[i].g, { tabindex: -1 }); put(next, { tabindex: 0 }); next.focus(); }
    if (act && !e.ctrlKey && !e.metaKey) act();
  }
  function say() {
    const i = hint, pinned = i === "" ? "" : pinOf(i);
    let line = told || get("error") || committedLine() || "Click a layer to pin it: once full, twice linear, three times free.";
    if (i !== "" && !told) line = `layer ${i}: ${get("score_name")} ${get("scores")[i].toFixed(3)}, place ${rank[i]} of ${L}, ` +
      `${picked().includes(i) ? "full attention" : "linear"}${pinned ? ` (pinned ${pinned})` : ""}`;
    put(note, { text: line, class: told || get("error") ? "fm-note warn" : "fm-note" });
  }
  function committedLine() {
    const done = get("committed");
    if (!done.layers) return "";
    const same = JSON.stringify(done.layers) === JSON.stringify(picked());
    return `${same ? "Committed" : "Changed since the commit of"} layers ${done.layers.join(", ") || "none"}${done.file ? ` → ${done.file}` : ""}${same && done.hybrid ? "; the hybrid is in .hybrid" : ""}`;
  }

  // ---- painting: attributes only, so that focus stays and 100 layers stay quick
  function paint() {
    const k = get("budget"), set = picked(), mask = maskOf(set, L);
    if (+slider.value !== k) slider.value = k;
    put(slider, { "aria-valuetext": `${k} of ${L}` });
    put(count, { text: `${k} of ${plural(L, "layer")} full` });
    undoButton.disabled = !get("history").length; resetButton.disabled = JSON.stringify(get("begun")) === JSON.stringify({ budget: k, pinned_full: get("pinned_full"), pinned_linear: get("pinned_linear") });
    if (parts) paintChart(k, mask);
    if (get("costs").metrics) paintCosts(set);
    if (recall.isConnected) paintRecall(k, mask);
    say();
  }
  function paintChart(k, mask) {
    const masks = [mask, ...others().map(o => o.sets[k])];
    parts.cells.forEach((cell, i) => {
      const kind = m => (m[i] === "1" ? "full" : "linear"), p = pinOf(i), s = cell.size, on = mask[i] === "1";
      put(cell.bar, { class: kind(mask) });
      cell.cut.forEach((r, n) => put(r, { class: masks[n] ? kind(masks[n]) : "linear", opacity: masks[n] ? 1 : 0.25 }));
      put(cell.mark, { d: p === "full" ? `M${cell.at} ${cell.y - s} l${s} ${2 * s} h${-2 * s} z` : p === "linear" ? `M${cell.at - s} ${cell.y - s} h${2 * s} l${-s} ${2 * s} z` : "M0 0" });
      put(cell.g, { "aria-pressed": String(on), "aria-label": `layer ${i}, ${get("score_name")} ${get("scores")[i].toFixed(2)}, ${on ? "full attention" : "linear"}${p ? `, pinned ${p}` : ""}` });
    });
    masks.forEach((m, n) => {
      const share = m ? [...m].filter((c, i) => c === "1" && mask[i] === "1").length : 0;
      put(parts.remarks[n], { text: n === 0 ? (get("pinned_full").length + get("pinned_linear").length ? `${plural(get("pinned_full").length + get("pinned_linear").length, "pin")}` : "") : m ? `${share} of ${k} shared` : "none at this budget" });
    });
  }

  // ---- costs: a total and what each full layer adds to it, for each context that Python has counted
  const known = () => Object.keys(get("costs").tables).map(Number).sort((a, b) => a - b);
  function setContext(n) {
    n = Math.round(n);
    if (!(n >= 1)) return paint();
    if (!live) n = known().reduce((a, b) => (Math.abs(Math.log(b / n)) < Math.abs(Math.log(a / n)) ? b : a));
    if (live) n = Math.min(n, 2 ** 27);
    model.set("context", n); model.save_changes(); paint();
  }
  function parseTokens(text) { const m = text.trim().toLowerCase().replace(/[ ,_]/g, "").match(/^([\d.]+)([km]?)$/); return m ? m[1] * { "": 1, k: 1024, m: 1048576 }[m[2]] : NaN; }
  const field = make("input", { type: "text", class: "fm-context", inputmode: "numeric", "aria-label": "context length in tokens", title: "tokens; k and m work, arrow keys double and halve",
    onchange: e => setContext(parseTokens(e.target.value)),
    onkeydown: e => { if (e.key === "ArrowUp" || e.key === "ArrowDown") { e.preventDefault(); setContext(get("context") * (e.key === "ArrowUp" ? 2 : 0.5)); } } });
  const table = make("div", { class: "fm-costs" });
  costs.append(make("div", { class: "fm-row" }, make("span", { class: "fm-title", text: "Cost at a context of" }),
    make("button", { text: "−", "aria-label": "halve the context", onclick: () => setContext(get("context") / 2) }), field,
    make("button", { text: "+", "aria-label": "double the context", onclick: () => setContext(get("context") * 2) }), make("span", { class: "soft", text: "tokens" })), table);
  const rows = (get("costs").metrics || []).map(m => {
    const row = { value: make("span", { class: "num fm-value", "data-metric": m.key }), fill: make("div"), share: make("span", { class: "num soft" }) };
    table.append(make("span", { text: m.name, title: m.help }), row.value, make("div", { class: "fm-bar", title: "of the teacher" }, row.fill), row.share);
    return row;
  });
  table.append(make("span", { class: "soft", style: "grid-column: 1 / -1; text-align: right", text: "bars: share of what the teacher needs" }));
  function paintCosts(set) {
    const { metrics, tables } = get("costs"), t = tables[get("context")];
    if (document.activeElement !== field) field.value = get("context").toLocaleString("en");
    metrics.forEach((m, n) => {
      const add = layers => layers.reduce((sum, i) => sum + t.delta[t.kinds[i]][n], t.base[n]);
      const here = t && add(set), teacher = t && add(range(L));
      put(rows[n].value, { text: t ? amount(here, m.unit) : "…" });
      rows[n].fill.style.width = t ? `${clamp(100 * here / (teacher || 1), 0, 100)}%` : "0";
      put(rows[n].share, { text: t ? percent(here / (teacher || 1)) : "" });
    });
  }

  // ---- recall: measured when asked, kept, and drawn over the budget for every method
  const big = make("span", { class: "fm-big fm-recall" }), small = make("span", { class: "soft" }), plot = make("div"), bar = make("div"), thin = make("div", { class: "fm-thin" }, bar);
  const ask = (text, which, title) => make("button", { text, title, class: `fm-measure-${which}`, onclick: () => model.send({ do: "measure", which }) });
  const asks = [ask("This set", "this", "measure this set"), ask("All methods", "methods", "measure the sets of all methods at this budget"), ask("Every budget", "budgets", "measure the sets of the gates at every budget")];
  const stop = make("button", { text: "Stop", class: "fm-stop", onclick: () => model.send({ do: "stop" }) });
  recall.append(make("div", { class: "fm-row" }, make("span", { class: "fm-title", text: "Zero-shot recall" }), big, small), plot, thin,
    live && get("can_measure") ? make("div", { class: "fm-row" }, make("span", { class: "soft", text: "Measure" }), ...asks, stop) : make("span"));
  function paintRecall(k, mask) {
    const r = recallOf(mask), [done, total] = get("progress"), busy = total > 0, width = (recall.clientWidth || 340) - 26, height = 96;
    put(big, { text: r ? percent(r.recall, 1) : "—" });
    put(small, { text: r ? `${percent(r.exact)} whole` : "not measured yet" });
    for (const b of asks) b.disabled = busy;
    stop.disabled = !busy; bar.style.width = busy ? `${100 * done / total}%` : "0"; thin.style.visibility = busy ? "visible" : "hidden";
    const x = b => 34 + (width - 44) * (L ? b / L : 0), y = v => 8 + (height - 30) * (1 - v), svg = make("svg", { height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "recall over the budget" });
    for (const v of [0, 0.5, 1]) svg.append(make("line", { class: "grid", x1: x(0), x2: x(L), y1: y(v), y2: y(v) }), make("text", { class: "soft", x: 28, y: y(v) + 4, "text-anchor": "end", text: percent(v) }));
    for (const b of new Set([0, Math.round(L / 2), L])) svg.append(make("text", { class: "soft", x: x(b), y: height - 6, "text-anchor": "middle", text: b }));
    svg.append(make("line", { class: "grid", x1: x(k), x2: x(k), y1: y(0), y2: y(1), "stroke-dasharray": "3 3" }), make("text", { class: "soft", x: x(L / 4), y: height - 6, "text-anchor": "middle", text: "budget" }));
    const lines = [{ name: "gates", sets: range(L + 1).map(b => maskOf(get("order").slice(0, b), L)) }, ...others()], drawn = new Set();
    lines.forEach((line, n) => {
      const color = n ? OKABE_ITO[n % 7] : "var(--fm-full)", points = line.sets.flatMap((m, b) => (m && recallOf(m) ? [[b, recallOf(m).recall, m]] : []));
      const path = points.map(([b, v], i) => `${i && points[i - 1][0] === b - 1 ? "L" : "M"}${x(b)} ${y(v)}`).join("");      // no line over budgets not measured
      svg.append(make("path", { d: path || "M0 0", stroke: color, "stroke-width": 2, fill: "none" }));
      for (const [b, v, m] of points) { drawn.add(m); svg.append(make("circle", { cx: x(b), cy: y(v), r: 3.5, fill: color }, make("title", { text: `${line.name}, budget ${b}: ${percent(v, 1)} in layers ${layersOf(m).join(", ") || "none"}` }))); }
    });
    for (const m of Object.keys(get("recalls"))) if (!drawn.has(m)) svg.append(make("circle", { cx: x(layersOf(m).length), cy: y(recallOf(m).recall), r: 3.5, fill: "none", stroke: "currentColor", "stroke-width": 1.5 }, make("title", { text: `by hand, layers ${layersOf(m).join(", ")}: ${percent(recallOf(m).recall, 1)}` })));
    if (r) svg.append(make("circle", { cx: x(k), cy: y(r.recall), r: 7, fill: "none", stroke: "var(--fm-mark)", "stroke-width": 2 }));
    const names = make("div", { class: "fm-row" }, ...lines.map((line, n) => { const key = make("span", { class: "fm-key", text: line.name }); key.style.setProperty("--c", n ? OKABE_ITO[n % 7] : "var(--fm-full)"); return key; }));
    plot.replaceChildren(svg, names);
  }

  const stops = [fit(chart, build), follow(model, ["budget", "pinned_full", "pinned_linear", "history", "costs", "context", "recalls", "progress", "error"], () => paint()),
    follow(model, ["committed"], () => { told = ""; paint(); })];
  paint();
  return () => stops.forEach(f => f());
}
export default { render };
