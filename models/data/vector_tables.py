"""Reader of parquet files with vector columns, as vector databases export them.

Alphabet: N rows of a file, R rows in a block, D width.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from index_store.types import Side
from models.data.clip_retrieval import EmbeddingFolder, check_width
from models.data.embedding_files import BLOCK_ROWS, Block, choose_id_column
from models.data.tables.arrow import (
    ArrowTable,
    column_names,
    count_rows,
    is_vector_column,
    vector_rows,
    vector_width,
)
from models.errors import DataError

ID_COLUMNS = ("id", "_id", "key", "pk", "image_path", "url")
UNIT_TOLERANCE = 1e-2  # of a vector's length, for float16 exports


@dataclass(frozen=True, slots=True)
class VectorFile:
    """One parquet file.

    columns: the vector column of each side that there is.  rows: N.  width: D.
    """

    path: Path
    columns: Mapping[Side, str]
    rows: int
    width: int

    @property
    def files(self) -> Mapping[str, Path]:
        """The one file."""
        return {"metadata": self.path}

    @property
    def sides(self) -> list[Side]:
        """The sides that have vectors."""
        return list(self.columns)

    def blocks(self) -> Iterator[Block]:
        """The rows in blocks; a vector that is missing or of another width is NaN."""
        for fields, vectors in self.table().blocks(BLOCK_ROWS):
            yield fields, {side: vector_rows(vectors[column], self.width) for side, column in self.columns.items()}

    def table(self) -> ArrowTable:
        """The file, opened, without images in its rows."""
        table = ArrowTable(self.path, list(self.columns.values()))
        table.leave_out(table.images, "image bytes")
        return table


def read_vector_table(
    path: Path, columns: Mapping[Side, str], *, dim: int, encoder: str, id_column: str | None = None
) -> tuple[EmbeddingFolder, list[str]]:
    """The vectors of one parquet file or of a folder of them, and notes on what was found.

    columns: the vector column of each side; without one of the text the captions are encoded.
    dim, encoder: the width and fingerprint of the encoder in use.
    Raises DataError where a column is missing, holds no vectors or those of another width.
    """
    files = [path] if path.is_file() else sorted(each for each in path.glob("*") if each.suffix.lower() == ".parquet")
    if not files:
        raise DataError(f"{path.name} is no parquet file, and holds none: name one")
    if columns["image"] == columns.get("text"):
        raise DataError(
            f"the column {columns['image']!r} cannot hold the vectors of both the images and the texts: leave out "
            "--text-vector, and the captions are encoded"
        )
    for file in files:
        _check_columns(file, columns)
    chosen, integers = choose_id_column(files, id_column, ID_COLUMNS, columns.values())
    parts = [VectorFile(file, columns, count_rows(file), dim) for file in files]
    notes = [f"image = {columns['image']}, text = {columns.get('text', 'the caption, encoded here')}, id = {chosen}"]
    notes += [note for part in parts for note in (*part.table().notes, *_check_first_block(part, encoder))]
    return EmbeddingFolder(path.name, parts, chosen, integers), notes


def _check_columns(path: Path, columns: Mapping[Side, str]) -> None:
    """Raise DataError where a vector column is missing or holds anything but lists of numbers."""
    names = column_names(path)
    for side, column in columns.items():
        if column not in names:
            raise DataError(f"{path.name} has no column {column!r}, only {', '.join(names)}: correct --{side}-vector")
        if not is_vector_column(path, column):
            raise DataError(f"{path.name}, column {column}, holds no lists of numbers: correct --{side}-vector")


def _check_first_block(part: VectorFile, encoder: str) -> list[str]:
    """Notes on vectors that are not of unit length. Raises DataError for those of another width."""
    notes = []
    _, vectors = next(part.table().blocks(BLOCK_ROWS), ([], {}))
    for side, column in part.columns.items():
        if column not in vectors:  # a file without rows
            continue
        width = vector_width(vectors[column])
        if width is not None:
            check_width(f"{part.path.name}, column {column},", width, part.width, encoder)
        lengths = np.linalg.norm(vector_rows(vectors[column], part.width), axis=1)
        off = int((np.abs(lengths - 1) > UNIT_TOLERANCE).sum())
        if off:
            notes.append(
                f"{part.path.name}: {off} of the first {len(lengths)} {side} vectors are not of unit length; "
                "all are scaled to it"
            )
    return notes
