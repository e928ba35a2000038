"""The files of a clip-retrieval folder: parts by number, memory-mapped vectors, columns."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from index_store.types import SIDES, Side
from models.data.tables.arrow import ArrowTable, column_names, count_rows, is_integer_column
from models.errors import DataError

ID_COLUMNS = ("key", "image_path", "url")  # the first that exists holds the ids, else the row number is the id
BLOCK_ROWS = 4096
Block = tuple[list[dict[str, Any]], dict[Side, np.ndarray]]  # fields of R rows, and (R, D) of each side


@dataclass(frozen=True, slots=True)
class EmbeddingPart:
    """The two or three files with one number.

    files: by "image", "metadata", and "text" unless captions are to be encoded.
    rows: N, in each of them.  width: D.
    """

    files: Mapping[str, Path]
    rows: int
    width: int

    @property
    def sides(self) -> list[Side]:
        """The sides that have vectors."""
        return [side for side in SIDES if side in self.files]

    def blocks(self) -> Iterator[Block]:
        """The rows in blocks: fields, and vectors (R, D) of each side that there is."""
        table = ArrowTable(self.files["metadata"])
        table.leave_out(table.images, "image bytes")
        rows = table.rows()
        vectors: dict[Side, np.ndarray] = {side: _map_vectors(self.files[side]) for side in self.sides}
        for start in range(0, self.rows, BLOCK_ROWS):
            fields = list(islice(rows, min(BLOCK_ROWS, self.rows - start)))
            yield fields, {side: array[start : start + len(fields)] for side, array in vectors.items()}


def files_by_number(folder: Path, name: str, suffix: str) -> dict[int, Path]:
    """The files of one kind by the last number in their name. Raises DataError without one."""
    files: dict[int, Path] = {}
    for path in (folder / name).glob(f"*{suffix}"):
        numbers = re.findall(r"\d+", path.stem)
        if not numbers or int(numbers[-1]) in files:
            raise DataError(
                f"{short_path(path)} has no number of its own, by which parts are put in order: rename or remove it"
            )
        files[int(numbers[-1])] = path
    return files


def read_part(files: dict[str, Path]) -> EmbeddingPart:
    """Map the files of one number. Raises DataError where their rows or widths differ."""
    vectors = {kind: _map_vectors(files[kind]) for kind in files if kind != "metadata"}
    counts = {**{kind: len(rows) for kind, rows in vectors.items()}, "metadata": count_rows(files["metadata"])}
    image, text = vectors["image"], vectors.get("text", vectors["image"])
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{short_path(files[kind])} {count}" for kind, count in counts.items())
        raise DataError(f"the parts do not have the same rows ({listed}): export them again")
    if image.shape != text.shape:
        raise DataError(
            f"{short_path(files['image'])} and {short_path(files['text'])} have the widths "
            f"{image.shape[1]} and {text.shape[1]}"
        )
    return EmbeddingPart(files, len(image), image.shape[1])


def _map_vectors(path: Path) -> np.ndarray:
    """(N, D) float, memory-mapped. Raises DataError."""
    try:
        rows: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{short_path(path)} is not a readable .npy file ({str(error)[:80]}): export it again"
        ) from error
    if rows.ndim != 2 or rows.dtype.kind != "f":
        raise DataError(f"{short_path(path)} holds {rows.dtype} of shape {rows.shape}: rows of floats are needed")
    return rows


def choose_id_column(
    tables: Sequence[Path], wanted: str | None, usual: Sequence[str], vectors: Collection[str] = ()
) -> tuple[str | None, bool]:
    """The column of the ids that all tables have, and whether these are integers.

    usual: names of which the first that exists is chosen where none is wanted; without any the rows
    are numbered: None, True.  vectors: columns that hold no ids.  Raises DataError.
    """
    columns = [[name for name in column_names(table) if name not in vectors] for table in tables]
    for table, names in zip(tables, columns, strict=True):
        if wanted is not None and wanted not in names:
            raise DataError(
                f"{short_path(table)} has no column {wanted!r}, only {', '.join(names)}: choose --id among these"
            )
    common = set.intersection(*map(set, columns))
    chosen = wanted or next((name for name in usual if name in common), None)
    return chosen, chosen is None or all(is_integer_column(table, chosen) for table in tables)


def short_path(path: Path) -> str:
    """FOLDER/FILE."""
    return f"{path.parent.name}/{path.name}"
