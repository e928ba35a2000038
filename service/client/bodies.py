"""Items as the bodies of requests, within limits, and vectors from replies."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar
from urllib.parse import quote

import numpy as np

Item = TypeVar("Item")
ImageLike: TypeAlias = bytes | str | Path  # encoded bytes, or the path of a file


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one request carries, and how long a service that is busy (429, 503) or not there is
    waited for.

    max_items, max_bytes: of one request; at most the service's own, which /info tells.  retries:
    further tries of one request.
    max_pause_s: the longest pause before one, whatever Retry-After says.  restarts: of an answer in
    several requests whose memory was replaced between two of them; 0 raises at once.
    """

    max_items: int = 64
    max_bytes: int = 32 * 2**20
    retries: int = 5
    max_pause_s: float = 10.0
    restarts: int = 3


def split_batches(items: Iterator[Item], limits: Limits) -> Iterator[tuple[int, list[Item]]]:
    """(place of the first, items) of each request: as many as fit into both limits, one at the
    least.
    """
    at, some, size = 0, list[Item](), 0
    for item in items:
        length = len(item) if isinstance(item, bytes | str) else 0
        if some and (len(some) == limits.max_items or size + length > limits.max_bytes):
            yield at, some
            at, some, size = at + len(some), [], 0
        some.append(item)
        size += length
    if some:
        yield at, some


def read_images(images: Sequence[ImageLike]) -> Iterator[bytes]:
    """Each image's bytes, a file only when its turn comes."""
    return (image if isinstance(image, bytes) else Path(image).read_bytes() for image in images)


def form_body(images: Sequence[bytes], options: Mapping[str, Any]) -> dict[str, Any]:
    """A multipart form: bytes travel as they are, and every option as a field, lists as JSON."""
    fields = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in options.items()
        if value is not None
    }
    return {"files": [("file", ("image", image)) for image in images], "data": fields}


def text_body(texts: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON body."""
    return {"json": {"texts": texts, **options}}


def decode_rows(data: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """(N, D) float32; (0, 0) for no item."""
    if not data:
        return np.empty((0, 0), np.float32)
    return (
        np.frombuffer(b"".join(base64.b64decode(item["embedding"]) for item in data), "<f4")
        .reshape(len(data), -1)
        .astype(np.float32)
    )


def label_set_body(labels: Sequence[str], templates: Sequence[str] | None) -> dict[str, Any]:
    """The body of PUT /label-sets/{name}; templates: None = the service's own."""
    return {"labels": list(labels), **({} if templates is None else {"templates": list(templates)})}


def route(*parts: str | int) -> str:
    """The path of these parts, each quoted as one: a name or an id never becomes another route.

    >>> route("memories", "shop", "pairs", "a/b?")
    '/memories/shop/pairs/a%2Fb%3F'
    >>> route("memories", "shop", "pairs", "..")
    '/memories/shop/pairs/%2E%2E'
    """
    quoted = [quote(str(part), safe="") for part in parts]
    # httpx would leave out "." and "..", which are fine ids
    return "/" + "/".join(part.replace(".", "%2E") if part in (".", "..") else part for part in quoted)
