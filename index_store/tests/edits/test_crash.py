"""Editors killed by SIGKILL at random moments: every acknowledged edit is in the reopened store."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from index_store.editor import Editor
from index_store.snapshot import Snapshot
from index_store.store import Store
from index_store.tests.support.child_process import kill_count
from index_store.tests.support.oracle import Oracle
from index_store.tests.support.small import ENCODER, build_memory, some_pairs, unit_rows
from index_store.types import Id, Pairs

ROOT = Path(__file__).parents[3]
WIDTH = 32  # wide enough that a batch is more than one page

LOOP = """
import os, sys
from pathlib import Path
from index_store.tests.edits.test_crash import edit_until_killed
for line in sys.stdin:
    root, kind = line.split()
    child = os.fork()
    if child == 0:
        edit_until_killed(Path(root), compacting=kind == "compacting")
    print("child", child, flush=True)
    sys.stdin.readline()
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


def edit(editor: Editor | Oracle, n: int) -> None:
    """Edit number n: a batch of new and of known ids, or a deletion."""
    if n % 3 == 0:
        editor.delete([f"pair-{(7 * n + i) % 400}" for i in range(6)])
        return
    pairs = some_pairs(20, WIDTH, seed=n % 50, first=(13 * n) % 400)
    editor.put(Pairs(pairs.ids, pairs.image, pairs.text, [{"caption": f"{n}"} for _ in range(20)]))


def edit_until_killed(root: Path, *, compacting: bool) -> None:
    """The child process: continue after edit `reached`, print the number of each edit made."""
    editor = Editor.open(Store(root), "things", encoder=ENCODER)
    n, compacted = int((root / "reached").read_text()), None
    while True:
        n += 1
        edit(editor, n)
        os.write(1, b"edit %d\n" % n)
        if compacted is not None:
            editor.switch(compacted)
            compacted = None
        elif compacting and n % 3 == 0:
            compacted = editor.compact_build()


class EditorForkServer:
    """A process that forks one editor at a time, so that no editor has to import anything."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", LOOP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            # a fork must not inherit a pool of threads that do not exist in the child
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )

    def kill(self, root: Path, kind: str, after_s: float) -> list[int]:
        """Run an editor in the store at `root` and kill it `after_s` seconds after its first edit.

        kind: "putting" or "compacting".  Returns the numbers of the edits that it printed.
        """
        self._write_line(f"{root} {kind}")
        edits: list[int] = []
        child = 0
        while not (child and edits):
            word, number = self._read_line()
            child, edits = (number, edits) if word == "child" else (child, [*edits, number])
        time.sleep(after_s)
        os.kill(child, signal.SIGKILL)
        self._write_line("")
        while (line := self._read_line())[0] != "ended":
            edits.append(line[1])
        return edits

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _write_line(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _read_line(self) -> tuple[str, int]:
        assert self._process.stdout is not None
        word, _, number = self._process.stdout.readline().strip().partition(" ")
        return word, int(number or 0)


@pytest.fixture
def fork_server() -> Iterator[EditorForkServer]:
    fork_server = EditorForkServer()
    yield fork_server
    fork_server.close()


def captions_by_id(snapshot: Snapshot) -> dict[Id, str]:
    return {
        name: record["caption"]
        for block in snapshot.blocks()
        for name, record in zip(block.ids.tolist(), block.records, strict=True)
    }


@pytest.mark.parametrize("kind", ["putting", "compacting"])
def test_sigkill_at_random_moments_loses_no_acknowledged_edit(
    tmp_path: Path, fork_server: EditorForkServer, kind: str
) -> None:
    base, store, moments = some_pairs(60, WIDTH), Store(tmp_path), random.Random(6)
    build_memory(tmp_path, base)
    store.activate("things", "v1")
    oracle, reached, killed, within_s = Oracle(base), 0, 0, 0.06
    while killed < kill_count() or (kind == "compacting" and len(store.versions("things")) < 4 and killed < 100):
        (tmp_path / "reached").write_text(str(reached))
        printed = fork_server.kill(tmp_path, kind, moments.uniform(0, within_s))
        killed += 1
        assert printed == list(range(reached + 1, reached + 1 + len(printed)))
        for n in printed:
            edit(oracle, n)
        reached += len(printed)
        editor = Editor.open(store, "things", encoder=ENCODER)
        if captions_by_id(editor.snapshot) != {
            name: pair["record"]["caption"] for name, pair in oracle.pairs_by_id.items()
        }:
            reached += 1  # an edit that was on disk but not yet printed
            edit(oracle, reached)
        assert captions_by_id(editor.snapshot) == {
            name: pair["record"]["caption"] for name, pair in oracle.pairs_by_id.items()
        }
        if kind == "compacting" and len(store.versions("things")) == 1:
            within_s = min(1.2 * within_s, 1.0)  # a slow machine needs more time to finish a build
    oracle.assert_agrees(editor.snapshot, unit_rows(3, WIDTH, 1), "image", 30)
    assert reached > killed
    if kind == "compacting":
        assert len(store.versions("things")) >= 4  # some of them were activated, others only built
        assert editor.compact().edits == 0
