"""What `--image-key auto` and `--dry-run` look at, and what they leave alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from index_store.build.source import BuildProgress
from models.data.samples import Reading
from models.data.sources import open_sources
from models.data.streams import chain_streams, embedding_stream
from models.data.vector_tables import read_vector_table
from models.tests.small import image_bytes, picture, write_tar
from service.cli.memory.image_key import SAMPLE, sample_photos
from service.pipeline.load import load_encoder
from service.settings import Settings
from service.tests.cli.in_process import run

JPG = image_bytes(picture(0, 16, 16), "JPEG")


def test_the_sample_is_of_all_sources(tmp_path: Path) -> None:
    for shard in range(5):
        names = [f"{shard}-{i}" for i in range(100)]
        write_tar(
            tmp_path / f"{shard}.tar",
            [(f"{n}.{kind}", data) for n in names for kind, data in (("jpg", JPG), ("txt", b"c"))],
        )
    found = [sample.id for sample in sample_photos(open_sources([tmp_path], Reading()), 500)]
    assert SAMPLE / 2 < len(found) <= SAMPLE + 50
    assert {name[0] for name in found[:SAMPLE]} == set("01234")


def test_a_dry_run_of_images_alone_encodes_no_caption(tmp_path: Path) -> None:
    encoder = load_encoder(Settings(store=tmp_path, device="cpu"))
    vectors = np.random.default_rng(0).standard_normal((4, encoder.dim)).astype(np.float32)
    columns = {"id": [1, 2, 3, 3], "title": ["one", "two", None, "four"], "v": pa.array(list(vectors))}
    path = tmp_path / "x.parquet"
    parquet.write_table(pa.table(columns), path)
    source, _ = read_vector_table(path, {"image": "v"}, dim=encoder.dim, encoder=encoder.fingerprint)
    for dry_run in (True, False):
        (step,) = chain_streams([embedding_stream(source, encoder, dry_run=dry_run)], BuildProgress())
        assert step.pairs is not None
        assert (len(step.pairs), bool(step.pairs.text[:, 1:].any())) == (3, not dry_run)
    flags = ("--image-vector", "v", "--dedup", "0.9", "--dry-run", "--store", str(tmp_path / "store"))
    done = run("memory", "import", "shop", str(path), *flags)
    assert done.returncode == 0, done.stderr
    assert "4 items: about 3 pairs, 1 rejected" in done.stdout
    assert "near-duplicates among what must first be encoded are not counted" in done.stdout
    assert not (tmp_path / "store").exists()
