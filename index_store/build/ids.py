"""Ids of a build: the set of ids so far, and the stored ids of an interrupted build."""

import json
from itertools import islice
from pathlib import Path

import numpy as np

from index_store.build.staging import IDS
from index_store.errors import PairsRefused
from index_store.types import Id


class SeenIds:
    """Set of ids as sorted arrays of growing length, in a tenth of the memory of a set of strings.

    State: the arrays, each more than twice as long as the next, so that an id is moved log2(N)
    times at most.
    """

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def add(self, ids: np.ndarray) -> None:
        """Add the ids of a block. Raises PairsRefused for a repeated id.

        ids: (R,) int64, str, or bytes as stored.
        """
        if not len(ids):
            return
        block = np.sort(np.char.encode(ids, "utf-8") if ids.dtype.kind == "U" else ids)
        twice = block[1:][block[1:] == block[:-1]]
        for run in self._runs:
            places = np.minimum(np.searchsorted(run, block), len(run) - 1)  # (R,)
            twice = np.concatenate([twice, block[run[places] == block]])
        if len(twice):
            name = twice[0].decode("utf-8") if block.dtype.kind == "S" else int(twice[0])
            raise PairsRefused(f"id {name!r} comes twice: every pair needs its own")
        while self._runs and len(self._runs[-1]) <= 2 * len(block):
            block = np.sort(
                np.concatenate([self._runs.pop(), block]), kind="stable"
            )  # merges runs that are sorted already
        self._runs.append(block)


def read_ids(work: Path, count: int) -> list[Id]:
    """The first `count` stored ids, in row order."""
    with (work / IDS).open("rb") as file:
        return [json.loads(line)[0] for line in islice(file, count)]


def read_ids_by_origin(work: Path, count: int) -> dict[str, set[Id]]:
    """The first `count` stored ids, by their origin."""
    found: dict[str, set[Id]] = {}
    with (work / IDS).open("rb") as file:
        for line in islice(file, count):
            name, origin = json.loads(line)
            found.setdefault(origin, set()).add(name)
    return found


def to_id_array(ids: list[Id], kind: str) -> np.ndarray:
    """(R,) int64 or str, as the version stores them."""
    return np.array(ids, np.int64 if kind == "i" else np.str_)
