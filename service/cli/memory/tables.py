"""Tables on stdout, and sizes and ages as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

GAP = 2  # spaces between two columns
MIN_LAST_WIDTH = 16  # characters, to which a narrow terminal folds the last column


def print_table(rows: Sequence[Sequence[str]], *, titled: bool = False) -> None:
    """Aligned columns on stdout: bold titles and colours on a terminal, else plain text.

    On a narrow terminal the last column is folded; the others stay whole.
    """
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    widths = [max(cell_len(row[i]) for row in rows) for i in range(len(rows[0]))]
    console = Console(markup=False, highlight=False, emoji=False)
    if console.is_terminal:
        room = console.width - sum(widths[:-1]) - GAP * (len(widths) - 1)
        widths[-1] = max(MIN_LAST_WIDTH, min(widths[-1], room))
    console.width = sum(widths) + GAP * len(widths)
    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, show_header=titled, header_style="bold")
    for i, width in enumerate(widths):
        title = Text(rows[0][i] if titled else "")
        table.add_column(title, style=None if i else "cyan", width=width, overflow="fold")
    for row in rows[titled:]:
        style = "red" if "not readable" in row else "bold" if "current" in row else None
        table.add_row(*map(Text, row), style=style)
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def size(count: int) -> str:
    """Bytes as people read them.

    >>> size(0), size(999), size(8_157_144), size(2_048_000_000)
    ('0', '999 B', '8.2 MB', '2.0 GB')
    """
    if count < 1000:
        return f"{count} B" if count else "0"
    amount, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount >= 999.95:
            amount, unit = amount / 1000, larger
    return f"{amount:.1f} {unit}"


def age(created: str, now: datetime | None = None) -> str:
    """How long ago a moment in ISO 8601 was, in its largest whole unit.

    >>> age("2026-11-22T09:30:00+00:00", datetime(2026, 11, 24, 10, tzinfo=UTC))
    '2 d'
    """
    seconds = ((now or datetime.now(UTC)) - datetime.fromisoformat(created)).total_seconds()
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
