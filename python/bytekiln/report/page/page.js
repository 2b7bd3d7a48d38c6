// --- the page ----------------------------------------------------------------------------------------------------
const KINDS = {
  val_loss: [curves, { columns: [["val_loss"]], loss: true, dots: true }],
  loss: [curves, { columns: [["loss", true], ["loss_smooth"]], loss: true }],
  gap: [curves, { columns: [["gap"]], signed: true, dots: true }],
  lr: [curves, { columns: [["lr"]], zero: true, rates: true }],
  grad_norm: [curves, { columns: [["grad_norm"]], logy: true }],
  tokens_per_s: [curves, { columns: [["tokens_per_s"]], zero: true }],
  expert_load: [curves, { columns: [["expert_load"]] }],
  val_accuracy: [curves, { columns: [["val_accuracy"]], dots: true }],
  rates: [rates, {}],
  deltas: [rows, { rows: deltas, zero: true, clip: true, xname: "Δ validation loss", say: (v, r) => `${v.toFixed(4)}${r.low === null ? "" : ` (${r.low.toFixed(4)} to ${r.high.toFixed(4)})`}` }],
  speed: [rows, { rows: speeds, zero: "left", xname: "tokens/s", say: short }],
  layers: [layerGrid, { what: "norms" }],
  counts: [layerGrid, { what: "counts" }],
};
const figures = [...document.querySelectorAll("figure[data-chart]")];
function draw(figure) {
  const [how, options] = KINDS[figure.dataset.chart], plot = figure.querySelector(".plot");
  how(plot, { ...options, label: figure.querySelector("h3").textContent, number: Number(figure.dataset.number || 0) });
}
function drawAll() {
  figures.forEach(draw);
  state.charts = figures.filter((f) => f.querySelector("svg")).length;
}

document.querySelectorAll("#legend button[data-group]").forEach((b) =>
  b.addEventListener("click", () => {
    const g = Number(b.dataset.group), off = !hidden.delete(g);
    if (off) hidden.add(g);
    b.setAttribute("aria-pressed", String(!off));
    drawAll();
  }));
for (const [id, off] of [["show-all", false], ["show-none", true]])
  document.getElementById(id)?.addEventListener("click", () => {
    document.querySelectorAll("#legend button[data-group]").forEach((b) => {
      b.setAttribute("aria-pressed", String(!off));
      if (off) hidden.add(Number(b.dataset.group));
    });
    if (!off) hidden.clear();
    drawAll();
  });
for (const [id, key] of [["axis", "axis"], ["part", "part"]])
  document.getElementById(id)?.addEventListener("change", (e) => { shared[key] = e.target.value; drawAll(); });
for (const [id, key] of [["logx", "logx"], ["logy", "logy"], ["raw", "raw"]])
  document.getElementById(id)?.addEventListener("change", (e) => { shared[key] = e.target.checked; drawAll(); });
for (const [id, key] of [["layer-run", "run"], ["layer-kind", "kind"]])
  document.getElementById(id)?.addEventListener("change", (e) => {
    chosen[key] = key === "run" ? Number(e.target.value) : e.target.value;
    figures.filter((f) => ["layers", "counts"].includes(f.dataset.chart)).forEach(draw);
  });

function cellOf(row, column) {
  const cell = row.cells[column], v = cell.dataset.v;
  if (v === undefined) return cell.textContent.trim() || null;
  return v === "" ? null : Number(v);
}
document.querySelectorAll("th button.sort").forEach((b) =>
  b.addEventListener("click", () => {
    const head = b.closest("th"), body = head.closest("table").tBodies[0];
    const down = head.getAttribute("aria-sort") === "ascending";
    head.closest("tr").querySelectorAll("th").forEach((h) => h.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const list = [...body.rows].map((r) => [cellOf(r, head.cellIndex), r]);
    list.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);  // what is not known comes last, either way
      const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
      return down ? -order : order;
    });
    body.append(...list.map((e) => e[1]));
  }));

const root = document.documentElement;
const prefers = matchMedia("(prefers-color-scheme: dark)");
let own = null;
try { own = localStorage.getItem("bytekiln-theme"); } catch { /* a page from disk may have no storage */ }
function theme() {
  const dark = own ? own === "dark" : prefers.matches;
  root.dataset.theme = dark ? "dark" : "light";
  const b = document.getElementById("theme");
  b.textContent = dark ? "Light" : "Dark";
  b.setAttribute("aria-label", dark ? "Switch to the light theme" : "Switch to the dark theme");
}
document.getElementById("theme").addEventListener("click", () => {
  own = root.dataset.theme === "dark" ? "light" : "dark";
  try { localStorage.setItem("bytekiln-theme", own); } catch { /* then it holds for this view */ }
  theme();
});
prefers.addEventListener("change", theme);
theme();
drawAll();
let last = innerWidth, waiting = 0;
addEventListener("resize", () => {
  if (innerWidth === last) return;
  last = innerWidth;
  clearTimeout(waiting);
  waiting = setTimeout(drawAll, 120);
});
root.dataset.ready = "1";
