"""Sample: one image with one caption, and the parsing rules that all sources share."""

import json
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from models.errors import DataError

MAX_BYTES = 256 << 20  # of one tar member or file; a larger one is not read into memory


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with one caption.

    id: the user's own.  image: the bytes of the image file; b"" for a skipped item.
    metadata: the user's JSON fields, without the captions and the id.
    """

    id: str
    image: bytes = field(repr=False)
    caption: str
    metadata: Mapping[str, Any]


class UnusableItem(Exception):
    """An item cannot be read; its source turns it into a Reject with this reason."""


def parse_json_object(data: bytes, what: str = "json") -> dict[str, Any]:
    """Parse one JSON object; NaN, which pandas writes but JSON does not allow, becomes null.

    what: the member in error messages.  Raises UnusableItem.
    """
    try:
        record = json.loads(decode_utf8(data, what), parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise UnusableItem(f"its {what} does not parse ({str(error)[:80]})") from error
    if not isinstance(record, dict):
        raise UnusableItem(f"its {what} is not an object")
    return record


def user_metadata(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields without the captions; "id" becomes "source_id", since a pair has its own id."""
    return {
        "source_id" if name == "id" else name: value
        for name, value in record.items()
        if name not in ("caption", "captions")
    }


def decode_utf8(data: bytes, what: str) -> str:
    """Decode the text of a member. Raises UnusableItem."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnusableItem(f"its {what} is not UTF-8") from error


def clean_caption(caption: object) -> str:
    """The stripped caption. Raises UnusableItem where it is empty or missing."""
    if not isinstance(caption, str) or not caption.strip():
        raise UnusableItem("no caption")
    return caption.strip()


def fill_template(template: str, fields: Mapping[str, Any]) -> str:
    """A caption from a template and the item's fields. Raises UnusableItem."""
    try:
        return clean_caption(template.format_map(fields))
    except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        raise UnusableItem(f"the caption {template!r} cannot be filled ({type(error).__name__}: {error})") from error


def check_template(template: str | None) -> None:
    """Raise DataError unless the template's placeholders are plain field names."""
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
