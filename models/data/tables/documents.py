"""Rows of JSON lines, of JSON documents (a list of records, COCO, Karpathy's splits) and of
spreadsheets.
"""

import datetime
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from models.data.samples import UnusableItem, is_missing, parse_json_object
from models.data.tables.arrow import json_value
from models.errors import DataError

TableRow = tuple[str, dict[str, Any] | str]  # (its position such as "line 4", its fields or why it has none)


def json_lines(table: Path) -> Iterator[TableRow]:
    """One row per line that is not blank."""
    with table.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield f"line {number}", parse_json_object(line)
            except UnusableItem as error:
                yield f"line {number}", str(error)


def read_document(table: Path) -> tuple[list[TableRow], str]:
    """The rows of a JSON document, and what it was taken for. Raises DataError."""
    label = f"{table.name} of {table.parent.name}"
    try:
        content = json.loads(table.read_bytes().decode("utf-8-sig"), parse_constant=lambda _: None)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{label} does not parse as JSON ({str(error)[:80]}): write it again") from error
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        if isinstance(content.get("annotations"), list):
            return list(_coco_rows(content)), "COCO annotations"
        return list(_split_rows(content["images"])), "a list of images with their sentences"
    if isinstance(content, dict) and content and all(isinstance(each, str | list) for each in content.values()):
        return [(f"entry {name!r}", {"file": name, "captions": each}) for name, each in content.items()], "a mapping"
    if isinstance(content, list):
        rows = (
            (f"item {i}", each if isinstance(each, dict) else "it is not an object") for i, each in enumerate(content)
        )
        return list(rows), "a list of records"
    raise DataError(f"{label} is neither COCO's images and annotations nor a list of records")


def sheet_rows(table: Path) -> tuple[list[str], Iterator[TableRow], str]:
    """The header, the rows and a note on the first sheet of a workbook. Raises DataError."""
    import zipfile

    from openpyxl import load_workbook
    from openpyxl.utils.exceptions import InvalidFileException

    label = f"{table.name} of {table.parent.name}"
    try:
        book = load_workbook(table, read_only=True, data_only=True)
        sheet = book.worksheets[0]
        lines = enumerate(sheet.iter_rows(values_only=True), 1)
        header = next((cells for _, cells in lines if not all(is_missing(cell) for cell in cells)), ())
    except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile, InvalidFileException) as error:
        raise DataError(f"{label} is not a readable .xlsx file ({str(error)[:80]}): save it again") from error
    names = [str(cell).strip() if not is_missing(cell) else "" for cell in header]
    while names and not names[-1]:
        names.pop()
    others = len(book.worksheets) - 1
    note = f"sheet {sheet.title!r} is read" + (f", {others} more are not" if others else "")
    return [name or f"column {i + 1}" for i, name in enumerate(names)], _sheet_lines(names, lines), note


def _sheet_lines(names: list[str], lines: Iterator[tuple[int, tuple[Any, ...]]]) -> Iterator[TableRow]:
    for number, cells in lines:
        if all(is_missing(cell) for cell in cells):
            continue
        if not all(is_missing(cell) for cell in cells[len(names) :]):
            yield f"line {number}", f"{len(cells)} fields where the header has {len(names)}"
            continue
        padded = [*cells[: len(names)], *[None] * (len(names) - len(cells))]
        values = [cell.isoformat() if isinstance(cell, datetime.datetime) else json_value(cell) for cell in padded]
        yield (
            f"line {number}",
            {name or f"column {i + 1}": value for i, (name, value) in enumerate(zip(names, values, strict=True))},
        )


def _coco_rows(content: Mapping[str, Any]) -> Iterator[TableRow]:
    """One row per image with all its captions, then the annotations of unknown images."""
    captions: dict[Any, list[Any]] = {}
    for each in content["annotations"]:
        if isinstance(each, dict):
            captions.setdefault(each.get("image_id"), []).append(each.get("caption"))
    for number, image in enumerate(content["images"]):
        if not isinstance(image, dict):
            yield f"image {number}", "it is not an object"
            continue
        fields = {name: image[name] for name in ("coco_url", "flickr_url", "width", "height") if name in image}
        own = captions.pop(image.get("id"), [])
        yield f"image {number}", {"file_name": image.get("file_name"), **fields, "captions": own}
    for name, lost in captions.items():
        for _ in lost:
            yield f"annotation of image {name}", "no image has this number"


def _split_rows(images: list[Any]) -> Iterator[TableRow]:
    for number, image in enumerate(images):
        if not isinstance(image, dict):
            yield f"image {number}", "it is not an object"
            continue
        sentences = image.get("sentences") or image.get("captions") or []
        texts = [each.get("raw") if isinstance(each, dict) else each for each in sentences]
        folder, name = image.get("filepath"), image.get("filename") or image.get("file_name")
        file = f"{folder}/{name}" if folder and name else name
        kept = {key: value for key, value in image.items() if key in ("split", "imgid", "cocoid")}
        yield f"image {number}", {"file_name": file, **kept, "captions": texts}
