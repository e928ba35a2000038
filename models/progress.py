"""Progress of long work: a bar with rate and time left on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

LINE_S = 10.0  # seconds between two lines of a log


class Meter(Protocol):
    """What counts the items that are done.

    done: items so far, those of an earlier run included.
    """

    done: int

    def start_at(self, done: int) -> None:
        """Begin with the items of an earlier run, which count for no rate."""

    def advance(self, items: int) -> None:
        """Count further items."""


@contextmanager
def progress(total: int | None, label: str, unit: str = "item") -> Iterator[Meter]:
    """Show on stderr how many of `total` items are done, the rate and the time left.

    total: None = unknown.
    """
    if not sys.stderr.isatty():
        lines = ProgressLines(total, label, unit)
        yield lines
        lines.finish()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), *_figures(unit), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as display:
        yield ProgressBar(display, total, label)


def track(total: int, label: str, unit: str = "item") -> Iterator[int]:
    """0 to total - 1, each counted as done when the next is taken."""
    with progress(total, label, unit) as meter:
        for number in range(total):
            yield number
            meter.advance(1)


def _figures(unit: str) -> tuple[ProgressColumn, ...]:
    """How much is done, and at which rate."""
    from rich.progress import MofNCompleteColumn, ProgressColumn, Task
    from rich.text import Text

    class Rate(ProgressColumn):
        """Items a second, once two steps are timed."""

        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:,.1f} {unit}/s" if task.speed else f"? {unit}/s", style="cyan")

    return MofNCompleteColumn(), Rate()


class ProgressBar:
    """One bar of a terminal."""

    def __init__(self, display: Progress, total: int | None, label: str) -> None:
        self._display, self._total, self.done = display, total, 0
        self._task = display.add_task(label, total=total)

    def start_at(self, done: int) -> None:
        """Begin with the items of an earlier run, which count for no rate."""
        self.done = done
        self._display.reset(self._task, completed=done, total=self._total)

    def advance(self, items: int) -> None:
        """Count further items."""
        self.done += items
        self._display.advance(self._task, items)


class ProgressLines:
    """A line for the start where the total is known, one every LINE_S seconds, one for the end."""

    def __init__(self, total: int | None, label: str, unit: str) -> None:
        self._total, self._label, self._unit = total, label, unit
        self.done = self._before = 0
        self._start = self._printed = time.monotonic()
        if total is not None:
            self._print()

    def start_at(self, done: int) -> None:
        """Begin with the items of an earlier run, which count for no rate."""
        self.done = self._before = done

    def advance(self, items: int) -> None:
        """Count further items."""
        self.done += items
        if time.monotonic() - self._printed >= LINE_S:
            self._print()

    def finish(self) -> None:
        """The line for the end."""
        self._print()

    def _print(self) -> None:
        self._printed = time.monotonic()
        elapsed = self._printed - self._start
        rate = (self.done - self._before) / elapsed if elapsed > 0 else 0.0
        count, left = f"{self.done}", ""
        if self._total is not None:
            count += f"/{self._total}"
            left = f"<{_clock((self._total - self.done) / rate) if rate else '?'}"
        speed = f"{rate:,.1f}" if rate else "?"
        line = f"{self._label}: {count} [{_clock(elapsed)}{left}, {speed} {self._unit}/s]"
        print(line, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are some.

    >>> _clock(59.6), _clock(3725)
    ('00:59', '1:02:05')
    """
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"
