"""One hostile request each: refused with value and limit, while other callers are answered at once
and memory stays bounded.
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
import pytest

from service.decoding.fork_server import ForkServer
from service.engine import Engine
from service.observability.metrics import Metrics
from service.tests.conftest import Server, serving
from service.tests.inside import scenario

LIVEZ_S = 2.0  # 0.1 s when the machine is quiet; a frozen event loop took 3 to 200 s
NESTED = b"[" * 1000


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("limits")) as server:
        yield server


@contextmanager
def watched(server: Server, megabytes: float) -> Iterator[None]:
    """Assert that /livez answers meanwhile, and that memory peaks within 300 MB per MB of body."""
    status = Path(f"/proc/{server.process.pid}/status")
    Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")  # the peak counts from now
    before = _kilobytes(status, "VmRSS")
    done, slowest = threading.Event(), [0.0]

    def ask() -> None:
        with server.client() as client:
            while not done.is_set():
                start = time.monotonic()
                assert client.get("/livez").status_code == 200
                slowest[0] = max(slowest[0], time.monotonic() - start)
                time.sleep(0.01)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield
    finally:
        done.set()
        asking.join(60)
    assert slowest[0] < LIVEZ_S
    assert _kilobytes(status, "VmHWM") - before < max(50, 300 * megabytes) * 1000


def _kilobytes(status: Path, field: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))


HOSTILE: list[tuple[str, str, Any, int]] = [
    ("POST", "/embed/text", {"texts": ["a"], "exclude": ["x" * 1_000_000, *map(str, range(999))]}, 422),
    ("POST", "/embed/text", {"texts": ["a"], "exclude": [{}] * 300_000}, 422),
    ("POST", "/embed/text", {"texts": ["a"], "x" * 1_000_000: 1}, 400),
    ("POST", "/embed/text", {"texts": ["a"], **{f"x{i}": 1 for i in range(300_000)}}, 400),
    ("POST", "/embed/text", {"texts": [{}] * 300_000}, 413),
    ("POST", "/classify", {"texts": ["a"], "labels": [{}] * 300_000}, 422),
    ("POST", "/classify", {"texts": ["a"], "labels": ["x" * 1001]}, 413),
    ("POST", "/classify", {"texts": ["a"], "labels": ["x"], "templates": ["{}" + "x" * 1001]}, 413),
    ("POST", "/classify", {"texts": ["a"] * 256, "labels": [f"{i} {'x' * 900}" for i in range(9000)], "top_k": 9000}, 413),
    ("PUT", "/label-sets/bad", {"labels": [{}] * 300_000}, 422),
    ("PUT", "/label-sets/bad", {"labels": ["x" * 1001]}, 413),
    ("PUT", "/label-sets/bad", {"labels": ["half \ud83d"]}, 422),
    ("POST", "/memories/grocery/pairs", {"pairs": [{}] * 300_000}, 400),
    ("POST", "/memories/grocery/pairs", {"pairs": [{"id": "a", "caption": "b", "image_embedding": ["x"] * 500_000}]}, 422),
    ("POST", "/memories/grocery/pairs", {"pairs": [{"id": "a", "caption": "b", "metadata": {"x": "y" * 8_000_000}}]}, 413),
    ("POST", "/v1/embeddings", {"input": [[1] * 500_000]}, 400),
    ("POST", "/v1/embeddings", {"input": [{}] * 300_000}, 422),
]  # fmt: skip


@pytest.mark.parametrize(("method", "route", "body", "status"), HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_body_is_refused_and_hurts_nobody(
    alone: Server, method: str, route: str, body: Any, status: int
) -> None:
    content = json.dumps(body).encode()
    with watched(alone, len(content) / 1e6), alone.client() as client:
        reply = client.request(method, route, content=content, headers={"content-type": "application/json"})
        assert reply.status_code == status, reply.text[:300]
        assert len(reply.content) < 1000


def test_more_values_than_any_request_needs_are_not_parsed(alone: Server) -> None:
    body = b'{"texts": [' + b"{}," * 5_000_000 + b"{}]}"
    with watched(alone, len(body) / 1e6), alone.client() as client:
        reply = client.post("/embed/text", content=body, headers={"content-type": "application/json"})
        assert reply.status_code == 413
        assert "at most 2000000" in reply.json()["error"]["message"]


DEEP_OR_LONG = [
    ("POST", "/embed/text", b'{"texts": ' + NESTED),
    ("POST", "/embed/text", b'{"texts": ["a"], "k": ' + NESTED + b"]" * 1000 + b"}"),
    ("POST", "/embed/text", b'{"texts": ["a"], "exclude": [' + b"1" * 5000 + b"]}"),
    ("POST", "/embed/text", b'{"texts": ["a"], "exclude": ["half \\ud83d"]}'),
    ("POST", "/embed/text?exclude=[" + "1" * 5000 + "]", b'{"texts": ["a"]}'),
    ("POST", "/embed/text?exclude=" + "[" * 1000, b'{"texts": ["a"]}'),
    ("POST", "/embed/text?k=" + "1" * 5000, b'{"texts": ["a"]}'),
    ("PUT", "/label-sets/bad", b'{"labels": ' + NESTED),
    ("PUT", "/label-sets/bad", b'{"labels": [' + b"1" * 5000 + b"]}"),
    ("POST", "/memories/grocery/pairs", b'{"pairs": ' + NESTED + b"]" * 1000 + b"}"),
    ("POST", "/memories/grocery/pairs", b'{"pairs": [{"id": ' + b"1" * 5000 + b', "caption": "a"}]}'),
    ("POST", "/memories/grocery/pairs", b'{"pairs": [{"id": "a", "caption": "a", "metadata": {"a": ' + b"[" * 900 + b"]" * 900 + b"}}]}"),
    ("POST", "/memories/grocery/pairs", b'{"pairs": [{"id": "a\\u0000", "caption": "a"}]}'),
    ("POST", "/memories/grocery/pairs", b'{"pairs": [{"id": "half \\ud83d", "caption": "a"}]}'),
    ("POST", "/memories/grocery/activate", b'{"version": "half \\ud83d"}'),
    ("POST", "/memories/grocery/activate", b'\xff\xfe'),
    ("DELETE", "/memories/grocery/pairs/abc%00", b""),
    ("POST", "/v1/embeddings", b'{"input": ' + NESTED + b"]" * 1000 + b"}"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "route", "body"), DEEP_OR_LONG, ids=range(len(DEEP_OR_LONG)))
def test_what_a_parser_chokes_on_is_the_callers_error(alone: Server, method: str, route: str, body: bytes) -> None:
    with alone.client() as client:
        reply = client.request(method, route, content=body, headers={"content-type": "application/json"})
    assert 400 <= reply.status_code < 500, reply.text[:300]
    assert reply.json()["error"]["code"] not in ("internal_error",)


def test_a_form_field_of_brackets(alone: Server, photos: dict[str, bytes]) -> None:
    with alone.client() as client:
        reply = client.post("/embed/image", files={"file": photos["coffee"]}, data={"exclude": "[" * 1000})
        assert reply.status_code == 422


def test_an_id_with_a_nul_deletes_no_other_pair(alone: Server, photos: dict[str, bytes]) -> None:
    pair = {"id": "abc", "caption": "a", "image": base64.b64encode(photos["coffee"]).decode()}
    with alone.client() as client:
        assert client.post("/memories/grocery/pairs", json={"pairs": [pair]}).status_code == 200
        assert client.delete("/memories/grocery/pairs/abc%00").status_code == 422
        assert client.delete("/memories/grocery/pairs/abc").status_code == 200


def test_a_large_form_needs_no_room_in_tmp(tmp_path: Path, photos: dict[str, bytes]) -> None:
    full = tmp_path / "no-such-folder"
    with serving(tmp_path / "store", TMPDIR=str(full)) as server, server.client() as client:
        padded = photos["coffee"] + b"\0" * 3_000_000  # files over 1 MB would go to /tmp
        assert client.post("/embed/image", files={"file": padded}).status_code == 200


def test_long_parts_of_a_form(alone: Server) -> None:
    """A header of a part of 16 MB, and a million short ones."""
    for header in (b"X: " + b"y" * 16_000_000, b"\r\n".join([b"X: y"] * 500_000)):
        part = (
            b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n' + header + b"\r\n\r\nx\r\n--b--\r\n"
        )
        with watched(alone, len(part) / 1e6), alone.client() as client:
            reply = client.post(
                "/embed/image", content=part, headers={"content-type": "multipart/form-data; boundary=b"}
            )
        assert 400 <= reply.status_code < 500, reply.text[:200]


def test_one_long_exclude_list_is_converted_once(alone: Server) -> None:
    ids = [f"{i:0>200}" for i in range(1000)]
    body = {"texts": ["a"] * 256, "exclude": ids}
    with watched(alone, 1), alone.client() as client, httpx.Client():
        assert client.post("/embed/text", json=body).status_code == 200


@pytest.mark.parametrize(
    ("label", "template", "status"),
    [("é" * 4, "{}" + "x" * 900, 200), ("果" * 10, "{}", 413)],
    ids=["a long template is no part of the reply", "bytes count, not characters"],
)
def test_the_size_of_a_reply_is_estimated_from_the_bytes_of_its_labels(
    opened: tuple[Any, Any, Any], label: str, template: str, status: int
) -> None:
    settings, reco, store = opened
    limited = settings.model_copy(update={"max_reply_bytes": 1024})
    engine = Engine(limited, reco, store, Metrics(version="0", torch="0", faiss="0"), ForkServer())

    async def work(client: httpx.AsyncClient) -> None:
        labels = [f"{i}{label}" for i in range(4)]
        body = {"texts": ["a"] * 4, "labels": labels, "templates": [template], "top_k": 4, "enhance": "none"}
        reply = await client.post("/classify", json=body)
        assert reply.status_code == status, reply.text
        if status == 413:
            assert "make a reply of about 1296 bytes, at most 1024" in reply.json()["error"]["message"]

    scenario(engine, work)
