"""Results of an evaluation as values, aligned text for a terminal, and Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from models.evaluation.metrics import paired_interval

Hits = Mapping[str, np.ndarray]  # by figure, (N,) bool: which queries were right


@dataclass(frozen=True, slots=True)
class Figure:
    """One share of one line.

    queries: N.  share, gain: 0 to 1; gain is over plain, with its 95 % interval [low, high].
    """

    name: str
    queries: int
    share: float
    gain: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Line:
    """One method and its figures."""

    method: str
    figures: Sequence[Figure]


@dataclass(frozen=True, slots=True)
class Details:
    """Results per class.

    classes: (label, photos, share plain, share enhanced).  confused: (label, predicted label,
    count), enhanced.
    """

    classes: Sequence[tuple[str, int, float, float]]
    confused: Sequence[tuple[str, str, int]]


@dataclass(frozen=True, slots=True, eq=False)
class Report:
    """Result of one evaluation command.

    hits: by method and figure, for plots and examples; not part of the JSON.
    """

    task: str
    memory: str
    fusion: str
    k: int
    notes: Sequence[str]
    lines: Sequence[Line]
    details: Details | None = None
    hits: Mapping[str, Hits] = field(default_factory=dict, repr=False)
    # (N,) the best neighbour's score of each image
    nearest: np.ndarray | None = field(default=None, repr=False)
    guesses: Mapping[str, np.ndarray] = field(
        default_factory=dict, repr=False
    )  # by method, (N,) int, the label each photo is taken for
    memory_curve: Sequence[
        tuple[int, float]
    ] = ()  # (pairs, share right) of the best setting over growing parts of the memory

    def as_json(self) -> dict[str, object]:
        """The figures without the arrays."""
        lines = {
            line.method: {
                each.name: {"share": each.share, "gain": each.gain, "interval": [each.low, each.high]}
                for each in line.figures
            }
            for line in self.lines
        }
        found: dict[str, object] = {
            "task": self.task,
            "memory": self.memory,
            "fusion": self.fusion,
            "k": self.k,
            "notes": [*self.notes],
        }
        found |= {"queries": {each.name: each.queries for each in self.lines[0].figures}, "lines": lines}
        if self.details is not None:
            found |= {"classes": [*self.details.classes], "confused": [*self.details.confused]}
        if self.memory_curve:
            found["memory_curve"] = [*self.memory_curve]
        return found


def compare_with_plain(hits: Mapping[str, Hits]) -> list[Line]:
    """Figures of every method against the first method, which is plain."""
    plain = next(iter(hits.values()))
    return [
        Line(method, [figure(name, plain[name], right) for name, right in found.items()])
        for method, found in hits.items()
    ]


def figure(name: str, before: np.ndarray, after: np.ndarray) -> Figure:
    """One share with its gain over plain.

    before, after: (N,) bool, which queries are right.
    """
    low, high = paired_interval(before, after)
    return Figure(name, len(after), float(after.mean()), float(after.mean() - before.mean()), low, high)


def terminal(report: Report) -> str:
    """The report, every share with its gain and interval."""
    names = [figure.name for figure in report.lines[0].figures]
    width = 2 + max(len(line.method) for line in report.lines)
    head = f"{'enhanced':<{width}}" + "".join(f"{name:>32}" for name in names)
    rows = [
        f"{line.method:<{width}}" + "".join(f"{_cell(figure, line, report):>32}" for figure in line.figures)
        for line in report.lines
    ]
    title = f"{report.task} · {report.memory} · fusion {report.fusion} · k {report.k}"
    return "\n".join([title, *report.notes, head, *rows])


def markdown(report: Report) -> str:
    """The same as a Markdown table."""
    names = [figure.name for figure in report.lines[0].figures]
    rows = [[line.method, *(_cell(figure, line, report) for figure in line.figures)] for line in report.lines]
    return table(["enhanced", *names], rows)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, its numbers to the right."""
    lines = ["|" + "|".join(str(cell) for cell in row) + "|" for row in (head, *rows)]
    return "\n".join([lines[0], "|---|" + "--:|" * (len(head) - 1), *lines[1:]])


def details(report: Report) -> str:
    """Results per class, then the worst confusions, as Markdown; "" for a task without classes."""
    if report.details is None:
        return ""
    classes = [
        (label, photos, f"{100 * before:.1f}", f"{100 * after:.1f}")
        for label, photos, before, after in report.details.classes
    ]
    confused = [(label, taken, times) for label, taken, times in report.details.confused]
    return "\n\n".join(
        [table(("class", "photos", "plain %", "enhanced %"), classes), table(("class", "taken for", "times"), confused)]
    )


def _cell(figure: Figure, line: Line, report: Report) -> str:
    if line is report.lines[0]:
        return f"{100 * figure.share:.1f} % of {figure.queries}"
    return f"{100 * figure.share:.1f} ({100 * figure.gain:+.1f}, {100 * figure.low:+.1f} to {100 * figure.high:+.1f})"
