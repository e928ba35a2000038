"""What route handlers depend on: the engine, the deadline of the request, and its cancellation when
the caller leaves.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Coroutine
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from starlette.requests import ClientDisconnect

from index_store import SearchParams, Snapshot
from service.api.schemas import Options
from service.engine import Engine
from service.errors import InvalidValue
from service.pipeline.stages import Items, Query

T = TypeVar("T")


# Dependencies are async although they wait for nothing: FastAPI sends any other function through a
# thread, a millisecond on a busy machine.


def engine_of(request: Request) -> Engine:
    """The engine of the application that answers `request`."""
    engine: Engine = request.app.state.engine
    return engine


async def _engine(request: Request) -> Engine:
    return engine_of(request)


EngineDep = Annotated[Engine, Depends(_engine)]


def query_of(engine: Engine, options: Options, snapshot: Snapshot | None) -> Query:
    """The query that a request's options describe, with `snapshot` pinned.

    Raises InvalidValue for k.
    """
    ceiling = math.inf if options.max_similarity is None else options.max_similarity
    params = SearchParams(max_similarity=ceiling, exclude=[frozenset(options.exclude)])
    return engine.query(snapshot, k=options.k, params=params, neighbors=options.neighbors)


def deadline(request: Request, engine: Engine) -> float:
    """The deadline of a request as a `time.monotonic()` instant.

    It is the caller's X-Request-Timeout-Ms, at most the operator's `timeout_s`.
    """
    given = request.headers.get("x-request-timeout-ms")
    if given is None:
        return time.monotonic() + engine.settings.timeout_s
    try:
        allowed_s = float(given) / 1000
    except ValueError as error:
        raise InvalidValue(f"X-Request-Timeout-Ms = {given[:40]!r}: send milliseconds") from error
    if not math.isfinite(allowed_s) or allowed_s <= 0:
        raise InvalidValue(f"X-Request-Timeout-Ms = {given[:40]!r}: send a positive number of milliseconds")
    return time.monotonic() + min(allowed_s, engine.settings.timeout_s)


def spend_items(request: Request, *parts: Items) -> None:
    """Take the items of a request from what its key may use. Raises RateExceeded."""
    request.state.key.usage.spend_items(sum(len(part.images) + len(part.texts) for part in parts))


async def run_until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`, or cancel it when the caller hangs up.

    Items that still wait then leave the queue. Raises ClientDisconnect.
    """
    task = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait((task, disconnect), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        disconnect.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
