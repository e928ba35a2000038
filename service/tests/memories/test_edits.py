"""Online edits over HTTP: visible to the next request, there after `kill -9`, folded into a new
version while they go on.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from service.tests.conftest import Server, one_line, reco, serving
from service.tests.memories.test_swap import wait

PAIRS = "/memories/grocery/pairs"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service of our own; every test removes what it added."""
    with serving(
        tmp_path_factory.mktemp("edits"), RECO_SEARCH_DEVICES="-1"
    ) as server:  # clones, as on a GPU, but in host memory
        yield server


@contextmanager
def added(client: httpx.Client, **pair: Any) -> Iterator[dict[str, Any]]:
    """One pair, there for a while."""
    reply = client.post(PAIRS, json={"pairs": [pair]})
    assert reply.status_code == 200, reply.text
    yield reply.json()
    client.delete(f"{PAIRS}/{pair['id']}")


def encoded(photo: bytes) -> str:
    return base64.b64encode(photo).decode()


def nearest(client: httpx.Client, photo: bytes, **options: Any) -> dict[str, Any]:
    """The reply's frame, and the item's nearest neighbour."""
    reply = client.post("/embed/image", json={"images": [encoded(photo)], "neighbors": True, **options})
    assert reply.status_code == 200, reply.text
    body: dict[str, Any] = reply.json()
    return {"memory": body["memory"], **body["data"][0]["neighbors"][0]}


def test_a_pair_is_found_by_the_next_request_replaced_and_removed(running: Server, photos: dict[str, bytes]) -> None:
    with running.client() as client:
        before = client.get("/memories/grocery").json()
        pair = {
            "id": "shop/astronaut.jpg",
            "image": encoded(photos["astronaut"]),
            "metadata": {"price": 3.5, "tags": ["space"]},
        }
        told = client.post(PAIRS, json={"pairs": [{**pair, "caption": "a photo of an astronaut"}]}).json()
        assert (told["added"], told["replaced"], told["pairs"]) == (1, 0, before["pairs"] + 1)
        assert told["memory"] == f"grocery@all+{before['edits'] + 1}"
        found = nearest(client, photos["astronaut"])
        assert found["memory"] == told["memory"]
        assert (found["id"], found["caption"], found["price"], found["tags"]) == (
            pair["id"],
            "a photo of an astronaut",
            3.5,
            ["space"],
        )
        assert found["score"] == pytest.approx(1, abs=2e-3)

        told = client.post(PAIRS, json={"pairs": [{**pair, "caption": "an astronaut in orange"}]}).json()
        assert (told["added"], told["replaced"], told["pairs"]) == (0, 1, before["pairs"] + 1)
        assert nearest(client, photos["astronaut"])["caption"] == "an astronaut in orange"
        assert (
            'reco_snapshots_alive{name="grocery"} 1.0' in client.get("/metrics").text
        )  # edits share their base's opening
        assert nearest(client, photos["astronaut"], exclude=[pair["id"]])["id"].startswith("train/")
        assert nearest(client, photos["astronaut"], max_similarity=0.98)["id"] != pair["id"]

        gone = client.delete(f"{PAIRS}/{pair['id']}")
        assert gone.status_code == 200, gone.text
        assert gone.json()["pairs"] == before["pairs"]
        assert nearest(client, photos["astronaut"])["id"] != pair["id"]
        again = client.delete(f"{PAIRS}/{pair['id']}")
        assert (again.status_code, again.json()["error"]["param"]) == (404, "id")


