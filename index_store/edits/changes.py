"""Encoding of edits: pairs to put or ids to delete, as the payload of a journal record."""

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

JSON_LENGTH_BYTES = 4  # a payload starts with the length of its JSON, a u32


@dataclass(frozen=True, slots=True, eq=False)
class Put:
    """An edit that adds pairs, or replaces those with the same ids, as a memory stores them.

    ids: (n,) int64 or UTF-8 bytes.  lines: n records as JSON.  values: per side (n, D) float16.
    own_keys: (n, Dk) float16, only of the sides that compare keys of their own.
    """

    ids: np.ndarray
    lines: Sequence[bytes]
    values: Mapping[Side, np.ndarray]
    own_keys: Mapping[Side, np.ndarray]

    def encode(self) -> bytes:
        """The payload: sizes and ids as JSON, then the records, then the rows of every column."""
        columns: dict[str, np.ndarray] = dict(self.values.items())
        columns |= {f"{side}_key": rows for side, rows in self.own_keys.items()}
        meta = {
            "put": _decode_ids(self.ids),
            "lines": [len(line) for line in self.lines],
            "columns": {name: rows.shape[1] for name, rows in columns.items()},
        }
        return b"".join(
            [
                _encode_json(meta),
                *self.lines,
                *(np.ascontiguousarray(rows, "<f2").tobytes() for rows in columns.values()),
            ]
        )


@dataclass(frozen=True, slots=True, eq=False)
class Delete:
    """An edit that removes pairs.  ids: (n,) int64 or UTF-8 bytes."""

    ids: np.ndarray

    def encode(self) -> bytes:
        """The payload: the ids as JSON."""
        return _encode_json({"delete": _decode_ids(self.ids)})


Change = Put | Delete


def decode_change(payload: bytes) -> Change:
    """The edit that `encode` wrote. Raises ValueError, KeyError or TypeError for other bytes."""
    end = JSON_LENGTH_BYTES + int.from_bytes(payload[:JSON_LENGTH_BYTES], "little")
    meta, body = json.loads(payload[JSON_LENGTH_BYTES:end]), memoryview(payload)[end:]
    if "delete" in meta:
        return Delete(_to_array(meta["delete"]))
    ids, columns = _to_array(meta["put"]), dict(_split_columns(meta, body))
    own: dict[Side, np.ndarray] = {side: columns[f"{side}_key"] for side in SIDES if f"{side}_key" in columns}
    return Put(ids, _split_lines(meta["lines"], body), {side: columns[side] for side in SIDES}, own)


def make_put(pairs: Pairs, manifest: Manifest, id_kind: str) -> Put:
    """The edit that puts `pairs` into a memory.  id_kind: "i" or "S", its ids' dtype kind.

    Raises PairsRefused where widths, keys or ids are not of the memory's kind.
    """
    for side in SIDES:
        _check_widths(pairs, manifest, side)
    ids = encode_ids(pairs.ids.tolist(), id_kind, manifest.ref)
    lines = [encode_record(name, record) for name, record in zip(pairs.ids.tolist(), pairs.records, strict=True)]
    values = {side: pairs.values(side).astype("<f2") for side in SIDES}
    own_keys = {side: pairs.keys(side).astype("<f2") for side in SIDES if pairs.has_own_keys(side)}
    return Put(ids, lines, values, own_keys)


def _check_widths(pairs: Pairs, manifest: Manifest, side: Side) -> None:
    """Raise PairsRefused where vectors or keys of one side are not as wide as the memory's."""
    kind, dim, key_dim = manifest.key_kind(side), manifest.dim, manifest.key_dim(side)
    vectors, keys, own = pairs.values(side), pairs.keys(side), pairs.has_own_keys(side)
    if own == (kind != "vector") and vectors.shape[1] == dim and keys.shape[1] == key_dim:
        return
    found = f"vectors of width {vectors.shape[1]} and {f'own keys of {keys.shape[1]}' if own else 'no own keys'}"
    raise PairsRefused(
        f"{manifest.ref} holds {side} vectors of width {dim} and compares {kind} keys of width {key_dim}, not {found}"
    )


def encode_ids(ids: Sequence[Id], id_kind: str, ref: str) -> np.ndarray:
    """(n,) int64 or UTF-8 bytes: ids as a memory stores them.  ref: the memory, for messages.

    Raises PairsRefused for an id of another type than the memory's, or one that occurs twice.
    """
    names = [_parse_number(name, ref) if id_kind == "i" else _check_text(name, ref) for name in ids]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise PairsRefused(f"id {twice!r} comes twice: every pair needs its own")
    return _to_array(names) if names else np.zeros(0, np.int64 if id_kind == "i" else "S1")


def _parse_number(name: Id, ref: str) -> int:
    """An int64 id; "12" is read as 12, because a URL only carries text."""
    if isinstance(name, bool) or not WHOLE_NUMBER.fullmatch(str(name)) or not -(2**63) <= int(name) < 2**63:
        raise PairsRefused(f"id {name!r} is not one that {ref} can hold: its ids are whole numbers of 64 bits")
    return int(name)


def _check_text(name: Id, ref: str) -> str:
    if not isinstance(name, str):
        raise PairsRefused(f"id {name!r} is not one that {ref} can hold: its ids are strings, write it as one")
    if "\0" in name:  # an array of bytes drops it at the end, and the id would be another one
        raise PairsRefused(f"id {name[:40]!r} is not one that {ref} can hold: it has a NUL, leave it out")
    return name


def _to_array(names: Sequence[Id]) -> np.ndarray:
    if all(isinstance(name, int) for name in names):
        return np.array(names, np.int64)
    return np.array([str(name).encode("utf-8", "surrogatepass") for name in names], np.bytes_)


def _decode_ids(ids: np.ndarray) -> list[Id]:
    names: list[Id] = (
        ids.tolist() if ids.dtype.kind == "i" else [name.decode("utf-8", "surrogatepass") for name in ids.tolist()]
    )
    return names


def _encode_json(meta: Mapping[str, Any]) -> bytes:
    text = json.dumps(meta).encode("ascii")
    return len(text).to_bytes(JSON_LENGTH_BYTES, "little") + text


def _split_lines(sizes: Sequence[int], body: memoryview) -> list[bytes]:
    return [bytes(body[start:stop]) for start, stop in pairwise(accumulate(sizes, initial=0))]


def _split_columns(meta: Mapping[str, Any], body: memoryview) -> Iterator[tuple[str, np.ndarray]]:
    """(name, (n, width) float16 rows) of every column. Raises ValueError for wrong sizes."""
    rows, start = len(meta["put"]), sum(meta["lines"])
    for name, width in meta["columns"].items():
        stop = start + 2 * rows * width
        yield name, np.frombuffer(body[start:stop], "<f2").reshape(rows, width)
        start = stop
    if start != len(body) or len(meta["lines"]) != rows:
        raise ValueError(f"{len(body)} bytes where {start} were announced")
