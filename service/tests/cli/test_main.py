"""The command line as a user types it: a process, its output, its exit code."""

from __future__ import annotations

import csv
import json
import os
import signal
import tarfile
import time
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from service.tests.conftest import DATA, cold_reco, one_line, reco, start_reco


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory, photos: dict[str, bytes]) -> Path:
    """A folder as a user has it: three photos, one broken, one missing, one outside."""
    folder = tmp_path_factory.mktemp("album")
    rows = [("file", "caption", "price")]
    for name, data in photos.items():
        (folder / f"{name}.jpg").write_bytes(data)
        rows.append((f"{name}.jpg", f"a photo of {name}", "7"))
    (folder / "broken.jpg").write_bytes(photos["coffee"][:500])
    rows += [("broken.jpg", "cut off", ""), ("missing.jpg", "not there", ""), ("../outside.jpg", "elsewhere", "")]
    with (folder / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


def tar_of(path: Path, count: int) -> Path:
    """A webdataset tar of small images, each of one colour."""
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            image = BytesIO()
            Image.new("RGB", (96, 96), (i % 256, (7 * i) % 256, (31 * i) % 256)).save(image, "JPEG")
            for kind, data in (("jpg", image.getvalue()), ("json", json.dumps({"class": f"colour {i % 9}"}).encode())):
                member = tarfile.TarInfo(f"{i:06d}.{kind}")
                member.size = len(data)
                tar.addfile(member, BytesIO(data))
    return path


def test_help_names_every_command() -> None:
    done = reco("--help")
    assert done.returncode == 0
    for command in ("serve", "memory", "train", "eval", "info"):
        assert command in done.stdout


def test_wrong_usage_is_two() -> None:
    assert reco("serve", "--colour", "red").returncode == 2
    assert reco().returncode == 2


def test_a_folder_becomes_a_memory(album: Path, tmp_path: Path) -> None:
    store = ("--store", str(tmp_path))
    built = reco("memory", "build", "album", str(album), "--version", "v1", "--activate", *store)
    assert built.returncode == 0, built.stderr
    assert "album@v1: 3 pairs" in built.stdout
    rejected = [json.loads(line) for line in (tmp_path / "album" / "rejects-v1.jsonl").read_text().splitlines()]
    assert {reject["item"] for reject in rejected} == {"broken.jpg", "missing.jpg", "../outside.jpg"}
    assert all(reject["reason"] for reject in rejected)
    again = reco("memory", "build", "album", str(album), "--version", "v1", *store)
    assert "v1" in one_line(again, 1)
    listed = reco("memory", "list", *store).stdout
    assert "album" in listed
    assert "current" in listed
    shown = json.loads(reco("memory", "show", "album", "--json", *store).stdout)
    assert (shown["pairs"], shown["current"], shown["source"]["rejected"]) == (3, True, 3)
    assert shown["index"]["asked"] == "auto"
    table = reco("memory", "show", "album@v1", "--plot", str(tmp_path / "curve.png"), *store).stdout
    assert "album@v1 (current)" in table
    assert "Flat" in table
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "recall@10" in reco("memory", "verify", "album@v1", *store).stdout
    file = next((tmp_path / "album" / "v1").rglob("*.npy"))
    file.chmod(0o644)
    file.write_bytes(file.read_bytes()[:-2] + b"xx")
    assert file.name in one_line(reco("memory", "verify", "album@v1", *store), 1)


def test_a_build_killed_at_any_moment_leaves_nothing(tmp_path: Path) -> None:
    source = tar_of(tmp_path / "colours.tar", 3000)
    arguments = ["memory", "build", "colours", str(source), "--store", str(tmp_path / "store")]
    process = start_reco(*arguments, "--caption", "a photo of {class}", "--version", "v1")
    partial = tmp_path / "store" / "colours"
    until = time.monotonic() + 120
    while not (partial.exists() and any(partial.iterdir())) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.3)
    assert process.poll() is None, "the build ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10)
    assert "no memory" in reco("memory", "list", "--store", str(tmp_path / "store")).stderr
    one_line(reco("memory", "activate", "colours@v1", "--store", str(tmp_path / "store")), 1)


def test_a_tar_becomes_a_memory_where_a_dead_build_lies(tmp_path: Path) -> None:
    (tmp_path / "store" / "colours" / ".v1.partial").mkdir(parents=True)
    (tmp_path / "store" / "colours" / ".v1.partial" / "junk").write_text("half a shard")
    source = tar_of(tmp_path / "colours.tar", 40)
    done = reco(
        "memory",
        "build",
        "colours",
        str(source),
        "--store",
        str(tmp_path / "store"),
        "--caption",
        "a photo of {class}",
        "--version",
        "v1",
    )
    assert "colours@v1: 40 pairs" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (("memory", "build", "../x", "."), "../x"),
        (("memory", "build", "x", "nowhere"), "nowhere"),
        (("memory", "activate", "x@y"), "x"),
        (("memory", "show", "x"), "x"),
        (("train", "nothing.toml"), "nothing.toml"),
        (("serve", "--port", "0", "--fusion", "nothing.safetensors"), "nothing.safetensors"),
    ],
)
def test_errors_are_one_line(args: tuple[str, ...], word: str, tmp_path: Path) -> None:
    assert word in one_line(reco(*args, RECO_STORE=str(tmp_path)), 1)


def test_a_version_must_be_named_to_be_activated(tmp_path: Path) -> None:
    one_line(reco("memory", "activate", "x", "--store", str(tmp_path)), 2)


def test_eval_classify_counts_plain_and_enhanced(tmp_path: Path) -> None:
    tar = DATA / "grocery" / "test-000.tar"
    if not tar.exists():
        pytest.skip(f"no Grocery Store photos under {DATA}: set RECO_DATA")
    store, figures, folder = tmp_path / "store", tmp_path / "figures.json", tmp_path / "report"
    options = ("--limit", "200", "--json", str(figures), "--report", str(folder), "--store", str(store), "--per-class")
    done = reco("eval", "classify", str(tar), *options)
    assert done.returncode == 0, done.stderr
    report = json.loads(figures.read_text())
    right = {method: round(200 * found["top-1"]["share"]) for method, found in report["lines"].items()}
    assert right["both"] > right["none"] + 20, right
    assert "200 images" in done.stdout
    assert "taken for" in done.stdout
    page = (folder / "report.html").read_text()
    assert "Recommendation" in page
    assert "data:image/jpeg;base64," in page


def test_info_of_a_model_says_what_it_is_before_anything_is_downloaded() -> None:
    done = reco("info", "--model", "ViT-B-16-SigLIP")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["dim"], found["image_size"], found["needs"]) == (768, [224, 224], ["reco-serve[hf]"])
    assert found["tokenizer"] == "timm/ViT-B-16-SigLIP"
    assert found["parameters"]["image"] == 92_884_224  # open_clip's own model profile says 92.88 million
    assert {"webli", "random"} <= set(found["weights"])
    assert found["tested"]["image"] > 0.9999


def test_info_of_a_model_with_a_text_tower_on_the_hub_needs_no_hub() -> None:
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": "/nonexistent"}
    done = cold_reco("info", "--model", "roberta-ViT-B-32", **unreachable)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["dim"], found["image_size"], found["context_length"]) == (512, [224, 224], 77)
    assert (found["parameters"], found["tokenizer"]) == (None, "roberta-base")
    assert (found["needs"], found["tested"]) == (["reco-serve[hf]"], None)
