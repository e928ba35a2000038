"""Reader of precomputed embeddings in clip-retrieval's layout.

    img_emb/*.npy   text_emb/*.npy   metadata/*.parquet     row i of each is one pair

Without text_emb the captions of the metadata are encoded here.

Alphabet: N pairs in a part, R rows in a block, D width.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from index_store.build.source import Reject, SourceStep
from index_store.types import SIDES, Id, Pairs, Side
from models.data.encode import invalid_id_reason
from models.data.tables.arrow import column_names, count_rows, is_integer_column, parquet_rows
from models.errors import DataError

FOLDERS = {"image": ("img_emb", ".npy"), "text": ("text_emb", ".npy"), "metadata": ("metadata", ".parquet")}
ID_COLUMNS = ("key", "image_path", "url")  # the first that exists holds the ids, else the row number is the id
BLOCK_ROWS = 4096
Block = tuple[list[dict[str, Any]], dict[Side, np.ndarray]]  # fields of R rows, and (R, D) of each side
EncodeCaptions = Callable[[list[str]], np.ndarray]  # R captions -> (R, D) float32 unit


class Blocks(Protocol):
    """Rows with their vectors, in blocks."""

    @property
    def files(self) -> Mapping[str, Path]:
        """The files that are read, by what they hold."""

    @property
    def rows(self) -> int:
        """N, the number of rows."""

    def blocks(self) -> Iterator[Block]:
        """The rows, in order."""


@dataclass(frozen=True, slots=True)
class EmbeddingPart:
    """The two or three files with one number.

    files: by "image", "metadata", and "text" unless captions are to be encoded.
    rows: N, in each of them.  width: D.
    """

    files: Mapping[str, Path]
    rows: int
    width: int

    def blocks(self) -> Iterator[Block]:
        """The rows in blocks: fields, and vectors (R, D) of each side that there is."""
        rows = parquet_rows(self.files["metadata"], BLOCK_ROWS)
        vectors: dict[Side, np.ndarray] = {side: _map_vectors(self.files[side]) for side in SIDES if side in self.files}
        for start in range(0, self.rows, BLOCK_ROWS):
            fields = list(islice(rows, min(BLOCK_ROWS, self.rows - start)))
            yield fields, {side: array[start : start + len(fields)] for side, array in vectors.items()}


@dataclass(frozen=True, slots=True)
class EmbeddingFolder:
    """All parts of a folder, whose headers agree.

    id_column: of the metadata; None = the row number is the id.
    integer_ids: whether the ids are integers, not strings.
    """

    name: str
    parts: Sequence[Blocks]
    id_column: str | None
    integer_ids: bool

    @property
    def rows(self) -> int:
        """Rows of all parts."""
        return sum(part.rows for part in self.parts)

    @property
    def files(self) -> list[Path]:
        """All files of all parts."""
        return [path for part in self.parts for path in part.files.values()]


def is_embedding_folder(folder: Path) -> bool:
    """Whether a folder has any of the three subfolders of the layout."""
    return any((folder / name).is_dir() for name, _ in FOLDERS.values())


def read_embedding_folder(folder: Path, *, dim: int, encoder: str, id_column: str | None = None) -> EmbeddingFolder:
    """Read the headers of all files of a folder, and no row.

    dim, encoder: the width and fingerprint of the encoder in use.  id_column: None = the first of
    ID_COLUMNS.
    Raises DataError where a file is missing, row counts disagree, or the width is not the
    encoder's.
    """
    files = {kind: _files_by_number(folder, name, suffix) for kind, (name, suffix) in FOLDERS.items()}
    numbers = sorted(set().union(*files.values()))
    if not files["text"]:  # image-only embeddings
        del files["text"]
    for kind, (name, suffix) in FOLDERS.items():
        if kind not in files:
            continue
        missing = [number for number in numbers if number not in files[kind]]
        if missing or not numbers:
            which = f"part {missing[0]}" if missing else f"any *{suffix}"
            raise DataError(
                f"{folder.name}/{name} lacks {which}, which img_emb, text_emb and metadata must all have: "
                "export it again"
            )
    parts = [_read_part({kind: files[kind][number] for kind in files}) for number in numbers]
    for part in parts:
        check_width(_short_path(part.files["image"]), part.width, dim, encoder)
    tables = [part.files["metadata"] for part in parts]
    column = _choose_id_column(tables, id_column)
    integer_ids = column is None or all(is_integer_column(table, column) for table in tables)
    return EmbeddingFolder(folder.name, parts, column, integer_ids)


def check_width(what: str, width: int, dim: int, encoder: str) -> None:
    """Raise DataError where vectors do not have the width of the encoder in use."""
    if width != dim:
        raise DataError(
            f"{what} holds rows of width {width}, {encoder} gives {dim}: "
            "name the encoder that made them with --model and --pretrained"
        )


def embedding_steps(
    source: EmbeddingFolder,
    *,
    seen: set[Id],
    origin: str = "",
    done: Collection[Id] = (),
    encode: EncodeCaptions | None = None,
) -> Iterator[SourceStep]:
    """The rows as pairs of unit vectors, block by block.

    Rows with a zero vector, without an id or with a duplicate one become rejects.
    seen: the ids so far; those read are added.  origin: of the pairs.
    done: ids that an earlier run has stored.  encode: of captions where there are no text vectors.
    """
    first = 0
    for part in source.parts:
        for fields, vectors in part.blocks():
            ids = [_row_id(source, row, first + i) for i, row in enumerate(fields)]
            stored = [i for i, row_id in enumerate(ids) if row_id in done and row_id not in seen]
            seen.update(row_id for i in stored if (row_id := ids[i]) is not None)
            left = sorted(set(range(len(ids))) - set(stored))
            some = {side: array[left] for side, array in vectors.items()}
            numbers = [first + i for i in left]
            step = _build_step(source, [fields[i] for i in left], [ids[i] for i in left], some, numbers, seen, encode)
            origins = [origin] * (len(step.pairs) if step.pairs is not None else 0)
            yield replace(step, items=len(ids), origins=origins, stored=len(stored))
            first += len(fields)


def _build_step(
    source: EmbeddingFolder,
    fields: list[dict[str, Any]],
    ids: list[Id | None],
    vectors: Mapping[Side, np.ndarray],
    numbers: Sequence[int],
    seen: set[Id],
    encode: EncodeCaptions | None,
) -> SourceStep:
    """The usable rows of one block as pairs, the others as rejects.

    vectors: (R, D) of any float dtype.  numbers: of the rows.
    """
    units: dict[Side, np.ndarray] = {}
    reasons: list[str | None] = [None] * len(ids)
    for side in vectors:
        units[side], lengths = _normalize(vectors[side])
        for row in np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0))).tolist():
            reasons[row] = reasons[row] or f"its {side} vector has length {lengths[row]:.3g}: it has no direction"
    captions = [_caption(row) for row in fields]
    rejects = list[Reject]()
    for row, row_id in enumerate(ids):
        if "text" not in vectors and not captions[row]:
            reasons[row] = reasons[row] or "no caption, and no text vector"
        twice = reasons[row] is None and row_id is not None and row_id in seen
        reasons[row] = reasons[row] or _id_reject_reason(row_id, seen)
        if row_id is not None and reasons[row] is None:
            seen.add(row_id)
        if (reason := reasons[row]) is not None:
            name = str(numbers[row] if row_id is None else row_id)
            rejects.append(Reject(name, reason, "duplicate" if twice else "reject"))
    usable = [row for row, reason in enumerate(reasons) if reason is None]
    if not usable:
        return SourceStep(None, len(ids), rejects)
    records = [_record(fields[row], captions[row], source.id_column) for row in usable]
    pair_ids = np.array([ids[row] for row in usable], np.int64 if source.integer_ids else np.str_)
    if "text" in units:
        text = units["text"][usable]
    else:
        assert encode is not None, "the caller gives an encoder for image-only embeddings"  # noqa: S101
        text = encode([captions[row] for row in usable])
    return SourceStep(Pairs(pair_ids, units["image"][usable], text, records), len(ids), rejects)


def _normalize(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(R, D) float32 unit, and the lengths before (R,): NaN, infinite or 0 for unusable rows."""
    rows = rows.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        lengths = np.linalg.norm(rows, axis=1)
        return rows / lengths[:, None], lengths


