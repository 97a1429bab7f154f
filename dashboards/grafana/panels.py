"""Parts that the dashboards are put together from: queries, panels, variables."""

# A rank's series carry no run: it is joined from repa_run_info, which every rank serves.
INFO = 'repa_run_info{job=~"$job", run=~"$run"}'
JOIN = f"* on (job, instance, rank) group_left (run) {INFO}"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
MEAN_AND_LAST = ["mean", "lastNotNull"]


def series(metric, ranks=False, labels=""):
    """A metric's series; with `ranks`, those of the chosen ranks."""
    chosen = ', rank=~"$rank"' if ranks else ""
    return f'{metric}{{job=~"$job"{chosen}{labels}}}'


def rate(metric, ranks=False, labels=""):
    return f"rate({series(metric, ranks, labels)}[$__rate_interval])"


def by_run(operation, expr, *labels):
    """One series a run (and label)."""
    return f"{operation} by ({', '.join(('run', *labels))}) ({expr} {JOIN})"


def by_rank(expr):
    return by_run("avg", expr, "rank")


def mean(histogram, *labels, ranks=False):
    """Mean duration: of all ranks, or by a label."""
    total, count = (by_run("sum", rate(f"{histogram}_{part}", ranks), *labels) for part in ("sum", "count"))
    return f"{total} / {count}"


def rows(expr):
    """By rank, named with leading zeros, so that rows come in order."""
    row = f'label_replace({expr}, "row", "$1", "rank", "(.+)")'
    for digits, zeros in (("(..)", "0$1"), ("(.)", "00$1")):
        row = f'label_replace({row}, "row", "{zeros}", "rank", "{digits}")'
    return f"max by (row) ({row})"


def target(expr, legend="{{run}}", **more):
    return {"datasource": SOURCE, "editorMode": "code", "expr": expr, "legendFormat": legend, "range": True} | more


def instant(expr, legend="{{run}}", **more):
    return target(expr, legend, instant=True) | {"range": False} | more


def panel(kind, title, description, unit, targets, width=8, height=8, options=None, defaults=None, **more):
    targets = [target(t) if isinstance(t, str) else t for t in targets]
    for number, each in enumerate(targets):
        each["refId"] = "ABCDEFGHIJKLMNOP"[number]
    return {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": SOURCE,
        "gridPos": {"w": width, "h": height},
        "fieldConfig": {"defaults": {"unit": unit} | (defaults or {}), "overrides": more.pop("overrides", [])},
        "options": options or {},
        "targets": targets,
    } | more


def steps(*values):
    """Thresholds: a colour, then pairs of value and colour."""
    first, *rest = values
    listed = [{"color": first, "value": None}] + [{"color": c, "value": v} for v, c in zip(rest[::2], rest[1::2])]
    return {"mode": "absolute", "steps": listed}


