"""Every layout of docs/how-to/bring-your-data.md, built through the command line from real small
files.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from openpyxl import Workbook
from pyarrow import ipc, parquet

from index_store import Store
from models.tests.small import image_bytes, picture, write_tar
from service.tests.cli.in_process import Completed, run

SUMMARY = re.compile(r"^(\d+) items = (\d+) pairs \+ (\d+) captions folded \+ (\d+) duplicates \+ (\d+) rejects$", re.M)
FORM = {"jpg": "JPEG", "JPG": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tif": "TIFF", "heic": "HEIF"}  # fmt: skip


def photo(number: int, kind: str = "jpg") -> bytes:
    return image_bytes(picture(number), FORM[kind])


def put(folder: Path, *names: str) -> Path:
    """Photos under these names."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(number, name.rpartition(".")[2]))
    return folder


class Built:
    """What one `reco memory build` made and said."""

    def __init__(self, store: Path, done: Completed) -> None:
        self.done, self._store = done, store
        found = SUMMARY.search(done.stdout)
        assert found, done.stdout + done.stderr
        self.items, self.pairs, self.folded, self.duplicates, self.rejected = map(int, found.groups())
        assert self.items == self.pairs + self.folded + self.duplicates + self.rejected

    @property
    def records(self) -> dict[str, dict[str, Any]]:
        version = Store(self._store).current("shop")
        folder = self._store / "shop" / version
        ids = [name.decode() for path in sorted(folder.glob("shard-*/ids.npy")) for name in np.load(path).tolist()]
        lines = [
            line for path in sorted(folder.glob("shard-*/records.jsonl")) for line in path.read_text().splitlines()
        ]
        return dict(zip(ids, map(json.loads, lines), strict=True))

    @property
    def captions(self) -> dict[str, str]:
        return {name: record["caption"] for name, record in self.records.items()}

    @property
    def rejects(self) -> dict[str, str]:
        (path,) = (self._store / "shop").glob("rejects-*.jsonl")
        return {each["item"]: each["reason"] for each in map(json.loads, path.read_text().splitlines())}


Build = Callable[..., Built]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Build a memory of some sources: the command's own arguments."""

    def built(*arguments: object) -> Built:
        store = tmp_path / "store"
        done = run("memory", "build", "shop", *map(str, arguments), "--image-key", "vector", "--store", str(store))
        assert done.returncode == 0, done.stderr
        return Built(store, done)

    return built


# --- a person


def test_a_folder_per_class(tmp_path: Path, build: Build) -> None:
    put(tmp_path / "in", "hat/001.jpg", "hat/002.JPG", "shoes/002.png", "._junk.jpg")
    built = build(tmp_path / "in")
    assert built.captions == {
        "hat/001.jpg": "a photo of hat",
        "hat/002.JPG": "a photo of hat",
        "shoes/002.png": "a photo of shoes",
    }
    assert built.records["hat/001.jpg"]["class"] == "hat"
    assert "2 classes by folder" in built.done.stdout


def test_a_template_over_class_folder_and_name(tmp_path: Path, build: Build) -> None:
    put(tmp_path / "in", "train/hat/red one.jpg")
    built = build(tmp_path / "in", "--caption", "{class}: {name} of {folder}")
    assert built.captions == {"train/hat/red one.jpg": "hat: red one of train/hat"}


def test_a_plain_folder_with_sidecars(tmp_path: Path, build: Build) -> None:
    folder = put(tmp_path / "in", "a.jpg", "b.png", "c.jpg")
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfa red hat\n")
    (folder / "b.txt").write_text("")
    (folder / "b.json").write_text('{"caption": "", "captions": ["green", "lime", "green"], "price": 9.5}')
    built = build(folder)
    assert built.captions == {"a.jpg": "a red hat", "b.png#0": "green", "b.png#1": "lime"}
    assert built.records["b.png#0"]["price"] == 9.5
    assert (built.folded, built.rejects["c.jpg"]) == (1, "no caption")


def test_a_table_by_its_own_path(tmp_path: Path, build: Build) -> None:
    folder = put(tmp_path / "in", "a.jpg", "sub/b.jpg", "lost.jpg")
    (folder / "list.csv").write_text("file,caption\na.jpg,one\nsub/b.jpg,two\n")
    built = build(folder / "list.csv")
    assert built.captions == {"a.jpg": "one", "sub/b.jpg": "two"}
    assert "1 photos are named by no row" in built.done.stdout


