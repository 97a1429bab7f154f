// Draws the curves of a report from the data that the page carries.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const box = document.getElementById("plots");
  const axis = document.getElementById("axis");
  const smoothing = document.getElementById("smoothing");
  const hidden = new Set();
  let drawn = [];
  const axes = { step: "step", hours: "hours of training", images: "thousand images" };
  const colour = (run) => data.colours[run % data.colours.length];
  const css = (name) => getComputedStyle(document.body).getPropertyValue(name).trim();

  // The mean of the points around each; of fewer where a curve begins or ends. Missing points count for nothing.
  function smooth(values, share) {
    const half = Math.floor((values.length * share) / 2);
    if (half < 1) return values;
    const sums = [0], counts = [0];
    values.forEach((v, i) => {
      sums.push(sums[i] + (v ?? 0));
      counts.push(counts[i] + (v == null ? 0 : 1));
    });
    return values.map((_, i) => {
      // As far to the right as to the left where a curve begins, so that a steep fall stays one.
      const reach = Math.min(half, i), end = Math.min(values.length, i + reach + 1), begin = i - reach;
      const count = counts[end] - counts[begin];
      return count ? (sums[end] - sums[begin]) / count : null;
    });
  }

  const number = (v) => (v == null ? "–" : Math.abs(v) >= 1e4 || (v && Math.abs(v) < 1e-3) ? v.toExponential(3)
    : v.toPrecision(5));

  function plot(at) {
    const quantity = data.quantities[at];
    const share = Number(smoothing.value);
    const tables = [], series = [{ label: axes[axis.value] }], bands = [];
    data.runs.forEach((run, r) => {
      const values = run.values[at];
      const mean = smooth(values.mean, share);
      const show = !hidden.has(r);
      const pale = { show, stroke: colour(r) + "50", width: 1, points: { show: false }, spanGaps: true };
      if (run.group > 1) {
        // What the steps that share a point span.
        tables.push([run[axis.value], values.most, values.least, mean]);
        const first = series.length;
        series.push({ ...pale, label: "most", width: 0 }, { ...pale, label: "least", width: 0 });
        bands.push({ series: [first, first + 1], fill: colour(r) + "30" });
      } else {
        tables.push([run[axis.value], values.mean, mean]);
        series.push({ ...pale, label: "each" });
      }
      series.push({
        show, label: run.name, stroke: colour(r), width: 2, points: { show: false }, spanGaps: true,
        value: (_, v) => number(v), run: r,
      });
    });
    if (tables.every((t) => t.slice(1).every((column) => column.every((v) => v == null)))) return;
    const joined = uPlot.join(tables);
    const log = quantity.logarithmic && joined.slice(1).every((c) => c.every((v) => v == null || v > 0));
    const lines = { stroke: css("--quiet"), grid: { stroke: css("--grid"), width: 1 }, ticks: { show: false } };
    const options = {
      title: quantity.title + (quantity.unit ? ` (${quantity.unit})` : ""),
      width: Math.max(320, box.clientWidth / (box.clientWidth > 900 ? 2 : 1) - 16), height: 300,
      series, bands,
      scales: { x: { time: false, range: (_, low, high) => [low < 0.05 * high ? 0 : low, high] },
                y: { distr: log ? 3 : 1, range: log ? undefined : (u, low, high) => span(u, low, high) } },
      axes: [{ ...lines, label: axes[axis.value], labelSize: 20,
               values: (_, ticks) => ticks.map((v) => v?.toLocaleString("en")) },
             { ...lines, size: 64, values: (_, ticks) => ticks.map((v) => (v == null ? "" : tick(v))) }],
      cursor: { sync: { key: "repa", setSeries: false }, points: { size: 6 } },
      hooks: { draw: [marks] },
    };
    const made = new uPlot(options, joined, box);
    drawn.push(made);
    // The legend tells runs, not the pale lines behind them.
    made.root.querySelectorAll(".u-legend .u-series").forEach((row, s) => {
      if (s > 0 && series[s].run === undefined) row.style.display = "none";
      if (series[s].run !== undefined) {
        row.addEventListener("click", () => toggle(series[s].run), true);
      }
    });
  }

  const tick = (v) => (v !== 0 && (Math.abs(v) >= 1e6 || Math.abs(v) < 1e-3) ? v.toExponential(0) : String(+v.toPrecision(6)));

  // Where most values lie: a spike or two must not flatten a curve.
  function span(u, low, high) {
    const [from, to] = u.series[0].idxs ?? [0, u.data[0].length - 1];
    const all = [];
    u.series.forEach((s, i) => {
      if (i && s.show) for (let k = from; k <= to; k++) if (u.data[i][k] != null) all.push(u.data[i][k]);
    });
    if (!all.length) return [low ?? 0, high ?? 1];
    all.sort((a, b) => a - b);
    const cut = Math.floor(all.length / 200);
    let [least, most] = [all[cut], all[all.length - 1 - cut]];
    if (least === most) [least, most] = [all[0], all[all.length - 1]];
    const room = least < most ? 0.06 * (most - least) : Math.abs(least) * 0.1 || 1;
    return [least - room, most + room];
  }

  // A tick at the foot of a plot where a run was started, and where something went wrong.
  function marks(u) {
    const { ctx, bbox } = u;
    ctx.save();
    data.runs.forEach((run, r) => {
      if (hidden.has(r)) return;
      for (const mark of run.marks) {
        if (mark.kind === "start" && mark.step === 0) continue;
        const at = run.step.findIndex((s) => s >= mark.step);
        if (at < 0) continue;
        const x = u.valToPos(run[axis.value][at], "x", true);
        if (x < bbox.left || x > bbox.left + bbox.width) continue;
        ctx.strokeStyle = mark.kind === "start" ? colour(r) : css("--bad");
        ctx.lineWidth = 2 * devicePixelRatio;
        ctx.beginPath();
        ctx.moveTo(x, bbox.top + bbox.height - 12 * devicePixelRatio);
        ctx.lineTo(x, bbox.top + bbox.height);
        ctx.stroke();
      }
    });
    ctx.restore();
  }

  function toggle(run) {
    hidden.has(run) ? hidden.delete(run) : hidden.add(run);
    draw();
  }

  function draw() {
    // Takes them off the page, and their listeners with them.
    drawn.forEach((made) => made.destroy());
    drawn = [];
    data.quantities.forEach((_, at) => plot(at));
  }

  axis.addEventListener("change", draw);
  smoothing.addEventListener("change", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  let waiting;
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(draw, 150); });
  document.querySelectorAll(".strip img").forEach((image) =>
    image.addEventListener("click", () => image.closest("figure").classList.toggle("large")));
  draw();
})();