def test_whatever_metadata_holds_comes_back(running: Server, photos: dict[str, bytes]) -> None:
    """Numbers and halves of characters that a fast writer of JSON refuses, and fields called as the
    reply's own.
    """
    photo = photos["coffee"]
    strange = {"gtin": 2**70, "note": "half \ud83d", "weight": 12.5, "score": "A", "nested": {"score": [1]}}
    pair = {"id": "odd", "caption": "odd", "image": encoded(photo), "metadata": strange}
    with running.client() as client:
        # escaped: half a character has no bytes of its own
        body = json.dumps({"pairs": [pair]}).encode()
        assert client.post(PAIRS, content=body, headers={"content-type": "application/json"}).status_code == 200
        found = nearest(client, photo)
        client.delete(f"{PAIRS}/odd")
        assert found["id"] == "odd"
        assert found["score"] == pytest.approx(1, abs=2e-3)
        assert 0 < found["weight"] <= 1
        assert (found["source_weight"], found["source_score"], found["nested"]) == (12.5, "A", {"score": [1]})
        assert (found["gtin"], found["note"]) == (2**70, "half \ud83d")


def test_a_pinned_version_takes_its_edits_and_an_older_state_is_gone(running: Server, photos: dict[str, bytes]) -> None:
    with running.client() as client, added(client, id="cat", caption="a cat", image=encoded(photos["chelsea"])) as told:
        assert nearest(client, photos["chelsea"], memory="grocery@all")["memory"] == told["memory"]
        assert nearest(client, photos["chelsea"], memory=told["memory"])["id"] == "cat"
        client.post(
            PAIRS, json={"pairs": [{"id": "cat", "caption": "another cat", "image": encoded(photos["chelsea"])}]}
        )
        old = client.post("/embed/image", json={"images": [encoded(photos["chelsea"])], "memory": told["memory"]})
        assert (old.status_code, old.json()["error"]["code"]) == (410, "retired_version")


def unit(rng: np.random.Generator, width: int) -> list[float]:
    row = rng.standard_normal(width)
    return list(row / np.linalg.norm(row))


def test_vectors_may_be_given_instead(running: Server) -> None:
    rng, said = np.random.default_rng(0), "made elsewhere"
    with running.client() as client:
        plain = client.post("/embed/text", json={"texts": [said], "enhance": False, "encoding_format": "base64"}).json()
        packed = plain["data"][0]["embedding"]
        pair = {
            "id": "given",
            "caption": said,
            "image_embedding": unit(rng, 512),
            "image_key": unit(rng, 1280),
            "text_embedding": packed,
        }
        with added(client, **pair) as told:
            assert told["added"] == 1
            found = client.post("/embed/text", json={"texts": [said], "neighbors": True}).json()
            assert found["memory"] == told["memory"]
            assert found["data"][0]["neighbors"][0]["id"] == "given"
            assert found["data"][0]["neighbors"][0]["score"] == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize(
    ("changes", "status", "told"),
    [
        ({"image_embedding": None}, 400, "pairs[1].image_embedding"),
        ({"image_key": None}, 400, "image_key is missing"),
        ({"image_embedding": [1.0] * 3}, 422, "has 3 numbers, this memory's have 512"),
        ({"image_embedding": [2.0] + [0.0] * 511}, 422, "length 2"),
        ({"text_embedding": "not base64!"}, 422, "base64"),
        ({"id": ""}, 422, "id ''"),
        ({"caption": 7}, 422, "caption"),
        ({"colour": "red"}, 400, "colour"),
        ({"image_embedding": None, "image": encoded(b"\xff\xd8 no image")}, 415, "pairs[1]"),
    ],
)
def test_a_bad_pair_is_named_and_none_of_its_batch_is_kept(
    running: Server, changes: dict[str, Any], status: int, told: str
) -> None:
    rng = np.random.default_rng(1)
    good = {
        "id": "good",
        "caption": "fine",
        "image_embedding": unit(rng, 512),
        "image_key": unit(rng, 1280),
        "text_embedding": unit(rng, 512),
    }
    with running.client() as client:
        before = client.get("/memories/grocery").json()
        bad = {name: value for name, value in {**good, "id": "bad", **changes}.items() if value is not None}
        reply = client.post(PAIRS, json={"pairs": [good, bad]})
        assert reply.status_code == status, reply.text
        assert told in reply.json()["error"]["message"]
        after = client.get("/memories/grocery").json()
        assert (after["pairs"], after["edits"]) == (before["pairs"], before["edits"])


