"""Latency profile of a single caller who sends one request after the other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from loadtests.support.calls import PreparedCall, TimedReply, Unexpected, open_client, send
from loadtests.support.gauges import samples

__all__ = ["ProfiledRequest", "median_profile", "profile_lone_caller"]


@dataclass(frozen=True, slots=True)
class ProfiledRequest:
    """Times of one request, in seconds.

    felt: measured by the client.  inside, serialize: measured by the service, as are the reply's
    stages.
    """

    reply: TimedReply
    felt: float
    inside: float
    serialize: float

    @property
    def stages(self) -> dict[str, float]:
        """Seconds by stage, in order."""
        return {**self.reply.stages, "serialize": self.serialize}


async def profile_lone_caller(url: str, calls: Sequence[PreparedCall]) -> list[ProfiledRequest]:
    """Send the calls one after the other. Unexpected unless each is answered with 200."""
    visits = []
    async with open_client(url) as client:
        before = await _read_spent(client, calls[0].route)
        for call in calls:
            begun = time.perf_counter()
            reply = await send(client, call)
            felt = time.perf_counter() - begun
            if reply.status != 200:
                raise Unexpected(f"{call.path}: {reply.status} {reply.content[:300]!r}")
            after = await _read_spent(client, call.route)
            visits.append(ProfiledRequest(reply, felt, after[0] - before[0], after[1] - before[1]))
            before = after
    return visits


def median_profile(visits: Sequence[ProfiledRequest]) -> dict[str, float]:
    """Medians of each stage, of the rest of the service, and of the time outside the service."""
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


async def _read_spent(client: httpx.AsyncClient, route: str) -> tuple[float, float]:
    """Total seconds that the service has spent on requests of this route, and on serialization."""
    inside = serialize = 0.0
    for sample in await samples(client):
        if sample.name == "reco_request_duration_seconds_sum" and sample.labels["endpoint"] == f"/{route}":
            inside += sample.value
        elif sample.name == "reco_stage_duration_seconds_sum" and sample.labels["stage"] == "serialize":
            serialize += sample.value
    return inside, serialize
