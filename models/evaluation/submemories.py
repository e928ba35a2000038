"""Memories made of another one, for experiments: some of its pairs, its texts shuffled, other
search keys.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from index_store.build.build import build_version
from index_store.snapshot import Snapshot
from index_store.store import Store
from index_store.types import SIDES, KeyKind, Pairs, Side
from models.training.episodes import joined

SHARES = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0)  # of a memory, where its size is what is studied


class Parts:
    """What is made of one memory, built once each.  folder: where the versions go; whoever gives it
    removes it.
    """

    def __init__(self, whole: Snapshot, folder: Path) -> None:
        self.whole = whole
        self._store = Store(folder)
        self._pairs = joined(list(whole.blocks()))
        self._shares = dict[tuple[float, int], Snapshot]()

    def share(self, share: float, seed: int) -> Snapshot:
        """A random share of the pairs, two at least; all of them is the memory itself."""
        if share == 1:
            return self.whole
        if (share, seed) not in self._shares:
            count = max(2, round(share * len(self._pairs)))
            rows = np.random.default_rng(seed).permutation(len(self._pairs))[:count]
            self._shares[share, seed] = self.built(self._pairs.take(np.sort(rows)))
        return self._shares[share, seed]

    def shuffled(self, seed: int) -> Snapshot:
        """The control: every image with the text of another pair."""
        rows = np.random.default_rng(seed).permutation(len(self._pairs))
        return self.built(replace(self._pairs, text=self._pairs.text[rows], text_key=None))

    def by_vectors(self) -> Snapshot:
        """The memory with the CLIP vectors as keys."""
        return self.built(replace(self._pairs, image_key=None, text_key=None))

    def built(self, pairs: Pairs) -> Snapshot:
        """A memory of these pairs, searched by the keys they have."""
        name, encoder = self.whole.manifest.name, self.whole.manifest.encoder
        kinds: dict[Side, KeyKind] = {side: "trunk" if pairs.has_own_keys(side) else "vector" for side in SIDES}
        return self._store.open(
            name, build_version(self._store, name, None, [pairs], encoder=encoder, kinds=kinds).version, encoder=encoder
        )
