"""Rows of JSON lines, of JSON documents (a list of records, COCO, Karpathy's splits) and of
spreadsheets.
"""

import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from models.data.folders.files import file_fault, is_image
from models.data.samples import UnusableItem, check_object, is_missing, load_json, parse_json_object
from models.data.tables.arrow_values import json_value
from models.errors import DataError

NO_CAPTIONS = "lists images without any caption"
# What openpyxl raises for a damaged workbook; its XML parser's error is a SyntaxError.
SHEET_ERRORS = (
    *(OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, SyntaxError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error),
)
ERROR_CODES = (
    "#NULL!",
    "#DIV/0!",
    "#VALUE!",
    "#REF!",
    "#NAME?",
    "#NUM!",
    "#N/A",
    "#GETTING_DATA",
)  # cells without a value

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
        content = load_json(table.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{label} does not parse as JSON ({str(error)[:80]}): write it again") from error
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        return _image_rows(content, label)
    if isinstance(content, dict) and any(is_image(name) for name in content):
        return [(f"entry {name!r}", {"file": name, "captions": each}) for name, each in content.items()], "a mapping"
    if isinstance(content, list):
        return [(f"item {i}", _record(each)) for i, each in enumerate(content)], "a list of records"
    raise DataError(
        f"{label} is neither COCO's images and annotations, a mapping from file names to captions, nor a list of records"
    )


def _record(value: object) -> dict[str, Any] | str:
    try:
        return check_object(value, "it")
    except UnusableItem as error:
        return str(error)


def _image_rows(content: Mapping[str, Any], label: str) -> tuple[list[TableRow], str]:
    """The rows of a document with a list "images". Raises DataError where it holds no caption."""
    if isinstance(content.get("annotations"), list):
        rows, what = list(_coco_rows(content)), "COCO annotations"
    else:
        rows, what = list(_split_rows(content["images"])), "a list of images with their sentences"
    if not any(not isinstance(row, str) and _has_text(row["captions"]) for _, row in rows):
        raise DataError(f"{label} {NO_CAPTIONS}, as COCO's instances and keypoints do: give the captions_*.json")
    return rows, what


def _has_text(captions: object) -> bool:
    return any(not is_missing(each) for each in captions) if isinstance(captions, list) else not is_missing(captions)


def sheet_header(table: Path) -> tuple[list[str], int, str]:
    """The columns of the first sheet of a workbook, the line that names them, and a note.

    Raises DataError.
    """
    with _open_sheet(table) as (sheet, others):
        number, cells = _header(sheet)
    names = [str(cell).strip() if not is_missing(cell) else "" for cell in cells]
    while names and not names[-1]:
        names.pop()
    note = f"sheet {sheet.title!r} is read" + (f", {others} more are not" if others else "")
    return [name or f"column {i + 1}" for i, name in enumerate(names)], number, note


def sheet_records(table: Path, width: int) -> Iterator[tuple[int, list[Any] | str]]:
    """The lines behind the header of the first sheet: the cells of each, or why it has none.

    width: columns of the header.  A blank line is none. A sheet that cannot be read to its end
    gives one reason for what lay behind.  Raises DataError.
    """
    with _open_sheet(table) as (sheet, _):
        number = first = _header(sheet)[0] + 1
        try:
            for number, cells in enumerate(sheet.iter_rows(min_row=first, values_only=True), first):
                values = [None if cell in ERROR_CODES else json_value(cell) for cell in cells]
                if all(is_missing(value) for value in values):
                    continue
                if not all(is_missing(value) for value in values[width:]):
                    yield number, f"{len(values)} fields where the header has {width}"
                else:
                    yield number, [*values[:width], *[None] * (width - len(values))]
        except SHEET_ERRORS as error:
            yield number + 1, f"the sheet breaks off ({str(error)[:80]}): what lay behind is lost"


@contextmanager
def _open_sheet(table: Path) -> Iterator[tuple[Any, int]]:
    """The first sheet of a workbook and the number of the others; the file is closed afterwards.

    Raises DataError, also for what fails in the block.
    """
    from openpyxl import load_workbook

    with ExitStack() as stack:
        try:
            book = load_workbook(table, read_only=True, data_only=True)
            stack.callback(book.close)
            yield book.worksheets[0], len(book.worksheets) - 1
        except SHEET_ERRORS as error:
            reason = file_fault(table) or str(error)[:80]
            raise DataError(
                f"{table.name} of {table.parent.name} is not a readable .xlsx file ({reason}): save it again"
            ) from error


def _header(sheet: Any) -> tuple[int, tuple[Any, ...]]:
    """The first line that is not blank, with its number."""
    lines = enumerate(sheet.iter_rows(values_only=True), 1)
    return next(((number, cells) for number, cells in lines if not all(is_missing(cell) for cell in cells)), (1, ()))


def _coco_rows(content: Mapping[str, Any]) -> Iterator[TableRow]:
    """One row per image with all its captions, then the annotations of unknown images."""
    captions: dict[Any, list[Any]] = {}
    for number, each in enumerate(content["annotations"]):
        if isinstance(each, dict):
            captions.setdefault(_number(each.get("image_id")), []).append(each.get("caption"))
        else:
            yield f"annotation {number}", "it is not an object"
    for number, image in enumerate(content["images"]):
        if not isinstance(image, dict):
            yield f"image {number}", "it is not an object"
            continue
        fields = {name: image[name] for name in ("coco_url", "flickr_url", "width", "height") if name in image}
        own = captions.pop(_number(image.get("id")), [])
        yield f"image {number}", {"file_name": image.get("file_name"), **fields, "captions": own}
    for name, lost in captions.items():
        for _ in lost:
            yield f"annotation of image {name}", "no image has this number"


def _number(value: object) -> str | int | float:
    """An image's number as a key; a value that is none, such as a list, as JSON."""
    return value if isinstance(value, str | int | float) else json.dumps(value)


def _split_rows(images: list[Any]) -> Iterator[TableRow]:
    for number, image in enumerate(images):
        if not isinstance(image, dict):
            yield f"image {number}", "it is not an object"
            continue
        texts = image.get("sentences") or image.get("captions") or image.get("caption") or []
        if isinstance(texts, list):
            texts = [each.get("raw") if isinstance(each, dict) else each for each in texts]
        folder, name = image.get("filepath"), image.get("filename") or image.get("file_name")
        file = f"{folder}/{name}" if folder and name else name
        kept = {key: value for key, value in image.items() if key in ("split", "imgid", "cocoid")}
        yield f"image {number}", {"file_name": file, **kept, "captions": texts}
