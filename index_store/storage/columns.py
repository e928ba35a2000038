"""Column files of one shard, written row block by row block so that a memory may exceed RAM."""

import json
from collections.abc import Mapping
from contextlib import suppress
from io import BufferedWriter
from pathlib import Path
from typing import Any

import numpy as np

from index_store.errors import PairsRefused
from index_store.storage.atomic import translate_write_errors
from index_store.types import SIDES, Pairs, Side

_encode_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode  # json.dumps makes one per call


class Column:
    """An append-only .npy file of float16 rows.

    The header is written twice; numpy pads it so that the final row count fits in place.
    """

    def __init__(self, path: Path, width: int) -> None:
        self._width, self._rows = width, 0
        self._file = path.open("wb")
        self._write_header()

    def append(self, rows: np.ndarray) -> None:
        """Append rows.  rows: (R, width) float."""
        self._file.write(np.ascontiguousarray(rows, "<f2").data)
        self._rows += len(rows)

    def finish(self) -> None:
        """Write the final row count into the header and close the file."""
        self._file.seek(0)
        self._write_header()
        self.close()

    def close(self) -> None:
        """Close the file, finished or not."""
        self._file.close()

    def _write_header(self) -> None:
        np.lib.format.write_array_header_1_0(
            self._file, {"descr": "<f2", "fortran_order": False, "shape": (self._rows, self._width)}
        )


class ShardWriter:
    """Writer of the files of one shard; they are complete only after `finish`."""

    def __init__(self, root: Path, folder: str, dim: int, keys: Mapping[Side, Mapping[str, Any]]) -> None:
        self.folder, self.pairs = folder, 0
        self._path = root / folder
        own = [side for side in SIDES if keys[side]["kind"] != "vector"]
        with translate_write_errors(folder):
            self._path.mkdir()
            self._values = {side: Column(self._path / f"{side}.npy", dim) for side in SIDES}
            self._keys = {side: Column(self._path / f"{side}_key.npy", keys[side]["dim"]) for side in own}
            self._records = (self._path / "records.jsonl").open("wb")
        self._lengths, self._ids = list[int](), list[np.ndarray]()

    def append(self, pairs: Pairs, rows: slice) -> None:
        """Append some rows of a block of pairs."""
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
        """Complete and close every file; returns their names relative to the version."""
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
        """Close the files of an unfinished shard; does nothing after `finish`."""
        files: list[Column | BufferedWriter] = [*self._values.values(), *self._keys.values(), self._records]
        for file in files:
            with suppress(OSError):  # a full disk refuses the last flush
                file.close()


def encode_record(name: str | int, record: Mapping[str, Any]) -> bytes:
    """One record as one line of UTF-8 JSON. Raises PairsRefused where it is not JSON."""
    try:
        return _encode_json(dict(record)).encode("utf-8", "surrogatepass") + b"\n"
    except (TypeError, ValueError) as error:
        raise PairsRefused(
            f"the record of id {name!r} is not JSON ({error}): keep strings, numbers, lists and mappings"
        ) from error
