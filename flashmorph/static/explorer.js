// @ts-check
// The budget explorer. Everything seen follows from (budget, pins, context); the kernel is asked
// only to measure, to count and to commit.

/**
 * The line below the chart.
 * @param {ReturnType<typeof explorerState>} state
 * @param {number | null} layer the layer under the pointer
 * @param {string} complaint
 */
function explorerNote({ model, L, place, scores, scoreName, choice, picked }, layer, complaint) {
  if (layer !== null && !complaint) {
    const pinned = pinOf(choice(), layer);
    const score = `${scoreName()} ${rounded(scores()[layer], 3)}, place ${place[layer]} of ${L}`;
    const kind = picked().includes(layer) ? "full attention" : "linear";
    return `layer ${layer}: ${score}, ${kind}${pinned ? ` (pinned ${pinned})` : ""}`;
  }
  const done = model.get("committed");
  if (complaint || model.get("error")) return complaint || model.get("error");
  const hint = "Click a layer to pin it: once full, twice linear, three times free.";
  const { budget, pinned_full, pinned_linear } = choice();
  const free = !pinned_full.length && !pinned_linear.length;
  const doubt = free ? model.get("doubts")[budget] : "";
  if (!done.layers) return doubt ? `Doubtful: ${doubt}. ${hint}` : hint;
  const same = String(done.layers) === String(picked());
  return [
    same ? "Committed" : "Changed since the commit of",
    ` layers ${done.layers.join(", ") || "none"}`,
    done.file ? ` → ${done.file}` : "",
    same && done.hybrid ? "; the hybrid is in .hybrid" : "",
  ].join("");
}

/**
 * The line under the slider: how sure the set is, if that was measured for this very set.
 * @param {ReturnType<typeof explorerState>} state
 */
function confidenceLine({ model, choice }) {
  const { budget, pinned_full, pinned_linear } = choice();
  if (pinned_full.length || pinned_linear.length) return "";
  const sure = model.get("confidence")[budget];
  return sure ? `Confidence: ${sure}.` : "";
}

/** @param {{ model: Model, el: HTMLElement }} view */
function render({ model, el }) {
  const state = explorerState(model);
  const { L, live } = state;
  let complaint = "";
  const act = explorerActions(state, (words) => {
    complaint = words;
    paint();
  });

  // controls
  const slider = make("input", {
    type: "range",
    min: 0,
    max: L,
    step: 1,
    class: "fm-slider",
    "aria-label": "budget: layers that keep full attention",
    oninput: () => act.setBudget(+slider.value, true),
    onchange: act.release,
  });
  const count = make("span", { class: "fm-count" });
  const undo = make("button", {
    text: "Undo",
    class: "fm-undo",
    title: "take back the last change",
    onclick: act.undo,
  });
  const reset = make("button", {
    text: "Reset",
    class: "fm-reset",
    title: "back to how it began",
    onclick: act.reset,
  });
  const commit = make("button", {
    text: "Commit",
    class: "main fm-commit",
    onclick() {
      complaint = "committing …";
      model.send({ do: "commit" });
      say();
    },
  });
  const note = make("div", { class: "fm-note", role: "status", "aria-live": "polite" });
  const sure = make("div", { class: "fm-sure" });

  // parts
  const chart = layerChart(state, act, say);
  const costs = model.get("costs").metrics ? costPanel(state, paint) : null;
  const known = Object.keys(model.get("recalls")).length > 0;
  const recall = (live && model.get("can_measure")) || known ? recallPanel(state) : null;
  const top = make(
    "div",
    { class: "fm-row top" },
    make("span", { class: "fm-title", text: "Budget" }),
    make("div", { class: "fm-grow" }, slider),
    count,
    undo,
    reset,
    live ? commit : null,
  );
  const panels = make("div", { class: "fm-panels" }, costs && costs.node, recall && recall.node);
  el.append(own(make("div", { class: "fm fm-explorer" }, top, sure, chart.node, note, panels)));

  function say() {
    const warn = complaint || model.get("error");
    const text = explorerNote(state, chart.hovered(), complaint);
    put(note, { text, class: warn ? "fm-note warn" : "fm-note" });
  }

  /** Attributes only, so that focus stays and 100 layers stay quick. */
  function paint() {
    const now = state.choice();
    if (+slider.value !== now.budget) slider.value = now.budget;
    put(slider, { "aria-valuetext": `${now.budget} of ${L}` });
    put(count, { text: `${now.budget} of ${plural(L, "layer")} full` });
    undo.disabled = !model.get("history").length;
    reset.disabled = sameChoice(now, model.get("begun"));
    put(sure, { text: confidenceLine(state) });
    chart.paint();
    if (costs) costs.paint();
    if (recall) recall.paint();
    say();
  }

  const seen = ["budget", "pinned_full", "pinned_linear", "history", "costs", "context", "error"];
  const stops = [
    fit(chart.node, chart.build),
    follow(model, [...seen, "recalls", "progress"], paint),
    follow(model, ["committed"], () => {
      complaint = "";
      paint();
    }),
  ];
  paint();
  return () => stops.forEach((stop) => stop());
}
export default { render };
