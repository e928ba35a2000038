"""Who may call which route.

A router that is made with `route_class=ReadRoute`, `WriteRoute` or `AdminRoute` guards its routes
before a byte of the body is read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.responses import Response

from service.access.keys import Role
from service.api.dependencies import engine_of
from service.api.json_body import read_json
from service.errors import BadRequest, InvalidValue, MissingKey, RateExceeded, ServiceError, WrongKey, refusal
from service.observability.audit import audit

SAFE_METHODS = frozenset({"GET", "HEAD"})


class GuardedRoute(APIRoute):
    """A route whose caller is checked first; a JSON body is then read within the limits."""

    role: ClassVar[Role]

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler behind both checks."""
        handle = super().get_route_handler()

        async def check_and_handle(request: Request) -> Response:
            self._admit(request)
            if self.body_field is not None:
                request = _ParsedRequest(request, await read_json(request, engine_of(request).settings, exact=True))
            try:
                return await handle(request)
            except RequestValidationError as error:
                raise _describe_invalid(error) from error

        if self.role == "read":
            return check_and_handle

        async def check_and_audit(request: Request) -> Response:
            if request.method in SAFE_METHODS:
                return await check_and_handle(request)
            start = time.perf_counter()
            try:
                response = await check_and_handle(request)
            except Exception as error:
                if not isinstance(error, MissingKey | WrongKey):  # these are audited where they are raised
                    self._audit(request, refusal(error).status, start)
                raise
            self._audit(request, response.status_code, start)
            return response

        return check_and_audit

    def _admit(self, request: Request) -> None:
        """Check the key and its limits. Raises MissingKey, WrongKey, RateExceeded, each audited."""
        try:
            key = engine_of(request).gate.admit(
                request.headers.get("authorization", ""), self.role, over_unix_socket=over_unix_socket(request)
            )
            request.state.key = key
            declared = request.headers.get("content-length", "")
            key.usage.begin(int(declared) if declared.isascii() and declared.isdigit() else 0)
        except (MissingKey, WrongKey, RateExceeded) as error:
            self._audit_refusal(request, error)
            raise

    def _audit_refusal(self, request: Request, error: ServiceError) -> None:
        refused = refusal(error)
        who = getattr(error, "key_name", None)
        audit("refused", outcome=refused.code, who=who, route=self._route(request), client=_client(request))

    def _audit(self, request: Request, status: int, start: float) -> None:
        audit(
            "admin",
            outcome=str(status),
            route=self._route(request),
            client=_client(request),
            seconds=round(time.perf_counter() - start, 6),
            job=getattr(request.state, "job", None),
            **{name: str(value)[:200] for name, value in request.path_params.items()},
        )

    def _route(self, request: Request) -> str:
        return f"{request.method} {self.path}"


def over_unix_socket(request: Request) -> bool:
    """Whether the request came over the service's own Unix socket."""
    return bool(request.scope.get("state", {}).get("unix_socket"))


def _describe_invalid(error: RequestValidationError) -> BadRequest | InvalidValue:
    """The first problem of a body that pydantic refuses, and its field."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"][1:]) or "body"
    kind = BadRequest if first["type"] in ("json_invalid", "extra_forbidden", "missing") else InvalidValue
    return kind(f"{field}: {first['msg']}", field)


def _client(request: Request) -> str:
    return request.client.host if request.client is not None else "unix socket"


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


class ReadRoute(GuardedRoute):
    """Embedding, classifying, reading label sets: any key, or none where no key is asked for."""

    role = "read"


class WriteRoute(GuardedRoute):
    """Editing pairs and label sets, and reading what is served: a key with the role write."""

    role = "write"


class AdminRoute(GuardedRoute):
    """Swaps, rollbacks, compactions: a key with the role admin."""

    role = "admin"
