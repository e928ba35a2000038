"""API keys: who may call which route."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Iterable

from fastapi import Depends, Request
from pydantic import SecretStr

from service.api.dependencies import engine_of
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


async def _require_key(request: Request) -> None:
    """Require an API key or the admin key, where the operator has set API keys."""
    engine = engine_of(request)
    if not engine.settings.api_keys:
        return
    key = _bearer_key(request)
    if key is None or not _is_one_of(key, [*engine.settings.api_keys, *_admin_keys(engine)]):
        raise MissingKey("no valid key: send 'Authorization: Bearer KEY'")


async def _require_admin(request: Request) -> None:
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


WithKey = Depends(_require_key)
WithAdmin = Depends(_require_admin)
