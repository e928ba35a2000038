"""API keys: who may call which route.

A router that is made with `route_class=KeyRoute` or `AdminRoute` guards its routes before a byte of
the body is read.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import SecretStr
from starlette.responses import Response

from service.api.dependencies import engine_of
from service.api.json_body import read_json
from service.engine import Engine
from service.errors import MissingKey, WrongKey

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


def _bearer_key(request: Request) -> str | None:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" and key.strip() else None


def _is_one_of(key: str, keys: Iterable[SecretStr]) -> bool:
    """Compare with every key in constant time, so that timing tells neither a key nor its place."""
    found = [hmac.compare_digest(key.encode(), known.get_secret_value().encode()) for known in keys]
    return any(found)


def _admin_keys(engine: Engine) -> list[SecretStr]:
    return [engine.settings.admin_key] if engine.settings.admin_key else []


def _require_key(request: Request) -> None:
    """Require an API key or the admin key, where the operator has set API keys."""
    engine = engine_of(request)
    if not engine.settings.api_keys:
        return
    key = _bearer_key(request)
    if key is None or not _is_one_of(key, [*engine.settings.api_keys, *_admin_keys(engine)]):
        raise MissingKey("no valid key: send 'Authorization: Bearer KEY'")


def _require_admin(request: Request) -> None:
    """Require the admin key; where none is set, a direct call from this machine."""
    engine, key = engine_of(request), _bearer_key(request)
    if not engine.settings.admin_key:
        if not _is_direct_local_call(request):
            raise WrongKey(
                "no admin key is set, so this route answers on this machine only: set RECO_ADMIN_KEY, "
                "or call 127.0.0.1 directly"
            )
        return
    if key is None:
        raise MissingKey("this route needs the admin key: send 'Authorization: Bearer KEY'")
    if not _is_one_of(key, _admin_keys(engine)):
        raise WrongKey("this key is not the admin key")


def _is_direct_local_call(request: Request) -> bool:
    """Whether a call came over loopback, not through a proxy and not from a page of another site.

    The Host header is checked too: another site may resolve its name to a loopback address.
    """
    headers = request.headers
    if request.client is None or not ipaddress.ip_address(request.client.host).is_loopback:
        return False
    host = headers.get("host", "").rsplit(":", 1)[0] if not headers.get("host", "").endswith("]") else headers["host"]
    origin = headers.get("origin")
    same_site = origin is None or origin.partition("://")[2] == headers.get("host")
    return host in LOOPBACK_NAMES and same_site and "x-forwarded-for" not in headers and "forwarded" not in headers


class GuardedRoute(APIRoute):
    """A route whose caller is checked first; a JSON body is then read within the limits."""

    def check_caller(self, request: Request) -> None:
        """Raise MissingKey or WrongKey."""
        raise NotImplementedError

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler behind both checks."""
        handle = super().get_route_handler()

        async def check_and_handle(request: Request) -> Response:
            self.check_caller(request)
            if self.body_field is None:
                return await handle(request)
            body = await read_json(request, engine_of(request).settings, exact=True)
            return await handle(_ParsedRequest(request, body))

        return check_and_handle


class _ParsedRequest(Request):
    """A request whose JSON body is parsed, for FastAPI, which would parse it without limits."""

    def __init__(self, request: Request, body: dict[str, Any]) -> None:
        super().__init__(request.scope, request.receive)
        self._parsed, self._read = body, request.body

    async def body(self) -> bytes:
        """The bytes that were read before."""
        return await self._read()

    async def json(self) -> dict[str, Any]:
        """The parsed body."""
        return self._parsed


class KeyRoute(GuardedRoute):
    """A route for an API key or the admin key, where the operator has set API keys."""

    def check_caller(self, request: Request) -> None:
        """Raise MissingKey."""
        _require_key(request)


class AdminRoute(GuardedRoute):
    """A route for the admin key; where none is set, for a direct call from this machine."""

    def check_caller(self, request: Request) -> None:
        """Raise MissingKey or WrongKey."""
        _require_admin(request)
