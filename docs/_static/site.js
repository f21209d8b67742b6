// Draws the figures of a page with the local plotly.min.js, which is loaded only where there are any.
const here = document.currentScript.src;
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false; // browsers do not fetch files from files
addEventListener("DOMContentLoaded", () => {
  const figures = document.querySelectorAll("div.figure");
  if (!figures.length) return;
  const script = document.createElement("script");
  script.src = new URL("plotly.min.js", here);
  script.onload = () => figures.forEach((el) => {
    const { data, layout, frames, config } = JSON.parse(el.textContent);
    Plotly.newPlot(el, { data, layout, frames, config: { responsive: true, displaylogo: false, showSendToCloud: false, ...config } });
  });
  document.head.append(script);
});
