"""Hot swaps of a real service: under concurrent load nothing fails and nothing mixes; a bad version
never gets published.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from index_store import Pairs, Store
from index_store.build.build import build_version
from models.starter import install_starter
from service.tests.conftest import Server

OLD, NEW = "all", "fruit-and-vegetables"
SWAPS = 12


def wait(client: httpx.Client, job: dict[str, Any]) -> dict[str, Any]:
    """The job once it has ended, at most a minute from now."""
    until = time.monotonic() + 60
    while job["state"] == "running" and time.monotonic() < until:
        time.sleep(0.02)
        job = client.get(f"/jobs/{job['id']}").json()
    return job


def activate(client: httpx.Client, version: str, **body: Any) -> dict[str, Any]:
    reply = client.post("/memories/grocery/activate", json={"version": version, **body})
    assert reply.status_code == 202, reply.text
    return wait(client, reply.json())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The starter's store, with a damaged version and a memory of another encoder beside what is
    sound.
    """
    root = tmp_path_factory.mktemp("swaps")
    store = Store(root)
    install_starter(store)
    rows = np.eye(8, 256, dtype=np.float32)
    pairs = Pairs(np.arange(8), rows, rows, [{"caption": str(i)} for i in range(8)])
    kinds: dict[Any, Any] = {"image": "vector", "text": "vector"}
    build_version(store, "stranger", "v1", [pairs], encoder="other/model@000000000000", kinds=kinds)
    store.activate("stranger", "v1")
    encoder = store.manifest("grocery").encoder
    build_version(store, "grocery", "damaged", [pairs], encoder=encoder, kinds=kinds)
    file = (
        next((root / "grocery" / "damaged").rglob("image.npy"), None)
        or sorted((root / "grocery" / "damaged").rglob("*.index"))[0]
    )
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.chmod(0o644)
    file.write_bytes(content)
    return root


@pytest.fixture(scope="module")
def running(store: Path) -> Any:
    from service.tests.conftest import serving

    with serving(store) as server:
        yield server


def test_swaps_under_load_fail_none_and_mix_none(running: Server, photos: dict[str, bytes]) -> None:
    files = [("file", photos["coffee"]), ("file", photos["chelsea"])]
    with running.client() as client:
        expected = {}
        for version in (NEW, OLD):
            assert activate(client, version)["state"] == "done"
            body = client.post("/embed/image", files=files).json()
            expected[body["memory"]] = np.array([item["embedding"] for item in body["data"]])
        assert (
            float((expected[f"grocery@{OLD}"] * expected[f"grocery@{NEW}"]).sum(axis=1).min()) < 0.999
        )  # else mixing could not be seen
        stop, seen, wrong = threading.Event(), Counter[str](), list[str]()

        def load() -> None:
            with running.client() as own:
                while not stop.is_set():
                    try:
                        reply = own.post("/embed/image", files=files)
                        body = reply.json()
                        found = np.array([item["embedding"] for item in body["data"]])
                        same = float((found * expected[body["memory"]]).sum(axis=1).min())
                        seen[body["memory"]] += 1
                        if same < 0.9999 or reply.headers["x-memory-version"] != body["memory"]:
                            wrong.append(f"{body['memory']}: cosine {same}")
                    except Exception as error:  # noqa: BLE001  whatever it is, it is a failed request
                        wrong.append(repr(error))

        threads = [threading.Thread(target=load) for _ in range(6)]
        for thread in threads:
            thread.start()
        try:
            for i in range(SWAPS):
                job = activate(client, NEW if i % 2 == 0 else OLD)
                assert job["state"] == "done", job
                time.sleep(0.1)
        finally:
            stop.set()
            for thread in threads:
                thread.join(60)
        assert not wrong, wrong[:5]
        assert set(seen) == set(expected), seen
        end = time.monotonic() + 10  # a thread that ends lets go of the last batch
        while 'reco_snapshots_alive{name="grocery"} 1.0' not in client.get("/metrics").text:
            assert time.monotonic() < end, client.get("/metrics").text
            time.sleep(0.05)


def test_rollback_goes_to_the_one_before(running: Server) -> None:
    with running.client() as client:
        activate(client, NEW)
        activate(client, OLD)
        job = wait(client, client.post("/memories/grocery/rollback").json())
        assert (job["state"], job["version"], job["retired"]) == ("done", NEW, f"grocery@{OLD}")
        assert client.get("/memories/grocery").json()["current"] == NEW
        assert wait(client, client.post("/memories/grocery/rollback").json())["version"] == OLD
        assert Store(running.store).current("grocery") == OLD  # a restart serves what was current


def test_a_dry_run_proves_and_changes_nothing(running: Server) -> None:
    with running.client() as client:
        job = activate(client, NEW, dry_run=True)
        assert job["state"] == "done"
        assert job["recall"] == {"image": 1.0, "text": 1.0}
        assert client.get("/memories/grocery").json()["current"] == OLD


def test_a_damaged_version_is_refused_and_what_serves_goes_on(running: Server) -> None:
    with running.client() as client:
        job = activate(client, "damaged")
        assert job["state"] == "failed"
        assert "differs in bytes" in job["error"]
        assert client.get("/memories/grocery").json()["current"] == OLD
        assert client.post("/embed/text", json={"texts": ["a"]}).json()["memory"] == f"grocery@{OLD}"


def test_a_memory_of_another_encoder_is_a_409_and_harms_no_other(running: Server) -> None:
    with running.client() as client:
        reply = client.post("/embed/text", json={"texts": ["a"], "memory": "stranger"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (409, "encoder_mismatch")
        assert client.get("/readyz").status_code == 200


def test_two_swaps_at_once_are_one_too_many(running: Server) -> None:
    with running.client() as client:
        client.put(
            "/label-sets/many", json={"labels": [f"thing number {i}" for i in range(400)]}
        )  # re-embedded in each swap: it takes a while
        replies = [client.post("/memories/grocery/activate", json={"version": NEW}) for _ in range(4)]
        assert [reply.status_code for reply in replies] == [202, 409, 409, 409]
        assert replies[1].json()["error"]["code"] == "swap_in_progress"
        assert wait(client, replies[0].json())["state"] == "done"
        client.delete("/label-sets/many")
        activate(client, OLD)


def test_label_sets_are_ready_in_the_new_version(running: Server) -> None:
    with running.client() as client:
        client.put("/label-sets/few", json={"labels": ["Banana", "Lemon"]})
        assert activate(client, NEW)["seconds"]["labels"] > 0
        before = client.get("/metrics").text
        client.post("/classify", json={"texts": ["a"], "label_set": "few"})
        hits = [
            line
            for line in client.get("/metrics").text.splitlines()
            if line.startswith('reco_label_cache_total{result="hit"}')
        ]
        assert hits != [line for line in before.splitlines() if line.startswith('reco_label_cache_total{result="hit"}')]
        activate(client, OLD)


def test_a_swap_of_nothing_known_is_refused(running: Server, serve: Callable[..., Server]) -> None:
    with running.client() as client:
        assert client.post("/memories/grocery/activate", json={"version": "never"}).status_code == 404
        assert client.post("/memories/never/activate", json={"version": "a"}).status_code == 404
        assert client.post("/memories/never/rollback").status_code == 404
