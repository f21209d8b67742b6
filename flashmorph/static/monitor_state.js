// @ts-check
// What the monitor reads from the model, and says of it; no picture is drawn here.

/**
 * What the monitor reads from the model.
 * @param {Model} model
 */
function trace(model) {
  return {
    /** @returns {number} layers, 0 if the stage has nothing to show of each */
    L: () => model.get("num_layers"),
    /** @returns {number[]} the steps that are drawn */
    kept: () => model.get("kept"),
    /** @returns {string} "gate", "loss" or nothing */
    what: () => model.get("what"),
    /** @returns {number} */
    budget: () => model.get("budget"),
    /** Why the set at the budget might be another, or nothing. @returns {string} */
    doubt: () => model.get("doubts")[model.get("budget")] ?? "",
    /** @returns {number} */
    done: () => model.get("done"),
    /** @returns {number} */
    total: () => model.get("total"),
    /** Only a kernel can run. @returns {boolean} */
    running: () => model.get("running") && !model.alone,
    /** @returns {Record<string, (number | null)[]>} */
    losses: () => model.get("losses"),
    /** Layers at the n-th step that is drawn, most worth keeping first. @param {number} n */
    order(n) {
      const L = model.get("num_layers");
      if (model.get("what") !== "gate") return range(L);
      const all = unpack(model.get("orders"), 2);
      if (all.length >= (n + 1) * L) return Array.from(all.subarray(n * L, (n + 1) * L));
      return /** @type {number[]} */ (model.get("order"));
    },
    /** Values from 0 to 1, and what they stand for. */
    values() {
      const bytes = unpack(model.get("matrix"));
      const L = model.get("num_layers");
      const [low, high] = model.get("span");
      const log = model.get("log");
      return {
        /** @param {number} n @param {number} layer */
        at: (n, layer) => bytes[n * L + layer] / 255,
        /** @param {number} v */
        real: (v) => (log ? 10 ** (low + v * (high - low)) : low + v * (high - low)),
      };
    },
  };
}

/** Where the training is, in words. @param {Model} model */
function statusText(model) {
  const t = trace(model);
  const stage = model.get("stage");
  if (!stage) return "waiting for a training";
  const stopped = !model.get("running") && t.done() < t.total() ? ", stopped" : "";
  return `${stage}: step ${t.done()} of ${t.total()}${stopped}`;
}

/** How fast it is, in words. @param {Model} model */
function speedText(model) {
  const t = trace(model);
  const rate = model.get("rate");
  const seconds = model.get("seconds");
  const facts = [];
  if (rate) {
    const speed =
      rate >= 1 ? `${rate.toPrecision(3)} steps/s` : `${(1 / rate).toPrecision(3)} s/step`;
    facts.push(speed);
  }
  if (t.running() && rate) facts.push(`${duration((t.total() - t.done()) / rate)} left`);
  const taken = model.get("taken") || {};
  if (taken.tokens_s) facts.push(`${amount(taken.tokens_s, "count")} tokens/s`);
  if (taken.tokens) facts.push(`${amount(taken.tokens, "count")} tokens so far`);
  if (taken.peak_memory) facts.push(`peak ${amount(taken.peak_memory, "bytes")}`);
  if (!t.running() && seconds) facts.push(`took ${duration(seconds)}`);
  return facts.join(" · ");
}
