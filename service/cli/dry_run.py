"""`--dry-run`: what a build would hold, refuse, weigh and take, from headers and one measured batch. Nothing is written."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from index_store.build.index import FLAT, candidates
from index_store.build.source import Reject
from index_store.types import SIDES, Id, Pairs
from models.data.encode import encode_texts, reject_duplicate_ids
from models.data.samples import Sample
from models.data.sources import read_all
from models.data.streams import Encoding, Stream
from models.encoder.image_io import check_header
from models.errors import ImageError

if TYPE_CHECKING:
    from index_store.build.dedup import Deduplicator

OFFSET_BYTES = 8  # records.npy
LIST_ID_BYTES = 8  # what an inverted file holds beside each row


@dataclass(slots=True)
class Outlook:
    """What was found by looking. record_bytes: of all lines.  id_bytes: of the longest id, or 8."""

    items: int = 0
    pairs: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    record_bytes: int = 0
    id_bytes: int = 1
    seconds: float = 0.0
    seen: set[Id] = field(default_factory=set)

    def reject(self, reject: Reject) -> None:
        """Count one, by the part of its reason that it shares with others."""
        self.reasons[_kind(reject.reason)] += 1

    def keep(self, name: Id, record: dict[str, object]) -> None:
        """Count one pair."""
        self.pairs += 1
        self.record_bytes += len(json.dumps(record, ensure_ascii=False).encode("utf-8", "replace")) + 1
        self.id_bytes = max(self.id_bytes, 8 if isinstance(name, int) else len(name.encode("utf-8", "replace")))


def estimate(
    streams: Sequence[Stream], encoding: Encoding, *, index: str, shard_pairs: int, near: Deduplicator | None
) -> str:
    """A few lines for people."""
    outlook, encoded = Outlook(), sum(stream.items for stream in streams if stream.samples)
    for stream in streams:
        outlook.items += stream.items
        if stream.samples:
            _look(stream, encoding, outlook)
        else:
            _read(stream, outlook, near)
    sizes = weights(outlook, encoding, index, shard_pairs)
    seconds = outlook.seconds * encoded
    lines = [f"{outlook.items:,} items: about {outlook.pairs:,} pairs, {sum(outlook.reasons.values()):,} rejected"]
    lines += [f"  {count:,} × {reason}" for reason, count in outlook.reasons.most_common()]
    lines += [
        f"about {sum(sizes.values()):,} bytes on disk: " + ", ".join(f"{what} {size:,}" for what, size in sizes.items())
    ]
    lines += (
        [f"about {_span(seconds)} to encode, at {1 / outlook.seconds:,.0f} pairs a second measured on one batch"]
        if seconds
        else []
    )
    lines += (
        ["near-duplicates among what must first be encoded are not counted"] if near is not None and encoded else []
    )
    return "\n".join([*lines, "nothing was written"])


def weights(outlook: Outlook, encoding: Encoding, index: str, shard_pairs: int) -> dict[str, int]:
    """Bytes on disk by what they hold. An index other than flat is taken to hold every key in float16, as IVF…,SQfp16 does."""
    encoder, pairs = encoding.encoder, outlook.pairs
    width = {side: encoder.trunk_dim or 0 if encoding.kinds[side] == "trunk" else encoder.dim for side in SIDES}
    flat = candidates(index, min(pairs, shard_pairs), pairs)[0] == FLAT
    return {
        "values": pairs * 2 * 2 * encoder.dim,
        "keys": pairs * 2 * sum(width[side] for side in SIDES if encoding.kinds[side] != "vector"),
        "index": 0 if flat else pairs * sum(2 * width[side] + LIST_ID_BYTES for side in SIDES),
        "captions": outlook.record_bytes + pairs * OFFSET_BYTES,
        "ids": pairs * outlook.id_bytes,
    }


def _look(stream: Stream, encoding: Encoding, outlook: Outlook) -> None:
    """Read every item, but of its image no more than the header; then encode one batch of them."""
    batch: list[Sample] = []
    for item in reject_duplicate_ids(read_all(stream.samples, caption=encoding.caption), outlook.seen):
        found = _headed(item, encoding.max_pixels)
        if isinstance(found, Reject):
            outlook.reject(found)
            continue
        outlook.keep(found.id, {**found.metadata, "caption": found.caption})
        if len(batch) < encoding.batch:
            batch.append(found)
    if batch:
        outlook.seconds = max(outlook.seconds, _measured(batch, encoding))


def _headed(item: Sample | Reject, max_pixels: int) -> Sample | Reject:
    if isinstance(item, Reject):
        return item
    try:
        check_header(item.image, max_pixels=max_pixels)
    except ImageError as error:
        return Reject(item.id, str(error))
    return item


def _read(stream: Stream, outlook: Outlook, near: Deduplicator | None) -> None:
    """Where nothing is encoded, go through the very steps of a build."""
    steps = stream.steps(outlook.seen, 0)
    for step in steps if near is None else near.filter(steps):
        for reject in step.rejects:
            outlook.reject(reject)
        for name, record in _rows(step.pairs):
            outlook.keep(name, record)


def _rows(pairs: Pairs | None) -> Iterator[tuple[Id, dict[str, object]]]:
    if pairs is not None:
        yield from ((name, dict(record)) for name, record in zip(pairs.ids.tolist(), pairs.records, strict=True))


def _measured(batch: list[Sample], encoding: Encoding) -> float:
    """Seconds per pair of one batch, decoding included, the second time: the first also warms the model."""
    from models.data.encode import encode_images

    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        done = 0
        for kept, _seen in encode_images(batch, encoding.encoder, batch=encoding.batch, workers=encoding.workers):
            encode_texts([sample.caption for sample in kept], encoding.encoder)
            done += len(kept)
        seconds = (time.perf_counter() - start) / max(1, done)
    return seconds


def _kind(reason: str) -> str:
    """The reason without what differs from item to item."""
    if reason.startswith("near-duplicate"):
        return "near-duplicate of another"
    return " ".join(word for word in reason.partition(" (")[0].split() if not any(letter.isdigit() for letter in word))


def _span(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return (
        f"{hours:.1f} hours"
        if hours >= 1
        else f"{minutes:.0f} minutes"
        if minutes >= 2
        else f"{np.ceil(seconds):.0f} seconds"
    )
