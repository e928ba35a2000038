"""docs/tutorial/your-catalogue.md, command by command, as a newcomer would type it."""

from __future__ import annotations

import csv
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import skimage.data

from service.tests import warm
from service.tests.conftest import ROOT, jpeg, serving

BLOCK = re.compile(r"```sh( serve)?\n(.*?)```", re.S)


@pytest.fixture
def folder(tmp_path: Path, photos: dict[str, bytes]) -> Iterator[Path]:
    """Where the newcomer stands: photos/ with captions, one photo, and `reco` on the path."""
    (tmp_path / "photos").mkdir()
    with (tmp_path / "photos" / "captions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("file", "caption", "shelf"))
        for name, photo in photos.items():
            (tmp_path / "photos" / f"{name}.jpg").write_bytes(photo)
            table.writerow((f"{name}.jpg", f"a photo of {name}", "top"))
    rocket = jpeg(skimage.data.rocket())  # type: ignore[no-untyped-call]
    (tmp_path / "photo.jpg").write_bytes(rocket)  # none of the folder's: equal ones would be as near as each other
    (tmp_path / "bin").mkdir()
    with warm.reco_on_path(tmp_path / "bin"):
        yield tmp_path


def run(folder: Path, script: str, url: str = "") -> str:
    """One block, stopping at the first command that fails; what it printed."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RECO_")}
    environ |= {
        "PATH": f"{folder / 'bin'}:{environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RECO_STORE": str(folder / "store"),
        "URL": url,
    }
    done = subprocess.run(["bash", "-ec", script], cwd=folder, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_command_of_the_walk_through_works(folder: Path) -> None:
    blocks = BLOCK.findall((ROOT / "docs" / "tutorial" / "your-catalogue.md").read_text())
    assert sum(bool(serves) for serves, _ in blocks) == 1
    before = [script for serves, script in blocks[: [bool(serves) for serves, _ in blocks].index(True)]]
    after = [script for serves, script in blocks[len(before) + 1 :]]
    built = "".join(run(folder, script) for script in before)
    assert "shop@monday: 3 pairs" in built
    with serving(folder / "store", "--memory", "shop") as server:
        outputs = [run(folder, script, server.url) for script in after]
    embedded, edited, compacted, swapped, tidied = outputs
    assert '"memory":"shop@monday"' in embedded
    assert '"shelf":"top"' in embedded
    assert '"memory":"shop@monday+1"' in edited
    assert '"caption":"a photo of our newest article"' in edited
    assert '"memory":"shop@monday+2"' in edited
    assert "with every edit of shop@monday+2" in compacted
    assert "shop@tuesday is being served" in swapped
    assert '"previous":"tuesday"' in swapped
    assert "shop@tuesday is deleted" in tidied
