"""One self-contained HTML page about one evaluation: what was gained, where, by which neighbours,
and what to do about it.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO

import numpy as np
from PIL import Image

from models.evaluation.evaluate import Figure, Line, Report, figure
from models.evaluation.queries import Setting
from models.evaluation.report_text import markdown

HALVES = "The setting was chosen on one half of the queries; this gain is that of the other half. The table is of all of them."
SIDE = 96  # pixels of an example's picture
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{border:1px solid #ddd;padding:.3rem .6rem;text-align:right;vertical-align:top}
td:first-child,th:first-child{text-align:left}.good{color:#17703b}.bad{color:#a1260d}svg{margin:.5rem 1rem .5rem 0}
.headline{font-size:1.6rem}.example td{text-align:left}"""


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


def page(report: Report, settings: Sequence[Setting], helped: Sequence[Example], hurt: Sequence[Example]) -> str:
    """The page as text; nothing is loaded from elsewhere."""
    best = best_line(report)
    gain = measured(report, best)
    tone = "good" if gain.low > 0 else "bad"
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(report.task)}</title><style>{STYLE}</style>",
        f"<h1>Does the memory help? {escape(report.task)} over {escape(report.memory)}</h1>",
        f"<p class='headline {tone}'>{100 * gain.gain:+.1f} points of {escape(gain.name)} with “{escape(best.method)}” "
        f"(95 % interval {100 * gain.low:+.1f} to {100 * gain.high:+.1f})</p>",
        f"<p>{HALVES}</p>",
        "".join(f"<p>{escape(note)}</p>" for note in report.notes),
        html_table(markdown(report)),
        *plots(report, settings, best),
        examples("Helped", helped),
        examples("Hurt", hurt),
        f"<h2>Recommendation</h2><p>{escape(recommendation(report, settings))}</p></html>",
    ]
    return "\n".join(parts)


def best_line(report: Report) -> Line:
    """The enhanced line that is right most often in the first figure, on every second query; plain
    where nothing was enhanced.

    A line that loses in any figure is passed over, unless all of them do.
    """
    asked = [line for line in report.lines[1:] if not line.method.startswith("(")]
    first, sound = report.lines[0].figures[0].name, [line for line in asked if not lost(line)]
    return max(
        sound or asked, key=lambda line: float(report.hits[line.method][first][::2].mean()), default=report.lines[0]
    )


def lost(line: Line) -> list[str]:
    """The figures in which a line is worse than plain by more than its interval."""
    return [figure.name for figure in line.figures if figure.high < 0]


def measured(report: Report, line: Line) -> Figure:
    """The line's first figure on the queries that did not choose it: the best of many is flattered
    by those that did.
    """
    plain, name = report.lines[0], line.figures[0].name
    before, after = (report.hits[each.method][name][1::2] for each in (plain, line))
    return figure(name, before, after)


def recommendation(report: Report, settings: Sequence[Setting]) -> str:
    """What to serve with, or that enhancing does not help here."""
    best = best_line(report)
    first = measured(report, best)
    if first.low <= 0:
        return f"Do not enhance (enhance=none): the best setting tried, {best.method}, does not gain more than its interval."
    if worse_in := lost(best):
        return f"Do not enhance (enhance=none): every setting tried loses somewhere, the best, {best.method}, in {', '.join(worse_in)}."
    setting = next(each for each in settings if str(each) == best.method)
    k = report.k if setting.k is None else setting.k
    told = f"Enhance {setting.enhance} with k = {k}: {100 * first.gain:+.1f} points of {first.name}."
    worse = [f"{line.method} in {', '.join(lost(line))}" for line in report.lines[1:] if lost(line)]
    rivals = [line for line in report.lines if line.method.startswith("(") and line.figures[0].share > first.share]
    told += "".join(
        f" Where every memory item carries its label, {line.method} reaches {100 * line.figures[0].share:.1f} %."
        for line in rivals
    )
    return told + (f" These lose against plain: {'; '.join(worse)}." if worse else "")


