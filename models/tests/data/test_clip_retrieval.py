from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from index_store.build.build import build_version
from index_store.build.source import BuildSource, SourceStep
from index_store.store import Store
from index_store.types import Id
from models.data.clip_retrieval import embedding_steps, is_embedding_folder, read_embedding_folder
from models.errors import DataError
from models.tests.small import unit_rows

D = 16
ENCODER = "tiny/test@0123456789ab"


def random_rows(n: int, seed: int) -> np.ndarray:
    return unit_rows(np.random.default_rng(seed).standard_normal((n, D))).astype(np.float16)


def write_part(
    folder: Path, number: int, n: int, *, image: np.ndarray | None = None, columns: Mapping[str, Any] | None = None
) -> None:
    """Write the three files of one part, as clip-retrieval does."""
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    np.save(folder / "img_emb" / f"img_emb_{number}.npy", random_rows(n, number) if image is None else image)
    np.save(folder / "text_emb" / f"text_emb_{number}.npy", random_rows(n, 100 + number))
    names = [f"{number}-{i}" for i in range(n)]
    table = {
        "caption": [f"caption {name}" for name in names],
        "image_path": [f"/in/{name}.jpg" for name in names],
        "key": names,
    }
    parquet.write_table(
        pa.table(dict(table if columns is None else columns)), folder / "metadata" / f"metadata_{number}.parquet"
    )


def read_steps(
    folder: Path, done: Collection[Id] = (), seen: set[Id] | None = None, **options: Any
) -> list[SourceStep]:
    source = read_embedding_folder(folder, dim=D, encoder=ENCODER, **options)
    return list(embedding_steps(source, seen=set() if seen is None else seen, done=done))


def pair_ids(found: list[SourceStep]) -> list[Id]:
    return [name for step in found if step.pairs is not None for name in step.pairs.ids.tolist()]


def test_parts_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 2, 0):
        write_part(tmp_path, number, 3)
    assert is_embedding_folder(tmp_path)
    found = read_steps(tmp_path)
    assert pair_ids(found) == [f"{number}-{i}" for number in (0, 2, 10) for i in range(3)]
    assert sum(step.items for step in found) == 9
    third = found[2].pairs
    assert third is not None
    np.testing.assert_allclose(third.image, unit_rows(random_rows(3, 10).astype(np.float32)), atol=1e-6)
    np.testing.assert_allclose(third.text, unit_rows(random_rows(3, 110).astype(np.float32)), atol=1e-6)
    assert third.records[1] == {"caption": "caption 10-1", "image_path": "/in/10-1.jpg"}


def test_ids_are_a_column_or_the_row_number(tmp_path: Path) -> None:
    table = {"caption": ["a", None], "url": ["u0", "u1"], "sku": [5, 9], "id": ["x", "y"]}
    write_part(tmp_path, 0, 2, columns=table)
    assert pair_ids(read_steps(tmp_path)) == ["u0", "u1"]
    (step,) = read_steps(tmp_path, id_column="sku")
    assert step.pairs is not None
    assert step.pairs.ids.dtype == np.int64
    assert step.pairs.ids.tolist() == [5, 9]
    assert step.pairs.records == [
        {"caption": "a", "url": "u0", "source_id": "x"},
        {"caption": "", "url": "u1", "source_id": "y"},
    ]
    with pytest.raises(
        DataError, match=r"metadata/metadata_0\.parquet has no column 'isbn', only caption, url, sku, id"
    ):
        read_steps(tmp_path, id_column="isbn")
    write_part(tmp_path, 0, 2, columns={"caption": ["a", "b"]})
    write_part(tmp_path, 1, 2, columns={"caption": ["c", "d"]})
    assert pair_ids(read_steps(tmp_path)) == [0, 1, 2, 3]


def test_rows_are_normalized_and_zero_or_infinite_ones_rejected(tmp_path: Path) -> None:
    image = random_rows(6, 0).astype(np.float32)
    image[0] *= 17
    image[1] = 0
    image[2, 3] = np.nan
    image[3, 0] = np.inf
    write_part(tmp_path, 0, 6, image=image, columns={"key": ["a", "b", "c", "d", None, "a"]})
    (step,) = read_steps(tmp_path)
    assert step.pairs is not None
    assert pair_ids([step]) == ["a"]
    np.testing.assert_allclose(step.pairs.image[0], image[0] / 17, atol=1e-3)
    assert {reject.item: reject.reason for reject in step.rejects} == {
        "b": "its image vector has length 0: it has no direction",
        "c": "its image vector has no length: it is missing, of another width than the others, or holds NaN",
        "d": "its image vector has length inf: it has no direction",
        "4": "it has no id",
        "a": "its id came before: ids must be unique",
    }


