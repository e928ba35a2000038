"""Online edits of a memory: add, replace and delete pairs; items without a vector are encoded."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from index_store import Pairs, Snapshot
from service.errors import BadRequest, InvalidValue, ItemRefused, NotFound, TooLarge
from service.memories.registry import MemoryRegistry
from service.memories.swap import Swaps
from service.pipeline.stages import EmbeddedItem
from service.settings import Settings

Encode = Callable[
    [Sequence[bytes | ItemRefused], Sequence[str], float], Awaitable[Sequence[EmbeddedItem | ItemRefused]]
]


@dataclass(frozen=True, slots=True, eq=False)
class NewPair:
    """One pair to add; each side is given as it is, or as the vector that this encoder made of it.

    image: encoded bytes, or why they cannot be read.  image_embedding, text_embedding: (D,) float32
    plain CLIP vectors.  image_key: (Dk,) float32, with image_embedding, where the memory's image
    search compares trunk features.
    """

    id: str | int
    caption: str
    image: bytes | ItemRefused | None
    image_embedding: np.ndarray | None
    image_key: np.ndarray | None
    text_embedding: np.ndarray | None
    metadata: dict[str, Any]


class MemoryEdits:
    """Edits of what is being served; each is on the disk and visible before it is answered.

    encode: embeds images or texts of one request without a memory, by a deadline.
    """

    def __init__(self, registry: MemoryRegistry, swaps: Swaps, encode: Encode, settings: Settings) -> None:
        self._registry, self._swaps, self._encode, self._settings = registry, swaps, encode, settings

    async def put(self, name: str, new: Sequence[NewPair], deadline: float) -> dict[str, Any]:
        """Add pairs, or replace those of the same id: all or none. Raises the first refusal."""
        if len(new) > self._settings.max_items:
            raise TooLarge(
                f"{len(new)} pairs, at most {self._settings.max_items} a request: send several requests", "pairs"
            )
        snapshot = self._registry.resolve(name)
        images = await self._encode_images(new, deadline)
        texts = await self._encode_texts(new, deadline)
        pairs = _build_pairs(new, images, texts, snapshot)
        _, before, after = await self._registry.edit(name, lambda editor: editor.put(pairs))
        added = len(after) - len(before)
        return {**self._describe(name, before, after), "added": added, "replaced": len(pairs) - added}

    async def delete(self, name: str, pair_id: str) -> dict[str, Any]:
        """Remove one pair. Raises NotFound where there is none of this id."""
        (_, missing), before, after = await self._registry.edit(name, lambda editor: editor.delete([pair_id]))
        if missing:
            raise NotFound(f"{after.ref} has no pair {pair_id[:80]!r}: nothing was removed", "id")
        return {**self._describe(name, before, after), "deleted": pair_id}

    def _describe(self, name: str, before: Snapshot, after: Snapshot) -> dict[str, Any]:
        """The fields of every reply; a compaction is started after every `compact_after` edited
        rows.

        One that fails is tried again after as many more rows, and not with every edit.
        """
        limit = self._settings.compact_after
        if limit and after.edited_rows // limit > before.edited_rows // limit and not self._swaps.busy(name):
            self._swaps.compact(name)
        return {"object": "memory.edit", "memory": after.ref, "pairs": len(after)}

    async def _encode_images(self, pairs: Sequence[NewPair], deadline: float) -> dict[int, EmbeddedItem]:
        """A row for every pair with an image, by the place of the pair."""
        places = [i for i, pair in enumerate(pairs) if pair.image is not None]
        images = [image for pair in pairs if (image := pair.image) is not None]
        return _by_place(places, await self._encode(images, [], deadline) if places else [])

    async def _encode_texts(self, pairs: Sequence[NewPair], deadline: float) -> dict[int, EmbeddedItem]:
        """A row for every pair whose caption has no vector, by the place of the pair."""
        places = [i for i, pair in enumerate(pairs) if pair.text_embedding is None]
        longest = max((len(pairs[i].caption) for i in places), default=0)
        if longest > self._settings.max_text_chars:
            raise TooLarge(
                f"a caption of {longest} characters, at most {self._settings.max_text_chars}: shorten it", "pairs"
            )
        return _by_place(places, await self._encode([], [pairs[i].caption for i in places], deadline) if places else [])


def _by_place(places: Sequence[int], rows: Sequence[EmbeddedItem | ItemRefused]) -> dict[int, EmbeddedItem]:
    placed = {}
    for place, row in zip(places, rows, strict=True):
        if isinstance(row, ItemRefused):
            raise ItemRefused(f"pairs[{place}]", row.cause)
        placed[place] = row
    return placed


def _build_pairs(
    given: Sequence[NewPair], images: dict[int, EmbeddedItem], texts: dict[int, EmbeddedItem], snapshot: Snapshot
) -> Pairs:
    """The pairs with every vector, given or computed, in the shapes of the memory."""
    image = [
        _vector(pair.image_embedding, images.get(i), snapshot.dim, f"pairs[{i}].image_embedding")
        for i, pair in enumerate(given)
    ]
    text = [
        _vector(pair.text_embedding, texts.get(i), snapshot.dim, f"pairs[{i}].text_embedding")
        for i, pair in enumerate(given)
    ]
    has_key = snapshot.key_kind("image") == "trunk"
    keys = (
        [_key(pair, images.get(i), snapshot, f"pairs[{i}].image_key") for i, pair in enumerate(given)]
        if has_key
        else None
    )
    return Pairs(
        # a memory with integer ids converts them, or refuses
        ids=np.array([str(pair.id) for pair in given]),
        image=np.stack(image),
        text=np.stack(text),
        records=[{**pair.metadata, "caption": pair.caption} for pair in given],
        image_key=None if keys is None else np.stack(keys),
    )


def _vector(given: np.ndarray | None, made: EmbeddedItem | None, width: int, param: str) -> np.ndarray:
    """(D,) float32."""
    if given is not None and made is None:
        return _check_width(given, width, param)
    if made is not None and given is None:
        return made.plain
    raise BadRequest(f"{param}: send either the item itself or its vector", param)


def _key(pair: NewPair, made: EmbeddedItem | None, snapshot: Snapshot, param: str) -> np.ndarray:
    """(Dk,) float32."""
    if made is not None and made.trunk is not None:
        return made.trunk
    if pair.image_key is None:
        raise BadRequest(
            f"{param} is missing: {snapshot.ref} compares images by trunk features, send them or the image", param
        )
    return _check_width(pair.image_key, snapshot.manifest.key_dim("image"), param)


def _check_width(given: np.ndarray, width: int, param: str) -> np.ndarray:
    if len(given) != width:
        raise InvalidValue(
            f"{param} has {len(given)} numbers, this memory's have {width}: send those of its own encoder", param
        )
    return given
