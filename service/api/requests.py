"""Parsing of request bodies: items and options from a form, raw bytes or JSON.

Limits on bytes, counts and characters are applied here; limits on pixels in
`models/encoder/image_io`.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from service.api.json_body import content_type, read_json
from service.api.schemas import Options, PairsBody
from service.errors import BadRequest, InvalidValue, ItemRefused, ServiceError, TooLarge, UnsupportedType
from service.memories.edits import NewPair
from service.pipeline.stages import Items
from service.settings import Settings

O = TypeVar("O", bound=Options)  # noqa: E741
MAX_FORM_FIELDS = 1000  # of a form, beside its files
MAX_FIELD_BYTES = 4 * 2**20  # of one field of a form that is no file
MAX_METADATA_DEPTH = 32  # levels of lists and objects in the metadata of a pair
DATA_URI = re.compile(r"data:[\w.+-]+/[\w.+-]+(;[\w=.+-]+)*,", re.ASCII)


@dataclass(frozen=True, slots=True)
class ParsedRequest(Generic[O]):
    """A request's body, read and checked: its items and its options."""

    items: Items
    options: O


async def read_images(request: Request, options: type[O], settings: Settings) -> ParsedRequest[O]:
    """Read images of a form (field `file`), a raw image body, or JSON {"images": [base64 | data
    URI]}.
    """
    kind = content_type(request)
    if kind == "multipart/form-data":
        found = await _read_form(request, options, settings)
    elif kind == "application/json":
        body = await read_json(request, settings)
        found = _read_json_items(body, options, request, settings, allowed={"images"})
    elif kind.startswith("image/") or kind == "application/octet-stream":
        image = _check_image_bytes(await request.body(), 0, settings)
        found = ParsedRequest(Items([image], []), options.read(request.query_params.multi_items()))
    else:
        raise UnsupportedType(
            f"content type {kind or '(none)'!r}: send multipart/form-data, image/*, or application/json"
        )
    return found


async def read_texts(request: Request, options: type[O], settings: Settings) -> ParsedRequest[O]:
    """Read texts of JSON {"texts": […]} or {"inputs": …}."""
    return _read_json_items(await read_json(request, settings), options, request, settings, allowed={"texts", "inputs"})


async def read_images_or_texts(request: Request, options: type[O], settings: Settings) -> ParsedRequest[O]:
    """Read images in any shape, or texts of JSON."""
    if content_type(request) != "application/json":
        return await read_images(request, options, settings)
    return _read_json_items(
        await read_json(request, settings), options, request, settings, allowed={"images", "texts", "inputs"}
    )


class _FormParser(MultiPartParser):
    """Keeps files in memory, which `max_body_bytes` bounds: a full /tmp refuses no request."""

    spool_max_size = sys.maxsize