def test_edits_are_folded_each_time_that_enough_have_come_together(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    with serving(tmp_path, RECO_COMPACT_AFTER="5") as server, server.client() as client:
        idle = wait(
            client,
            client.post("/memories/grocery/activate", json={"version": "fruit-and-vegetables", "dry_run": True}).json(),
        )
        # nobody asked anything: the service's own test items are no queries
        assert idle["drift"] == {}
        for i in range(5):
            pair = {"id": f"new-{i}", "caption": "x", "image_embedding": unit(rng, 512), "image_key": unit(rng, 1280)}
            assert client.get("/memories/grocery").json()["current"] == "all"
            assert client.post(PAIRS, json={"pairs": [{**pair, "text_embedding": unit(rng, 512)}]}).status_code == 200
        until = time.monotonic() + 60
        while client.get("/memories/grocery").json()["current"] == "all" and time.monotonic() < until:
            time.sleep(0.1)
        found = client.get("/memories/grocery").json()
        assert (found["current"] != "all", found["edits"], found["previous"]) == (True, 0, "all")
        odd = client.delete(f"{PAIRS}/--5")
        assert odd.status_code == 404


def test_an_unknown_memory_an_empty_batch_and_too_many(running: Server) -> None:
    with running.client() as client:
        pair = {"id": "x", "caption": "x", "image_embedding": [1.0]}
        for unknown in (
            client.post("/memories/nowhere/pairs", json={"pairs": [pair]}),
            client.delete("/memories/nowhere/pairs/x"),
        ):
            assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "unknown_memory")
            assert (
                unknown.json()["error"]["message"]
                == "no memory 'nowhere' here, there is grocery: build it, or correct the name"
            )
        for evil in ("..%2Fx", "%2e%2e", ".hidden", "a%00b"):
            refused = [client.get(f"/memories/{evil}"), client.delete(f"/memories/{evil}/pairs/x")]
            refused += [
                client.post(f"/memories/{evil}/{verb}", json={"pairs": [pair]})
                for verb in ("pairs", "rollback", "compact")
            ]
            assert {reply.status_code for reply in refused} <= {404, 405, 422}, evil
            assert all("is not a name" in reply.text for reply in refused if reply.status_code == 422)
        assert client.post(PAIRS, json={"pairs": []}).status_code == 422
        many = client.post(PAIRS, json={"pairs": [pair] * 257})
        assert (many.status_code, many.json()["error"]["param"]) == (413, "pairs")


def test_edits_stay_with_their_version_and_come_back_with_it(running: Server, photos: dict[str, bytes]) -> None:
    with (
        running.client() as client,
        added(client, id="coffee", caption="a cup of coffee", image=encoded(photos["coffee"])),
    ):
        edits = client.get("/memories/grocery").json()["edits"]
        client.post("/embed/image", json={"images": [encoded(photos["coffee"])] * 3})
        away = wait(client, client.post("/memories/grocery/activate", json={"version": "fruit-and-vegetables"}).json())
        assert (away["state"], away["edits_left"]) == ("done", edits)
        assert away["drift"]["image"]["queries"] >= 3
        assert away["drift"]["image"]["mean"] <= 1 + 1e-5
        assert away["drift"]["image"]["p5"] <= away["drift"]["image"]["mean"]
        assert nearest(client, photos["coffee"])["id"] != "coffee"
        back = wait(client, client.post("/memories/grocery/rollback").json())
        assert (back["state"], back["edits_left"]) == ("done", 0)
        assert nearest(client, photos["coffee"])["id"] == "coffee"
        again = wait(
            client, client.post("/memories/grocery/activate", json={"version": "all"}).json()
        )  # the very one that serves
        assert again["state"] == "done", again
        assert nearest(client, photos["coffee"])["id"] == "coffee"


