// @ts-check
// Draws the figures of a page with the local plotly.min.js, loaded only where there are any.

/** Address of this script: plotly.min.js lies beside it. */
const here = /** @type {HTMLScriptElement} */ (document.currentScript).src;

/** What every figure is shown with, unless it asks for something else. */
const CONFIG = { responsive: true, displaylogo: false, showSendToCloud: false };

/**
 * Draw one figure from the JSON that its element holds.
 * @param {HTMLElement} element a `div.figure` of docs/build.py
 */
function draw(element) {
  const { data, layout, frames, config } = JSON.parse(element.textContent ?? "");
  // @ts-expect-error: Plotly is defined by plotly.min.js
  Plotly.newPlot(element, { data, layout, frames, config: { ...CONFIG, ...config } });
}

/** Load plotly, then draw every figure of the page. */
function drawAll() {
  /** @type {NodeListOf<HTMLElement>} */
  const figures = document.querySelectorAll("div.figure");
  if (!figures.length) return;
  const script = document.createElement("script");
  script.src = new URL("plotly.min.js", here).href;
  script.onload = () => figures.forEach(draw);
  document.head.append(script);
}

// Browsers do not fetch files from files, so search shows no summaries there.
// @ts-expect-error: the options are defined by Sphinx
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
addEventListener("DOMContentLoaded", drawAll);
