"""A folder of images with one table of captions, as a stream of samples and rejects."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from index_store.build.source import Reject
from models.data.samples import MAX_BYTES, Sample, Unusable, filled, said
from models.data.tables import FILE_COLUMNS, rows_of


def read_folder(table: Path, template: str | None, skip: int) -> Iterator[Sample | Reject]:
    """One item per row. A file outside the folder, by name or by link, is never opened.  skip: items passed over, their files unread."""
    folder = table.parent.resolve()
    for number, (where, row) in enumerate(rows_of(table, needs=() if template else ("caption",))):
        name = where
        try:
            if isinstance(row, str):
                raise Unusable(row)
            column = next((column for column in FILE_COLUMNS if column in row), FILE_COLUMNS[0])
            name = str(row.get(column) or where)
            yield _sample(folder, column, row, template, bare=number < skip)
        except Unusable as error:
            yield Reject(name, str(error))


def _sample(folder: Path, column: str, row: dict[str, Any], template: str | None, *, bare: bool) -> Sample:
    """One row as a sample. Where it has an id of its own, the file's name is metadata like any other; else it is the id."""
    name, given = row.get(column), _name(row.get("id"))
    if not isinstance(name, str):
        raise Unusable("no file is named")
    path = _inside(folder, name)
    caption = said(row.get("caption")) if template is None else filled(template, row)
    told = {"id", "caption"} if given else {"id", "caption", column}
    return Sample(
        given or name, b"" if bare else _bytes(path), caption, {field: row[field] for field in row if field not in told}
    )


def _name(given: object) -> str:
    """The user's id as text: a column of numbers with gaps is read as 7.0, and means 7."""
    if isinstance(given, float) and given.is_integer():
        given = int(given)
    return "" if given is None else str(given)


def _inside(folder: Path, name: str) -> Path:
    """The path of a file that really lies in the folder."""
    try:
        path = (folder / name).resolve(strict=True)
        if not path.is_relative_to(folder) or not path.is_file():
            raise Unusable("it is not a file within the folder")
        if path.stat().st_size > MAX_BYTES:
            raise Unusable(f"{path.stat().st_size} bytes, the limit is {MAX_BYTES}")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise _unreadable(error) from error
    return path


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(error) from error


def _unreadable(error: Exception) -> Unusable:
    return Unusable(f"the file cannot be read ({getattr(error, 'strerror', None) or 'no such name'})")
