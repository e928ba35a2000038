"""Small memories for tests: unit rows, pairs with records, versions on disk."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from index_store.build.build import build_version
from index_store.snapshot import Snapshot
from index_store.storage.manifest import Manifest
from index_store.store import Store
from index_store.types import KeyKind, Pairs, Side

ENCODER = "tiny/test@0123456789ab"
VECTORS: dict[Side, KeyKind] = {"image": "vector", "text": "vector"}
TRUNKS: dict[Side, KeyKind] = {"image": "trunk", "text": "vector"}


def normalize(rows: np.ndarray) -> np.ndarray:
    """Rows scaled to unit length, float32."""
    unit: np.ndarray = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return unit


def unit_rows(n: int, width: int, seed: int) -> np.ndarray:
    """(n, width) float32 unit rows, rounded to float16 once, as a memory stores them."""
    return normalize(np.random.default_rng(seed).standard_normal((n, width))).astype(np.float16).astype(np.float32)


def some_pairs(
    n: int = 60, width: int = 16, *, seed: int = 0, first: int = 0, key_width: int = 0, ints: bool = False
) -> Pairs:
    """n pairs with ids pair-FIRST…, or FIRST… with `ints`.

    key_width > 0 gives the images keys of their own.
    """
    numbers = np.arange(first, first + n, dtype=np.int64)
    return Pairs(
        ids=numbers if ints else np.array([f"pair-{i}" for i in numbers]) if n else np.array([], "U1"),
        image=unit_rows(n, width, seed),
        text=unit_rows(n, width, seed + 1000),
        records=[{"caption": f"caption {i}", "price": i / 2, "tags": ["ä", "\n"]} for i in numbers],
        image_key=unit_rows(n, key_width, seed + 2000) if key_width else None,
    )


def slice_pairs(pairs: Pairs, rows: slice) -> Pairs:
    """The pairs at some rows."""
    key = None if pairs.image_key is None else pairs.image_key[rows]
    return Pairs(pairs.ids[rows], pairs.image[rows], pairs.text[rows], pairs.records[rows], image_key=key)


def build_memory(
    root: Path, pairs: Pairs | Iterable[Pairs], version: str = "v1", name: str = "things", **options: Any
) -> Manifest:
    """Build a version of these pairs in the store at `root`; returns its manifest."""
    blocks = [pairs] if isinstance(pairs, Pairs) else pairs
    own = isinstance(blocks, Sequence) and any(block.image_key is not None for block in blocks)
    options = {"encoder": ENCODER, "kinds": TRUNKS if own else VECTORS, **options}
    return build_version(Store(root), name, version, blocks, **options)


def open_memory(
    root: Path, pairs: Pairs | Iterable[Pairs], version: str = "v1", name: str = "things", **options: Any
) -> Snapshot:
    """Build a version of these pairs in the store at `root` and open it."""
    build_memory(root, pairs, version, name, **options)
    return Store(root).open(name, version, encoder=ENCODER)


def unlock(version: Path) -> Path:
    """Make the files of a version writable, for tests that damage them; returns its folder."""
    for path in version.rglob("*"):
        if path.is_file():
            path.chmod(0o644)
    return version


def store_is_empty(root: Path, name: str = "things") -> bool:
    """True where no memory is listed and no file is left."""
    return Store(root).names() == [] and not list(root.glob(f"{name}/**/*"))
