"""Writing one shard: rows go to their files as they come, so that a memory may be larger than RAM."""

import json
from collections.abc import Mapping
from contextlib import suppress
from io import BufferedWriter
from pathlib import Path
from typing import Any

import numpy as np

from index_store.durable import writing
from index_store.errors import PairsRefused
from index_store.pairs import SIDES, Pairs, Side

_as_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode  # json.dumps would make an encoder for each record


class Column:
    """One growing .npy file of float16 rows. Its header is written twice: numpy pads it so that the final count fits in place."""

    def __init__(self, path: Path, width: int) -> None:
        self._width, self._rows = width, 0
        self._file = path.open("wb")
        self._header()

    def append(self, rows: np.ndarray) -> None:
        """rows: (R, width) float."""
        self._file.write(np.ascontiguousarray(rows, "<f2").data)
        self._rows += len(rows)

    def finish(self) -> None:
        """Put the true count into the header."""
        self._file.seek(0)
        self._header()
        self.close()

    def close(self) -> None:
        """Let go of the file, finished or not."""
        self._file.close()

    def _header(self) -> None:
        np.lib.format.write_array_header_1_0(self._file, {"descr": "<f2", "fortran_order": False, "shape": (self._rows, self._width)})


class ShardWriter:
    """The files of one shard while it grows; whole after finish(), worthless before."""

    def __init__(self, root: Path, folder: str, dim: int, keys: Mapping[Side, Mapping[str, Any]]) -> None:
        self.folder, self.pairs = folder, 0
        self._path = root / folder
        with writing(folder):
            self._path.mkdir()
            self._values = {side: Column(self._path / f"{side}.npy", dim) for side in SIDES}
            own = [side for side in SIDES if keys[side]["kind"] != "vector"]
            self._keys = {side: Column(self._path / f"{side}_key.npy", keys[side]["dim"]) for side in own}
            self._records = (self._path / "records.jsonl").open("wb")
        self._ids: list[np.ndarray] = []
        self._lengths: list[int] = []

    def append(self, pairs: Pairs, rows: slice) -> None:
        """Add some rows of a block."""
        names = pairs.ids[rows]
        lines = [_line(name, record) for name, record in zip(names.tolist(), pairs.records[rows], strict=True)]
        with writing(self.folder):
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
        with writing(self.folder):
            for column in (*self._values.values(), *self._keys.values()):
                column.finish()
            self._records.close()
            np.save(self._path / "ids.npy", np.char.encode(ids, "utf-8") if ids.dtype.kind == "U" else ids, allow_pickle=False)
            np.save(self._path / "records.npy", np.cumsum([0, *self._lengths], dtype=np.int64), allow_pickle=False)
        return sorted(f"{self.folder}/{file.name}" for file in self._path.iterdir())

    def abandon(self) -> None:
        """Close whatever is still open; harmless after finish()."""
        files: list[Column | BufferedWriter] = [*self._values.values(), *self._keys.values(), self._records]
        for file in files:
            with suppress(OSError):  # a full disk also refuses the last flush, and the files are about to be deleted
                file.close()


def _line(name: str | int, record: Mapping[str, Any]) -> bytes:
    """One record as one line of JSON."""
    try:
        return _as_json(dict(record)).encode("utf-8", "surrogatepass") + b"\n"
    except (TypeError, ValueError) as error:
        raise PairsRefused(f"the record of id {name!r} is not JSON ({error}): keep strings, numbers, lists and mappings") from error
