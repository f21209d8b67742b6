// @ts-check
// The picture of the monitor: lines or a heat map of the layers, and the loss below.

// Ten colours of Cividis, which colour-blind readers see as others do.
const CIVIDIS = [
  [0, 34, 78],
  [18, 53, 112],
  [59, 73, 108],
  [87, 93, 109],
  [112, 113, 115],
  [138, 134, 120],
  [165, 156, 116],
  [195, 179, 105],
  [225, 204, 85],
  [254, 232, 56],
];

/** @param {number} v from 0 to 1 */
function cividis(v) {
  const p = clamp(v, 0, 1) * (CIVIDIS.length - 1);
  const i = Math.min(CIVIDIS.length - 2, Math.floor(p));
  return CIVIDIS[i].map((c, n) => Math.round(c + (CIVIDIS[i + 1][n] - c) * (p - i)));
}

/** The look of a layer's line. @param {number} layer */
const lineLook = (layer) => ({
  stroke: OKABE_ITO[layer % 7],
  "stroke-dasharray": ["", "6 3", "2 3"][Math.floor(layer / 7) % 3],
});

/** A value of any size, short. @param {number} v */
function named(v) {
  if (v === 0) return "0";
  if (Math.abs(v) >= 100) return v.toFixed(0);
  return Math.abs(v) >= 0.01 ? v.toPrecision(2) : v.toExponential(0);
}

/**
 * @typedef {{ width: number, n: number, order: number[], set: Set<number> }} Look
 * what is looked at: the width, the n-th step, the order of the layers there, the set
 */

/**
 * Where things are: `x` of a step, `y` of a value, the panel of layers from `top`, `tall` high, and
 * the panel of the loss from `under`, `deep` high.
 * @param {ReturnType<typeof trace>} t @param {number} width @param {string} kind
 */
function geometry(t, width, kind) {
  const L = t.L();
  const kept = t.kept();
  const left = 58;
  const end = width - (L && L <= 12 ? 116 : 40);
  const first = kept[0];
  const final = Math.max(kept[kept.length - 1], t.running() ? t.total() : 0, first + 1);
  const top = 12;
  const tall = !L ? 0 : kind === "lines" ? 220 : clamp(6 * L, 150, 330);
  const under = L ? top + tall + 28 : top + 14;
  const deep = L ? 84 : 200;
  return {
    L,
    kept,
    left,
    end,
    first,
    final,
    top,
    tall,
    under,
    deep,
    width,
    height: under + deep + 22,
    /** @param {number} step */
    x: (step) => left + ((end - left) * (step - first)) / (final - first),
    /** @param {number} px */
    step: (px) => first + ((px - left) / (end - left)) * (final - first),
    /** @param {number} v from 0 to 1 */
    y: (v) => top + tall * (1 - v),
    /** The top of a layer's row in the heat map. @param {number} layer */
    row: (layer) => top + (tall * layer) / L,
  };
}

/**
 * @param {ReturnType<typeof trace>} t @param {Look} look @param {string} kind "lines" or "heat"
 * @param {(words: string) => void} say what the pointer is at
 */
function drawTrace(t, look, kind, say) {
  const g = geometry(t, look.width, kind);
  const svg = make("svg", { height: g.height, viewBox: `0 0 ${g.width} ${g.height}` });
  if (g.L) {
    if (kind === "lines") drawLines(svg, t, g, look);
    else drawHeat(svg, t, g, look.set);
    svg.append(upward(g.top + g.tall / 2, kind === "heat" ? "layer" : t.what()));
  }
  drawLoss(svg, t, g, look.n);

  // the axis of steps, and the step looked at
  const foot = g.under + g.deep + 16;
  svg.append(soft(g.x(g.first), foot, g.first), soft(g.x(g.final), foot, g.final, "end"));
  svg.append(soft(g.x((g.first + g.final) / 2), foot, "step", "middle"));
  const now = g.x(g.kept[look.n]);
  const mark = { stroke: "var(--fm-mark)", "stroke-width": 1.5, "stroke-dasharray": "4 3" };
  svg.append(make("line", { x1: now, x2: now, y1: g.top, y2: g.under + g.deep, ...mark }));

  svg.onmousemove = (/** @type {MouseEvent} */ e) => {
    const box = svg.getBoundingClientRect();
    say(pointed(t, g, kind, e.clientX - box.left, e.clientY - box.top));
  };
  svg.onmouseleave = () => say("");
  return svg;
}

/**
 * One line a layer; up to twelve have a legend that is the ranking.
 * @param {Element} svg @param {ReturnType<typeof trace>} t
 * @param {ReturnType<typeof geometry>} g @param {Look} look
 */
