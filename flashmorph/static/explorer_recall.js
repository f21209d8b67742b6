// @ts-check
// The panel of recall: measured when asked, kept, and drawn over the budget for every method.

/** @param {ReturnType<typeof explorerState>} state */
function recallPanel(state) {
  const { model, L, live } = state;
  const big = make("span", { class: "fm-big fm-recall" });
  const small = make("span", { class: "soft" });
  const plot = make("div");
  const bar = make("div");
  const thin = make("div", { class: "fm-thin" }, bar);

  // what can be asked of the kernel
  const send = (/** @type {any} */ content) => () => model.send(content);
  const asks = [
    ["this", "This set", "measure this set"],
    ["methods", "All methods", "measure the sets of all methods at this budget"],
    ["budgets", "Every budget", "measure the sets of the gates at every budget"],
  ].map(([which, text, title]) => {
    const onclick = send({ do: "measure", which });
    return make("button", { text, title, class: `fm-measure-${which}`, onclick });
  });
  const stop = make("button", { text: "Stop", class: "fm-stop", onclick: send({ do: "stop" }) });
  const measure = make("span", { class: "soft", text: "Measure" });
  const title = make("span", { class: "fm-title", text: "Zero-shot recall" });
  const node = make(
    "div",
    { class: "fm-panel fm-recall-panel" },
    make("div", { class: "fm-row" }, title, big, small),
    plot,
    thin,
    live && model.get("can_measure")
      ? make("div", { class: "fm-row" }, measure, ...asks, stop)
      : null,
  );

  function paint() {
    const recall = state.recallOf(maskOf(state.picked(), L));
    const [done, total] = model.get("progress");
    const busy = total > 0;
    put(big, { text: recall ? percent(recall.recall) : "—" });
    put(small, { text: recall ? `${percent(recall.exact, 0)} whole` : "not measured yet" });
    for (const ask of asks) ask.disabled = busy;
    stop.disabled = !busy;
    bar.style.width = busy ? `${(100 * done) / total}%` : "0";
    thin.style.visibility = busy ? "visible" : "hidden";
    plot.replaceChildren(...recallPlot(state, (node.clientWidth || 340) - 26));
  }

  return { node, paint };
}

/**
 * Recall over the budget, a line for each method, and what the lines are.
 * @param {ReturnType<typeof explorerState>} state @param {number} width
 */
function recallPlot(state, width) {
  const { model, L, order } = state;
  const height = 96;
  const x = (/** @type {number} */ budget) => 34 + (width - 44) * (L ? budget / L : 0);
  const y = (/** @type {number} */ recall) => 8 + (height - 30) * (1 - recall);
  const svg = make("svg", {
    height,
    viewBox: `0 0 ${width} ${height}`,
    role: "img",
    "aria-label": "recall over the budget",
  });

  // axes, and the present budget
  const k = state.choice().budget;
  for (const v of [0, 0.5, 1]) {
    svg.append(across(x(0), x(L), y(v)), soft(28, y(v) + 4, percent(v, 0), "end"));
  }
  for (const b of new Set([0, Math.round(L / 2), L]))
    svg.append(soft(x(b), height - 6, b, "middle"));
  svg.append(soft(x(L / 4), height - 6, "budget", "middle"));
  const upright = { x1: x(k), x2: x(k), y1: y(0), y2: y(1), "stroke-dasharray": "3 3" };
  svg.append(make("line", { class: "grid", ...upright }));

  // a line for each method, without one over budgets that were not measured
  const nested = range(L + 1).map((b) => maskOf(order.slice(0, b), L));
  const lines = [{ name: "gates", sets: nested }, ...state.others()];
  const color = (/** @type {number} */ n) => (n ? OKABE_ITO[n % 7] : "var(--fm-full)");
  const drawn = new Set();
  lines.forEach((line, n) => {
    let d = "";
    let before = NaN;
    /** @type {Element[]} */
    const dots = [];
    line.sets.forEach((mask, b) => {
      const recall = mask && state.recallOf(mask);
      if (!recall) return;
      const v = recall.recall;
      drawn.add(mask);
      d += `${before === b - 1 ? "L" : "M"}${x(b)} ${y(v)}`;
      before = b;
      const words = `${line.name}, budget ${b}: ${percent(v)} in layers ${listed(mask)}`;
      dots.push(dot(x(b), y(v), words, { r: 3.5, fill: color(n) }));
    });
    const look = { stroke: color(n), "stroke-width": 2, fill: "none" };
    svg.append(make("path", { d: d || "M0 0", ...look }), ...dots);
  });

  // sets by hand, and a ring around the present one
  const hollow = { fill: "none", stroke: "currentColor", "stroke-width": 1.5 };
  for (const mask of Object.keys(model.get("recalls"))) {
    const recall = state.recallOf(mask);
    if (drawn.has(mask) || !recall) continue;
    const words = `by hand, layers ${listed(mask)}: ${percent(recall.recall)}`;
    svg.append(dot(x(layersOf(mask).length), y(recall.recall), words, { r: 3.5, ...hollow }));
  }
  const now = state.recallOf(maskOf(state.picked(), L));
  const ring = { r: 7, fill: "none", stroke: "var(--fm-mark)", "stroke-width": 2 };
  if (now) svg.append(make("circle", { cx: x(k), cy: y(now.recall), ...ring }));

  const keys = lines.map((line, n) => {
    const key = make("span", { class: "fm-key", text: line.name });
    key.style.setProperty("--c", color(n));
    return key;
  });
  return [svg, make("div", { class: "fm-row" }, ...keys)];
}

/** @param {string} mask */
const listed = (mask) => layersOf(mask).join(", ") || "none";

/**
 * A measured set.
 * @param {number} cx @param {number} cy @param {string} words shown by the pointer
 * @param {Attributes} look
 */
const dot = (cx, cy, words, look) =>
  make("circle", { cx, cy, ...look }, make("title", { text: words }));
