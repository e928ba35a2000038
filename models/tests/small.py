"""Small test data: unit vectors, synthetic images, tar files and memories on disk."""

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from index_store.build.build import build_version
from index_store.snapshot import Snapshot
from index_store.store import Store
from index_store.types import KeyKind, Pairs, Side


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """The rows scaled to unit length, float32."""
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def picture(seed: int, width: int = 80, height: int = 64) -> Image.Image:
    """A smooth random RGB image, a different one for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def image_bytes(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The image as a file of one format, such as image_bytes(picture(0), "JPEG", quality=90)."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def build_memory(
    folder: Path, pairs: Pairs, encoder: str, kinds: Mapping[Side, KeyKind] | None = None, name: str = "m"
) -> Snapshot:
    """Build a version of these pairs in a new store, and open it."""
    store = Store(folder)
    manifest = build_version(
        store, name, None, [pairs], encoder=encoder, kinds=kinds or {"image": "vector", "text": "vector"}
    )
    return store.open(name, manifest.version, encoder=encoder)


def write_tar(path: Path, members: Iterable[tuple[str, bytes | Mapping[str, Any]]]) -> Path:
    """Write a tar of these members in this order; a mapping is written as JSON."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path