function drawLines(svg, t, g, look) {
  const values = t.values();
  for (const v of [0, 0.5, 1]) {
    const text = named(values.real(v));
    svg.append(across(g.left, g.end, g.y(v)), soft(g.left - 8, g.y(v) + 4, text, "end"));
  }
  for (const layer of range(g.L)) {
    const points = g.kept.map(
      (step, i) => `${g.x(step).toFixed(1)} ${g.y(values.at(i, layer)).toFixed(1)}`,
    );
    const attributes = { class: "fm-line", "data-layer": layer, fill: "none", "stroke-width": 2 };
    svg.append(make("path", { d: `M${points.join("L")}`, ...attributes, ...lineLook(layer) }));
  }
  if (g.L > 12) return;
  const gates = t.what() === "gate";
  look.order.forEach((layer, place) => {
    const y = g.top + 6 + place * Math.min(18, g.tall / g.L);
    const x = g.end + 14;
    const real = values.real(values.at(look.n, layer));
    const kept = look.set.has(layer);
    const sample = { x1: x, x2: x + 20, y1: y, y2: y, "stroke-width": 3 };
    svg.append(make("line", { ...sample, ...lineLook(layer) }));
    const text = {
      x: x + 26,
      y: y + 4,
      text: `${layer}   ${gates ? rounded(real, 2) : named(real)}`,
      "font-weight": kept ? 700 : 400,
      class: kept || !gates ? "" : "soft",
      style: "white-space: pre",
    };
    svg.append(make("text", text));
    const box = { class: "full", x: g.width - 10, y: y - 5, width: 10, height: 10, rx: 1.5 };
    if (kept) svg.append(make("rect", box));
  });
}

/**
 * One row a layer, one column a step, and marks for the layers of the set.
 * @param {Element} svg @param {ReturnType<typeof trace>} t
 * @param {ReturnType<typeof geometry>} g @param {Set<number>} set
 */
function drawHeat(svg, t, g, set) {
  const N = g.kept.length;
  const values = t.values();
  const canvas = make("canvas", { width: N, height: g.L });
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(N, g.L);
  for (const i of range(N)) {
    for (const layer of range(g.L)) {
      pixels.data.set([...cividis(values.at(i, layer)), 255], 4 * (layer * N + i));
    }
  }
  context.putImageData(pixels, 0, 0);
  const x = g.x(g.first);
  const width = Math.max(2, g.x(g.kept[N - 1]) - x);
  const stretched = { preserveAspectRatio: "none", style: "image-rendering: pixelated" };
  const image = { href: canvas.toDataURL(), x, y: g.top, width, height: g.tall, ...stretched };
  svg.append(make("image", image));
  const high = g.tall / g.L;
  for (const layer of labelled(g.L, high)) {
    svg.append(soft(g.left - 8, g.row(layer) + high / 2 + 4, layer, "end"));
  }
  for (const layer of set) {
    const box = { x: g.end + 8, y: g.row(layer), width: 12, height: Math.max(1, high - 1), rx: 1 };
    svg.append(make("rect", { class: "full", ...box }));
  }
}

/**
 * The loss and its parts; a value that is missing leaves a gap.
 * @param {Element} svg @param {ReturnType<typeof trace>} t
 * @param {ReturnType<typeof geometry>} g @param {number} n the step looked at
 */
function drawLoss(svg, t, g, n) {
  const curves = Object.entries(t.losses());
  const all = curves.flatMap(([, values]) => values.filter((v) => v !== null));
  if (!all.length) return;
  const low = Math.min(...all);
  const high = Math.max(...all);
  const y = (/** @type {number} */ v) =>
    g.under + 6 + (g.deep - 6) * (high > low ? (high - v) / (high - low) : 0.5);
  for (const v of new Set([low, high])) {
    svg.append(across(g.left, g.end, y(v)), soft(g.left - 8, y(v) + 4, named(v), "end"));
  }
  curves.forEach(([name, values], c) => {
    let d = "";
    values.forEach((v, i) => {
      if (v === null) return;
      const joined = i > 0 && values[i - 1] !== null;
      d += `${joined ? "L" : "M"}${g.x(g.kept[i]).toFixed(1)} ${y(v).toFixed(1)}`;
    });
    const stroke = c ? OKABE_ITO[1] : "currentColor";
    svg.append(make("path", { d: d || "M0 0", fill: "none", stroke, "stroke-width": 1.6 }));
    const text = `${name} ${lossText(values[n], 3)}`;
    const place = { x: g.left + 6 + 110 * c, y: g.under - 1, style: c ? `fill: ${stroke}` : "" };
    svg.append(make("text", { ...place, text }));
  });
  svg.append(upward(g.under + g.deep / 2, "loss"));
}

/** @param {number | null | undefined} v @param {number} digits */
const lossText = (v, digits) => (v === null || v === undefined ? "—" : v.toPrecision(digits));

/**
 * What is under the pointer: a step, and the nearest layer or the losses there.
 * @param {ReturnType<typeof trace>} t @param {ReturnType<typeof geometry>} g
 * @param {string} kind @param {number} px @param {number} py
 */
function pointed(t, g, kind, px, py) {
  const step = g.step(px);
  if (step < g.first || step > g.kept[g.kept.length - 1] || py > g.under + g.deep) return "";
  const away = (/** @type {number} */ i) => Math.abs(g.kept[i] - step);
  const i = range(g.kept.length).reduce((best, j) => (away(j) < away(best) ? j : best), 0);
  if (!g.L || py > g.top + g.tall) {
    const losses = Object.entries(t.losses()).map(([name, v]) => `${name} ${lossText(v[i], 4)}`);
    return `step ${g.kept[i]}: ${losses.join(", ")}`;
  }
  const values = t.values();
  const far = (/** @type {number} */ layer) => Math.abs(g.y(values.at(i, layer)) - py);
  const layer =
    kind === "heat"
      ? clamp(Math.floor(((py - g.top) / g.tall) * g.L), 0, g.L - 1)
      : range(g.L).reduce((best, j) => (far(j) < far(best) ? j : best), 0);
  const real = values.real(values.at(i, layer)).toPrecision(3);
  return `step ${g.kept[i]}: layer ${layer}, ${t.what()} ${real}`;
}
