// @ts-check
// Methods by layers at one budget, and how often each layer is kept.

/** Heights in pixels. */
const LANES = { top: 18, tall: 44, lane: 24, strip: 17 };

/** @param {{ model: Model, el: HTMLElement }} view */
function render({ model, el }) {
  const L = model.get("num_layers");
  /** @type {Method[]} */
  const methods = model.get("methods");
  const slider = make("input", {
    type: "range",
    min: 0,
    max: L,
    step: 1,
    class: "fm-slider",
    "aria-label": "budget",
    oninput() {
      change(model, { budget: +slider.value });
      paint();
    },
  });
  const count = make("span", { class: "fm-count" });
  const chart = make("div", { class: "fm-chart" });
  const note = make("div", { class: "fm-note", role: "status" });
  const title = make("span", { class: "fm-title", text: "Budget" });
  const top = make(
    "div",
    { class: "fm-row top" },
    title,
    make("div", { class: "fm-grow" }, slider),
    count,
  );
  el.append(own(make("div", { class: "fm fm-compare" }, top, chart, note)));

  /** @type {{ paint: (masks: string[], budget: number) => void } | null} */
  let drawn = null;
  /** @param {number} width */
  function build(width) {
    const hover = (/** @type {number} */ n, /** @type {number} */ i) => () => {
      const kept = (methods[n].sets[model.get("budget")] || "")[i] === "1";
      const kind = kept ? "keeps full attention" : "makes it linear";
      put(note, { text: `layer ${i}: ${methods[n].name} ${kind}` });
    };
    const leave = () => put(note, { text: "" });
    const picture = compareChart(methods, L, width, hover, leave);
    drawn = picture;
    chart.replaceChildren(picture.svg);
    paint();
  }

  function paint() {
    const k = model.get("budget");
    slider.value = k;
    put(slider, { "aria-valuetext": `${k} of ${L}` });
    put(count, { text: `${k} of ${plural(L, "layer")} full` });
    const masks = methods.map((method) => method.sets[k]);
    if (drawn) drawn.paint(masks, k);
  }

  const stops = [fit(chart, build), follow(model, ["budget"], paint)];
  paint();
  return () => stops.forEach((stop) => stop());
}

/**
 * A bar for each layer, as high as many methods keep it, and a strip for each method.
 * @param {Method[]} methods @param {number} L @param {number} width
 * @param {(n: number, layer: number) => () => void} hover @param {() => void} leave
 */
function compareChart(methods, L, width, hover, leave) {
  const { top, tall, lane, strip } = LANES;
  const c = columns(width, L, 104, 120);
  const y = (/** @type {number} */ n) => top + tall + 14 + n * lane;
  const height = y(methods.length) + 16;
  const svg = make("svg", {
    height,
    viewBox: `0 0 ${width} ${height}`,
    role: "img",
    "aria-label": "which layers each method keeps",
  });
  svg.append(make("text", { x: 0, y: top + tall / 2 + 4, text: "kept by" }));
  svg.append(across(c.left - 4, c.end, top + tall), soft(0, height - 2, "layer"));
  for (const i of labelled(L, c.step)) svg.append(soft(c.mid(i), height - 2, i, "middle"));

  const place = (/** @type {number} */ i) => ({ x: c.x(i), width: c.width, rx: 1.5 });
  const bars = range(L).map((i) => make("rect", { class: "full", ...place(i) }));
  const counts = range(L).map((i) => soft(c.mid(i), 0, "", "middle"));
  svg.append(...bars);
  if (c.step >= 16) svg.append(...counts);

  const rows = methods.map((method, n) => {
    const weight = n ? 400 : 600;
    const name = { x: 0, y: y(n) + 13, text: short(method.name), "font-weight": weight };
    const cells = range(L).map((i) => {
      const listeners = { onmouseenter: hover(n, i), onmouseleave: leave };
      return make("rect", { ...place(i), y: y(n), height: strip, ...listeners });
    });
    const remark = soft(Math.min(c.end + 10, width - 112), y(n) + 13, "");
    svg.append(make("text", name), ...cells, remark);
    return { cells, remark };
  });

  /** @param {string[]} masks @param {number} k */
  function paint(masks, k) {
    bars.forEach((bar, i) => {
      const votes = masks.filter((mask) => mask && mask[i] === "1").length;
      const height = (tall * votes) / masks.length;
      put(bar, { y: top + tall - height, height });
      put(counts[i], { y: top + tall - height - 4, text: votes || "" });
    });
    rows.forEach(({ cells, remark }, n) => {
      cells.forEach((cell, i) => {
        const kind = masks[n] && masks[n][i] === "1" ? "full" : "linear";
        put(cell, { class: kind, opacity: masks[n] ? 1 : 0.25 });
      });
      put(remark, { text: n || !masks[0] ? overlap(masks[n], masks[0], k) : "" });
    });
  }

  return { svg, paint };
}

/** How much two sets share, in words. @param {string} a @param {string} b @param {number} k */
function overlap(a, b, k) {
  if (!a) return "not at this budget";
  if (!b) return "";
  const both = shared(a, b);
  const either = 2 * k - both;
  return `${both} of ${k} shared, ${percent(either ? both / either : 1, 0)}`;
}
export default { render };
