"""Block files: whole or absent, and damage is noticed."""

from pathlib import Path

import numpy as np
import pytest

from index_store.storage.blocks import DAMAGE, read_block, write_block

ARRAYS = {
    "rows": np.arange(600, dtype="<f2").reshape(100, 6),
    "ids": np.array([f"id-{number}" for number in range(100)]),
    "job": np.array("digest"),
    "none": np.zeros((0, 4), np.uint8),
}


def test_arrays_come_back_whole_or_by_name(tmp_path: Path) -> None:
    for _ in range(2):  # the second replaces the first
        write_block(tmp_path / "0.npz", ARRAYS)
    found = read_block(tmp_path / "0.npz")
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
    assert list(read_block(tmp_path / "0.npz", ["ids"])) == ["ids"]
    assert [path.name for path in tmp_path.iterdir()] == ["0.npz"]


def test_every_altered_row_and_every_cut_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "0.npz"
    write_block(path, ARRAYS)
    whole = path.read_bytes()
    first = whole.index(ARRAYS["rows"].tobytes())
    for place in range(first, first + ARRAYS["rows"].nbytes, 37):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DAMAGE):
            read_block(path, ["rows"])
    for length in range(0, len(whole), 101):
        path.write_bytes(whole[:length])
        with pytest.raises(DAMAGE):
            read_block(path, ["rows"])


def test_pickled_objects_are_never_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "0.npz", rows=np.array([{}], object))
    with pytest.raises(DAMAGE):
        read_block(tmp_path / "0.npz")
