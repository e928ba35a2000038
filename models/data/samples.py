"""One image with one caption, and the rules that every source makes it by."""

import json
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from models.errors import DataError

MAX_BYTES = 256 << 20  # of one member or file; more is refused rather than read into memory


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with one caption.

    id: the user's own.  image: the file's bytes; none where a source was asked to pass the item over.
    metadata: the user's JSON fields, without the captions and the id.
    """

    id: str
    image: bytes = field(repr=False)
    caption: str
    metadata: Mapping[str, Any]


class Unusable(Exception):
    """Raised where an item is read and caught where its source is: the item becomes a Reject with this reason."""


def parsed(data: bytes, what: str = "json") -> dict[str, Any]:
    """One JSON object; NaN, which pandas writes and JSON does not know, is read as null."""
    try:
        record = json.loads(utf8(data, what), parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise Unusable(f"its {what} does not parse ({str(error)[:80]})") from error
    if not isinstance(record, dict):
        raise Unusable(f"its {what} is not an object")
    return record


def metadata(record: Mapping[str, Any]) -> dict[str, Any]:
    """The user's own fields: captions are kept apart, and "id" is the pair's own, so the json's becomes "source_id"."""
    return {
        "source_id" if name == "id" else name: value
        for name, value in record.items()
        if name not in ("caption", "captions")
    }


def utf8(data: bytes, what: str) -> str:
    """The text of a member."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unusable(f"its {what} is not UTF-8") from error


def said(caption: object) -> str:
    """The caption, trimmed; an empty or missing one describes nothing."""
    if not isinstance(caption, str) or not caption.strip():
        raise Unusable("no caption")
    return caption.strip()


def filled(template: str, fields: Mapping[str, Any]) -> str:
    """A caption made of the item's own fields."""
    try:
        return said(template.format_map(fields))
    except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        raise Unusable(f"the caption {template!r} cannot be filled ({type(error).__name__}: {error})") from error


def check_template(template: str | None) -> None:
    """DataError unless a template names fields and nothing of them."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template or "") if name is not None]
    except ValueError as error:
        raise DataError(
            f'the caption template {template!r} is malformed ({error}): write it like "a photo of {{class}}"'
        ) from error
    if not all(name.isidentifier() for name in names):
        raise DataError(
            f'the caption template {template!r} may only name fields, not {names}: write it like "a photo of {{class}}"'
        )
