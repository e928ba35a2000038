"""The exposition against a table copied by hand from the contract, and the two series of
our own.
"""

import re
from collections.abc import Iterable

import pytest
from prometheus_client import Metric
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families

from service.observability.metrics import MODALITIES, STAGES, Metrics

# attribute -> (name of the exposed series, type, labels)
CONTRACT: dict[str, tuple[str, str, str]] = {
    "requests_total": ("reco_requests_total", "counter", "endpoint modality code"),
    "request_duration_seconds": ("reco_request_duration_seconds", "histogram", "endpoint modality"),
    "stage_duration_seconds": ("reco_stage_duration_seconds", "histogram", "stage modality"),
    "batch_size": ("reco_batch_size", "histogram", "modality"),
    "queue_depth": ("reco_queue_depth", "gauge", "modality"),
    "rejected_total": ("reco_rejected_total", "counter", "reason"),
    "items_total": ("reco_items_total", "counter", "modality"),
    "neighbor_similarity": ("reco_neighbor_similarity", "histogram", "modality"),
    "enhanced_total": ("reco_enhanced_total", "counter", "enhanced reason"),
    "memory_info": ("reco_memory_info", "gauge", "name version encoder fusion"),
    "memory_pairs": ("reco_memory_pairs", "gauge", "name"),
    "memory_bytes": ("reco_memory_bytes", "gauge", "name tier"),
    "memory_created_timestamp_seconds": (
        "reco_memory_created_timestamp_seconds",
        "gauge",
        "name",
    ),  # ours: for the alert on stale memories
    "memory_swaps_total": ("reco_memory_swaps_total", "counter", "name outcome"),
    "memory_swap_duration_seconds": ("reco_memory_swap_duration_seconds", "histogram", "phase"),
    "snapshots_alive": ("reco_snapshots_alive", "gauge", "name"),
    "recall_sampled": ("reco_recall_sampled", "gauge", "name side"),
    "drift_cosine": ("reco_drift_cosine", "gauge", "name"),
    "label_cache_total": ("reco_label_cache_total", "counter", "result"),
    "gpu_memory_bytes": ("reco_gpu_memory_bytes", "gauge", "kind"),
    # ours: decoding processes
    "decoder_queue_depth": ("reco_decoder_queue_depth", "gauge", ""),
    "decoder_workers": ("reco_decoder_workers", "gauge", "state"),
    "decoder_pixels": ("reco_decoder_pixels", "gauge", ""),
    "decoder_replaced_total": ("reco_decoder_replaced_total", "counter", "reason"),
    # ours: for the alert on a service that is up and not ready
    "ready": ("reco_ready", "gauge", ""),
    "build_info": ("reco_build_info", "gauge", "version torch faiss"),
}


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(version="0.1.0", torch="2.14.1", faiss="1.15.1")


def exposed(metrics: Metrics) -> dict[str, Metric]:
    families: Iterable[Metric] = text_string_to_metric_families(metrics.render()[0].decode())
    return {f.name + ("_total" if f.type == "counter" else ""): f for f in families if f.name.startswith("reco_")}


def write(metrics: Metrics, attribute: str, kind: str, labels: list[str]) -> None:
    series = getattr(metrics, attribute)
    if attribute == "memory_info":
        series.labels(name="a").info(dict.fromkeys(labels[1:], "a"))
    elif attribute != "build_info":
        verb = {"counter": "inc", "gauge": "set", "histogram": "observe"}[kind]
        getattr(series.labels(**dict.fromkeys(labels, "a")) if labels else series, verb)(0.5)


def test_series_are_exactly_those_of_the_contract_and_our_own(metrics: Metrics) -> None:
    declared = {attribute for attribute, value in vars(metrics).items() if isinstance(value, MetricWrapperBase)}
    assert declared == set(CONTRACT)
    for attribute, (_, kind, labels) in CONTRACT.items():
        write(metrics, attribute, kind, labels.split())
    found = exposed(metrics)
    assert set(found) == {name for name, _, _ in CONTRACT.values()}
    for name, kind, labels in CONTRACT.values():
        family = found[name]
        assert family.type == kind, name
        assert {*family.samples[0].labels} - {"le"} == set(labels.split()), name
        assert family.documentation, name


def test_a_series_without_a_writer_has_no_sample(metrics: Metrics) -> None:
    found = {name for name, family in exposed(metrics).items() if family.samples}
    at_each_scrape = {"reco_ready", "reco_decoder_queue_depth", "reco_decoder_pixels"}
    assert found == at_each_scrape | {"reco_build_info"}


def test_no_created_series_beside_the_counters(metrics: Metrics) -> None:
    metrics.requests_total.labels("/embed/image", "image", "200").inc()
    assert not re.search(rb"_created[ {]", metrics.render()[0])


def test_a_memory_shows_one_version_at_a_time(metrics: Metrics) -> None:
    for version in ("2026-11-22a", "2026-11-22b"):
        metrics.memory_info.labels("catalog").info({"version": version, "encoder": "starter@0", "fusion": "9f2c"})
    (sample,) = exposed(metrics)["reco_memory_info"].samples
    assert sample.labels["version"] == "2026-11-22b"


def test_two_services_in_one_process_do_not_share_counters(metrics: Metrics) -> None:
    other = Metrics(version="0.1.0", torch="2.14.1", faiss="1.15.1")
    metrics.items_total.labels("image").inc(3)
    assert other.registry.get_sample_value("reco_items_total", {"modality": "image"}) is None


@pytest.mark.parametrize(
    ("attribute", "labels", "first", "last"),
    [
        ("request_duration_seconds", ("/embed/image", "image"), 0.0005, 10.0),
        ("stage_duration_seconds", ("encode", "image"), 0.0005, 10.0),
        ("batch_size", ("image",), 1.0, 256.0),
        ("neighbor_similarity", ("image",), -1.0, 1.0),
    ],
)
def test_buckets_span_what_is_measured(
    metrics: Metrics, attribute: str, labels: tuple[str, ...], first: float, last: float
) -> None:
    getattr(metrics, attribute).labels(*labels).observe(first)
    (family,) = (f for f in exposed(metrics).values() if f.name == f"reco_{attribute}")
    bounds = [float(s.labels["le"]) for s in family.samples if s.name.endswith("_bucket")]
    assert bounds == sorted(bounds)
    assert (bounds[0], bounds[-2], bounds[-1]) == (first, last, float("inf"))


def test_vocabulary() -> None:
    assert STAGES == ("download", "decode", "tokenize", "queue", "encode", "retrieve", "fuse", "serialize")
    assert MODALITIES[:2] == ("image", "text")


def test_content_type_is_what_prometheus_asks_for(metrics: Metrics) -> None:
    assert metrics.render()[1].startswith("text/plain; version=")
