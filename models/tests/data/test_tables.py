import datetime
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from index_store.build.source import Reject
from models.data.samples import Reading, Sample
from models.data.sources import open_sources, read_all, read_samples
from models.errors import DataError
from models.tests.small import image_bytes, picture, write_tar

JPG = image_bytes(picture(0), "JPEG")
PNG = image_bytes(picture(1), "PNG")


def write_images(path: Path) -> Path:
    path.mkdir()
    (path / "a.jpg").write_bytes(JPG)
    (path / "b.jpg").write_bytes(PNG)
    return path


def write_jsonl(path: Path, *lines: object) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (write_images(path) / "captions.jsonl").write_text(text)
    return path


def write_parquet(path: Path, columns: dict[str, Any]) -> Path:
    parquet.write_table(pa.table(columns), write_images(path) / "captions.parquet")
    return path


def test_json_lines_are_read(tmp_path: Path) -> None:
    found = list(
        read_samples(
            write_jsonl(
                tmp_path / "f",
                {"file": "a.jpg", "caption": " red ", "price": 3, "tags": ["x"], "score": float("nan")},
                "",
                {"filepath": "b.jpg", "caption": "green", "id": 7},
                "{oh",
                "[1]",
                {"caption": "no file"},
                {"file": "a.jpg"},
                {"file": "gone.jpg", "caption": "c"},
            )
        )
    )
    assert [item for item in found if isinstance(item, Sample)] == [
        Sample("a.jpg", JPG, "red", {"price": 3, "tags": ["x"], "score": None}),
        Sample("7", PNG, "green", {"filepath": "b.jpg"}),
    ]
    rejects = [(item.item, item.reason.partition(" (")[0]) for item in found if isinstance(item, Reject)]
    assert rejects == [
        ("a.jpg", "no caption"),  # it follows the other row of its image
        ("line 4", "its json does not parse"),
        ("line 5", "its json is not an object"),
        ("line 6", "no file is named"),
        ("gone.jpg", "the file cannot be read"),
    ]


def test_parquet_values_become_json_values(tmp_path: Path) -> None:
    noon = datetime.datetime(2026, 11, 22, 12, tzinfo=datetime.UTC)
    columns = {
        "file": ["a.jpg", "b.jpg"],
        "caption": ["red", None],
        "id": pa.array([7.0, None]),
        "score": [float("nan"), 2.5],
        "when": pa.array([1_763_812_800_000_000_123, None], pa.timestamp("ns")),
        "zoned": pa.array([noon, None], pa.timestamp("us", "UTC")),
        "day": [noon.date(), None],
        "nested": [{"sizes": [1, float("nan")], "at": noon.date()}, None],
        "kind": pa.array(["x", "x"]).dictionary_encode(),
        "bytes": [b"\xff\xfe", b"text"],
        "__index_level_0__": [5, 6],
    }
    found = list(read_samples(write_parquet(tmp_path / "f", columns)))
    assert found[1] == Reject("b.jpg", "no caption")
    assert isinstance(found[0], Sample)
    assert found[0].id == "7"
    assert found[0].metadata == {
        "file": "a.jpg",
        "score": None,
        "when": "2025-11-22T12:00:00",
        "zoned": "2026-11-22T12:00:00+00:00",
        "day": "2026-11-22",
        "nested": {"sizes": [1, None], "at": "2026-11-22"},
        "kind": "x",
    }
    json.dumps(found[0].metadata, allow_nan=False)


def test_unreadable_tables_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"captions\.parquet of f has the columns \['name'\]: file \(or filepath\) and caption"
    ):
        list(read_samples(write_parquet(tmp_path / "f", {"name": ["a"]})))
    (write_images(tmp_path / "g") / "captions.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="not a readable parquet file") as refused:
        list(read_samples(tmp_path / "g"))
    assert "\n" not in str(refused.value)
    assert str(tmp_path) not in str(refused.value)
    (tmp_path / "g" / "captions.csv").write_text("file,caption\n")
    with pytest.raises(DataError, match=r"g holds captions\.csv and captions\.parquet: keep the one"):
        list(read_samples(tmp_path / "g"))


def test_the_output_of_img2dataset_is_read_by_folder_or_by_glob(tmp_path: Path) -> None:
    record = {
        "url": "https://x/1.jpg",
        "key": "000000000",
        "status": "success",
        "error_message": None,
        "exif": "{}",
        "sha256": "ab",
    }
    for shard in ("00000", "00001"):
        write_tar(
            tmp_path / f"{shard}.tar",
            [
                (f"{shard}0.jpg", JPG),
                (f"{shard}0.txt", b"a caption"),
                (f"{shard}0.json", {**record, "caption": "a caption"}),
                (f"{shard}1.jpg", JPG),
                (f"{shard}1.json", {**record, "caption": None}),
            ],
        )
        parquet.write_table(pa.table({"url": ["x"], "status": ["failed_to_download"]}), tmp_path / f"{shard}.parquet")
        (tmp_path / f"{shard}_stats.json").write_text("{}")
    assert [part.name for part in open_sources([tmp_path], Reading())] == ["00000.tar", "00001.tar"]
    found = list(read_all([tmp_path], Reading()))
    assert found[0] == Sample("000000", JPG, "a caption", record)
    assert found[1] == Reject("000001", "no caption")
    assert len(found) == 4


@pytest.mark.parametrize("skip", [0, 1, 4, 7, 11, 1000])
def test_skipped_items_are_the_same_items_without_their_images(tmp_path: Path, skip: int) -> None:
    tar = write_tar(
        tmp_path / "s.tar",
        [
            ("0.jpg", JPG),
            ("0.txt", b"one"),
            ("1.txt", b"no image"),
            ("2.json", {"captions": ["a", "b", "c"]}),
            ("2.jpg", PNG),
            ("3.jpg", JPG),
            ("3.json", b"{oh"),
        ],
    )
    with tarfile.open(tar) as whole_tar:
        end = whole_tar.getmembers()[-1].offset_data
    os.truncate(tar, end + 512)  # the end mark is missing
    sources = [
        tar,
        write_jsonl(tmp_path / "f", {"file": "a.jpg", "caption": "c"}, "[]", {"file": "b.jpg", "caption": "d"}),
    ]
    parts = open_sources(sources, Reading())
    whole = list(read_all(sources, Reading()))
    done = {item.id for item in whole[:skip] if isinstance(item, Sample)}
    rest = [item for part in parts for item in part.read(lambda _, name: name in done)]
    assert len(whole) >= 9
    assert [getattr(item, "id", None) for item in rest] == [getattr(item, "id", None) for item in whole]
    assert {item.id for item in rest if isinstance(item, Sample) and item.image == b""} <= done
    assert [item for item in rest if isinstance(item, Sample) and item.id not in done] == [
        item for item in whole if isinstance(item, Sample) and item.id not in done
    ]
