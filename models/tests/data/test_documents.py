"""JSON documents and workbooks, whole, damaged, and those that are no tables of captions."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from openpyxl import Workbook

from index_store.build.source import Reject
from models.data.samples import Reading, Sample
from models.data.sources import open_sources, read_samples
from models.errors import DataError
from models.tests.small import image_bytes, picture

JPG = image_bytes(picture(0), "JPEG")


def put(folder: Path, *names: str) -> Path:
    """Photos under these names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(JPG)
    return folder


def captions(source: Path, caption: str | None = None) -> dict[str, str]:
    return {item.id: item.caption for item in read_samples(source, caption=caption) if isinstance(item, Sample)}


def rejects(source: Path) -> dict[str, str]:
    return {item.item: item.reason for item in read_samples(source) if isinstance(item, Reject)}


def coco(name: str, *annotations: Any) -> dict[str, Any]:
    return {"images": [{"id": 1, "file_name": name}], "annotations": list(annotations)}


def test_every_table_of_a_coco_folder_is_read(tmp_path: Path) -> None:
    put(tmp_path, "train2017/1.jpg", "val2017/2.jpg", "annotations/.keep")
    for split, name in (("train", "1.jpg"), ("val", "2.jpg")):
        words = json.dumps(coco(name, {"image_id": 1, "caption": split}))
        boxes = json.dumps(coco(name, {"image_id": 1, "bbox": [0, 0, 1, 1]}))
        (tmp_path / "annotations" / f"captions_{split}2017.json").write_text(words)
        (tmp_path / "annotations" / f"instances_{split}2017.json").write_text(boxes)
    assert captions(tmp_path) == {"1.jpg": "train", "2.jpg": "val"}
    notes = [note for part in open_sources([tmp_path], Reading()) for note in part.notes if "left alone" in note]
    assert [note.partition(" ")[0] for note in notes] == ["instances_train2017.json", "instances_val2017.json"]
    assert all("without any caption" in note for note in notes)
    with pytest.raises(DataError, match="lists images without any caption, as COCO's instances"):
        captions(tmp_path / "annotations" / "instances_val2017.json")


def test_a_table_beneath_another_is_left_alone(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg", "more/b.jpg")
    (tmp_path / "captions.csv").write_text("file,caption\na.jpg,one\n")
    (tmp_path / "more" / "captions.csv").write_text("file,caption\nb.jpg,two\n")
    assert captions(tmp_path) == {"a.jpg": "one"}
    notes = [note for part in open_sources([tmp_path], Reading()) for note in part.notes]
    assert "captions.csv of more is left alone: a table above names its photos" in notes


def test_a_json_of_settings_is_no_table(tmp_path: Path) -> None:
    put(tmp_path, "hat/a.jpg", "shoe/b.jpg")
    (tmp_path / "package.json").write_text('{"name": "shop", "license": "MIT", "files": ["x"]}')
    assert captions(tmp_path) == {"hat/a.jpg": "a photo of hat", "shoe/b.jpg": "a photo of shoe"}


def test_a_mapping_from_names_to_captions(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    (tmp_path / "all.json").write_text('{"a.jpg": "one", "b.jpg": ["two", "three"], "c.jpg": {"x": 1}}')
    assert captions(tmp_path) == {"a.jpg": "one", "b.jpg#0": "two", "b.jpg#1": "three"}
    assert list(rejects(tmp_path)) == ["c.jpg"]


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ({"captions": "a dog"}, {"a.jpg": "a dog"}),
        ({"caption": "a dog"}, {"a.jpg": "a dog"}),
        ({"sentences": 3}, {"a.jpg": "3"}),
        ({"sentences": {"raw": "a dog"}}, {}),
        ({"sentences": [{"raw": "a dog"}, "a cat", None]}, {"a.jpg#0": "a dog", "a.jpg#1": "a cat"}),
    ],
)
def test_sentences_of_any_type(tmp_path: Path, field: dict[str, Any], expected: dict[str, str]) -> None:
    put(tmp_path, "a.jpg", "b.jpg")
    images = [{"filename": "a.jpg", **field}, {"filename": "b.jpg", "captions": ["fine"]}]
    (tmp_path / "dataset.json").write_text(json.dumps({"images": images}))
    assert captions(tmp_path) == {**expected, "b.jpg": "fine"}


