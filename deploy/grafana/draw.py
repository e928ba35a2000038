"""Draws the dashboards without Grafana: `python deploy/grafana/draw.py http://127.0.0.1:9090
[--minutes 30] [--out docs/how-to/dashboards]`.

Every panel is asked of Prometheus with the query that Grafana would send, and drawn by its kind;
time runs in minutes. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "dashboards"
SHOWN = 12  # lines and rows of a panel that get a name
SCALE = {"bytes": (1 / 2**20, "MiB"), "percentunit": (100, "%"), "s": (1, "s"), "reqps": (1, "req/s"), "ops": (1, "/s")}


@dataclass(frozen=True, slots=True)
class Window:
    """What is drawn: seconds since 1970, and seconds between two points."""

    prometheus: str
    start: float
    end: float
    step: float


def ask(window: Window, query: str) -> list[dict[str, Any]]:
    """The range of a query: [{"metric": labels, "values": [[t, "x"], …]}]."""
    filled = re.sub(r"\$(job|instance|endpoint|modality)\b", ".*", query.replace("$__rate_interval", "30s"))
    given = urllib.parse.urlencode({"query": filled, "start": window.start, "end": window.end, "step": window.step})
    with urllib.request.urlopen(f"{window.prometheus}/api/v1/query_range?{given}", timeout=60) as reply:  # noqa: S310  the operator's own
        found: list[dict[str, Any]] = json.load(reply)["data"]["result"]
    return found


def named(target: dict[str, Any], labels: dict[str, str]) -> str:
    """A line's name, by the legend."""
    text = re.sub(r"{{(\w+)}}", lambda found: labels.get(found[1], ""), target["legendFormat"])
    return " ".join(text.split()) if text != "__auto" else ", ".join(labels.values())


def points(series: dict[str, Any], window: Window) -> tuple[list[float], list[float]]:
    """Minutes since the start, and values."""
    return [(at - window.start) / 60 for at, _ in series["values"]], [float(value) for _, value in series["values"]]


def lines(axes: Any, panel: dict[str, Any], window: Window) -> bool:
    """Draw a time series panel; whether there was anything."""
    factor, unit = SCALE.get(panel["fieldConfig"]["defaults"]["unit"], (1, ""))
    some = False
    for target in panel["targets"]:
        for series in ask(window, target["expr"]):
            x, y = points(series, window)
            axes.plot(
                x,
                [value * factor for value in y],
                lw=1,
                label=named(target, series["metric"]),
                marker="." if len(x) < 4 else None,
            )
            some = True
    axes.set_xlim(0, (window.end - window.start) / 60)
    axes.set_ylabel(unit, fontsize=7)
    if some:
        handles, labels = axes.get_legend_handles_labels()
        axes.ticklabel_format(useOffset=False)
        axes.legend(handles[:SHOWN], labels[:SHOWN], fontsize=5, loc="upper left", ncol=2)
    return some


