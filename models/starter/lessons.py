"""Training episodes of the starter's fusion, over several memories, of photos that its encoder
never saw; none are from Grocery.

Class captions come from Caltech 101 and imagen, sentences from Flickr8k. In some episodes the
classes carry invented names, which the encoder knows nothing about, as with the product names of a
shop: only the memory relates them to photos.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from index_store.build.build import build_version
from index_store.snapshot import Snapshot
from index_store.store import Store
from index_store.types import KeyKind, Pairs
from models.data.encode import encode_texts
from models.reco import Reco
from models.starter.learn import project
from models.starter.photos import DataSet
from models.training.episodes import Episode, look_up

MEMORY_CAPTION, QUERY_CAPTION = "a photo of {}", "a photo of a {}."
# neighbours looked up: twice the k that is served, so that the fusion meets larger ones too
DEPTH = 20
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstv" for vowel in "aeiou"]
BLOCK = 512  # captions encoded at once
Naming = str | None  # None = the classes' own names, otherwise a seed word for invented ones


class EpisodeMaker:
    """Builds episodes.

    reco: any fusion on the starter's encoder, for its search.  folder: where memories are built.
    """

    def __init__(self, reco: Reco, folder: Path) -> None:
        self.reco = reco
        self.folder = folder
        self._known: dict[
            str, np.ndarray
            # (D,) of every caption encoded so far: the same ones come back with each kind of key
        ] = {}

    def classes(self, name: str, photos: DataSet, key: KeyKind, naming: Naming, half: int) -> Episode:
        """Half of each class is the memory, the other half the queries.

        half: 0 or 1, the half that is the memory.
        """
        names = {
            label: label if naming is None else invented_name(label, naming)
            for label in sorted(set(photos.column("class")))
        }
        called = [names[label] for label in photos.column("class")]
        known = np.array([_rank_in_class(photos.column("class"), row) % 2 == half for row in range(len(photos))])
        memory = self.pairs(photos, [MEMORY_CAPTION.format(label) for label in called], key, np.flatnonzero(known))
        queries = self.pairs(photos, [QUERY_CAPTION.format(label) for label in called], key, np.flatnonzero(~known))
        names_are = "own" if naming is None else f"invented ({naming})"
        return self.episode(f"{name}, {names_are} names, {key} keys, half {half}", queries, self.snapshot(memory, key))

    def sentence_memory(self, photos: DataSet, key: KeyKind) -> Snapshot:
        """A memory of photos with two captions each."""
        twice = photos.take(np.repeat(np.arange(len(photos)), 2).tolist())
        numbered = [f"{photo}#{row % 2}" for row, photo in enumerate(twice.ids)]
        said = [captions[row % 2] for row, captions in enumerate(twice.captions)]
        return self.snapshot(self.pairs(replace(twice, ids=numbered), said, key, np.arange(len(twice))), key)

    def sentences(self, name: str, photos: DataSet, memory: Snapshot, key: KeyKind) -> Episode:
        """Photos with their first caption as queries of a memory of other photos."""
        queries = self.pairs(photos, [captions[0] for captions in photos.captions], key, np.arange(len(photos)))
        return self.episode(f"{name}, sentences, {key} keys", queries, memory)

    def episode(self, name: str, queries: Pairs, memory: Snapshot) -> Episode:
        """Queries with their neighbours; nothing is excluded by similarity, since the photos
        differ.
        """
        return look_up(name, queries, memory, self.reco, DEPTH, {})

    def pairs(self, photos: DataSet, captions: Sequence[str], key: KeyKind, rows: np.ndarray) -> Pairs:
        """The photos of these rows with one caption each."""
        some = photos.take(rows.tolist())
        said = [captions[row] for row in rows]
        image = project(self.reco.encoder.module, some.features[:, 0])
        text = self._texts(said)
        records = [{"caption": caption} for caption in said]
        return Pairs(np.array(some.ids), image, text, records, some.keys if key == "trunk" else None)

    def _texts(self, captions: Sequence[str]) -> np.ndarray:
        """(N, D) float32 unit."""
        new = sorted(set(captions) - self._known.keys(), key=len)
        for at in range(0, len(new), BLOCK):
            block = new[at : at + BLOCK]
            self._known.update(zip(block, encode_texts(block, self.reco.encoder).vectors, strict=True))
        return np.stack([self._known[caption] for caption in captions])

    def snapshot(self, pairs: Pairs, key: KeyKind) -> Snapshot:
        """The pairs as an opened memory."""
        store, encoder = Store(self.folder), self.reco.encoder.fingerprint
        manifest = build_version(
            store, "lesson", None, [pairs], encoder=encoder, kinds={"image": key, "text": "vector"}
        )
        return store.open("lesson", manifest.version, encoder=encoder)


def invented_name(label: str, naming: str) -> str:
    """A two-word name for `label`, fixed within one naming; several classes share the first word,
    like a brand.
    """
    rng = np.random.default_rng([len(naming), *naming.encode(), *label.encode()])
    brands = np.random.default_rng([*naming.encode()]).choice(SYLLABLES, size=(12, 2))
    return f"{''.join(rng.choice(brands))} {''.join(rng.choice(SYLLABLES, size=rng.integers(2, 4)))}"


def _rank_in_class(labels: np.ndarray, row: int) -> int:
    """Number of earlier photos of the same class."""
    return int((labels[:row] == labels[row]).sum())
