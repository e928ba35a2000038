"""One edit as bytes and back: a batch of pairs to put, or of ids to delete."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from index_store.errors import PairsRefused
from index_store.search.filters import WHOLE_NUMBER
from index_store.storage.columns import encode_record
from index_store.storage.manifest import Manifest
from index_store.types import SIDES, Id, Pairs, Side

JSON_LENGTH_BYTES = 4  # bytes that say how long the JSON is that opens a payload


@dataclass(frozen=True, slots=True, eq=False)
class Put:
    """Pairs to add, or to replace where their ids are known, as a memory stores them.

    ids: (n,) int64 or UTF-8 bytes.  lines: n records as JSON.  values: per side (n, D) float16.  own_keys: (n, Dk) where a side has them.
    """

    ids: np.ndarray
    lines: Sequence[bytes]
    values: Mapping[Side, np.ndarray]
    own_keys: Mapping[Side, np.ndarray]

    def encode(self) -> bytes:
        """Sizes and ids as JSON, then the records, then the rows of every column."""
        columns: dict[str, np.ndarray] = dict(self.values.items())
        columns |= {f"{side}_key": rows for side, rows in self.own_keys.items()}
        meta = {
            "put": _names(self.ids),
            "lines": [len(line) for line in self.lines],
            "columns": {name: rows.shape[1] for name, rows in columns.items()},
        }
        return b"".join(
            [_opening(meta), *self.lines, *(np.ascontiguousarray(rows, "<f2").tobytes() for rows in columns.values())]
        )


@dataclass(frozen=True, slots=True, eq=False)
class Delete:
    """Ids to remove.  ids: (n,) int64 or UTF-8 bytes."""

    ids: np.ndarray

    def encode(self) -> bytes:
        """The ids as JSON."""
        return _opening({"delete": _names(self.ids)})


Change = Put | Delete


def decode_change(payload: bytes) -> Change:
    """What encode() wrote; ValueError, KeyError or TypeError for anything else."""
    end = JSON_LENGTH_BYTES + int.from_bytes(payload[:JSON_LENGTH_BYTES], "little")
    meta, body = json.loads(payload[JSON_LENGTH_BYTES:end]), memoryview(payload)[end:]
    if "delete" in meta:
        return Delete(_stored(meta["delete"]))
    ids, columns = _stored(meta["put"]), dict(_columns(meta, body))
    own: dict[Side, np.ndarray] = {side: columns[f"{side}_key"] for side in SIDES if f"{side}_key" in columns}
    return Put(ids, _lines(meta["lines"], body), {side: columns[side] for side in SIDES}, own)


def make_put(pairs: Pairs, manifest: Manifest, id_kind: str) -> Put:
    """Pairs as this memory stores them; PairsRefused where they are not of its kind.  id_kind: "i" or "S"."""
    values, own = (
        {side: pairs.values(side) for side in SIDES},
        {side: pairs.keys(side) for side in SIDES if pairs.has_own_keys(side)},
    )
    for side in SIDES:
        kind, width = manifest.key_kind(side), manifest.key_dim(side)
        if (
            (side in own) != (kind != "vector")
            or values[side].shape[1] != manifest.dim
            or pairs.keys(side).shape[1] != width
        ):
            found = f"vectors of width {values[side].shape[1]} and {f'own keys of {own[side].shape[1]}' if side in own else 'no own keys'}"
            raise PairsRefused(
                f"{manifest.ref} holds {side} vectors of width {manifest.dim} and compares {kind} keys of width {width}, not {found}"
            )
    ids = encode_ids(pairs.ids.tolist(), id_kind, manifest.ref)
    lines = [encode_record(name, record) for name, record in zip(pairs.ids.tolist(), pairs.records, strict=True)]
    return Put(
        ids,
        lines,
        {side: rows.astype("<f2") for side, rows in values.items()},
        {side: own[side].astype("<f2") for side in own},
    )


def encode_ids(ids: Sequence[Id], id_kind: str, ref: str) -> np.ndarray:
    """(n,) int64 or UTF-8 bytes; PairsRefused for an id of another type than the memory's, or one that comes twice."""
    names = [_number(name, ref) if id_kind == "i" else _text(name, ref) for name in ids]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise PairsRefused(f"id {twice!r} comes twice: every pair needs its own")
    return _stored(names) if names else np.zeros(0, np.int64 if id_kind == "i" else "S1")


def _number(name: Id, ref: str) -> int:
    """An int64; a URL can only say "12", which means 12."""
    if isinstance(name, bool) or not WHOLE_NUMBER.fullmatch(str(name)) or not -(2**63) <= int(name) < 2**63:
        raise PairsRefused(f"id {name!r} is not one that {ref} can hold: its ids are whole numbers of 64 bits")
    return int(name)


def _text(name: Id, ref: str) -> str:
    if not isinstance(name, str):
        raise PairsRefused(f"id {name!r} is not one that {ref} can hold: its ids are strings, write it as one")
    return name


def _stored(names: Sequence[Id]) -> np.ndarray:
    if all(isinstance(name, int) for name in names):
        return np.array(names, np.int64)
    return np.array([str(name).encode("utf-8", "surrogatepass") for name in names], np.bytes_)


def _names(ids: np.ndarray) -> list[Id]:
    names: list[Id] = (
        ids.tolist() if ids.dtype.kind == "i" else [name.decode("utf-8", "surrogatepass") for name in ids.tolist()]
    )
    return names


def _opening(meta: Mapping[str, Any]) -> bytes:
    text = json.dumps(meta).encode("ascii")
    return len(text).to_bytes(JSON_LENGTH_BYTES, "little") + text


def _lines(sizes: Sequence[int], body: memoryview) -> list[bytes]:
    return [bytes(body[start:stop]) for start, stop in pairwise(accumulate(sizes, initial=0))]


def _columns(meta: Mapping[str, Any], body: memoryview) -> Iterator[tuple[str, np.ndarray]]:
    """Name and rows of every column; they must fill the payload to its last byte."""
    rows, start = len(meta["put"]), sum(meta["lines"])
    for name, width in meta["columns"].items():
        stop = start + 2 * rows * width
        yield name, np.frombuffer(body[start:stop], "<f2").reshape(rows, width)
        start = stop
    if start != len(body) or len(meta["lines"]) != rows:
        raise ValueError(f"{len(body)} bytes where {start} were announced")
