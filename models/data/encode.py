"""Encoding of samples to pairs: images decoded in threads, encoded in batches, in bounded memory.

Samples that cannot be used become rejects.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import numpy as np

from index_store.build.source import Reject, SourceStep
from index_store.types import MAX_ID_BYTES, Id, KeyKind, Pairs, Side
from models.data.samples import Sample
from models.encoder.encoder import Encoded, Encoder
from models.encoder.image_io import MAX_PIXELS
from models.errors import ImageError

# Batches that are decoded while one is encoded: enough to hide the decoding, and the bound on
# memory.
BATCHES_AHEAD = 2

T = TypeVar("T")
OnReject = Callable[[Reject], object]
OnProgress = Callable[[int], object]  # such as Meter.advance
PendingSample = tuple[Sample, "Future[np.ndarray]"]  # with its pixels (3, H, W) uint8 to come


def encode_samples(
    samples: Iterable[Sample | Reject],
    encoder: Encoder,
    *,
    kinds: Mapping[Side, KeyKind],
    batch: int = 32,
    workers: int = 2,
    max_pixels: int = MAX_PIXELS,
    on_reject: OnReject = lambda _: None,
    on_progress: OnProgress = lambda _: None,
    seen: set[Id] | None = None,
) -> Iterator[Pairs]:
    """Encode samples to blocks of pairs, in their order, with ids that are unique over all blocks.

    kinds: the search key of each side.  workers: decoding threads.
    on_progress: called with the number of further items done, rejects included.
    seen: the ids so far; those of the samples are added.
    """
    images = encode_images(
        reject_duplicate_ids(samples, seen),
        encoder,
        batch=batch,
        workers=workers,
        max_pixels=max_pixels,
        on_reject=on_reject,
        on_progress=on_progress,
    )
    for kept, image in images:
        yield pairs_of(kept, image, encoder, kinds)


def pairs_of(kept: list[Sample], image: Encoded, encoder: Encoder, kinds: Mapping[Side, KeyKind]) -> Pairs:
    """The pairs of samples whose images are encoded; their captions are encoded here."""
    text = encode_texts([sample.caption for sample in kept], encoder)
    return Pairs(
        ids=np.array([sample.id for sample in kept]),
        image=image.vectors,
        text=text.vectors,
        records=[{**sample.metadata, "caption": sample.caption} for sample in kept],
        image_key=image.key("trunk") if kinds["image"] == "trunk" else None,
        text_key=text.key("trunk") if kinds["text"] == "trunk" else None,
    )


def encode_steps(
    samples: Iterable[Sample | Reject],
    encoder: Encoder,
    *,
    kinds: Mapping[Side, KeyKind],
    seen: set[Id],
    done: Mapping[str, Collection[Id]] | None = None,
    batch: int = 32,
    workers: int = 2,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[SourceStep]:
    """The blocks of `encode_samples` as steps of a build.

    done: by origin, the ids that an earlier run has stored: these are neither decoded nor encoded.
    """
    rejects, counted, stored = list[Reject](), list[int](), list[Id]()
    images = encode_images(
        _remaining(reject_duplicate_ids(samples, seen), done or {}, stored),
        encoder,
        batch=batch,
        workers=workers,
        max_pixels=max_pixels,
        on_reject=rejects.append,
        on_progress=counted.append,
    )

    def step(pairs: Pairs | None, origins: Sequence[str]) -> SourceStep:
        made = SourceStep(pairs, sum(counted) + len(stored), tuple(rejects), origins, len(stored))
        for each in (counted, rejects, stored):
            each.clear()
        return made

    for kept, image in images:
        yield step(pairs_of(kept, image, encoder, kinds), [sample.origin for sample in kept])
    if counted or stored:
        yield step(None, ())


def _remaining(
    items: Iterable[Sample | Reject], done: Mapping[str, Collection[Id]], stored: list[Id]
) -> Iterator[Sample | Reject]:
    """The items without the samples that an earlier run has stored, whose ids go to `stored`."""
    for item in items:
        if isinstance(item, Sample) and item.id in done.get(item.origin, ()):
            stored.append(item.id)
        else:
            yield item


def encode_images(
    samples: Iterable[Sample | Reject],
    encoder: Encoder,
    *,
    batch: int = 32,
    workers: int = 2,
    max_pixels: int = MAX_PIXELS,
    on_reject: OnReject = lambda _: None,
    on_progress: OnProgress = lambda _: None,
) -> Iterator[tuple[list[Sample], Encoded]]:
    """Decode and encode the images of each batch: the samples that decode, and a row for each.

    Samples that share one bytes object are encoded once.
    """

    def decode(data: bytes) -> np.ndarray:
        return encoder.read_image(data, max_pixels=max_pixels)

    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        chunks = (_submit_decoding(chunk, pool, decode) for chunk in _chunks(samples, batch))
        for chunk in _run_ahead(chunks, BATCHES_AHEAD):
            rejects = [item for item in chunk if isinstance(item, Reject)]
            kept, pixels, rows = _collect_decoded([item for item in chunk if not isinstance(item, Reject)], rejects)
            for reject in rejects:
                on_reject(reject)
            encoded = encoder.encode(np.stack(pixels), "image").take(rows) if kept else None
            # before the batch is yielded, so that its receiver knows how many items it stands for
            on_progress(len(chunk))
            if encoded is not None:
                yield kept, encoded
    finally:
        pool.shutdown(cancel_futures=True)


def encode_texts(captions: list[str], encoder: Encoder) -> Encoded:
    """Encode captions (B, D); equal ones, common where the caption is a class, are encoded once."""
    row = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    distinct = encoder.encode(encoder.tokenize(list(row)), "text")
    return distinct.take([row[caption] for caption in captions])


def reject_duplicate_ids(samples: Iterable[Sample | Reject], seen: set[Id] | None = None) -> Iterator[Sample | Reject]:
    """The same stream, with samples whose id is a duplicate or invalid replaced by a Reject.

    seen: the ids so far; those of the samples are added.
    """
    seen = set() if seen is None else seen
    for item in samples:
        reason = invalid_id_reason(item.id, seen) if isinstance(item, Sample) else None
        if isinstance(item, Reject) or reason is None:
            yield item
        else:
            yield Reject(item.id, reason, "duplicate" if item.id in seen else "reject")
        if isinstance(item, Sample):
            seen.add(item.id)


def invalid_id_reason(name: str, seen: Collection[Id]) -> str | None:
    """Why no pair can have this id, or None where one can."""
    if name in seen:
        return "its id came before: ids must be unique"
    try:
        size = len(name.encode("utf-8"))
    except UnicodeEncodeError:
        return "its id is not UTF-8"
    if 0 < size <= MAX_ID_BYTES and "\0" not in name:
        return None
    return f"its id has {size} bytes: 1 to {MAX_ID_BYTES} without NUL are needed"


def _submit_decoding(
    chunk: list[Sample | Reject], pool: ThreadPoolExecutor, decode: Callable[[bytes], np.ndarray]
) -> list[PendingSample | Reject]:
    """Start decoding each image of a chunk, once for consecutive samples that share their bytes."""
    pending: list[PendingSample | Reject] = []
    last: PendingSample | None = None
    for item in chunk:
        if isinstance(item, Reject):
            pending.append(item)
            continue
        shared = last is not None and last[0].image is item.image
        last = (item, last[1] if last is not None and shared else pool.submit(decode, item.image))
        pending.append(last)
    return pending


def _collect_decoded(
    pending: list[PendingSample], rejects: list[Reject]
) -> tuple[list[Sample], list[np.ndarray], list[int]]:
    """Wait for the images: (samples that decoded, distinct images, each sample's image number).

    Samples that did not decode are added to `rejects`.
    """
    kept: list[Sample] = []
    images: list[np.ndarray] = []
    rows: list[int] = []
    for sample, future in pending:
        try:
            pixels = future.result()
        except ImageError as error:
            rejects.append(Reject(sample.id, str(error)))
            continue
        if not images or images[-1] is not pixels:
            images.append(pixels)
        kept.append(sample)
        rows.append(len(images) - 1)
    return kept, images, rows


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    source = iter(items)
    while chunk := list(islice(source, size)):
        yield chunk


def _run_ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """The same items, each yielded once `count` further ones have been taken from the source."""
    held: deque[T] = deque()
    for item in items:
        held.append(item)
        if len(held) > count:
            yield held.popleft()
    yield from held