def test_links_that_leave_the_folder_need_a_flag(tmp_path: Path, build: Build) -> None:
    put(tmp_path / "cache", "blob.jpg", "more/x.jpg")
    folder = put(tmp_path / "in", "hat/a.jpg")
    (folder / "hat" / "b.jpg").symlink_to(tmp_path / "cache" / "blob.jpg")
    (folder / "shoes").symlink_to(tmp_path / "cache" / "more")
    built = build(folder)
    assert built.captions == {"hat/a.jpg": "a photo of hat"}
    assert "--follow-links" in built.rejects["hat/b.jpg"]
    assert "1 linked folders are not entered" in built.done.stdout
    followed = build(folder, "--follow-links", "--activate")
    assert sorted(followed.captions) == ["hat/a.jpg", "hat/b.jpg", "shoes/x.jpg"]


# --- spreadsheets and shops


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
def test_delimited_text_in_every_encoding(tmp_path: Path, build: Build, delimiter: str, encoding: str) -> None:
    folder = put(tmp_path / "in", "a.jpg", "b.jpg")
    rows = [["Image", "Title", "Price"], ["a.jpg", "Café crème — “hot”", "9.99"], ["b.jpg", "Größe", "12"]]
    text = "\r\n".join(delimiter.join(row) for row in rows)
    (folder / "list.csv").write_bytes(text.encode(encoding))
    built = build(folder)
    assert built.captions == {"a.jpg": "Café crème — “hot”", "b.jpg": "Größe"}
    assert [record["Price"] for record in built.records.values()] == [9.99, 12.0]
    assert "image = Image, caption = Title" in built.done.stdout
    assert ("a guess" in built.done.stdout) == (encoding in ("utf-16-le", "cp1252"))


def test_excel(tmp_path: Path, build: Build) -> None:
    folder, book = put(tmp_path / "in", "a.jpg", "b.jpg"), Workbook()
    for row in (["file", "caption", "stock"], ["a.jpg", "red", 3], [None, None, None], ["b.jpg", None, 4]):
        book.active.append(row)
    book.save(folder / "products.xlsx")
    built = build(folder)
    assert built.records == {"a.jpg": {"stock": 3, "caption": "red"}}
    assert built.rejects == {"b.jpg": "no caption"}


def test_shopify_urls_are_named_and_img2dataset_is(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "products_export.csv").write_text(
        "Handle,Title,Image Src\nhat,Red hat,https://cdn.example/hat.jpg\nshoe,Shoe,https://cdn.example/shoe.jpg\n"
    )
    done = run("memory", "build", "shop", str(folder), "--store", str(tmp_path / "store"))
    assert done.returncode == 1
    assert "2 rows name a URL" in done.stdout
    assert "--url_col 'Image Src' --caption_col 'Title'" in done.stdout
    assert "https://cdn.example/hat.jpg" in done.stderr
    assert "img2dataset" in done.stderr


def test_columns_are_mapped_by_hand(tmp_path: Path, build: Build) -> None:
    folder = put(tmp_path / "in", "a.jpg")
    (folder / "list.csv").write_text("foto,wort,nr\na.jpg,rot,7\n")
    done = run("memory", "build", "shop", str(folder / "list.csv"), "--store", str(tmp_path / "store"))
    assert done.returncode == 1
    assert "['foto', 'wort', 'nr']" in done.stderr
    assert "--columns" in done.stderr
    assert build(folder / "list.csv", "--columns", "image=foto,caption=wort,id=nr").captions == {"7": "rot"}


# --- five captions a photo


def test_repeated_rows_are_captions_of_one_photo(tmp_path: Path, build: Build) -> None:
    folder = put(tmp_path / "in", "a.jpg", "b.jpg")
    (folder / "captions.csv").write_text("image,caption\na.jpg,one\nb.jpg,two\na.jpg,three\na.jpg,four\n")
    assert build(folder).captions == {"a.jpg": "one", "a.jpg#1": "three", "a.jpg#2": "four", "b.jpg": "two"}


def test_list_columns(tmp_path: Path, build: Build) -> None:
    folder = put(tmp_path / "in", "a.jpg")
    parquet.write_table(pa.table({"file_name": ["a.jpg"], "captions": [["x", "y"]]}), folder / "metadata.parquet")
    assert build(folder).captions == {"a.jpg#0": "x", "a.jpg#1": "y"}


