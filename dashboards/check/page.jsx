// Draws one dashboard from the answers of Prometheus, with Grafana's own panel components. Heat maps are the exception:
// Grafana does not publish that component, so they are drawn here, with its colours and number formats.
import { createRoot } from "react-dom/client";
import { FieldType, createTheme, getDisplayProcessor, getDefaultTimeRange, dateTime, standardTransformersRegistry, toDataFrame } from "@grafana/data";
import { initPluginTranslations } from "@grafana/i18n";
import { BigValue, BigValueColorMode, BigValueGraphMode, GlobalStyles, PanelChrome, ThemeContext, TimeSeries } from "@grafana/ui";

import { TableNG } from "@grafana/ui/unstable";
import "uplot/dist/uPlot.min.css";

const { board, answers, from, to } = window.dashboard;
const theme = createTheme({ colors: { mode: "dark" } });
const UNIT = 32;
const GAP = 8;
const WIDTH = 1600;
const timeRange = { ...getDefaultTimeRange(), from: dateTime(from * 1000), to: dateTime(to * 1000) };
timeRange.raw = { from: timeRange.from, to: timeRange.to };

const legendOf = (target, labels) => target.legendFormat.replace(/{{\s*(\w+)\s*}}/g, (_, name) => labels[name] ?? "");
const numberOf = (text) => (text === "+Inf" ? Infinity : text === "-Inf" ? -Infinity : Number(text));
// As Grafana's own time series panel does.
const drawable = (number) => (Number.isFinite(number) ? number : null);

function field(panel, values, labels, name, index) {
  const defaults = panel.fieldConfig.defaults;
  const custom = {
    axisPlacement: "auto", axisColorMode: "text", axisLabel: "", barAlignment: 0, gradientMode: "none", pointSize: 5,
    hideFrom: { legend: false, tooltip: false, viz: false }, lineStyle: { fill: "solid" },
    thresholdsStyle: { mode: "off" }, ...defaults.custom,
  };
  const config = { ...defaults, custom, displayNameFromDS: name };
  const made = { name: "Value", type: FieldType.number, values, labels, config, state: { displayName: name, seriesIndex: index } };
  made.display = getDisplayProcessor({ field: made, theme, timeZone: "utc" });
  return made;
}

function frames(panel) {
  let index = 0;
  return answers[panel.id].flatMap((answer, number) =>
    answer.map(({ metric, values }) => {
      const time = { name: "Time", type: FieldType.time, values: values.map(([t]) => t * 1000), config: {} };
      time.display = getDisplayProcessor({ field: time, theme, timeZone: "utc" });
      const name = legendOf(panel.targets[number], metric);
      const frame = toDataFrame({ refId: panel.targets[number].refId, fields: [time] });
      frame.fields = [time, field(panel, values.map(([, v]) => drawable(numberOf(v))), metric, name, index++)];
      frame.length = values.length;
      return frame;
    })
  );
}

function Lines({ panel, width, height }) {
  return <TimeSeries frames={frames(panel)} structureRev={1} timeRange={timeRange} timeZone="utc" width={width} height={height}
    legend={panel.options.legend} options={panel.options} replaceVariables={(text) => text} />;
}

function Number_({ panel, width, height }) {
  const found = answers[panel.id].flat();
  return <div style={{ display: "flex", height }}>{found.map(({ value }, i) => {
    const made = field(panel, [numberOf(value[1])], {}, "", i);
    return <BigValue key={i} value={made.display(numberOf(value[1]))} width={width / found.length} height={height} theme={theme}
      colorMode={BigValueColorMode.Value} graphMode={BigValueGraphMode.None} />;
  })}</div>;
}

function Rows({ panel, width, height }) {
  const { excludeByName, indexByName, renameByName } = panel.transformations[0].options;
  const by = panel.options.sortBy && Object.keys(renameByName).find((name) => renameByName[name] === panel.options.sortBy[0].displayName);
  const found = answers[panel.id].flat().sort((a, b) => (by ? Number(a.metric[by]) - Number(b.metric[by]) : 0));
  const all = [...new Set(found.flatMap(({ metric }) => Object.keys(metric)).concat("Value"))];
  const place = (name) => indexByName[name] ?? 99;
  const widthOf = (title) => {
    const found = panel.fieldConfig.overrides.find(({ matcher }) => matcher.options === title);
    return found ? { width: found.properties[0].value } : {};
  };
  const shown = all.filter((name) => !excludeByName[name]).sort((a, b) => place(a) - place(b));
  const fields = shown.map((name) => {
    const values = found.map(({ metric, value }) => (name === "Value" ? numberOf(value[1]) : metric[name] ?? ""));
    const type = name === "Value" ? FieldType.number : FieldType.string;
    const made = { name: renameByName[name] ?? name, type, values, config: { custom: { ...panel.fieldConfig.defaults.custom, ...widthOf(renameByName[name]) } }, state: {} };
    made.display = getDisplayProcessor({ field: made, theme, timeZone: "utc" });
    return made;
  });
  const frame = toDataFrame({ fields: [] });
  frame.fields = fields;
  frame.length = found.length;
  return <TableNG data={frame} width={width} height={height} structureRev={1} enableVirtualization={false} timeZone="utc" />;
}

