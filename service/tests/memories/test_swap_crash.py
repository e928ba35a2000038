"""`kill -9` of a service at random moments of its swaps, edits and compactions: what it starts with
next is what was acknowledged.

Real `reco serve` processes, each forked from one that has imported everything: a start then takes a
second instead of twenty.
"""

from __future__ import annotations

import base64
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from index_store import Pairs, Store
from index_store.build.build import build_version
from index_store.tests.edits.test_crash import captions_by_id
from index_store.tests.support.child_process import ForkServer, kill_count
from index_store.tests.support.small import some_pairs, unit_rows
from models.starter import install_starter
from service.access.token import read_token

VERSIONS = ("all", "fruit-and-vegetables")
TEXTS = ["a ripe banana", "a carton of oat milk", "a photo of a kiwi"]
SERVE = """
import os
from pathlib import Path
import service.app, service.server.server
from service.cli.main import main
from service.engine import load_reco
from service.settings import Settings
load_reco(Settings())
def build(root):
    log = os.open(root / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["RECO_COMPACT_AFTER"] = "30"
    main(["serve", "--port", (root / "port").read_text(), "--store", str(root / "store")])
"""


class Edits:
    """Edits of one memory, numbered: what is acknowledged, and what there must then be."""

    def __init__(self, base: Pairs) -> None:
        self.there = {
            name: str(record["caption"]) for name, record in zip(base.ids.tolist(), base.records, strict=True)
        }
        self.made = 0

    def send(self, client: httpx.Client, number: int) -> None:
        """One edit; raises unless it was acknowledged."""
        name = f"pair-{7 * number % 90}"
        if number % 4 == 0:
            reply = client.delete(f"/memories/edited/pairs/{name}")
            assert reply.status_code in (200, 404), reply.text
            return
        image, text = (
            base64.b64encode(unit_rows(1, 512, seed).astype("<f4").tobytes()).decode() for seed in (number, number + 1)
        )
        pair = {"id": name, "caption": str(number), "image_embedding": image, "text_embedding": text}
        reply = client.post("/memories/edited/pairs", json={"pairs": [pair]})
        assert reply.status_code == 200, reply.text

    def apply(self) -> None:
        """The next one is in the memory."""
        self.made += 1
        name = f"pair-{7 * self.made % 90}"
        if self.made % 4 == 0:
            self.there.pop(name, None)
        else:
            self.there[name] = str(self.made)

    def agree(self, store: Store, encoder: str) -> None:
        """All that was acknowledged is there, and beside it at most the one edit whose reply the
        kill took away.
        """
        found = captions_by_id(store.open("edited", encoder=encoder))
        if found != self.there:
            self.apply()
        assert found == self.there


class World:
    """A service that is started, worked on and killed again and again."""

    def __init__(self, root: Path) -> None:
        self.root, self.store = root, Store(root / "store")
        install_starter(self.store)
        self.encoder = self.store.manifest("grocery").encoder
        base = some_pairs(60, 512)
        build_version(
            self.store, "edited", "v1", [base], encoder=self.encoder, kinds={"image": "vector", "text": "vector"}
        )
        self.store.activate("edited", "v1")
        self.edits, self.pointed, self.swaps = Edits(base), {self.store.current("grocery")}, 0
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        (root / "port").write_text(self.url.rpartition(":")[2])
        self.fork_server = ForkServer(SERVE)

    def start(self) -> int:
        """Its process id, once it is ready."""
        process, until = self.fork_server.begin(self.root), time.monotonic() + 240
        while time.monotonic() < until:
            try:
                if httpx.get(f"{self.url}/readyz", timeout=30).status_code == 200:
                    return process
            except httpx.TransportError:
                time.sleep(0.05)
        raise AssertionError("the service did not start:\n" + (self.root / "log").read_text()[-3000:])

    def client(self) -> httpx.Client:
        headers = {"authorization": f"Bearer {read_token(self.root / 'store')}"}
        return httpx.Client(base_url=self.url, timeout=60, headers=headers)

    def swap(self, client: httpx.Client) -> None:
        """To the other version; what CURRENT may name until the job has ended is either."""
        new = next(version for version in VERSIONS if version != client.get("/memories/grocery").json()["current"])
        self.pointed = {*self.pointed, new}
        job = client.post("/memories/grocery/activate", json={"version": new}).json()
        while job["state"] == "running":
            job = client.get(f"/jobs/{job['id']}").json()
        assert job["state"] == "done", job
        self.pointed, self.swaps = {new}, self.swaps + 1

    def edit(self, client: httpx.Client) -> None:
        self.edits.send(client, self.edits.made + 1)
        self.edits.apply()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.fork_server.close()


def vectors(client: httpx.Client) -> tuple[str, np.ndarray]:
    """The version that answers, and what it makes of the texts."""
    body = client.post("/embed/text", json={"texts": TEXTS}).json()
    return body["memory"].partition("@")[2], np.array([row["embedding"] for row in body["data"]])


def for_ever(work: Callable[[httpx.Client], Any], world: World, trouble: list[str]) -> None:
    """Until the service is gone."""
    with world.client() as client:
        try:
            while True:
                work(client)
        except httpx.TransportError:
            return
        except Exception as error:  # noqa: BLE001  whatever it is, no request may fail before the kill
            trouble.append(repr(error))


@pytest.mark.timeout(3600)  # three seconds a kill where two cores have other things to do
def test_kill_9_of_a_service_at_random_moments_of_swaps_edits_and_compactions(world: World) -> None:
    moments, trouble = random.Random(31), list[str]()
    process, expected = world.start(), dict[str, np.ndarray]()
    with world.client() as client:
        client.put("/label-sets/few", json={"labels": ["banana", "lemon"]})
        # embedding it anew would be half of a swap, and what matters comes after
        client.delete("/label-sets/grocery")
        for _ in VERSIONS:
            expected.update([vectors(client)])
            world.swap(client)
    # else the wrong one could not be told
    assert np.abs(expected[VERSIONS[0]] - expected[VERSIONS[1]]).max() > 1e-3
    killed = 0
    while killed < kill_count() or (
        len(world.store.versions("edited")) == 1 and killed < 50
    ):  # until one has compacted
        killed += 1
        start, swaps = time.monotonic(), world.swaps
        busy = [threading.Thread(target=for_ever, args=(work, world, trouble)) for work in (world.swap, world.edit)]
        for thread in busy:
            thread.start()
        while world.swaps == swaps and not trouble:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, time.monotonic() - start))  # somewhere in the next one
        os.kill(process, signal.SIGKILL)
        assert world.fork_server.end() == -signal.SIGKILL
        for thread in busy:
            thread.join(60)
        assert trouble == []
        current = world.store.current("grocery")
        assert current in world.pointed
        world.pointed = {current}
        world.edits.agree(world.store, world.encoder)
        process = world.start()
        with world.client() as client:
            version, found = vectors(client)
            assert version == client.get("/memories/grocery").json()["current"] == current
            np.testing.assert_allclose(found, expected[version], atol=1e-5)
            assert client.get("/memories/edited").json()["pairs"] == len(world.edits.there)
    os.kill(process, signal.SIGKILL)
    world.fork_server.end()
    assert len(world.store.versions("edited")) > 1  # compactions were among it
