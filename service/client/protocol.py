"""What the client says to a service, written once for sync and async: generators that yield HTTP
calls and pauses and return the result.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import httpx
import numpy as np

from .bodies import ImageLike, Limits, decode_rows, form_body, read_images, route, split_batches, text_body

T = TypeVar("T")
Progress: TypeAlias = Callable[[int], object]  # tqdm's `bar.update` fits
POLL_S = 0.2
GONE = 410  # the pinned version is not served any more
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
    asked = {**options, "encoding_format": "base64"}
    parts = Parts("/embed/image", lambda: split_batches(read_images(images), limits), form_body, asked)
    return decode_rows((yield from _send_parts(parts, limits, progress)))


def embed_texts(
    texts: Sequence[str], options: Mapping[str, Any], limits: Limits, progress: Progress | None
) -> Flow[np.ndarray]:
    """(N, D) float32, read from base64."""
    asked = {**options, "encoding_format": "base64"}
    parts = Parts("/embed/text", lambda: split_batches(iter(texts), limits), text_body, asked)
    return decode_rows((yield from _send_parts(parts, limits, progress)))


def classify(
    items: Sequence[ImageLike | str], texts: bool, options: Mapping[str, Any], limits: Limits, progress: Progress | None
) -> Flow[list[list[dict[str, Any]]]]:
    """[{label, score}] of each item."""
    if texts:
        parts = Parts("/classify", lambda: split_batches(map(str, items), limits), text_body, options)
    else:
        parts = Parts("/classify", lambda: split_batches(read_images(items), limits), form_body, options)
    return (yield from _send_parts(parts, limits, progress))


def memories(limits: Limits) -> Flow[list[dict[str, Any]]]:
    """The rows of GET /memories."""
    reply = yield from _read_json(Call("GET", "/memories"), limits)
    return list(reply["data"])


def start_job(
    name: str, action: str, body: Mapping[str, Any] | None, wait_s: float | None, limits: Limits
) -> Flow[dict[str, Any]]:
    """The job of POST /memories/{name}/{action}, followed to its end where wait_s is given.

    action: "activate", "rollback" or "compact".
    """
    call = Call("POST", route("memories", name, action), {} if body is None else {"json": body}, again=False)
    job: dict[str, Any] = yield from _read_json(call, limits)
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
        job = yield from _read_json(Call("GET", route("jobs", job["id"])), limits)
    if job["state"] == "failed":
        what = f"swap to {name}@{job['version']}" if job["kind"] == "swap" else f"{job['kind']} of {name}"
        raise RecoError(
            f"the {what} failed, the old version still serves: {job['error']}", code=f"{job['kind']}_failed"
        )
    return job


def request(method: str, path: str, body: Mapping[str, Any] | None, limits: Limits) -> Flow[dict[str, Any]]:
    """The JSON of one reply. Sent again only where that does no harm."""
    call = Call(method, path, {} if body is None else {"json": body})
    found: dict[str, Any] = yield from _read_json(call, limits)
    return found


@dataclass(frozen=True, slots=True)
class Parts:
    """One answer that takes several requests.

    batches: begins anew with each call; (place of the first item, items) of each request.
    body: makes httpx's arguments of the items and the options.
    """

    path: str
    batches: Callable[[], Iterator[tuple[int, list[Any]]]]
    body: Callable[[Sequence[Any], Mapping[str, Any]], Mapping[str, Any]]
    options: Mapping[str, Any]


def _send_parts(parts: Parts, limits: Limits, progress: Progress | None) -> Flow[list[Any]]:
    """The `data` of all requests, joined; all of one version of the memory and of the label set.

    The first reply's versions are pinned for the rest. Where one is replaced meanwhile (410), all
    begins anew, at most `limits.restarts` times; then the refusal is raised.
    """
    restarts = 0
    while True:
        data, done, options = list[Any](), 0, dict(parts.options)
        try:
            for at, items in parts.batches():
                call = Call("POST", parts.path, parts.body(items, options))
                reply = yield from _read_json(call, limits, at)
                data += reply["data"]
                options |= _pins(reply)
                done += len(items)
                if progress is not None:
                    progress(len(items))
        except RecoError as refused:
            if refused.status != GONE or not done or restarts == limits.restarts:
                raise
            restarts += 1
            if progress is not None:
                progress(-done)
        else:
            return data


def _pins(reply: Mapping[str, Any]) -> dict[str, str]:
    """The options that ask for the very versions of a reply; "+0" is a version without edits.

    >>> _pins({"memory": "shop@v1", "label_set": "kinds@5f0c2a91b7e3"})
    {'memory': 'shop@v1+0', 'label_set': 'kinds@5f0c2a91b7e3'}
    """
    pins = {name: reply[name] for name in ("memory", "label_set") if reply.get(name)}
    if "memory" in pins and "+" not in pins["memory"]:
        pins["memory"] += "+0"
    return pins


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


def _read_json(call: Call, limits: Limits, first: int = 0) -> Flow[dict[str, Any]]:
    """The JSON of a reply of 2xx. RecoError for another body, as of a proxy's page."""
    reply = yield from _answered(call, limits, first)
    try:
        found: dict[str, Any] = reply.json()
    except ValueError as error:
        raise _not_ours(reply) from error
    return found


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
    except (ValueError, KeyError, TypeError):
        return _not_ours(outcome)
    return RecoError(
        _moved(message, first), status=outcome.status_code, code=code, param=_moved(param, first) if param else None
    )


def _not_ours(reply: httpx.Response) -> RecoError:
    what = f"without JSON ({reply.text[:100]!r})" if reply.text else "without a body"
    return RecoError(
        f"answered {reply.status_code} {what}: is it the service's address, or is a proxy (HTTP_PROXY) between?",
        status=reply.status_code,
        code="http_error",
    )


def _moved(text: str, first: int) -> str:
    """Every place in a request as a place in the caller's list.

    >>> _moved("images[3]: broken", 64)
    'images[67]: broken'
    """
    return PLACE.sub(lambda found: f"{found[1]}[{int(found[2]) + first}]", text)
