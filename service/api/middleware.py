"""The gate every request passes: its id, the body's limits in bytes and seconds, draining, and the two request metrics.

Pure ASGI, so bodies stream through.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.responses import dump
from service.engine import Engine
from service.errors import NotServing, Refusal, SlowSender, TooLarge, refusal
from service.observability.tracing import finish, template
from service.settings import Settings

PLAIN_ID = re.compile(r"[A-Za-z0-9._:/-]{1,128}")
UNGUARDED = frozenset(
    {"/health", "/livez", "/readyz", "/v2/health/live", "/v2/health/ready", "/ping", "/metrics", "/info", "/v1/models"}
)

LEFT = 499  # the caller left before the reply


def error_response(error: Exception) -> Response:
    """The one error body, with Retry-After where trying again may help."""
    told = refusal(error)
    return Response(dump(told.body), told.status, headers=_further(told), media_type="application/json")


class RequestMiddleware:
    """ASGI middleware. State: how many guarded requests are inside."""

    def __init__(self, app: ASGIApp, engine: Engine) -> None:
        self._app, self._engine = app, engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one request through, or answer it here."""
        if scope["type"] != "http" or scope["path"] in UNGUARDED:
            await self._app(scope, receive, send)
        elif self._engine.tracing is None:
            await self._guarded(scope, receive, send)
        else:
            with self._engine.tracing.request(scope) as span:
                finish(span, scope, await self._guarded(scope, receive, send))

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> int:
        """One request that counts; the status it was answered with."""
        visit = _Visit(scope, receive, send, self._engine.settings)
        scope.setdefault("state", {})["modality"] = "none"
        self._engine.inside += 1
        try:
            if self._engine.draining:
                raise NotServing("shutting down: send the request to another instance, or retry later")
            visit.check_declared_length()
            await self._app(scope, visit.receive, visit.send)
        except (NotServing, SlowSender, TooLarge) as error:
            if visit.status:  # the reply had begun
                raise
            self._engine.metrics.rejected_total.labels(refusal(error).code).inc()
            await error_response(error)(scope, receive, visit.send)
        finally:
            self._engine.inside -= 1
            self._count(scope, visit)
        return visit.status or LEFT

    def _count(self, scope: Scope, visit: _Visit) -> None:
        endpoint, modality, metrics = template(scope), scope["state"]["modality"], self._engine.metrics
        metrics.requests_total.labels(endpoint, modality, str(visit.status or LEFT)).inc()
        metrics.request_duration_seconds.labels(endpoint, modality).observe(time.perf_counter() - visit.start)


class _Visit:
    """One request's way through the gate."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, settings: Settings) -> None:
        self.start = time.perf_counter()
        self.status = 0
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        self._id = given if PLAIN_ID.fullmatch(given) else uuid.uuid4().hex
        self._declared = headers.get(b"content-length", b"0")
        self._receive, self._send = receive, send
        self._max_bytes, self._receive_s = settings.max_body_bytes, settings.receive_s
        self._read, self._whole = 0, False  # the body so far

    def check_declared_length(self) -> None:
        """Refuse by the header, before a byte is read."""
        if self._declared.isdigit() and int(self._declared) > self._max_bytes:
            raise self._too_large(int(self._declared))

    async def receive(self) -> Message:
        """Count what really comes, whatever was declared, and wait no longer for it than allowed."""
        if self._whole:  # what is awaited now is the caller hanging up
            return await self._receive()
        try:
            async with asyncio.timeout(self.start + self._receive_s - time.perf_counter()):
                message = await self._receive()
        except TimeoutError as error:
            raise SlowSender(
                f"{self._read} bytes of the body came in {self._receive_s:g} s: send it faster, or in parts"
            ) from error
        self._whole = not message.get("more_body", False)
        self._read += len(message.get("body", b""))
        if self._read > self._max_bytes:
            raise self._too_large(self._read)
        return message

    async def send(self, message: Message) -> None:
        """Stamp the reply with the request's id."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", []), (b"x-request-id", self._id.encode("ascii"))]
        await self._send(message)

    def _too_large(self, found: int) -> TooLarge:
        return TooLarge(f"the body has {found} bytes or more, at most {self._max_bytes}: send fewer or smaller items")


def _further(told: Refusal) -> dict[str, str]:
    """When to come back, and for a body that never came whole, the end of its connection."""
    if told.status in (429, 503):
        return {"Retry-After": "1"}
    return {"Connection": "close"} if told.status == 408 else {}
