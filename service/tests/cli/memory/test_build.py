"""`reco memory build` and `import`: interrupted, dry, of photos, embeddings and versions."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import skimage.data
from PIL import Image
from pyarrow import parquet

from index_store import Store
from service.tests.conftest import one_line, reco, start_reco

CROPS = 160
SLOWLY = {"RECO_MAX_BATCH": "1", "OMP_NUM_THREADS": "1"}  # long enough that Ctrl-C comes in time on a busy machine


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crops of real photos with captions.jsonl; one of its lines names a file that is missing."""
    folder = tmp_path_factory.mktemp("crops")
    photos = {
        name: Image.fromarray(getattr(skimage.data, name)()) for name in ("astronaut", "chelsea", "coffee", "rocket")
    }
    lines = []
    for i in range(CROPS):
        name, photo = list(photos.items())[i % 4]
        left, top = 17 * (i // 4) % 120, 29 * (i // 4) % 90
        photo.crop((left, top, left + 200, top + 200)).save(folder / f"{i:03d}.jpg")
        lines.append({"file": f"{i:03d}.jpg", "caption": f"part {i // 4} of a photo of {name}", "place": [left, top]})
    lines.insert(5, {"file": "gone.jpg", "caption": "not there"})
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def built(crops: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the crops as crops@v1."""
    store = tmp_path_factory.mktemp("store")
    done = reco("memory", "build", "crops", str(crops), "--version", "v1", "--store", str(store))
    assert done.returncode == 0, done.stderr
    return store


def ids(store: Path, name: str, version: str) -> list[bytes]:
    return [
        value for path in sorted((store / name / version).glob("shard-*/ids.npy")) for value in np.load(path).tolist()
    ]


def interrupted(arguments: list[str], store: Path) -> str:
    """Begin a build, press Ctrl-C once rows are on the disk; what it says."""
    output = store.parent / "stderr"
    process = start_reco(*arguments, stderr=output, **SLOWLY)
    until = time.monotonic() + 200
    while time.monotonic() < until and process.poll() is None:
        if any(path.stat().st_size > 5000 for path in store.glob("crops/.*.partial/shard-0000/image.npy")):
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    code, errors = process.wait(60), output.read_text()
    assert code == 1, errors
    return errors


def test_ctrl_c_and_the_same_command_again_goes_on(crops: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    arguments = ["memory", "build", "crops", str(crops), "--store", str(store), "--shard-pairs", "1000"]
    errors = interrupted(arguments, store)
    found = re.search(r"reco: stopped at (\d+) of 161 items; run the same command again to go on", errors)
    assert found is not None, errors
    assert "Traceback" not in errors
    assert Store(store).names() == []
    again = reco(*arguments, RECO_MAX_BATCH="4")
    assert again.returncode == 0, again.stderr
    before = re.search(
        r"crops@(\S+): 160 pairs, index Flat, 1 rejected; (\d+) of 161 items were done by a run before", again.stdout
    )
    assert before is not None, again.stdout
    assert 0 < int(before[2]) <= int(found[1]) < 161
    assert ids(store, "crops", before[1]) == [f"{i:03d}.jpg".encode() for i in range(CROPS)]
    assert [
        json.loads(line)["item"] for line in (store / "crops" / f"rejects-{before[1]}.jsonl").read_text().splitlines()
    ] == ["gone.jpg"]
    assert not list((store / "crops").glob(".*"))


def test_a_dry_run_counts_and_writes_nothing(crops: Path, built: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    done = reco("memory", "build", "crops", str(crops), "--store", str(store), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "161 items: about 160 pairs, 1 rejected" in done.stdout
    assert "1 × the file cannot be read" in done.stdout
    assert re.search(r"about .* to encode", done.stdout)
    assert "nothing was written" in done.stdout
    assert not store.exists()
    estimated = int(re.search(r"about ([\d,]+) bytes on disk", done.stdout)[1].replace(",", ""))  # type: ignore[index]
    files = Store(built).manifest("crops", "v1").files
    written = sum(file["bytes"] for name, file in files.items() if not name.startswith("probes/"))
    assert abs(estimated - written) < 0.1 * written


def test_a_version_is_a_source_and_near_duplicates_are_dropped(crops: Path, built: Path, tmp_path: Path) -> None:
    store = ("--store", str(tmp_path))
    version = str(built / "crops" / "v1")
    counted = reco("memory", "build", "both", version, str(crops), "--dry-run", *store)
    assert "321 items: about 160 pairs, 161 rejected" in counted.stdout, counted.stderr
    again = reco("memory", "build", "both", version, str(crops), "--version", "v1", *store)
    assert "both@v1: 160 pairs, index Flat, 161 rejected" in again.stdout, again.stderr
    assert re.search(r"^both: 321/321 \[\d+:\d+<00:00, .*item/s\]$", again.stderr, re.M), (
        again.stderr
    )  # a plain line, in a log
    dry = reco("memory", "import", "fewer", version, "--dedup", "0.9", "--dry-run", *store)
    done = reco("memory", "import", "fewer", version, "--dedup", "0.9", "--version", "v1", *store)
    assert done.returncode == 0, done.stderr
    dropped = int(re.search(r"0 rejected, (\d+) near-duplicates dropped", done.stdout)[1])  # type: ignore[index]
    assert 0 < dropped < 160
    assert f"160 items: about {160 - dropped} pairs, {dropped} rejected" in dry.stdout
    fewer = Store(tmp_path).manifest("fewer", "v1")
    assert (fewer.parent, Store(tmp_path).manifest("both", "v1").parent) == ("crops@v1", None)
    assert fewer.source == {
        "sources": ["crops@v1"],
        "items": 160,
        "rejected": 0,
        "dedup": 0.9,
        "near_duplicates": dropped,
    }
    reasons = [
        json.loads(line)["reason"] for line in (tmp_path / "fewer" / "rejects-v1.jsonl").read_text().splitlines()
    ]
    assert len(reasons) == dropped
    assert all(re.fullmatch(r"near-duplicate of \d{3}\.jpg \(cosine \d\.\d{3}\)", reason) for reason in reasons)
    reco("memory", "import", "fewer", version, "--dedup", "0.9", "--version", "v2", *store)
    after = reco("memory", "import", "fewer", version, "--version", "a", "--keep", "1", *store)
    assert "fewer@v2 is deleted: the newest 1 are kept" in after.stdout, after.stderr
    # the one built last, though its name comes first, and the one that became current as the first
    assert Store(tmp_path).versions("fewer") == ["a", "v1"]
    assert not (tmp_path / "fewer" / "rejects-v2.jsonl").exists()


def test_a_retention_of_nothing_is_wrong_usage(crops: Path, tmp_path: Path) -> None:
    line = one_line(reco("memory", "build", "x", str(crops), "--keep", "0", "--store", str(tmp_path)), 2)
    assert line == "reco: --keep 0: at least 1, the version that is built"
    assert not list(tmp_path.iterdir())


def test_embeddings_made_elsewhere_are_imported(tmp_path: Path) -> None:
    folder, store = tmp_path / "embeddings", ("--store", str(tmp_path / "store"))
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    rng, dim = np.random.default_rng(0), json.loads(reco("info", *store).stdout)["model"]["dim"]
    for part in (0, 1):
        for name in ("img_emb", "text_emb"):
            np.save(folder / name / f"{name}_{part}.npy", rng.standard_normal((50, dim)).astype(np.float16))
        keys = [f"{part}{i:08d}" for i in range(50)]
        table = pa.table({"key": keys, "caption": [f"caption {key}" for key in keys], "width": list(range(50))})
        parquet.write_table(table, folder / "metadata" / f"metadata_{part}.parquet")
    done = reco("memory", "import", "theirs", str(folder), "--version", "v1", "--activate", *store)
    assert done.returncode == 0, done.stderr
    assert "theirs@v1: 100 pairs" in done.stdout
    assert "nothing can check that these vectors came from" in done.stdout
    assert "recall@10" in reco("memory", "verify", "theirs@v1", *store).stdout
    np.save(folder / "img_emb" / "img_emb_1.npy", np.zeros((50, dim + 1), np.float16))
    assert "img_emb_1.npy" in one_line(reco("memory", "import", "theirs", str(folder), *store), 1)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["build", "x", ".", "--dedup", "1.5"], "1.5"),
        (["import", "x", "nowhere"], "nowhere"),
        (["import", "x", "service"], "img_emb"),
    ],
)
def test_errors_are_one_line(arguments: list[str], word: str, crops: Path, tmp_path: Path) -> None:
    arguments = [str(crops) if argument == "." else argument for argument in arguments]
    assert word in one_line(reco("memory", *arguments, "--store", str(tmp_path)), 1)
    assert not list(tmp_path.iterdir())


def test_nothing_usable_is_refused_with_the_first_reason(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "captions.csv").write_text("file,caption\na.jpg,c\nb.jpg,c\n")
    line = one_line(
        reco("memory", "build", "x", str(tmp_path / "in"), "--version", "v1", "--store", str(tmp_path / "store")), 1
    )
    assert "2 rejected, the first 'a.jpg': the file cannot be read" in line
    assert [path.name for path in (tmp_path / "store" / "x").iterdir()] == ["rejects-v1.jsonl"]
