"""Parquet files with vector columns, as vector databases export them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from index_store.build.source import SourceStep
from index_store.types import Side
from models.data.clip_retrieval import embedding_steps
from models.data.vector_tables import read_vector_table
from models.errors import DataError
from models.tests.small import unit_rows

D = 16
BOTH: dict[Side, str] = {"image": "v", "text": "t"}
IMAGE: dict[Side, str] = {"image": "v"}


def rows(n: int, seed: int = 0) -> np.ndarray:
    return unit_rows(np.random.default_rng(seed).standard_normal((n, D)))


def fixed(array: np.ndarray, kind: pa.DataType) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1).astype(kind.to_pandas_dtype()), kind), D)


def write(path: Path, columns: dict[str, Any]) -> Path:
    parquet.write_table(pa.table(columns), path)
    return path


def read(path: Path, columns: dict[Side, str] = BOTH, **options: Any) -> tuple[list[SourceStep], list[str]]:
    source, notes = read_vector_table(path, columns, dim=D, encoder="an/encoder", **options)

    def encode(captions: list[str]) -> np.ndarray:
        return rows(len(captions), 9)

    return list(embedding_steps(source, seen=set(), encode=encode)), notes


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64(), pa.float16()], ids=str)
@pytest.mark.parametrize("shape", ["list", "large list", "fixed"])
def test_vectors_of_every_list_type(tmp_path: Path, kind: pa.DataType, shape: str) -> None:
    def column(array: np.ndarray) -> pa.Array:
        if shape == "fixed":
            return fixed(array, kind)
        listed = pa.list_(kind) if shape == "list" else pa.large_list(kind)
        return pa.array([row.astype(kind.to_pandas_dtype()) for row in array], listed)

    path = write(
        tmp_path / "x.parquet", {"id": [5, 6, 7], "v": column(rows(3)), "t": column(rows(3, 1)), "n": [1, 2, 3]}
    )
    (step,), _ = read(path)
    assert step.pairs is not None
    assert step.pairs.ids.tolist() == [5, 6, 7]
    np.testing.assert_allclose(step.pairs.image, rows(3), atol=2e-3)
    np.testing.assert_allclose(step.pairs.text, rows(3, 1), atol=2e-3)
    assert step.pairs.records[1] == {"n": 2, "caption": ""}


def test_rows_without_a_vector_of_the_width_are_rejects(tmp_path: Path) -> None:
    good = rows(5000).tolist()
    vectors = [*good[:4998], good[0][:5], None]  # the last block has these two alone beside good ones
    columns = {"id": list(range(5000)), "caption": ["c"] * 5000, "v": pa.array(vectors, pa.list_(pa.float32()))}
    columns["v"] = pa.array([good[0], [*good[1][:-1], None], *vectors[2:]], pa.list_(pa.float32()))
    steps, _ = read(write(tmp_path / "x.parquet", columns), IMAGE)
    assert sum(len(step.pairs) for step in steps if step.pairs is not None) == 4997
    rejects = {reject.item: reject.reason for step in steps for reject in step.rejects}
    assert sorted(rejects) == ["1", "4998", "4999"]
    assert all("missing, of another width than the others, or holds NaN" in reason for reason in rejects.values())


def test_captions_are_encoded_where_there_are_no_text_vectors(tmp_path: Path) -> None:
    columns = {"id": ["a", "b"], "title": ["one", " "], "v": fixed(rows(2), pa.float32())}
    (step,), notes = read(write(tmp_path / "x.parquet", columns), IMAGE)
    assert step.pairs is not None
    assert step.pairs.ids.tolist() == ["a"]
    assert [reject.reason for reject in step.rejects] == ["no caption, and no text vector"]
    assert "text = the caption, encoded here" in notes[0]


@pytest.mark.parametrize(
    ("largest", "expected"),
    [(2**63 - 1, [7, 2**63 - 1]), (2**63, ["7", str(2**63)]), (2**64 - 1, ["7", str(2**64 - 1)])],
)
def test_unsigned_ids(tmp_path: Path, largest: int, expected: list[int | str]) -> None:
    columns = {"id": pa.array([7, largest], pa.uint64()), "v": fixed(rows(2), pa.float32()), "title": ["one", "two"]}
    (step,), _ = read(write(tmp_path / "x.parquet", columns), IMAGE)
    assert step.pairs is not None
    assert step.pairs.ids.tolist() == expected


def test_images_and_other_vectors_in_the_file_are_left_out(tmp_path: Path) -> None:
    image = pa.array([{"bytes": b"\xff\xd8", "path": "x.jpg"}] * 2)
    columns = {
        "id": ["a", "b"],
        "photo": image,
        "v": fixed(rows(2), pa.float32()),
        "other": fixed(rows(2), pa.float32()),
    }
    (step,), notes = read(write(tmp_path / "x.parquet", {**columns, "title": ["one", "two"]}), IMAGE)
    assert step.pairs is not None
    assert step.pairs.records[0] == {"title": "one", "caption": "one"}
    assert any("photo: image bytes, left out" in note for note in notes)


def test_what_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    columns = {"id": [1, 2], "v": fixed(rows(2), pa.float32()), "t": ["[0.1, 0.2]"] * 2}
    path = write(tmp_path / "x.parquet", columns)
    for wanted, options, message in (
        ({"image": "v", "text": "v"}, {}, "'v' cannot hold the vectors of both the images and the texts"),
        ({"image": "w"}, {}, "has no column 'w', only id, v, t: correct --image-vector"),
        (BOTH, {}, "column t, holds no lists of numbers: correct --text-vector"),
        (IMAGE, {"id_column": "v"}, "has no column 'v', only id, t: choose --id among these"),
    ):
        with pytest.raises(DataError, match=message):
            read(path, wanted, **options)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="holds rows of width 16, an/encoder gives 17"):
        read_vector_table(path, IMAGE, dim=17, encoder="an/encoder")


def test_vectors_that_are_not_of_unit_length_are_said(tmp_path: Path) -> None:
    columns = {"id": [1, 2, 3], "v": fixed(rows(3) * [[1], [2], [1]], pa.float32()), "title": ["a", "b", "c"]}
    _, notes = read(write(tmp_path / "x.parquet", columns), IMAGE)
    assert "x.parquet: 1 of the first 3 image vectors are not of unit length; all are scaled to it" in notes


def test_a_repeated_column_is_not_the_id(tmp_path: Path) -> None:
    table = pa.table([pa.array([1, 2]), pa.array([3, 4]), fixed(rows(2), pa.float32()), pa.array(["a", "b"])],
                     names=["id", "id", "v", "title"])  # fmt: skip
    parquet.write_table(table, tmp_path / "x.parquet")
    (step,), notes = read(tmp_path / "x.parquet", IMAGE)
    assert step.pairs is not None
    assert step.pairs.ids.tolist() == [0, 1]
    assert any("id: the name of several columns" in note for note in notes)
