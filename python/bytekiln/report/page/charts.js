// --- curves ------------------------------------------------------------------------------------------------------
function along(clock, steps, axis) {
  if (axis === "step" || !clock[0].length) return axis === "step" ? steps : [];
  const known = clock[0], told = clock[COLUMNS[axis]];
  let k = 0;
  return steps.map((s) => {
    while (k < known.length - 2 && known[k + 1] < s) k++;
    if (known.length < 2) return told[0];
    const share = (s - known[k]) / (known[k + 1] - known[k] || 1);
    return told[k] + share * (told[k + 1] - told[k]);
  });
}
const shared = { axis: "step", logx: false, logy: false, part: "all", raw: false };

function curves(plot, o) {
  const shown = [];
  const axis = o.own ? "step" : shared.axis, logx = shared.logx && !o.own;
  for (const run of data.runs) {
    if (hidden.has(run.group)) continue;
    for (const [column, faint] of o.columns) {
      const curve = run.curves[column];
      if (!curve || (faint && !shared.raw)) continue;
      const xs = along(run.clock, curve[0], axis);
      const points = [];
      for (let i = 0; i < xs.length; i++) {
        if (logx && !(xs[i] > 0)) continue;
        if ((o.logy || shared.logy) && !o.signed && !(curve[1][i] > 0)) continue;
        points.push([xs[i], curve[1][i]]);
      }
      if (points.length) shown.push({ run, points, faint });
    }
  }
  if (!shown.length) return empty(plot, data.runs.length ? "nothing to draw" : "no runs");
  let logy = (o.logy || shared.logy) && !o.signed;
  if (o.rates) {
    const tops = shown.map((s) => Math.max(...s.points.map((p) => p[1])));
    logy = logy || Math.max(...tops) > 30 * Math.min(...tops);
    if (logy) for (const s of shown) s.points = s.points.filter((p) => p[1] > 0);
  }
  let low = Infinity, high = -Infinity;
  for (const s of shown) {
    low = Math.min(low, s.points[0][0]);
    high = Math.max(high, s.points[s.points.length - 1][0]);
  }
  if (shared.part !== "all") low = logx ? Math.max(low, high * (shared.part === "half" ? 0.5 : 0.9)) : high - (high - low) * (shared.part === "half" ? 0.5 : 0.1);
  if (low === high) high = low + 1;
  let bottom = Infinity, top = -Infinity, start = -Infinity;
  for (const s of shown) {
    const seen = s.points.filter((p) => p[0] >= low);
    for (const p of seen) {
      bottom = Math.min(bottom, p[1]);
      top = Math.max(top, p[1]);
    }
    for (const p of seen.slice(0, 2)) start = Math.max(start, p[1]);
  }
  let cut = false;
  if (o.loss) {
    // A run that diverged must not flatten the others: nothing is shown above the highest start, and half of it more.
    const limit = shared.part === "all" ? start * 1.1 : top;
    cut = top > limit;
    top = Math.min(top, limit);
  }
  if (o.logy) {
    const every = shown.flatMap((s) => s.points.map((p) => p[1])).sort((a, b) => a - b);
    const limit = 300 * every[Math.floor(every.length / 2)];
    cut = top > limit;
    top = Math.min(top, limit);
  }
  if (bottom === top) { bottom -= Math.abs(bottom) * 0.05 || 0.5; top += Math.abs(top) * 0.05 || 0.5; }
  const pad = logy ? 0 : (top - bottom) * 0.05;
  const range = logy ? [bottom / 1.05, top * 1.05] : [o.zero ? Math.min(0, bottom) : bottom - pad, top + pad];
  const f = frame(plot, { ...o, x: [low, high], y: range, logx, logy, xname: AXIS[axis], time: axis === "time", showx: axis === "time" ? duration : short });
  if (o.signed && range[0] < 0 && range[1] > 0) f.inside.append(node("line", { class: "axis", x1: f.left, x2: f.width, y1: f.y(0), y2: f.y(0) }));
  const many = shown.length > 40;
  for (const s of shown) {
    let d = "", pen = "M";
    for (const p of s.points) {
      d += `${pen}${f.x(p[0]).toFixed(1)} ${f.y(p[1]).toFixed(1)}`;
      pen = "L";
    }
    const lonely = s.points.length === 1;
    if (!lonely) f.inside.append(node("path", { d, fill: "none", stroke: colour(s.run.group), "stroke-width": s.faint ? 0.7 : many ? 1 : 1.6,
      "stroke-opacity": s.faint ? 0.35 : many ? 0.75 : 0.95, "stroke-linejoin": "round" }));
    if (lonely || (o.dots && s.points.length <= 40 && !many))
      for (const p of s.points) f.inside.append(node("circle", { cx: f.x(p[0]), cy: f.y(p[1]), r: 2.6, fill: colour(s.run.group) }));
  }
  plot.dataset.cut = cut ? "1" : "";
  const caption = plot.parentElement.querySelector(".cut");
  if (caption) caption.textContent = cut ? o.loss ? " What lies above the start is cut off." : " Larger ones are cut off." : "";
  follow(plot, f, (px) => {
    const wanted = f.x.back(px);
    let nearest = null;
    const found = [];
    for (const s of shown) {
      if (s.faint) continue;
      let a = 0, b = s.points.length - 1;
      while (b - a > 1) { const m = (a + b) >> 1; if (s.points[m][0] < wanted) a = m; else b = m; }
      const p = Math.abs(s.points[a][0] - wanted) < Math.abs(s.points[b][0] - wanted) ? s.points[a] : s.points[b];
      if (nearest === null || Math.abs(p[0] - wanted) < Math.abs(nearest - wanted)) nearest = p[0];
      found.push([s.run, p]);
    }
    const near = found.filter((e) => Math.abs(f.x(e[1][0]) - f.x(nearest)) < 24).sort((a, b) => a[1][1] - b[1][1]);
    const lines = near.slice(0, 10).map(([run, p]) => [run.group, run.name, o.loss ? p[1].toFixed(4) : short(p[1])]);
    if (near.length > 10) lines.push([null, `and ${near.length - 10} more`, ""]);
    tip(plot, f, f.x(nearest), `${AXIS[axis]} ${axis === "time" ? duration(nearest) : short(Math.round(nearest))}`, lines);
    return f.x(nearest);
  });
}

