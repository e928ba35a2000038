"""Mutations of bytes and of JSON values, the same for the same seed."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

SECONDS = float(os.environ.get("RECO_FUZZ_S", "3"))  # of each fuzzer; `make fuzz` takes 60
SEED = int(os.environ.get("RECO_FUZZ_SEED", "0"))

STRANGE_BYTES = (
    b"",
    b"\0",
    b"\xff" * 8,
    b"\xed\xa0\x80",
    b"%00",
    b"\r\n",
    b"{" * 300,
    b"9" * 5000,
    b"\x7f\xff\xff\xff",
)


def rounds() -> Iterator[random.Random]:
    """A generator of random numbers for each round, until the time is over. The n-th is the n-th of
    every run with this seed.
    """
    end, number = time.monotonic() + SECONDS, 0
    while time.monotonic() < end:
        yield random.Random(f"{SEED}/{number}")
        number += 1


def mutate_bytes(data: bytes, rng: random.Random, most: int = 8) -> bytes:
    """Flip, cut, repeat, move or insert, up to `most` times."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, most)):
        at, length = rng.randrange(len(changed) + 1), rng.choice((1, 2, 4, 8, 64, 1024))
        match rng.randrange(6):
            case 0:
                changed[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del changed[at : at + length]
            case 2:
                changed[at:at] = changed[at : at + length] * rng.choice((1, 2, 50))
            case 3:
                changed[at:at] = rng.choice(STRANGE_BYTES)
            case 4:
                changed[at : at + length] = bytes(rng.randrange(256) for _ in range(min(length, 64)))
            case _:
                del changed[at:]
    return bytes(changed)


def strange_value(rng: random.Random) -> Any:
    """A value that a JSON field seldom holds."""
    return rng.choice(
        (
            None, True, False, -1, 0, 2**31, 2**63, 2**64, -(2**70), 1e308, -0.0, "", "\0", "é" * 300, "x" * 100_000,
            "\ud83d", "../../etc/passwd", "a@b", "{}", "{0}", "%00", [], {}, [[]] * 50, [None] * 300, ["x"] * 300,
            {"a": {"b": [1, {"c": None}]}}, json.loads("[" * 200 + "]" * 200), [1.5] * 512, {"text": "a"}, {"image": ""},
        )
    )  # fmt: skip


def mutate_json(value: Any, rng: random.Random) -> Any:
    """The value with one to three places changed: replaced, removed, repeated or moved."""
    for _ in range(rng.randint(1, 3)):
        value = _mutate_once(value, rng)
    return value


def _mutate_once(value: Any, rng: random.Random) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        changed = dict(value)
        match rng.randrange(5):
            case 0:
                del changed[key]
            case 1:
                changed[rng.choice(("x", "", "\0", "id", "labels", "k", key + "s"))] = changed.pop(key)
            case _:
                changed[key] = _mutate_once(changed[key], rng)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        if rng.random() < 0.8:
            return [*value[:at], _mutate_once(value[at], rng), *value[at + 1 :]]
        return value * (300 if len(json.dumps(value)) < 10_000 else 2)  # a few megabytes at most
    return strange_value(rng)


def choose(seeds: Sequence[Any], rng: random.Random) -> Any:
    """One of the seeds."""
    return seeds[rng.randrange(len(seeds))]
