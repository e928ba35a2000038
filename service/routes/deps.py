"""What handlers ask for: the engine, a key, a deadline; and the replies' common frame."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import math
import time
from collections.abc import Coroutine, Iterable, Sequence
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from pydantic import SecretStr
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from index_store import Snapshot
from service.engine import Engine
from service.errors import InvalidValue, ItemRefused, MissingKey, WrongKey
from service.wire import dump
from service.work import Answered, Row

T = TypeVar("T")
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


# Dependencies are async although they wait for nothing: FastAPI sends any other function through a thread, a millisecond on a busy machine.


def _engine(request: Request) -> Engine:
    engine: Engine = request.app.state.engine
    return engine


async def _engine_of(request: Request) -> Engine:
    return _engine(request)


def _sent_key(request: Request) -> str | None:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" and key.strip() else None


def _opens(key: str, keys: Iterable[SecretStr]) -> bool:
    """Compares with every key, each in constant time, so that timing tells neither the key nor its place."""
    found = [hmac.compare_digest(key.encode(), known.get_secret_value().encode()) for known in keys]
    return any(found)


def _admin_keys(engine: Engine) -> list[SecretStr]:
    return [engine.settings.admin_key] if engine.settings.admin_key else []


async def _require_key(request: Request) -> None:
    """An API key, or the admin key, where the operator has set any."""
    engine = _engine(request)
    if not engine.settings.api_keys:
        return
    key = _sent_key(request)
    if key is None or not _opens(key, [*engine.settings.api_keys, *_admin_keys(engine)]):
        raise MissingKey("no valid key: send 'Authorization: Bearer KEY'")


async def _require_admin(request: Request) -> None:
    """The admin key; without one set, a caller on this very machine."""
    engine, key = _engine(request), _sent_key(request)
    if not engine.settings.admin_key:
        if not _local(request):
            raise WrongKey(
                "no admin key is set, so this route answers on this machine only: set RECO_ADMIN_KEY, or call 127.0.0.1 directly"
            )
        return
    if key is None:
        raise MissingKey("this route needs the admin key: send 'Authorization: Bearer KEY'")
    if not _opens(key, _admin_keys(engine)):
        raise WrongKey("this key is not the admin key")


def _local(request: Request) -> bool:
    """A direct call over loopback: not through a proxy, and not from a page of another site, whatever name that site resolves to."""
    headers = request.headers
    if request.client is None or not ipaddress.ip_address(request.client.host).is_loopback:
        return False
    host = headers.get("host", "").rsplit(":", 1)[0] if not headers.get("host", "").endswith("]") else headers["host"]
    origin = headers.get("origin")
    same_site = origin is None or origin.partition("://")[2] == headers.get("host")
    return host in LOOPBACK_NAMES and same_site and "x-forwarded-for" not in headers and "forwarded" not in headers


EngineDep = Annotated[Engine, Depends(_engine_of)]
WithKey = Depends(_require_key)
WithAdmin = Depends(_require_admin)


def deadline(request: Request, engine: Engine) -> float:
    """A `time.monotonic()` instant: the caller's X-Request-Timeout-Ms, at most the operator's own."""
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


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the caller hangs up; its items that still wait then leave the queue."""
    doing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((doing, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientDisconnect
        return doing.result()
    finally:
        doing.cancel()
        leaving.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def failing(rows: Sequence[Row | ItemRefused], on_error: str) -> Sequence[Row | ItemRefused]:
    """The rows; raises the first refusal unless the caller asked for nulls."""
    if on_error == "fail":
        for row in rows:
            if isinstance(row, ItemRefused):
                raise row
    return rows


def frame(engine: Engine, snapshot: Snapshot | None) -> dict[str, Any]:
    """The head of every reply: which model, memory and fusion made it."""
    memory = snapshot.ref if snapshot is not None else None
    return {
        "object": "list",
        "model": engine.reco.encoder.fingerprint.rpartition("@")[0],
        "memory": memory,
        "fusion": engine.reco.fusion_id,
    }


def reply(body: dict[str, Any], answered: Answered) -> Response:
    """JSON with the stages' times and the memory's version as headers."""
    return Response(dump(body), media_type="application/json", headers=headers(answered, body["memory"]))


def headers(answered: Answered, memory: str | None) -> dict[str, str]:
    """Server-Timing in milliseconds, and X-Memory-Version where a memory was asked."""
    timing = ", ".join(f"{stage};dur={1000 * seconds:.3f}" for stage, seconds in answered.seconds.items())
    return {"Server-Timing": timing, **({"X-Memory-Version": memory} if memory else {})}
