// @ts-check
// Put in front of every widget's script: elements, numbers, charts, and a stand-in for the model
// where there is no kernel. OKABE_ITO and UNITS come from Python (show/widget.py).

const SVG = new Set(["svg", "g", "rect", "line", "path", "circle", "text", "title", "image"]);

/**
 * A new element.
 * @param {string} tag
 * @param {Attributes} [attrs] see `put`
 * @param {(Node | string | null)[]} kids what goes inside; `null` is left out
 * @returns {any}
 */
function make(tag, attrs = {}, ...kids) {
  const node = SVG.has(tag)
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  put(node, attrs);
  for (const kid of kids) if (kid != null) node.append(kid);
  return node;
}

/**
 * Set attributes, `text`, and listeners (`onclick`, ...), touching only what differs.
 * @template {Element} T
 * @param {T} node
 * @param {Attributes} attrs `false` and `null` take an attribute away
 */
function put(node, attrs) {
  for (const [key, value] of Object.entries(attrs)) {
    if (key === "text") {
      if (node.textContent !== String(value)) node.textContent = String(value);
    } else if (typeof value === "function") {
      node.addEventListener(key.slice(2), /** @type {EventListener} */ (value));
    } else if (value === false || value == null) {
      node.removeAttribute(key);
    } else if (node.getAttribute(key) !== String(value)) {
      node.setAttribute(key, value === true ? "" : String(value));
    }
  }
  return node;
}

// ---- numbers, as flashmorph.results writes them

/** @param {number} n */
const range = (n) => [...Array(n).keys()];

/** @param {number} x @param {number} low @param {number} high */
const clamp = (x, low, high) => Math.min(high, Math.max(low, x));

/** @param {number} n @param {string} word */
const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;

/** @param {number} n a whole number, with commas */
const grouped = (n) => n.toLocaleString("en");

/**
 * `value` with `decimals` places, halves to the even digit, as Python rounds.
 * @param {number} value @param {number} decimals
 */
function rounded(value, decimals) {
  // a hundred places are exact for what is shown here, so a half can be told from almost a half
  const exact = Math.abs(value).toFixed(100);
  const kept = exact.slice(0, exact.length - 100 + decimals).replace(/\.$/, "");
  const half = /^50*$/.test(exact.slice(exact.length - 100 + decimals));
  const even = "02468".includes(kept[kept.length - 1]);
  const text = half && even ? kept : Math.abs(value).toFixed(decimals);
  return value < 0 && Number(text) ? `-${text}` : text;
}

/**
 * Three digits and a unit.
 * @param {number} value @param {string} unit a key of UNITS
 */
function amount(value, unit) {
  const names = UNITS[unit];
  let n = 0;
  while (n < names.length - 1 && Math.abs(value) / 1000 ** n >= 999.5) n++;
  const scaled = value / 1000 ** n;
  const size = Math.abs(scaled);
  const text = rounded(scaled, size < 9.995 ? 2 : size < 99.95 ? 1 : 0);
  return (text.includes(".") ? text.replace(/\.?0+$/, "") : text) + names[n];
}

/** @param {number} share @param {number} [decimals] */
const percent = (share, decimals = 1) => `${rounded(100 * share, decimals)}%`;