@pytest.mark.parametrize("skip", [0, 2, 3, 5, 7])
def test_an_interrupted_import_continues_within_a_part(tmp_path: Path, skip: int) -> None:
    for number in (0, 1):
        write_part(tmp_path, number, 4, columns={"key": [f"{number}-{i}" if i else "same" for i in range(4)]})
    whole, seen = read_steps(tmp_path), set[Id]()
    accepted = ["same", "0-1", "0-2", "0-3", None, "1-1", "1-2", "1-3"]
    done = {name for name in accepted[:skip] if name}
    rest = read_steps(tmp_path, done, seen)
    assert (sum(step.items for step in rest), sum(step.stored for step in rest)) == (8, len(done))
    assert pair_ids(rest) == [name for name in accepted[skip:] if name]
    assert seen == {name for name in accepted if name}
    assert pair_ids(whole) == [name for name in accepted if name]


def test_a_resumed_import_counts_an_id_that_comes_twice_as_before(tmp_path: Path) -> None:
    write_part(tmp_path, 0, 4, columns={"key": ["a", "b", "a", "a"]})
    (step,) = read_steps(tmp_path, done={"a", "b"})
    assert (step.items, step.stored, step.pairs) == (4, 2, None)
    assert [(reject.item, reject.kind) for reject in step.rejects] == [("a", "duplicate")] * 2


def test_image_bytes_in_the_metadata_are_left_out(tmp_path: Path) -> None:
    image = pa.array([{"bytes": b"\xff\xd8", "path": "x.jpg"}] * 2)
    write_part(tmp_path, 0, 2, columns={"key": ["a", "b"], "image": image, "n": [1, 2]})
    (step,) = read_steps(tmp_path)
    assert step.pairs is not None
    assert step.pairs.records == [{"n": 1, "caption": ""}, {"n": 2, "caption": ""}]


def damage(folder: Path, what: str) -> None:
    image = folder / "img_emb" / "img_emb_1.npy"
    if what == "a missing part":
        (folder / "text_emb" / "text_emb_1.npy").unlink()
    elif what == "another count":
        np.save(image, random_rows(3, 0))
    elif what == "a cut file":
        image.write_bytes(image.read_bytes()[:-20])
    elif what == "another width":
        np.save(image, np.ones((4, D + 1), np.float16))
    elif what == "integers":
        np.save(image, np.ones((4, D), np.int64))
    elif what == "a pickle":
        np.save(image, np.array([{}] * 4), allow_pickle=True)
    elif what == "a broken table":
        (folder / "metadata" / "metadata_1.parquet").write_bytes(b"PAR1")
    elif what == "no number":
        image.rename(image.with_name("images.npy"))
    else:
        for path in (folder / "metadata").iterdir():
            path.unlink()


DAMAGES = {
    "a missing part": "text_emb lacks part 1",
    "another count": r"img_emb/img_emb_1\.npy 3, text_emb/text_emb_1\.npy 4, metadata/metadata_1\.parquet 4",
    "a cut file": r"img_emb/img_emb_1\.npy is not a readable \.npy file",
    "another width": "have the widths 17 and 16",
    "integers": "holds int64",
    "a pickle": "not a readable .npy file",
    "a broken table": r"metadata_1\.parquet of metadata is not a readable parquet file",
    "no number": r"img_emb/images\.npy has no number of its own",
    "no table": "metadata lacks part 0",
}


@pytest.mark.parametrize("what", DAMAGES)
def test_an_inconsistent_folder_is_refused_in_one_line(tmp_path: Path, what: str) -> None:
    for number in (0, 1):
        write_part(tmp_path, number, 4)
    damage(tmp_path, what)
    with pytest.raises(DataError, match=DAMAGES[what]) as refused:
        read_steps(tmp_path)
    assert "\n" not in str(refused.value)
    assert str(tmp_path.parent) not in str(refused.value)


def test_another_width_than_the_encoders_is_refused(tmp_path: Path) -> None:
    write_part(tmp_path, 0, 4)
    with pytest.raises(
        DataError, match=r"img_emb/img_emb_0\.npy holds rows of width 16, tiny/test@0123456789ab gives 512"
    ):
        read_embedding_folder(tmp_path, dim=512, encoder=ENCODER)


def test_a_memory_of_embeddings_finds_their_nearest_rows(tmp_path: Path) -> None:
    for number in (0, 1):
        write_part(tmp_path / "in", number, 50)
    source = read_embedding_folder(tmp_path / "in", dim=D, encoder=ENCODER)
    steps = BuildSource({}, lambda done: embedding_steps(source, seen=set()))
    store = Store(tmp_path / "store")
    build_version(store, "m", "v1", steps, encoder=ENCODER, kinds={"image": "vector", "text": "vector"})
    image = np.concatenate([random_rows(50, 0), random_rows(50, 1)]).astype(np.float32)
    queries = random_rows(5, 77).astype(np.float32)
    expected = np.argsort(-(queries @ image.T), axis=1)[:, :3]
    found = store.open("m", "v1", encoder=ENCODER).retrieve(queries, "image", 3)
    names = np.array([f"{number}-{i}" for number in (0, 1) for i in range(50)])
    np.testing.assert_array_equal(found.ids, names[expected])
