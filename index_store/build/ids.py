"""The set of ids of a build, so that none comes twice."""

import numpy as np

from index_store.errors import PairsRefused


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
