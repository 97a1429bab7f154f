// node render.mjs CACHE PROMETHEUS OUT [--all]: asks Prometheus for what every panel shows of the run $RUN, draws the
// dashboards in headless Chromium and writes a PNG for each. Fails on a panel that is empty and should not be. With
// --all, panels that a run on CPUs leaves empty have to have data too.
import { execFileSync, spawnSync } from "node:child_process";
import { mkdirSync, mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const [cache, prometheus, out, ...flags] = process.argv.slice(2);
const here = dirname(fileURLToPath(import.meta.url));
const esbuild = createRequire(join(cache, "package.json"))("esbuild");

// As EMPTY_IN_THIS_RUN in tests/tests/prometheus.rs.
const EMPTY_ON_CPUS = /ALERTS\{|repa_loss_scale|repa_encoder_seconds|repa_gpu_|repa_mfu_ratio/;
const SECONDS = Number(process.env.CHECK_SECONDS ?? 60);
const mayBeEmpty = (expr) => !flags.includes("--all") && EMPTY_ON_CPUS.test(expr);

const chromium = ["chromium", "chromium-browser", "google-chrome"].find((name) => spawnSync(name, ["--version"]).status === 0);
if (!chromium) {
  console.log("stopped: no Chromium found (Debian's package is chromium); dashboards were not drawn");
  process.exit(0);
}

async function ask(path, parameters) {
  const response = await fetch(`${prometheus}/api/v1/${path}`, {
    method: "POST", body: new URLSearchParams(parameters), signal: AbortSignal.timeout(20_000),
  });
  const answer = await response.json();
  if (answer.status !== "success") throw new Error(`${parameters.query}: ${answer.error}`);
  return answer.data.result;
}

const VALUES = { job: ".+", run: process.env.RUN ?? ".+", rank: ".+", __rate_interval: "15s", __range: `${SECONDS}s` };
const filled = (expr) => expr.replace(/\$(__\w+|job|run|rank)/g, (_, name) => VALUES[name]);

mkdirSync(out, { recursive: true });
const work = mkdtempSync(join(tmpdir(), "repa-dashboards-"));
let failed = false;
try {
  esbuild.buildSync({
    entryPoints: [join(here, "page.jsx")], bundle: true, outfile: join(work, "page.js"), format: "esm", jsx: "automatic",
    nodePaths: [join(cache, "node_modules")], define: { "process.env.NODE_ENV": '"production"', global: "window" },
    loader: { ".svg": "dataurl", ".woff": "empty", ".woff2": "empty", ".ttf": "empty" }, logLevel: "error", minify: true,
  });
  for (const name of ["training", "cluster", "reliability"]) {
    const board = JSON.parse(readFileSync(join(here, "../grafana/dashboards", `${name}.json`), "utf8"));
    const to = Math.floor(Date.now() / 1000) - 1;
    const from = to - SECONDS;
    const answers = {};
    for (const panel of board.panels.filter(({ type }) => type !== "row")) {
      answers[panel.id] = await Promise.all(panel.targets.map(({ expr, instant }) => instant
        ? ask("query", { query: filled(expr), time: to })
        : ask("query_range", { query: filled(expr), start: from, end: to, step: Math.max(SECONDS / 120, 1) })));
      panel.targets.forEach(({ expr }, number) => {
        const series = answers[panel.id][number];
        const finite = series.some(({ value, values }) => (values ?? [value]).some(([, v]) => Number.isFinite(Number(v))));
        if (!finite && !mayBeEmpty(expr)) {
          failed = true;
          console.error(`${name}: ${panel.title}: no data for ${expr}`);
        }
      });
    }
    const height = Math.max(...board.panels.map(({ gridPos: { y, h } }) => y + h)) * 34 + 20;
    const text = JSON.stringify({ board, answers, from, to }).replaceAll("<", "\\u003c");
    const page = join(work, `${name}.html`);
    const script = readFileSync(join(work, "page.js"), "utf8").replaceAll("</script", "<\\/script");
    writeFileSync(page, `<!doctype html><meta charset="utf-8"><style>${readFileSync(join(work, "page.css"), "utf8")}</style><body style="margin:0;background:#111217"><div id="root" style="position:relative;width:1600px;height:${height}px"></div><script>window.dashboard=${text}</script><script type="module">${script}</script>`);
    const common = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
      "--disable-component-update", "--disable-sync", "--hide-scrollbars", `--user-data-dir=${join(work, "profile")}`,
      `--window-size=1600,${height}`, "--virtual-time-budget=20000"];
    const picture = join(out, `${name}.png`);
    const options = { stdio: ["ignore", "pipe", "ignore"], timeout: 120_000, maxBuffer: 1 << 28 };
    execFileSync(chromium, [...common, `--screenshot=${picture}`, `file://${page}`], options);
    const dom = execFileSync(chromium, [...common, "--dump-dom", `file://${page}`], options).toString();
    const drawn = (dom.match(/data-panel=/g) ?? []).length;
    const wanted = Object.keys(answers).length;
    if (drawn !== wanted || statSync(picture).size < 20_000) {
      failed = true;
      console.error(`${name}: ${drawn} of ${wanted} panels were drawn`);
    }
    console.log(`${picture}: ${drawn} panels`);
  }
} finally {
  rmSync(work, { recursive: true, force: true });
}
process.exit(failed ? 1 : 0);
