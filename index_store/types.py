"""Core types of the store: sides, ids, and aligned image-text pairs checked at construction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from index_store.errors import PairsRefused
from index_store.float16 import to_float32

Side = Literal["image", "text"]
KeyKind = Literal["vector", "trunk"]
Id = str | int

SIDES: tuple[Side, Side] = ("image", "text")
NORM_TOLERANCE = 2e-3  # float16 rounding moves a unit row's length by up to 5e-4
MAX_ID_BYTES = 256  # of an id; ids are stored in fixed width: one very long id widens every row


def other(side: Side) -> Side:
    """The opposite side, whose vectors a search on `side` returns by default."""
    return "text" if side == "image" else "image"


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """N image-text pairs; row i of every field is one pair.

    ids: (N,) int64 or str, unique.  image, text: (N, D) float16 or float32 unit rows, CLIP vectors.
    records: N mappings, each with "caption" and the user's own JSON metadata, without the id.
    image_key, text_key: (N, Dk) unit rows that the search compares, None = it compares the vectors.
    Raises PairsRefused where the fields are misaligned, of a wrong type or not of unit length.
    """

    ids: np.ndarray
    image: np.ndarray
    text: np.ndarray
    records: Sequence[Mapping[str, Any]]
    image_key: np.ndarray | None = None
    text_key: np.ndarray | None = None

    def __post_init__(self) -> None:
        _check_ids(self.ids)
        if self.image.shape[1:] != self.text.shape[1:]:
            raise PairsRefused(
                f"image and text vectors must be of one width, not {self.image.shape} and {self.text.shape}"
            )
        for side in SIDES:
            _check_rows(f"{side} vectors", self.values(side), len(self.ids))
            if self.has_own_keys(side):
                _check_rows(f"{side} keys", self.keys(side), len(self.ids))
        _check_records(self.records, len(self.ids))

    def __len__(self) -> int:
        return len(self.ids)

    def values(self, side: Side) -> np.ndarray:
        """(N, D) CLIP vectors of one side, which the fusion reads."""
        return self.image if side == "image" else self.text

    def keys(self, side: Side) -> np.ndarray:
        """(N, Dk) search keys: the rows that a search on `side` compares."""
        own = self.image_key if side == "image" else self.text_key
        return self.values(side) if own is None else own

    def take(self, rows: Sequence[int] | np.ndarray) -> "Pairs":
        """The pairs at `rows`, in this order.  rows: (R,) int."""
        chosen = np.asarray(rows, np.int64)
        image_key, text_key = (None if own is None else own[chosen] for own in (self.image_key, self.text_key))
        records = [self.records[row] for row in chosen.tolist()]
        return Pairs(self.ids[chosen], self.image[chosen], self.text[chosen], records, image_key, text_key)

    def has_own_keys(self, side: Side) -> bool:
        """True where a search on `side` compares keys of its own, not the CLIP vectors."""
        return (self.image_key if side == "image" else self.text_key) is not None


def decode_ids(ids: np.ndarray) -> np.ndarray:
    """(R,) ids as the user gave them: int64, or str decoded from the UTF-8 bytes of a shard."""
    if ids.dtype.kind != "S":
        return ids
    try:
        return ids.astype(np.str_)  # ASCII alone, the common case
    except UnicodeDecodeError:
        return np.char.decode(ids, "utf-8")


def _check_ids(ids: np.ndarray) -> None:
    if ids.ndim != 1 or not (ids.dtype == np.int64 or ids.dtype.kind == "U"):
        raise PairsRefused(f"ids must be one row of int64 or str, not {ids.dtype} of shape {ids.shape}")
    if ids.dtype.kind == "U":
        for value in ids.tolist():
            if not _is_storable(value):
                raise PairsRefused(
                    f"id {value[:40]!r} must hold 1 to {MAX_ID_BYTES} bytes of valid UTF-8 without NUL: rename it"
                )


def _is_storable(value: str) -> bool:
    try:
        return 0 < len(value.encode("utf-8")) <= MAX_ID_BYTES and "\0" not in value
    except UnicodeEncodeError:  # an unpaired surrogate, as in a file name that is not UTF-8
        return False


def _check_rows(what: str, rows: np.ndarray, pairs: int) -> None:
    """Raise PairsRefused unless `rows` is (pairs, width) of finite float rows of unit length."""
    if rows.ndim != 2 or rows.shape[0] != pairs or rows.shape[1] == 0:
        raise PairsRefused(f"{what} must be ({pairs}, width) beside {pairs} ids, not {rows.shape}")
    if rows.dtype not in (np.float16, np.float32):
        raise PairsRefused(f"{what} must be float16 or float32, not {rows.dtype}")
    exact = to_float32(rows)
    lengths = np.sqrt(np.einsum("nd,nd->n", exact, exact))  # (N,), not near 1 if a row is not finite
    wrong = np.flatnonzero(~(np.abs(lengths - 1.0) <= NORM_TOLERANCE))
    if len(wrong):
        row = int(wrong[0])
        length = np.linalg.norm(rows[row].astype(np.float32))  # to_float32 gives wrong values for inf and nan
        raise PairsRefused(f"{what}: row {row} has length {length:.4g}, not 1: normalise it, or drop the pair")


def _check_records(records: Sequence[Mapping[str, Any]], pairs: int) -> None:
    """Raise PairsRefused unless there is one record with a caption, and without an id, per pair."""
    if len(records) != pairs:
        raise PairsRefused(f"{len(records)} records beside {pairs} ids: give one per pair")
    for row, record in enumerate(records):
        if not isinstance(record.get("caption"), str):
            raise PairsRefused(f'the record of row {row} has no "caption" string: give one, it may be empty')
        if "id" in record:
            raise PairsRefused(f'the record of row {row} has a field "id", which is the pair\'s own: rename it')