def _id_reject_reason(row_id: Id | None, seen: set[Id]) -> str | None:
    if row_id is None:
        return "it has no id"
    if isinstance(row_id, int):
        return "its id came before: ids must be unique" if row_id in seen else None
    return invalid_id_reason(row_id, seen)


def _row_id(source: EmbeddingFolder, row: Mapping[str, Any], number: int) -> Id | None:
    if source.id_column is None:
        return number
    value = row[source.id_column]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if value is None or source.integer_ids else str(value)


def _caption(row: Mapping[str, Any]) -> str:
    """The caption of a row, "" for none: it may be missing where its vector is given."""
    for name in ("caption", "text", "title"):
        if isinstance(caption := row.get(name), str) and caption.strip():
            return caption.strip()
    return ""


def _record(row: dict[str, Any], caption: str, id_column: str | None) -> dict[str, Any]:
    """The caption and the user's fields."""
    fields = {
        "source_id" if name == "id" else name: value
        for name, value in row.items()
        if name not in ("caption", id_column)
    }
    return {**fields, "caption": caption}


def _files_by_number(folder: Path, name: str, suffix: str) -> dict[int, Path]:
    """The files of one kind by the last number in their name. Raises DataError without one."""
    files: dict[int, Path] = {}
    for path in (folder / name).glob(f"*{suffix}"):
        numbers = re.findall(r"\d+", path.stem)
        if not numbers or int(numbers[-1]) in files:
            raise DataError(
                f"{_short_path(path)} has no number of its own, by which parts are put in order: rename or remove it"
            )
        files[int(numbers[-1])] = path
    return files