function Heat({ panel, width, height }) {
  let found = answers[panel.id].flat().map(({ metric, values }) => ({
    name: legendOf(panel.targets[0], metric), values: new Map(values.map(([t, v]) => [t, numberOf(v)])),
  }));
  const buckets = panel.targets[0].format === "heatmap";
  if (buckets) {
    found.sort((a, b) => numberOf(a.name) - numberOf(b.name));
    found = found.map((row, i) => ({
      name: row.name,
      values: new Map([...row.values].map(([t, v]) => [t, Math.max(v - (i ? found[i - 1].values.get(t) ?? 0 : 0), 0)])),
    }));
  }
  const times = [...new Set(found.flatMap(({ values }) => [...values.keys()]))].sort((a, b) => a - b);
  const numbers = found.flatMap(({ values }) => [...values.values()]).filter((v) => Number.isFinite(v) && !(buckets && v < 1e-6));
  const [low, high] = [Math.min(...numbers), Math.max(...numbers)];
  const display = field(panel, [], {}, "", 0).display;
  const axis = (name) => (name === "+Inf" ? { text: "more" } : buckets ? field({ fieldConfig: { defaults: { unit: "s" } } }, [], {}, "", 0).display(numberOf(name)) : { text: name });
  const label = 64;
  const cell = { width: (width - label) / times.length, height: (height - 40) / found.length };
  return <div style={{ position: "relative", width, height, fontSize: buckets ? 9 : 11 }}>
    {found.map((row, i) => {
      const y = (found.length - 1 - i) * cell.height;
      const name = axis(row.name);
      return [<div key="name" style={{ position: "absolute", top: y + cell.height / 2 - 8, width: label - 6, textAlign: "right" }}>{name.text}{name.suffix}</div>,
        ...times.map((t, x) => {
          const v = row.values.get(t);
          if (!Number.isFinite(v) || (buckets && v < 1e-6)) return null;
          const part = high > low ? (v - low) / (high - low) : 1;
          return <div key={t} style={{ position: "absolute", left: label + x * cell.width, top: y, width: cell.width + 0.3, height: cell.height - 1,
            background: `hsl(${40 - 30 * part} 90% ${90 - 60 * part}%)` }} />;
        })];
    })}
    <div style={{ position: "absolute", bottom: 0, left: label }}>{display(low).text}{display(low).suffix} (light) to {display(high).text}{display(high).suffix} (dark); drawn by the check</div>
  </div>;
}

const KINDS = { timeseries: Lines, stat: Number_, table: Rows, heatmap: Heat };

function Panel({ panel }) {
  const { x, y, w, h } = panel.gridPos;
  const column = WIDTH / 24;
  const place = { position: "absolute", left: x * column + GAP / 2, top: y * (UNIT + GAP / 4), width: w * column - GAP, height: h * UNIT - GAP };
  if (panel.type === "row") {
    return <div style={{ ...place, height: UNIT, font: "500 16px sans-serif", color: theme.colors.text.primary, paddingTop: 8 }}>{panel.title}</div>;
  }
  const Kind = KINDS[panel.type];
  const empty = answers[panel.id].flat().length === 0;
  return <div style={place} data-panel={panel.title} data-empty={empty}>
    <PanelChrome width={place.width} height={place.height} title={panel.title} description={panel.description}>
      {(width, height) => empty
        ? <div style={{ textAlign: "center", paddingTop: height / 2 - 10 }}>No data</div>
        : <Kind panel={panel} width={width} height={height} />}
    </PanelChrome>
  </div>;
}

standardTransformersRegistry.setInit(() => []);
await initPluginTranslations("repa-dist");
createRoot(document.getElementById("root")).render(
  <ThemeContext.Provider value={theme}>
    <GlobalStyles />
    {board.panels.map((panel) => <Panel key={panel.id} panel={panel} />)}
  </ThemeContext.Provider>
);
