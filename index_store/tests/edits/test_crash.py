"""Editors killed at random moments: real processes, real files. Everything acknowledged is there when the store opens again."""

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

NURSERY = """
import os, sys
from pathlib import Path
from index_store.tests.edits.test_crash import edit_for_ever
for line in sys.stdin:
    root, kind = line.split()
    child = os.fork()
    if child == 0:
        edit_for_ever(Path(root), compacting=kind == "compacting")
    print("child", child, flush=True)
    sys.stdin.readline()
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


def edit(made: Editor | Oracle, n: int) -> None:
    """Edit number n: a batch of new and of known ids, or a deletion."""
    if n % 3 == 0:
        made.delete([f"pair-{(7 * n + i) % 400}" for i in range(6)])
        return
    pairs = some_pairs(20, WIDTH, seed=n % 50, first=(13 * n) % 400)
    made.put(Pairs(pairs.ids, pairs.image, pairs.text, [{"caption": f"{n}"} for _ in range(20)]))


def edit_for_ever(root: Path, *, compacting: bool) -> None:
    """The child: goes on where the last one came to, and tells of every edit once its call has returned."""
    made = Editor.open(Store(root), "things", encoder=ENCODER)
    n, prepared = int((root / "reached").read_text()), None
    while True:
        n += 1
        edit(made, n)
        os.write(1, b"edit %d\n" % n)
        if prepared is not None:
            made.switch(prepared)
            prepared = None
        elif compacting and n % 3 == 0:
            prepared = made.compact_build()


class Nursery:
    """Starts real editors, one at a time, without importing everything for each."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", NURSERY],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
            },  # a fork must not inherit half a thread pool
        )

    def kill(self, root: Path, kind: str, after_s: float) -> list[int]:
        """Let an editor work on the store at `root`, kill it so long after its first edit; the edits that it told of."""
        self._say(f"{root} {kind}")
        edits: list[int] = []
        child = 0
        while not (child and edits):
            word, number = self._hear()
            child, edits = (number, edits) if word == "child" else (child, [*edits, number])
        time.sleep(after_s)
        os.kill(child, signal.SIGKILL)
        self._say("")
        while (heard := self._hear())[0] != "ended":
            edits.append(heard[1])
        return edits

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _hear(self) -> tuple[str, int]:
        assert self._process.stdout is not None
        word, _, number = self._process.stdout.readline().strip().partition(" ")
        return word, int(number or 0)


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


def contents(snapshot: Snapshot) -> dict[Id, str]:
    return {
        name: record["caption"]
        for block in snapshot.blocks()
        for name, record in zip(block.ids.tolist(), block.records, strict=True)
    }


@pytest.mark.parametrize("kind", ["putting", "compacting"])
def test_kill_9_at_random_moments_loses_nothing_acknowledged(tmp_path: Path, nursery: Nursery, kind: str) -> None:
    base, store, moments = some_pairs(60, WIDTH), Store(tmp_path), random.Random(6)
    build_memory(tmp_path, base)
    store.activate("things", "v1")
    oracle, reached, killed, within_s = Oracle(base), 0, 0, 0.06
    while killed < kill_count() or (kind == "compacting" and len(store.versions("things")) < 4 and killed < 100):
        (tmp_path / "reached").write_text(str(reached))
        told = nursery.kill(tmp_path, kind, moments.uniform(0, within_s))
        killed += 1
        assert told == list(range(reached + 1, reached + 1 + len(told)))
        for n in told:
            edit(oracle, n)
        reached += len(told)
        made = Editor.open(store, "things", encoder=ENCODER)
        if contents(made.snapshot) != {name: pair["record"]["caption"] for name, pair in oracle.there.items()}:
            reached += 1  # the edit that was on the disk, but not told of yet
            edit(oracle, reached)
        assert contents(made.snapshot) == {name: pair["record"]["caption"] for name, pair in oracle.there.items()}
        if kind == "compacting" and len(store.versions("things")) == 1:
            within_s = min(1.2 * within_s, 1.0)  # on a slow machine no build is ever finished in time otherwise
    oracle.agrees(made.snapshot, unit_rows(3, WIDTH, 1), "image", 30)
    assert reached > killed
    if kind == "compacting":
        assert len(store.versions("things")) >= 4  # some of them were switched to, others built in vain
        assert made.compact().edits == 0
