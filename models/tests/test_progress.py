"""Progress on a terminal and in a log."""

from __future__ import annotations

import re
import time

import pytest

from models import progress as module
from models.progress import progress
from models.tests.terminal import terminal


def test_a_log_gets_a_line_for_each_state(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINE_S", 0)
    with progress(4, "things") as meter:
        for _ in range(4):
            meter.advance(1)
    lines = capsys.readouterr().err.splitlines()
    states = [re.fullmatch(r"things: (\d)/4 \[\d\d:\d\d<.*, .*item/s\]", line) for line in lines]
    assert [int(state[1]) for state in states if state is not None] == [0, 1, 2, 3, 4, 4]
    assert None not in states


def test_a_log_gets_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(1000, "things") as meter:
        for _ in range(1000):
            meter.advance(1)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_total_that_is_unknown_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(None, "encode", "image") as meter:
        meter.advance(32)
    assert re.fullmatch(r"encode: 32 \[00:00, .*image/s\]", capsys.readouterr().err.splitlines()[-1])


def test_items_of_an_earlier_run_count_for_no_rate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress(1000, "things") as meter:
        meter.start_at(900)
        now[0] += 10
        meter.advance(20)
        assert meter.done == 920
    assert capsys.readouterr().err.splitlines()[-1] == "things: 920/1000 [00:10<00:40, 2.0 item/s]"


def test_a_terminal_gets_a_bar_with_rate_and_time_left() -> None:
    with terminal(100) as lines, progress(40, "[red]things[/red]") as meter:
        meter.start_at(10)
        for _ in range(3):
            meter.advance(10)
    shown = "\n".join(lines)
    assert "[red]things[/red]" in shown  # a memory's name is no markup
    assert "40/40" in shown
    assert re.search(r"[\d,.]+ item/s", shown)
    assert "0:00:00" in shown
    assert "━" in shown
