"""What a folder holds, what leads out of it, and the origins by which a stopped build goes on."""

import json
import os
import time
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import ipc

from index_store.build.source import Reject
from models.data.samples import Part, Reading, Sample, read_all_images
from models.data.sources import expand_braces, open_sources
from models.data.streams import count_parts
from models.errors import DataError
from models.tests.small import image_bytes, picture, write_tar

JPG = image_bytes(picture(0), "JPEG")
OUT = "is not a file within the folder (--follow-links lets links leave it)"


def put(folder: Path, *names: str) -> Path:
    """Photos under these names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(JPG)
    return folder


def read(parts: list[Part]) -> tuple[dict[str, str], dict[str, str]]:
    """Captions by id, and reasons of the rejects."""
    items = [item for part in parts for item in part.read(read_all_images)]
    captions = {item.id: item.caption for item in items if isinstance(item, Sample)}
    return captions, {item.item: item.reason for item in items if isinstance(item, Reject)}


def notes(parts: list[Part]) -> list[str]:
    return [note for part in parts for note in part.notes]


def test_photos_that_another_table_names_are_not_left_out(tmp_path: Path) -> None:
    folder = put(tmp_path, "img/a.jpg", "img/b.jpg", "more/a.jpg", "lost/c.jpg")
    (folder / "train.csv").write_text("file,caption\nimg/a.jpg,one\n")
    (folder / "val.csv").write_text("file,caption\nb.jpg,two\nmore/a.jpg,three\n")
    for sources in ([folder], [folder / "train.csv", folder / "val.csv"]):
        parts = open_sources(sources, Reading())
        assert notes(parts).count("1 photos are named by no row, and left out") == 1
    put(folder, "lost/d.jpg")
    found = [note for note in notes(open_sources([folder / "val.csv"], Reading())) if "named by no row" in note]
    assert found == ["3 photos are named by no row, and left out"]


def test_unnamed_photos_are_counted_without_comparing_all_names(tmp_path: Path) -> None:
    folder = put(tmp_path, *(f"{i}/photo.jpg" for i in range(2000)))
    (folder / "t.csv").write_text("file,caption\n" + "".join(f"{i}/photo.jpg,c\n" for i in range(1, 2000)))
    (part,) = open_sources([folder], Reading())
    start = time.perf_counter()
    assert "1 photos are named by no row, and left out" in part.notes
    assert time.perf_counter() - start < 1  # four million comparisons took longer


def test_tables_and_tars_that_lie_elsewhere_need_a_flag(tmp_path: Path) -> None:
    out, folder = put(tmp_path / "out", "x.jpg"), put(tmp_path / "in", "a.jpg", "b.jpg")
    (out / "list.csv").write_text("file,caption\na.jpg,secret\n")
    (out / "list.json").write_text('[{"file": "a.jpg", "caption": "secret"}]')
    write_tar(out / "shard.tar", [("s.jpg", JPG), ("s.txt", b"secret")])
    (folder / "own.jsonl").write_text('{"file": "b.jpg", "caption": "own"}\n')
    for name in ("list.csv", "list.json"):
        (folder / name).symlink_to(out / name)
    (folder / "linked").mkdir()
    (folder / "linked" / "shard.tar").symlink_to(out / "shard.tar")
    os.mkfifo(folder / "pipe.csv")  # opening it would wait for ever
    parts = open_sources([folder], Reading())
    captions, rejects = read(parts)
    assert captions == {"b.jpg": "own"}
    assert rejects == {
        "list.csv": f"list.csv {OUT}",
        "shard.tar": f"shard.tar {OUT}",
        "pipe.csv": "pipe.csv is not a file within the folder",
    }
    assert f"list.json is left alone: it {OUT}" in notes(parts)
    followed, _ = read(open_sources([folder], Reading(follow_links=True)))
    assert followed == {"a.jpg": "secret", "b.jpg": "own"}
    with pytest.raises(DataError, match=r"shard\.tar is not a file within the folder"):
        open_sources([folder / "linked"], Reading())


@pytest.mark.parametrize("name", ["../out.arrow", "{tmp}/out.arrow"])
def test_a_state_that_names_files_elsewhere(tmp_path: Path, name: str) -> None:
    folder, table = tmp_path / "in", pa.table({"image": [JPG], "text": ["one"]})
    folder.mkdir()
    for path in (tmp_path / "out.arrow", folder / "data.arrow"):
        with ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    files = [{"filename": "data.arrow"}, {"filename": name.format(tmp=tmp_path)}]
    (folder / "state.json").write_text(json.dumps({"_data_files": files}))
    (folder / "dataset_info.json").write_text("{}")
    captions, rejects = read(open_sources([folder], Reading()))
    assert (captions, rejects) == ({"0": "one"}, {"out.arrow": f"out.arrow {OUT}"})


def test_a_folder_that_cannot_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "hat/a.jpg")
    monkeypatch.chdir(tmp_path)
    for _ in range(20):  # its path is longer than the system allows; no permission stops root
        Path("f" * 250).mkdir()
        os.chdir("f" * 250)
    captions, rejects = read(open_sources([tmp_path], Reading()))
    assert captions == {"hat/a.jpg": "a photo of hat"}
    (reason,) = rejects.values()
    assert "cannot be read (File name too long)" in reason


def test_a_prefix_makes_ids_that_no_other_source_has(tmp_path: Path) -> None:
    one, two = put(tmp_path / "one", "a.jpg"), put(tmp_path / "shop", "a.jpg")
    (one / "t.csv").write_text("file,caption,id\na.jpg,one,a\na.jpg,two,shop/a\n")
    (two / "t.csv").write_text("file,caption,id\na.jpg,three,a\n")
    parts, counts = count_parts(open_sources([one, two], Reading()))
    captions, _ = read(parts)
    assert counts == [2, 1]
    assert captions == {"a": "one", "shop/a": "two", "shop-2/a": "three"}


def test_only_photos_and_their_texts_are_the_origin_of_a_folder(tmp_path: Path) -> None:
    folder = put(tmp_path, "hat/a.jpg")
    (folder / "hat" / "a.txt").write_text("one")

    def origins() -> frozenset[str]:
        return frozenset(origin for part in open_sources([folder], Reading()) for origin in part.origins)

    before = origins()
    for name in (".DS_Store", "Thumbs.db", "._a.jpg", "notes.md"):
        (folder / "hat" / name).write_text("x")
        assert origins() == before
    (folder / "hat" / "a.txt").write_text("three")
    assert origins() != before


def test_brace_ranges_count_as_a_shell_does() -> None:
    assert [path.name for path in expand_braces(Path("x-{08..11}.tar"))] == [
        f"x-{n}.tar" for n in ("08", "09", "10", "11")
    ]
    assert [path.name for path in expand_braces(Path("{3..1}.tar"))] == ["3.tar", "2.tar", "1.tar"]
    assert [path.name for path in expand_braces(Path("{1..2}-{0..1}.tar"))] == [
        "1-0.tar",
        "1-1.tar",
        "2-0.tar",
        "2-1.tar",
    ]
