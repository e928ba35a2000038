"""examples/, each run as a person would, against the shared service."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from service.tests.conftest import ROOT, Server, serving

EXAMPLES = ROOT / "examples"


def run(server: Server, name: str, *arguments: object) -> str:
    """What the example prints."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "RECO_URL": server.url, "RECO_STORE": str(server.store)}
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path, photos: dict[str, bytes]) -> Path:
    for name, photo in photos.items():
        (tmp_path / f"{name}.jpg").write_bytes(photo)
    return tmp_path


def test_every_example_is_in_the_table_and_tested_here() -> None:
    files = {path.name for path in EXAMPLES.glob("*.py")}
    here = Path(__file__).read_text()
    assert all(name in (EXAMPLES / "README.md").read_text() and f'"{name}"' in here for name in files)
    assert len(files) == 5


def test_a_folder_is_embedded_and_searched(server: Server, folder: Path) -> None:
    out = folder / "photos.npy"
    assert "3 photos" in run(server, "embed_folder.py", folder, out, server.url)
    np.testing.assert_allclose(np.linalg.norm(np.load(out), axis=1), 1, atol=1e-5)
    found = run(server, "search_folder.py", out, "a cup of coffee", server.url).splitlines()
    assert sorted(line.split()[1] for line in found) == ["astronaut.jpg", "chelsea.jpg", "coffee.jpg"]


def test_photos_are_classified(server: Server, folder: Path) -> None:
    told = run(server, "classify_photos.py", "banana,lemon", folder / "coffee.jpg")
    assert told.startswith("coffee.jpg: plain ")
    assert "enhanced" in told


def test_a_long_list_is_embedded_under_one_version(server: Server, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("".join(f"article number {i}\n" for i in range(150)))
    told = run(server, "pin_version.py", tmp_path / "texts.txt", tmp_path / "out.npy", server.url)
    # the shared service may have been edited by an earlier test
    assert re.fullmatch(r"150 vectors, all made by grocery@all(\+\d+)?\n", told)
    assert np.load(tmp_path / "out.npy").shape[0] == 150


def test_pairs_are_added(folder: Path) -> None:
    (folder / "new.csv").write_text("id,file,caption\nnew-1,coffee.jpg,a photo of our coffee\n")
    with serving(folder / "store") as server:
        printed = run(server, "add_pairs.py", "grocery", folder / "new.csv")
        assert printed.startswith("1 added, 0 replaced: grocery@all+1")
