"""Requests of hostile and careless callers, as a load beside honest ones."""

from __future__ import annotations

import asyncio
import io
import json
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx
from PIL import Image

from loadtests.support.calls import PreparedCall

__all__ = ["HostileLoad", "hostile_calls"]

HELD_S = 8.0  # how long a socket is held that sends or reads nothing more
AT_ONCE = 32  # acts that have not ended


def hostile_calls(photo: bytes, rng: random.Random) -> list[PreparedCall]:
    """Costly or broken requests, each a few kilobytes to a few megabytes."""
    letters = "".join(rng.choices("abcdefghij", k=12_000))
    bodies: list[tuple[str, Any]] = [
        ("embed/text", {"texts": [letters] * 8}),
        ("embed/text", {"texts": ["a"], "exclude": ["x" * 1_000_000]}),
        ("embed/text", {"texts": [{}] * 200_000}),
        ("embed/text", {"texts": ["a"] * 256, "k": 10**9}),
        ("classify", {"texts": ["a"], "labels": [{}] * 200_000}),
        ("classify", {"texts": ["a"], "labels": [f"thing {rng.random()}" for _ in range(5000)]}),
        ("v1/embeddings", {"input": [[1] * 100_000]}),
    ]
    images = [
        _large(8000, progressive=True),
        _large(7000),
        photo[: len(photo) // 2],
        b"\xff\xd8" + b"\xff\xfe\x00\x02" * 2**18,
    ]
    return [
        *(PreparedCall(route, f"/{route}", json.dumps(body).encode(), "application/json") for route, body in bodies),
        *(PreparedCall("embed/image", "/embed/image", image, "image/jpeg") for image in images),
        PreparedCall("embed/text", "/embed/text", b'{"texts": ' + b"[" * 5000, "application/json"),
        PreparedCall("embed/image", "/embed/image", b"--b\r\n" * 10_000, "multipart/form-data; boundary=b"),
    ]  # fmt: skip


def _large(side: int, *, progressive: bool = False) -> bytes:
    encoded = io.BytesIO()
    Image.linear_gradient("L").resize((side, side)).save(encoded, "JPEG", progressive=progressive)
    return encoded.getvalue()


@dataclass(eq=False)
class HostileLoad:
    """Hostile acts against one service at a fixed rate.

    State: how many acts there were, and their status codes; 0 is a broken connection, and a caller
    that leaves early.
    """

    client: httpx.AsyncClient
    calls: Sequence[PreparedCall]
    rng: random.Random
    rate: float

    def __post_init__(self) -> None:
        self.codes: Counter[int] = Counter()
        self._acts: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Act until cancelled."""
        try:
            while True:
                await asyncio.sleep(1 / self.rate)
                if len(self._acts) < AT_ONCE:
                    act = asyncio.create_task(self._act())
                    self._acts.add(act)
                    act.add_done_callback(self._acts.discard)
        finally:
            for act in self._acts:
                act.cancel()

    async def _act(self) -> None:
        code = 0
        with suppress(httpx.HTTPError, OSError, TimeoutError):
            if self.rng.random() < 0.25:
                await self._hold_socket()
            else:
                code = await self._send(self.rng.choice(self.calls))
        self.codes[code] += 1

    async def _send(self, call: PreparedCall) -> int:
        """Send one call; one in three leaves before its reply."""
        patience = 0.2 if self.rng.random() < 0.33 else 60.0
        headers = {"Content-Type": call.content_type, "X-Request-Timeout-Ms": "2000"}
        reply = await self.client.post(call.path, content=call.content, headers=headers, timeout=patience)
        return reply.status_code

    async def _hold_socket(self) -> None:
        """Send half a body, half a head, or a request whose reply is not read, and hold on."""
        url = self.client.base_url
        _, writer = await asyncio.open_connection(url.host, url.port or 80)
        half_body = b"POST /embed/text HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9000000\r\n\r\n"
        texts = json.dumps({"texts": ["a"] * 100}).encode()
        unread = half_body.replace(b"9000000", str(len(texts)).encode()) + texts
        try:
            writer.write(self.rng.choice((half_body + b" " * 4_000_000, half_body[:40], unread)))
            await asyncio.sleep(HELD_S)
        finally:
            writer.close()
