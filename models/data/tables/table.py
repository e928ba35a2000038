"""One table of any kind as rows of JSON values, with its columns chosen and its guesses said."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.data.folders.files import real_path
from models.data.samples import Reading
from models.data.tables.arrow import ArrowTable
from models.data.tables.columns import CellTypes, Columns, choose_columns
from models.data.tables.delimited import TextForm, detect_form, read_records
from models.data.tables.documents import TableRow, json_lines, read_document, sheet_header, sheet_records
from models.errors import DataError

TEXT_KINDS = (".csv", ".tsv", ".tab", ".txt", ".token")
LINE_KINDS = (".jsonl", ".ndjson")
KINDS = (*TEXT_KINDS, *LINE_KINDS, ".json", ".parquet", ".arrow", ".feather", ".xlsx")


@dataclass(frozen=True, slots=True)
class Table:
    """A table whose columns are known.

    label: for messages.  columns: of each role.  rows: reads all rows anew.
    types: of text cells, to be shown every row first; None where values have types of their own.
    notes: what was guessed.
    """

    path: Path
    label: str
    columns: Columns
    rows: Callable[[], Iterable[TableRow]]
    types: CellTypes | None = None
    notes: list[str] = field(default_factory=list)


def open_table(path: Path, reading: Reading) -> Table:
    """Open a table and choose its columns. Raises DataError where that fails for all of it."""
    label = f"{path.name} of {real_path(path).parent.name}"
    kind = path.suffix.lower()
    try:
        if kind in (".parquet", ".arrow", ".feather"):
            return _arrow_table(path, label, reading)
        if kind == ".xlsx":
            return _sheet_table(path, label, reading)
        if kind == ".json":
            found, what = read_document(path)
            columns = _chosen(_names_of(found), reading, label)
            return Table(path, label, columns, lambda: found, notes=[f"taken for {what}"])
        if kind in LINE_KINDS:
            columns = _chosen(_names_of(json_lines(path)), reading, label)
            return Table(path, label, columns, lambda: json_lines(path), notes=_said(columns, reading))
        return _text_table(path, label, reading)
    except OSError as error:
        raise DataError(f"{label} cannot be read ({error.strerror}): grant permission, or write it again") from error


def _chosen(names: list[str], reading: Reading, label: str, images: list[str] | None = None) -> Columns:
    return choose_columns(
        names, reading.columns, images=images or (), caption_needed=reading.caption is None, label=label
    )


def _said(columns: Columns, reading: Reading) -> list[str]:
    """A note on the columns, unless they have the names that the reference gives them."""
    plain = columns.image in ("file", "filepath") and columns.caption in ("caption", "captions", "")
    return [] if plain or (reading.caption and columns.image in ("file", "filepath")) else [columns.spoken()]


def _names_of(rows: Iterable[TableRow]) -> list[str]:
    """Every field that any row has, the commonest first; those of one row keep their order."""
    names = Counter[str]()
    for _, row in rows:
        if not isinstance(row, str):
            names.update(row.keys())
    return [name for name, _ in names.most_common()]


def _arrow_table(path: Path, label: str, reading: Reading) -> Table:
    table = ArrowTable(path)
    columns = _chosen(table.names, reading, label, table.images)
    table.leave_out([name for name in table.images if name != columns.image], "further images")
    if columns.image in table.images and not columns.id and "key" in table.names:
        columns = Columns(columns.image, columns.caption, "key")  # as img2dataset writes it

    def rows() -> Iterator[TableRow]:
        yield from ((f"row {row}", fields) for row, fields in enumerate(table.rows()))

    return Table(path, label, columns, rows, notes=[*_said(columns, reading), *table.notes])


def _text_table(path: Path, label: str, reading: Reading) -> Table:
    form = detect_form(path)
    columns = _chosen(list(dict.fromkeys(form.names)), reading, label)
    rows = _named_rows(form.names, max(form.header, 1), columns, lambda: read_records(path, form))
    return Table(path, label, columns, rows, CellTypes(), [*_form_notes(form, path), *_said(columns, reading)])


def _sheet_table(path: Path, label: str, reading: Reading) -> Table:
    names, header, note = sheet_header(path)
    columns = _chosen(list(dict.fromkeys(names)), reading, label)
    rows = _named_rows(names, header, columns, lambda: sheet_records(path, len(names)))
    return Table(path, label, columns, rows, notes=[note, *_said(columns, reading)])


def _named_rows(
    names: Sequence[str], header: int, columns: Columns, records: Callable[[], Iterable[tuple[int, list[Any] | str]]]
) -> Callable[[], Iterator[TableRow]]:
    """Lines of cells as rows of named fields, without the columns that the header names twice.

    header: its line.  A line whose image, caption or id is in such a column is a reject.
    """
    twice = [name for name, count in Counter(names).items() if count > 1]
    needed = sorted({columns.image, columns.caption, columns.id} & set(twice))

    def rows() -> Iterator[TableRow]:
        if twice:
            yield f"line {header}", f"the header names {', '.join(map(repr, twice))} twice: neither is read"
        for number, cells in records():
            if isinstance(cells, str):
                yield f"line {number}", cells
            elif needed:
                yield f"line {number}", f"the header names {', '.join(map(repr, needed))} twice"
            else:
                yield f"line {number}", {n: cell for n, cell in zip(names, cells, strict=True) if n not in twice}

    return rows


def _form_notes(form: TextForm, path: Path) -> list[str]:
    notes = []
    if form.guessed:
        notes.append(f"it is not UTF-8: read as {form.encoding}, a guess")
    usual = "\t" if path.suffix.lower() in (".tsv", ".tab", ".token") else ","
    if form.delimiter != usual and len(form.names) > 1:
        notes.append(f"fields end at {'a tab' if form.delimiter == chr(9) else form.delimiter!r}")
    if not form.header:
        notes.append("the first line names an image: there is no header")
    return notes
