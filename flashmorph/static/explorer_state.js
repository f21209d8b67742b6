// @ts-check
// The state of the explorer and the changes by hand; no picture is drawn here.

/**
 * What the parts of the explorer read, and how they change it.
 * @param {Model} model
 */
function explorerState(model) {
  /** @type {number[]} */
  const order = model.get("order");
  const L = order.length;
  /** @type {number[]} */
  const place = [];
  order.forEach((layer, n) => (place[layer] = n + 1));
  /** @returns {Choice} */
  const choice = () => ({
    budget: model.get("budget"),
    pinned_full: model.get("pinned_full"),
    pinned_linear: model.get("pinned_linear"),
  });
  return {
    model,
    L,
    order,
    place,
    live: !model.alone,
    choice,
    /** @returns {Method[]} */
    others: () => model.get("others"),
    /** @returns {number[]} */
    scores: () => model.get("scores"),
    /** @returns {string} */
    scoreName: () => model.get("score_name"),
    picked: () => chosen(order, choice()),
    /** @param {string} mask @returns {{recall: number, exact: number} | undefined} */
    recallOf: (mask) => model.get("recalls")[mask],
  };
}

/**
 * Changes by hand; each is remembered, so that it can be undone, and one drag is one change.
 * @param {ReturnType<typeof explorerState>} state
 * @param {(complaint: string) => void} tell shows what was refused, and paints
 */
function explorerActions({ model, L, choice }, tell) {
  let dragging = false;

  /** @param {Choice} to @param {string} [complaint] */
  function go(to, complaint = "") {
    const now = choice();
    if (!sameChoice(now, to)) {
      const past = model.get("history");
      change(model, dragging ? { ...to } : { ...to, history: remembered(past, now) });
    }
    tell(complaint);
  }

  /** @param {number} k @param {boolean} drag whether the slider is still held */
  function setBudget(k, drag) {
    const now = choice();
    const budget = clamp(k, now.pinned_full.length, L - now.pinned_linear.length);
    const moves = budget !== now.budget;
    go({ ...now, budget }, refusal({ ...now, budget: k }, L));
    if (moves) dragging = drag;
  }

  /** @param {number} layer @param {string} kind @returns {boolean} whether the budget allows it */
  function pin(layer, kind) {
    dragging = false;
    const now = choice();
    const to = repinned(now, layer, kind);
    if (!refusal(to, L)) {
      go(to);
      return true;
    }
    const k = now.budget;
    tell(
      kind === "full"
        ? `all ${k} of the budget are pinned already: raise the budget to pin layer ${layer} full`
        : `budget ${k} needs layer ${layer}: lower the budget to pin it linear`,
    );
    return false;
  }

  /** Once full, twice linear, three times free; what the budget forbids is skipped. */
  function cycle(/** @type {number} */ layer) {
    const kinds = ["", "full", "linear"];
    const at = kinds.indexOf(pinOf(choice(), layer));
    if (!pin(layer, kinds[(at + 1) % 3])) pin(layer, kinds[(at + 2) % 3]);
  }

  function undo() {
    dragging = false;
    const past = model.get("history");
    if (!past.length) return;
    change(model, { ...past[past.length - 1], history: past.slice(0, -1) });
    tell("");
  }

  function reset() {
    dragging = false;
    go(model.get("begun"));
  }

  return { setBudget, pin, cycle, undo, reset, release: () => (dragging = false) };
}
