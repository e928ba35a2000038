"""Logs of the service: one handler on stderr, as text or as JSON lines, with the request's id.

Loggers: `reco` for events and failures, `reco.access` for one line per request, `reco.audit`
(`observability/audit`) for changes and refused keys. A record never
holds a key, a caption, a query string or pixels: the route is logged as it is declared, not as it
was called.
"""

from __future__ import annotations

import json
import logging
import logging.config
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from starlette.types import Scope

from service.observability.tracing import template

__all__ = ["LogFormat", "RequestContext", "configure_logging", "current_request", "log_access", "log_failure"]

LogFormat = Literal["text", "json"]
FIELDS = ("request_id", "route", "method", "status", "seconds")  # of records about one request
INTERNAL_ERROR = 500

log = logging.getLogger("reco")
access = logging.getLogger("reco.access")
current_request: ContextVar[RequestContext | None] = ContextVar("current_request", default=None)


@dataclass(slots=True, eq=False)
class RequestContext:
    """The request that the current task answers.

    logged: the failures of it that are in the log.
    """

    id: str
    method: str
    scope: Scope
    logged: list[Exception] = field(default_factory=list)

    @property
    def caller(self) -> str | None:
        """The name of its key, None before one is checked."""
        key = self.scope["state"].get("key")
        return None if key is None else str(key.name)

    @property
    def route(self) -> str:
        """The path of the route as it is declared, "unmatched" where no route was found."""
        return template(self.scope)


def configure_logging(kind: LogFormat, *, verbose: bool, access_log: bool) -> None:
    """Send all records to stderr. verbose: also the INFO records of libraries."""
    formatter = f"{__name__}.{'JsonFormatter' if kind == 'json' else 'TextFormatter'}"
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"chosen": {"()": formatter}, "bare": {"format": "%(message)s"}},
            "handlers": {
                "stderr": {"class": "logging.StreamHandler", "formatter": "chosen"},
                "audit": {"class": "logging.StreamHandler", "formatter": "bare"},
            },
            "root": {"handlers": ["stderr"], "level": "INFO" if verbose else "WARNING"},
            "loggers": {
                "reco": {"level": "INFO"},
                "reco.access": {"level": "INFO" if access_log else "CRITICAL"},
                "reco.audit": {"level": "INFO", "handlers": ["audit"], "propagate": False},
            },
        }
    )


class TextFormatter(logging.Formatter):
    """`2026-11-26 12:00:00,000 ERROR message request_id=…`, the stack on the lines after it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s%(request)s")

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        request_id = getattr(record, "request_id", None)
        record.request = f" request_id={request_id}" if request_id else ""
        return super().format(record)


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (UTC), level, logger, message, and of a request its FIELDS."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info:
            line["stack"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def log_failure(error: Exception, status: int) -> None:
    """Log a 5xx once per request: with its stack where it is a bug, as one line where it is a
    refusal.

    error: the failure itself, not the refusal that wraps it.
    """
    request = current_request.get()
    if request is None or any(error is known for known in request.logged):
        return
    request.logged.append(error)
    bug = status == INTERNAL_ERROR
    log.log(
        logging.ERROR if bug else logging.WARNING,
        "%s %s failed with %d: %s",
        request.method,
        request.route,
        status,
        type(error).__name__ if bug else error,
        exc_info=error if bug else None,
        extra={"request_id": request.id, "route": request.route, "method": request.method, "status": status},
    )


def log_access(request: RequestContext, status: int, seconds: float) -> None:
    """Log one request that was answered, or left by its caller (status 499). seconds: wall time."""
    if access.isEnabledFor(logging.INFO):
        access.info(
            "%s %s %d %.4f s",
            request.method,
            request.route,
            status,
            seconds,
            extra={
                "request_id": request.id,
                "route": request.route,
                "method": request.method,
                "status": status,
                "seconds": round(seconds, 6),
            },
        )
