"""`--dry-run`: estimate of a build's pairs, rejects, bytes and seconds. Nothing is written.

Image headers are read, not pixels; one batch is encoded and timed.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from index_store.build.index import FLAT, candidate_recipes
from index_store.build.source import Reject
from index_store.types import SIDES, Id, Pairs
from models.data.encode import encode_images, encode_texts, reject_duplicate_ids
from models.data.samples import Sample, read_all_images
from models.data.streams import Encoding, Stream
from models.encoder.image_io import check_header
from models.errors import ImageError

if TYPE_CHECKING:
    from index_store.build.dedup import Deduplicator

OFFSET_BYTES = 8  # of each record, in records.npy
LIST_ID_BYTES = 8  # of each row of an inverted list, beside its code


@dataclass(slots=True)
class BuildEstimate:
    """Counts of what a build would keep and reject.

    record_bytes: of all records as JSON lines.  id_bytes: of the longest id, 8 for an integer.
    seconds_per_pair: of decoding and encoding, 0 where nothing is encoded.
    """

    items: int = 0
    pairs: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    record_bytes: int = 0
    id_bytes: int = 1
    seconds_per_pair: float = 0.0
    seen: set[Id] = field(default_factory=set)

    def reject(self, reject: Reject) -> None:
        """Count one reject under the part of its reason that is the same for other items."""
        self.reasons[_shared_reason(reject.reason)] += 1

    def keep(self, name: Id, record: dict[str, object]) -> None:
        """Count one pair."""
        self.pairs += 1
        self.record_bytes += len(json.dumps(record, ensure_ascii=False).encode("utf-8", "replace")) + 1
        self.id_bytes = max(self.id_bytes, 8 if isinstance(name, int) else len(name.encode("utf-8", "replace")))


def estimate(
    streams: Sequence[Stream], encoding: Encoding, *, index: str, shard_pairs: int, near: Deduplicator | None
) -> str:
    """The estimate of a build of these streams, in lines for people.

    index, shard_pairs: as given to the build.  near: what drops near-duplicates, None for nothing.
    """
    found, to_encode = BuildEstimate(), sum(stream.items for stream in streams if stream.encodes)
    for stream in streams:
        found.items += stream.items
        if stream.parts:
            _read_headers(stream, encoding, found)
        else:
            _read_vectors(stream, found, None if stream.encodes else near)
    sizes = estimate_bytes(found, encoding, index, shard_pairs)
    seconds = found.seconds_per_pair * to_encode
    lines = [f"{found.items:,} items: about {found.pairs:,} pairs, {sum(found.reasons.values()):,} rejected"]
    lines += [f"  {count:,} × {reason}" for reason, count in found.reasons.most_common()]
    parts = ", ".join(f"{what} {size:,}" for what, size in sizes.items())
    lines.append(f"about {sum(sizes.values()):,} bytes on disk: {parts}")
    if seconds:
        rate = 1 / found.seconds_per_pair
        lines.append(f"about {_span(seconds)} to encode, at {rate:,.0f} pairs a second measured on one batch")
    if near is not None and to_encode:
        lines.append("near-duplicates among what must first be encoded are not counted")
    return "\n".join([*lines, "nothing was written"])


def estimate_bytes(found: BuildEstimate, encoding: Encoding, index: str, shard_pairs: int) -> dict[str, int]:
    """Bytes on disk by what they hold.

    An index other than flat is taken to hold every key in float16, as IVF…,SQfp16 does.
    """
    encoder, pairs = encoding.encoder, found.pairs
    width = {side: encoder.trunk_dim or 0 if encoding.kinds[side] == "trunk" else encoder.dim for side in SIDES}
    flat = candidate_recipes(index, min(pairs, shard_pairs), pairs)[0] == FLAT
    return {
        "values": pairs * 2 * 2 * encoder.dim,
        "keys": pairs * 2 * sum(width[side] for side in SIDES if encoding.kinds[side] != "vector"),
        "index": 0 if flat else pairs * sum(2 * width[side] + LIST_ID_BYTES for side in SIDES),
        "captions": found.record_bytes + pairs * OFFSET_BYTES,
        "ids": pairs * found.id_bytes,
    }


def _read_headers(stream: Stream, encoding: Encoding, found: BuildEstimate) -> None:
    """Count the items of a stream by their image headers; then encode one batch of those kept."""
    batch: list[Sample] = []
    items = (item for part in stream.parts for item in part.read(read_all_images))
    for item in reject_duplicate_ids(items, found.seen):
        checked = _check_header(item, encoding.max_pixels)
        if isinstance(checked, Reject):
            found.reject(checked)
            continue
        found.keep(checked.id, {**checked.metadata, "caption": checked.caption})
        if len(batch) < encoding.batch:
            batch.append(checked)
    if batch:
        found.seconds_per_pair = max(found.seconds_per_pair, _time_batch(batch, encoding))


def _check_header(item: Sample | Reject, max_pixels: int) -> Sample | Reject:
    if isinstance(item, Reject):
        return item
    try:
        check_header(item.image, max_pixels=max_pixels)
    except ImageError as error:
        return Reject(item.id, str(error))
    return item


def _read_vectors(stream: Stream, found: BuildEstimate, near: Deduplicator | None) -> None:
    """Count a stream whose vectors exist, by the same steps as a build."""
    steps = stream.steps(found.seen, {})
    for step in steps if near is None else near.filter(steps):
        for reject in step.rejects:
            found.reject(reject)
        for name, record in _records(step.pairs):
            found.keep(name, record)


def _records(pairs: Pairs | None) -> Iterator[tuple[Id, dict[str, object]]]:
    if pairs is not None:
        yield from ((name, dict(record)) for name, record in zip(pairs.ids.tolist(), pairs.records, strict=True))


def _time_batch(batch: list[Sample], encoding: Encoding) -> float:
    """Seconds per pair of decoding and encoding a batch, of the second run: the first warms up."""
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        done = 0
        for kept, _seen in encode_images(batch, encoding.encoder, batch=encoding.batch, workers=encoding.workers):
            encode_texts([sample.caption for sample in kept], encoding.encoder)
            done += len(kept)
        seconds = (time.perf_counter() - start) / max(1, done)
    return seconds


def _shared_reason(reason: str) -> str:
    """The reason without the values that differ from item to item."""
    if reason.startswith("near-duplicate"):
        return "near-duplicate of another"
    return " ".join(word for word in reason.partition(" (")[0].split() if not any(letter.isdigit() for letter in word))


def _span(seconds: float) -> str:
    """A duration in the unit that people would use.

    >>> _span(30.2), _span(600), _span(7200)
    ('31 seconds', '10 minutes', '2.0 hours')
    """
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{np.ceil(seconds):.0f} seconds"
