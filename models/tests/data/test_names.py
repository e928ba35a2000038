"""Names of files as tables spell them, and cells that hold no value."""

import json
import unicodedata
from pathlib import Path

import pytest

from index_store.build.source import Reject
from models.data.samples import Part, Reading, Sample, read_all_images
from models.data.sources import open_sources
from models.tests.small import image_bytes, picture

JPG = image_bytes(picture(0), "JPEG")
NFC, NFD = unicodedata.normalize("NFC", "café.jpg"), unicodedata.normalize("NFD", "café.jpg")


def opened(folder: Path, *rows: dict[str, object], name: str = "captions.jsonl") -> tuple[Part, list[Sample | Reject]]:
    """The one part of a folder with this table, and its items."""
    (folder / name).write_text("\n".join(map(json.dumps, rows)))
    (part,) = open_sources([folder], Reading())
    return part, list(part.read(read_all_images))


@pytest.mark.parametrize(
    ("there", "named", "how"),
    [
        (NFC, NFD, "Unicode form"),
        (NFD, NFC, "Unicode form"),
        ("a b.jpg", "a%20b.jpg", "%-escapes"),
        ("sub/a.jpg", "sub\\a.jpg", "back-slashes"),
        ("A.JPG", "a.jpg", "letter case or folder"),
        ("sub/a.jpg", "a.jpg", "letter case or folder"),
        ("sub/a.jpg", "Sub/A.jpg", "letter case or folder"),
        ("a.jpg", "./a.jpg", None),
        ("100%.jpg", "100%.jpg", None),
        ("a%20b.jpg", "a%20b.jpg", None),
    ],
)
def test_other_spellings_are_found_and_said(tmp_path: Path, there: str, named: str, how: str | None) -> None:
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).write_bytes(JPG)
    part, items = opened(tmp_path, {"file": named, "caption": "one"})
    assert [(item.id, item.image) for item in items if isinstance(item, Sample)] == [(named, JPG)]
    said = [note for note in part.notes if "another spelling" in note]
    assert said == ([f"1 files were found under another spelling ({how})"] if how else [])


def test_a_name_that_two_files_have_is_none_of_them(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jpg").write_bytes(JPG)
    _, items = opened(tmp_path, {"file": "A.jpg", "caption": "which?"}, {"file": "two/a.jpg", "caption": "this"})
    assert [item.caption for item in items if isinstance(item, Sample)] == ["this"]
    assert [item.item for item in items if isinstance(item, Reject)] == ["A.jpg"]


@pytest.mark.parametrize(
    ("value", "captions"),
    [
        (None, []),
        (float("nan"), []),
        ("", []),
        (" \n", []),
        ([], []),
        ([None, "", float("nan")], []),
        (7, ["7"]),
        (7.0, ["7"]),
        (["one", None, 2, "one"], ["one", "2"]),
        (7.5, None),
        (True, None),
        ({"raw": "one"}, None),
        ([["one"], {"a": 1}], None),
    ],
)
def test_a_value_is_text_or_missing_or_a_reject(tmp_path: Path, value: object, captions: list[str] | None) -> None:
    (tmp_path / "a.jpg").write_bytes(JPG)
    _, items = opened(tmp_path, {"file": "a.jpg", "caption": value}, {"file": "a.jpg", "caption": "also", "id": "b"})
    found = [item.caption for item in items if isinstance(item, Sample)]
    assert found == [*(captions or []), "also"]
    if not captions:
        (reject,) = (item for item in items if isinstance(item, Reject))
        assert reject.reason == "no caption" if captions == [] else "text, an integer or a list" in reject.reason
    words = [text for text in found if text.lower() in ("none", "nan", "null", "[]", "true")]
    assert words == []


@pytest.mark.parametrize("header", ["file,caption,caption", "file,file,caption"])
def test_a_header_that_repeats_a_needed_column_rejects_each_line(tmp_path: Path, header: str) -> None:
    (tmp_path / "a.jpg").write_bytes(JPG)
    (tmp_path / "t.csv").write_text(f"{header}\na.jpg,one,two\n\na.jpg,three,four\n")
    (part,) = open_sources([tmp_path], Reading())
    rejects = [item.item for item in part.read(read_all_images) if isinstance(item, Reject)]
    assert rejects == ["line 1", "line 2", "line 4"]
