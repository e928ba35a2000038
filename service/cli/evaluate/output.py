"""Outputs of an evaluation: the table on stdout, figures as JSON, and the report's folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from service.cli.paths import STDOUT

if TYPE_CHECKING:
    from models.evaluation.queries import Setting
    from models.evaluation.report import Report
    from service.cli.evaluate.examples import Examples, Subject
    from service.cli.evaluate.options import EvaluateOptions

CURVE_PAIRS = 200_000  # a larger memory is not split for the curve: its vectors would be read whole


def show(report: Report, options: EvaluateOptions, examples: Examples | None = None) -> None:
    """Print the table; write JSON and the report's folder where the flags name them."""
    from models.evaluation.report import details, markdown, terminal
    from models.evaluation.report_html import page

    print_or_write(terminal(report), report.as_json(), options.json)
    if options.report is None:
        return
    options.report.mkdir(parents=True, exist_ok=True)
    helped, hurt = (examples.helped, examples.hurt) if examples is not None else ([], [])
    (options.report / "report.html").write_text(page(report, options.settings(), helped, hurt), "utf-8")
    (options.report / "report.md").write_text(f"{markdown(report)}\n\n{details(report)}\n", "utf-8")
    (options.report / "report.json").write_text(_dump(report.as_json()), "utf-8")
    if options.json != STDOUT:
        print(f"the report: {options.report / 'report.html'}")


def print_or_write(table: str, figures: Any, file: Path | None) -> None:
    """Print the table and write the figures as JSON to `file`; `-` prints the figures alone."""
    if file == STDOUT:
        print(_dump(figures), end="")
        return
    print(table)
    if file is not None:
        file.write_text(_dump(figures), "utf-8")


def _dump(figures: Any) -> str:
    return json.dumps(figures, indent=2, ensure_ascii=False) + "\n"


def with_memory_curve(report: Report, settings: Sequence[Setting], subject: Subject) -> Report:
    """The report, with the best setting measured over growing parts of the memory.

    A memory of more than CURVE_PAIRS pairs leaves the report as it is.
    """
    from models.evaluation.evaluate import memory_curve
    from models.evaluation.report_html import best_line
    from models.evaluation.submemories import SubMemories

    best = best_line(report).method
    setting = next((each for each in settings if str(each) == best), None)
    if setting is None or len(subject.snapshot) > CURVE_PAIRS:
        return report
    with TemporaryDirectory() as folder:
        parts = SubMemories(subject.snapshot, Path(folder))
        curve = memory_curve(subject.reco, subject.photos, subject.labels, parts, setting)
        return replace(report, memory_curve=curve)
