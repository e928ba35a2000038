"""A fuzzer of tars and tables: whatever a damaged file holds, reading it gives samples and rejects,
or is a DataError; within a bounded time.
"""

import gzip
import json
import time
from pathlib import Path

import pyarrow as pa
import pytest
from openpyxl import Workbook
from pyarrow import parquet

from index_store.build.source import Reject
from index_store.tests.support.mutate import SEED, choose, mutate_bytes, rounds
from models.data.samples import Sample
from models.data.sources import read_samples
from models.errors import DataError
from models.tests.small import image_bytes, picture, write_tar

JPGS = [image_bytes(picture(i, 24, 24), "JPEG") for i in range(3)]
ROWS = [{"image": f"{i}.jpg", "caption": f'größe {i}, "red"', "id": i, "price": 1.5 * i} for i in range(3)]
MAX_SECONDS = 10.0  # of one file of a few kilobytes


def write_tars(folder: Path) -> None:
    members = [(f"{i}.{kind}", data) for i in range(3) for kind, data in (("jpg", JPGS[i]), ("json", ROWS[i]))]
    write_tar(folder / "plain.tar", members)
    (folder / "small.tar.gz").write_bytes(gzip.compress((folder / "plain.tar").read_bytes()))


def write_tables(folder: Path) -> None:
    for number, data in enumerate(JPGS):
        (folder / f"{number}.jpg").write_bytes(data)
    text = "\n".join(["image;caption;id", *(f'{row["image"]};"{row["id"]}, red";{row["id"]}' for row in ROWS)])
    (folder / "t.csv").write_text(text, "utf-16")
    (folder / "t.tsv").write_text(text.replace(";", "\t"), "cp1252")
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    images = [{"id": row["id"], "file_name": row["image"]} for row in ROWS]
    notes = [{"image_id": row["id"], "caption": row["caption"]} for row in ROWS]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": notes}))
    structs = [{"bytes": data, "path": None} for data in JPGS]
    columns = pa.table({"image": structs, "caption": [row["caption"] for row in ROWS], "id": [0, 1, 2]})
    parquet.write_table(columns, folder / "t.parquet")
    with pa.ipc.new_stream(folder / "t.arrow", columns.schema) as stream:
        stream.write_table(columns)
    book = Workbook()
    for line in (["image", "caption"], *([row["image"], row["caption"]] for row in ROWS)):
        book.active.append(line)
    book.save(folder / "t.xlsx")


@pytest.mark.parametrize(
    ("write", "kinds"), [(write_tars, ".tar .gz"), (write_tables, ".csv .tsv .jsonl .json .parquet .arrow .xlsx")]
)
def test_a_damaged_file_is_read_or_refused(tmp_path: Path, write: object, kinds: str) -> None:
    assert callable(write)
    write(tmp_path)
    files = sorted(path for path in tmp_path.iterdir() if path.suffix in kinds.split())
    assert {path.suffix for path in files} == set(kinds.split())
    originals = {path: path.read_bytes() for path in files}
    for path in files:
        assert sum(isinstance(item, Sample) for item in read_samples(path)) == len(ROWS), path.name
    for number, rng in enumerate(rounds()):
        path = choose(files, rng)
        path.write_bytes(mutate_bytes(originals[path], rng))
        where, start = f"seed {SEED}, round {number}: {path.name}", time.monotonic()
        try:
            for item in read_samples(path):
                assert isinstance(item, Sample | Reject), where
        except DataError:
            pass
        except Exception as error:
            raise AssertionError(f"{where}: {error!r}") from error
        finally:
            path.write_bytes(originals[path])
        assert time.monotonic() - start < MAX_SECONDS, where
