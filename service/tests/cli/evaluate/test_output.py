"""Figures of an evaluation on stdout and in files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from service.cli.evaluate.output import print_or_write

FIGURES = [{"claim": "größer", "share": 0.5}]


def test_figures_are_written_beside_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_or_write("the table", FIGURES, tmp_path / "figures.json")
    assert capsys.readouterr().out == "the table\n"
    assert json.loads((tmp_path / "figures.json").read_text("utf-8")) == FIGURES


def test_a_dash_prints_the_figures_alone(capsys: pytest.CaptureFixture[str]) -> None:
    print_or_write("the table", FIGURES, Path("-"))
    assert json.loads(capsys.readouterr().out) == FIGURES


def test_without_a_file_the_table_is_all(capsys: pytest.CaptureFixture[str]) -> None:
    print_or_write("the table", FIGURES, None)
    assert capsys.readouterr().out == "the table\n"
