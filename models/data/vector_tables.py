"""Reader of parquet files with vector columns, as vector databases export them.

Alphabet: N rows of a file, R rows in a block, D width.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from index_store.types import SIDES, Side
from models.data.clip_retrieval import EmbeddingFolder, check_width
from models.data.embedding_files import BLOCK_ROWS, Block
from models.data.tables.arrow import ArrowTable, count_rows, is_integer_column
from models.errors import DataError

ID_COLUMNS = ("id", "_id", "key", "pk", "image_path", "url")
UNIT_TOLERANCE = 1e-2  # of a vector's length, for float16 exports


@dataclass(frozen=True, slots=True)
class VectorFile:
    """One parquet file.  columns: the vector column of each side that there is."""

    path: Path
    columns: Mapping[Side, str]
    rows: int
    names: Sequence[str]

    @property
    def files(self) -> Mapping[str, Path]:
        """The one file."""
        return {"metadata": self.path}

    def blocks(self) -> Iterator[Block]:
        """The rows in blocks; a row without a vector has one of NaN, and is rejected later."""
        table = ArrowTable(self.path, vectors=list(self.columns.values()))
        batch: list[dict[str, Any]] = []
        for row in table.rows(BLOCK_ROWS):
            batch.append(row)
            if len(batch) == BLOCK_ROWS:
                yield self._split(batch)
                batch = []
        if batch:
            yield self._split(batch)

    def _split(self, rows: list[dict[str, Any]]) -> Block:
        vectors: dict[Side, np.ndarray] = {}
        for side, column in self.columns.items():
            given = [row.pop(column, None) for row in rows]
            width = max((len(each) for each in given if isinstance(each, list)), default=1)
            lost = [float("nan")] * width
            fits = [each if isinstance(each, list) and len(each) == width else lost for each in given]
            vectors[side] = np.array([[np.nan if x is None else x for x in each] for each in fits], np.float32)
        return rows, vectors


def read_vector_table(
    path: Path, columns: Mapping[Side, str], *, dim: int, encoder: str, id_column: str | None = None
) -> tuple[EmbeddingFolder, list[str]]:
    """The vectors of one parquet file or of a folder of them, and notes on what was found.

    columns: the vector column of each side; without one of the text the captions are encoded.
    dim, encoder: the width and fingerprint of the encoder in use.
    Raises DataError where a column is missing or of another width.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.parquet"))
    if not files:
        raise DataError(f"{path.name} is no parquet file, and holds none: name one")
    parts = [_open_file(file, columns, dim, encoder) for file in files]
    common = set.intersection(*(set(part.names) for part in parts))
    if id_column is not None and id_column not in common:
        raise DataError(f"{path.name} has no column {id_column!r}, only {', '.join(sorted(common))}: choose --id")
    chosen = id_column or next((name for name in ID_COLUMNS if name in common), None)
    integers = chosen is None or all(is_integer_column(part.path, chosen) for part in parts)
    notes = [f"image = {columns['image']}, text = {columns.get('text', 'the caption, encoded here')}, id = {chosen}"]
    return EmbeddingFolder(path.name, parts, chosen, integers), notes + _check_lengths(parts)


def _open_file(path: Path, columns: Mapping[Side, str], dim: int, encoder: str) -> VectorFile:
    table = ArrowTable(path, vectors=list(columns.values()))
    for side in SIDES:
        if side in columns and columns[side] not in table.names:
            raise DataError(
                f"{path.name} has no column {columns[side]!r}, only {', '.join(table.names)}: correct --{side}-vector"
            )
    part = VectorFile(path, columns, count_rows(path), table.names)
    _, vectors = next(part.blocks(), ([], {}))
    for side, rows in vectors.items():
        check_width(f"{path.name}, column {columns[side]},", rows.shape[1], dim, encoder)
    return part


def _check_lengths(parts: Sequence[VectorFile]) -> list[str]:
    """A note where the first block of any file holds vectors that are not of unit length."""
    notes = []
    for part in parts:
        _, vectors = next(part.blocks(), ([], {}))
        for side, rows in vectors.items():
            lengths = np.linalg.norm(rows, axis=1)
            off = int((np.abs(lengths - 1) > UNIT_TOLERANCE).sum())
            if off:
                notes.append(
                    f"{part.path.name}: {off} of the first {len(rows)} {side} vectors are not of unit length; "
                    "all are scaled to it"
                )
    return notes