async def _read_form(request: Request, options: type[O], settings: Settings) -> ParsedRequest[O]:
    parser = _FormParser(
        request.headers,
        request.stream(),
        max_files=settings.max_items + 1,
        max_fields=MAX_FORM_FIELDS,
        max_part_size=MAX_FIELD_BYTES,
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        too_many = "too many" in error.message.lower() or "exceeded" in error.message.lower()
        raise (TooLarge if too_many else BadRequest)(f"multipart body: {error.message}") from error
    files = [value for name, value in form.multi_items() if name == "file"]
    fields = [(name, value) for name, value in form.multi_items() if name != "file"]
    for name, value in fields:
        if isinstance(value, UploadFile):
            raise BadRequest(f"a file in field {name[:80]!r}: images belong in the field 'file'", name[:80])
    check_count(files, "file", settings)
    read = [await value.read() if isinstance(value, UploadFile) else value.encode() for value in files]
    images = [_read_or_refuse(_check_image_bytes, image, i, settings) for i, image in enumerate(read)]
    return ParsedRequest(Items(images, []), options.read(request.query_params.multi_items(), fields))


def _read_json_items(
    body: dict[str, Any], options: type[O], request: Request, settings: Settings, *, allowed: set[str]
) -> ParsedRequest[O]:
    given = allowed & body.keys()
    if len(given) != 1:
        raise BadRequest(
            f"send one of {', '.join(sorted(allowed))}"
            + (f", not {' and '.join(sorted(given))} together" if given else "")
        )
    name = given.pop()
    rest: Mapping[str, Any] = {key: value for key, value in body.items() if key != name}
    chosen = options.read(request.query_params.multi_items(), rest)
    items = [body[name]] if name == "inputs" and isinstance(body[name], str) else body[name]
    if not isinstance(items, list):
        raise InvalidValue(f"{name} is a {type(items).__name__}: send a list of strings", name)
    check_count(items, name, settings)
    if name == "images":
        return ParsedRequest(Items([read_image(item, i, settings) for i, item in enumerate(items)], []), chosen)
    return ParsedRequest(Items([], [read_text(item, f"{name}[{i}]", settings) for i, item in enumerate(items)]), chosen)


def new_pairs(body: PairsBody, settings: Settings) -> list[NewPair]:
    """The pairs of an edit; an image that is not base64 becomes the refusal of its pair."""
    return [
        NewPair(
            pair.id,
            pair.caption,
            None if pair.image is None else read_image(pair.image, i, settings),
            _to_float32(pair.image_embedding),
            _to_float32(pair.image_key),
            _to_float32(pair.text_embedding),
            _check_metadata(pair.metadata, f"pairs[{i}].metadata", settings),
        )
        for i, pair in enumerate(body.pairs)
    ]


def _check_metadata(metadata: dict[str, Any], param: str, settings: Settings) -> dict[str, Any]:
    """Raise TooLarge for metadata that replies could not carry, InvalidValue for deep nesting."""
    if _depth(metadata) > MAX_METADATA_DEPTH:
        raise InvalidValue(f"{param} nests deeper than {MAX_METADATA_DEPTH} levels: flatten it", param)
    size = len(json.dumps(metadata, ensure_ascii=False))
    if size > settings.max_metadata_bytes:
        raise TooLarge(f"{param} takes {size} bytes as JSON, at most {settings.max_metadata_bytes}: shorten it", param)
    return metadata


def _depth(value: object) -> int:
    """Levels of lists and objects, counted level by level."""
    level, depth = [value], 0
    while level := [inner for outer in level for inner in _children(outer)]:
        depth += 1
    return depth


def _children(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _to_float32(numbers: list[float] | None) -> np.ndarray | None:
    return None if numbers is None else np.array(numbers, np.float32)


def check_count(items: Sequence[object], name: str, settings: Settings) -> None:
    """Raise BadRequest for no item, TooLarge for too many."""
    if not items:
        raise BadRequest(f"{name} is empty: send at least one item", name)
    if len(items) > settings.max_items:
        raise TooLarge(
            f"{len(items)} items in {name}, at most {settings.max_items} a request: send several requests", name
        )


def read_text(item: object, param: str, settings: Settings) -> str:
    """Check one text. Raises InvalidValue, TooLarge."""
    if not isinstance(item, str):
        raise InvalidValue(f"{param} is a {type(item).__name__}: send a string", param)
    if len(item) > settings.max_text_chars:
        raise TooLarge(f"{param} has {len(item)} characters, at most {settings.max_text_chars}: shorten it", param)
    return item


def read_image(item: object, index: int, settings: Settings) -> bytes | ItemRefused:
    """Return the bytes of base64 or a data URI, or the refusal of this item alone."""
    return _read_or_refuse(_decode_base64, item, index, settings)


def _read_or_refuse(read: Any, item: Any, index: int, settings: Settings) -> bytes | ItemRefused:
    """Return the bytes that `read` gives, or the refusal of this item alone."""
    try:
        return bytes(read(item, index, settings))
    except ServiceError as error:
        return ItemRefused(f"images[{index}]", error)


def _check_image_bytes(data: bytes, index: int, settings: Settings) -> bytes:
    if not data:
        raise BadRequest("the image is empty: send the bytes of an image file", f"images[{index}]")
    if len(data) > settings.max_image_bytes:
        raise TooLarge(f"{len(data)} bytes, at most {settings.max_image_bytes} an image: shrink it", f"images[{index}]")
    return data


def _decode_base64(item: object, index: int, settings: Settings) -> bytes:
    if not isinstance(item, str):
        raise InvalidValue(f"is a {type(item).__name__}: send base64 or a data URI")
    if item.startswith(("http://", "https://")):
        raise InvalidValue("is a URL, and this service fetches none: send the image's bytes")
    header = DATA_URI.match(item)
    try:
        data = base64.b64decode(item[header.end() :] if header else item, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidValue(f"is not base64: {error}") from error
    return _check_image_bytes(data, index, settings)
