"""Load tests see the service as any client does."""

import ast
from pathlib import Path

import loadtests

PACKAGES = {"service", "models", "index_store"}


def imported(source: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(source)))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {name.split(".")[0] for name in plain | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}}


def test_loadtests_import_none_of_the_packages() -> None:
    files = sorted(Path(loadtests.__file__).parent.glob("*.py"))
    assert {file.stem for file in files} >= {"steady", "swap", "bench", "raw_forward"}
    assert [file.name for file in files if imported(file.read_text()) & PACKAGES] == []
