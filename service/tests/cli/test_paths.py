"""A wrong path in any flag is one line before any work begins."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from service.cli.paths import check_input_file, check_output_file, check_output_folder
from service.settings import UsageError
from service.tests.cli.in_process import error_line, run
from service.tests.read_only import read_only

LONG = "x" * 300
EVALS = {
    "classify": ["--labels", "--json", "--report"],
    "retrieve": ["--json", "--report"],
    "entities": ["--labels", "--seen", "--json", "--report"],
    "ablate": ["--labels", "--json", "--report", "--out"],
}
REASONS = {
    "none/x": "No such file or directory",
    "file/x": "Not a directory",
    LONG: "File name too long",
    "sealed/x": "permission denied",
}


@pytest.fixture
def places(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder").mkdir()
    (tmp_path / "sealed").mkdir()
    return tmp_path


@pytest.mark.parametrize(("command", "flag"), [(command, flag) for command, flags in EVALS.items() for flag in flags])
def test_an_evaluation_with_a_wrong_path(places: Path, command: str, flag: str) -> None:
    more = ["--learn-from", "things"] if command == "ablate" else []
    for name in ("file/x", LONG):
        where = ["--store", str(places / "store")]
        line = error_line(run("eval", command, "test.tar", *more, flag, str(places / name), *where), 2)
        assert f"{flag} {places / name} cannot be" in line
        assert REASONS[name].lower() in line.lower()
    assert not (places / "store").exists()


def test_a_plot_with_a_wrong_path(places: Path) -> None:
    done = run("memory", "show", "things", "--plot", str(places / "none/x.png"), "--store", str(places))
    assert f"--plot {places / 'none/x.png'} cannot be written" in error_line(done, 2)


@pytest.mark.parametrize("name", ["none/x", "file/x", LONG, "sealed/x", "folder"])
def test_a_file_that_cannot_be_written(places: Path, name: str) -> None:
    with read_only(places / "sealed"), pytest.raises(UsageError, match=REASONS.get(name, "it is a folder")):
        check_output_file(places / name, "--json")


@pytest.mark.parametrize("name", ["file", "file/x/y", LONG, "sealed/x/y"])
def test_a_folder_that_cannot_be_made(places: Path, name: str) -> None:
    reason = "is no folder" if name.startswith("file") else REASONS.get(name, "permission denied")
    with read_only(places / "sealed"), pytest.raises(UsageError, match=reason if name != "file/x/y" else "Not a dir"):
        check_output_folder(places / name, "--out")


@pytest.mark.parametrize("name", ["none", "folder", LONG, "file/x"])
def test_a_file_that_cannot_be_read(places: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"--seen .* cannot be read \("):
        check_input_file(places / name, "--seen")


def test_what_can_be_used_passes(places: Path) -> None:
    check_input_file(None, "--seen")
    check_input_file(places / "file", "--seen")
    os.mkfifo(places / "pipe")
    check_input_file(places / "pipe", "--seen")  # opening it would wait for a writer
    for file in (None, Path("-"), places / "file", places / "folder" / "new"):
        check_output_file(file, "--json")
    for folder in (None, places / "folder", places / "new" / "newer"):
        check_output_folder(folder, "--out")
    assert not (places / "new").exists()
