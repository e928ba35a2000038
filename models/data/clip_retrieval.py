"""Reader of precomputed embeddings in clip-retrieval's layout.

    img_emb/*.npy   text_emb/*.npy   metadata/*.parquet     row i of each is one pair

Without text_emb the captions of the metadata are encoded here.

Alphabet: N pairs in a part, R rows in a block, D width.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from index_store.build.source import Reject, SourceStep
from index_store.types import Id, Pairs, Side
from models.data.embedding_files import ID_COLUMNS, Block, choose_id_column, files_by_number, read_part, short_path
from models.data.encode import invalid_id_reason
from models.data.samples import user_metadata
from models.errors import DataError

FOLDERS = {"image": ("img_emb", ".npy"), "text": ("text_emb", ".npy"), "metadata": ("metadata", ".parquet")}
EncodeCaptions = Callable[[list[str]], np.ndarray]  # R captions -> (R, D) float32 unit


class Blocks(Protocol):
    """Rows with their vectors, in blocks."""

    @property
    def files(self) -> Mapping[str, Path]:
        """The files that are read, by what they hold."""

    @property
    def sides(self) -> Collection[Side]:
        """The sides that have vectors."""

    @property
    def rows(self) -> int:
        """N, the number of rows."""

    def blocks(self) -> Iterator[Block]:
        """The rows, in order."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its number in the source, its id, its fields and its caption, "" for none."""

    number: int
    id: Id | None
    fields: Mapping[str, Any]
    caption: str


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
    files = {kind: files_by_number(folder, name, suffix) for kind, (name, suffix) in FOLDERS.items()}
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
    parts = [read_part({kind: files[kind][number] for kind in files}) for number in numbers]
    for part in parts:
        check_width(short_path(part.files["image"]), part.width, dim, encoder)
    tables = [part.files["metadata"] for part in parts]
    return EmbeddingFolder(folder.name, parts, *choose_id_column(tables, id_column, ID_COLUMNS))


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
            left = list[int]()
            for row, row_id in enumerate(ids):
                if row_id is None or row_id in seen or row_id not in done:
                    left.append(row)
                else:
                    seen.add(row_id)
            some = {side: array[left] for side, array in vectors.items()}
            rows = [Row(first + i, ids[i], fields[i], _caption(fields[i])) for i in left]
            step = _build_step(source, rows, some, seen, encode)
            origins = [origin] * (len(step.pairs) if step.pairs is not None else 0)
            yield replace(step, items=len(ids), origins=origins, stored=len(ids) - len(left))
            first += len(fields)


def _build_step(
    source: EmbeddingFolder,
    rows: Sequence[Row],
    vectors: Mapping[Side, np.ndarray],
    seen: set[Id],
    encode: EncodeCaptions | None,
) -> SourceStep:
    """The usable rows of one block as pairs, the others as rejects.

    vectors: (R, D) of any float dtype.
    """
    units = {side: _normalize(array) for side, array in vectors.items()}
    usable, rejects = list[int](), list[Reject]()
    for i, row in enumerate(rows):
        reason = _fault(row, {side: lengths[i] for side, (_, lengths) in units.items()})
        twice = reason is None and row.id in seen
        if (reason := reason or _id_reject_reason(row.id, seen)) is not None:
            name = str(row.number if row.id is None else row.id)
            rejects.append(Reject(name, reason, "duplicate" if twice else "reject"))
        elif row.id is not None:
            seen.add(row.id)
            usable.append(i)
    if not usable:
        return SourceStep(None, len(rows), rejects)
    records = [_record(rows[i], source.id_column) for i in usable]
    pair_ids = np.array([rows[i].id for i in usable], np.int64 if source.integer_ids else np.str_)
    if "text" in units:
        text = units["text"][0][usable]
    else:
        assert encode is not None, "the caller gives an encoder for image-only embeddings"  # noqa: S101
        text = encode([rows[i].caption for i in usable])
    return SourceStep(Pairs(pair_ids, units["image"][0][usable], text, records), len(rows), rejects)


def _fault(row: Row, lengths: Mapping[Side, float]) -> str | None:
    """Why the vectors and the caption of a row make no pair, None where they do."""
    for side, length in lengths.items():
        if np.isnan(length):
            return f"its {side} vector has no length: it is missing, of another width than the others, or holds NaN"
        if not 0 < length < np.inf:
            return f"its {side} vector has length {length:.3g}: it has no direction"
    return "no caption, and no text vector" if "text" not in lengths and not row.caption else None


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


def _record(row: Row, id_column: str | None) -> dict[str, Any]:
    """The caption and the user's fields."""
    return {**user_metadata({k: v for k, v in row.fields.items() if k != id_column}), "caption": row.caption}
