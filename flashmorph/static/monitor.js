// @ts-check
// The monitor of a training: one curve a layer (or a heat map), the loss below, and the set that
// the gates would give at a budget.

/** @param {{ model: Model, el: HTMLElement }} view */
function render({ model, el }) {
  const t = trace(model);
  /** @type {number | null} */
  let at = null; // the column looked at; null is the newest
  let kind = "";
  let timer = 0;
  let hover = "";
  let drawn = 0;

  // what is shown
  const last = () => t.kept().length - 1;
  const here = () => (at === null ? last() : Math.min(at, last()));
  const shownKind = () => kind || (t.L() <= 12 ? "lines" : "heat");
  /** @param {number} n */
  function look(n) {
    at = n >= last() ? null : n;
    paint();
  }

  // play
  function halt() {
    clearInterval(timer);
    timer = 0;
    put(play, { text: "▶", "aria-label": "play" });
  }
  function start() {
    if (here() >= last()) at = 0;
    put(play, { text: "❚❚", "aria-label": "pause" });
    const next = () => {
      look(here() + 1);
      if (at === null) halt();
    };
    timer = window.setInterval(next, clamp(6000 / t.kept().length, 30, 120));
  }

  // controls
  const status = make("span", { class: "fm-status" });
  const facts = make("span", { class: "soft fm-facts" });
  const bar = make("div");
  const toggle = make("button", {
    class: "fm-toggle",
    onclick() {
      kind = shownKind() === "lines" ? "heat" : "lines";
      paint();
    },
  });
  const chart = make("div", { class: "fm-chart" });
  const note = make("div", { class: "fm-note", role: "status" });
  const slider = make("input", {
    type: "range",
    min: 0,
    step: 1,
    class: "fm-scrub",
    "aria-label": "step of the training",
    oninput() {
      halt();
      look(+slider.value);
    },
  });
  const play = make("button", {
    class: "fm-play",
    text: "▶",
    "aria-label": "play",
    onclick: () => (timer ? halt() : start()),
  });
  const budget = make("input", {
    type: "number",
    min: 0,
    step: 1,
    class: "fm-budget",
    "aria-label": "budget",
    onchange() {
      change(model, { budget: clamp(Math.round(+budget.value) || 0, 0, t.L()) });
      paint();
    },
  });
  const budgetLabel = make("span", { class: "soft", text: "set at budget" });
  const budgetRow = make("label", { class: "fm-row" }, budgetLabel, budget);
  const set = make("span", { class: "fm-set" });
  const progress = make("div", { class: "fm-thin" }, bar);
  const top = make(
    "div",
    { class: "fm-row" },
    status,
    make("div", { class: "fm-grow" }, progress),
    facts,
    toggle,
  );
  const scrub = make(
    "div",
    { class: "fm-row" },
    play,
    make("div", { class: "fm-grow" }, slider),
    budgetRow,
    set,
  );
  const root = make("div", { class: "fm fm-monitor" }, top, chart, scrub, note);
  el.append(own(root));

  function paintControls() {
    const n = here();
    const step = t.kept()[n] ?? 0;
    const gates = t.what() === "gate";
    put(status, { text: statusText(model) });
    put(facts, { text: speedText(model) });
    bar.style.width = t.total() ? `${(100 * t.done()) / t.total()}%` : "0";
    toggle.style.display = t.L() ? "" : "none";
    scrub.style.display = last() > 0 ? "" : "none";
    budgetRow.style.display = set.style.display = gates ? "" : "none";
    put(toggle, { text: shownKind() === "lines" ? "heat map" : "lines" });
    put(slider, { max: Math.max(0, last()), "aria-valuetext": `step ${step}` });
    slider.value = n;
    if (document.activeElement !== budget) budget.value = t.budget();
    put(budget, { max: t.L() });
    const now = gates && t.running() ? " the set is that of now, not final" : "";
    const doubt = at === null ? t.doubt() : "";
    put(note, { text: hover || (at === null ? doubt : `at step ${step}`) + now });
  }

  function paint(width = Math.round(chart.clientWidth)) {
    const n = here();
    const order = n >= 0 ? t.order(n) : [];
    const kept = t.what() === "gate" ? order.slice(0, t.budget()) : [];
    paintControls();
    put(set, { text: `layers ${[...kept].sort((a, b) => a - b).join(", ") || "none"}` });
    if (width > 0 && n >= 0) {
      const say = (/** @type {string} */ words) => {
        hover = words;
        put(note, { text: words });
      };
      chart.replaceChildren(
        drawTrace(t, { width, n, order, set: new Set(kept) }, shownKind(), say),
      );
    }
    root.dataset.drawn = ++drawn;
  }

  const seen = ["frame", "running", "budget", "stage", "orders"];
  const stops = [fit(chart, paint), follow(model, seen, () => paint())];
  paint();
  return () => {
    halt();
    stops.forEach((stop) => stop());
  };
}
export default { render };
