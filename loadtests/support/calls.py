"""Requests prepared as bytes, and replies with their times: nothing is encoded while the clock
runs.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlencode

import httpx

__all__ = [
    "PreparedCall",
    "TimedReply",
    "Unexpected",
    "classify_call",
    "image_call",
    "open_client",
    "run_to_end",
    "send",
    "text_call",
]

Result = TypeVar("Result")
BOUNDARY = "reco-loadtest-4f1c"


class Unexpected(Exception):
    """The service answered in a way that makes the rest of the test pointless."""


@dataclass(frozen=True, slots=True)
class PreparedCall:
    """One request, ready to be written to a socket.

    route: its name in reports.
    """

    route: str
    path: str
    content: bytes
    content_type: str


@dataclass(frozen=True, slots=True)
class TimedReply:
    """One reply.

    status: 0 where there was no reply; `content` then says why.
    """

    status: int
    content: bytes
    headers: Mapping[str, str] = field(default_factory=dict)

    def json(self) -> Any:
        """The body, decoded."""
        return json.loads(self.content)

    @property
    def stages(self) -> dict[str, float]:
        """Seconds per stage as the service measured them (Server-Timing)."""
        entries = (part.strip().split(";dur=") for part in self.headers.get("server-timing", "").split(","))
        return {entry[0]: float(entry[1]) / 1000 for entry in entries if len(entry) == 2}


def image_call(photos: Sequence[bytes], **options: object) -> PreparedCall:
    """One photo as a raw body, several as a multipart form: the two ways real clients upload."""
    path = _path("/embed/image", options)
    if len(photos) == 1:
        return PreparedCall("embed/image", path, photos[0], "image/jpeg")
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="{i}.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'.encode()
        + photo
        for i, photo in enumerate(photos)
    ]
    return PreparedCall(
        "embed/image",
        path,
        b"\r\n".join([*parts, f"--{BOUNDARY}--\r\n".encode()]),
        f"multipart/form-data; boundary={BOUNDARY}",
    )


def text_call(texts: Sequence[str], **options: object) -> PreparedCall:
    """Texts as JSON; the options go into the same object."""
    return PreparedCall(
        "embed/text", "/embed/text", json.dumps({"texts": list(texts), **options}).encode(), "application/json"
    )


def classify_call(photo: bytes, labels: Sequence[str], **options: object) -> PreparedCall:
    """One photo against labels that the service has to embed, or to find in its cache."""
    path = _path("/classify", {**options, "labels": json.dumps(list(labels))})
    return PreparedCall("classify", path, photo, "image/jpeg")


def _path(path: str, options: Mapping[str, object]) -> str:
    values = {name: str(value).lower() if isinstance(value, bool) else value for name, value in options.items()}
    return f"{path}?{urlencode(values)}" if values else path


def open_client(url: str, *, api_key: str | None = None, timeout_s: float = 60.0) -> httpx.AsyncClient:
    """A client without a limit on connections: a cap in the client would hide the service's own
    queue.
    """
    key = api_key or os.environ.get("RECO_API_KEY")
    return httpx.AsyncClient(
        base_url=url,
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=timeout_s,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        trust_env=False,
    )


async def send(client: httpx.AsyncClient, call: PreparedCall) -> TimedReply:
    """Send one call. A broken connection is a reply with status 0, not an exception."""
    try:
        answer = await client.post(call.path, content=call.content, headers={"Content-Type": call.content_type})
    except httpx.HTTPError as error:
        return TimedReply(0, f"{type(error).__name__}: {error}".encode())
    return TimedReply(answer.status_code, answer.content, answer.headers)


def run_to_end(test: Coroutine[Any, Any, Result]) -> Result:
    """Run a test. A missing service or an unexpected answer ends the program with one line."""
    try:
        return asyncio.run(test)
    except (Unexpected, httpx.HTTPError) as error:
        raise SystemExit(
            f"{type(error).__name__}: {error}" if isinstance(error, httpx.HTTPError) else str(error)
        ) from error
