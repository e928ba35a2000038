"""Faults around a real service: few files to open, a store that cannot be written, a second service
on the same store.
"""

from __future__ import annotations

import base64
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.tests.conftest import ROOT, START_S, Server, serving

LIVEZ = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
FILES = 64


@contextmanager
def serving_with_few_files(store: Path) -> Iterator[str]:
    """The address of a service under `ulimit -n 64`, in an interpreter of its own."""
    command = [sys.executable, "-m", "service.cli.main", "serve", "--port", "0", "--store", str(store)]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RECO_")}
    process = subprocess.Popen(
        ["bash", "-c", f'ulimit -n {FILES} && exec "$@"', "-", *command],
        cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    found: list[str] = []
    known = threading.Event()

    def read(stream: Any) -> None:
        for line in stream:
            if "answers on " in line:
                found.append(line.split("answers on ")[1].split()[0])
                known.set()
        known.set()

    reader = threading.Thread(target=read, args=(process.stdout,), daemon=True)
    reader.start()
    try:
        assert known.wait(START_S)
        assert found, "the service did not start"
        yield found[0]
    finally:
        process.terminate()
        process.wait(20)
        reader.join(10)
        process.stdout.close()


def test_few_files_to_open_refuse_the_crowd_of_one_address_and_nobody_else(
    tmp_path: Path, photos: dict[str, bytes]
) -> None:
    with serving_with_few_files(tmp_path) as url:
        place = ("127.0.0.1", httpx.URL(url).port or 0)

        def embed(source: str) -> int:
            transport = httpx.HTTPTransport(local_address=source)
            with httpx.Client(transport=transport, timeout=60) as client:
                headers = {"content-type": "image/jpeg"}
                return client.post(f"{url}/embed/image", content=photos["coffee"], headers=headers).status_code

        with ExitStack() as stack:
            crowd = [stack.enter_context(socket.create_connection(place, timeout=20)) for _ in range(100)]
            refused: list[socket.socket] = []
            # who is refused is told so before it asks; of a burst some are just closed
            while found := select.select([each for each in crowd if each not in refused], [], [], 2)[0]:
                refused += found
            told = [each.recv(4096) for each in refused]
            assert {reply.split()[1] for reply in told if reply} == {b"429"}
            accepted = [each for each in crowd if each not in refused]
            assert 8 <= len(accepted) < FILES * 0.75
            for each in accepted:
                each.sendall(LIVEZ)
                assert each.recv(4096).split()[1] == b"200"
            assert embed("127.0.0.2") == 200  # the crowd is still connected
        give_up = time.monotonic() + 20
        while httpx.get(f"{url}/livez").status_code == 429 and time.monotonic() < give_up:
            time.sleep(0.05)
        assert embed("127.0.0.1") == 200


@contextmanager
def read_only(store: Path, place: Path) -> Iterator[None]:
    """`store` at `place`, where not even root may write."""
    place.mkdir()
    for command in (("--bind", str(store), str(place)), ("-o", "remount,ro,bind", str(place))):
        if subprocess.run(("mount", *command), capture_output=True, check=False).returncode:
            subprocess.run(("umount", str(place)), capture_output=True, check=False)
            pytest.skip("mounting is not permitted here")
    try:
        yield
    finally:
        subprocess.run(("umount", "--lazy", str(place)), check=True)


def pair(name: str, photo: bytes) -> dict[str, Any]:
    """The body of an edit of one pair."""
    return {"pairs": [{"id": name, "caption": f"a {name}", "image": base64.b64encode(photo).decode()}]}


def finish(client: httpx.Client, reply: httpx.Response) -> dict[str, Any]:
    """The job that was accepted, at its end."""
    assert reply.status_code == 202, reply.text
    job: dict[str, Any] = reply.json()
    while job["state"] == "running":
        time.sleep(0.05)
        job = client.get(f"/jobs/{job['id']}").json()
    return job


def test_a_store_that_cannot_be_written_is_served_and_changes_are_refused_with_the_reason(
    tmp_path: Path, photos: dict[str, bytes]
) -> None:
    store, place = tmp_path / "store", tmp_path / "read-only"
    with serving(store) as first, first.client() as client:
        assert client.put("/label-sets/kinds", json={"labels": ["a", "b"]}).status_code == 200
    with read_only(store, place), serving(place) as server, server.client() as client:
        body = {"texts": ["a"], "label_set": "kinds"}
        assert client.post("/classify", json=body).json()["memory"] == "grocery@all"
        for reply in (
            client.post("/memories/grocery/pairs", json=pair("new", photos["coffee"])),
            client.delete("/memories/grocery/pairs/new"),
            client.put("/label-sets/more", json={"labels": ["a"]}),
            client.put("/label-sets/kinds", json={"labels": ["c"]}),
            client.delete("/label-sets/kinds"),
        ):
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "store_error"), reply.text
            assert "Read-only file system" in reply.json()["error"]["message"]
        activated = client.post("/memories/grocery/activate", json={"version": "fruit-and-vegetables"})
        job = finish(client, activated)
        assert (job["state"], "Read-only file system" in job["error"]) == ("failed", True)
        assert client.post("/classify", json=body).json()["memory"] == "grocery@all"
        assert client.get("/readyz").status_code == 200


