"""Embeddings made elsewhere, in the layout of clip-retrieval: img_emb/*.npy, text_emb/*.npy and metadata/*.parquet, aligned by order."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from index_store.build.source import Reject, SourceStep
from index_store.types import SIDES, Id, Pairs, Side
from models.data.encode import invalid_id_reason
from models.data.tables import columns_of, count_rows, integer_column, parquet_rows
from models.errors import DataError

FOLDERS = {"image": ("img_emb", ".npy"), "text": ("text_emb", ".npy"), "metadata": ("metadata", ".parquet")}
ID_COLUMNS = ("key", "image_path", "url")  # the first that is there names a pair, else its number
BLOCK_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Part:
    """One numbered part. files: {"image", "text", "metadata"}.  rows: in each of them."""

    files: Mapping[str, Path]
    rows: int
    width: int


@dataclass(frozen=True, slots=True)
class EmbeddingFolder:
    """All parts of a folder, checked against each other by their headers. id_column: None = the number of the row."""

    name: str
    parts: Sequence[Part]
    id_column: str | None
    whole_numbers: bool

    @property
    def rows(self) -> int:
        """Of all parts."""
        return sum(part.rows for part in self.parts)

    @property
    def files(self) -> list[Path]:
        """Every file read."""
        return [path for part in self.parts for path in part.files.values()]


def is_embedding_folder(folder: Path) -> bool:
    """True where a folder has any of the three that the layout is made of."""
    return any((folder / name).is_dir() for name, _ in FOLDERS.values())


def read_embedding_folder(folder: Path, *, dim: int, encoder: str, id_column: str | None = None) -> EmbeddingFolder:
    """What lies in the folder, no row read yet; DataError where a part is missing, counts disagree, or the width is not the encoder's."""
    found = {kind: _numbered(folder, name, suffix) for kind, (name, suffix) in FOLDERS.items()}
    numbers = sorted(set().union(*found.values()))
    for kind, (name, suffix) in FOLDERS.items():
        missing = [number for number in numbers if number not in found[kind]]
        if missing or not numbers:
            which = f"part {missing[0]}" if missing else f"any *{suffix}"
            raise DataError(
                f"{folder.name}/{name} lacks {which}, which img_emb, text_emb and metadata must all have: export it again"
            )
    parts = [_part({kind: found[kind][number] for kind in FOLDERS}) for number in numbers]
    for part in parts:
        if part.width != dim:
            raise DataError(
                f"{_shown(part.files['image'])} holds rows of width {part.width}, {encoder} gives {dim}: "
                "name the encoder that made them with --model and --pretrained"
            )
    tables = [part.files["metadata"] for part in parts]
    column = _id_column(tables, id_column)
    return EmbeddingFolder(
        folder.name, parts, column, column is None or all(integer_column(table, column) for table in tables)
    )


def embedding_steps(source: EmbeddingFolder, *, seen: set[Id], skip: int = 0) -> Iterator[SourceStep]:
    """Every row as a pair of unit vectors, block by block; rows without a direction or an id of their own are rejected.

    seen: ids taken so far, added to.  skip: rows passed over, of which only the ids are read.
    """
    first = 0
    for part in source.parts:
        rows = parquet_rows(part.files["metadata"], BLOCK_ROWS)
        vectors: dict[Side, np.ndarray] = {side: _rows(part.files[side]) for side in SIDES}
        for start in range(0, part.rows, BLOCK_ROWS):
            fields = list(islice(rows, min(BLOCK_ROWS, part.rows - start)))
            ids = [_id(source, row, first + start + i) for i, row in enumerate(fields)]
            over = min(max(0, skip - first - start), len(fields))
            seen.update(name for name in ids[:over] if name is not None)
            if over < len(fields):
                block = {side: rows[start + over : start + len(fields)] for side, rows in vectors.items()}
                yield _step(source, fields[over:], ids[over:], block, first + start + over, seen)
        first += part.rows


