"""Photos for load tests: the operator's own, or crops of those bundled with scikit-image."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from PIL import Image

__all__ = ["crops", "read_photos"]

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
BUNDLED = (
    "astronaut",
    "chelsea",
    "coffee",
    "rocket",
    "immunohistochemistry",
    "retina",
    "hubble_deep_field",
    "camera",
    "coins",
    "grass",
    "gravel",
)


def read_photos(sources: Sequence[Path], limit: int = 256) -> list[bytes]:
    """Encoded images of files, folders and tar shards, as they are on disk; at most `limit`."""
    photos = [photo for source in sources for photo, _ in zip(_photos_of(source), range(limit), strict=False)]
    if not photos:
        raise SystemExit(
            f"no {', '.join(sorted(SUFFIXES))} in {', '.join(map(str, sources)) or 'nothing'}: name image files, folders or tar shards"
        )
    return photos[:limit]


def _photos_of(source: Path) -> Iterator[bytes]:
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            if path.suffix.lower() in SUFFIXES:
                yield path.read_bytes()
    elif source.suffix == ".tar":
        yield from _members(source)
    elif source.is_file():
        yield source.read_bytes()
    else:
        raise SystemExit(f"{source}: no such file, folder or tar shard")


def _members(shard: Path) -> Iterator[bytes]:
    with tarfile.open(shard) as archive:
        for member in archive:
            file = archive.extractfile(member) if Path(member.name).suffix.lower() in SUFFIXES else None
            if file is not None:
                yield file.read()


def crops(count: int, side: int = 348, seed: int = 0) -> Iterable[tuple[str, bytes]]:
    """(name of the photo, JPEG bytes of a square crop of it), all different, since a memory of
    copies would be unrealistic.
    """
    from skimage import data

    photos = [(name, Image.fromarray(getattr(data, name)()).convert("RGB")) for name in BUNDLED]
    chance = random.Random(seed)
    for index in range(count):
        name, photo = photos[index % len(photos)]
        width = chance.randint(min(photo.size) // 3, min(photo.size))
        left, top = chance.randint(0, photo.width - width), chance.randint(0, photo.height - width)
        file = io.BytesIO()
        photo.crop((left, top, left + width, top + width)).resize((side, side)).save(file, "JPEG", quality=90)
        yield name, file.getvalue()