def test_a_token_that_cannot_be_kept_is_told(tmp_path: Path) -> None:
    store, place = tmp_path / "store", tmp_path / "read-only"
    with serving(store, RECO_ADMIN_KEY="swordfish"):
        pass
    with read_only(store, place), serving(place) as server:
        assert any(
            "the admin token cannot be kept in the store (Read-only file system)" in line for line in server.lines
        )
        give_up = time.monotonic() + 20
        while not (links := [line for line in server.lines if "/#token=" in line]) and time.monotonic() < give_up:
            time.sleep(0.05)
        (link,) = links
        headers = {"authorization": f"Bearer {link.rpartition('=')[2]}"}
        assert httpx.get(f"{server.url}/memories", headers=headers).status_code == 200


def test_two_services_on_one_store_serve_and_take_turns_at_changes(tmp_path: Path, photos: dict[str, bytes]) -> None:
    store = tmp_path / "store"

    def put(client: httpx.Client, name: str) -> tuple[str, str]:
        reply = client.post("/memories/grocery/pairs", json=pair(name, photos["coffee"])).json()
        error = reply.get("error", {"code": "", "message": reply.get("memory")})
        return error["code"], error["message"]

    def nearest(client: httpx.Client) -> list[str]:
        reply = client.post("/embed/image", files={"file": photos["coffee"]}, data={"neighbors": "true", "k": "5"})
        return [found["id"] for found in reply.json()["data"][0]["neighbors"]]

    with serving(store) as left, serving(store) as right, left.client() as one, right.client() as other:
        assert put(one, "one") == ("", "grocery@all+1")
        code, message = put(other, "other")
        assert code == "store_busy"
        assert "is being written by another process" in message
        activated = other.post("/memories/grocery/activate", json={"version": "fruit-and-vegetables"})
        assert finish(other, activated)["state"] == "done"
        code, message = put(one, "late")
        assert code == "store_busy"
        assert "another process made grocery@fruit-and-vegetables current" in message
        assert put(other, "other") == ("", "grocery@fruit-and-vegetables+1")
        assert "one" in nearest(one)
        assert "other" in nearest(other)
        assert [_memory(server) for server in (left, right)] == ["grocery@all+1", "grocery@fruit-and-vegetables+1"]
        for client, label in ((one, "a"), (other, "b")):
            assert client.put("/label-sets/kinds", json={"labels": [label]}).status_code == 200
        assert [client.get("/label-sets/kinds").json()["labels"] for client in (one, other)] == [["b"], ["b"]]
    with serving(store) as server, server.client() as client:  # what was acknowledged is there
        assert _memory(server) == "grocery@fruit-and-vegetables+1"
        assert "other" in nearest(client)
        assert finish(client, client.post("/memories/grocery/activate", json={"version": "all"}))["state"] == "done"
        assert _memory(server) == "grocery@all+1"
        assert "one" in nearest(client)


def _memory(server: Server) -> str:
    with server.client() as client:
        return str(client.get("/memories/grocery").json()["ref"])
