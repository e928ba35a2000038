"""Reports as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["draw_hostile_load", "draw_quantiles", "draw_ramp", "draw_soak", "draw_swap", "draw_targets"]

REACHED, MISSED = "#4c78a8", "#e45756"
QUANTILES = ("p50", "p95", "p99")


def draw_targets(targets: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Each figure in units of its target: right of the line is good where more is wanted, left of
    it where less is.
    """
    rows = [row for row in targets if float(row["target"].split()[1])]
    figure = Figure(figsize=(9, 1 + 0.4 * len(rows)), layout="constrained")
    bars = figure.subplots()
    shares = [row["value"] / float(row["target"].split()[1]) for row in rows]
    names = [f"{row['figure']}  ({row['target']})" for row in rows]
    drawn = bars.barh(names, shares, color=[REACHED if row["reached"] else MISSED for row in rows])
    bars.bar_label(drawn, [f"{row['value']:.3g}" for row in rows], padding=3)
    bars.axvline(1, color="grey", linestyle=":")
    bars.set(xlabel="share of the target", xlim=(0, max(2.0, *(share * 1.15 for share in shares))))
    bars.invert_yaxis()
    figure.savefig(path, dpi=120)


def draw_quantiles(latency_ms: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Latency quantiles side by side.  latency_ms: name -> quantiles."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    _quantiles(figure.subplots(), latency_ms)
    figure.savefig(path, dpi=120)


def draw_swap(report: Mapping[str, Any], path: Path) -> None:
    """Left, latency in swap windows and outside; right, resident memory from swap to swap."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _quantiles(left, report["latency_ms"])
    _line(right, range(1, len(report["resident_mb"]) + 1), report["resident_mb"], "swap")
    figure.savefig(path, dpi=120)


def draw_ramp(report: Mapping[str, Any], path: Path) -> None:
    """Latency against the rate, and where the knee is."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    lines, steps = figure.subplots(), [step for step in report["steps"] if step["latency_ms"]]
    for name in QUANTILES:
        lines.plot([step["rate"] for step in steps], [step["latency_ms"][name] for step in steps], "o-", label=name)
    lines.axvline(report["knee_per_s"], color="grey", linestyle=":", label="knee")
    lines.set(
        xscale="log", yscale="log", xlabel="requests per second", ylabel="milliseconds from the moment they were due"
    )
    lines.legend()
    figure.savefig(path, dpi=120)


def draw_soak(report: Mapping[str, Any], path: Path) -> None:
    """Left, latency fifth by fifth; right, resident memory over time."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _quantiles(left, {f"fifth {number}": latency for number, latency in enumerate(report["fifths_ms"], 1)})
    _resident(right, report["readings"])
    figure.savefig(path, dpi=120)


def draw_hostile_load(report: Mapping[str, Any], path: Path) -> None:
    """Left, latency without and with hostile callers; right, resident memory over time."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _quantiles(left, report["latency_ms"])
    _resident(right, report["readings"])
    figure.savefig(path, dpi=120)


def _quantiles(axes: Axes, latency_ms: Mapping[str, Mapping[str, float]]) -> None:
    for place, name in enumerate(QUANTILES):
        values = [latency.get(name, 0.0) for latency in latency_ms.values()]
        drawn = axes.bar([x + 0.27 * place for x in range(len(values))], values, 0.25, label=name)
        axes.bar_label(drawn, [f"{value:.0f}" for value in values], fontsize=7)
    axes.set_xticks([x + 0.27 for x in range(len(latency_ms))], list(latency_ms))
    axes.set(ylabel="milliseconds")
    axes.legend()


def _resident(axes: Axes, readings: Sequence[Mapping[str, float]]) -> None:
    """readings: seconds and resident megabytes."""
    minutes = [reading["s"] / 60 for reading in readings]
    _line(axes, minutes, [reading["resident_mb"] for reading in readings], "minutes")


def _line(axes: Axes, x: Sequence[float], resident_mb: Sequence[float], over: str) -> None:
    axes.plot(x, resident_mb)
    axes.set(xlabel=over, ylabel="resident MB", ylim=(0, 1.2 * max(resident_mb, default=1.0)))
