"use strict";
// Draws the charts of a report from the JSON beside it; sorts tables; switches themes. Every text from a run reaches
// the page through textContent, never as HTML.
const state = { charts: 0, errors: [] };
window.bytekilnReport = state;
addEventListener("error", (e) => state.errors.push(String(e.message)));

const data = JSON.parse(document.getElementById("data").textContent);
const hidden = new Set();
const SVG = "http://www.w3.org/2000/svg";
const COLUMNS = { step: 0, tokens: 1, time: 2 };
const AXIS = { step: "step", tokens: "tokens", time: "time" };

function node(name, attributes = {}, text = null) {
  const svg = ["svg", "g", "path", "line", "text", "circle", "rect", "clipPath", "defs", "title"].includes(name);
  const made = svg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [k, v] of Object.entries(attributes)) made.setAttribute(k, v);
  if (text !== null) made.textContent = text;
  return made;
}
const colour = (group) => `var(--g${group})`;

// --- numbers -----------------------------------------------------------------------------------------------------
function short(v) {
  if (v === 0) return "0";
  const a = Math.abs(v);
  if (a >= 1e12 || a < 1e-3) return v.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
  if (a >= 1e9) return trim(v / 1e9, 2) + " G";
  if (a >= 1e6) return trim(v / 1e6, 2) + " M";
  if (a >= 1e4) return trim(v / 1e3, 1) + " k";
  return a >= 100 ? trim(v, 0) : a >= 10 ? trim(v, 2) : trim(v, 4);
}
function trim(v, places) {
  return v.toFixed(places).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
}
function duration(s) {
  if (s < 1) return `${Math.round(s * 1000)} ms`;
  if (s < 120) return `${trim(s, 1)} s`;
  return s < 7200 ? `${trim(s / 60, 1)} min` : `${trim(s / 3600, 1)} h`;
}
function linearTicks(low, high, count) {
  const raw = (high - low) / Math.max(count, 1) || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
  const out = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) out.push(i * step);
  return out;
}
function timeTicks(low, high, count) {
  const steps = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400];
  const step = steps.find((s) => (high - low) / s <= count);
  if (!step) return linearTicks(low, high, count);
  const out = [];
  for (let i = Math.ceil(low / step); i * step <= high; i++) out.push(i * step);
  return out;
}
function logTicks(low, high, count) {
  const out = [];
  const decades = Math.log10(high / low);
  const marks = decades > count ? [1] : decades > 2.2 ? [1, 3] : decades > 0.7 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9];
  const every = Math.max(1, Math.ceil(decades / count));
  for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p++) {
    if (p % every) continue;
    for (const m of marks) {
      const v = m * 10 ** p;
      if (v >= low * 0.9999 && v <= high * 1.0001) out.push(v);
    }
  }
  return out.length > 1 ? out : linearTicks(low, high, count);
}

