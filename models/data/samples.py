"""Sample: one image with one caption, and the parsing rules that all sources share."""

import itertools
import json
import math
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from index_store.build.source import Reject
from models.errors import DataError

MAX_BYTES = 256 << 20  # of one tar member or file; a larger one is not read into memory
MAX_LEVELS = 32  # of nested lists and mappings in one record, as in an online edit
DEFAULT_TEMPLATE = "a photo of {class}"  # of a folder per class, where no caption is given
Skip = Callable[[str, str], bool]  # (origin, id) -> whether the image of this item need not be read


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with one caption.

    id: the user's own.  image: the bytes of the image file; b"" for a skipped item.
    metadata: the user's JSON fields, without the captions and the id.
    origin: digest of the files that this sample was read from, by which a resumed build recognises
    what it has encoded.
    """

    id: str
    image: bytes = field(repr=False)
    caption: str
    metadata: Mapping[str, Any]
    origin: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Reading:
    """How sources are read.

    caption: a template over the fields, None = the captions that the source holds.
    columns: the column of each role ("image", "caption", "id"); those not named are guessed.
    follow_links: whether links may leave the folder that is read.
    """

    caption: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    follow_links: bool = False


class Part(Protocol):
    """One tar, one table or one walked folder.

    name: for display.  label: a prefix of its ids where another part has the same.
    notes: what was guessed or left alone, one line each.
    origins: the digests that its samples may carry.
    """

    @property
    def name(self) -> str:
        """Name for display."""

    @property
    def label(self) -> str:
        """A short name without an ending."""

    @property
    def notes(self) -> Sequence[str]:
        """What was guessed or left alone."""

    @property
    def origins(self) -> frozenset[str]:
        """Digests of the files that its samples come from."""

    def read(self, skip: Skip) -> Iterator[Sample | Reject]:
        """Read every item; the image of an item for which `skip` is true is not read."""


class UnusableItem(Exception):
    """An item cannot be read; its source turns it into a Reject with this reason."""


def read_all_images(origin: str, name: str) -> bool:
    """The Skip of a reader that wants every image."""
    return False


def read_no_image(origin: str, name: str) -> bool:
    """The Skip of a reader that only counts."""
    return True


def parse_json_object(data: bytes, what: str = "json") -> dict[str, Any]:
    """Parse one JSON object, numbers as in `load_json`.

    what: the member in error messages.  Raises UnusableItem.
    """
    try:
        record = load_json(decode_text(data, what))
    except (ValueError, RecursionError) as error:
        raise UnusableItem(f"its {what} does not parse ({str(error)[:80]})") from error
    return check_object(record, f"its {what}")


def load_json(text: str) -> Any:
    """Parse JSON. NaN, which pandas writes, and numbers beyond a float become null.

    Raises ValueError, RecursionError.
    """

    def finite(digits: str) -> float | None:
        return number if math.isfinite(number := float(digits)) else None

    return json.loads(text, parse_constant=lambda _: None, parse_float=finite)


def check_object(value: object, what: str) -> dict[str, Any]:
    """The value, which must be a mapping of at most MAX_LEVELS levels. Raises UnusableItem."""
    if not isinstance(value, dict):
        raise UnusableItem(f"{what} is not an object")
    level: list[Any] = [value]
    for _ in range(MAX_LEVELS):
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        level = [one for each in inner for one in each if isinstance(one, dict | list)]
        if not level:
            return value
    raise UnusableItem(f"{what} is nested deeper than {MAX_LEVELS} levels")


def user_metadata(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields without the captions; "id" becomes "source_id", since a pair has its own id."""
    return {
        "source_id" if name == "id" else name: value
        for name, value in record.items()
        if name not in ("caption", "captions")
    }


def decode_text(data: bytes, what: str) -> str:
    """Decode the text of a member: UTF-8, or UTF-16 with a byte order mark. Raises UnusableItem."""
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        return data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnusableItem(f"its {what} is not UTF-8") from error


def is_missing(value: object) -> bool:
    """Whether a value is null, NaN or blank text: then it is no value of any field."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and not value.strip())


def render_texts(value: object, what: str) -> list[str]:
    """The texts of a field: text stripped, an integer as its digits, a list as several texts.

    A missing value has none. A float with a whole value is an integer: a column of integers with
    gaps is read as floats.  what: the field in error messages.  Raises UnusableItem for any other
    value.
    """
    if is_missing(value):
        return []
    if isinstance(value, str):
        return [value.strip()]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return [str(value)]
    if isinstance(value, list | tuple):
        return [text for each in value for text in render_texts(each, what)]
    raise UnusableItem(f"its {what} is {str(value)[:40]!r}: text, an integer or a list of these is needed")


def choose_captions(record: Mapping[str, Any], names: Sequence[str] = ("caption", "captions")) -> list[str]:
    """The captions of the first of these fields that has any. Raises UnusableItem for none."""
    for name in names:
        if captions := render_texts(record.get(name), name):
            return captions
    raise UnusableItem("no caption")


def fill_template(template: str, fields: Mapping[str, Any]) -> list[str]:
    """The captions of a template and the item's fields: one per value of a list.

    Raises UnusableItem where a field is missing or not a text.
    """
    names = list(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(template) if name is not None))
    values = []
    for name in names:
        texts = render_texts(fields.get(name), name)
        if not texts:
            raise UnusableItem(f"the caption {template!r} cannot be filled (its {name} is missing)")
        values.append(texts)
    try:
        rows = itertools.product(*values)
        return [template.format_map(dict(zip(names, row, strict=True))).strip() for row in rows]
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


def split_captions(
    name: str, image: bytes, captions: Sequence[str], metadata: Mapping[str, Any], origin: str, *, numbered: bool
) -> Iterator[Sample | Reject]:
    """One sample per distinct caption of an image; a repeated caption is folded into the first.

    numbered: whether the ids are name#0, name#1…, else the one id is the name.  The samples share
    one bytes object, so that the image is encoded once.
    """
    seen: dict[str, str] = {}
    for number, caption in enumerate(captions):
        own = f"{name}#{number}" if numbered else name
        if caption in seen:
            yield Reject(own, f"the same caption of the same image as {seen[caption]}", "folded")
        else:
            seen[caption] = own
            yield Sample(own, image, caption, metadata, origin)
