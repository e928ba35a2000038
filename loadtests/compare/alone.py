"""A caller who is alone: one request after the other, and where each millisecond of them went."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from loadtests.support.calls import Call, Reply, Unexpected, open_client, send
from loadtests.support.gauges import samples

__all__ = ["Visit", "alone", "profile"]


@dataclass(frozen=True, slots=True)
class Visit:
    """One request, in seconds.

    felt: by the client.  inside, serialize: by the service's own clock, as are the reply's stages.
    """

    reply: Reply
    felt: float
    inside: float
    serialize: float

    @property
    def stages(self) -> dict[str, float]:
        """By name, as they follow on each other."""
        return {**self.reply.stages, "serialize": self.serialize}


async def alone(url: str, calls: Sequence[Call]) -> list[Visit]:
    """One call after the other, each answered with 200."""
    visits = []
    async with open_client(url) as client:
        before = await _spent(client, calls[0].route)
        for call in calls:
            begun = time.perf_counter()
            reply = await send(client, call)
            felt = time.perf_counter() - begun
            if reply.status != 200:
                raise Unexpected(f"{call.path}: {reply.status} {reply.content[:300]!r}")
            after = await _spent(client, call.route)
            visits.append(Visit(reply, felt, after[0] - before[0], after[1] - before[1]))
            before = after
    return visits


def profile(visits: Sequence[Visit]) -> dict[str, float]:
    """Where each millisecond goes: the median of every stage, of what the service does beside them,
    and of what lies outside of it.
    """
    parts = [
        {
            **visit.stages,
            "the rest of the service": visit.inside - sum(visit.stages.values()),
            "client and sockets": visit.felt - visit.inside,
            "felt": visit.felt,
        }
        for visit in visits
    ]
    return {name: round(1000 * statistics.median(part.get(name, 0.0) for part in parts), 3) for name in parts[0]}


async def _spent(client: httpx.AsyncClient, route: str) -> tuple[float, float]:
    """Seconds that the service has spent so far: on requests of this route, and on writing
    replies.
    """
    inside = serialize = 0.0
    for sample in await samples(client):
        if sample.name == "reco_request_duration_seconds_sum" and sample.labels["endpoint"] == f"/{route}":
            inside += sample.value
        elif sample.name == "reco_stage_duration_seconds_sum" and sample.labels["stage"] == "serialize":
            serialize += sample.value
    return inside, serialize
