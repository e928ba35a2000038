"""Starting, refusing to start, keys, limits and stopping: real processes, real signals."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from index_store import Pairs, Store
from index_store.build.build import build_version
from index_store.tests.support.small import unit_rows, unlock
from models.starter import install_starter
from service.tests import warm
from service.tests.conftest import Server, one_line, reco, serving

KEYS = {"RECO_API_KEYS": "alpha-key,beta-key", "RECO_ADMIN_KEY": "gamma-key"}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> object:
    """A service with keys and narrow limits, encoding at fixed shapes."""
    flags = ("--max-queue", "4", "--max-items", "4", "--max-batch", "2")
    environ = {"RECO_RECEIVE_S": "2", "RECO_MAX_LABELS": "100", "RECO_FIXED_SHAPES": "on", **KEYS}
    with serving(tmp_path_factory.mktemp("guarded"), *flags, **environ) as server:
        yield server


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_keys(guarded: Server) -> None:
    with guarded.client() as client:
        body = {"texts": ["a"]}
        assert client.post("/embed/text", json=body).status_code == 401
        assert client.post("/embed/text", headers=bearer("stranger-key"), json=body).status_code == 401
        assert client.post("/embed/text", headers={"authorization": "Basic alpha-key"}, json=body).status_code == 401
        for key in ("alpha-key", "beta-key", "gamma-key"):
            assert client.post("/embed/text", headers=bearer(key), json=body).status_code == 200
        assert client.get("/memories").status_code == 401
        assert client.get("/memories", headers=bearer("alpha-key")).status_code == 403
        assert client.get("/memories", headers=bearer("gamma-key")).status_code == 200
        assert client.put("/label-sets/a", json={"labels": ["x"]}, headers=bearer("alpha-key")).status_code == 403
        for route in ("/readyz", "/metrics", "/info", "/v1/models", "/"):
            assert client.get(route).status_code == 200, route
        assert "key" not in client.get("/info").text
    keys = ("alpha-key", "beta-key", "gamma-key", "stranger-key")
    assert not any(key in line for line in guarded.lines for key in keys)


@pytest.mark.parametrize(
    "line", ["PUT /label-sets/a", "POST /memories/grocery/pairs", "POST /embed/text", "POST /classify"]
)
def test_a_key_is_checked_before_the_body_is_read(guarded: Server, line: str) -> None:
    """Only the head is sent: the reply does not wait for the 1 MB that it announces."""
    host, port = guarded.url.removeprefix("http://").split(":")
    head = f"{line} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 1000000\r\n"
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(f"{head}Authorization: Bearer wrong\r\n\r\n".encode())
        assert connection.recv(4096).split()[1] in (b"401", b"403")


def test_fixed_shapes_give_the_vectors_of_any_shape(guarded: Server, server: Server, photos: dict[str, bytes]) -> None:
    files, texts = [("file", photo) for photo in photos.values()], ["a", "a carton of milk on a shelf", "lemon"]
    found = []
    for running, fixed in ((guarded, True), (server, False)):
        with running.client(headers=bearer("alpha-key")) as client:
            assert client.get("/info").json()["model"]["fixed_shapes"] is fixed
            replies = (client.post("/embed/image", files=files), client.post("/embed/text", json={"texts": texts}))
            found.append([row["embedding"] for reply in replies for row in reply.json()["data"]])
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)


def test_a_full_queue_refuses_at_the_door(guarded: Server, photos: dict[str, bytes]) -> None:
    files = [("file", photos["coffee"])] * 4

    def ask(_: int) -> httpx.Response:
        return httpx.post(f"{guarded.url}/embed/image", files=files, headers=bearer("alpha-key"), timeout=60)

    with ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(ask, range(36)))
    codes = Counter(reply.status_code for reply in replies)
    assert set(codes) == {200, 429}, codes
    full = next(reply for reply in replies if reply.status_code == 429)
    assert full.headers["retry-after"] == "1"
    assert full.json()["error"]["code"] == "queue_full"
    assert ask(0).status_code == 200


def count_refused(server: Server, reason: str) -> float:
    """What /metrics says of one reason of a refusal."""
    found = re.search(
        rf'^reco_rejected_total{{reason="{reason}"}} (\S+)$', httpx.get(f"{server.url}/metrics").text, re.M
    )
    return float(found[1]) if found else 0


def test_more_items_than_allowed(guarded: Server) -> None:
    before = count_refused(guarded, "too_large")
    reply = httpx.post(f"{guarded.url}/embed/text", json={"texts": ["a"] * 5}, headers=bearer("alpha-key"))
    assert reply.status_code == 413
    assert count_refused(guarded, "too_large") == before + 1
    assert "5" in reply.json()["error"]["message"]
    assert "4" in reply.json()["error"]["message"]


def test_a_deadline_is_a_504(guarded: Server, photos: dict[str, bytes]) -> None:
    headers = {**bearer("alpha-key"), "x-request-timeout-ms": "0.001"}
    reply = httpx.post(f"{guarded.url}/embed/image", files={"file": photos["coffee"]}, headers=headers)
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "deadline_passed")


def test_a_body_that_trickles_in_is_a_408(guarded: Server) -> None:
    host, port = guarded.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as raw:
        key = "authorization: Bearer alpha-key\r\ncontent-length: 999\r\n\r\n"
        raw.sendall(f"POST /embed/image HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: image/jpeg\r\n{key}".encode())
        raw.settimeout(0.2)
        reply, started = b"", time.monotonic()
        while not reply and time.monotonic() < started + 60:
            raw.sendall(b"x")
            with suppress(TimeoutError):
                reply = raw.recv(65536)
        raw.settimeout(60)
        while part := raw.recv(65536):  # to the end: the service closes the connection
            reply += part
    assert reply.startswith(b"HTTP/1.1 408"), reply
    assert b"slow_sender" in reply
    assert count_refused(guarded, "slow_sender") == 1
    assert time.monotonic() > started + 1.9


@pytest.mark.parametrize("beginning", [b"", b"POST /embed/image HTTP/1.1\r\nx: "])
def test_a_head_that_never_comes_whole_ends_its_connection(guarded: Server, beginning: bytes) -> None:
    host, port = guarded.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as raw:
        started, reply = time.monotonic(), b""
        raw.sendall(beginning)
        raw.settimeout(0.2)
        while not reply and time.monotonic() < started + 60:
            with suppress(TimeoutError):
                if beginning:
                    raw.sendall(b"x")
                reply = raw.recv(65536)
    assert reply.startswith(b"HTTP/1.1 408"), reply
    assert 1.9 < time.monotonic() - started < 30


def test_a_head_is_bounded_and_a_kept_connection_goes_on(guarded: Server) -> None:
    host, port = guarded.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as raw:
        for _ in range(3):
            time.sleep(0.9)  # together longer than one head may take
            raw.sendall(b"GET /livez HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
            reply = b""
            while not reply.endswith(b"}"):
                reply += raw.recv(65536)
            assert reply.startswith(b"HTTP/1.1 200")
        raw.sendall(b"GET /livez HTTP/1.1\r\n")
        reply = b""
        with suppress(ConnectionError):
            for _ in range(200):
                raw.sendall(b"x: " + b"y" * 1000 + b"\r\n")
        # what it did not read makes the kernel reset the connection
        with suppress(ConnectionError):
            while part := raw.recv(65536):
                reply += part
        assert reply == b"" or reply.startswith(b"HTTP/1.1 431"), reply
        with pytest.raises(OSError):
            for _ in range(50):
                raw.sendall(b"x")
                time.sleep(0.02)
    with guarded.client() as client:
        assert client.get("/livez").status_code == 200


def test_a_request_behind_a_large_body_is_not_taken_for_a_large_head(guarded: Server, photos: dict[str, bytes]) -> None:
    host, port = guarded.url.removeprefix("http://").split(":")
    body = b"x" * 200_000
    head = f"POST /embed/image HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: image/jpeg\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection((host, int(port)), timeout=60) as raw:
        raw.sendall(head + body + b"GET /livez HTTP/1.1\r\nhost: 127.0.0.1\r\nx-a: ")
        time.sleep(0.3)
        raw.sendall(b"b\r\n\r\n")
        reply = b""
        while reply.count(b"HTTP/1.1") < 2 or not reply.endswith(b"}"):
            part = raw.recv(65536)
            assert part, reply
            reply += part
    assert reply.startswith(b"HTTP/1.1 401")  # no key was sent
    assert b"HTTP/1.1 200" in reply


def test_a_large_label_set_is_embedded_in_the_background(guarded: Server) -> None:
    labels = [f"shelf number {i}" for i in range(600)] + ["banana"]
    with guarded.client(headers=bearer("gamma-key")) as client:
        assert client.post("/classify", json={"texts": ["a"], "labels": labels}).status_code == 413
        assert client.put("/label-sets/large", json={"labels": labels}).status_code == 200
        asked = {"texts": ["a photo of a banana."], "label_set": "large", "enhance": "both", "top_k": 2}
        early = client.post("/classify", json=asked, headers={"x-request-timeout-ms": "30"})
        if early.status_code != 200:  # a fast machine may be done
            assert (early.status_code, early.json()["error"]["code"]) == (504, "deadline_passed")
        assert client.post("/embed/text", json={"texts": ["nobody waits behind it"]}).status_code == 200
        give_up = time.monotonic() + 300
        while (state := client.get("/label-sets/large").json()["embedded"])[0][
            "done"
        ] < 601 and time.monotonic() < give_up:
            time.sleep(0.1)
        assert state == [{"memory": "grocery@all", "done": 601, "of": 601}]
        ranked = client.post("/classify", json=asked).json()["data"][0]
        assert ranked[0]["label"] == "banana"
        assert ranked[0]["score"] + ranked[1]["score"] < 1  # the rest has its share
        assert client.delete("/label-sets/large").status_code == 200


def test_a_client_that_hangs_up_leaves_no_trace(server: Server, photos: dict[str, bytes]) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    for _ in range(5):
        with socket.create_connection((host, int(port))) as raw:
            body = photos["astronaut"]
            head = f"POST /embed/image HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: image/jpeg\r\ncontent-length: {len(body)}\r\n\r\n"
            raw.sendall(head.encode() + body[: len(body) // 2])
    with server.client() as client:
        assert client.post("/embed/image", files={"file": photos["coffee"]}).status_code == 200
        time.sleep(0.2)
        assert 'reco_queue_depth{modality="image"} 0.0' in client.get("/metrics").text


def test_sigterm_answers_what_was_admitted_and_refuses_the_rest(tmp_path: Path, photos: dict[str, bytes]) -> None:
    with serving(tmp_path, "--max-batch", "4") as server:
        body = [("file", photos["astronaut"])] * 20
        codes: Counter[int | str] = Counter()

        def ask() -> None:
            try:
                codes[httpx.post(f"{server.url}/embed/image", files=body, timeout=60).status_code] += 1
            except httpx.HTTPError as error:
                codes[repr(error)] += 1

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        while "inside" not in (inside := _inside(server)) and not inside:
            time.sleep(0.01)
        time.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        late: int | str
        try:
            late = httpx.post(f"{server.url}/embed/text", json={"texts": ["late"]}).status_code
        except httpx.ConnectError:
            late = "gone"
        for thread in threads:
            thread.join(60)
        assert codes == {200: 6}, codes
        assert late in (503, "gone")
        assert server.process.wait(30) == 0


def test_sigterm_does_not_wait_for_a_compaction(tmp_path: Path) -> None:
    """A thread that trains an index cannot be stopped, and what it leaves is no version: the next
    start serves what was served.
    """
    store, rows = Store(tmp_path), unit_rows(40_000, 256, 0)
    install_starter(store)
    encoder, ids, records = store.manifest("grocery").encoder, np.arange(40_000), [{"caption": ""}] * 40_000
    kinds: dict[Any, Any] = {"image": "vector", "text": "vector"}
    built = build_version(
        store, "large", "v1", [Pairs(ids, rows, rows, records)], encoder=encoder, kinds=kinds, index="Flat"
    )
    slow = replace(
        built, index={**built.index, "asked": "IVF8192,Flat"}
    )  # what a compaction will make: minutes of training
    (unlock(tmp_path / "large" / "v1") / "manifest.json").write_text(slow.to_json())
    store.activate("large", "v1")
    with serving(tmp_path) as server, server.client() as client:
        assert client.delete("/memories/large/pairs/7").status_code == 200
        job = client.post("/memories/large/compact").json()
        while client.get(f"/jobs/{job['id']}").json()["progress"] != 1:
            time.sleep(0.1)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0  # training alone would take minutes
    assert store.versions("large") == ["v1"]
    assert len(store.open("large", encoder=encoder)) == 39_999


def test_sigterm_amid_a_write_to_the_log_still_drains(tmp_path: Path) -> None:
    """The log is a pipe that nobody reads until the signal was handled inside a blocked write."""
    output = tmp_path / "output"
    os.mkfifo(output)
    process = warm.Forked(("serve", "--port", "0", "--store", str(tmp_path / "store")), os.environ, output, output)
    rest = None
    try:
        with output.open("rb", buffering=0) as stream:
            fcntl.fcntl(stream, fcntl.F_SETPIPE_SZ, 4096)
            head = b""
            while b"Ctrl-C" not in head:
                more = stream.read(4096)
                assert more, head
                head += more
            url = head.decode().split("answers on ")[1].split()[0]
            with pytest.raises(httpx.TimeoutException), httpx.Client(base_url=url, timeout=2) as client:
                for _ in range(200):
                    client.get("/jobs/none")
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            rest = threading.Thread(target=stream.readall, daemon=True)
            rest.start()
            assert process.wait(30) == 0
            rest.join(10)
    finally:
        process.kill()


def _inside(server: Server) -> str:
    """The line of the metrics that shows that a decode has begun."""
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return next(
        (
            line
            for line in lines
            if line.startswith('reco_stage_duration_seconds_count{modality="image",stage="decode"}')
        ),
        "",
    )


def test_a_port_in_use_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}" in one_line(reco("serve", "--port", str(port)), 2)


def test_a_store_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "store"
    file.write_text("not a folder")
    one_line(reco("serve", "--port", "0", "--store", str(file)), 1)


def test_a_damaged_current_version_is_one_line_naming_the_file(tmp_path: Path) -> None:
    store = Store(tmp_path)
    install_starter(store)
    file = sorted(path for path in (tmp_path / "grocery" / "all").rglob("*.npy"))[0]
    file.chmod(0o644)
    file.write_bytes(file.read_bytes()[:-1])
    assert file.name in one_line(reco("serve", "--port", "0", "--store", str(tmp_path)), 1)


def test_a_file_cut_under_a_served_memory_takes_that_memory_alone(tmp_path: Path) -> None:
    """While it serves, after a fatal signal, and after the restart."""
    store, rows = Store(tmp_path), unit_rows(50, 512, 0)
    install_starter(store)
    encoder, ids, records = store.manifest("grocery").encoder, np.arange(50), [{"caption": "one"}] * 50
    kinds: dict[Any, Any] = {"image": "vector", "text": "vector"}
    build_version(store, "second", "v1", [Pairs(ids, rows, rows, records)], encoder=encoder, kinds=kinds)
    store.activate("second", "v1")
    ask = {"texts": ["a ripe banana"]}
    with serving(tmp_path) as server, server.client() as client:
        assert client.post("/embed/text", json=ask).status_code == 200
        file = unlock(tmp_path / "grocery" / "all") / "shard-0000" / "image.npy"
        os.truncate(file, 100)
        refused = client.post("/embed/text", json=ask)
        assert refused.status_code == 503
        assert "grocery@all: shard-0000/image.npy had " in refused.json()["error"]["message"]
        other = client.post("/embed/text", json={**ask, "memory": "second"})
        assert (other.status_code, other.headers.get("x-memory-version")) == (200, "second@v1"), other.text
        assert client.post("/embed/text", json={**ask, "enhance": False}).status_code == 200
        assert any("shard-0000/image.npy had " in line for line in server.lines)
        server.process.send_signal(signal.SIGBUS)  # what the kernel sends where the check came too early
        assert server.process.wait(30) == -signal.SIGBUS
        give_up = time.monotonic() + 10
        while not any("Bus error" in line for line in server.lines) and time.monotonic() < give_up:
            time.sleep(0.05)
        assert any("Fatal Python error: Bus error" in line for line in server.lines)
    with serving(tmp_path) as server, server.client() as client:
        assert client.post("/embed/text", json={**ask, "memory": "second"}).json()["memory"] == "second@v1"
        refused = client.post("/embed/text", json=ask)
        assert (refused.status_code, "grocery@all: shard-0000/image.npy" in refused.text) == (503, True)
        ready = client.get("/readyz")
        assert (ready.status_code, "shard-0000/image.npy" in ready.text) == (503, True)


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    assert "port" in one_line(reco("serve", RECO_PORT="many"), 2)
    config = tmp_path / "reco.toml"
    config.write_text("colour = 1\n")
    assert "colour" in one_line(reco("serve", "--config", str(config)), 2)
    assert "missing.toml" in one_line(reco("serve", "--config", str(tmp_path / "missing.toml")), 2)
    assert (
        "hub"
        in one_line(reco("serve", "--port", "0", "--model", "ViT-B-32", "--pretrained", "laion2b_s34b_b79k"), 1).lower()
    )