def lines(title, description, unit, targets, width=8, height=8, calcs=("lastNotNull",), stack=False, log=False,
          many=False, aside=False, rare=False, top=None, **more):
    """Lines over time. `many`: a short legend, for a line a rank. `aside`: the legend to the right. `rare`: values with
    gaps between them. `top`: the least upper end of the axis."""
    custom = {
        "drawStyle": "line",
        "lineInterpolation": "linear",
        "lineWidth": 1,
        "fillOpacity": 60 if stack else 0,
        "showPoints": "always" if rare else "never",
        "spanNulls": rare,
        "stacking": {"group": "A", "mode": "normal" if stack else "none"},
        "scaleDistribution": {"type": "log", "log": 10} if log else {"type": "linear"},
    }
    if top is not None:
        custom["axisSoftMax"] = top
    defaults = {"color": {"mode": "palette-classic"}, "custom": custom} | more.pop("defaults", {})
    options = {
        "legend": {
            "calcs": [] if many else list(calcs),
            "displayMode": "list" if many else "table",
            "placement": "right" if aside else "bottom",
            "showLegend": True,
        },
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return panel("timeseries", title, description, unit, targets, width, height, options, defaults, **more)


def number(title, description, unit, expr, width=4, height=4, thresholds=None, **defaults):
    """One big number."""
    thresholds = thresholds or steps("text")
    options = {
        "colorMode": "value",
        "graphMode": "none",
        "justifyMode": "auto",
        "orientation": "auto",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "textMode": "auto",
        "wideLayout": True,
    }
    settings = {"color": {"mode": "thresholds"}, "thresholds": thresholds} | defaults
    return panel("stat", title, description, unit, [instant(expr)], width, height, options, settings)


def heatmap(title, description, unit, query, width=12, height=9, scheme="Oranges", axis=None):
    options = {
        "calculate": False,
        "cellGap": 1,
        "cellValues": {"unit": unit},
        "color": {"mode": "scheme", "scheme": scheme, "steps": 64, "fill": "dark-orange", "exponent": 0.5,
                  "scale": "exponential", "reverse": False},
        "exemplars": {"color": "rgba(255,0,255,0.7)"},
        "filterValues": {"le": 1e-9},
        "legend": {"show": True},
        "rowsFrame": {"layout": "auto"},
        "tooltip": {"mode": "single", "showColorScale": True, "yHistogram": False},
        "yAxis": {"axisPlacement": "left", "reverse": False} | (axis or {}),
    }
    custom = {"scaleDistribution": {"type": "linear"}, "hideFrom": {"legend": False, "tooltip": False, "viz": False}}
    return panel("heatmap", title, description, unit, [query], width, height, options, {"custom": custom})


def table(title, description, unit, expr, hidden, renamed, order, width=24, height=8, sort=None, widths=None):
    organize = {
        "id": "organize",
        "options": {
            "excludeByName": {name: True for name in ("Time", "__name__", "job", *hidden)},
            "indexByName": {name: index for index, name in enumerate(order)},
            "renameByName": renamed,
        },
    }
    options = {"cellHeight": "sm", "showHeader": True}
    if sort:
        options["sortBy"] = [{"displayName": sort, "desc": False}]
    custom = {"align": "left", "cellOptions": {"type": "auto"}, "filterable": True, "minWidth": 80}
    overrides = [
        {"matcher": {"id": "byName", "options": name}, "properties": [{"id": "custom.width", "value": wide}]}
        for name, wide in (widths or {}).items()
    ]
    return panel("table", title, description, unit, [instant(expr, "", format="table")], width, height, options,
                 {"custom": custom}, transformations=[organize], overrides=overrides)


def row(title):
    return {"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": {"w": 24, "h": 1}}


def variables():
    def query(name, label, expr, description, **more):
        return {
            "type": "query",
            "name": name,
            "label": label,
            "description": description,
            "datasource": SOURCE,
            "query": {"query": expr, "refId": "StandardVariableQuery"},
            "refresh": 2,
            "sort": 3,
            "multi": True,
            "includeAll": True,
            "allValue": ".+",
            "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
            "hide": 0,
            "regex": "",
            "skipUrlSync": False,
            "options": [],
        } | more

    source = {
        "type": "datasource",
        "name": "datasource",
        "label": "Data source",
        "description": "A Prometheus that scrapes the ranks",
        "query": "prometheus",
        "current": {"selected": False, "text": "Prometheus", "value": "repa-prometheus"},
        "hide": 0,
        "includeAll": False,
        "multi": False,
        "options": [],
        "refresh": 1,
        "regex": "",
        "skipUrlSync": False,
    }
    return [
        source,
        query("job", "Job", "label_values(repa_run_info, job)", "Scrape jobs of Prometheus"),
        query("run", "Run", 'label_values(repa_run_info{job=~"$job"}, run)', "Runs, by the names of their folders"),
        query("rank", "Rank", f"label_values({INFO}, rank)", "Ranks, in panels that show each"),
    ]


def dashboard(uid, title, description, panels):
    """Lays the panels out from left to right, and numbers them."""
    x = y = tallest = 0
    for identifier, each in enumerate(panels, 1):
        each["id"] = identifier
        place = each["gridPos"]
        if x + place["w"] > 24:
            x, y, tallest = 0, y + tallest, 0
        each["gridPos"] = {"h": place["h"], "w": place["w"], "x": x, "y": y}
        x, tallest = x + place["w"], max(tallest, place["h"])
    link = {"asDropdown": False, "icon": "external link", "includeVars": True, "keepTime": True, "tags": ["repa-dist"],
            "targetBlank": False, "title": "repa-dist", "tooltip": "", "type": "dashboards", "url": ""}
    built_in = {"builtIn": 1, "datasource": {"type": "grafana", "uid": "-- Grafana --"}, "enable": True, "hide": True,
                "iconColor": "rgba(0, 211, 255, 1)", "name": "Annotations & Alerts", "type": "dashboard"}
    return {
        "uid": uid,
        "title": title,
        "description": description,
        "tags": ["repa-dist"],
        "editable": False,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "schemaVersion": 41,
        "version": 1,
        "links": [link],
        "annotations": {"list": [built_in]},
        "templating": {"list": variables()},
        "panels": panels,
    }
