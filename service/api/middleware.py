"""The middleware around every request: its id, limits of the body, draining, failures, metrics and
log.

Pure ASGI, so bodies stream through.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from contextlib import nullcontext, suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.capacity import BodyBudget, ForwardedCallers
from service.api.responses import count_refusal, error_response
from service.engine import Engine
from service.errors import CapacityExceeded, NotServing, SlowSender, TooLarge
from service.observability.logging import RequestContext, current_request, log_access
from service.observability.tracing import finish
from service.settings import Settings

CALLERS_ID = re.compile(r"[A-Za-z0-9._:/-]{1,128}")
UNGUARDED = frozenset(
    {"/health", "/livez", "/readyz", "/v2/health/live", "/v2/health/ready", "/ping", "/metrics", "/info", "/v1/models"}
)
# of every reply; a page sets a policy of its own
SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"referrer-policy", b"no-referrer"),
)
CALLER_LEFT = 499  # the status that is counted where the caller hung up before the reply


class RequestMiddleware:
    """ASGI middleware. `engine.inside` counts the guarded requests that are not yet answered."""

    def __init__(self, app: ASGIApp, engine: Engine) -> None:
        self._app, self._engine, settings = app, engine, engine.settings
        self._bodies = BodyBudget(settings.max_inflight_bytes)
        self._callers = ForwardedCallers(settings.max_connections_per_address, settings.trusted_proxies)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. HEAD is answered as GET; the server leaves the body out."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method = scope["method"]
        if method == "HEAD":
            scope = {**scope, "method": "GET"}
        scope.setdefault("state", {})["modality"] = "none"
        exchange = _Exchange(scope, receive, send, self._engine.settings, self._bodies)
        exchange.context = RequestContext(exchange.id, method, scope)
        token = current_request.set(exchange.context)
        try:
            if scope["path"] in UNGUARDED:
                await self._answer(scope, exchange, send)
            else:
                await self._answer_guarded(scope, exchange, send)
        finally:
            current_request.reset(token)

    async def _answer_guarded(self, scope: Scope, exchange: _Exchange, send: Send) -> None:
        """Answer a request that is limited, counted, logged and traced."""
        tracing = self._engine.tracing
        self._engine.inside += 1
        try:
            with nullcontext() if tracing is None else tracing.request(scope) as span:
                await self._answer(scope, exchange, send, guard=True)
                if span is not None:
                    finish(span, scope, exchange.status or CALLER_LEFT)
        finally:
            self._bodies.release(exchange)
            self._engine.inside -= 1
            self._count(scope, exchange)

    async def _answer(self, scope: Scope, exchange: _Exchange, send: Send, *, guard: bool = False) -> None:
        """Run the application; answer what it raises.

        A failure after the reply has begun is raised again.
        """
        try:
            self._check_host(scope)
            if guard:
                if self._engine.draining:
                    raise NotServing("shutting down: send the request to another instance, or retry later")
                exchange.check_declared_length()
            with self._callers.count(scope) if guard else nullcontext():
                await self._app(scope, exchange.receive if guard else exchange.receive_unlimited, exchange.send)
        except Exception as error:
            response = error_response(error)
            if exchange.status:
                raise
            count_refusal(self._engine.metrics, error)
            await response(scope, exchange.receive_unlimited, exchange.send)

    def _check_host(self, scope: Scope) -> None:
        """Raise WrongHost; a caller over the Unix socket is no browser."""
        if scope["state"].get("unix_socket"):
            return
        for name, value in scope["headers"]:
            if name == b"host":
                self._engine.gate.hosts.check(value.decode("latin-1"))

    def _count(self, scope: Scope, exchange: _Exchange) -> None:
        """Count and log a guarded request, once it is answered."""
        metrics, status = self._engine.metrics, exchange.status or CALLER_LEFT
        labels, seconds = (exchange.context.route, scope["state"]["modality"]), time.perf_counter() - exchange.start
        metrics.requests_total.labels(*labels, str(status)).inc()
        metrics.request_duration_seconds.labels(*labels).observe(seconds)
        log_access(exchange.context, status, seconds)


class _Exchange:
    """The messages of one request. status: of the reply, 0 until it begins.

    read_bytes: of the body so far.  complete: whether all of it has come.  Bytes beyond what the
    head declared, as all of a chunked body, are charged to the key as they come.
    """

    context: RequestContext

    def __init__(self, scope: Scope, receive: Receive, send: Send, settings: Settings, bodies: BodyBudget) -> None:
        self.start = time.perf_counter()
        self.status = 0
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        self.id = given if CALLERS_ID.fullmatch(given) else uuid.uuid4().hex
        declared = headers.get(b"content-length", b"")
        self._declared = int(declared) if declared.isdigit() else 0
        self._state = scope["state"]
        self.receive_unlimited, self._send = receive, send
        self._max_bytes, self._receive_s = settings.max_body_bytes, settings.receive_s
        self.read_bytes, self.complete = 0, False
        self._bodies = bodies
        self._refused: CapacityExceeded | None = None
        self._reading: asyncio.Timeout | None = None

    def check_declared_length(self) -> None:
        """Raise TooLarge by the header alone, before a byte is read."""
        if self._declared > self._max_bytes:
            raise self._too_large(self._declared)

    async def receive(self) -> Message:
        """The next message.

        Raises TooLarge by the bytes that came, SlowSender after `receive_s`, CapacityExceeded where
        all bodies together are too large and this is the largest.
        """
        if self.complete:  # the only message that can still come is the disconnect
            return await self.receive_unlimited()
        try:
            async with asyncio.timeout(self.start + self._receive_s - time.perf_counter()) as self._reading:
                message = await self.receive_unlimited()
        except TimeoutError as error:
            if self._refused is not None:
                raise self._refused from error
            raise SlowSender(
                f"{self.read_bytes} bytes of the body came in {self._receive_s:g} s: send it faster, or in parts"
            ) from error
        self.complete = not message.get("more_body", False)
        size = len(message.get("body", b""))
        self._bodies.add(self, size)
        undeclared = min(size, self.read_bytes - self._declared)
        if undeclared > 0 and "key" in self._state:
            self._state["key"].usage.charge_bytes(undeclared)
        if self.read_bytes > self._max_bytes:
            raise self._too_large(self.read_bytes)
        if self._refused is not None:
            raise self._refused
        return message

    def refuse(self, error: CapacityExceeded) -> None:
        """Let the waiting read raise `error` now, or the read that is being counted."""
        self._refused = error
        if self._reading is not None and not self._reading.expired():
            with suppress(RuntimeError):  # the read has ended
                self._reading.reschedule(0)

    async def send(self, message: Message) -> None:
        """Send a message of the reply, its head with the request's id."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            given = list(message.get("headers", []))
            own = {name for name, _ in given}
            security = [header for header in SECURITY_HEADERS if header[0] not in own]
            message["headers"] = [*given, *security, (b"x-request-id", self.id.encode("ascii"))]
        await self._send(message)

    def _too_large(self, found: int) -> TooLarge:
        return TooLarge(f"the body has {found} bytes or more, at most {self._max_bytes}: send fewer or smaller items")
