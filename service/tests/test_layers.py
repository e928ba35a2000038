"""The house's walls: who may import whom, who owns which name, and what is never loaded by
accident.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RANK = {"index_store": 0, "models": 1, "service": 2}
FORBIDDEN = {
    "index_store": {"torch", "open_clip", "fastapi", "starlette", "uvicorn", "asyncio", "httpx"},
    "models": {"fastapi", "starlette", "uvicorn", "asyncio", "httpx"},
    "loadtests": {"service", "models", "index_store"},
}


def modules(package: str) -> list[Path]:
    return [path for path in sorted((ROOT / package).rglob("*.py")) if "tests" not in path.relative_to(ROOT).parts]


def imported(path: Path) -> Iterator[str]:
    """Every module a file names in an import, whether at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:  # the client is also published under another name, so it names its modules relatively
                assert node.level == 1, f"{path}: relative import; name the package"
                assert path.parent == ROOT / "service/client", f"{path}: relative import; name the package"
                yield from [f"service.client.{node.module or alias.name}" for alias in node.names]
                continue
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


# Rooms of each package, lowest first: a module imports from its own room and from rooms above it in
# this list only.
ROOMS = {
    "index_store": [
        "errors", "neighbors", "float16", "types", "storage", "search", "snapshot", "memory", "edits", "store",
        "build", "compaction", "editor",
    ],
    "models": ["errors", "progress", "encoder", "fusion", "reco", "data", "training", "evaluation", "starter"],
    "service": [
        "batching", "observability", "errors", "settings", "access", "decoding", "labels", "pipeline", "memories", "engine", "api",
        "app", "server",
        "client", "cli",
    ],
}  # fmt: skip
BESIDE = {"benchmarks", "page", "configs"}  # folders that nothing of the package imports


def room(name: str) -> str:
    return name.split(".")[1]


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_import_downward_only(package: str) -> None:
    for path in modules(package):
        parts = path.relative_to(ROOT / package).with_suffix("").parts
        if parts[0] in BESIDE or parts == ("__init__",):
            continue
        own = ROOMS[package].index(parts[0])
        for name in imported(path):
            if name.startswith(f"{package}.") and room(name) in ROOMS[package]:
                assert ROOMS[package].index(room(name)) <= own, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("package", ROOMS)
def test_every_module_has_a_room_of_at_most_ten(package: str) -> None:
    top = {
        path.stem if path.suffix else path.name
        for path in (ROOT / package).iterdir()
        if path.suffix == ".py" or path.is_dir()
    }
    assert top - BESIDE - {"__init__", "__pycache__", "tests"} == set(ROOMS[package])
    for folder in [ROOT / package, *(path for path in (ROOT / package).rglob("*") if path.is_dir())]:
        files = [path for path in folder.glob("*.py") if path.name not in ("__init__.py", "conftest.py")]
        assert len(files) <= 10, f"{folder.relative_to(ROOT)} holds {len(files)} modules"


@pytest.mark.parametrize("package", RANK)
def test_imports_go_down_the_list_only(package: str) -> None:
    files = modules(package)
    assert files
    for path in files:
        for name in imported(path):
            assert RANK.get(name.partition(".")[0], -1) <= RANK[package], f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_leave_alone_what_is_not_theirs(package: str) -> None:
    for path in modules(package):
        taken = {name.partition(".")[0] for name in imported(path)} & FORBIDDEN[package]
        assert not taken, f"{path.relative_to(ROOT)} imports {taken}"


def test_open_clip_is_imported_by_loading_and_the_image_tower_alone() -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for path in [*modules("models"), *modules("service")]
        if "benchmarks" not in path.parts and any(n.partition(".")[0] == "open_clip" for n in imported(path))
    }
    assert {user for user in users if not user.startswith("models/encoder/loading/")} == {
        "models/encoder/image_tower.py"
    }


def test_the_batcher_needs_the_standard_library_alone() -> None:
    names = {name for path in (ROOT / "service/batching").glob("*.py") for name in imported(path)}
    others = {name.partition(".")[0] for name in names if not name.startswith("service.batching.")}
    assert others <= sys.stdlib_module_names


@pytest.mark.parametrize("package", RANK)
def test_no_cycles_inside_a_package(package: str) -> None:
    graph: dict[str, set[str]] = {}
    for path in modules(package):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = set(imported(path)) - {name}
    graph = {name: {target for target in targets if target in graph} for name, targets in graph.items()}
    while leaves := [name for name, targets in graph.items() if not targets]:
        graph = {name: targets - set(leaves) for name, targets in graph.items() if name not in leaves}
    assert not graph, f"a cycle among {sorted(graph)}"


@pytest.mark.parametrize("package", RANK)
def test_each_package_name_has_one_owner(package: str) -> None:
    """Another distribution with a top-level `models` would shadow ours, or be shadowed: both fail
    far from here.
    """
    assert set(packages_distributions().get(package, ["reco-serve"])) == {
        "reco-serve"
    }  # an editable install declares no top level
    assert Path(str(import_module(package).__file__)).parent == ROOT / package


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        (
            "import service.cli.main as cli; cli.main(['--help'])",
            {"torch", "faiss", "fastapi", "open_clip", "numpy", "pydantic", "rich"},
        ),
        ("import index_store", {"torch", "fastapi", "open_clip"}),
        ("import service.decoding.child", {"torch", "faiss", "fastapi", "open_clip", "pydantic", "prometheus_client"}),
        (
            "import service.cli.serve, service.cli.train, service.cli.info",
            {"torch", "faiss", "fastapi", "open_clip", "numpy", "httpx", "rich"},
        ),
        (
            "import service.cli.memory.build, service.cli.memory.changes, service.cli.memory.listing",
            {"torch", "faiss", "fastapi", "open_clip", "numpy", "httpx", "rich"},
        ),
        (
            "import service.cli.evaluate.commands",
            {"torch", "faiss", "fastapi", "open_clip", "numpy", "httpx", "rich"},
        ),
    ],
)
def test_light_imports_stay_light(code: str, absent: set[str]) -> None:
    script = f"{code}\nimport sys\nprint('loaded:', *({absent!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "loaded:"
