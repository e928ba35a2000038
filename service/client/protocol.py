"""What the client says to a service, written once for sync and async: generators that yield HTTP
calls and pauses and return the result.
"""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar
from urllib.parse import quote

import httpx
import numpy as np

T = TypeVar("T")
Item = TypeVar("Item")
ImageLike: TypeAlias = bytes | str | Path  # encoded bytes, or the path of a file
Progress: TypeAlias = Callable[[int], object]  # tqdm's `bar.update` fits
POLL_S = 0.2
PLACE = re.compile(r"\b(images|texts)\[(\d+)\]")


class RecoError(Exception):
    """A refusal by the service, or no answer from it.

    status: the HTTP status, None where none came.  param: the item or option, if one.
    """

    def __init__(
        self, message: str, *, status: int | None = None, code: str = "unreachable", param: str | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.code, self.param = message, status, code, param


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one request carries, and how long a service that is busy (429, 503) or not there is
    waited for.

    max_items, max_bytes: of one request; at most the service's own, which /info tells.  retries:
    further tries of one request.
    max_pause_s: the longest pause before one, whatever Retry-After says.
    """

    max_items: int = 64
    max_bytes: int = 32 * 2**20
    retries: int = 5
    max_pause_s: float = 10.0


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request.

    body: as httpx's `request` takes it (json, files, params).  again: whether sending it twice does
    no harm.
    """

    method: str
    path: str
    body: Mapping[str, Any] = field(default_factory=dict)
    again: bool = True


Outcome: TypeAlias = httpx.Response | httpx.TransportError | None  # of a call; None of a pause
Flow: TypeAlias = Generator[Call | float, Outcome, T]  # a float is a pause in seconds


def embed_images(
    images: Sequence[ImageLike], options: Mapping[str, Any], limits: Limits, progress: Progress | None
) -> Flow[np.ndarray]:
    """(N, D) float32, read from base64."""
    bodies = (
        (at, len(some), _files(some, {**options, "encoding_format": "base64"}))
        for at, some in _batches(_read(images), limits)
    )
    data = yield from _all("/embed/image", bodies, limits, progress)
    return _rows(data)


def embed_texts(
    texts: Sequence[str], options: Mapping[str, Any], limits: Limits, progress: Progress | None
) -> Flow[np.ndarray]:
    """(N, D) float32, read from base64."""
    asked = {**options, "encoding_format": "base64"}
    bodies = ((at, len(some), {"json": {"texts": some, **asked}}) for at, some in _batches(iter(texts), limits))
    data = yield from _all("/embed/text", bodies, limits, progress)
    return _rows(data)


def classify(
    items: Sequence[ImageLike | str], texts: bool, options: Mapping[str, Any], limits: Limits, progress: Progress | None
) -> Flow[list[list[dict[str, Any]]]]:
    """[{label, score}] of each item."""
    if texts:
        bodies = (
            (at, len(some), {"json": {"texts": some, **options}}) for at, some in _batches(map(str, items), limits)
        )
    else:
        bodies = ((at, len(some), _files(some, options)) for at, some in _batches(_read(items), limits))
    return (yield from _all("/classify", bodies, limits, progress))


def memories(limits: Limits) -> Flow[list[dict[str, Any]]]:
    """The rows of GET /memories."""
    reply = yield from _answered(Call("GET", "/memories"), limits)
    return list(reply.json()["data"])


def activate(name: str, version: str, dry_run: bool, wait_s: float | None, limits: Limits) -> Flow[dict[str, Any]]:
    """The job, followed to its end where wait_s is given."""
    call = Call(
        "POST",
        f"/memories/{quote(name, safe='')}/activate",
        {"json": {"version": version, "dry_run": dry_run}},
        again=False,
    )
    job: dict[str, Any] = (yield from _answered(call, limits)).json()
    if wait_s is None:
        return job
    give_up = time.monotonic() + wait_s
    while job["state"] == "running":
        if time.monotonic() > give_up:
            raise RecoError(
                f"job {job['id']} is in phase {job['phase']} after {wait_s} s: ask GET /jobs/{job['id']} later",
                code="job_running",
            )
        yield POLL_S
        job = (yield from _answered(Call("GET", f"/jobs/{job['id']}"), limits)).json()
    if job["state"] == "failed":
        raise RecoError(
            f"the swap to {name}@{version} failed, the old version still serves: {job['error']}", code="swap_failed"
        )
    return job


def _all(
    path: str, bodies: Iterator[tuple[int, int, Mapping[str, Any]]], limits: Limits, progress: Progress | None
) -> Flow[list[Any]]:
    """The `data` of all requests, joined.

    bodies: (place of its first item, items, body) of each request.
    """
    data: list[Any] = []
    for at, count, body in bodies:
        reply = yield from _answered(Call("POST", path, body), limits, at)
        data += reply.json()["data"]
        if progress is not None:
            progress(count)
    return data


def _answered(call: Call, limits: Limits, first: int = 0) -> Flow[httpx.Response]:
    """A reply of 2xx, after as many tries as allowed.

    first: the place of the call's items in the caller's list, for messages.
    """
    for attempt in range(limits.retries + 1):
        outcome = yield call
        if isinstance(outcome, httpx.Response) and outcome.is_success:
            return outcome
        if attempt == limits.retries or not _worth_another(call, outcome):
            break
        yield min(_asked_pause(outcome) or 0.1 * 2**attempt, limits.max_pause_s)
    raise _refused(outcome, first)


def _worth_another(call: Call, outcome: Outcome) -> bool:
    if isinstance(outcome, httpx.Response):
        return outcome.status_code in (429, 503)
    return isinstance(outcome, httpx.ConnectError | httpx.ConnectTimeout) or call.again


def _asked_pause(outcome: Outcome) -> float | None:
    """Seconds of Retry-After; None without one, or where it is a date."""
    try:
        return float(outcome.headers["retry-after"]) if isinstance(outcome, httpx.Response) else None
    except (KeyError, ValueError):
        return None


def _refused(outcome: Outcome, first: int) -> RecoError:
    if not isinstance(outcome, httpx.Response):
        return RecoError(f"no answer ({type(outcome).__name__}: {outcome}): is the service running at this address?")
    try:
        told = outcome.json()["error"]
        message, code, param = told["message"], told["code"], told["param"]
    except (ValueError, KeyError, TypeError):  # not ours: a proxy's page, say
        message, code, param = outcome.text[:200] or outcome.reason_phrase, "http_error", None
    return RecoError(
        _moved(message, first), status=outcome.status_code, code=code, param=_moved(param, first) if param else None
    )


def _moved(text: str, first: int) -> str:
    """Every place in a request as a place in the caller's list.

    >>> _moved("images[3]: broken", 64)
    'images[67]: broken'
    """
    return PLACE.sub(lambda found: f"{found[1]}[{int(found[2]) + first}]", text)


def _batches(items: Iterator[Item], limits: Limits) -> Iterator[tuple[int, list[Item]]]:
    """(place of the first, items) of each request: as many as fit into both limits, one at the
    least.
    """
    at, some, size = 0, list[Item](), 0
    for item in items:
        length = len(item) if isinstance(item, bytes | str) else 0
        if some and (len(some) == limits.max_items or size + length > limits.max_bytes):
            yield at, some
            at, some, size = at + len(some), [], 0
        some.append(item)
        size += length
    if some:
        yield at, some


def _read(images: Sequence[ImageLike]) -> Iterator[bytes]:
    """Each image's bytes, a file only when its turn comes."""
    return (image if isinstance(image, bytes) else Path(image).read_bytes() for image in images)


def _files(images: Sequence[bytes], options: Mapping[str, Any]) -> dict[str, Any]:
    """A multipart form: bytes travel as they are, and every option as a field, lists as JSON."""
    fields = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in options.items()
        if value is not None
    }
    return {"files": [("file", ("image", image)) for image in images], "data": fields}


def _rows(data: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """(N, D) float32; (0, 0) for no item."""
    if not data:
        return np.empty((0, 0), np.float32)
    return (
        np.frombuffer(b"".join(base64.b64decode(item["embedding"]) for item in data), "<f4")
        .reshape(len(data), -1)
        .astype(np.float32)
    )