def test_coco(tmp_path: Path, build: Build) -> None:
    folder = put(tmp_path / "in", "val2017/0001.jpg", "val2017/0002.jpg")
    (folder / "annotations").mkdir()
    content = {
        "images": [{"id": 5, "file_name": "0001.jpg"}, {"id": 6, "file_name": "0002.jpg"}],
        "annotations": [
            {"image_id": 5, "caption": "one"},
            {"image_id": 6, "caption": "two"},
            {"image_id": 5, "caption": "three"},
            {"image_id": 9, "caption": "of no image"},
        ],
    }
    (folder / "annotations" / "captions_val2017.json").write_text(json.dumps(content))
    built = build(folder)
    assert built.captions == {"0001.jpg#0": "one", "0001.jpg#1": "three", "0002.jpg": "two"}
    assert built.rejects == {"annotation of image 9": "no image has this number"}


def test_flickr_tokens(tmp_path: Path, build: Build) -> None:
    folder = put(tmp_path / "in", "Images/1000.jpg", "Images/1001.jpg")
    lines = ["1000.jpg#0\tA man, smiling .", "1000.jpg#1\tA person .", "1001.jpg#0\tA dog ."]
    (folder / "Flickr8k.token.txt").write_text("\n".join(lines))
    built = build(folder)
    assert built.captions == {
        "1000.jpg#0": "A man, smiling .",
        "1000.jpg#1": "A person .",
        "1001.jpg#0": "A dog .",
    }


# --- Hugging Face


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_hugging_face_image_folder(tmp_path: Path, build: Build, kind: str) -> None:
    folder = put(tmp_path / "in", "train/a.jpg", "train/b.jpg")
    rows = {"file_name": ["a.jpg", "b.jpg"], "text": ["red", "green"], "n": [1, 2]}
    target = folder / "train" / f"metadata.{kind}"
    if kind == "parquet":
        parquet.write_table(pa.table(rows), target)
    elif kind == "csv":
        target.write_text("file_name,text,n\na.jpg,red,1\nb.jpg,green,2\n")
    else:
        target.write_text(
            "".join(json.dumps(dict(zip(rows, row, strict=True))) + "\n" for row in zip(*rows.values(), strict=True))
        )
    built = build(folder)
    assert built.records == {"a.jpg": {"n": 1, "caption": "red"}, "b.jpg": {"n": 2, "caption": "green"}}