// --- loss against learning rate ----------------------------------------------------------------------------------
function rates(plot, o) {
  const series = data.rates[o.number];
  const points = series.points.filter((p) => !hidden.has(p[2]));
  if (!points.length) return empty(plot, "nothing to draw");
  const all = points.map((p) => p[0]).concat(series.lost, series.curve.map((p) => p[0]));
  const low = Math.min(...all) / 1.25, high = Math.max(...all) * 1.25;
  const losses = points.map((p) => p[1]), least = Math.min(...losses), most = Math.max(...losses);
  const sorted = losses.slice().sort((a, b) => a - b), usual = sorted[Math.floor(sorted.length * 0.75)];
  const top = Math.min(most, usual + 3 * (usual - least) + 1e-3), bottom = Math.min(least, ...series.curve.map((p) => p[1]));
  const pad = (top - bottom) * 0.09 || 0.01;
  const f = frame(plot, { ...o, x: [low, high], y: [bottom - pad, top + pad], logx: true, logy: false, xname: "learning rate", showx: rateName });
  if (series.fit && series.fit.bounded)
    f.inside.append(node("rect", { x: f.x(series.fit.low), y: f.top, width: Math.max(1, f.x(series.fit.high) - f.x(series.fit.low)),
      height: f.height - f.top - f.bottom, fill: "var(--accent)", "fill-opacity": 0.12 }));
  if (series.curve.length)
    f.inside.append(node("path", { d: series.curve.map((p, i) => `${i ? "L" : "M"}${f.x(p[0]).toFixed(1)} ${f.y(p[1]).toFixed(1)}`).join(""),
      fill: "none", stroke: "var(--accent)", "stroke-width": 2 }));
  if (series.fit)
    f.inside.append(node("line", { x1: f.x(series.fit.lr), x2: f.x(series.fit.lr), y1: f.top, y2: f.height - f.bottom, stroke: "var(--accent)",
      "stroke-dasharray": "5 4" }));
  const means = series.means;
  f.inside.append(node("path", { d: means.map((p, i) => `${i ? "L" : "M"}${f.x(p[0]).toFixed(1)} ${f.y(p[1]).toFixed(1)}`).join(""),
    fill: "none", stroke: "var(--faint)", "stroke-width": 1, "stroke-dasharray": "2 3" }));
  for (const [lr, loss, group] of points) {
    if (loss > top + pad) { f.svg.append(node("text", { x: f.x(lr), y: f.top + 10, "text-anchor": "middle" }, "▲")); continue; }
    f.inside.append(node("circle", { cx: f.x(lr), cy: f.y(loss), r: 4, fill: colour(group), stroke: "var(--paper)", "stroke-width": 1 }));
  }
  for (const lr of series.lost) {
    const mark = node("text", { x: f.x(lr), y: f.height - f.bottom - 8, "text-anchor": "middle" }, "✕");
    mark.append(node("title", {}, `${rateName(lr)}: diverged`));
    f.svg.append(mark);
  }
  follow(plot, f, (px) => {
    const wanted = f.x.back(px), far = (v) => Math.abs(Math.log(v / wanted));
    const lr = points.reduce((a, b) => (far(b[0]) < far(a) ? b[0] : a), points[0][0]);
    const lines = points.filter((p) => p[0] === lr).map((p) => [p[2], data.groups[p[2]].name, p[1].toFixed(4)]);
    tip(plot, f, f.x(lr), `learning rate ${rateName(lr)}`, lines.slice(0, 10));
    return f.x(lr);
  });
}
function rateName(v) {
  const text = v.toPrecision(3);
  const exponent = Math.floor(Math.log10(v) + 1e-9);
  if (exponent >= -1 && exponent < 4) return String(Number(text));
  return `${trim(Number(text) / 10 ** exponent, 2)}e${exponent}`;
}

