"""Spans of requests and of their stages, where an exporter is configured (extra `tracing`).

Configured means that OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT is set; the
other OTEL_* variables are read by OpenTelemetry itself. Otherwise nothing is imported, and a
request costs one comparison with None.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from starlette.types import Scope

from service.observability.metrics import Stage

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

log = logging.getLogger("reco")
ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
SERVICE = "reco-serve"  # unless OTEL_SERVICE_NAME says otherwise


class Tracing:
    """The spans of one service.

    What is exported waits in OpenTelemetry's own queue and thread, and is dropped where that is
    full.
    """

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider, self._tracer, self._propagator = (
            provider,
            provider.get_tracer("reco"),
            TraceContextTextMapPropagator(),
        )

    @classmethod
    def from_environment(cls) -> Tracing | None:
        """None where no exporter is configured or OpenTelemetry is not installed; the latter is
        told.
        """
        if (
            not any(os.environ.get(name) for name in ENDPOINTS)
            or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
        ):
            return None
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            log.warning(
                "an OTLP endpoint is set and OpenTelemetry is not installed: pip install 'reco-serve[tracing]', or unset it"
            )
            return None
        provider = TracerProvider(
            resource=Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", SERVICE)})
        )
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        return cls(provider)

    @contextmanager
    def request(self, scope: Scope) -> Iterator[Span]:
        """The span of one request, a child of the caller's where a `traceparent` came with it."""
        from opentelemetry.trace import SpanKind

        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        parent = self._propagator.extract(dict(headers))
        with self._tracer.start_as_current_span(
            scope["method"], parent, SpanKind.SERVER, {"http.request.method": scope["method"]}, record_exception=False
        ) as span:
            yield span

    def stages(self, seconds: Mapping[Stage, float], attributes: Mapping[str, Any]) -> None:
        """A span per stage under the current request's, one behind the other up to now: durations
        are measured, starts follow from them.

        attributes: of the request's own span.
        """
        from opentelemetry.trace import get_current_span

        get_current_span().set_attributes(dict(attributes))
        start = time.time_ns() - round(1e9 * sum(seconds.values()))
        for stage, spent in seconds.items():
            end = start + round(1e9 * spent)
            self._tracer.start_span(stage, start_time=start).end(end)
            start = end

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def finish(span: Span, scope: Scope, status: int) -> None:
    """Name a request's span as the conventions for HTTP have it; a 5xx is an error, the rest is the
    caller's affair.
    """
    from opentelemetry.trace import Status, StatusCode

    span.update_name(f"{scope['method']} {template(scope)}")
    span.set_attributes({"http.route": template(scope), "http.response.status_code": status})
    if status >= 500:
        span.set_status(Status(StatusCode.ERROR))


def template(scope: Scope) -> str:
    """The path of the route as it is declared: the paths that callers send have no bound."""
    route = scope.get("route")
    return route.path if route is not None else "unmatched"
