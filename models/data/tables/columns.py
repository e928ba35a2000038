"""Columns of a table: which holds the image, the caption and the id, and types of text cells."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from models.encoder.image_io.formats import IMAGE_ENDINGS
from models.errors import DataError

# In the order in which they are chosen.
ALIASES: Mapping[str, tuple[str, ...]] = {
    "image": (
        "file", "filepath", "file_name", "filename", "file_path", "image", "image_path", "image_file", "image_filename",
        "image_name", "img", "img_path", "image_id", "path", "photo", "picture", *IMAGE_ENDINGS, "image_src", "image_url",
        "img_url", "photo_image_url", "url",
    ),
    "caption": (
        "caption", "captions", "text", "texts", "title", "sentence", "sentences", "raw", "description", "image_alt_text",
        "alt_text", "alt", "prompt", "comment", "label_name", "class_name", "label", "class", "category",
    ),
    "id": ("id",),
}  # fmt: skip
_IMAGE_NAME = re.compile(rf"[^,;|\t]*\.({'|'.join(IMAGE_ENDINGS)})(#\d+)?", re.IGNORECASE)
_INTEGER = re.compile(r"-?(0|[1-9]\d{0,14})")
_DECIMAL = re.compile(r"-?(0|[1-9]\d{0,14})(\.\d{1,15})?")


@dataclass(frozen=True, slots=True)
class Columns:
    """The column of each role; "" for none."""

    image: str
    caption: str
    id: str

    def spoken(self) -> str:
        """The columns in words, such as "image = file, caption = title"."""
        roles = (("image", self.image), ("caption", self.caption), ("id", self.id))
        return ", ".join(f"{role} = {column}" for role, column in roles if column)


def normal_name(name: str) -> str:
    """A column name as aliases are compared: lower case, with underscores."""
    return re.sub(r"[\s\-]+", "_", name.strip().lower())


def recognised(name: str) -> bool:
    """Whether a column name is a known alias of any role."""
    return any(normal_name(name) in aliases for aliases in ALIASES.values())


def looks_like_image(cell: str) -> bool:
    """Whether a cell is the name of an image file."""
    return _IMAGE_NAME.fullmatch(cell.strip()) is not None


def parse_columns(text: str | None) -> dict[str, str]:
    """The roles of --columns image=…,caption=…,id=…. Raises DataError."""
    found: dict[str, str] = {}
    for each in (text or "").split(","):
        if not each.strip():
            continue
        role, equals, column = each.partition("=")
        if role.strip() not in ALIASES or not equals or not column.strip():
            raise DataError(f"--columns {each!r}: write image=COLUMN,caption=COLUMN,id=COLUMN, or some of these")
        found[role.strip()] = column.strip()
    return found


def choose_columns(
    names: Sequence[str], given: Mapping[str, str], *, images: Sequence[str] = (), caption_needed: bool, label: str
) -> Columns:
    """The column of each role: as given, else the first known alias.

    names: of the table.  images: columns that hold image bytes, chosen before any alias.
    label: the table in error messages.  Raises DataError where an image, or a caption that is
    needed, has no column.
    """
    by_name = {normal_name(name): name for name in reversed(names)}
    chosen: dict[str, str] = {}
    for role, aliases in ALIASES.items():
        if role in given:
            if given[role] not in names:
                raise DataError(f"{label} has no column {given[role]!r}, only {', '.join(names)}: correct --columns")
            chosen[role] = given[role]
            continue
        taken = set(chosen.values())
        known = [by_name[alias] for alias in aliases if alias in by_name and by_name[alias] not in taken]
        chosen[role] = next(iter([*images, *known] if role == "image" else known), "")
    if not chosen["image"] or (caption_needed and not chosen["caption"]):
        raise DataError(
            f"{label} has the columns {list(names)}: file (or filepath) and caption are needed; name yours with "
            "--columns image=COLUMN,caption=COLUMN"
        )
    return Columns(**chosen)


class CellTypes:
    """The type of each text column: int or float where every cell is a plain number, else str."""

    def __init__(self) -> None:
        self._kinds: dict[str, type] = {}

    def see(self, fields: Mapping[str, str]) -> None:
        """Take one row into account; an empty cell says nothing."""
        for name, text in fields.items():
            if text and self._kinds.get(name) is not str:
                kind = int if _INTEGER.fullmatch(text) else float if _DECIMAL.fullmatch(text) else str
                before = self._kinds.get(name, kind)
                self._kinds[name] = kind if before is kind else str if str in (before, kind) else float

    def convert(self, fields: Mapping[str, str], kept: Iterable[str]) -> dict[str, Any]:
        """One row with typed cells; an empty cell is null, except in the text columns `kept`."""
        plain = set(kept)
        return {name: text if name in plain else self._typed(name, text) for name, text in fields.items()}

    def _typed(self, name: str, text: str) -> Any:
        kind = self._kinds.get(name, str)
        return None if not text and kind is not str else kind(text)
