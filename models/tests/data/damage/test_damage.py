"""One damaged line, column, member or name never stops the good ones beside it."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from index_store.build.source import Reject
from models.data.samples import Reading, Sample
from models.data.sources import open_sources, read_samples
from models.errors import DataError
from models.tests.small import image_bytes, picture, write_tar

JPG = image_bytes(picture(0), "JPEG")
PNG = image_bytes(picture(1), "PNG")


def samples(source: Path) -> list[Sample]:
    return [item for item in read_samples(source) if isinstance(item, Sample)]


def captions(source: Path) -> dict[str, str]:
    return {sample.id: sample.caption for sample in samples(source)}


def rejects(source: Path) -> dict[str, str]:
    return {item.item: item.reason for item in read_samples(source) if isinstance(item, Reject)}


def notes(source: Path) -> list[str]:
    return [note for part in open_sources([source], Reading()) for note in part.notes]


def write(folder: Path, name: str, content: bytes | str) -> Path:
    folder.mkdir(exist_ok=True)
    for photo in ("a.jpg", "b.jpg", "c.jpg"):
        (folder / photo).write_bytes(JPG)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


# --- delimited text


def test_a_damaged_byte_in_the_second_line_of_a_cell(tmp_path: Path) -> None:
    source = write(tmp_path / "f", "t.csv", b'file,caption\na.jpg,"one\nl\xe9ne"\nb.jpg,fine\nc.jpg,also \xc3\xa9\n')
    assert captions(source) == {"b.jpg": "fine", "c.jpg": "also é"}
    assert rejects(source) == {"line 2": "it is not UTF-8 (byte 0xE9)"}


@pytest.mark.parametrize("damage", ["cut", "half a surrogate pair"])
def test_damage_in_utf_16(tmp_path: Path, damage: str) -> None:
    text = "\ufefffile,caption\r\na.jpg,fine\r\nb.jpg,bad one"
    data = text.encode("utf-16-le")[:-1] if damage == "cut" else text.encode("utf-16-le") + b"\x00\xd8"
    source = write(tmp_path / "f", "t.csv", data)
    assert captions(source) == {"a.jpg": "fine"}
    assert rejects(source) == {"line 3": "it is not UTF-16 (a damaged character)"}


# --- parquet


def write_columns(folder: Path, columns: Iterable[tuple[str, Any]], name: str = "t.parquet") -> Path:
    names, values = zip(*columns, strict=True)
    folder.mkdir(exist_ok=True)
    (folder / "a.jpg").write_bytes(JPG)
    (folder / "b.jpg").write_bytes(PNG)
    parquet.write_table(pa.table([pa.array(each) for each in values], names=list(names)), folder / name)
    return folder


def test_a_second_image_and_other_bytes_are_no_metadata(tmp_path: Path) -> None:
    columns = [
        ("image", [{"bytes": JPG, "path": "x.jpg"}, {"bytes": PNG, "path": "y.jpg"}]),
        ("mask", [{"bytes": PNG, "path": "m.png"}] * 2),
        ("crops", [[{"bytes": PNG, "path": "m.png"}]] * 2),
        ("digest", [b"\xff\xfe", b"\x80"]),
        ("written", [b"text", b"in bytes"]),
        ("later", [None, b"ok"]),
        ("caption", ["one", "two"]),
    ]
    source = write_columns(tmp_path / "f", columns)
    first, second = samples(source)
    assert (first.image, first.id, first.caption) == (JPG, "x.jpg", "one")
    assert (first.metadata, second.metadata) == (
        {"written": "text", "later": None},
        {"written": "in bytes", "later": "ok"},
    )
    found = " ".join(notes(source))
    assert "mask: further images, left out of the metadata" in found
    assert "crops, digest: vectors or bytes, left out of the metadata" in found


def test_bytes_that_are_no_text_in_a_later_row_become_null(tmp_path: Path) -> None:
    rows = 200
    columns = [("file", ["a.jpg"] * rows), ("caption", [str(i) for i in range(rows)])]
    source = write_columns(tmp_path / "f", [*columns, ("b", [b"text"] * (rows - 1) + [b"\xff"])])
    assert samples(source)[-1].metadata == {"b": None}


def test_a_repeated_column_of_a_parquet_file_is_not_read(tmp_path: Path) -> None:
    columns = [("file", ["a.jpg"]), ("caption", ["one"]), ("n", [1]), ("n", [2])]
    source = write_columns(tmp_path / "f", columns)
    assert samples(source)[0].metadata == {}
    assert "n: the name of several columns, none of them is read" in " ".join(notes(source))


def test_an_upper_case_ending_is_the_same_kind(tmp_path: Path) -> None:
    source = write_columns(tmp_path / "f", [("file", ["a.jpg"]), ("caption", ["one"])], "LIST.PARQUET")
    assert captions(source) == {"a.jpg": "one"}


def test_durations_and_columns_that_cannot_be_read(tmp_path: Path) -> None:
    columns = [("file", ["a.jpg"]), ("caption", ["one"])]
    source = write_columns(tmp_path / "f", [*columns, ("took", pa.array([1_500_000_001], pa.duration("ns")))])
    assert samples(source)[0].metadata == {"took": 1.5}


# --- links, names, ids


def test_a_photo_that_links_to_itself(tmp_path: Path) -> None:
    (tmp_path / "hat").mkdir()
    (tmp_path / "hat" / "a.jpg").write_bytes(JPG)
    (tmp_path / "hat" / "loop.jpg").symlink_to(tmp_path / "hat" / "loop.jpg")
    (tmp_path / "hat" / "loop").symlink_to(tmp_path / "hat" / "loop")
    assert captions(tmp_path) == {"hat/a.jpg": "a photo of hat"}
    assert rejects(tmp_path) == {"hat/loop.jpg": "it is not a file within the folder"}
    (tmp_path / "loop.csv").symlink_to(tmp_path / "loop.csv")
    with pytest.raises(DataError, match="Too many levels of symbolic links"):
        captions(tmp_path)


def test_generated_ids_are_no_ids_of_the_table(tmp_path: Path) -> None:
    rows = [
        {"file": "a.jpg", "caption": "one"},
        {"file": "a.jpg", "caption": "two"},
        {"file": "b.jpg", "caption": "three", "id": "a.jpg#1"},
        {"file": "b.jpg", "caption": "four", "id": "c.jpg"},
        {"file": "c.jpg", "captions": ["five", "six"]},
        {"file": "c.jpg", "caption": "seven"},
    ]
    source = write(tmp_path / "f", "captions.jsonl", "\n".join(map(json.dumps, rows)))
    assert sorted(captions(source).values()) == ["five", "four", "one", "seven", "six", "three", "two"]
    assert rejects(source) == {}
    assert captions(source)["a.jpg#1"] == "three"


def test_rows_with_images_without_a_name_have_their_number(tmp_path: Path) -> None:
    source = write_columns(tmp_path / "f", [("image", [JPG, PNG, JPG]), ("caption", ["one", "two", "three"])])
    assert captions(source) == {"0": "one", "1": "two", "2": "three"}


def test_numbered_names_keep_their_names(tmp_path: Path) -> None:
    source = write(tmp_path / "f", "t.token.txt", "a.jpg#0\tone\na.jpg#1\ttwo\na.jpg#1\tthree\n")
    assert captions(source) == {"a.jpg#0": "one", "a.jpg#1": "two", "a.jpg#1#1": "three"}


# --- tars


@pytest.mark.parametrize("header", [{"GNU.sparse.map": "abc"}, {"GNU.sparse.size": "x"}, {"size": "-1536"}])
def test_an_extended_header_of_nonsense_ends_the_archive(tmp_path: Path, header: dict[str, str]) -> None:
    good = write_tar(tmp_path / "good.tar", [("a.jpg", JPG), ("a.txt", b"one")]).read_bytes()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("b.jpg")
        member.size, member.pax_headers = len(JPG), header
        tar.addfile(member, io.BytesIO(JPG))
    end = len(good.rstrip(b"\0"))
    (tmp_path / "bad.tar").write_bytes(good[: -(-end // 512) * 512] + buffer.getvalue())
    (tmp_path / "good.tar").unlink()
    assert captions(tmp_path) == {"a": "one"}
    (reason,) = rejects(tmp_path).values()
    assert reason.startswith("the archive breaks off")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it has 0 bytes"),
        (b"<!DOCTYPE html><html>no such file</html>", "it is an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "run `git lfs pull`"),
    ],
)
def test_a_file_that_is_no_tar_stops_no_other(tmp_path: Path, content: bytes, reason: str) -> None:
    write_tar(tmp_path / "1.tar", [("a.jpg", JPG), ("a.txt", b"one")])
    (tmp_path / "0.tar").write_bytes(content)
    assert captions(tmp_path) == {"a": "one"}
    assert reason in rejects(tmp_path)["0.tar"]
