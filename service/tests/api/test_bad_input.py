"""Hostile and broken input over real HTTP: each has the code of the contract, and the service goes
on.
"""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import time
import zipfile
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from service.tests.conftest import Server, jpeg

JSON = {"content-type": "application/json"}
JPEG = {"content-type": "image/jpeg"}


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def refused(reply: httpx.Response) -> tuple[int, str, str | None]:
    """(status, code, param) of a refusal."""
    error = reply.json()["error"]
    assert "Traceback" not in reply.text
    return reply.status_code, error["code"], error["param"]


def metric(http: httpx.Client, series: str) -> float:
    """The sum of all series that begin like this."""
    return sum(
        float(line.rpartition(" ")[2]) for line in http.get("/metrics").text.splitlines() if line.startswith(series)
    )


def test_a_polyglot_is_the_image_it_begins_as(http: httpx.Client, photos: dict[str, bytes]) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("run.html", "<script>alert(1)</script>")
    photo = photos["coffee"]
    found = http.post(
        "/embed/image?enhance=false", files=[("file", photo), ("file", photo + archive.getvalue())]
    ).json()["data"]
    np.testing.assert_allclose(found[0]["embedding"], found[1]["embedding"], atol=1e-6)


@pytest.mark.parametrize(
    "head",
    [b"%!PS-Adobe-3.0 EPSF-3.0\n", b"%PDF-1.7\n", b"<svg xmlns='http://www.w3.org/2000/svg'>", b"PK\x03\x04", b"\x00"],
)
def test_what_only_contains_an_image_is_none(http: httpx.Client, photos: dict[str, bytes], head: bytes) -> None:
    assert refused(http.post("/embed/image", content=head + photos["coffee"], headers=JPEG)) == (
        415,
        "unsupported_image",
        "images[0]",
    )


def test_a_line_of_50_000_pixels_is_served(http: httpx.Client) -> None:
    line = np.zeros((1, 50_000, 3), np.uint8)
    line[:, ::2] = 255
    png = io.BytesIO()
    Image.fromarray(line).save(png, "PNG")
    for image in (jpeg(line), png.getvalue(), jpeg(line.transpose(1, 0, 2))):
        assert http.post("/embed/image", content=image, headers=JPEG).status_code == 200


def test_nan_and_infinity_are_no_numbers(http: httpx.Client, photos: dict[str, bytes]) -> None:
    for bare in ("NaN", "Infinity", "-Infinity"):
        body = f'{{"texts": ["a"], "max_similarity": {bare}}}'
        assert refused(http.post("/embed/text", content=body, headers=JSON))[:2] == (400, "bad_request")
        query = http.post(f"/embed/image?max_similarity={bare}", content=photos["coffee"], headers=JPEG)
        assert refused(query) == (422, "invalid_value", "max_similarity")
    for bare in ("nan", "inf", "-1", "1e999"):
        timed = http.post("/embed/text", json={"texts": ["a"]}, headers={"x-request-timeout-ms": bare})
        assert refused(timed)[:2] == (422, "invalid_value")


def test_nul_bytes_are_characters_like_others(http: httpx.Client) -> None:
    found = http.post("/embed/text", json={"texts": ["a\x00b", "\x00", "\x00" * 1000]}).json()["data"]
    assert np.isfinite([row["embedding"] for row in found]).all()
    assert refused(http.post("/embed/text", json={"texts": ["a"], "memory": "gro\x00cery"}))[0] == 422
    assert refused(http.post("/embed/text?memory=%00", json={"texts": ["a"]}))[0] == 422
    assert refused(http.put("/label-sets/a%00b", json={"labels": ["a"]}))[0] == 422


def test_too_many_texts_and_too_long_ones(http: httpx.Client) -> None:
    assert refused(http.post("/embed/text", json={"texts": ["x"] * 10_000})) == (413, "too_large", "texts")
    assert refused(http.post("/embed/text", json={"texts": ["fine", "x" * 2**20]})) == (413, "too_large", "texts[1]")
    assert refused(http.post("/v1/embeddings", json={"input": ["x"] * 10_000})) == (413, "too_large", "input")
    assert refused(http.post("/classify", json={"texts": ["a"], "labels": [f"{i}" for i in range(10_001)]})) == (
        413,
        "too_large",
        "labels",
    )
    deep = '{"texts": ' + "[" * 5_000 + "]" * 5_000 + "}"
    assert refused(http.post("/embed/text", content=deep, headers=JSON))[0] in (400, 422)


