"""Figures beside their targets."""

from collections.abc import Sequence
from typing import Any

from loadtests.report import table

Goal = tuple[str, float, str, float]  # figure, value, ">=" or "<=", target


def judged(goals: Sequence[Goal]) -> list[dict[str, Any]]:
    """Figure, value, target, and whether it was reached."""
    return [
        {"figure": name, "value": value, "target": f"{sign} {goal}", "reached": value >= goal if sign == ">=" else value <= goal}
        for name, value, sign, goal in goals
    ]


def told(rows: Sequence[dict[str, Any]]) -> str:
    """What `judged` found, as a table for people."""
    cells = [(row["figure"], f"{row['value']:.3f}", row["target"], "ok" if row["reached"] else "MISSED") for row in rows]
    return table([("figure", "value", "target", ""), *cells])