// --- rows of dots ------------------------------------------------------------------------------------------------
function rows(plot, o) {
  const list = o.rows().filter((r) => !hidden.has(r.group));
  if (!list.length) return empty(plot, "nothing to draw");
  const width = Math.max(plot.clientWidth, 240), names = Math.min(width * 0.4, 12 + 7 * Math.max(...list.map((r) => data.groups[r.group].name.length)));
  const values = list.flatMap((r) => [...r.values, r.low, r.high]).filter((v) => v !== null && v !== undefined);
  let low = Math.min(...values, o.zero ? 0 : Infinity), high = Math.max(...values, o.zero ? 0 : -Infinity);
  if (o.clip) {
    const centre = list.flatMap((r) => r.values), reach = 4 * Math.max(...centre.map(Math.abs), 1e-6);
    low = Math.max(low, -reach);
    high = Math.min(high, reach);
  }
  const pad = (high - low) * 0.06 || 1;
  const each = list.length > 40 ? 15 : 26;
  const f = frame(plot, { ...o, height: list.length * each + 62, left: names, x: [o.zero === "left" ? 0 : low - pad, high + pad], y: [list.length, 0], names: true });
  if (o.zero === true) f.svg.append(node("line", { class: "axis", x1: f.x(0), x2: f.x(0), y1: f.top, y2: f.height - f.bottom, "stroke-width": 2 }));
  list.forEach((r, i) => {
    const y = f.top + (i + 0.5) * ((f.height - f.top - f.bottom) / list.length);
    const name = data.groups[r.group].name, room = Math.floor((names - 12) / 6.6);
    const text = node("text", { class: "name", x: names - 9, y: y + 4, "text-anchor": "end" }, name.length > room ? name.slice(0, room - 1) + "…" : name);
    text.append(node("title", {}, name));
    f.svg.append(text);
    if (r.low !== null && r.low !== undefined)
      f.inside.append(node("line", { x1: f.x(r.low), x2: f.x(r.high), y1: y, y2: y, stroke: colour(r.group), "stroke-width": 2 }));
    for (const v of r.values) {
      const dot = node("circle", { cx: f.x(v), cy: y, r: r.low === undefined ? 4 : 5, fill: colour(r.group), "fill-opacity": 0.85 });
      dot.append(node("title", {}, `${name}: ${o.say(v, r)}`));
      f.inside.append(dot);
    }
  });
}
function speeds() {
  return data.groups.map((_, g) => ({ group: g, values: data.runs.filter((r) => r.group === g && r.speed !== null).map((r) => r.speed) })).filter((r) => r.values.length);
}
function deltas() {
  return data.deltas.map((d) => ({ group: d.group, values: [d.mean], low: d.low, high: d.high }));
}