def hugging_face_table() -> pa.Table:
    features = {"label": {"names": ["hat", "shoe"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    images = [{"bytes": photo(i), "path": f"{i}.jpg"} for i in range(3)]
    table = pa.table({"image": images, "label": pa.array([0, 1, 1]), "emb": [[0.5] * 32] * 3})
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def test_parquet_with_image_structs(tmp_path: Path, build: Build) -> None:
    (tmp_path / "in" / "data").mkdir(parents=True)
    parquet.write_table(hugging_face_table(), tmp_path / "in" / "data" / "train-00000-of-00001.parquet")
    built = build(tmp_path / "in", "--caption", "a photo of a {label}")
    assert built.records == {
        "0.jpg": {"label": "hat", "caption": "a photo of a hat"},
        "1.jpg": {"label": "shoe", "caption": "a photo of a shoe"},
        "2.jpg": {"label": "shoe", "caption": "a photo of a shoe"},
    }
    assert "emb: vectors or bytes, left out" in built.done.stdout


def test_a_save_to_disk_folder(tmp_path: Path, build: Build) -> None:
    folder, table = tmp_path / "in" / "train", hugging_face_table()
    folder.mkdir(parents=True)
    with ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (folder / "dataset_info.json").write_text("{}")
    (tmp_path / "in" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert build(tmp_path / "in", "--caption", "{label}").captions == {"0.jpg": "hat", "1.jpg": "shoe", "2.jpg": "shoe"}


# --- img2dataset


def img2dataset_rows(shard: str, status: str = "success") -> pa.Table:
    return pa.table(
        {
            "url": ["https://x/0", "https://x/1"],
            "caption": ["zero", "one"],
            "key": [f"{shard}0000", f"{shard}0001"],
            "status": [status, "failed_to_download"],
            "error_message": [None, "404"],
        }
    )


def test_img2dataset_webdataset_in_sub_folders(tmp_path: Path, build: Build) -> None:
    for shard in ("00000", "00001"):
        folder = tmp_path / "in" / f"part{shard}"
        folder.mkdir(parents=True)
        write_tar(folder / f"{shard}.tar", [(f"{shard}0000.jpg", photo(0)), (f"{shard}0000.txt", b"zero")])
        parquet.write_table(img2dataset_rows(shard), folder / f"{shard}.parquet")
        (folder / f"{shard}_stats.json").write_text("{}")
    assert build(tmp_path / "in").captions == {"000000000": "zero", "000010000": "zero"}


def test_img2dataset_files(tmp_path: Path, build: Build) -> None:
    folder = put(tmp_path / "in", "00000/000000000.jpg")
    (folder / "00000" / "000000000.txt").write_text("zero")
    (folder / "00000" / "000000000.json").write_text(json.dumps({"caption": "zero", "key": "000000000", "width": 80}))
    parquet.write_table(img2dataset_rows("00000"), folder / "00000.parquet")
    (folder / "00000_stats.json").write_text("{}")
    built = build(folder)
    assert built.captions == {"00000/000000000.jpg": "zero"}
    assert built.records["00000/000000000.jpg"]["width"] == 80


def test_img2dataset_parquet(tmp_path: Path, build: Build) -> None:
    (tmp_path / "in").mkdir()
    rows = img2dataset_rows("00000").append_column("jpg", pa.array([photo(0), None]))
    parquet.write_table(rows, tmp_path / "in" / "00000.parquet")
    (tmp_path / "in" / "00000_stats.json").write_text("{}")
    built = build(tmp_path / "in")
    assert built.captions == {"000000000": "zero"}
    assert "jpg" not in built.records["000000000"]
    assert list(built.rejects.values()) == ["it was not downloaded (failed_to_download: 404)"]


# --- webdataset


def test_webdataset_of_every_kind(tmp_path: Path, build: Build) -> None:
    members = [
        ("a.JPG", photo(0)),
        ("a.cls", b"3"),
        ("b.bmp", photo(1, "bmp")),
        ("b.cls", b"4"),
        ("c.left.png", photo(2, "png")),
        ("c.right.webp", photo(3, "webp")),
        ("c.cls", b"5"),
        ("d.tif", photo(4, "tif")),
        ("d.cls", b"6"),
        ("e.gif", photo(5, "gif")),
        ("e.cls", b"7"),
    ]
    built = build(write_tar(tmp_path / "s.tar", members), "--caption", "class {cls}")
    assert built.captions == {
        "a": "class 3",
        "b": "class 4",
        "c.left": "class 5",
        "c.right": "class 5",
        "d": "class 6",
        "e": "class 7",
    }


def test_compressed_tars_and_brace_ranges(tmp_path: Path, build: Build) -> None:
    for shard in range(3):
        write_tar(tmp_path / f"{shard:05d}.tar", [(f"{shard}.jpg", photo(shard)), (f"{shard}.txt", b"x")])
    with tarfile.open(tmp_path / "more.tar.gz", "w:gz") as tar:
        for name, data in (("z.jpg", photo(9)), ("z.txt", b"zipped")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    built = build(tmp_path / "{00000..00002}.tar", tmp_path / "more.tar.gz")
    assert built.captions == {"0": "x", "1": "x", "2": "x", "z": "zipped"}


def test_dots_in_names_and_members_apart(tmp_path: Path, build: Build) -> None:
    members = [("p.v1.jpg", photo(0)), ("p.v1.txt", b"one"), ("p.v2.jpg", photo(1)), ("p.v2.txt", b"two")]
    members += [("x.jpg", photo(2)), ("y.jpg", photo(3)), ("x.txt", b"x"), ("y.txt", b"y"), ("._p.jpg", b"junk")]
    built = build(write_tar(tmp_path / "s.tar", members))
    assert built.captions == {"p.v1": "one", "p.v2": "two"}
    assert "tar --sort=name" in built.rejects["x"]
    assert built.items == 6


# --- clip-retrieval, open_clip


def test_a_table_of_open_clip(tmp_path: Path, build: Build) -> None:
    folder = put(tmp_path / "in", "a.jpg")
    (folder / "train.csv").write_text("filepath\ttitle\na.jpg\ta red, long dress\n")
    assert build(folder).captions == {"a.jpg": "a red, long dress"}


# --- two sources, phones


def test_the_same_keys_in_two_sources_are_prefixed(tmp_path: Path, build: Build) -> None:
    for name in ("one", "two"):
        write_tar(tmp_path / f"{name}.tar", [("0.jpg", photo(0)), ("0.txt", name.encode())])
    built = build(tmp_path / "one.tar", tmp_path / "two.tar")
    assert built.captions == {"0": "one", "two/0": "two"}
    assert "two.tar: 1 of its ids came before: its ids begin with 'two/'" in built.done.stdout


def test_photos_of_a_phone(tmp_path: Path, build: Build) -> None:
    put(tmp_path / "in", "cat/IMG_1.heic", "dog/IMG_2.heic")
    assert build(tmp_path / "in").captions == {"cat/IMG_1.heic": "a photo of cat", "dog/IMG_2.heic": "a photo of dog"}
