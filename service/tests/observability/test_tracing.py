"""Spans as a collector gets them: a real service exports to a real HTTP endpoint, which decodes
OTLP.
"""

import gzip
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from service.observability.tracing import Tracing
from service.tests.conftest import serving

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector(ThreadingHTTPServer):
    """Keeps every span it is sent, and the name of the service."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: list[Span] = []
        self.services: set[str] = set()

    def named(self, name: str, timeout_s: float = 15) -> Span:
        """The first span of this name, once it has come."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            for span in list(self.spans):
                if span.name == name:
                    return span
            time.sleep(0.05)
        raise AssertionError(f"no span {name!r} among {[span.name for span in self.spans]}")


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        sent = ExportTraceServiceRequest.FromString(
            gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        )
        for resource in sent.resource_spans:
            self.server.services.update(
                each.value.string_value for each in resource.resource.attributes if each.key == "service.name"
            )
            self.server.spans.extend(span for scope in resource.scope_spans for span in scope.spans)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 - the name is http.server's
        """Nothing."""


@contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    yield collector
    collector.shutdown()
    collector.server_close()


def attributes(span: Span) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


def test_a_request_and_its_stages_are_spans_of_the_callers_trace(tmp_path: Path, photos: dict[str, bytes]) -> None:
    with collecting() as collector:
        endpoint = f"http://127.0.0.1:{collector.server_port}"
        with (
            serving(tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint, OTEL_BSP_SCHEDULE_DELAY="100") as server,
            server.client() as client,
        ):
            caller = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
            reply = client.post(
                "/embed/image", content=photos["chelsea"], headers={**caller, "content-type": "image/jpeg"}
            )
            assert reply.status_code == 200, reply.text
            request = collector.named("POST /embed/image")
            stages = {name: collector.named(name) for name in ("decode", "queue", "encode", "retrieve", "fuse")}
            assert client.post("/embed/text", json={"texts": []}).status_code == 400
            refused = collector.named("POST /embed/text")
            assert client.get("/nowhere/4711").status_code == 404
            collector.named("GET unmatched")
            assert client.get("/readyz").status_code == 200
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == (TRACE, PARENT)
    assert attributes(request) == {
        "http.request.method": "POST",
        "http.route": "/embed/image",
        "http.response.status_code": 200,
        "reco.side": "image",
        "reco.items": 1,
        "reco.memory": reply.json()["memory"],
    }
    for span in stages.values():
        assert (span.trace_id, span.parent_span_id) == (request.trace_id, request.span_id)
        assert (
            request.start_time_unix_nano
            <= span.start_time_unix_nano
            <= span.end_time_unix_nano
            <= request.end_time_unix_nano
        )
    told = dict(part.strip().split(";dur=") for part in reply.headers["server-timing"].split(","))
    encode = stages["encode"]
    assert (encode.end_time_unix_nano - encode.start_time_unix_nano) / 1e6 == pytest.approx(
        float(told["encode"]), abs=0.2
    )
    assert refused.trace_id != request.trace_id
    assert attributes(refused)["http.response.status_code"] == 400
    assert collector.services == {"reco-serve"}
    assert not any("readyz" in span.name for span in collector.spans)  # probes would drown the rest


def test_without_an_endpoint_nothing_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert Tracing.from_environment() is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert Tracing.from_environment() is None


def test_without_the_extra_a_warning_and_no_trace(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    assert Tracing.from_environment() is None
    assert "pip install 'reco-serve[tracing]'" in caplog.text
