"""HTML report of one evaluation: gains, plots, examples with their neighbours, and a
recommendation.

`report.html` beside this module is the template; the page loads nothing from elsewhere.
"""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from models.evaluation.queries import Setting
from models.evaluation.report import Figure, Line, Report, figure, markdown

THUMBNAIL_PIXELS = 96  # of an example's picture, the longer side
TICKS = 4  # steps of a vertical axis, about


@dataclass(frozen=True, slots=True)
class Example:
    """One query.

    picture: a small JPEG.  before, after: the answers.  neighbours: (caption, score).
    """

    picture: bytes
    label: str
    before: str
    after: str
    neighbours: Sequence[tuple[str, float]]

    @property
    def picture_base64(self) -> str:
        """The picture as a data URI holds it."""
        return base64.b64encode(self.picture).decode()


@dataclass(frozen=True, slots=True)
class Plot:
    """One plot of the page.

    values: in order along the x axis.  names: labels along the x axis, evenly spaced.
    """

    kind: Literal["line", "bar"]
    title: str
    x_label: str
    y_label: str
    values: Sequence[float]
    names: Sequence[str] = ()

    def ticks(self) -> list[float]:
        """Round numbers that cover all values; a bar plot includes zero."""
        low, high = min(self.values), max(self.values)
        if self.kind == "bar":
            low, high = min(low, 0), max(high, 0)
        step = _round_step((high - low) / TICKS or 1)
        first, last = math.floor(low / step), math.ceil(high / step)
        return [step * i for i in range(first, max(last, first + 1) + 1)]

    def height(self, value: float) -> float:
        """Where a value stands between the lowest (0) and the highest tick (1)."""
        ticks = self.ticks()
        return (value - ticks[0]) / (ticks[-1] - ticks[0])


def page(report: Report, settings: Sequence[Setting], helped: Sequence[Example], hurt: Sequence[Example]) -> str:
    """The page as text."""
    environment = Environment(loader=PackageLoader("models.evaluation", ""), autoescape=True, undefined=StrictUndefined)
    best = best_line(report)
    return environment.get_template("report.html").render(
        report=report,
        best=best,
        gain=held_out_figure(report, best),
        table=_table_rows(markdown(report)),
        plots=build_plots(report, settings, best),
        helped=helped,
        hurt=hurt,
        recommendation=recommendation(report, settings),
    )


def _round_step(step: float) -> float:
    """The next of 1, 2, 5 × 10^n at or above `step`."""
    power: float = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def _table_rows(text: str) -> list[list[str]]:
    """The cells of a Markdown table, its header first."""
    header, _, *rows = [line.strip("|").split("|") for line in text.splitlines()]
    return [header, *rows]


def best_line(report: Report) -> Line:
    """The enhanced line with the greatest first figure on every second query; plain where nothing
    was enhanced.

    Lines that lose in some figure are skipped, unless all lines do.
    """
    tried = [line for line in report.lines[1:] if not line.method.startswith("(")]
    first, sound = report.lines[0].figures[0].name, [line for line in tried if not lost(line)]
    return max(
        sound or tried, key=lambda line: float(report.hits[line.method][first][::2].mean()), default=report.lines[0]
    )


def lost(line: Line) -> list[str]:
    """The figures in which a line is worse than plain by more than its interval."""
    return [figure.name for figure in line.figures if figure.high < 0]


def held_out_figure(report: Report, line: Line) -> Figure:
    """The line's first figure on the queries that `best_line` did not choose by, which avoids
    selection bias.
    """
    plain, name = report.lines[0], line.figures[0].name
    before, after = (report.hits[each.method][name][1::2] for each in (plain, line))
    return figure(name, before, after)


def recommendation(report: Report, settings: Sequence[Setting]) -> str:
    """Advice in words: the setting to serve with, or not to enhance."""
    best = best_line(report)
    first = held_out_figure(report, best)
    if first.low <= 0:
        return f"Do not enhance (enhance=none): the best setting tried, {best.method}, does not gain more than its interval."
    if worse_in := lost(best):
        return f"Do not enhance (enhance=none): every setting tried loses somewhere, the best, {best.method}, in {', '.join(worse_in)}."
    setting = next(each for each in settings if str(each) == best.method)
    k = report.k if setting.k is None else setting.k
    advice = f"Enhance {setting.enhance} with k = {k}: {100 * first.gain:+.1f} points of {first.name}."
    worse = [f"{line.method} in {', '.join(lost(line))}" for line in report.lines[1:] if lost(line)]
    rivals = [line for line in report.lines if line.method.startswith("(") and line.figures[0].share > first.share]
    advice += "".join(
        f" Where every memory item carries its label, {line.method} reaches {100 * line.figures[0].share:.1f} %."
        for line in rivals
    )
    return advice + (f" These lose against plain: {'; '.join(worse)}." if worse else "")


def build_plots(report: Report, settings: Sequence[Setting], best: Line) -> list[Plot]:
    """The plots of what was measured: by k, by size of the memory, by class, by nearest cosine."""
    figure_name = report.lines[0].figures[0].name
    shares = {line.method: 100 * line.figures[0].share for line in report.lines}
    plots = list[Plot]()
    for enhance in ("image", "text", "both"):
        curve = sorted(
            (each.k, shares[str(each)]) for each in settings if each.enhance == enhance and each.k is not None
        )
        if len(curve) > 1:
            title = f"{figure_name} by k, {enhance} enhanced"
            plots.append(line_plot(title, "k, neighbours", f"{figure_name}, %", curve))
    if report.memory_curve:
        curve = [(pairs, 100 * share) for pairs, share in report.memory_curve]
        title = f"{figure_name} by pairs in the memory, {best.method}"
        plots.append(line_plot(title, "pairs in the memory", f"{figure_name}, %", curve))
    if report.details is not None:
        gains = sorted((100 * (after - before) for _, _, before, after in report.details.classes), reverse=True)
        plots.append(Plot("bar", "gain by class", "classes, best first", "points", gains))
    if report.nearest is not None and best is not report.lines[0]:
        before, after = report.hits["none"][figure_name], report.hits[best.method][figure_name]
        for name, chosen in (("helped", ~before & after), ("hurt", before & ~after)):
            counts, edges = np.histogram(report.nearest[chosen], bins=20, range=(0, 1))
            title = f"{int(chosen.sum())} {name}, by their nearest neighbour"
            names = [f"{edge:.1f}" for edge in edges[2::4]]
            plots.append(Plot("bar", title, "cosine of the nearest neighbour", "queries", counts.tolist(), names))
    return plots


def line_plot(title: str, x_label: str, y_label: str, points: Sequence[tuple[float, float]]) -> Plot:
    """A line through the points, evenly spaced in their order."""
    return Plot("line", title, x_label, y_label, [y for _, y in points], [f"{x:g}" for x, _ in points])


def thumbnail(image: Image.Image) -> bytes:
    """A small JPEG."""
    small = image.copy()
    small.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    buffer = BytesIO()
    small.save(buffer, "JPEG", quality=70)
    return buffer.getvalue()
