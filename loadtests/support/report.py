"""Percentiles, tables and the record of where a number was measured."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["compare_to_targets", "environment", "format_verdicts", "median_and_spread", "quantiles", "table", "write"]

Goal = tuple[str, float, str, float]  # figure, value, ">=" or "<=", target

PACKAGES = ("torch", "open_clip_torch", "faiss-gpu", "faiss-cpu", "numpy", "httpx")
ROOT = Path(__file__).resolve().parents[2]


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds at p50, p95, p99 and the worst: the nearest rank, a latency that really
    occurred.

    >>> quantiles([0.001, 0.002, 0.003, 0.1])
    {'p50': 2.0, 'p95': 100.0, 'p99': 100.0, 'max': 100.0}
    """
    ordered = sorted(seconds)
    ranks = {
        name: ordered[math.ceil(q * len(ordered)) - 1]
        for name, q in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99), ("max", 1.0))
        if ordered
    }
    return {name: round(value * 1000, 3) for name, value in ranks.items()}


def median_and_spread(values: Sequence[float]) -> dict[str, float]:
    """Median and spread."""
    return {"median": round(statistics.median(values), 4), "min": round(min(values), 4), "max": round(max(values), 4)}


def table(rows: Sequence[Sequence[object]]) -> str:
    """Rows as aligned columns; the first row is the head, the first column is left-aligned."""
    texts = [[f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in texts) for i in range(len(texts[0]))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in texts
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def compare_to_targets(goals: Sequence[Goal]) -> list[dict[str, Any]]:
    """Figure, value, target, and whether it was reached."""
    return [
        {
            "figure": name,
            "value": value,
            "target": f"{sign} {goal:g}",
            "reached": value >= goal if sign == ">=" else value <= goal,
        }
        for name, value, sign, goal in goals
    ]


def format_verdicts(verdicts: Sequence[dict[str, Any]]) -> str:
    """Results of `compare_to_targets` as a table."""
    rows = [
        (row["figure"], f"{row['value']:.4g}", row["target"], "ok" if row["reached"] else "MISSED") for row in verdicts
    ]
    return table([("figure", "value", "target", ""), *rows])


def environment(package: str = "loadtests") -> dict[str, Any]:
    """Commit, machine, versions and command of a measurement."""
    return {
        "command": " ".join(["python", "-m", f"{package}.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "changed_since_commit": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "hardware": {"cpu": _cpu(), "cores": os.cpu_count(), "memory_gib": _memory_gib()},
        "load_average": [
            round(load, 2) for load in os.getloadavg()
        ],  # more than what the test itself asks for: the machine was shared
        "versions": {"python": platform.python_version(), "system": platform.system(), **_versions()},
    }


def write(path: Path, report: dict[str, Any]) -> None:
    """Write one JSON file and its parent folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    print(f"written to {path}")


def _git(*arguments: str) -> str:
    if shutil.which("git") is None:
        return ""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu() -> str:
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    kib = [int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    return round(kib[0] / 2**20, 1) if kib else None


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # faiss comes as one of two packages
            continue
    return found
