"""What was measured as text: aligned for a terminal, Markdown for a page."""

from collections.abc import Iterable, Sequence

from models.evaluation.evaluate import Figure, Line, Report


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
    """Class by class, then the worst confusions; "" where the task has no classes."""
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
