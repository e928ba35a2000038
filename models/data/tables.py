"""Rows of a table of captions or metadata, whichever of CSV, JSON lines and Parquet it is, as plain JSON, in bounded memory."""

import base64
import csv
import datetime
import decimal
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from models.data.samples import Unusable, parsed
from models.errors import DataError

TABLES = ("captions.csv", "captions.jsonl", "captions.parquet")
FILE_COLUMNS = ("file", "filepath")
BATCH_ROWS = 1024  # of a parquet file held at a time
Row = tuple[str, dict[str, Any] | str]  # how the row is called, and its fields or why it has none


def table_of(folder: Path) -> Path | None:
    """The one table of captions in a folder; DataError where there are several, since nothing says which is meant."""
    found = [folder / name for name in TABLES if (folder / name).is_file()]
    if len(found) > 1:
        raise DataError(
            f"{folder.resolve().name} holds {' and '.join(path.name for path in found)}: keep the one that is meant"
        )
    return found[0] if found else None


def rows_of(table: Path, *, needs: tuple[str, ...] = ()) -> Iterator[Row]:
    """Every row of a table. needs: columns without which the whole table is refused, beside one that names the file."""
    where = f"{table.name} of {table.parent.name}"
    try:
        if table.suffix == ".csv":
            yield from _csv_rows(table, where, needs)
        elif table.suffix == ".jsonl":
            yield from _json_rows(table)
        else:
            _check_columns(where, _parquet(table).schema_arrow.names, needs)
            yield from ((f"row {row}", fields) for row, fields in enumerate(parquet_rows(table)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{where} cannot be read ({reason}): write it again, as UTF-8") from error


def count_rows(table: Path) -> int:
    """How many rows a parquet file has, by its footer."""
    return int(_parquet(table).metadata.num_rows)


def columns_of(table: Path) -> list[str]:
    """The names of a parquet file's columns, without the one that pandas adds for its own index."""
    return [name for name in _parquet(table).schema_arrow.names if not name.startswith("__index_level_")]


def integer_column(table: Path, column: str) -> bool:
    """True where a column of a parquet file holds whole numbers."""
    import pyarrow as pa

    return bool(pa.types.is_integer(_parquet(table).schema_arrow.field(column).type))


def parquet_rows(table: Path, batch: int = BATCH_ROWS) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file as plain JSON: NaN is null, a time its ISO text, lists and mappings stay what they are."""
    import pyarrow as pa

    names = columns_of(table)
    try:
        for block in _parquet(table).iter_batches(batch, columns=names):
            columns = [[plain(value) for value in _microseconds(column).to_pylist()] for column in block.columns]
            yield from (dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _unreadable(table, error) from error


def plain(value: Any) -> Any:
    """A value of a parquet file as JSON knows it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, decimal.Decimal):
        return str(value)
    if isinstance(value, bytes):
        return _text(value)
    return str(value)


def _text(value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return base64.b64encode(value).decode("ascii")


def _microseconds(column: Any) -> Any:
    """pandas writes times in nanoseconds, which Python's own cannot hold."""
    import pyarrow as pa

    if pa.types.is_timestamp(column.type) and column.type.unit == "ns":
        return column.cast(pa.timestamp("us", column.type.tz), safe=False)
    return column


def _parquet(table: Path) -> Any:
    """The open file: its footer is read, its rows are not."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(table)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(table, error) from error


def _unreadable(table: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).replace(str(table), table.name).split())[:160]
    return DataError(f"{table.name} of {table.parent.name} is not a readable parquet file ({reason}): write it again")


def _csv_rows(table: Path, where: str, needs: tuple[str, ...]) -> Iterator[Row]:
    with table.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, restkey="", restval="")
        _check_columns(where, list(rows.fieldnames or ()), needs)
        for row in rows:
            row.pop("", None)  # cells beyond the header
            yield f"line {rows.line_num}", row


def _json_rows(table: Path) -> Iterator[Row]:
    with table.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield f"line {number}", parsed(line.removeprefix(b"\xef\xbb\xbf"))
            except Unusable as error:
                yield f"line {number}", str(error)


def _check_columns(where: str, names: list[str], needs: tuple[str, ...]) -> None:
    if not set(FILE_COLUMNS) & set(names) or not set(needs) <= set(names):
        raise DataError(f"{where} has the columns {names}: file (or filepath) and caption are needed")