// --- a frame with axes -------------------------------------------------------------------------------------------
function scale(low, high, from, to, log) {
  const f = log ? Math.log : (v) => v;
  const a = f(low), span = f(high) - a || 1;
  const to_pixel = (v) => from + ((f(v) - a) / span) * (to - from);
  to_pixel.back = (p) => {
    const v = a + ((p - from) / (to - from)) * span;
    return log ? Math.exp(v) : v;
  };
  return to_pixel;
}
let clips = 0;
function frame(plot, o) {
  const width = Math.max(plot.clientWidth, 240), height = o.height || (width > 700 ? 380 : 290);
  const svg = node("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: "0", "aria-label": o.label });
  const left = o.left || 52, right = 14, top = 10, bottom = 38;
  const x = scale(o.x[0], o.x[1], left, width - right, o.logx), y = scale(o.y[0], o.y[1], height - bottom, top, o.logy);
  const clip = `clip${clips++}`, defs = node("defs"), shape = node("clipPath", { id: clip });
  shape.append(node("rect", { x: left - 2, y: top - 4, width: width - left - right + 6, height: height - top - bottom + 6 }));
  defs.append(shape);
  svg.append(defs);
  const wanted = Math.max(2, Math.floor((width - left) / 90));
  const ticks = o.logx ? logTicks(...o.x, wanted) : o.time ? timeTicks(...o.x, wanted) : linearTicks(...o.x, wanted);
  let reach = -Infinity;
  for (const t of ticks) {
    svg.append(node("line", { class: "grid", x1: x(t), x2: x(t), y1: top, y2: height - bottom }));
    const words = (o.showx || short)(t), half = words.length * 3.4;
    if (x(t) - half < reach || x(t) + half > width + 6) continue;
    reach = x(t) + half + 6;
    svg.append(node("text", { x: x(t), y: height - bottom + 17, "text-anchor": "middle" }, words));
  }
  if (!o.names) {
    const yticks = o.logy ? logTicks(...o.y, 6) : linearTicks(...o.y, 6);
    const apart = yticks.length > 1 && !o.logy ? yticks[1] - yticks[0] : 0;
    for (const t of yticks) {
      svg.append(node("line", { class: "grid", x1: left, x2: width - right, y1: y(t), y2: y(t) }));
      const fixed = apart > 1e-6 && apart < 1 ? trimmed(t, apart) : short(t);
      svg.append(node("text", { x: left - 7, y: y(t) + 4, "text-anchor": "end" }, fixed));
    }
  }
  svg.append(node("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }));
  svg.append(node("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, o.xname));
  const inside = node("g", { "clip-path": `url(#${clip})` });
  svg.append(inside);
  plot.replaceChildren(svg);
  return { svg, inside, x, y, width, height, left, right, top, bottom };
}
function trimmed(t, step) {
  let places = 0;
  while (places < 6 && Math.abs(step * 10 ** places - Math.round(step * 10 ** places)) > 1e-6) places++;
  return t.toFixed(places);
}
function empty(plot, words) {
  plot.replaceChildren(node("p", { class: "empty" }, words));
}
function tip(plot, f, px, head, lines) {
  let box = plot.querySelector(".tip");
  if (!box) plot.append((box = node("div", { class: "tip" })));
  box.replaceChildren(node("div", {}, head));
  for (const [group, name, value] of lines) {
    const line = node("div");
    if (group !== null) line.append(node("span", { class: "sw", style: `--c:${colour(group)}` }));
    line.append(node("span", { class: "name" }, name), node("span", {}, value));
    box.append(line);
  }
  const ratio = plot.clientWidth / f.width, wide = box.offsetWidth;
  const left = px * ratio + 14 + wide > plot.clientWidth ? px * ratio - wide - 14 : px * ratio + 14;
  box.style.left = `${Math.max(0, Math.min(left, plot.clientWidth - wide))}px`;
  box.style.top = "8px";
}
function follow(plot, f, move) {
  const cross = node("line", { class: "cross", y1: f.top, y2: f.height - f.bottom, visibility: "hidden" });
  f.svg.append(cross);
  let at = null;
  const go = (px) => {
    at = Math.min(Math.max(px, f.left), f.width - f.right);
    const found = move(at);
    cross.setAttribute("visibility", "visible");
    cross.setAttribute("x1", found);
    cross.setAttribute("x2", found);
  };
  const leave = () => {
    cross.setAttribute("visibility", "hidden");
    plot.querySelector(".tip")?.remove();
    at = null;
  };
  f.svg.addEventListener("pointermove", (e) => {
    const box = f.svg.getBoundingClientRect();
    go(((e.clientX - box.left) * f.width) / box.width);
  });
  f.svg.addEventListener("pointerleave", leave);
  f.svg.addEventListener("blur", leave);
  f.svg.addEventListener("keydown", (e) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[e.key];
    if (e.key === "Escape") leave();
    if (!step) return;
    e.preventDefault();
    go((at ?? f.left) + (step * (f.width - f.left)) / (e.shiftKey ? 10 : 60));
  });
}
