"""`reco eval ablate`: one row per claim of the method, measured on labelled photos over one memory.

Finished rows are kept on disk; a second run measures the missing ones.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from models.errors import DataError
from models.evaluation.claims import PlannedRow, plan_fine_tuning, plan_rows
from models.evaluation.evaluate import PLAIN
from models.evaluation.metrics import paired_interval
from models.evaluation.report import table
from models.evaluation.workbench import Outcome, Trial, Workbench


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    shares: top-1 by seed.  gain: over `over`, with its 95 % interval [low, high], from the seeds'
    mean per photo.
    seconds: training time from photos to weights, where the row compares it.
    """

    claim: str
    setting: str
    shares: Sequence[float]
    gain: float
    low: float
    high: float
    seconds: float | None = None
    over: str = "plain"


def ablate(bench: Workbench, kept: Path) -> list[Row]:
    """Measure every row of the plan, in order; rows that `kept` already holds are reused.

    kept: JSON lines, the first with the workbench's identity, then one per row. DataError where the
    identity differs.
    """
    done = {(row.claim, row.setting): row for row in _read_rows(kept, bench.identity)}
    plain = bench.correct(Trial(bench.training_free("none"), bench.memory, PLAIN))
    rows = list[Row]()
    for planned in [*plan_rows(bench), *plan_fine_tuning(bench)]:
        row = done.get((planned.claim, planned.setting))
        if row is None:
            seeds = bench.recipe.seeds if planned.seeded else bench.recipe.seeds[:1]
            base = plain if planned.base is None else planned.base()
            row = _row(planned, base, [planned.measure(seed) for seed in seeds])
            with kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(row)) + "\n")
        rows.append(row)
    return rows


def _row(planned: PlannedRow, base: np.ndarray, outcomes: Sequence[Outcome]) -> Row:
    right = [outcome.right for outcome in outcomes]
    mean = np.mean(right, axis=0)  # (N,)
    low, high = paired_interval(base, mean)
    times = [outcome.seconds for outcome in outcomes if outcome.seconds is not None]
    seconds = float(np.median(times)) if times else None
    shares = [float(each.mean()) for each in right]
    return Row(
        planned.claim, planned.setting, shares, float(mean.mean() - base.mean()), low, high, seconds, planned.over
    )


def _read_rows(kept: Path, identity: str) -> list[Row]:
    if not kept.exists():
        kept.write_text(json.dumps({"identity": identity}) + "\n", "utf-8")
    first, *rows = [json.loads(line) for line in kept.read_text("utf-8").splitlines()]
    if first != {"identity": identity}:
        raise DataError(
            f"{kept.name} holds rows measured on other data, memories or options: name another folder with --out"
        )
    return [Row(**row) for row in rows]


def markdown(rows: Sequence[Row]) -> str:
    """The table of docs/concepts/results.md."""
    cells = [
        (
            row.claim,
            row.setting,
            f"{100 * np.mean(row.shares):.1f}",
            f"{100 * np.std(row.shares):.1f}" if len(row.shares) > 1 else "",
            f"{100 * row.gain:+.1f}",
            row.over,
            f"{100 * row.low:+.1f} to {100 * row.high:+.1f}",
            "" if row.seconds is None else f"{row.seconds:.0f}",
        )
        for row in rows
    ]
    return table(
        ("claim", "setting", "top-1 %", "spread over seeds", "gain", "over", "95 % interval", "learned in, s"), cells
    )