def heatmap(axes: Any, panel: dict[str, Any], window: Window) -> bool:
    """Draw how many fell between two bounds, over time."""
    found = sorted(ask(window, panel["targets"][0]["expr"]), key=lambda series: float(series["metric"]["le"]))
    if not found:
        return False
    times = sorted({at for series in found for at, _ in series["values"]})
    known = [{at: float(value) for at, value in series["values"]} for series in found]
    # at or below each bound
    totals = [[0.0] * len(times), *([each.get(at, 0.0) for at in times] for each in known)]
    counts = [[max(0.0, b - a) for a, b in zip(*two, strict=True)] for two in pairwise(totals)]
    used = [i for i, row in enumerate(counts) if any(value > 0 for value in row)] or [0]
    low, high = max(0, used[0] - 1), used[-1] + 2
    axes.imshow(counts[low:high], origin="lower", aspect="auto", cmap="Oranges", interpolation="nearest")
    axes.set_yticks(range(len(counts[low:high])), [series["metric"]["le"] for series in found[low:high]], fontsize=5)
    ticks = range(0, len(times), max(1, len(times) // 5))
    axes.set_xticks(list(ticks), [f"{(times[i] - window.start) / 60:.0f}" for i in ticks])
    return True


def stat(axes: Any, panel: dict[str, Any], window: Window) -> bool:
    """Write the last value large."""
    axes.axis("off")
    found = [float(series["values"][-1][1]) for series in ask(window, panel["targets"][0]["expr"])]
    factor, unit = SCALE.get(panel["fieldConfig"]["defaults"]["unit"], (1, ""))
    if found:
        axes.text(0.5, 0.4, f"{found[0] * factor:.3g} {unit}", ha="center", va="center", fontsize=16, color="tab:blue")
    return bool(found)


def table(axes: Any, panel: dict[str, Any], window: Window) -> bool:
    """Write the rows that are there at the end."""
    axes.axis("off")
    rows = [
        series
        for series in ask(window, panel["targets"][0]["expr"])
        if series["values"][-1][0] >= window.end - 3 * window.step
    ]
    for i, series in enumerate(rows[:SHOWN]):
        labels = "  ".join(f"{k}={v}" for k, v in series["metric"].items() if k not in ("__name__", "job", "instance"))
        text = f"{textwrap.fill(labels, 90)}\n= {series['values'][-1][1]}"
        axes.text(0, 0.95 - 0.3 * i, text, fontsize=6, va="top", family="monospace")
    return bool(rows)


DRAW = {"timeseries": lines, "heatmap": heatmap, "stat": stat, "table": table}


def marks(axes: Any, board: dict[str, Any], window: Window) -> None:
    """Where a memory version begins."""
    for series in ask(window, board["annotations"]["list"][0]["expr"]):
        times, _ = points(series, window)
        for before, at in pairwise([-1.0, *times]):
            if at - before > 1.5 * window.step / 60:  # the first point after a gap
                axes.axvline(at, color="purple", lw=0.8, ls="--")


def draw(board: dict[str, Any], window: Window, path: Path) -> list[str]:
    """One picture of a whole dashboard; the titles of the panels without data."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"])
    figure = plt.figure(figsize=(16, height * 0.36 + 0.6))
    grid = figure.add_gridspec(
        height, 24, wspace=3.5, hspace=0.9, left=0.04, right=0.99, top=1 - 0.7 / (height * 0.36 + 0.6), bottom=0.04
    )
    figure.suptitle(board["title"], fontsize=12)
    empty = []
    for panel in board["panels"]:
        at = panel["gridPos"]
        axes = figure.add_subplot(grid[at["y"] : at["y"] + at["h"] - 1, at["x"] : at["x"] + at["w"]])
        axes.set_title(panel["title"], fontsize=8)
        axes.tick_params(labelsize=6)
        if not DRAW[panel["type"]](axes, panel, window):
            empty.append(panel["title"])
            text = f"no data\n{textwrap.fill(panel['description'], 40)}"
            axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=6, transform=axes.transAxes)
        elif panel["type"] == "timeseries":
            marks(axes, board, window)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return empty


def main() -> int:
    """All dashboards, one picture each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("prometheus", help="its URL")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--until", type=float, default=None, metavar="UNIX", help="the last second drawn; default: now")
    parser.add_argument("--out", type=Path, default=Path("var/dashboards"))
    given = parser.parse_args()
    if find_spec("matplotlib") is None:
        print(
            "draw.py needs matplotlib: .venv/bin/uv pip install matplotlib, and .venv/bin/python to run it",
            file=sys.stderr,
        )
        return 2
    end = given.until or time.time()
    window = Window(given.prometheus.rstrip("/"), end - 60 * given.minutes, end, max(5.0, given.minutes * 60 / 200))
    for path in sorted(FOLDER.glob("*.json")):
        board = json.loads(path.read_text())
        empty = draw(board, window, given.out / f"{path.stem}.png")
        print(f"{given.out / path.stem}.png: {len(board['panels'])} panels, without data: {', '.join(empty) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