def _read_part(files: dict[str, Path]) -> EmbeddingPart:
    vectors = {kind: _map_vectors(files[kind]) for kind in files if kind != "metadata"}
    counts = {**{kind: len(rows) for kind, rows in vectors.items()}, "metadata": count_rows(files["metadata"])}
    image, text = vectors["image"], vectors.get("text", vectors["image"])
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{_short_path(files[kind])} {count}" for kind, count in counts.items())
        raise DataError(f"the parts do not have the same rows ({listed}): export them again")
    if image.shape != text.shape:
        raise DataError(
            f"{_short_path(files['image'])} and {_short_path(files['text'])} have the widths "
            f"{image.shape[1]} and {text.shape[1]}"
        )
    return EmbeddingPart(files, len(image), image.shape[1])


def _map_vectors(path: Path) -> np.ndarray:
    """(N, D) float, memory-mapped. Raises DataError."""
    try:
        rows: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{_short_path(path)} is not a readable .npy file ({str(error)[:80]}): export it again"
        ) from error
    if rows.ndim != 2 or rows.dtype.kind != "f":
        raise DataError(f"{_short_path(path)} holds {rows.dtype} of shape {rows.shape}: rows of floats are needed")
    return rows


def _choose_id_column(tables: Sequence[Path], wanted: str | None) -> str | None:
    columns = [set(column_names(table)) for table in tables]
    common = set.intersection(*columns)
    if wanted is not None and wanted not in common:
        lacking = next(table for table, names in zip(tables, columns, strict=True) if wanted not in names)
        raise DataError(
            f"{_short_path(lacking)} has no column {wanted!r}, only {', '.join(column_names(lacking))}: "
            "choose --id among these"
        )
    return wanted or next((column for column in ID_COLUMNS if column in common), None)


def _short_path(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
