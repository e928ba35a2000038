"""Calls whose right answer is known under each version of a memory, sent in a closed loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import httpx
import numpy as np

from loadtests.support.calls import PreparedCall, TimedReply, Unexpected, image_call, send, text_call

__all__ = [
    "CheckedReply",
    "KnownCall",
    "distinguishing_calls",
    "find_fault",
    "learn",
    "prepare",
    "send_in_closed_loop",
]

TEXTS = ("a photo of a cat", "a cup of coffee on a wooden table", "a rocket before its launch")


@dataclass(frozen=True, slots=True, eq=False)
class KnownCall:
    """A call and its right answer under each version. rows: "name@version" -> (n, D) float32."""

    call: PreparedCall
    rows: Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class CheckedReply:
    """One reply under load.

    start, end: perf_counter seconds.  memory: the version that it names.  fault: empty, or what is
    wrong.
    """

    start: float
    end: float
    memory: str
    fault: str


def prepare(photos: Sequence[bytes], memory: str) -> list[PreparedCall]:
    """Single photos, pairs of photos (a reply of two rows can mix), and texts."""
    pairs = [image_call([a, b], memory=memory) for a, b in zip(photos[::2], photos[1::2], strict=False)]
    texts = [text_call(TEXTS[:1], memory=memory), text_call(TEXTS, memory=memory)]
    return [*(image_call([photo], memory=memory) for photo in photos), *pairs, *texts]


def vectors(reply: TimedReply) -> np.ndarray:
    """(n, D) float32, the rows of an embed reply."""
    return np.asarray([row["embedding"] for row in reply.json()["data"]], np.float32)


async def learn(client: httpx.AsyncClient, calls: Sequence[PreparedCall], named: str) -> list[np.ndarray]:
    """Record each call's answer while `named` alone serves."""
    rows = []
    for call in calls:
        reply = await send(client, call)
        if reply.status != 200 or reply.json()["memory"] != named:
            raise Unexpected(f"{call.route} under {named}: {reply.status} {reply.content[:300]!r}")
        rows.append(vectors(reply))
    return rows


def distinguishing_calls(
    calls: Sequence[PreparedCall], learned: Mapping[str, Sequence[np.ndarray]], apart: float
) -> list[KnownCall]:
    """Calls whose every row differs by more than `apart` between the two versions; other calls
    could not reveal a mix.
    """
    a, b = learned.values()
    differ = [float(np.abs(x - y).max(axis=1).min()) for x, y in zip(a, b, strict=True)]
    known = [
        KnownCall(call, {of: rows[i] for of, rows in learned.items()})
        for i, call in enumerate(calls)
        if differ[i] > apart
    ]
    if not known:
        raise Unexpected(
            f"no answer differs by more than {apart:g} between the versions: take versions of other pairs, or a smaller --apart"
        )
    return known


def find_fault(reply: TimedReply, known: KnownCall, apart: float) -> str:
    """Empty if the reply is whole: status 200, body and header name one version, and every row is
    that version's.

    A row drifts a little with the batch it ran in; within half of `apart` it cannot be the other
    version's.
    """
    if reply.status != 200:
        return f"status {reply.status}: {reply.content[:200].decode(errors='replace')}"
    named, header = reply.json()["memory"], reply.headers.get("x-memory-version")
    if header != named or named not in known.rows:
        return f"mixed: the body names {named}, the header {header}, the versions are {' and '.join(known.rows)}"
    off = np.abs(vectors(reply) - known.rows[named]).max(axis=1)  # (n,)
    return (
        f"mixed: the reply names {named}, row {off.argmax()} of {len(off)} is off by {off.max():.1e}"
        if off.max() > apart / 2
        else ""
    )


async def send_in_closed_loop(
    client: httpx.AsyncClient, known: Sequence[KnownCall], apart: float, workers: int, stop: asyncio.Event
) -> list[CheckedReply]:
    """Each worker sends its next call after the last reply, until `stop`."""
    answers: list[CheckedReply] = []

    async def work(turn: int) -> None:
        while not stop.is_set():
            this = known[turn % len(known)]
            start = time.perf_counter()
            reply = await send(client, this.call)
            named = reply.headers.get("x-memory-version", "none")
            answers.append(CheckedReply(start, time.perf_counter(), named, find_fault(reply, this, apart)))
            turn += 1

    async with asyncio.TaskGroup() as tasks:
        for worker in range(workers):
            tasks.create_task(work(worker))
    return answers
