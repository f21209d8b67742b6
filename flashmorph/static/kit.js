// Put in front of every widget's script: elements, numbers, charts, and a stand-in for the model where there is no kernel.
const SVG = new Set(["svg", "g", "rect", "line", "path", "circle", "text", "title", "image"]);
const OKABE_ITO = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#A6A600"];

function make(tag, attrs = {}, ...kids) {
  const node = SVG.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  put(node, attrs);
  node.append(...kids.filter(k => k != null));
  return node;
}

function put(node, attrs) {
  for (const [k, v] of Object.entries(attrs)) {
    if (k === "text") { if (node.textContent !== String(v)) node.textContent = v; }
    else if (k.startsWith("on")) node.addEventListener(k.slice(2), v);
    else if (v === false || v == null) node.removeAttribute(k);
    else if (node.getAttribute(k) !== String(v)) node.setAttribute(k, v === true ? "" : v);
  }
  return node;
}

const range = n => [...Array(n).keys()];
const clamp = (x, a, b) => Math.min(b, Math.max(a, x));
const percent = (x, digits = 0) => (100 * x).toFixed(digits) + " %";
const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;

function scaled(x, units, base = 1000) {
  let i = 0;
  while (Math.abs(x) >= base * 0.9995 && i < units.length - 1) { x /= base; i++; }
  return (i === 0 ? String(Math.round(x)) : x.toPrecision(3)) + " " + units[i];
}
const UNITS = { bytes: ["B", "KB", "MB", "GB", "TB"], flops: ["FLOP", "KFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"], count: ["", "K", "M", "B"] };
const amount = (x, unit) => scaled(x, UNITS[unit]).trim();
const duration = s => (s < 59.5 ? `${s < 9.95 ? s.toFixed(1) : Math.round(s)} s` : s < 3570 ? `${Math.floor(Math.round(s) / 60)} min ${Math.round(s) % 60} s`
  : `${Math.floor(Math.round(s / 60) / 60)} h ${Math.round(s / 60) % 60} min`);

// Bytes that Python packed: base64 of unsigned integers, little endian.
function unpack(text, bytes = 1) {
  const raw = Uint8Array.from(atob(text || ""), c => c.charCodeAt(0));
  return bytes === 1 ? raw : new Uint16Array(raw.buffer);
}

// Columns of a picture of L layers between a gutter for names and one for remarks.
function columns(width, L, left = 104, right = 96) {
  const step = Math.min(64, (width - left - right) / L), gap = step > 12 ? 3 : step > 5 ? 1 : 0;
  return { left, step, width: Math.max(1, step - gap), end: left + step * L, x: i => left + step * i + gap / 2, mid: i => left + step * (i + 0.5) };
}
const labelled = (L, step) => { const every = [1, 2, 4, 8, 16].find(e => e * step >= (L > 100 ? 26 : 19)) || 32; return range(L).filter(i => i % every === 0); };

// Calls draw(width) now and whenever the width of `node` changes; returns the way to stop.
function fit(node, draw) {
  let last = 0;
  const watch = new ResizeObserver(() => {
    const width = Math.round(node.clientWidth);
    if (width > 0 && width !== last) { last = width; draw(width); }
  });
  watch.observe(node);
  return () => watch.disconnect();
}

// Calls `draw` once after any of `names` has changed, however many did.
function follow(model, names, draw) {
  let asked = false;
  const later = () => { if (!asked) { asked = true; queueMicrotask(() => { asked = false; draw(); }); } };
  for (const name of names) model.on(`change:${name}`, later);
  return () => { for (const name of names) model.off(`change:${name}`, later); };
}

// JupyterLab has shortcuts for bare keys (arrows fold, d d deletes a cell): those pressed in a widget are the widget's.
const own = root => { root.addEventListener("keydown", e => { if (!e.ctrlKey && !e.metaKey && !e.altKey) e.stopPropagation(); }); return root; };

function mount(el, widget, state) {
  const heard = {};
  const model = {
    alone: true, get: k => state[k], send() {}, save_changes() {},
    set(k, v) { state[k] = v; for (const f of heard[`change:${k}`] || []) f(); },
    on(e, f) { (heard[e] ||= []).push(f); }, off(e, f) { heard[e] = (heard[e] || []).filter(g => g !== f); },
  };
  el.replaceChildren();
  widget.render({ model, el });
}
