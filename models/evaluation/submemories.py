"""Memories derived from another one for experiments: random parts, shuffled texts, other search
keys.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from index_store.build.build import build_version
from index_store.snapshot import Snapshot
from index_store.store import Store
from index_store.types import SIDES, KeyKind, Pairs, Side
from models.training.episodes import concatenate_pairs

SHARES = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0)  # of a memory, where its size is what is studied


class SubMemories:
    """Derived memories of `whole`; random parts are built once each.

    folder: where versions are written; the caller removes it.
    """

    def __init__(self, whole: Snapshot, folder: Path) -> None:
        self.whole = whole
        self._store = Store(folder)
        self._pairs = concatenate_pairs(list(whole.blocks()))
        self._shares = dict[tuple[float, int], Snapshot]()

    def random_share(self, share: float, seed: int) -> Snapshot:
        """A random share of the pairs, at least two; share 1 is the memory itself."""
        if share == 1:
            return self.whole
        if (share, seed) not in self._shares:
            count = max(2, round(share * len(self._pairs)))
            rows = np.random.default_rng(seed).permutation(len(self._pairs))[:count]
            self._shares[share, seed] = self.build(self._pairs.take(np.sort(rows)))
        return self._shares[share, seed]

    def with_shuffled_texts(self, seed: int) -> Snapshot:
        """Control: every image gets the text of another pair."""
        rows = np.random.default_rng(seed).permutation(len(self._pairs))
        return self.build(replace(self._pairs, text=self._pairs.text[rows], text_key=None))

    def with_vector_keys(self) -> Snapshot:
        """The same pairs, searched by their CLIP vectors."""
        return self.build(replace(self._pairs, image_key=None, text_key=None))

    def build(self, pairs: Pairs) -> Snapshot:
        """A memory of these pairs, searched by the keys that they carry."""
        name, encoder = self.whole.manifest.name, self.whole.manifest.encoder
        kinds: dict[Side, KeyKind] = {side: "trunk" if pairs.has_own_keys(side) else "vector" for side in SIDES}
        return self._store.open(
            name, build_version(self._store, name, None, [pairs], encoder=encoder, kinds=kinds).version, encoder=encoder
        )
