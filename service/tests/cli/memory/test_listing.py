"""`reco memory list`, `show` and `verify`, on stores with edits and with damaged versions."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from index_store import Store
from index_store.editor import Editor
from index_store.tests.support.small import ENCODER, build_memory, some_pairs, unlock
from models.tests.terminal import terminal
from service.cli.main import main
from service.tests.cli.in_process import run
from service.tests.conftest import one_line, reco


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """things@v1, current and edited once, and things@v2."""
    for version in ("v1", "v2"):
        build_memory(tmp_path, some_pairs(30), version)
    Store(tmp_path).activate("things", "v1")
    editor = Editor.open(Store(tmp_path), "things", encoder=ENCODER)
    editor.put(some_pairs(2, first=100))
    editor.put(some_pairs(2, first=200))
    editor.close()
    return Store(tmp_path)


def test_one_version_that_cannot_be_read_hides_no_other(store: Store) -> None:
    (unlock(store.root / "things" / "v2") / "manifest.json").write_text('{"format": 99}')
    build_memory(store.root, some_pairs(7), "v1", name="others")
    done = reco("memory", "list", "--store", str(store.root))
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[0][:3] == ["memory", "version", "pairs"]
    assert [row[:2] for row in rows[1:]] == [["others", "v1"], ["things", "v1"], ["things", "v2"]]
    assert rows[1][2] == "7"
    assert rows[2][2:4] == ["current", "30"]
    assert rows[3][2:4] == ["not", "readable"]
    assert "things@v2: manifest.json has format 99, this program reads format 2: upgrade it" in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        *(["build", "../x", "photos"], ["build", "x", "photos", "--version", "../x"], ["import", "../x", "photos"]),
        *(
            ["show", "../x"],
            ["show", "things@../x"],
            ["verify", "../x@v1"],
            ["delete", "../x@v1"],
            ["delete", "things@../x"],
        ),
        *(["compact", "../x"], ["compact", "../x", "--url", "http://127.0.0.1:9"]),
        *(["activate", "../x@v1"], ["activate", "things@../x"], ["activate", "../x@v1", "--url", "http://127.0.0.1:9"]),
    ],
    ids=" ".join,
)
def test_a_path_is_not_a_name_whatever_the_command(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    build_memory(tmp_path / "store", some_pairs(5))
    assert main(["memory", *command, "--store", str(tmp_path / "store")]) == 1
    error = capsys.readouterr().err
    assert (
        error
        == "reco: '../x' is not a name: 1 to 64 of the characters A-Z a-z 0-9 . _ -, beginning with a letter or digit\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_show_counts_the_edits(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "show", "things", "--store", str(store.root)]) == 0
    rows = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line]
    facts = {row[0]: row[1] for row in rows[:11]}
    assert facts["version"] == "things@v1 (current)"
    assert facts["pairs"] == "30 in 1 shard, vectors of 16"
    assert facts["bytes"].endswith(f"{30 * 16 * 4 * 2 / 1000:.1f} kB resident")
    assert facts["edits"] == "2 made online on top of it"


def test_json_holds_what_the_table_holds(store: Store) -> None:
    (unlock(store.root / "things" / "v2") / "manifest.json").write_text('{"format": 99}')
    done = run("memory", "list", "--json", "--store", str(store.root))
    assert (done.returncode, done.stderr) == (0, "")
    first, second = json.loads(done.stdout)
    assert (first["name"], first["version"], first["current"], first["pairs"]) == ("things", "v1", True, 30)
    assert (first["recall"], first["encoder"], first["resident_bytes"]) == (1.0, ENCODER, 30 * 16 * 4 * 2)
    assert second["error"].startswith("things@v2: manifest.json has format 99")
    assert json.loads(run("memory", "list", "--json", "--store", str(store.root / "none")).stdout) == []


def on_terminal(columns: int, *args: str) -> list[str]:
    """The lines that a command writes to a terminal of this width."""
    with terminal(columns) as lines:
        assert main(args) == 0
    return lines


def test_a_terminal_gets_colours_and_whole_columns(tmp_path: Path) -> None:
    build_memory(tmp_path, some_pairs(30), "v1", name="a-memory-with-a-long-name")
    Store(tmp_path).activate("a-memory-with-a-long-name", "v1")
    wide_title, wide = on_terminal(200, "memory", "list", "--store", str(tmp_path))
    narrow = on_terminal(60, "memory", "list", "--store", str(tmp_path))
    assert "\x1b[1m" in wide_title
    assert "\x1b[" in wide
    words = [re.sub(r"\x1b\[[\d;]*m", "", line).split() for line in (wide, *narrow)]
    assert words[0] == [*words[2][:-1], words[2][-1] + words[3][0]]  # only the encoder is folded
    assert words[0][:3] == ["a-memory-with-a-long-name", "v1", "current"]


def test_a_pipe_gets_whole_lines_without_colours(tmp_path: Path) -> None:
    encoder = "an-encoder/" + "x" * 300 + "[red]@0123456789ab"
    build_memory(tmp_path, some_pairs(30), "v1", encoder=encoder)
    title, row = run("memory", "list", "--store", str(tmp_path), COLUMNS="40").stdout.splitlines()
    assert row.endswith(encoder)
    assert row.index("30") == title.index("pairs")
    assert "\x1b" not in title + row


def test_verify_reads_the_edits_too(store: Store) -> None:
    command = ("memory", "verify", "things@v1", "--store", str(store.root))
    done = reco(*command)
    assert done.stdout.startswith("things@v1+2: ")
    files = store.manifest("things", "v1").files
    whole_bytes = sum(int(file["bytes"]) for file in files.values())
    assert f"verify things@v1: {whole_bytes}/{whole_bytes} [" in done.stderr
    journal = store.journal_path("things", "v1")
    whole = journal.read_bytes()
    journal.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    line = one_line(reco(*command), 1)
    assert "things/v1.journal: bytes 56 to " in line
    assert "are damaged, and acknowledged edits follow: restore the file from a copy" in line


@pytest.mark.parametrize("damage", ["altered", "cut"])
def test_verify_names_file_and_bytes(store: Store, damage: str) -> None:
    file = store.root / "things" / "v2" / "shard-0000" / "text.npy"
    file.chmod(0o644)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] if damage == "cut" else whole[:200] + b"\0\xff" + whole[202:])
    line = one_line(reco("memory", "verify", "things@v2", "--store", str(store.root)), 1)
    length = "has 1087 bytes, the manifest says 1088, and " if damage == "cut" else ""
    assert f"things@v2: shard-0000/text.npy {length}differs in bytes 0-1087" in line
    assert line.endswith(": restore or rebuild the version")
