"""Rows of parquet and arrow files (as `save_to_disk` of Hugging Face writes) as JSON values."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.data.folders.files import file_fault
from models.data.tables.arrow_values import json_value, to_microseconds
from models.encoder.image_io.formats import IMAGE_ENDINGS
from models.errors import DataError

BATCH_ROWS = 1024  # rows held in memory at a time
IMAGE_BATCH_ROWS = 64  # where rows hold image bytes
VECTOR_WIDTH = 16  # a list of at least so many floats is a vector, not a value for people
MAX_INTEGER = 2**63 - 1  # of an integer id
PICTURE_NAMES = {"image", "img", "photo", "picture", "image_bytes", "image_data", *IMAGE_ENDINGS}


class ArrowTable:
    """One parquet or arrow file, opened; its rows are read in bounded memory.

    names: of the columns that become values.  images: columns with image bytes, or with the
    mapping {"bytes", "path"} that Hugging Face writes.  notes: columns that are left out, and why.
    """

    def __init__(self, path: Path, vectors: Sequence[str] = ()) -> None:
        """vectors: columns that `blocks` gives as they are. Raises DataError."""
        self.path, self._vectors = path, list(vectors)
        self.schema = _read_schema(path)
        self._labels = _class_labels(self.schema)
        self.notes: list[str] = [f"{name}: its numbers are replaced by the class names" for name in self._labels]
        self.names = column_names(path)
        if repeated := [name for name, count in Counter(self.schema.names).items() if count > 1]:
            self.notes.append(f"{', '.join(repeated)}: the name of several columns, none of them is read")
        fields = [self.schema.field(name) for name in self.names]
        self.images = [field.name for field in fields if _is_image(field)]
        self._broken: set[str] = set()
        others = [each for each in fields if each.name not in {*self.images, *vectors}]
        binary = self._without_text([each.name for each in others if _is_binary(each.type)])
        left_out = [each.name for each in others if _is_vector(each.type) or _nests_binary(each.type)]
        self.leave_out([name for name in self.names if name in {*left_out, *binary}], "vectors or bytes")
        self.names = [name for name in self.names if name not in vectors]

    def leave_out(self, names: Sequence[str], what: str) -> None:
        """Leave columns out of the rows, with a note.  what: they hold."""
        if names:
            self.names = [name for name in self.names if name not in names]
            self.images = [name for name in self.images if name not in names]
            self.notes.append(f"{', '.join(names)}: {what}, left out of the metadata")

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows; image columns as they are, all others as JSON values. Raises DataError."""
        for rows, _ in self.blocks(IMAGE_BATCH_ROWS if self.images else BATCH_ROWS):
            yield from rows

    def blocks(self, size: int) -> Iterator[tuple[list[dict[str, Any]], dict[str, Any]]]:
        """The rows in blocks of at most `size`, with the arrow columns of the vectors.

        Raises DataError.
        """
        import pyarrow as pa

        try:
            for block in self._blocks(size, [*self.names, *self._vectors]):
                columns = [self._values(name, block.column(name)) for name in self.names]
                rows = [dict(zip(self.names, row, strict=True)) for row in zip(*columns, strict=True)]
                yield rows or [{} for _ in range(len(block))], {name: block.column(name) for name in self._vectors}
        except (pa.ArrowException, OSError, ValueError) as error:
            raise unreadable(self.path, error) from error

    def _without_text(self, names: list[str]) -> list[str]:
        """The binary columns whose first rows are no UTF-8 text; some programs write text so."""
        import pyarrow as pa

        if not names:
            return []
        try:
            block = next(self._blocks(IMAGE_BATCH_ROWS, names), None)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise unreadable(self.path, error) from error
        values = {name: [] if block is None else block.column(name).to_pylist() for name in names}
        return [name for name in names if any(each and json_value(each) is None for each in values[name])]

    def _blocks(self, size: int, names: Sequence[str]) -> Iterator[Any]:
        import pyarrow as pa

        if _is_parquet(self.path):
            yield from _open_parquet(self.path).iter_batches(size, columns=list(names))
            return
        with pa.memory_map(str(self.path)) as file:
            reader: Any = _arrow_reader(file)
            for block in reader:
                block.validate(full=True)  # offsets of a damaged file would be read beyond its end
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
    """The column names of a file that come once, without the index column that pandas adds."""
    counts = Counter(_read_schema(table).names)
    return [name for name, count in counts.items() if count == 1 and not name.startswith("__index_level_")]


def is_integer_column(table: Path, column: str) -> bool:
    """Whether every value of a column of a parquet file is an integer of 64 signed bits."""
    import pyarrow as pa
    from pyarrow import compute

    kind = _read_schema(table).field(column).type
    if not pa.types.is_uint64(kind):
        return bool(pa.types.is_integer(kind))
    largest = (compute.max(block.column(0)).as_py() for block in _open_parquet(table).iter_batches(columns=[column]))
    return all(value is None or value <= MAX_INTEGER for value in largest)


def vector_rows(column: Any, width: int) -> np.ndarray:
    """(R, width) float32 of a column of lists; NaN where there is none of this width."""
    from pyarrow import compute

    fits = compute.equal(compute.list_value_length(column), width).fill_null(False)
    fits = compute.and_(fits, column.is_valid())
    rows = np.full((len(column), width), np.nan, np.float32)
    values = column.filter(fits).flatten()
    rows[fits.to_numpy(zero_copy_only=False)] = values.to_numpy(zero_copy_only=False).reshape(-1, width)
    return rows


def vector_width(column: Any) -> int | None:
    """The commonest length of the lists of a column; None where there is none."""
    from pyarrow import compute

    lengths = compute.mode(compute.list_value_length(column))
    return int(lengths[0]["mode"].as_py()) if len(lengths) else None


def is_vector_column(table: Path, column: str) -> bool:
    """Whether a column of a parquet file holds lists of numbers."""
    import pyarrow as pa

    kind = _read_schema(table).field(column).type
    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(listed and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)))


def unreadable(table: Path, error: Exception) -> DataError:
    """The error of a file that is damaged, or not what its ending says."""
    reason = file_fault(table) or " ".join(str(error).replace(str(table), table.name).split())[:160]
    kind = "parquet" if _is_parquet(table) else "arrow"
    return DataError(f"{table.name} of {table.parent.name} is not a readable {kind} file ({reason}): write it again")


def _is_parquet(table: Path) -> bool:
    return table.suffix.lower() == ".parquet"


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

    try:
        if _is_parquet(path):
            schema = _open_parquet(path).schema_arrow
        else:
            with pa.memory_map(str(path)) as file:
                schema = _arrow_reader(file).schema
        _decode_names(schema)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise unreadable(path, error) from error
    return schema


def _decode_names(fields: Iterable[Any]) -> None:
    """Raise UnicodeDecodeError where a name, nested ones included, is not UTF-8."""
    for field in fields:
        field.name  # noqa: B018  pyarrow decodes it here
        _decode_names(field.type.field(i) for i in range(field.type.num_fields))


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


def _nests_binary(kind: Any) -> bool:
    """Whether a list or a struct holds bytes at any depth, such as a list of images."""
    inner = [kind.field(i).type for i in range(kind.num_fields)]
    return any(_is_binary(each) or _nests_binary(each) for each in inner)


def _is_vector(kind: Any) -> bool:
    """A list of floats that is no value for people: every fixed-size list, or one of any size."""
    import pyarrow as pa

    if pa.types.is_fixed_size_list(kind):
        return bool(pa.types.is_floating(kind.value_type) and kind.list_size >= VECTOR_WIDTH)
    return bool((pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_floating(kind.value_type))
