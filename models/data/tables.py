"""Reader of tables of captions or metadata, in CSV, JSON lines or Parquet, as JSON values.

Rows are read in bounded memory.
"""

import base64
import csv
import datetime
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from models.data.samples import UnusableItem, parse_json_object
from models.errors import DataError

TABLES = ("captions.csv", "captions.jsonl", "captions.parquet")
FILE_COLUMNS = ("file", "filepath")
BATCH_ROWS = 1024  # rows of a parquet file held in memory at a time
TableRow = tuple[str, dict[str, Any] | str]  # (its position such as "line 4", its fields or why it has none)


def find_table(folder: Path) -> Path | None:
    """The table of captions in a folder. DataError where there is more than one."""
    tables = [folder / name for name in TABLES if (folder / name).is_file()]
    if len(tables) > 1:
        raise DataError(
            f"{folder.resolve().name} holds {' and '.join(path.name for path in tables)}: keep the one that is meant"
        )
    return tables[0] if tables else None


def read_rows(table: Path, *, needs: tuple[str, ...] = ()) -> Iterator[TableRow]:
    """Read every row of a table. Raises DataError.

    needs: columns that a CSV or Parquet table must have, beside one of FILE_COLUMNS.
    """
    label = f"{table.name} of {table.parent.name}"
    try:
        if table.suffix == ".csv":
            yield from _csv_rows(table, label, needs)
        elif table.suffix == ".jsonl":
            yield from _json_rows(table)
        else:
            _check_columns(label, _open_parquet(table).schema_arrow.names, needs)
            yield from ((f"row {row}", fields) for row, fields in enumerate(parquet_rows(table)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{label} cannot be read ({reason}): write it again, as UTF-8") from error


def count_rows(table: Path) -> int:
    """The number of rows of a parquet file, from its footer."""
    return int(_open_parquet(table).metadata.num_rows)


def column_names(table: Path) -> list[str]:
    """The column names of a parquet file, without the index column that pandas adds."""
    return [name for name in _open_parquet(table).schema_arrow.names if not name.startswith("__index_level_")]


def is_integer_column(table: Path, column: str) -> bool:
    """Whether a column of a parquet file has an integer type."""
    import pyarrow as pa

    return bool(pa.types.is_integer(_open_parquet(table).schema_arrow.field(column).type))


def parquet_rows(table: Path, batch: int = BATCH_ROWS) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file as JSON values (`json_value`). Raises DataError."""
    import pyarrow as pa

    names = column_names(table)
    try:
        for block in _open_parquet(table).iter_batches(batch, columns=names):
            columns = [
                [json_value(value) for value in _to_microseconds(column).to_pylist()] for column in block.columns
            ]
            yield from (dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _unreadable(table, error) from error


def json_value(value: Any) -> Any:
    """A value of a parquet file as a JSON value.

    NaN and infinity become null, dates and times ISO text, bytes their UTF-8 text or base64; lists
    and mappings are converted item by item.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(name): json_value(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(inner) for inner in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, bytes):
        return _bytes_text(value)
    return str(value)  # decimal.Decimal and any other type


def _bytes_text(value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return base64.b64encode(value).decode("ascii")


def _to_microseconds(column: Any) -> Any:
    """Cast nanosecond timestamps, which pandas writes and Python's datetime cannot represent."""
    import pyarrow as pa

    if pa.types.is_timestamp(column.type) and column.type.unit == "ns":
        return column.cast(pa.timestamp("us", column.type.tz), safe=False)
    return column


def _open_parquet(table: Path) -> Any:
    """Open a parquet file; its footer is read, its rows are not."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(table)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(table, error) from error


def _unreadable(table: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).replace(str(table), table.name).split())[:160]
    return DataError(f"{table.name} of {table.parent.name} is not a readable parquet file ({reason}): write it again")


def _csv_rows(table: Path, label: str, needs: tuple[str, ...]) -> Iterator[TableRow]:
    with table.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, restkey="", restval="")
        _check_columns(label, list(rows.fieldnames or ()), needs)
        for row in rows:
            row.pop("", None)  # cells beyond the header
            yield f"line {rows.line_num}", row


def _json_rows(table: Path) -> Iterator[TableRow]:
    with table.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield f"line {number}", parse_json_object(line.removeprefix(b"\xef\xbb\xbf"))
            except UnusableItem as error:
                yield f"line {number}", str(error)


def _check_columns(label: str, names: list[str], needs: tuple[str, ...]) -> None:
    if not set(FILE_COLUMNS) & set(names) or not set(needs) <= set(names):
        raise DataError(f"{label} has the columns {names}: file (or filepath) and caption are needed")
