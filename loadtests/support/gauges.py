"""Readings of a service's /metrics."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

__all__ = ["Gauges", "batches_between", "growth", "image_totals", "read_gauges", "samples"]

IMAGE_TOTALS = {
    "reco_stage_duration_seconds_sum",
    "reco_stage_duration_seconds_count",
    "reco_batch_size_sum",
    "reco_batch_size_count",
}


@dataclass(frozen=True, slots=True)
class Gauges:
    """Gauges of one moment.

    resident: bytes of the service's process.  alive: live snapshots of one memory or of all.
    """

    resident: float
    alive: float


async def samples(client: httpx.AsyncClient) -> list[Sample]:
    """Every series with its value."""
    text = (await client.get("/metrics")).raise_for_status().text
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


async def read_gauges(client: httpx.AsyncClient, memory: str | None = None) -> Gauges:
    """Current gauges.

    memory: whose snapshots count, None = all.
    """
    found = await samples(client)
    resident = sum(sample.value for sample in found if sample.name == "process_resident_memory_bytes")
    alive = [
        sample for sample in found if sample.name == "reco_snapshots_alive" and memory in (None, sample.labels["name"])
    ]
    return Gauges(resident, sum(sample.value for sample in alive))


def growth(resident: Sequence[float]) -> dict[str, float]:
    """Median megabytes of the first and last fifth of the time, the maximum, and the relative
    growth.
    """
    part = max(1, len(resident) // 5)
    first, last = statistics.median(resident[:part]), statistics.median(resident[-part:])
    in_mb = {"first_mb": first, "last_mb": last, "most_mb": max(resident)}
    return {
        **{name: round(value / 1e6, 1) for name, value in in_mb.items()},
        "growth": round(last / first - 1, 4) if first else 0.0,
    }


def image_totals(found: Sequence[Sample]) -> dict[str, float]:
    """Sums and counts of the image stages, the batches and the process's CPU seconds."""
    totals: dict[str, float] = {}
    for sample in found:
        if sample.name == "process_cpu_seconds_total":
            totals["cpu"] = sample.value
        elif sample.name in IMAGE_TOTALS and sample.labels["modality"] == "image":
            totals[f"{sample.labels.get('stage', 'batch')} {sample.name.rsplit('_', 1)[1]}"] = sample.value
    return totals


def batches_between(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, Any]:
    """Mean batch size, mean milliseconds of each stage and CPU per image between two readings of
    `image_totals`.
    """
    spent = {name: value - before.get(name, 0.0) for name, value in after.items()}
    means = {
        name[:-4]: spent[name] / spent[f"{name[:-4]} count"]
        for name in spent
        if name.endswith(" sum") and spent[f"{name[:-4]} count"]
    }
    mean_batch = means.pop("batch", 0.0)
    return {
        "mean_batch": round(mean_batch, 2),
        "stages_ms": {stage: round(1000 * mean, 3) for stage, mean in sorted(means.items())},
        "server_cpu_ms_per_image": round(1000 * spent["cpu"] / spent["batch sum"], 2)
        if spent.get("batch sum")
        else None,
    }
