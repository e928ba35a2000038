"""The Python client against a real service, and its patience against a small real HTTP server that
is busy at first.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.access.token import read_token
from service.client import AsyncRecoClient, Limits, RecoClient, RecoError
from service.tests.conftest import ROOT, Server

SMALL = Limits(max_items=2, retries=2)


@pytest.fixture(scope="module")
def reco(server: Server) -> Iterator[RecoClient]:
    with RecoClient(server.url, api_key=read_token(server.store), limits=SMALL) as client:
        yield client


def test_long_lists_are_sent_in_parts_and_come_back_in_order(
    reco: RecoClient, server: Server, photos: dict[str, bytes], tmp_path: Path
) -> None:
    texts, done = ["lemon", "milk", "banana", "leek", "oat"], list[int]()
    found = reco.embed_texts(texts, progress=done.append, enhance=False)
    assert found.dtype == np.float32
    assert done == [2, 2, 1]
    with server.client() as http:
        together = http.post("/embed/text", json={"texts": texts, "enhance": False}).json()["data"]
        alone = [
            http.post("/embed/image", files={"file": photo}).json()["data"][0]["embedding"] for photo in photos.values()
        ]
    np.testing.assert_allclose((found * [row["embedding"] for row in together]).sum(1), 1, atol=1e-5)
    path = tmp_path / "first.jpg"
    path.write_bytes(next(iter(photos.values())))
    images = reco.embed_images([path, *list(photos.values())[1:]])
    np.testing.assert_allclose((images * alone).sum(1), 1, atol=1e-5)
    assert reco.embed_texts([]).shape == (0, 0)


def test_classify_memories_and_activate(reco: RecoClient, photos: dict[str, bytes]) -> None:
    ranked = reco.classify(["a photo of a Lemon."] * 3, texts=True, labels=["Lemon", "Milk"], enhance="none", top_k=1)
    assert [row[0]["label"] for row in ranked] == ["Lemon"] * 3
    assert len(reco.classify(list(photos.values()), labels=["Lemon", "Milk"], exclude=["none"])) == 3
    assert [row["name"] for row in reco.memories()] == ["grocery"]
    assert reco.activate("grocery", "all", dry_run=True)["recall"]
    with pytest.raises(RecoError, match="never") as refused:
        reco.activate("grocery", "never")
    assert (refused.value.status, refused.value.code) == (404, "unknown_version")


def test_one_answer_is_never_of_two_versions(server: Server, photos: dict[str, bytes]) -> None:
    """The memory is swapped, then edited, between two requests of one call: all begins anew."""
    pair = {"id": "new", "caption": "a new thing", "image": base64.b64encode(photos["coffee"]).decode()}
    texts = [f"a photo of fruit {i}" for i in range(40)]
    with RecoClient(server.url, api_key=read_token(server.store), limits=Limits(max_items=4)) as reco:
        changes = iter(
            (
                lambda: reco.activate("grocery", "fruit-and-vegetables"),
                lambda: reco.put_pairs("grocery", [pair]),
                lambda: reco.delete_pair("grocery", "new"),
            )
        )
        done: list[int] = []

        def change(more: int) -> None:
            done.append(more)
            if len(done) % 7 == 2:
                next(changes, lambda: None)()

        try:
            mixed = reco.embed_texts(texts, progress=change)
            assert sum(done) == 40
            assert [more for more in done if more < 0] == [-8, -24, -24]
            np.testing.assert_allclose(mixed, reco.embed_texts(texts), atol=1e-5)
            with RecoClient(server.url, limits=Limits(max_items=4, restarts=0)) as strict:
                with pytest.raises(RecoError) as refused:
                    strict.embed_texts(texts, progress=lambda _: reco.put_pairs("grocery", [pair]))
                assert (refused.value.status, refused.value.code) == (410, "retired_version")
                strict.embed_texts(texts[:4], progress=lambda _: reco.delete_pair("grocery", "new"))
        finally:
            reco.activate("grocery", "all")


def test_label_sets_and_jobs(reco: RecoClient) -> None:
    stored = reco.put_label_set("kinds", ["Lemon", "Milk"], ["a {}"])
    assert reco.label_set(f"kinds@{stored['version']}")["labels"] == ["Lemon", "Milk"]
    ranked = reco.classify(["a Lemon"] * 5, texts=True, label_set="kinds", top_k=1)
    assert [row[0]["label"] for row in ranked] == ["Lemon"] * 5
    job = reco.activate("grocery", "all", dry_run=True)
    assert reco.job(job["id"])["state"] == "done"
    with pytest.raises(RecoError) as refused:
        reco.job("none")
    assert refused.value.code == "not_found"


@pytest.mark.parametrize("pair_id", ["a/b", "..", ".", "../grocery", "50 %", "what?", "#1", "ü", "a+b", "%2F"])
def test_an_id_of_any_characters_is_one_id(reco: RecoClient, pair_id: str, photos: dict[str, bytes]) -> None:
    pair = {"id": pair_id, "caption": "a new thing", "image": base64.b64encode(photos["coffee"]).decode()}
    reco.put_pairs("grocery", [pair])
    assert reco.delete_pair("grocery", pair_id)["deleted"] == pair_id


@pytest.mark.parametrize("name", ["../jobs/none", "a/b", "a?b=1", "..", "a#b"])
def test_a_name_never_becomes_another_route(reco: RecoClient, name: str) -> None:
    for ask in (reco.label_set, reco.job, reco.rollback, lambda given: reco.put_label_set(given, ["a"])):
        with pytest.raises(RecoError) as refused:
            ask(name)
        assert refused.value.status in (404, 422), refused.value
    assert [row["name"] for row in reco.memories()] == ["grocery"]


def test_a_refusal_names_the_place_in_the_callers_list(reco: RecoClient, photos: dict[str, bytes]) -> None:
    with pytest.raises(RecoError, match=r"^images\[3\]") as refused:
        reco.embed_images([photos["coffee"]] * 3 + [b"no image"])
    assert (refused.value.status, refused.value.code, refused.value.param) == (415, "unsupported_image", "images[3]")


def test_the_async_client_says_the_same(reco: RecoClient, server: Server, photos: dict[str, bytes]) -> None:
    async def ask() -> tuple[np.ndarray, np.ndarray, list[Any]]:
        async with AsyncRecoClient(server.url, api_key=read_token(server.store), limits=SMALL) as client:
            texts, images = await asyncio.gather(
                client.embed_texts(["a", "b", "c"]), client.embed_images(list(photos.values()))
            )
            return texts, images, await client.memories()

    texts, images, memories = asyncio.run(ask())
    np.testing.assert_allclose(texts, reco.embed_texts(["a", "b", "c"]), atol=1e-5)
    np.testing.assert_allclose(images, reco.embed_images(list(photos.values())), atol=1e-5)
    assert memories == reco.memories()


# --- patience -------------------------------------------------------------------------------------


@pytest.fixture
def busy() -> Iterator[Callable[..., tuple[str, list[float]]]]:
    """busy(statuses, **headers): a server that answers with these statuses in turn, then with one
    vector; and when each request came.
    """
    servers: list[ThreadingHTTPServer] = []

    def start(statuses: list[int], port: int = 0, **headers: str) -> tuple[str, list[float]]:
        times: list[float] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                times.append(time.monotonic())
                status = statuses[len(times) - 1] if len(times) <= len(statuses) else 200
                error = {"message": "texts[0]: wait", "type": "t", "param": None, "code": "queue_full"}
                body = json.dumps({"data": [{"embedding": "AACAPw=="}]} if status == 200 else {"error": error}).encode()
                self.send_response(status)
                for name, value in {"content-length": str(len(body)), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        made = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        servers.append(made)
        threading.Thread(target=made.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{made.server_port}", times

    yield start
    for made in servers:
        made.shutdown()
        made.server_close()


def test_a_busy_service_is_asked_again_when_it_says(busy: Callable[..., Any]) -> None:
    url, times = busy([429, 503], retry_after="0.3")
    with RecoClient(url, limits=SMALL) as client:
        assert client.embed_texts(["a"]).tolist() == [[1.0]]
    assert len(times) == 3
    assert min(np.diff(times)) >= 0.3


def test_patience_has_an_end(busy: Callable[..., Any]) -> None:
    url, times = busy([429] * 9, retry_after="3600")
    with (
        RecoClient(url, limits=Limits(retries=2, max_pause_s=0.05)) as client,
        pytest.raises(RecoError, match="wait") as refused,
    ):
        client.embed_texts(["a"])
    assert (refused.value.status, refused.value.code, len(times)) == (429, "queue_full", 3)


def test_what_will_not_change_is_not_asked_again(busy: Callable[..., Any]) -> None:
    url, times = busy([422] * 9)
    with RecoClient(url) as client, pytest.raises(RecoError):
        client.embed_texts(["a"])
    assert len(times) == 1


def test_a_service_that_starts_late_is_found(busy: Callable[..., Any]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threading.Timer(0.3, busy, args=([], port)).start()
    with RecoClient(f"http://127.0.0.1:{port}", limits=Limits(retries=8)) as client:
        assert client.embed_texts(["a"]).tolist() == [[1.0]]


def test_nobody_there_is_one_error() -> None:
    with (
        RecoClient("http://127.0.0.1:9", limits=Limits(retries=1)) as client,
        pytest.raises(RecoError, match="is the service running") as told,
    ):
        client.embed_texts(["a"])
    assert (told.value.status, told.value.code) == (None, "unreachable")


def test_a_proxys_page_is_told_too() -> None:
    import httpx

    from service.client.protocol import _refused

    assert _refused(httpx.Response(502, text="<html>Bad Gateway</html>"), 0).status == 502


def test_the_client_is_a_wheel_of_its_own(server: Server, tmp_path: Path) -> None:
    """Built without a network, installed alone, and asked for two vectors as `reco_client`."""
    uv = [sys.executable, "-m", "uv"]
    build = [*uv, "build", "--quiet", "--offline", "--wheel", "--no-build-isolation", "--python", sys.executable]
    subprocess.run([*build, "--out-dir", str(tmp_path), "service/client"], cwd=ROOT, check=True)
    wheel = next(tmp_path.glob(f"reco_client-{version('reco-serve')}-*.whl"))
    with zipfile.ZipFile(wheel) as packed:
        code = {name for name in packed.namelist() if not name.startswith("reco_client-")}
        packed.extractall(tmp_path / "site")
    assert code == {
        f"reco_client/{path.name}" for path in (ROOT / "service/client").iterdir() if path.suffix == ".py"
    } | {"reco_client/py.typed"}
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import reco_client\n"
        "with reco_client.RecoClient(sys.argv[2]) as reco: assert reco.embed_texts(['a', 'b']).shape == (2, 512)\n"
        "assert 'service' not in sys.modules"
    )
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", script, str(tmp_path / "site"), server.url]
    subprocess.run(command, cwd=tmp_path, env=environ, check=True)


def test_the_client_needs_neither_torch_nor_a_web_framework() -> None:
    code = "import sys, service.client.client; sys.exit(bool({'torch', 'fastapi', 'faiss', 'open_clip', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
