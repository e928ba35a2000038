"""Rows of parquet and arrow files (as `save_to_disk` of Hugging Face writes) as JSON values."""

import base64
import datetime
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from models.data.folders.files import file_fault
from models.data.samples import IMAGE_KINDS
from models.errors import DataError

BATCH_ROWS = 1024  # rows held in memory at a time
IMAGE_BATCH_ROWS = 64  # where rows hold image bytes
VECTOR_WIDTH = 16  # a list of at least so many floats is a vector, not a value for people
PICTURE_NAMES = {"image", "img", "photo", "picture", "image_bytes", "image_data", *IMAGE_KINDS}


class ArrowTable:
    """One parquet or arrow file, opened; its rows are read in bounded memory.

    names: of the columns that become values.  images: columns with image bytes, or with the
    mapping {"bytes", "path"} that Hugging Face writes.  notes: columns that are left out, and why.
    """

    def __init__(self, path: Path, vectors: Sequence[str] = ()) -> None:
        """vectors: columns of vectors that are wanted all the same. Raises DataError."""
        self.path = path
        self.schema = _read_schema(path)
        self._labels = _class_labels(self.schema)
        self.images = [field.name for field in self.schema if _is_image(field)]
        self.notes: list[str] = [f"{name}: its numbers are replaced by the class names" for name in self._labels]
        self.names = [name for name in self.schema.names if not name.startswith("__index_level_")]
        left_out = [
            field.name for field in self.schema if _is_vector(field.type) or _is_stray_binary(field, self.images)
        ]
        self._broken: set[str] = set()
        if dropped := [name for name in left_out if name in self.names and name not in vectors]:
            self.names = [name for name in self.names if name not in dropped]
            self.notes.append(f"{', '.join(dropped)}: vectors or bytes, left out of the metadata")

    def rows(self, batch: int | None = None) -> Iterator[dict[str, Any]]:
        """The rows; image columns as they are, all others as JSON values. Raises DataError."""
        import pyarrow as pa

        size = batch or (IMAGE_BATCH_ROWS if self.images else BATCH_ROWS)
        try:
            for block in self._blocks(size):
                columns = [self._values(name, block.column(name)) for name in self.names]
                yield from (dict(zip(self.names, row, strict=True)) for row in zip(*columns, strict=True))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise unreadable(self.path, error) from error

    def _blocks(self, size: int) -> Iterator[Any]:
        import pyarrow as pa

        if self.path.suffix == ".parquet":
            yield from _open_parquet(self.path).iter_batches(size, columns=self.names)
            return
        with pa.memory_map(str(self.path)) as file:
            reader: Any = _arrow_reader(file)
            for block in reader:
                for start in range(0, len(block), size):
                    yield block.slice(start, size)

    def _values(self, name: str, column: Any) -> list[Any]:
        """One column of a block; a column that cannot be read is null, and named in `notes`."""
        import pyarrow as pa

        if name in self.images:
            return list(column.to_pylist())
        try:
            values = [json_value(value) for value in to_microseconds(column).to_pylist()]
        except (pa.ArrowException, ValueError, TypeError, OverflowError, ImportError) as error:
            if name not in self._broken:
                self._broken.add(name)
                self.notes.append(f"{name}: {column.type} cannot be read ({str(error)[:80]}), left out")
            return [None] * len(column)
        names = self._labels.get(name)
        if names is None:
            return values
        return [names[value] if isinstance(value, int) and 0 <= value < len(names) else value for value in values]


def count_rows(table: Path) -> int:
    """The number of rows of a parquet file, from its footer."""
    return int(_open_parquet(table).metadata.num_rows)


def column_names(table: Path) -> list[str]:
    """The column names of a parquet file, without the index column that pandas adds."""
    return [name for name in _read_schema(table).names if not name.startswith("__index_level_")]


def is_integer_column(table: Path, column: str) -> bool:
    """Whether a column of a parquet file has an integer type."""
    import pyarrow as pa

    return bool(pa.types.is_integer(_read_schema(table).field(column).type))


def parquet_rows(table: Path, batch: int = BATCH_ROWS) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file as JSON values, without vectors. Raises DataError."""
    return ArrowTable(table).rows(batch)


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


def to_microseconds(column: Any) -> Any:
    """Cast nanosecond times, which pandas writes and Python's datetime cannot represent."""
    import pyarrow as pa

    kind = column.type
    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        return column.cast(pa.timestamp("us", kind.tz), safe=False)
    if pa.types.is_duration(kind) and kind.unit == "ns":
        return column.cast(pa.duration("us"), safe=False)
    if pa.types.is_time64(kind) and kind.unit == "ns":
        return column.cast(pa.time64("us"), safe=False)
    return column


def unreadable(table: Path, error: Exception) -> DataError:
    """The error of a file that is damaged, or not what its ending says."""
    reason = file_fault(table) or " ".join(str(error).replace(str(table), table.name).split())[:160]
    kind = "parquet" if table.suffix == ".parquet" else "arrow"
    return DataError(f"{table.name} of {table.parent.name} is not a readable {kind} file ({reason}): write it again")


def _open_parquet(table: Path) -> Any:
    """Open a parquet file; its footer is read, its rows are not."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(table)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(table, error) from error


def _read_schema(path: Path) -> Any:
    import pyarrow as pa

    if path.suffix == ".parquet":
        return _open_parquet(path).schema_arrow
    try:
        with pa.memory_map(str(path)) as file:
            return _arrow_reader(file).schema
    except (pa.ArrowException, OSError) as error:
        raise unreadable(path, error) from error


def _arrow_reader(file: Any) -> Any:
    """A reader of the stream format that Hugging Face writes, or of the file format of Feather."""
    import pyarrow as pa

    try:
        return pa.ipc.open_stream(file)
    except pa.ArrowInvalid:
        file.seek(0)
        reader = pa.ipc.open_file(file)
        return pa.RecordBatchReader.from_batches(
            reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches))
        )


def _class_labels(schema: Any) -> dict[str, list[str]]:
    """The class names of integer columns that Hugging Face's `ClassLabel` describes."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            name: list(each["names"])
            for name, each in features.items()
            if isinstance(each, dict) and each.get("_type") == "ClassLabel" and each.get("names")
        }
    except (KeyError, TypeError, ValueError):
        return {}


def _is_binary(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _is_image(field: Any) -> bool:
    """A column of image bytes: Hugging Face's struct, or bytes under the name of an image."""
    import pyarrow as pa

    if pa.types.is_struct(field.type):
        return any(inner.name == "bytes" and _is_binary(inner.type) for inner in field.type)
    return _is_binary(field.type) and field.name.lower() in PICTURE_NAMES


def _is_stray_binary(field: Any, images: Sequence[str]) -> bool:
    return field.name not in images and _is_binary(field.type) and field.name.lower().endswith(("image", "bytes"))


def _is_vector(kind: Any) -> bool:
    """A list of floats that is no value for people: every fixed-size list, or one of any size."""
    import pyarrow as pa

    if pa.types.is_fixed_size_list(kind):
        return bool(pa.types.is_floating(kind.value_type) and kind.list_size >= VECTOR_WIDTH)
    return bool((pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_floating(kind.value_type))


def _bytes_text(value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return base64.b64encode(value).decode("ascii")
