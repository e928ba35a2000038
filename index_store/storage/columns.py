"""Writing one shard: rows go to their files as they come, so that a memory may be larger than RAM."""

import json
from collections.abc import Mapping
from contextlib import suppress
from io import BufferedRandom, BufferedWriter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from index_store.errors import PairsRefused
from index_store.storage.atomic import translate_write_errors
from index_store.types import SIDES, Pairs, Side

Lines = BufferedWriter | BufferedRandom
_as_json = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False
).encode  # json.dumps would make an encoder for each record


class Column:
    """One growing .npy file of float16 rows. Its header is written twice: numpy pads it so that the final count fits in place.

    rows: how many a builder before this one wrote that count; what it wrote beyond them is cut off.
    """

    def __init__(self, path: Path, width: int, rows: int = 0) -> None:
        self._width, self._rows = width, rows
        self._file = path.open("r+b" if rows else "wb")
        self._header()
        if rows:
            self._file.truncate(self._file.tell() + rows * width * 2)
            self._file.seek(0, 2)

    def append(self, rows: np.ndarray) -> None:
        """rows: (R, width) float."""
        self._file.write(np.ascontiguousarray(rows, "<f2").data)
        self._rows += len(rows)

    def finish(self) -> None:
        """Put the true count into the header."""
        self._file.seek(0)
        self._header()
        self.close()

    def flush(self) -> None:
        """Hand everything to the system."""
        self._file.flush()

    def close(self) -> None:
        """Let go of the file, finished or not."""
        self._file.close()

    def _header(self) -> None:
        np.lib.format.write_array_header_1_0(
            self._file, {"descr": "<f2", "fortran_order": False, "shape": (self._rows, self._width)}
        )


def map_rows(path: Path, width: int, rows: int) -> np.ndarray:
    """(rows, width) float16, mapped: the first rows of a column, whatever its header says by now. ValueError where it holds fewer."""
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        return np.memmap(path, "<f2", "r", file.tell(), (rows, width))


class ShardWriter:
    """The files of one shard while it grows; whole after finish(), worthless before.

    ids: of the rows that a builder before this one wrote and that count; (R,) int64 or str, None for a new shard.
    """

    def __init__(
        self, root: Path, folder: str, dim: int, keys: Mapping[Side, Mapping[str, Any]], ids: np.ndarray | None = None
    ) -> None:
        self.folder, self.pairs = folder, 0 if ids is None else len(ids)
        self._path = root / folder
        own = [side for side in SIDES if keys[side]["kind"] != "vector"]
        with translate_write_errors(folder):
            self._path.mkdir(exist_ok=ids is not None)
            self._values = {side: Column(self._path / f"{side}.npy", dim, self.pairs) for side in SIDES}
            self._keys = {side: Column(self._path / f"{side}_key.npy", keys[side]["dim"], self.pairs) for side in own}
            self._records, self._lengths = open_lines(self._path / "records.jsonl", self.pairs)
        self._ids: list[np.ndarray] = [] if ids is None else [ids]

    def append(self, pairs: Pairs, rows: slice) -> None:
        """Add some rows of a block."""
        names = pairs.ids[rows]
        lines = [encode_record(name, record) for name, record in zip(names.tolist(), pairs.records[rows], strict=True)]
        with translate_write_errors(self.folder):
            for side, column in self._values.items():
                column.append(pairs.values(side)[rows])
            for side, column in self._keys.items():
                column.append(pairs.keys(side)[rows])
            self._records.writelines(lines)
        self._ids.append(names)
        self._lengths += [len(line) for line in lines]
        self.pairs += len(lines)

    def finish(self) -> list[str]:
        """Complete every file; their names relative to the version."""
        ids = np.concatenate(self._ids)
        ids = np.char.encode(ids, "utf-8") if ids.dtype.kind == "U" else ids
        with translate_write_errors(self.folder):
            for column in (*self._values.values(), *self._keys.values()):
                column.finish()
            self._records.close()
            np.save(self._path / "ids.npy", ids, allow_pickle=False)
            np.save(
                self._path / "order.npy",
                np.argsort(ids, kind="stable").astype(np.int64, copy=False),
                allow_pickle=False,
            )
            np.save(self._path / "records.npy", np.cumsum([0, *self._lengths], dtype=np.int64), allow_pickle=False)
        return sorted(f"{self.folder}/{file.name}" for file in self._path.iterdir())

    def abandon(self) -> None:
        """Close whatever is still open; harmless after finish()."""
        for file in self._open_files():
            with suppress(
                OSError
            ):  # a full disk also refuses the last flush, and no row since the last checkpoint counts
                file.close()

    def flush(self) -> None:
        """Hand every row to the system."""
        with translate_write_errors(self.folder):
            for file in self._open_files():
                file.flush()

    def _open_files(self) -> list["Column | Lines"]:
        return [*self._values.values(), *self._keys.values(), self._records]


def open_lines(path: Path, lines: int) -> tuple[Lines, list[int]]:
    """A file of lines to append to, cut after the first `lines` of them, and their lengths. ValueError where it holds fewer."""
    if not lines:
        return path.open("wb"), []
    file = path.open("r+b")
    lengths = [len(line) for line in islice(file, lines) if line.endswith(b"\n")]
    if len(lengths) < lines:
        file.close()
        raise ValueError(f"{path.name} has {len(lengths)} of {lines} lines")
    file.seek(sum(lengths))
    file.truncate()
    return file, lengths


def encode_record(name: str | int, record: Mapping[str, Any]) -> bytes:
    """One record as one line of JSON."""
    try:
        return _as_json(dict(record)).encode("utf-8", "surrogatepass") + b"\n"
    except (TypeError, ValueError) as error:
        raise PairsRefused(
            f"the record of id {name!r} is not JSON ({error}): keep strings, numbers, lists and mappings"
        ) from error