def test_annotations_of_any_type(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg")
    odd = [{"image_id": [1], "caption": "lost"}, {"caption": "of none"}, "text", {"image_id": 1, "caption": "kept"}]
    (tmp_path / "captions.coco.json").write_text(json.dumps(coco("a.jpg", *odd)))
    assert captions(tmp_path) == {"a.jpg": "kept"}
    assert rejects(tmp_path) == {
        "annotation 2": "it is not an object",
        "annotation of image [1]": "no image has this number",
        "annotation of image null": "no image has this number",
    }


def test_numbers_and_nesting_that_json_has_not(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg", "b.jpg")
    deep = "[" * 100 + "]" * 100
    lines = ['{"file": "a.jpg", "caption": "one", "n": 1e999}', f'{{"file": "b.jpg", "caption": "two", "n": {deep}}}']
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    (sample,) = (item for item in read_samples(tmp_path) if isinstance(item, Sample))
    assert sample.metadata == {"n": None}
    assert rejects(tmp_path) == {"line 2": "its json is nested deeper than 32 levels"}


# --- workbooks


def workbook(path: Path, *rows: list[Any]) -> Path:
    book = Workbook()
    for row in rows:
        book.active.append(row)
    book.save(path)
    return path


def rewrite(path: Path, name: str, change: Any) -> None:
    """Replace one file within a workbook by what `change` makes of its bytes."""
    with zipfile.ZipFile(path) as whole:
        parts = {each: whole.read(each) for each in whole.namelist()}
    parts[name] = change(parts[name])
    with zipfile.ZipFile(path, "w") as fresh:
        for each, data in parts.items():
            fresh.writestr(each, data)


def test_a_workbook_of_damaged_xml_is_read_up_to_the_damage(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg", "b.jpg")
    book = workbook(tmp_path / "list.xlsx", ["file", "caption"], ["a.jpg", "one"], ["b.jpg", "two"])
    rewrite(book, "xl/worksheets/sheet1.xml", lambda data: data[: data.rindex(b"<row")] + b"<row r=<<<")
    assert captions(tmp_path) == {"a.jpg": "one"}
    (reason,) = rejects(tmp_path).values()
    assert reason.startswith("the sheet breaks off (")


@pytest.mark.parametrize(
    "part", ["xl/workbook.xml", "xl/worksheets/sheet1.xml", "[Content_Types].xml", "xl/styles.xml"]
)
@pytest.mark.parametrize("content", [b"", b"<oh", b"\x00\xff", b"<a/>"])
def test_a_workbook_that_cannot_be_opened_is_refused_in_one_line(tmp_path: Path, part: str, content: bytes) -> None:
    put(tmp_path, "a.jpg")
    book = workbook(tmp_path / "list.xlsx", ["file", "caption"], ["a.jpg", "one"])
    rewrite(book, part, lambda _: content)
    try:
        assert captions(book) in ({"a.jpg": "one"}, {})
    except DataError as error:
        assert "\n" not in str(error)


def test_cells_of_a_workbook_without_a_value_are_missing(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg", "b.jpg")
    workbook(tmp_path / "list.xlsx", ["file", "caption", "n"], ["a.jpg", "one", "#DIV/0!"], ["b.jpg", "#N/A", 3])
    (sample,) = (item for item in read_samples(tmp_path) if isinstance(item, Sample))
    assert (sample.caption, sample.metadata) == ("one", {"n": None})
    assert rejects(tmp_path) == {"b.jpg": "no caption"}


def test_a_repeated_header_of_a_workbook_is_not_read(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg")
    workbook(tmp_path / "list.xlsx", [None], ["file", "caption", "n", "n"], ["a.jpg", "one", 3, 4])
    (sample,) = (item for item in read_samples(tmp_path) if isinstance(item, Sample))
    assert sample.metadata == {}
    assert rejects(tmp_path) == {"line 2": "the header names 'n' twice: neither is read"}
