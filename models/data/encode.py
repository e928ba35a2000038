"""Samples to pairs: decode in threads, encode in batches, reject what cannot be used, all in bounded memory."""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
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

AHEAD = 2  # batches being decoded while one is encoded: enough to hide the decoding, and the bound on memory

T = TypeVar("T")
OnReject = Callable[[Reject], object]
OnProgress = Callable[[int], object]  # such as Meter.advance
Decoding = tuple[Sample, "Future[np.ndarray]"]


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
    """Blocks of encoded pairs in the order of the samples, their ids unique over all of them.

    kinds: what a search on each side will compare.  on_progress: told how many more samples were dealt with, rejects included.
    seen: ids taken before, added to.
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
    for kept, viewed in images:
        read = encode_texts([sample.caption for sample in kept], encoder)
        yield Pairs(
            ids=np.array([sample.id for sample in kept]),
            image=viewed.vectors,
            text=read.vectors,
            records=[{**sample.metadata, "caption": sample.caption} for sample in kept],
            image_key=viewed.key("trunk") if kinds["image"] == "trunk" else None,
            text_key=read.key("trunk") if kinds["text"] == "trunk" else None,
        )


def encode_steps(
    samples: Iterable[Sample | Reject],
    encoder: Encoder,
    *,
    kinds: Mapping[Side, KeyKind],
    seen: set[Id],
    skip: int = 0,
    batch: int = 32,
    workers: int = 2,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[SourceStep]:
    """The same blocks as steps of a build.  skip: samples passed over, neither decoded nor encoded; their ids count as taken."""
    stream = iter(samples)
    seen.update(item.id for item in islice(stream, skip) if isinstance(item, Sample))
    rejects, dealt = list[Reject](), list[int]()
    blocks = encode_samples(
        stream, encoder, kinds=kinds, batch=batch, workers=workers, max_pixels=max_pixels, on_reject=rejects.append,
        on_progress=dealt.append, seen=seen,
    )  # fmt: skip
    for pairs in blocks:
        yield SourceStep(pairs, sum(dealt), tuple(rejects))
        dealt.clear()
        rejects.clear()
    if dealt:
        yield SourceStep(None, sum(dealt), tuple(rejects))


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
    """The readable samples of each batch with their encoded images; samples that share one bytes object are encoded once."""

    def decode(data: bytes) -> np.ndarray:
        return encoder.read_image(data, max_pixels=max_pixels)

    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        for chunk in _ahead((_submitted(chunk, pool, decode) for chunk in _chunks(samples, batch)), AHEAD):
            rejects = [item for item in chunk if isinstance(item, Reject)]
            kept, pixels, rows = _collect([item for item in chunk if not isinstance(item, Reject)], rejects)
            for reject in rejects:
                on_reject(reject)
            encoded = encoder.encode(np.stack(pixels), "image").take(rows) if kept else None
            on_progress(
                len(chunk)
            )  # before the batch is given out: whoever holds it knows how many items it stands for
            if encoded is not None:
                yield kept, encoded
    finally:
        pool.shutdown(cancel_futures=True)


def encode_texts(captions: list[str], encoder: Encoder) -> Encoded:
    """The encoded captions (B, D); equal ones, common where the caption is a class, are encoded once."""
    column = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    read = encoder.encode(encoder.tokenize(list(column)), "text")
    return read.take([column[caption] for caption in captions])


def reject_duplicate_ids(samples: Iterable[Sample | Reject], seen: set[Id] | None = None) -> Iterator[Sample | Reject]:
    """The same stream, with each sample whose id came before, or cannot be stored, turned into a Reject.  seen: ids, added to."""
    seen = set() if seen is None else seen
    for item in samples:
        reason = invalid_id_reason(item.id, seen) if isinstance(item, Sample) else None
        if isinstance(item, Reject) or reason is None:
            yield item
        else:
            yield Reject(item.id, reason)
        if isinstance(item, Sample):
            seen.add(item.id)


def invalid_id_reason(name: str, seen: Collection[Id]) -> str | None:
    """Why no pair can have this id, None where one can."""
    if name in seen:
        return "its id came before: ids must be unique"
    try:
        size = len(name.encode("utf-8"))
    except UnicodeEncodeError:
        return "its id is not UTF-8"
    return (
        None
        if 0 < size <= MAX_ID_BYTES and "\0" not in name
        else f"its id has {size} bytes: 1 to {MAX_ID_BYTES} without NUL are needed"
    )


def _submitted(
    chunk: list[Sample | Reject], pool: ThreadPoolExecutor, decode: Callable[[bytes], np.ndarray]
) -> list[Decoding | Reject]:
    """The chunk with the decoding of each image begun, once where neighbours share their bytes."""
    begun: list[Decoding | Reject] = []
    last: Decoding | None = None
    for item in chunk:
        if isinstance(item, Reject):
            begun.append(item)
            continue
        shared = last is not None and last[0].image is item.image
        last = (item, last[1] if last is not None and shared else pool.submit(decode, item.image))
        begun.append(last)
    return begun


def _collect(decodings: list[Decoding], rejects: list[Reject]) -> tuple[list[Sample], list[np.ndarray], list[int]]:
    """The samples whose image decoded, the distinct pixels, and for each sample the row of its own; the others join the rejects."""
    kept: list[Sample] = []
    pixels: list[np.ndarray] = []
    rows: list[int] = []
    for sample, future in decodings:
        try:
            decoded = future.result()
        except ImageError as error:
            rejects.append(Reject(sample.id, str(error)))
            continue
        if not pixels or pixels[-1] is not decoded:
            pixels.append(decoded)
        kept.append(sample)
        rows.append(len(pixels) - 1)
    return kept, pixels, rows


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    source = iter(items)
    while chunk := list(islice(source, size)):
        yield chunk


def _ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """The same items, each given out only once `count` more have been begun."""
    held: deque[T] = deque()
    for item in items:
        held.append(item)
        if len(held) > count:
            yield held.popleft()
    yield from held