def test_wrong_types_are_named(http: httpx.Client) -> None:
    wrong: list[Any] = [
        {"texts": {"a": 1}},
        {"texts": 3},
        {"texts": [["a"]]},
        {"texts": ["a"], "exclude": "x"},
        {"texts": ["a"], "k": 1.5},
    ]
    for body in wrong:
        status, _, param = refused(http.post("/embed/text", json=body))
        assert (status, bool(param)) == (422, True), body
    for broken in (b"null", b"3", b'"x"', b"", b"\xff\xfe", b'{"texts": ["\xff"]}'):
        assert refused(http.post("/embed/text", content=broken, headers=JSON))[:2] == (400, "bad_request"), broken


def test_callers_who_hang_up_are_counted_and_their_work_is_dropped(
    server: Server, http: httpx.Client, photos: dict[str, bytes]
) -> None:
    left, encoded = 'reco_requests_total{code="499",endpoint="/embed/image"', 'reco_batch_size_sum{modality="image"}'
    before, batched = metric(http, left), metric(http, encoded)
    body = json.dumps({"images": [base64.b64encode(photos["astronaut"]).decode()] * 200}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as raw:
        head = f"POST /embed/image HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        raw.sendall(head.encode() + body)
    give_up = time.monotonic() + 60
    while metric(http, left) == before and time.monotonic() < give_up:
        time.sleep(0.1)
    assert metric(http, left) == before + 1
    time.sleep(1)
    # of 200: those in a batch already, and the watchdog's test item
    assert metric(http, encoded) < batched + 100
    assert re.search(r'reco_queue_depth\{modality="image"\} 0\.0', http.get("/metrics").text)
    assert http.post("/embed/image", content=photos["coffee"], headers=JPEG).status_code == 200


def test_nothing_of_it_stays_behind(server: Server, http: httpx.Client, photos: dict[str, bytes]) -> None:
    """Files, memory, items admitted and requests inside are as before a few hundred hostile
    requests.
    """
    photo, address = photos["coffee"], server.url.removeprefix("http://").split(":")

    def hostile() -> None:
        for body in (b"", b"no image", photo[:2000], photo[: len(photo) // 2], b"\x89PNG\r\n\x1a\n" + b"\0" * 5000):
            assert http.post("/embed/image", content=body, headers=JPEG).status_code in (400, 415, 422)
        assert http.post("/embed/image", files=[("file", b"broken"), ("file", photo[:3000])]).status_code in (415, 422)
        assert http.post("/embed/text", json={"texts": ["x"] * 10_000}).status_code == 413
        assert http.post("/embed/text", json={"texts": ["x" * 2**20]}).status_code == 413
        for head in (
            b"content-length: 10737418240\r\n\r\nthe beginning",
            b"content-length: 5000\r\n\r\nhalf",
            b"transfer-encoding: chunked\r\n\r\n5\r\nab",
        ):
            with socket.create_connection((address[0], int(address[1]))) as raw:
                raw.sendall(b"POST /embed/image HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: image/jpeg\r\n" + head)

    for _ in range(3):
        hostile()  # what is allocated once is allocated now
    files, resident = metric(http, "process_open_fds"), metric(http, "process_resident_memory_bytes")
    for _ in range(40):
        hostile()
    give_up = time.monotonic() + 30
    while metric(http, "process_open_fds") > files + 2 and time.monotonic() < give_up:
        time.sleep(0.1)
    assert metric(http, "process_open_fds") <= files + 2
    assert metric(http, "process_resident_memory_bytes") - resident < 64e6
    assert metric(http, "reco_queue_depth") == 0
    with server.client() as fresh:
        assert fresh.post("/embed/image", content=photo, headers=JPEG).status_code == 200
