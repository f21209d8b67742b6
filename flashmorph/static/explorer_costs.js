// @ts-check
// The panel of costs: a total, and what each full layer adds to it, for each context that Python
// has counted.

/**
 * @param {ReturnType<typeof explorerState>} state
 * @param {() => void} repaint
 */
function costPanel({ model, L, live, picked }, repaint) {
  const metrics = model.get("costs").metrics;

  /** The context that is nearest to `n` and can be shown. @param {number} n */
  function possible(n) {
    if (live) return Math.min(n, 2 ** 27);
    const away = (/** @type {number} */ m) => Math.abs(Math.log(m / n));
    const known = Object.keys(model.get("costs").tables).map(Number);
    return known.reduce((a, b) => (away(b) < away(a) ? b : a));
  }

  /** @param {number} n tokens */
  function setContext(n) {
    const tokens = Math.round(n);
    if (tokens >= 1) change(model, { context: possible(tokens) });
    repaint();
  }
  const double = () => setContext(model.get("context") * 2);
  const halve = () => setContext(model.get("context") / 2);

  // the context length
  const field = make("input", {
    type: "text",
    class: "fm-context",
    inputmode: "numeric",
    "aria-label": "context length in tokens",
    title: "tokens; k and m work, arrow keys double and halve",
    onchange: () => setContext(parseTokens(field.value)),
    onkeydown(/** @type {KeyboardEvent} */ e) {
      if (e.key !== "ArrowUp" && e.key !== "ArrowDown") return;
      e.preventDefault();
      if (e.key === "ArrowUp") double();
      else halve();
    },
  });
  const head = make(
    "div",
    { class: "fm-row" },
    make("span", { class: "fm-title", text: "Cost at a context of" }),
    make("button", { text: "−", "aria-label": "halve the context", onclick: halve }),
    field,
    make("button", { text: "+", "aria-label": "double the context", onclick: double }),
    make("span", { class: "soft", text: "tokens" }),
  );

  // one row a metric
  const table = make("div", { class: "fm-costs" });
  const rows = metrics.map((/** @type {any} */ metric) => {
    const value = make("span", { class: "num fm-value", "data-metric": metric.key });
    const fill = make("div");
    const share = make("span", { class: "num soft" });
    table.append(
      make("span", { text: metric.name, title: metric.help }),
      value,
      make("div", { class: "fm-bar", title: "of the teacher" }, fill),
      share,
    );
    return { value, fill, share };
  });
  table.append(
    make("span", {
      class: "soft",
      style: "grid-column: 1 / -1; text-align: right",
      text: "bars: share of what the teacher needs",
    }),
  );

  function paint() {
    const context = model.get("context");
    const counted = model.get("costs").tables[context];
    if (document.activeElement !== field) field.value = grouped(context);
    rows.forEach((/** @type {any} */ row, /** @type {number} */ n) => {
      if (!counted) {
        put(row.value, { text: "…" });
        put(row.share, { text: "" });
        row.fill.style.width = "0";
        return;
      }
      const here = costOf(counted, n, picked());
      const share = here / (costOf(counted, n, range(L)) || 1);
      put(row.value, { text: amount(here, metrics[n].unit) });
      put(row.share, { text: percent(share, 0) });
      row.fill.style.width = `${clamp(100 * share, 0, 100)}%`;
    });
  }

  return { node: make("div", { class: "fm-panel fm-cost-panel" }, head, table), paint };
}

/**
 * The n-th metric of a set of layers.
 * @param {{ base: number[], delta: number[][], kinds: number[] }} table as `cost_table` counts it
 * @param {number} n @param {number[]} layers
 */
const costOf = ({ base, delta, kinds }, n, layers) =>
  layers.reduce((sum, i) => sum + delta[kinds[i]][n], base[n]);
