"""What the documents cite exists, and no line of their prose is too wide to read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from service.tests.conftest import ROOT

DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / folder / "README.md" for folder in ("deploy", "examples", "loadtests")),
        ROOT / "index_store/FORMAT.md",
    ]
)
PACKAGES = "service|models|index_store|loadtests|deploy|docs|examples"
CITED = re.compile(rf"(?<![\w/.])((?:{PACKAGES})/[\w./-]*\w)")
MODULE = re.compile(r"python -m ((?:service|models|index_store|loadtests)(?:\.\w+)+)")
CODE = re.compile(r"`[^`]+`")
NEVER_WRAPPED = ("|", "#", "!", "[", "- [", "http")  # tables, headings, images and links


def prose(document: Path) -> list[tuple[int, str]]:
    """(line number, line) outside of code blocks."""
    found, code = [], False
    for number, line in enumerate(document.read_text("utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            code = not code
        elif not code:
            found.append((number, line))
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_path_and_module_that_is_cited_exists(document: Path) -> None:
    if document.name == "CHANGELOG.md":
        pytest.skip("a change log cites what was")
    text = document.read_text("utf-8")
    paths = {cited for cited in CITED.findall(text) if not cited.startswith("deploy/prometheus/data")}
    modules = {ROOT / (name.replace(".", "/") + ".py") for name in MODULE.findall(text)}
    missing = [cited for cited in paths if not (ROOT / cited).exists() and not list(ROOT.glob(f"{cited}.*"))]
    assert missing + [str(path) for path in modules if not (path.exists() or path.with_suffix("").is_dir())] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_line_of_prose_is_over_100_columns(document: Path) -> None:
    # code cannot be wrapped
    lines = [(number, CODE.sub("`…`", line)) for number, line in prose(document)]
    wide = [number for number, line in lines if len(line) > 100 and not line.startswith(NEVER_WRAPPED)]
    assert wide == []


def test_the_readme_has_at_most_900_words() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").split()) <= 900
