"""Generated folders with random damage: each item is a pair or has a reason, and nothing raises."""

import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openpyxl import Workbook
from pyarrow import parquet

from index_store.build.source import BuildProgress, SourceStep
from index_store.storage.columns import encode_record
from index_store.types import Id, KeyKind, Side
from models.data.samples import Reading
from models.data.streams import Encoding, build_streams, chain_streams
from models.encoder.encoder import Encoder
from models.errors import DataError
from models.tests.small import image_bytes, picture, write_tar

KINDS: dict[Side, KeyKind] = {"image": "vector", "text": "vector"}
JPGS = [image_bytes(picture(i, 24, 24), "JPEG") for i in range(4)]
PNG = image_bytes(picture(9, 24, 24), "PNG")
NAMES = st.sampled_from(
    ["a.jpg", "b.JPG", "sub/c.jpg", "é.jpg", "x y.png", "gone.jpg", "a.jpg#1", "", "https://x/y.jpg"]
)
TEXTS = st.sampled_from(["red", "a, b", 'say "hi"', "", " ", "two\nlines", "größe", "nan", "\ufffd"])
VALUES = st.one_of(
    st.none(), st.integers(-(2**70), 2**70), st.floats(), TEXTS, st.lists(TEXTS, max_size=3), st.booleans(),
    st.just({"raw": "x"}), st.just("\ud800"),
)  # fmt: skip
ROWS = st.lists(st.fixed_dictionaries({}, optional={
    "file": st.one_of(NAMES, VALUES), "caption": st.one_of(TEXTS, VALUES), "captions": VALUES, "id": VALUES, "price": VALUES,
}), max_size=6)  # fmt: skip
LAYOUTS = ("classes", "sidecars", "csv", "jsonl", "json", "coco", "tar", "parquet", "xlsx")
GARBAGE = (b"", b"<!DOCTYPE html><html></html>", b"version https://git-lfs.github.com/spec/v1\n", b"\x00\xff" * 300)
DAMAGES = st.lists(st.tuples(st.integers(0, 99), st.sampled_from(["cut", "flip", "replace", "delete", "link"]),
                             st.integers(0, 5000)), max_size=3)  # fmt: skip


def write_photos(folder: Path) -> None:
    for number, name in enumerate(("a.jpg", "b.JPG", "sub/c.jpg", "é.jpg", "x y.png", "._junk.jpg")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(PNG if name.endswith("png") else JPGS[number % 4])


def write_table(folder: Path, layout: str, rows: list[dict[str, Any]]) -> None:
    """The rows as a table of one kind; what that kind cannot hold is left out."""
    if layout == "csv":
        lines = [f"{row.get('file')},{row.get('caption')},{row.get('id', '')}" for row in rows]
        (folder / "t.csv").write_text("\n".join(["file,caption,id", *lines]), "utf-8", "surrogatepass")
    elif layout == "jsonl":
        (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    elif layout == "json":
        (folder / "t.json").write_text(json.dumps(rows))
    elif layout == "coco":
        annotations = [{"image_id": row.get("id"), "caption": row.get("caption")} for row in rows]
        images = [{"id": row.get("id"), "file_name": row.get("file")} for row in rows]
        (folder / "captions_x.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    elif layout == "parquet":
        columns = {
            name: [str(row.get(name, "")).encode("utf-8", "replace") for row in rows] for name in ("caption", "id")
        }
        images = [{"bytes": JPGS[i % 4], "path": None} for i in range(len(rows))]
        parquet.write_table(pa.table({"image": images, "mask": images, **columns}), folder / "t.parquet")
    else:
        book = Workbook()
        book.active.append(["file", "caption", "price"])
        for row in rows:
            book.active.append(
                [v if isinstance(v, str) and v.isprintable() else None for v in map(row.get, ("file", "caption"))]
            )
        book.save(folder / "t.xlsx")


def write_layout(folder: Path, layout: str, rows: list[dict[str, Any]]) -> None:
    if layout == "tar":
        members = [("0.jpg", JPGS[0]), ("0.txt", b"one"), ("1.v2.jpg", JPGS[1]), ("1.v2.txt", b"two"), ("0.cls", b"3")]
        members += [(f"r{i}.{kind}", data) for i, row in enumerate(rows)
                    for kind, data in (("jpg", JPGS[i % 4]), ("json", json.dumps(row).encode()))]  # fmt: skip
        write_tar(folder / "s.tar", members)
        return
    write_photos(folder)
    if layout == "sidecars":
        for name, row in zip(("a.json", "b.txt", "sub/c.json"), rows, strict=False):
            (folder / name).write_text(json.dumps(row))
    elif layout != "classes":
        write_table(folder, layout, rows)


def damage(folder: Path, which: int, how: str, where: int) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        return
    path = files[which % len(files)]
    data = path.read_bytes()
    if how == "cut":
        path.write_bytes(data[: where % (len(data) + 1)])
    elif how == "flip" and data:
        at = where % len(data)
        path.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
    elif how == "replace":
        path.write_bytes(GARBAGE[where % len(GARBAGE)])
    else:
        path.unlink()
        if how == "link":
            path.symlink_to(path if where % 2 else "/etc/hostname")


def check_balance(steps: list[SourceStep], items: int) -> None:
    pairs = sum(step.stored + (0 if step.pairs is None else len(step.pairs)) for step in steps)
    rejects = [reject for step in steps for reject in step.rejects]
    assert sum(step.items for step in steps) == items == pairs + len(rejects)
    assert all(reject.reason and "\n" not in reject.reason for reject in rejects)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    layouts=st.lists(st.sampled_from(LAYOUTS), min_size=1, max_size=2), rows=ROWS, damages=DAMAGES,
    caption=st.sampled_from([None, None, "a photo of {caption}", "{price}"]), keep=st.integers(0, 5),
)  # fmt: skip
def test_items_are_pairs_or_rejects_and_nothing_else_is_raised(
    encoder: Encoder, layouts: list[str], rows: list[dict[str, Any]], damages: list[Any], caption: str | None, keep: int
) -> None:
    with tempfile.TemporaryDirectory() as place:
        sources = [Path(place) / f"in{number}" for number in range(len(layouts))]
        for source, layout in zip(sources, layouts, strict=True):
            source.mkdir()
            write_layout(source, layout, rows)
            for each in damages:
                damage(source, *each)
        try:
            streams = build_streams(sources, Encoding(encoder, KINDS, Reading(caption), batch=4))
        except DataError as error:
            assert "\n" not in str(error)
            return
        items = sum(stream.items for stream in streams)
        steps = list(chain_streams(streams, BuildProgress()))
        check_balance(steps, items)
        for line in (encode_record(name, record) for step in steps if step.pairs is not None
                     for name, record in zip(step.pairs.ids.tolist(), step.pairs.records, strict=True)):  # fmt: skip
            json.loads(line)
        stored = defaultdict[str, set[Id]](set)
        made = [(origin, name) for step in steps if step.pairs is not None
                for origin, name in zip(step.origins, step.pairs.ids.tolist(), strict=True)]  # fmt: skip
        for origin, name in made[:keep]:
            stored[origin].add(name)
        again = list(chain_streams(streams, BuildProgress(len(made[:keep]), lambda: stored)))
        check_balance(again, items)
        assert sum(step.stored for step in again) == len(made[:keep])
