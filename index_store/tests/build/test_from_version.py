from pathlib import Path

import numpy as np
import pytest

from index_store.build.from_version import is_version, read_compatible_manifest, read_steps
from index_store.build.source import SourceStep
from index_store.editor import Editor
from index_store.errors import DamagedVersion, IncompatibleSnapshot, PairsRefused
from index_store.store import Store
from index_store.tests.support.small import ENCODER, TRUNKS, VECTORS, build_memory, some_pairs, unlock
from index_store.types import Id, Pairs


def stored(
    path: Path, *, trunks: bool = False, seen: set[Id] | None = None, done: set[Id] | None = None
) -> list[SourceStep]:
    kinds = TRUNKS if trunks else VECTORS
    manifest = read_compatible_manifest(path, encoder=ENCODER, kinds=kinds)
    return list(read_steps(path, manifest, kinds=kinds, seen=set() if seen is None else seen, done=done or ()))


@pytest.mark.parametrize("ints", [False, True])
def test_every_pair_comes_back(tmp_path: Path, ints: bool) -> None:
    pairs = some_pairs(50, key_width=8, ints=ints)
    build_memory(tmp_path, pairs, shard_pairs=20)
    path = Store(tmp_path).path("things", "v1")
    assert is_version(path)
    assert not is_version(tmp_path)
    found = [step.pairs for step in stored(path, trunks=True) if step.pairs is not None]
    assert [len(block) for block in found] == [20, 20, 10]
    assert [name for block in found for name in block.ids.tolist()] == pairs.ids.tolist()
    assert [record for block in found for record in block.records] == pairs.records
    for field in ("image", "text", "image_key"):
        np.testing.assert_array_equal(
            np.concatenate([getattr(block, field) for block in found]), getattr(pairs, field).astype(np.float16)
        )
    build_memory(tmp_path, found, "v2", shard_pairs=20)
    first, second = Store(tmp_path).manifest("things", "v1"), Store(tmp_path).manifest("things", "v2")
    assert first.files == second.files


def test_keys_that_are_not_asked_for_are_left(tmp_path: Path) -> None:
    build_memory(tmp_path, some_pairs(10, key_width=8))
    (step,) = stored(Store(tmp_path).path("things", "v1"))
    assert isinstance(step.pairs, Pairs)
    assert not step.pairs.has_own_keys("image")


def test_ids_that_are_taken_are_rejected_and_rows_passed_over_are_taken(tmp_path: Path) -> None:
    build_memory(tmp_path, some_pairs(10), shard_pairs=4)
    path, seen = Store(tmp_path).path("things", "v1"), set[Id]({"pair-7"})
    found = stored(path, seen=seen, done={f"pair-{i}" for i in range(5)})
    assert [name for step in found if step.pairs for name in step.pairs.ids.tolist()] == [
        "pair-5",
        "pair-6",
        "pair-8",
        "pair-9",
    ]
    assert [reject.item for step in found for reject in step.rejects] == ["pair-7"]
    assert (sum(step.items for step in found), sum(step.stored for step in found)) == (10, 5)
    assert seen == {f"pair-{i}" for i in range(10)}


def test_that_edits_are_left_out_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build_memory(tmp_path, some_pairs(10))
    path = Store(tmp_path).path("things", "v1")
    assert sum(len(step.pairs) for step in stored(path) if step.pairs) == 10
    assert caplog.text == ""
    editor = Editor.open(Store(tmp_path), "things", "v1", encoder=ENCODER)
    editor.put(some_pairs(2, first=100))
    editor.close()
    assert sum(len(step.pairs) for step in stored(path) if step.pairs) == 10
    assert "things@v1: 1 edits made on it online are left out: compact it" in caplog.text


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    build_memory(tmp_path, some_pairs(10))
    path = Store(tmp_path).path("things", "v1")
    with pytest.raises(IncompatibleSnapshot, match="things@v1 was built by tiny/test@0123456789ab, not by other@ffff"):
        read_compatible_manifest(path, encoder="other@ffff", kinds=VECTORS)
    with pytest.raises(PairsRefused, match="holds vector image keys, trunk keys are asked for"):
        read_compatible_manifest(path, encoder=ENCODER, kinds=TRUNKS)
    file = unlock(path) / "shard-0000" / "text.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(DamagedVersion, match=r"text\.npy"):
        stored(path)
