// @ts-check
// The chart of the explorer: scores as bars, this set and those of the others as strips below,
// one column a layer.

/** Heights in pixels. */
const CHART = { top: 12, bars: 104, strip: 15, lane: 22 };

/**
 * @param {ReturnType<typeof explorerState>} state
 * @param {ReturnType<typeof explorerActions>} act
 * @param {() => void} say updates the line below the chart
 */
function layerChart(state, act, say) {
  const { L } = state;
  const node = make("div", { class: "fm-chart" });
  /** @type {ReturnType<typeof layerCell>[]} */
  let cells = [];
  /** @type {Element[]} */
  let remarks = [];
  /** @type {number | null} */
  let hovered = null;

  /** @param {number} layer @param {boolean} [focus] */
  function select(layer, focus = false) {
    cells.forEach((cell, i) => put(cell.group, { tabindex: i === layer ? 0 : -1 }));
    if (focus) cells[layer].group.focus();
  }

  /** @param {KeyboardEvent} e @param {number} layer */
  function key(e, layer) {
    const actions = {
      ArrowRight: () => select(clamp(layer + 1, 0, L - 1), true),
      ArrowLeft: () => select(clamp(layer - 1, 0, L - 1), true),
      Enter: () => act.cycle(layer),
      " ": () => act.cycle(layer),
      f: () => act.pin(layer, "full"),
      l: () => act.pin(layer, "linear"),
      Delete: () => act.pin(layer, ""),
      Backspace: () => act.pin(layer, ""),
      z: act.undo,
    };
    const action = /** @type {Record<string, () => any>} */ (actions)[e.key];
    if (!action || e.ctrlKey || e.metaKey) return;
    e.preventDefault();
    e.stopPropagation();
    action();
  }

  /** @param {number} layer what a layer listens to */
  function listeners(layer) {
    const hover = (/** @type {number | null} */ to) => () => {
      hovered = to;
      say();
    };
    return {
      onclick() {
        select(layer);
        act.cycle(layer);
      },
      onkeydown: (/** @type {KeyboardEvent} */ e) => key(e, layer),
      onmouseenter: hover(layer),
      onmouseleave: hover(null),
      onfocus: hover(layer),
      onblur: hover(null),
    };
  }

  /** @param {number} width */
  function build(width) {
    const names = ["this set", ...state.others().map((method) => method.name)];
    const c = columns(width, L, 104, 104);
    const { svg, y } = chartFrame(state, names, c, width);
    cells = range(L).map((i) => layerCell(state, i, names.length, c, y, listeners(i)));
    svg.append(...cells.map((cell) => cell.group));
    remarks = names.map((_, n) => soft(Math.min(c.end + 10, width - 96), y(n) + 12, ""));
    svg.append(...remarks);
    node.replaceChildren(svg);
    paint();
  }

  function paint() {
    if (!cells.length) return;
    const { budget, pinned_full, pinned_linear } = state.choice();
    const mask = maskOf(state.picked(), L);
    const masks = [mask, ...state.others().map((method) => method.sets[budget])];
    cells.forEach((cell) => cell.paint(masks));
    const pins = pinned_full.length + pinned_linear.length;
    masks.forEach((m, n) => {
      const same = m ? `${shared(m, mask)} of ${budget} shared` : "none at this budget";
      put(remarks[n], { text: n ? same : pins ? plural(pins, "pin") : "" });
    });
  }

  return { node, build, paint, hovered: () => hovered };
}

/**
 * Axes and names.
 * @param {ReturnType<typeof explorerState>} state @param {string[]} names of the strips
 * @param {ReturnType<typeof columns>} c @param {number} width
 */
function chartFrame(state, names, c, width) {
  const { top, bars, lane } = CHART;
  /** @param {number} n the n-th strip */
  const y = (n) => top + bars + 12 + n * lane;
  const foot = y(names.length) + 12;
  const svg = make("svg", {
    height: foot + 4,
    viewBox: `0 0 ${width} ${foot + 4}`,
    role: "group",
    "aria-label": "layers: arrow keys move, Enter pins",
  });
  for (const v of [0, 1]) {
    const level = top + bars * (1 - v);
    svg.append(across(c.left - 4, c.end, level), soft(c.left - 10, level + 4, v, "end"));
  }
  svg.append(make("text", { x: 0, y: top + bars / 2 + 4, text: state.scoreName() }));
  svg.append(soft(0, foot, "layer"));
  names.forEach((name, n) => {
    const weight = n ? 400 : 600;
    svg.append(make("text", { x: 0, y: y(n) + 12, text: short(name), "font-weight": weight }));
  });
  for (const i of labelled(state.L, c.step)) svg.append(soft(c.mid(i), foot, i, "middle"));
  return { svg, y };
}

/**
 * One layer: a bar, a cell in each strip, and the mark of a pin.
 * @param {ReturnType<typeof explorerState>} state @param {number} layer
 * @param {number} strips how many @param {ReturnType<typeof columns>} c
 * @param {(n: number) => number} y @param {Record<string, any>} listeners
 */
function layerCell(state, layer, strips, c, y, listeners) {
  const { top, bars, strip } = CHART;
  const scores = state.scores();
  const low = Math.min(0, ...scores);
  const high = Math.max(1, ...scores);
  const tall = Math.max(1.5, (bars * (scores[layer] - low)) / (high - low));
  const place = { x: c.x(layer), width: c.width, rx: 1.5 };
  const bar = make("rect", { ...place, y: top + bars - tall, height: tall });
  const cuts = range(strips).map((n) =>
    make("rect", { ...place, y: y(n), height: strip, "data-row": n }),
  );
  const mark = make("path", { fill: "var(--fm-mark)" });
  const ring = make("rect", {
    class: "ring",
    x: c.left + c.step * layer,
    width: c.step,
    y: top - 10,
    height: y(1) - top + 6,
    rx: 3,
  });
  const attributes = { role: "button", tabindex: layer ? -1 : 0, "data-layer": layer };
  const group = make("g", { ...attributes, ...listeners }, ring, bar, ...cuts, mark);

  /** A triangle: up for full, down for linear. @param {string} pinned */
  function triangle(pinned) {
    const s = Math.min(5, c.width / 2.4);
    const middle = y(0) + strip / 2;
    if (!pinned) return "M0 0";
    return pinned === "full"
      ? `M${c.mid(layer)} ${middle - s} l${s} ${2 * s} h${-2 * s} z`
      : `M${c.mid(layer) - s} ${middle - s} h${2 * s} l${-s} ${2 * s} z`;
  }

  /** @param {string[]} masks of the strips; empty where a method has no set */
  function paint(masks) {
    const on = masks[0][layer] === "1";
    const pinned = pinOf(state.choice(), layer);
    put(bar, { class: on ? "full" : "linear" });
    cuts.forEach((cut, n) => {
      const kind = masks[n] && masks[n][layer] === "1" ? "full" : "linear";
      put(cut, { class: kind, opacity: masks[n] ? 1 : 0.25 });
    });
    put(mark, { d: triangle(pinned) });
    const score = `${state.scoreName()} ${rounded(scores[layer], 2)}`;
    const kind = `${on ? "full attention" : "linear"}${pinned ? `, pinned ${pinned}` : ""}`;
    put(group, { "aria-pressed": String(on), "aria-label": `layer ${layer}, ${score}, ${kind}` });
  }

  return { group, paint };
}
