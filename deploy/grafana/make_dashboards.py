"""Writes dashboards/*.json from boards.py: `python deploy/grafana/make_dashboards.py` (`--check`
only compares). Standard library alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from boards import DASHBOARDS, Dashboard, Panel

FOLDER = Path(__file__).parent / "dashboards"
SOURCE = {"type": "prometheus", "uid": "prometheus"}
WIDTH = 24  # of Grafana's grid


def written(query: str) -> str:
    """A query as Grafana reads it."""
    return query.replace("@", 'job=~"$job",instance=~"$instance"').replace("[R]", "[$__rate_interval]")


def variable(name: str, label: str, query: str) -> dict[str, Any]:
    """A choice at the head of a dashboard; all of them to begin with."""
    return {
        "name": name, "label": label, "type": "query", "datasource": SOURCE, "refresh": 2, "sort": 1, "hide": 0, "options": [],
        "query": {"query": written(query), "refId": name}, "definition": written(query), "includeAll": True, "multi": True,
        "allValue": ".*", "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }  # fmt: skip


def target(panel: Panel, place: int) -> dict[str, Any]:
    """One query of a panel."""
    query, legend = panel.queries[place]
    shapes: dict[str, dict[str, Any]] = {
        "heatmap": {"format": "heatmap"},
        "table": {"format": "table", "instant": True},
    }
    shape = shapes.get(panel.kind, {})
    return {"refId": "ABCDEF"[place], "datasource": SOURCE, "expr": written(query), "legendFormat": legend, **shape}


def options(kind: str) -> dict[str, Any]:
    """How a kind of panel shows its data."""
    known: dict[str, dict[str, Any]] = {
        "stat": {
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}, "colorMode": "value", "graphMode": "area",
            "textMode": "auto",
        },
        "timeseries": {
            "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull", "max"]},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "heatmap": {
            "calculate": False, "cellGap": 1, "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64, "exponent": 0.5},
            "rowsFrame": {"layout": "auto"}, "tooltip": {"mode": "single", "yHistogram": True}, "legend": {"show": True},
        },
        "table": {"showHeader": True, "cellHeight": "sm"},
    }  # fmt: skip
    return known[kind]


def drawn(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    """A panel as Grafana reads it."""
    steps = [{"color": colour, "value": value} for colour, value in panel.limits]
    defaults: dict[str, Any] = {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": steps}}
    shown = options(panel.kind)
    if panel.kind == "timeseries":
        defaults["custom"] = {"lineWidth": 1, "fillOpacity": 8, "showPoints": "auto", "spanNulls": False}
    if panel.kind == "heatmap":
        shown["yAxis"] = {"unit": panel.unit, "axisPlacement": "left"}
    body = {
        "id": number, "type": panel.kind, "title": panel.title, "description": panel.about, "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height}, "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": shown, "targets": [target(panel, place) for place in range(len(panel.queries))],
    }  # fmt: skip
    if panel.kind == "table":
        hidden = dict.fromkeys(("Time", "__name__"), True)
        body["transformations"] = [
            {"id": "organize", "options": {"excludeByName": hidden, "indexByName": {}, "renameByName": {}}}
        ]
    return body


def placed(panels: Sequence[Panel]) -> list[dict[str, Any]]:
    """The panels from left to right, row by row; a row is as high as its highest."""
    found, x, y, height = [], 0, 0, 0
    for number, panel in enumerate(panels, 1):
        if x + panel.width > WIDTH:
            x, y, height = 0, y + height, 0
        found.append(drawn(panel, number, x, y))
        x, height = x + panel.width, max(height, panel.height)
    return found


def document(board: Dashboard) -> dict[str, Any]:
    """A dashboard's JSON."""
    swaps = {
        "name": "New memory version", "enable": True, "iconColor": "purple", "datasource": SOURCE, "step": "15s",
        "expr": written("reco_memory_info{@} unless reco_memory_info{@} offset 15s"), "useValueForTime": False,
        "titleFormat": "{{name}}@{{version}}", "textFormat": "serves from here", "tagKeys": "name,version",
    }  # fmt: skip
    here = (
        ("job", "Job", "label_values(reco_build_info, job)"),
        ("instance", "Instance", 'label_values(reco_build_info{job=~"$job"}, instance)'),
    )
    others = [
        {
            "title": other.title.partition(": ")[2],
            "type": "link",
            "url": f"/d/{other.uid}",
            "keepTime": True,
            "includeVars": True,
        }
        for other in DASHBOARDS
        if other is not board
    ]
    return {
        "uid": board.uid, "title": board.title, "tags": ["reco"], "schemaVersion": 39, "version": 1, "editable": True, "links": others,
        "timezone": "browser", "refresh": "10s", "time": {"from": "now-30m", "to": "now"}, "graphTooltip": 1,
        "annotations": {"list": [swaps]}, "templating": {"list": [variable(*each) for each in (*here, *board.variables)]},
        "panels": placed(board.panels),
    }  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Write or compare; 1 where a file differs."""
    stale = []
    for board in DASHBOARDS:
        path, text = FOLDER / f"{board.uid.removeprefix('reco-')}.json", json.dumps(document(board), indent=1) + "\n"
        if not path.exists() or path.read_text() != text:
            stale.append(path.name)
            if "--check" not in arguments:
                path.write_text(text)
    print(f"{'differ' if '--check' in arguments else 'written'}: {', '.join(stale) or 'none'}")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
