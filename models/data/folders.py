"""Reader of an image folder with one table of captions."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from index_store.build.source import Reject
from models.data.samples import MAX_BYTES, Sample, UnusableItem, clean_caption, fill_template
from models.data.tables import FILE_COLUMNS, read_rows


def read_folder(table: Path, template: str | None, skip: int) -> Iterator[Sample | Reject]:
    """Read one item per row of the table.

    A file outside the folder, by its path or through a link, is never opened.
    template: of the caption, or None for the column "caption".  skip: the first items come without
    their image, which is not read.
    """
    folder = table.parent.resolve()
    for number, (position, row) in enumerate(read_rows(table, needs=() if template else ("caption",))):
        name = position
        try:
            if isinstance(row, str):
                raise UnusableItem(row)
            column = next((column for column in FILE_COLUMNS if column in row), FILE_COLUMNS[0])
            name = str(row.get(column) or position)
            yield _read_sample(folder, column, row, template, with_image=number >= skip)
        except UnusableItem as error:
            yield Reject(name, str(error))


def _read_sample(folder: Path, column: str, row: dict[str, Any], template: str | None, *, with_image: bool) -> Sample:
    """The sample of one row.

    Without an id of its own its id is the file's name; with one, the file's name is metadata.
    """
    name, own_id = row.get(column), _id_text(row.get("id"))
    if not isinstance(name, str):
        raise UnusableItem("no file is named")
    path = _path_within(folder, name)
    caption = clean_caption(row.get("caption")) if template is None else fill_template(template, row)
    used = {"id", "caption"} if own_id else {"id", "caption", column}
    metadata = {field: value for field, value in row.items() if field not in used}
    return Sample(own_id or name, _read_bytes(path) if with_image else b"", caption, metadata)


def _id_text(value: object) -> str:
    """The user's id as text. 7.0 becomes "7": a column of integers with gaps is read as floats."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None else str(value)


def _path_within(folder: Path, name: str) -> Path:
    """The resolved path of a file inside the folder. Raises UnusableItem for any other."""
    try:
        path = (folder / name).resolve(strict=True)
        if not path.is_relative_to(folder) or not path.is_file():
            raise UnusableItem("it is not a file within the folder")
        if path.stat().st_size > MAX_BYTES:
            raise UnusableItem(f"{path.stat().st_size} bytes, the limit is {MAX_BYTES}")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise _unreadable(error) from error
    return path


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(error) from error


def _unreadable(error: Exception) -> UnusableItem:
    return UnusableItem(f"the file cannot be read ({getattr(error, 'strerror', None) or 'no such name'})")