def _step(
    source: EmbeddingFolder,
    fields: list[dict[str, Any]],
    ids: list[Id | None],
    vectors: Mapping[Side, np.ndarray],
    first: int,
    seen: set[Id],
) -> SourceStep:
    """The usable rows of one block.  vectors: (R, D) any float.  first: the number of its first row."""
    units: dict[Side, np.ndarray] = {}
    reasons: list[str | None] = [None] * len(ids)
    for side in SIDES:
        units[side], lengths = _unit(vectors[side])
        for row in np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0))).tolist():
            reasons[row] = reasons[row] or f"its {side} vector has length {lengths[row]:.3g}: it points nowhere"
    for row, name in enumerate(ids):
        reasons[row] = reasons[row] or _refused(name, seen)
        if name is not None and reasons[row] is None:
            seen.add(name)
    rejects = [
        Reject(str(first + row if ids[row] is None else ids[row]), why)
        for row, why in enumerate(reasons)
        if why is not None
    ]
    good = [row for row, why in enumerate(reasons) if why is None]
    if not good:
        return SourceStep(None, len(ids), rejects)
    records = [_record(fields[row], source.id_column) for row in good]
    names = np.array([ids[row] for row in good], np.int64 if source.whole_numbers else np.str_)
    return SourceStep(Pairs(names, units["image"][good], units["text"][good], records), len(ids), rejects)


def _unit(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(R, D) float32 of unit length, and the lengths (R,) before, nan or 0 where there is no direction."""
    rows = rows.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        lengths = np.linalg.norm(rows, axis=1)
        return rows / lengths[:, None], lengths


def _refused(name: Id | None, seen: set[Id]) -> str | None:
    if name is None:
        return "it has no id"
    if isinstance(name, int):
        return "its id came before: ids must be unique" if name in seen else None
    return invalid_id_reason(name, seen)


def _id(source: EmbeddingFolder, row: Mapping[str, Any], number: int) -> Id | None:
    if source.id_column is None:
        return number
    value = row[source.id_column]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if value is None or source.whole_numbers else str(value)


def _record(row: dict[str, Any], id_column: str | None) -> dict[str, Any]:
    """The caption and the user's own fields; a caption may be missing, since nothing has to be encoded."""
    caption = row.get("caption")
    own = {
        "source_id" if name == "id" else name: value
        for name, value in row.items()
        if name not in ("caption", id_column)
    }
    return {**own, "caption": caption.strip() if isinstance(caption, str) else ""}


def _numbered(folder: Path, name: str, suffix: str) -> dict[int, Path]:
    """The files of one kind by the number in their name: part 2 comes before part 10."""
    found: dict[int, Path] = {}
    for path in (folder / name).glob(f"*{suffix}"):
        numbers = re.findall(r"\d+", path.stem)
        if not numbers or int(numbers[-1]) in found:
            raise DataError(
                f"{_shown(path)} has no number of its own, by which parts are put in order: rename or remove it"
            )
        found[int(numbers[-1])] = path
    return found


def _part(files: dict[str, Path]) -> Part:
    image, text = _rows(files["image"]), _rows(files["text"])
    counts = {"image": len(image), "text": len(text), "metadata": count_rows(files["metadata"])}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{_shown(files[kind])} {count}" for kind, count in counts.items())
        raise DataError(f"the parts do not have the same rows ({told}): export them again")
    if image.shape != text.shape:
        raise DataError(
            f"{_shown(files['image'])} and {_shown(files['text'])} have the widths {image.shape[1]} and {text.shape[1]}"
        )
    return Part(files, len(image), image.shape[1])


def _rows(path: Path) -> np.ndarray:
    """(N, D) float, mapped."""
    try:
        rows: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{_shown(path)} is not a readable .npy file ({str(error)[:80]}): export it again") from error
    if rows.ndim != 2 or rows.dtype.kind != "f":
        raise DataError(f"{_shown(path)} holds {rows.dtype} of shape {rows.shape}: rows of floats are needed")
    return rows


def _id_column(tables: Sequence[Path], asked: str | None) -> str | None:
    names = [set(columns_of(table)) for table in tables]
    common = set.intersection(*names)
    if asked is not None and asked not in common:
        lacking = next(table for table, columns in zip(tables, names, strict=True) if asked not in columns)
        raise DataError(
            f"{_shown(lacking)} has no column {asked!r}, only {', '.join(columns_of(lacking))}: choose --id among these"
        )
    return asked or next((column for column in ID_COLUMNS if column in common), None)


def _shown(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
