"""`reco serve` and `reco eval` on stores that cannot be written; evaluations write nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from index_store import Store
from models.tests.small import image_bytes, picture, write_tar
from service.engine import Engine
from service.settings import Settings
from service.tests.cli.in_process import run
from service.tests.read_only import read_only


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    members = [(f"{i}.{kind}", data) for i in range(12)
               for kind, data in (("jpg", image_bytes(picture(i), "JPEG")), ("json", {"class": "ab"[i % 2]}))]  # fmt: skip
    return write_tar(tmp_path / "test.tar", members)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


async def start(store: Path, memory: str | None) -> tuple[str, list[str]]:
    """The default memory and the label sets of a service, started and ended."""
    engine = Engine.open(Settings(store=store, device="cpu", memory=memory))
    async with engine.running():
        snapshot = engine.default_snapshot()
        assert snapshot is not None
        return snapshot.ref, engine.label_sets.names()


def build_shop(store: Path, tar: Path) -> None:
    done = run("memory", "build", "shop", str(tar), "--caption", "{class}", "--store", str(store))
    assert done.returncode == 0, done.stderr


def test_an_evaluation_of_the_starter_leaves_the_store_alone(tmp_path: Path, tar: Path) -> None:
    store = tmp_path / "store"
    done = run("eval", "classify", str(tar), "--enhance", "image", "--store", str(store))
    assert done.returncode == 0, done.stderr
    assert not store.exists()


def test_an_evaluation_on_a_read_only_store(tmp_path: Path, tar: Path) -> None:
    store = tmp_path / "store"
    build_shop(store, tar)
    before = files(store)
    with read_only(store):
        for memory in ("shop", "grocery"):
            done = run("eval", "classify", str(tar), "--enhance", "image", "--memory", memory, "--store", str(store))
            assert done.returncode == 0, done.stderr
    assert files(store) == before


@pytest.mark.parametrize("memory", [None, "shop"])
def test_the_service_starts_on_a_read_only_store(
    tmp_path: Path, tar: Path, memory: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    store = tmp_path / "store"
    build_shop(store, tar)
    before = files(store)

    with read_only(store):
        served, _ = asyncio.run(start(store, memory))
    assert served.startswith("shop@")
    assert files(store) == before
    told = [record.message for record in caplog.records if "is not installed" in record.message]
    assert len(told) == (2 if memory is None else 0)


def test_the_starters_memory_stays_out_of_a_store_that_serves_another(tmp_path: Path, tar: Path) -> None:
    store = tmp_path / "store"
    build_shop(store, tar)
    _, labels = asyncio.run(start(store, "shop"))
    assert (Store(store).names(), labels) == (["shop"], [])