def plots(report: Report, settings: Sequence[Setting], best: Line) -> list[str]:
    """Gain by k, by size of the memory, by class, and how near neighbours were where they helped
    and hurt; each where it was measured.
    """
    found = list[str]()
    shares = {line.method: line.figures[0].share for line in report.lines}
    for enhance in ("image", "text", "both"):
        curve = sorted(
            (each.k, 100 * shares[str(each)]) for each in settings if each.enhance == enhance and each.k is not None
        )
        if len(curve) > 1:
            found.append(line_plot(f"{report.lines[0].figures[0].name} by k, {enhance} enhanced", curve))
    if report.memory_curve:
        grown = [(pairs, 100 * share) for pairs, share in report.memory_curve]
        found.append(line_plot(f"{report.lines[0].figures[0].name} by pairs in the memory, {best.method}", grown))
    if report.details is not None:
        gains = sorted((100 * (after - before) for _, _, before, after in report.details.classes), reverse=True)
        found.append(bar_plot("gain by class, in points, best class first", gains))
    if report.nearest is not None and best is not report.lines[0]:
        name = report.lines[0].figures[0].name
        before, after = report.hits["none"][name], report.hits[best.method][name]
        for title, chosen in (("helped", ~before & after), ("hurt", before & ~after)):
            counts, _ = np.histogram(report.nearest[chosen], bins=20, range=(0, 1))
            found.append(
                bar_plot(f"{int(chosen.sum())} {title}: cosine of the nearest neighbour, 0 to 1", counts.tolist())
            )
    return found


def line_plot(title: str, points: Sequence[tuple[float, float]]) -> str:
    """An inline SVG; x in the order given, evenly spaced."""
    low, high = min(y for _, y in points), max(y for _, y in points)
    at = [
        (40 + 300 * i / (len(points) - 1), 130 - 90 * (y - low) / max(high - low, 1e-9))
        for i, (_, y) in enumerate(points)
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
    marks = "".join(
        f"<circle cx={x:.1f} cy={y:.1f} r=3 /><text x={x:.1f} y={y - 8:.1f} font-size=10 text-anchor=middle>{value:.1f}</text>"
        f"<text x={x:.1f} y=150 font-size=10 text-anchor=middle>{name:g}</text>"
        for (x, y), (name, value) in zip(at, points, strict=True)
    )
    return _svg(title, f"<polyline points='{path}' fill=none stroke=#17703b stroke-width=2 />{marks}")


def bar_plot(title: str, values: Sequence[float]) -> str:
    """An inline SVG of bars up and down from zero."""
    most = max((abs(value) for value in values), default=0) or 1
    wide = 300 / max(len(values), 1)
    base = 85 if min(values, default=0) < 0 else 135
    scale = (base - 30) / most
    bars = "".join(
        f"<rect x={40 + i * wide:.1f} y={base - max(value, 0) * scale:.1f} width={max(wide - 1, 0.5):.1f} height={abs(value) * scale:.1f} "
        f"fill={'#17703b' if value >= 0 else '#a1260d'} />"
        for i, value in enumerate(values)
    )
    return _svg(
        title,
        f"{bars}<line x1=40 x2=340 y1={base} y2={base} stroke=#888 /><text x=2 y=34 font-size=10>{most:.0f}</text>",
    )


def _svg(title: str, content: str) -> str:
    return f"<svg width=380 height=165 role=img><text x=40 y=14 font-size=12>{escape(title)}</text>{content}</svg>"


def examples(title: str, rows: Sequence[Example]) -> str:
    """A table of queries, what they found, and the answer before and after."""
    if not rows:
        return f"<h2>{title}</h2><p>none</p>"
    cells = "".join(
        f"<tr><td><img src='data:image/jpeg;base64,{base64.b64encode(row.picture).decode()}' alt=''><br>{escape(row.label)}</td>"
        f"<td>{escape(row.before)}</td><td>{escape(row.after)}</td>"
        f"<td>{'<br>'.join(f'{score:.2f} {escape(caption)}' for caption, score in row.neighbours)}</td></tr>"
        for row in rows
    )
    return f"<h2>{title}</h2><table class=example><tr><th>query<th>plain<th>enhanced<th>neighbours</tr>{cells}</table>"


def html_table(text: str) -> str:
    """A Markdown table as HTML."""
    head, _, *rows = [[escape(cell) for cell in line.strip("|").split("|")] for line in text.splitlines()]
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return "<table><tr>" + "".join(f"<th>{cell}</th>" for cell in head) + f"</tr>{body}</table>"


def thumbnail(image: Image.Image) -> bytes:
    """A small JPEG."""
    small = image.copy()
    small.thumbnail((SIDE, SIDE))
    buffer = BytesIO()
    small.save(buffer, "JPEG", quality=70)
    return buffer.getvalue()
