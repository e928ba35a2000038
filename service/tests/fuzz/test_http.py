"""Fuzzers of a running service: JSON, queries, forms, photos and raw HTTP.

Each round is one request. A 5xx, a reply later than the deadline allows, or growth of memory, open
files or threads fails; a 504 at the deadline is an answer, which a busy machine may give to any
request. A failure names its seed and round: RECO_FUZZ_SEED repeats it.
"""

from __future__ import annotations

import io
import json
import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import httpx
import pytest
from PIL import Image

from index_store.tests.support.mutate import SEED, choose, mutate_bytes, mutate_json, rounds, strange_value
from service.tests.conftest import Server, serving

REQUESTS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "corpus/requests.json").read_text())
REPLY_S = 20.0  # a request has 5 s
DEADLINE_PASSED = 504  # of work that is more than the caller's time allows
GROWTH_KB, GROWTH_FILES, GROWTH_THREADS = 300_000, 24, 24


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("fuzz"), RECO_TIMEOUT_S="5", RECO_RECEIVE_S="2") as server:
        yield server


@contextmanager
def steady(server: Server) -> Iterator[httpx.Client]:
    """A client; at the end the service is ready and holds about what it held before."""
    with server.client(timeout=REPLY_S) as client:
        for request in REQUESTS:
            reply = client.request(request["method"], request["path"], json=request.get("body"))
            # else the fuzzers would test the check of keys alone
            assert reply.status_code not in (401, 403), (request["method"], request["path"], reply.text)
        before = _usage(server)
        yield client
        assert client.get("/readyz").status_code == 200
        growth = [after - held for after, held in zip(_usage(server), before, strict=True)]
        assert all(
            grown < most for grown, most in zip(growth, (GROWTH_KB, GROWTH_FILES, GROWTH_THREADS), strict=True)
        ), growth


def _usage(server: Server) -> tuple[int, int, int]:
    """Resident kilobytes, open files and threads."""
    folder = Path(f"/proc/{server.process.pid}")
    fields = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]), len(list((folder / "fd").iterdir())), int(fields["Threads"])


def _check(reply: httpx.Response, number: int) -> None:
    where = f"seed {SEED}, round {number}: {reply.request.method} {str(reply.request.url)[:200]}"
    assert reply.status_code < 500 or reply.status_code == DEADLINE_PASSED, (
        f"{where}: {reply.status_code} {reply.text[:200]}"
    )
    if reply.status_code >= 400:
        assert reply.json()["error"]["code"], where
        assert "Traceback" not in reply.text, where
        assert len(reply.content) < 100_000, where


def test_json_bodies(fuzzed: Server) -> None:
    with steady(fuzzed) as client:
        for number, rng in enumerate(rounds()):
            seed = choose(REQUESTS, rng)
            body = json.dumps(mutate_json(seed.get("body", {}), rng)).encode("utf-8", "replace")
            if rng.random() < 0.3:
                body = mutate_bytes(body, rng)
            headers = {"content-type": "application/json", **_strange_headers(rng)}
            _check(client.request(seed["method"], seed["path"], content=body, headers=headers), number)


def _strange_headers(rng: random.Random) -> dict[str, str]:
    given = {
        "accept": "application/x-npy", "x-request-id": "a b\tc", "authorization": "Bearer " + "x" * 5000,
        "content-type": "application/json; charset=utf-16", "content-encoding": "gzip", "expect": "100-continue",
        "x-request-timeout-ms": "nan", "origin": "http://evil.example", "x-forwarded-for": "1.2.3.4," * 200,
    }  # fmt: skip
    return {name: given[name] for name in given if rng.random() < 0.05}


def test_queries(fuzzed: Server) -> None:
    names = ("k", "exclude", "memory", "neighbors", "max_similarity", "labels", "templates", "top_k", "on_error", "x")
    with steady(fuzzed) as client:
        for number, rng in enumerate(rounds()):
            seed = choose([each for each in REQUESTS if each["method"] == "POST"], rng)
            pairs = [(rng.choice(names), _text(rng)) for _ in range(rng.randint(1, 4))]
            path = seed["path"] + "?" + (urlencode(pairs) if rng.random() < 0.8 else quote(_text(rng), safe="&=[]"))
            try:
                reply = client.request("POST", path[:60_000], json=seed.get("body"))
            except httpx.InvalidURL:
                continue
            _check(reply, number)


def _text(rng: random.Random) -> str:
    value = strange_value(rng)
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode("utf-8", "replace").decode()[:5000]


def test_forms(fuzzed: Server, photos: dict[str, bytes]) -> None:
    part = 'Content-Disposition: form-data; name="{}"{}\r\n\r\n'
    with steady(fuzzed) as client:
        for number, rng in enumerate(rounds()):
            body = b""
            for _ in range(rng.randint(1, 5)):
                name, file = rng.choice(("file", "k", "labels", "x", "")), rng.choice(("", '; filename="a"'))
                content = photos["coffee"][: rng.choice((10, 1000, 10**6))] if file else _text(rng).encode()
                body += b"--b\r\n" + part.format(name, file).encode() + content + b"\r\n"
            body += b"--b--\r\n"
            if rng.random() < 0.5:
                body = mutate_bytes(body, rng)
            kind = rng.choice(
                ("multipart/form-data; boundary=b",) * 8 + ("multipart/form-data", "multipart/form-data; boundary=")
            )
            reply = client.post(rng.choice(("/embed/image", "/classify")), content=body, headers={"content-type": kind})
            _check(reply, number)


def test_photos(fuzzed: Server, photos: dict[str, bytes]) -> None:
    picture = Image.open(io.BytesIO(photos["coffee"])).convert("RGB").resize((64, 48))
    corpus = [
        _encode(picture, kind)
        for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "PPM", "ICO", "JPEG2000")
    ]
    with steady(fuzzed) as client:
        for number, rng in enumerate(rounds()):
            reply = client.post(
                "/embed/image", content=mutate_bytes(choose(corpus, rng), rng), headers={"content-type": "image/*"}
            )
            _check(reply, number)


def _encode(picture: Image.Image, kind: str) -> bytes:
    encoded = io.BytesIO()
    picture.save(encoded, kind)
    return encoded.getvalue()


def test_raw_http(fuzzed: Server) -> None:
    host, port = fuzzed.url.removeprefix("http://").split(":")
    body = b'{"texts": ["a"]}'
    whole = (
        b"POST /embed/text HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nX-Request-ID: a\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    ) + body
    chunked = (
        b'POST /embed/text HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"tex\r\n0\r\n\r\n'
    )
    upgrade = b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    with steady(fuzzed):
        for number, rng in enumerate(rounds()):
            data = mutate_bytes(choose([whole, whole * 3, chunked, upgrade], rng), rng)
            with socket.create_connection((host, int(port)), timeout=REPLY_S) as connection:
                try:
                    connection.sendall(data)
                    connection.shutdown(socket.SHUT_WR)
                    reply = connection.recv(65536)
                except ConnectionError:
                    continue
            status = reply.split()[1:2]
            assert not status or status[0][:1] != b"5" or status[0] == b"504", (
                f"seed {SEED}, round {number}: {reply[:200]!r}"
            )
