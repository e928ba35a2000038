"""A fuzzer of the store's files: whatever a damaged file holds, opening it is a StoreError or gives
a memory that can be searched.
"""

from pathlib import Path

import numpy as np
import pytest

from index_store.editor import Editor
from index_store.errors import StoreError
from index_store.store import Store
from index_store.tests.support.mutate import SEED, choose, mutate_bytes, rounds
from index_store.tests.support.small import ENCODER, build_memory, some_pairs, unit_rows


@pytest.mark.parametrize("kind", ["manifest", "shards", "journal", "pointer"])
def test_a_damaged_file_is_refused_or_read(tmp_path: Path, kind: str) -> None:
    build_memory(tmp_path, some_pairs(40), shard_pairs=20, index="IVF2,Flat")
    store = Store(tmp_path)
    store.activate("things", "v1")
    editor = Editor.open(store, "things", encoder=ENCODER)
    editor.put(some_pairs(5, first=100, seed=9))
    editor.delete(["pair-3"])
    editor.close()
    version = tmp_path / "things" / "v1"
    files = {
        "manifest": [version / "manifest.json"],
        "shards": sorted(path for path in version.rglob("*") if path.is_file() and path.name != "manifest.json"),
        "journal": [store.journal_path("things", "v1")],
        "pointer": [tmp_path / "things" / "CURRENT"],
    }[kind]
    originals = {path: path.read_bytes() for path in files}
    queries = unit_rows(2, 16, 1)
    for number, rng in enumerate(rounds()):
        path = choose(files, rng)
        _write(path, mutate_bytes(originals[path], rng))
        where = f"seed {SEED}, round {number}: {path.relative_to(tmp_path)}"
        try:
            found = Editor.open(Store(tmp_path), "things", encoder=ENCODER).snapshot.retrieve(queries, "image", 3)
            assert np.isfinite(found.scores[found.mask]).all(), where
            found.records(0)
        except StoreError:
            pass
        except Exception as error:
            raise AssertionError(f"{where}: {error!r}") from error
        finally:
            _write(path, originals[path])


def _write(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)
