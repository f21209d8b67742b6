// @ts-check
// Recall over depth and length, for one or more models.

/** @param {{ model: Model, el: HTMLElement }} view */
function render({ model, el }) {
  /** @type {Grid[]} */
  const grids = model.get("maps");
  const chart = make("div", { class: "fm-chart" });
  const note = make("div", { class: "fm-note", role: "status" });
  const tabs = grids.map((grid, n) =>
    make("button", {
      text: grid.name,
      onclick() {
        change(model, { shown: n });
        paint();
      },
    }),
  );
  const title = make("span", { class: "fm-title", text: "Recall" });
  const top = make("div", { class: "fm-row top" }, title, ...(grids.length > 1 ? tabs : []));
  el.append(own(make("div", { class: "fm fm-recall-map" }, top, chart, note)));

  function paint(width = Math.round(chart.clientWidth)) {
    const shown = model.get("shown");
    tabs.forEach((tab, n) => put(tab, { "aria-pressed": String(n === shown) }));
    if (!(width > 0)) return;
    chart.replaceChildren(recallMap(grids[shown], width, (text) => put(note, { text })));
  }

  const stops = [fit(chart, paint), follow(model, ["shown"], () => paint())];
  paint();
  return () => stops.forEach((stop) => stop());
}

/** @param {Grid} grid @param {number} width @param {(text: string) => void} say */
function recallMap(grid, width, say) {
  const cols = grid.lengths.length;
  const rows = grid.recall.length;
  const [left, right, top] = [92, 64, 4];
  const step = Math.min(96, (width - left - right) / cols);
  const lane = clamp(220 / rows, 16, 34);
  const bottom = top + lane * rows;
  const height = bottom + 40;
  const svg = make("svg", {
    height,
    viewBox: `0 0 ${width} ${height}`,
    role: "img",
    "aria-label": `recall of ${grid.name}`,
  });
  grid.recall.forEach((row, d) => {
    const ends = [d / rows, (d + 1) / rows].map((share) => rounded(100 * share, 0));
    const depth = `${ends.join("–")} %`;
    const y = top + lane * d;
    if (lane >= 18 || d % 2 === 0) svg.append(soft(left - 10, y + lane / 2 + 4, depth, "end"));
    row.forEach((recall, c) => {
      const where = `${grid.name}, ${grouped(grid.lengths[c])} tokens, depth ${depth}`;
      const words = recallWords(recall, grid.counts[d][c]);
      const box = { x: left + step * c, y, width: step, height: lane };
      svg.append(...recallCell(recall, box, `${where}: ${words}`, say));
    });
  });
  grid.lengths.forEach((n, c) => {
    svg.append(soft(left + step * (c + 0.5), bottom + 16, grouped(n), "middle"));
  });
  const middle = { x: left + (step * cols) / 2, y: height - 4, "text-anchor": "middle" };
  svg.append(make("text", { ...middle, text: "length, tokens" }));
  const high = lane * rows;
  svg.append(upward(top + high / 2, high < 130 ? "depth" : "depth of the passkey"));
  return svg;
}

/** @param {number | null} recall @param {number} count */
const recallWords = (recall, count) =>
  recall === null
    ? "no passkey here"
    : `${percent(recall)} of the answer tokens, ${plural(count, "passkey")}`;

/**
 * One cell: a colour with a number, or an empty frame where nothing is known.
 * @param {number | null} recall @param {{x: number, y: number, width: number, height: number}} box
 * @param {string} words @param {(text: string) => void} say
 */
function recallCell(recall, { x, y, width, height }, words, say) {
  const blue = recall === null ? 0 : Math.round(4 + 96 * recall);
  const fill = `color-mix(in oklab, #0072B2 ${blue}%, var(--fm-linear))`;
  const look = recall === null ? { fill: "none", stroke: "var(--fm-line)" } : { fill };
  const cell = make(
    "rect",
    {
      class: "fm-cell",
      x: x + 1,
      y: y + 1,
      width: width - 2,
      height: height - 2,
      rx: 2,
      ...look,
      onmouseenter: () => say(words),
      onmouseleave: () => say(""),
    },
    make("title", { text: words }),
  );
  if (recall === null || width < 34) return [cell];
  const text = make("text", {
    x: x + width / 2,
    y: y + height / 2 + 4,
    "text-anchor": "middle",
    "pointer-events": "none",
    style: recall > 0.55 ? "fill: #fff" : "",
    text: rounded(100 * recall, 0),
  });
  return [cell, text];
}
export default { render };
