"""Reads each dashboard with Grafana's own data model and writes it again: a key that is lost on the way is misspelt,
or not known to Grafana. Then looks at what a linter would: titles, descriptions, units, variables, counters."""

import json
import pathlib
import re
import sys

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

BOARDS = pathlib.Path(__file__).parent.parent / "grafana" / "dashboards"


def lost(before, after, path=""):
    """Paths of what `after` lacks or has otherwise; lists by position."""
    if isinstance(before, dict):
        for key, value in before.items():
            below = f"{path}.{key}" if path else key
            if not isinstance(after, dict) or key not in after:
                # Null and empty are left out on writing.
                if value not in (None, [], {}):
                    yield below, value
            else:
                yield from lost(value, after[key], below)
    elif isinstance(before, list):
        if not isinstance(after, list) or len(before) != len(after):
            yield path, before
            return
        for b, a in zip(before, after):
            yield from lost(b, a, f"{path}[]")
    elif before != after:
        yield path, before


def complaints(board):
    names = [variable["name"] for variable in board["templating"]["list"]]
    if names != ["datasource", "job", "run", "rank"]:
        yield f"variables are {names}"
    if board["editable"]:
        yield "can be edited"
    for panel in board["panels"]:
        title = panel.get("title")
        if not title:
            yield f"panel {panel['id']} has no title"
        if panel["type"] == "row":
            continue
        if not panel.get("description"):
            yield f"{title}: no description"
        if not panel["fieldConfig"]["defaults"].get("unit"):
            yield f"{title}: no unit"
        if panel["datasource"]["uid"] != "${datasource}":
            yield f"{title}: the data source is not the variable"
        for target in panel["targets"]:
            expr = target["expr"]
            for name, selector in re.findall(r"\b((?:repa_|process_|up\b|ALERTS)[a-z0-9_]*)(\{[^}]*\})?", expr):
                if 'job=~"$job"' not in selector:
                    yield f"{title}: {name} without the variable job"
                if name.endswith(("_total", "_bucket", "_sum", "_count")) and not re.search(
                    rf"(rate|increase)\({name}\{{", expr
                ):
                    yield f"{title}: the counter {name} without rate or increase"
            for window in re.findall(r"(?:rate|increase)\([^\[]*\[([^\]]*)\]", expr):
                if window not in ("$__rate_interval", "$__range"):
                    yield f"{title}: a rate over {window}"


def main():
    register_default_plugins()
    failed = False
    for path in sorted(BOARDS.glob("*.json")):
        board = json.loads(path.read_text())
        again = json.loads(json.dumps(Dashboard.from_json(board), cls=JSONEncoder))
        gone = sorted({p for p, _ in lost(board, again)})
        wrong = [f"lost on the way through Grafana's model: {p}" for p in gone] + list(complaints(board))
        failed |= bool(wrong)
        for line in wrong:
            print(f"{path.name}: {line}", file=sys.stderr)
        count = sum(panel["type"] != "row" for panel in board["panels"])
        print(f"{path.name}: {count} panels, {'not sound' if wrong else 'sound'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
