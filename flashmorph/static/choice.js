// @ts-check
// What a budget and pins choose, as flashmorph.show.explorer.Choice does; no picture is drawn here.

/**
 * The layers that keep full attention: pinned ones, then the first of the order.
 * @param {number[]} order most important first @param {Choice} choice
 */
function chosen(order, { budget, pinned_full, pinned_linear }) {
  const free = order.filter((i) => !pinned_full.includes(i) && !pinned_linear.includes(i));
  return [...pinned_full, ...free.slice(0, budget - pinned_full.length)].sort((a, b) => a - b);
}

/**
 * How a layer is pinned: "full", "linear", or "".
 * @param {Choice} choice @param {number} layer
 */
function pinOf({ pinned_full, pinned_linear }, layer) {
  if (pinned_full.includes(layer)) return "full";
  return pinned_linear.includes(layer) ? "linear" : "";
}

/**
 * The choice with a layer pinned in another way ("" frees it).
 * @param {Choice} choice @param {number} layer @param {string} kind
 * @returns {Choice}
 */
function repinned({ budget, pinned_full, pinned_linear }, layer, kind) {
  /** @param {number[]} pins @param {boolean} on */
  const moved = (pins, on) =>
    [...pins.filter((i) => i !== layer), ...(on ? [layer] : [])].sort((a, b) => a - b);
  return {
    budget,
    pinned_full: moved(pinned_full, kind === "full"),
    pinned_linear: moved(pinned_linear, kind === "linear"),
  };
}

/**
 * Why a choice cannot be: pins that contradict the budget. Empty if it can.
 * @param {Choice} choice @param {number} L
 */
function refusal({ budget, pinned_full, pinned_linear }, L) {
  const full = pinned_full.length;
  const linear = pinned_linear.length;
  if (budget < full) return `${plural(full, "layer")} pinned full: the budget cannot be lower`;
  if (budget > L - linear) {
    return `${plural(linear, "layer")} pinned linear: the budget cannot be higher`;
  }
  return "";
}

/** @param {Choice} a @param {Choice} b */
const sameChoice = (a, b) =>
  a.budget === b.budget &&
  String(a.pinned_full) === String(b.pinned_full) &&
  String(a.pinned_linear) === String(b.pinned_linear);

/**
 * The past after a change from `now`: at most the last hundred choices.
 * @param {Choice[]} past @param {Choice} now
 */
const remembered = (past, now) => [...past, now].slice(-100);

/**
 * Tokens that a user typed: "4096", "4,096", "4k", "1m"; NaN for anything else.
 * @param {string} text
 */
function parseTokens(text) {
  const bare = text.trim().toLowerCase().replace(/[ ,_]/g, "");
  const found = bare.match(/^([\d.]+)([km]?)$/);
  if (!found) return NaN;
  return +found[1] * (found[2] === "k" ? 1024 : found[2] === "m" ? 1024 ** 2 : 1);
}
