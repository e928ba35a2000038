"""Pairs that come over HTTP, made into pairs of a memory: what has no vector yet is encoded like any other request."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from index_store import Pairs, Snapshot
from service.errors import BadRequest, InvalidValue, ItemRefused, NotFound, TooLarge
from service.intake import image_bytes
from service.live import LiveMemories
from service.settings import Settings
from service.swaps import Swaps
from service.work import Row

Encode = Callable[[Sequence[bytes | ItemRefused], Sequence[str], float], Awaitable[Sequence[Row | ItemRefused]]]


def _floats(value: object) -> object:
    """Base64 of little-endian float32, or a list of numbers."""
    if not isinstance(value, str):
        return value
    try:
        return np.frombuffer(base64.b64decode(value, validate=True), "<f4").tolist()
    except (binascii.Error, ValueError) as error:
        raise ValueError("neither a list of numbers nor base64 of little-endian float32") from error


Vector = Annotated[list[float], BeforeValidator(_floats)]


class PairBody(BaseModel):
    """One pair. Each side is given as it is, to be encoded, or as the vector that this very encoder made of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str | int
    caption: str
    image: str | None = Field(None, description="base64 or data URI")
    image_embedding: Vector | None = Field(None, description="the plain CLIP vector; numbers, or base64 float32")
    image_key: Vector | None = Field(None, description="with image_embedding, where the memory's image search compares trunk features")
    text_embedding: Vector | None = Field(None, description="the plain CLIP vector of the caption")
    metadata: dict[str, Any] = {}


class PairsBody(BaseModel):
    """POST /memories/{name}/pairs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pairs: list[PairBody] = Field(min_length=1)


class Editing:
    """Adds, replaces and removes pairs of what is being served. Every edit is on the disk and visible before it is answered.

    encode: images or texts of one request to plain rows, by a deadline.
    """

    def __init__(self, live: LiveMemories, swaps: Swaps, encode: Encode, settings: Settings) -> None:
        self._live, self._swaps, self._encode, self._settings = live, swaps, encode, settings

    async def put(self, name: str, body: PairsBody, deadline: float) -> dict[str, Any]:
        """Add pairs, or replace those of the same id: all of them or none. Raises for the first item that cannot be one."""
        if len(body.pairs) > self._settings.max_items:
            raise TooLarge(f"{len(body.pairs)} pairs, at most {self._settings.max_items} a request: send several requests", "pairs")
        snapshot = self._live.resolve(name)
        seen = await self._images(body.pairs, deadline)
        read = await self._texts(body.pairs, deadline)
        pairs = _pairs(body.pairs, seen, read, snapshot)
        _, before, after = await self._live.edit(name, lambda editor: editor.put(pairs))
        added = len(after) - len(before)
        return {**self._told(name, before, after), "added": added, "replaced": len(pairs) - added}

    async def delete(self, name: str, pair_id: str) -> dict[str, Any]:
        """Remove one pair. Raises NotFound where there is none of this id."""
        (_, missing), before, after = await self._live.edit(name, lambda editor: editor.delete([pair_id]))
        if missing:
            raise NotFound(f"{after.ref} has no pair {pair_id[:80]!r}: nothing was removed", "id")
        return {**self._told(name, before, after), "deleted": pair_id}

    def _told(self, name: str, before: Snapshot, after: Snapshot) -> dict[str, Any]:
        """What every reply says. Each time that another `compact_after` rows have come together, folding them is begun.

        One that fails is tried again after as many more, and not with every edit.
        """
        limit = self._settings.compact_after
        if limit and after.overlaid // limit > before.overlaid // limit and not self._swaps.busy(name):
            self._swaps.compact(name)
        return {"object": "memory.edit", "memory": after.ref, "pairs": len(after)}

    async def _images(self, pairs: Sequence[PairBody], deadline: float) -> dict[int, Row]:
        """A row for every pair that sent an image, by its place."""
        places = [i for i, pair in enumerate(pairs) if pair.image is not None]
        images = [image_bytes(pairs[i].image, i, self._settings) for i in places]
        return _placed(places, await self._encode(images, [], deadline) if places else [])

    async def _texts(self, pairs: Sequence[PairBody], deadline: float) -> dict[int, Row]:
        """A row for every pair whose caption came without its vector."""
        places = [i for i, pair in enumerate(pairs) if pair.text_embedding is None]
        longest = max((len(pairs[i].caption) for i in places), default=0)
        if longest > self._settings.max_text_chars:
            raise TooLarge(f"a caption of {longest} characters, at most {self._settings.max_text_chars}: shorten it", "pairs")
        return _placed(places, await self._encode([], [pairs[i].caption for i in places], deadline) if places else [])


def _placed(places: Sequence[int], rows: Sequence[Row | ItemRefused]) -> dict[int, Row]:
    placed = {}
    for place, row in zip(places, rows, strict=True):
        if isinstance(row, ItemRefused):
            raise ItemRefused(f"pairs[{place}]", row.cause)
        placed[place] = row
    return placed


def _pairs(given: Sequence[PairBody], seen: dict[int, Row], read: dict[int, Row], snapshot: Snapshot) -> Pairs:
    """The pairs with every vector, given or made, in the memory's own shapes."""
    image = [_vector(pair.image_embedding, seen.get(i), snapshot.dim, f"pairs[{i}].image_embedding") for i, pair in enumerate(given)]
    text = [_vector(pair.text_embedding, read.get(i), snapshot.dim, f"pairs[{i}].text_embedding") for i, pair in enumerate(given)]
    own = snapshot.key_kind("image") == "trunk"
    keys = [_key(pair, seen.get(i), snapshot, f"pairs[{i}].image_key") for i, pair in enumerate(given)] if own else None
    return Pairs(
        ids=np.array([str(pair.id) for pair in given]),  # a memory of numbers reads them as such, or refuses them
        image=np.stack(image),
        text=np.stack(text),
        records=[{**pair.metadata, "caption": pair.caption} for pair in given],
        image_key=None if keys is None else np.stack(keys),
    )


def _vector(given: list[float] | None, made: Row | None, width: int, param: str) -> np.ndarray:
    """(D,) float32."""
    if (given is None) == (made is None):
        raise BadRequest(f"{param}: send either the item itself or its vector", param)
    return made.plain if made is not None else _numbers(given or [], width, param)


def _key(pair: PairBody, made: Row | None, snapshot: Snapshot, param: str) -> np.ndarray:
    """(Dk,) float32."""
    if made is not None and made.trunk is not None:
        return made.trunk
    if pair.image_key is None:
        raise BadRequest(f"{param} is missing: {snapshot.ref} compares images by trunk features, send them or the image", param)
    return _numbers(pair.image_key, snapshot.manifest.key_dim("image"), param)


def _numbers(given: Sequence[float], width: int, param: str) -> np.ndarray:
    if len(given) != width:
        raise InvalidValue(f"{param} has {len(given)} numbers, this memory's have {width}: send those of its own encoder", param)
    return np.array(given, np.float32)
