"""Contract of the command line: every command and flag of 0.1.0, exit codes, one-line errors."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from service.tests.cli.in_process import error_line, run
from service.tests.conftest import cold_reco

COMMON = ("--help", "--verbose", "--config")
STORE = (*COMMON, "--store")
MODEL = (*STORE, "--model", "--pretrained", "--fusion", "--device", "--precision")
MAKE_VERSION = (
    *MODEL, "--version", "--index", "--shard-pairs", "--recall-floor", "--dedup", "--dry-run", "--fresh", "--activate",
    "--keep",
)  # fmt: skip
EVALUATE = (
    *MODEL, "--memory", "--enhance", "--search", "--fuse", "--k", "--max-similarity", "--max-text-similarity",
    "--dehub", "--limit", "--json", "--report",
)  # fmt: skip
LABELLED = (*EVALUATE, "--label", "--labels", "--templates")
ABLATE = (
    *LABELLED, "--learn-from", "--out", "--seeds", "--steps", "--alpha", "--tune-on", "--tune-caption", "--tune-steps",
    "--tune-pairs",
)  # fmt: skip
SERVE = (
    *MODEL, "--memory", "--host", "--port", "--max-batch", "--max-queue", "--max-items", "--max-pixels", "--drain-s",
    "--timeout-s",
)  # fmt: skip
FLAGS = {
    "serve": SERVE,
    "info": MODEL,
    "train": (*COMMON, "--resume"),
    "memory build": (*MAKE_VERSION, "--caption", "--image-key"),
    "memory import": (*MAKE_VERSION, "--id"),
    "memory list": STORE,
    "memory show": (*STORE, "--json", "--plot"),
    "memory verify": STORE,
    "memory activate": (*STORE, "--url"),
    "memory compact": (*STORE, "--url"),
    "memory delete": STORE,
    "eval classify": (*LABELLED, "--per-class"),
    "eval retrieve": (*EVALUATE, "--caption"),
    "eval entities": (*LABELLED, "--seen", "--seen-share", "--seed"),
    "eval ablate": ABLATE,
}
GROUPS = {
    "": ("serve", "memory", "train", "eval", "info"),
    "memory": ("build", "import", "list", "show", "verify", "activate", "compact", "delete"),
    "eval": ("classify", "retrieve", "entities", "ablate"),
}


@pytest.mark.parametrize("command", FLAGS)
def test_help_names_every_flag(command: str) -> None:
    done = run(*command.split(), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    flags = set(done.stdout.replace(",", " ").replace("[", " ").replace("]", " ").split())
    assert set(FLAGS[command]) <= flags


@pytest.mark.parametrize("group", GROUPS)
def test_help_of_a_group_names_every_command(group: str) -> None:
    done = run(*group.split(), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ") and line.strip()]
    assert set(GROUPS[group]) <= set(listed)


FAILED = [
    ("memory build ../x .", "'../x' is not a name: 1 to 64 of the characters A-Z"),
    ("memory build x nowhere", "nowhere does not exist"),
    ("memory build x folder", "folder holds no table of captions"),
    ("memory build x . --version ../v", "'../v' is not a name"),
    ("memory import x nowhere", "nowhere holds neither img_emb, text_emb and metadata"),
    ("memory show x", "no memory 'x' here"),
    ("memory verify x@y", "no memory 'x' here"),
    ("memory activate x@y", "no memory 'x' here"),
    ("memory activate x@y --url http://127.0.0.1:9", "http://127.0.0.1:9"),
    ("memory activate x@y --url nonsense", "nonsense"),
    ("memory compact x", "no memory 'x' here"),
    ("memory compact x --url http://127.0.0.1:9", "http://127.0.0.1:9"),
    ("memory delete x@y", "no memory 'x' here"),
    ("memory delete x", "no memory 'x' here"),
    ("train nothing.toml", "nothing.toml cannot be read as TOML"),
    ("train broken.toml", "broken.toml cannot be read as TOML"),
]
WRONG_VALUE = [
    ("serve --port 70000", "port = ", "less than or equal to 65535"),
    ("serve --max-batch 0", "max_batch = ", "greater than or equal to 1"),
    ("serve --max-queue 5", "max_queue = ", "at least max_items, which is 256"),
    ("serve --config none.toml", "none.toml: No such file or directory"),
    ("serve --config broken.toml", "broken.toml is not TOML"),
    ("serve --config wrong.toml", "port = 70000", "wrong.toml", "less than or equal to 65535"),
    ("serve --config unknown.toml", "max_bathc", "unknown.toml", "max_batch?"),
    ("memory build x . --keep 0", "--keep 0: at least 1"),
    ("memory activate x", "x: name the version too, as NAME@VERSION"),
]
WRONG_USAGE = [
    ("", "command", "reco --help"),
    ("--colour red", "--colour"),
    ("nothing", "nothing"),
    ("serve --colour red", "--colour", "reco serve --help"),
    ("serve extra", "extra"),
    ("serve --port x", "port = 'x' (from --port)"),
    ("serve --device tpu", "invalid value 'tpu' for '--device': 'tpu' is not one of 'auto', 'cpu', 'cuda'"),
    ("serve --port", "--port", "reco serve --help"),
    ("memory build x --keep", "--keep", "reco memory build --help"),
    ("memory", "command", "reco memory --help"),
    ("memory nothing", "nothing"),
    ("memory lst", "lst", "list"),
    ("memory build", "NAME", "reco memory build --help"),
    ("memory build x", "SOURCE"),
    ("memory build x . --keep y", "invalid value 'y' for '--keep': input should be"),
    ("memory build x . --image-key colour", "--image-key", "colour", "vector", "trunk"),
    ("memory build x . --recall-floor y", "invalid value 'y' for '--recall-floor'"),
    ("memory import x", "DIR"),
    ("memory show", "NAME"),
    ("train", "CONFIG.toml"),
    ("eval", "command"),
    ("eval classify", "SOURCE"),
    ("eval classify nowhere.tar --k a", "invalid value 'a' for '--k'"),
    ("eval classify nowhere.tar --k 1 a", "invalid value 'a' for '--k'"),
    ("eval classify nowhere.tar --enhance both all", "--enhance", "all", "image"),
    ("eval ablate nowhere.tar", "--learn-from"),
    ("info extra", "extra"),
    ("info --device tpu", "--device", "tpu"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a user with an empty folder and configuration files that are wrong."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken.toml").write_text("port = \n")
    (tmp_path / "wrong.toml").write_text("port = 70000\n")
    (tmp_path / "unknown.toml").write_text("max_bathc = 3\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("line", "word"), FAILED)
def test_a_failure_is_one_line_and_one(line: str, word: str) -> None:
    assert word in error_line(run(*line.split()), 1)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("case", [*WRONG_VALUE, *WRONG_USAGE], ids=lambda case: case[0] or "nothing")
def test_wrong_usage_is_one_line_and_two(case: tuple[str, ...]) -> None:
    args, *words = case
    line = error_line(run(*args.split()), 2)
    for word in words:
        assert word in line


def test_help_answers_in_under_a_second() -> None:
    """The best of three tries, since the machine may be busy; 0.2 s on two cores."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        assert cold_reco("--help").returncode == 0
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1


def test_an_empty_store_is_no_error(tmp_path: Path) -> None:
    done = run("memory", "list", "--store", str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"no memory in {tmp_path}: build one with `reco memory build NAME SOURCE`\n"


@pytest.mark.usefixtures("folder")
def test_the_stack_is_shown_only_with_verbose(caplog: pytest.LogCaptureFixture) -> None:
    assert run("memory", "show", "x").returncode == 1
    assert not caplog.records
    assert run("memory", "show", "x", "--verbose").returncode == 1
    assert "Traceback" in caplog.text