/** @param {number} seconds */
function duration(seconds) {
  if (seconds < 59.95) return `${rounded(seconds, 1)} s`;
  if (seconds < 3599.5) {
    const whole = Math.floor(seconds + 0.5);
    return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  }
  const minutes = Math.floor(seconds / 60 + 0.5);
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

/**
 * Bytes that Python packed: base64 of unsigned integers, little endian.
 * @param {string} text @param {1 | 2} [bytes] how many bytes a number has
 */
function unpack(text, bytes = 1) {
  const raw = Uint8Array.from(atob(text || ""), (c) => c.charCodeAt(0));
  return bytes === 1 ? raw : new Uint16Array(raw.buffer);
}

/**
 * Sets of layers travel as masks: `1010` is layers 0 and 2 of 4.
 * @param {number[]} layers @param {number} L
 */
const maskOf = (layers, L) =>
  range(L)
    .map((i) => (layers.includes(i) ? "1" : "0"))
    .join("");

/** @param {string} mask */
const layersOf = (mask) => [...mask].flatMap((c, i) => (c === "1" ? [i] : []));

/** How many layers two masks share. @param {string} a @param {string} b */
const shared = (a, b) => [...a].filter((c, i) => c === "1" && b[i] === "1").length;

// ---- pictures

/**
 * Columns of a picture of L layers, between a gutter for names and one for remarks.
 * @param {number} width @param {number} L @param {number} left @param {number} right
 */
function columns(width, L, left, right) {
  const step = Math.min(64, (width - left - right) / L);
  const gap = step > 12 ? 3 : step > 5 ? 1 : 0;
  return {
    left,
    step,
    width: Math.max(1, step - gap),
    end: left + step * L,
    /** @param {number} i */
    x: (i) => left + step * i + gap / 2,
    /** @param {number} i */
    mid: (i) => left + step * (i + 0.5),
  };
}

/**
 * The layers that have room for a number.
 * @param {number} L @param {number} step pixels a layer
 */
function labelled(L, step) {
  const room = L > 100 ? 26 : 19;
  const every = [1, 2, 4, 8, 16].find((e) => e * step >= room) || 32;
  return range(L).filter((i) => i % every === 0);
}

/** A name that fits the gutter. @param {string} name */
const short = (name) => (name.length > 15 ? `${name.slice(0, 14)}…` : name);

/**
 * Numbers and words of an axis.
 * @param {number} x @param {number} y @param {string | number} text
 * @param {"start" | "middle" | "end"} [anchor]
 */
const soft = (x, y, text, anchor = "start") =>
  make("text", { class: "soft", x, y, text, "text-anchor": anchor });

/** A word along a vertical axis, in the middle of it. @param {number} y @param {string} text */
const upward = (y, text) =>
  make("text", { x: 0, y, text, transform: `rotate(-90 10 ${y})`, "text-anchor": "middle" });

/** A grid line from left to right. @param {number} x1 @param {number} x2 @param {number} y */
const across = (x1, x2, y) => make("line", { class: "grid", x1, x2, y1: y, y2: y });

/**
 * Call draw(width) now and whenever the width of `node` changes; returns the way to stop.
 * @param {HTMLElement} node @param {(width: number) => void} draw
 */
function fit(node, draw) {
  let last = 0;
  const watch = new ResizeObserver(() => {
    const width = Math.round(node.clientWidth);
    if (width > 0 && width !== last) {
      last = width;
      draw(width);
    }
  });
  watch.observe(node);
  return () => watch.disconnect();
}

// ---- the state of a widget

/**
 * Call `draw` once after any of `names` has changed, however many did; returns the way to stop.
 * @param {Model} model @param {string[]} names @param {() => void} draw
 */
function follow(model, names, draw) {
  let asked = false;
  const later = () => {
    if (asked) return;
    asked = true;
    queueMicrotask(() => {
      asked = false;
      draw();
    });
  };
  for (const name of names) model.on(`change:${name}`, later);
  return () => {
    for (const name of names) model.off(`change:${name}`, later);
  };
}

/**
 * Change the state, and tell Python.
 * @param {Model} model @param {Record<string, any>} values
 */
function change(model, values) {
  for (const [key, value] of Object.entries(values)) model.set(key, value);
  model.save_changes();
}

/**
 * JupyterLab has shortcuts for bare keys (arrows fold, d d deletes a cell): keys pressed in a
 * widget stay in the widget.
 * @param {HTMLElement} root
 */
function own(root) {
  root.addEventListener("keydown", (e) => {
    if (!e.ctrlKey && !e.metaKey && !e.altKey) e.stopPropagation();
  });
  return root;
}

/**
 * Show a widget without a kernel: the model is a copy of the state.
 * @param {Element} el @param {{ render: Function }} widget @param {Record<string, any>} state
 */
function mount(el, widget, state) {
  /** @type {Record<string, (() => void)[]>} */
  const heard = {};
  /** @type {Model} */
  const model = {
    alone: true,
    get: (key) => state[key],
    send() {},
    save_changes() {},
    set(key, value) {
      state[key] = value;
      for (const f of heard[`change:${key}`] || []) f();
    },
    on(event, f) {
      (heard[event] ||= []).push(f);
    },
    off(event, f) {
      heard[event] = (heard[event] || []).filter((g) => g !== f);
    },
  };
  el.replaceChildren();
  widget.render({ model, el });
}
