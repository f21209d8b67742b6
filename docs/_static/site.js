// @ts-check
// Draws the figures of a page with the local packed_plotly.js, loaded only where there are any.

/** Address of this script: packed_plotly.js lies beside it. */
const here = /** @type {HTMLScriptElement} */ (document.currentScript).src;

/** What every figure is shown with, unless it asks for something else. */
const CONFIG = { responsive: true, displaylogo: false, showSendToCloud: false };

/**
 * Draw one figure from the JSON that its element holds.
 * @param {HTMLElement} element a `div.figure` of docs/build.py
 */
function draw(element) {
  const { data, layout, frames, config } = JSON.parse(element.textContent ?? "");
  // @ts-expect-error: Plotly is defined by the script of `unpacked`
  Plotly.newPlot(element, { data, layout, frames, config: { ...CONFIG, ...config } });
}

/**
 * The text that `packed` of docs/build.py made small.
 * @param {string} text gzip's bytes as base64
 */
function unpacked(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const plain = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(plain).text();
}

/** Load plotly, then draw every figure of the page. */
function drawAll() {
  /** @type {NodeListOf<HTMLElement>} */
  const figures = document.querySelectorAll("div.figure");
  if (!figures.length) return;
  const script = document.createElement("script");
  script.src = new URL("packed_plotly.js", here).href;
  script.onload = async () => {
    const plotly = document.createElement("script");
    // @ts-expect-error: packedPlotly is defined by packed_plotly.js
    plotly.textContent = await unpacked(packedPlotly);
    document.head.append(plotly);
    figures.forEach(draw);
  };
  document.head.append(script);
}

// Browsers do not fetch files from files, so search shows no summaries there.
// @ts-expect-error: the options are defined by Sphinx
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
addEventListener("DOMContentLoaded", drawAll);