// --- layers ------------------------------------------------------------------------------------------------------
const VIRIDIS = [[68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141], [39, 173, 129], [92, 200, 99], [170, 220, 50], [253, 231, 37]];
function heat(share) {
  const at = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1), i = Math.min(Math.floor(at), VIRIDIS.length - 2);
  return `rgb(${VIRIDIS[i].map((c, k) => Math.round(c + (VIRIDIS[i + 1][k] - c) * (at - i))).join(" ")})`;
}
const chosen = { run: 0, kind: "gradient" };
function layerGrid(plot, o) {
  const of = data.layers[chosen.run];
  if (!of) return empty(plot, "no layers were recorded");
  const counts = o.what === "counts";
  const table = counts ? of.counts : of.norms[chosen.kind] || {};
  const names = Object.keys(table);
  if (!names.length) return empty(plot, "nothing of this kind was recorded");
  const cells = names.map((n) => {
    if (!counts) return table[n];
    const total = table[n].reduce((a, b) => a + b, 0) || 1;
    return table[n].map((c) => (c ? c / total : null));
  });
  const columns = cells[0].length;
  const known = cells.flat().filter((v) => v !== null && v > 0);
  const width = Math.max(plot.clientWidth, 240), left = Math.min(width * 0.42, 12 + 6.8 * Math.max(...names.map((n) => n.length)));
  const each = names.length > 30 ? 12 : 20, height = names.length * each + 58;
  const svg = node("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: "0", "aria-label": o.label });
  const low = known.length ? Math.max(Math.min(...known), counts ? 1e-4 : 0) : 1, high = known.length ? Math.max(...known) : 1;
  const cell = (width - left - 8) / columns;
  names.forEach((name, i) => {
    svg.append(node("text", { class: "name", x: left - 7, y: i * each + each / 2 + 4, "text-anchor": "end" }, name));
    cells[i].forEach((v, k) => {
      const share = v > 0 ? (high > low ? Math.log(v / low) / Math.log(high / low) : 0.5) : -1;
      const box = node("rect", { x: (left + k * cell).toFixed(2), y: i * each, width: (cell + 0.3).toFixed(2), height: each - 1, fill: share < 0 && v !== 0 ? "var(--soft)" : share < 0 ? "var(--line)" : heat(share) });
      const where = counts ? `size ${bin(k, columns)}` : `step ${of.steps[k]}`;
      box.append(node("title", {}, `${name}, ${where}: ${v === null ? (counts ? "none" : "not recorded") : counts ? trim(100 * v, 2) + " %" : short(v)}`));
      svg.append(box);
    });
  });
  const y = names.length * each + 15;
  const wanted = Math.max(2, Math.floor((width - left) / 70)), every = Math.max(1, Math.ceil(columns / wanted));
  for (let k = 0; k < columns; k += every)
    svg.append(node("text", { x: left + (k + 0.5) * cell, y, "text-anchor": "middle" }, counts ? bin(k, columns) : short(of.steps[k])));
  svg.append(node("text", { x: left + (width - left) / 2, y: y + 18, "text-anchor": "middle" }, counts ? "size of a gradient" : "step"));
  const bar = 90;
  for (let k = 0; k < 30; k++) svg.append(node("rect", { x: left + (k * bar) / 30, y: y + 28, width: bar / 30 + 0.5, height: 8, fill: heat(k / 29) }));
  svg.append(node("text", { x: left - 7, y: y + 37, "text-anchor": "end" }, counts ? `${short(100 * low)} %` : short(low)));
  svg.append(node("text", { x: left + bar + 7, y: y + 37 }, counts ? `${short(100 * high)} % of the layer's` : `${short(high)}, norm on a log scale`));
  plot.replaceChildren(svg);
}
function bin(k, columns) {
  if (columns !== 26) return String(k);
  return k === 0 ? "≈0" : k === 25 ? "huge" : (4 ** (k - 18)).toExponential(0).replace("e+", "e");
}
