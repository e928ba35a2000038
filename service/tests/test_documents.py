"""What the documents cite exists, and no line of their prose is too wide to read."""

from __future__ import annotations

import ast
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from service.api import requests
from service.server import connection_limits
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


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """The hook that writes the generated pages."""
    found = spec_from_file_location("generate", ROOT / "docs/generate.py")
    assert found is not None
    assert found.loader is not None
    module = module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_limits_that_no_setting_changes_are_in_the_page_of_settings(generate: ModuleType) -> None:
    page = generate.settings_page()
    for row in (
        f"| `LINGER_S` | `{connection_limits.LINGER_S}` | for the rest of a body whose request is already answered |",
        f"| `MAX_HEAD_BYTES` | `{connection_limits.MAX_HEAD_BYTES}` | of the head of a request |",
        f"| `MAX_PIPELINED` | `{connection_limits.MAX_PIPELINED}` | ",
        f"| `MIN_SEND_BYTES` | `{connection_limits.MIN_SEND_BYTES}` | ",
        f"| `MAX_METADATA_DEPTH` | `{requests.MAX_METADATA_DEPTH}` | ",
    ):
        assert row in page
    for path in (
        path for room in ("access", "api", "server", "labels") for path in (ROOT / "service" / room).rglob("*.py")
    ):
        for node in ast.parse(path.read_text("utf-8")).body:
            for target in node.targets if isinstance(node, ast.Assign) else []:
                names = [each.id for each in ast.walk(target) if isinstance(each, ast.Name)]
                missing = [name for name in names if name.startswith("MAX_") and f"| `{name}` |" not in page]
                assert missing == [], path


def test_the_page_of_routes_describes_each(generate: ModuleType) -> None:
    page = generate.http_page()
    for line in (
        "## POST /embed/image",
        "## DELETE /memories/{name}/pairs/{pair_id}",
        "| `version` | string | required |  |",
        '| `encoding_format` | `float`, `base64` | `"float"` | base64 = little-endian float32 |',
    ):
        assert line in page


def test_the_readme_has_at_most_900_words() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").split()) <= 900