def test_compaction_keeps_what_is_added_while_it_runs(running: Server) -> None:
    rng = np.random.default_rng(2)
    kept: list[str] = []
    stop = threading.Event()

    def add() -> None:
        with running.client() as own:
            while not stop.is_set():
                name = f"during-{len(kept)}"
                pair = {"id": name, "caption": name, "image_embedding": unit(rng, 512), "image_key": unit(rng, 1280)}
                reply = own.post(PAIRS, json={"pairs": [{**pair, "text_embedding": unit(rng, 512)}]})
                assert reply.status_code == 200, reply.text
                kept.append(name)

    with running.client() as client:
        before = client.get("/memories/grocery").json()
        adding = threading.Thread(target=add)
        adding.start()
        while len(kept) < 3 and adding.is_alive():
            time.sleep(0.01)
        try:
            job = wait(client, client.post("/memories/grocery/compact").json())
        finally:
            stop.set()
            adding.join(30)
        assert job["state"] == "done", job
        assert job["progress"] == 1
        after = client.get("/memories/grocery").json()
        assert after["current"] == job["version"] != before["current"]
        assert after["pairs"] == before["pairs"] + len(kept)
        assert len(kept) > 1
        assert after["edits"] < len(kept)
        for name in kept:
            assert client.delete(f"{PAIRS}/{name}").status_code == 200
        assert (
            wait(client, client.post("/memories/grocery/activate", json={"version": "all"}).json())["state"] == "done"
        )


def test_what_was_acknowledged_survives_a_kill(tmp_path: Path, photos: dict[str, bytes]) -> None:
    with serving(tmp_path) as server, server.client() as client:
        for name, photo in photos.items():
            assert (
                client.post(PAIRS, json={"pairs": [{"id": name, "caption": name, "image": encoded(photo)}]}).status_code
                == 200
            )
        server.process.kill()
        server.process.wait(10)
    with (tmp_path / "grocery" / "all.journal").open("ab") as journal:
        # what a power cut may leave of an edit that was being written
        journal.write(b"half a record")
    with serving(tmp_path) as server, server.client() as client:
        ignored = (
            "grocery/all.journal: the last 13 bytes are no whole record, so never acknowledged: ignored, 3 edits stand"
        )
        assert any(ignored in line for line in server.lines), server.lines
        for name, photo in photos.items():
            assert nearest(client, photo)["id"] == name
        alone = reco("memory", "compact", "grocery", "--store", str(tmp_path))  # nobody edits yet
        assert alone.returncode == 0, alone.stderr
        pair = {"id": "later", "caption": "later", "image": encoded(photos["coffee"])}
        stale = client.post(PAIRS, json={"pairs": [pair]})
        assert (stale.status_code, stale.json()["error"]["code"]) == (409, "store_busy")
        version = alone.stdout.partition(":")[0]
        assert reco("memory", "activate", version, "--store", str(tmp_path), "--url", server.url).returncode == 0
        assert client.post(PAIRS, json={"pairs": [pair]}).status_code == 200
        assert "another process" in one_line(reco("memory", "compact", "grocery", "--store", str(tmp_path)), 1)
        done = reco("memory", "compact", "grocery", "--store", str(tmp_path), "--url", server.url)
        assert done.returncode == 0, done.stderr
        assert client.get("/memories/grocery").json()["edits"] == 0
    listed = reco("memory", "list", "--store", str(tmp_path)).stdout
    assert "grocery" in listed


def test_a_memory_beyond_the_budget_is_refused_with_the_numbers(tmp_path: Path) -> None:
    told = one_line(reco("serve", "--port", "0", "--store", str(tmp_path), RECO_MEMORY_BUDGET_BYTES="1000000"), 1)
    assert "the budget is 1,000,000" in told
    assert "memory_budget_bytes" in told
