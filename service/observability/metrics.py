"""Every Prometheus series of the service, declared once.

An attribute of `Metrics` has the name of its series without `reco_`. Durations are seconds. A
series appears at /metrics once it has a value, so a dashboard never plots a zero that was not
measured.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

__all__ = ["MODALITIES", "STAGES", "Metrics", "Modality", "Stage"]

# of a request; items and batches are always one of the first two
Modality = Literal["image", "text", "mixed", "none"]
Stage = Literal["download", "decode", "tokenize", "queue", "encode", "retrieve", "fuse", "serialize"]

MODALITIES: tuple[Modality, ...] = get_args(Modality)
STAGES: tuple[Stage, ...] = get_args(Stage)

# steps of at most 1.7x, so that a quantile read between two bounds is off by less than that
DURATION_S = (
    *(0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075),
    *(0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
    *(1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0),
)
# checking the sums of a large memory takes minutes
SWAP_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0)
BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256)
COSINE = (-1.0, -0.5, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99, 1.0)


class Metrics:
    """All series on a registry of their own, so that two apps in one process share no counter.

    `memory_info.labels(name).info({"version", "encoder", "fusion"})` replaces what it said before:
    one version at a time.
    """

    def __init__(self, *, version: str, torch: str, faiss: str) -> None:
        # process-wide in prometheus_client; without it every counter drags a `_created` series
        # along
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._declare_requests(self.registry)
        self._declare_items(self.registry)
        self._declare_decoder(self.registry)
        self._declare_memories(self.registry)
        self._declare_process(self.registry)
        self.build_info.info({"version": version, "torch": torch, "faiss": faiss})

    def _declare_requests(self, r: CollectorRegistry) -> None:
        self.requests_total = Counter(
            "reco_requests_total", "Requests answered", ["endpoint", "modality", "code"], registry=r
        )
        self.request_duration_seconds = Histogram(
            "reco_request_duration_seconds",
            "From arrival to reply",
            ["endpoint", "modality"],
            buckets=DURATION_S,
            registry=r,
        )
        self.stage_duration_seconds = Histogram(
            "reco_stage_duration_seconds",
            "Time an item spent in one stage",
            ["stage", "modality"],
            buckets=DURATION_S,
            registry=r,
        )
        self.rejected_total = Counter(
            "reco_rejected_total", "Requests refused before any work was done", ["reason"], registry=r
        )

    def _declare_items(self, r: CollectorRegistry) -> None:
        self.batch_size = Histogram(
            "reco_batch_size", "Items in one batch of the encoder", ["modality"], buckets=BATCH, registry=r
        )
        self.queue_depth = Gauge("reco_queue_depth", "Items waiting for a batch", ["modality"], registry=r)
        self.items_total = Counter("reco_items_total", "Images and texts encoded", ["modality"], registry=r)
        self.neighbor_similarity = Histogram(
            "reco_neighbor_similarity",
            "Similarity of an item's nearest neighbour",
            ["modality"],
            buckets=COSINE,
            registry=r,
        )
        self.enhanced_total = Counter(
            "reco_enhanced_total", "Vectors answered, enhanced or not, and why", ["enhanced", "reason"], registry=r
        )

    def _declare_decoder(self, r: CollectorRegistry) -> None:
        self.decoder_queue_depth = Gauge("reco_decoder_queue_depth", "Images waiting to be decoded", [], registry=r)
        self.decoder_workers = Gauge(
            "reco_decoder_workers", "Processes that decode images: busy, idle, being replaced", ["state"], registry=r
        )
        self.decoder_pixels = Gauge("reco_decoder_pixels", "Pixels of the large images being decoded", [], registry=r)
        self.decoder_replaced_total = Counter(
            "reco_decoder_replaced_total",
            "Decoding processes replaced: unwanted (killed at the deadline, or when the caller left), "
            "protocol (sent what is no answer), or the signal that ended them (SIGPROF: too much CPU)",
            ["reason"],
            registry=r,
        )

    def _declare_memories(self, r: CollectorRegistry) -> None:
        self.memory_info = Info("reco_memory", "The version being served", ["name"], registry=r)
        self.memory_pairs = Gauge("reco_memory_pairs", "Pairs in the snapshot being served", ["name"], registry=r)
        self.memory_bytes = Gauge(
            "reco_memory_bytes", "Size of the snapshot being served", ["name", "tier"], registry=r
        )
        self.memory_created_timestamp_seconds = Gauge(
            "reco_memory_created_timestamp_seconds",
            "When the version being served was built, Unix time",
            ["name"],
            registry=r,
        )
        self.memory_swaps_total = Counter(
            "reco_memory_swaps_total", "Swaps asked for, by how they ended", ["name", "outcome"], registry=r
        )
        self.memory_swap_duration_seconds = Histogram(
            "reco_memory_swap_duration_seconds", "Time a swap spent in one phase", ["phase"], buckets=SWAP_S, registry=r
        )
        self.snapshots_alive = Gauge(
            "reco_snapshots_alive", "Snapshots not yet freed; stays at 1 when none leaks", ["name"], registry=r
        )
        self.recall_sampled = Gauge(
            "reco_recall_sampled", "Recall of the index on sampled live queries", ["name", "side"], registry=r
        )
        self.drift_cosine = Gauge(
            "reco_drift_cosine", "Mean cosine of recent vectors under the old and new memory", ["name"], registry=r
        )

    def _declare_process(self, r: CollectorRegistry) -> None:
        self.label_cache_total = Counter(
            "reco_label_cache_total", "Look-ups of embedded label sets", ["result"], registry=r
        )
        self.gpu_memory_bytes = Gauge("reco_gpu_memory_bytes", "GPU memory of this process", ["kind"], registry=r)
        self.ready = Gauge("reco_ready", "1 while /readyz answers 200, else 0", [], registry=r)
        self.build_info = Info("reco_build", "Versions of what is running", registry=r)

    def observe_stage(self, stage: Stage, modality: Modality, seconds: float) -> None:
        """Add one duration to the histogram of a stage."""
        self.stage_duration_seconds.labels(stage, modality).observe(seconds)

    @contextmanager
    def time_stage(self, stage: Stage, modality: Modality) -> Iterator[None]:
        """Observe how long the block takes, unless it raises."""
        start = time.perf_counter()
        yield
        self.observe_stage(stage, modality, time.perf_counter() - start)

    def render(self) -> tuple[bytes, str]:
        """The body of /metrics and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
