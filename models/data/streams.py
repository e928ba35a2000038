"""Build inputs as streams: each has a known number of items and can be resumed at any of them.

A stream is a group of sample sources, a finished version, or a folder of embeddings.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, groupby
from pathlib import Path

import numpy as np

from index_store.build.dedup import Deduplicator
from index_store.build.from_version import is_version, read_compatible_manifest, read_steps
from index_store.build.source import BuildProgress, SourceStep
from index_store.types import Id, KeyKind, Side
from models.data.clip_retrieval import EmbeddingFolder, embedding_steps
from models.data.encode import encode_steps, encode_texts
from models.data.folders.files import digest_of, stamp
from models.data.samples import Part, Reading, Sample, read_no_image
from models.data.sources import PrefixedPart, open_sources
from models.encoder.encoder import Encoder
from models.encoder.image_io import MAX_PIXELS

Stored = Mapping[str, Collection[Id]]  # ids that an earlier run has stored, by origin
TEXT_BATCH = 256  # captions encoded at once beside embeddings


@dataclass(frozen=True, slots=True)
class Stream:
    """One part of a build's input.

    name: for display.  items: their number, rejects included.
    origins: digests of its files, which change when these do.
    steps: (ids so far, ids stored by an earlier run by origin) -> the remaining steps.
    parts: of the sample sources, empty where no image is encoded.
    encodes: whether images or captions are encoded.
    version: name@version of the version that is read, if it is one.
    """

    name: str
    items: int
    origins: frozenset[str]
    steps: Callable[[set[Id], Stored], Iterator[SourceStep]]
    parts: Sequence[Part] = ()
    encodes: bool = False
    version: str | None = None


@dataclass(frozen=True, slots=True)
class Encoding:
    """How samples are encoded to pairs. Fields as in `open_sources` and `encode_samples`."""

    encoder: Encoder
    kinds: Mapping[Side, KeyKind]
    reading: Reading = field(default_factory=Reading)
    batch: int = 32
    workers: int = 2
    max_pixels: int = MAX_PIXELS


def count_parts(
    parts: Sequence[Part], on_progress: Callable[[int], object] = lambda _: None
) -> tuple[list[Part], list[int]]:
    """The parts with ids that no two of them share, and the number of items of each.

    No image is read. A part of which an earlier one has some ids gets a prefix of its own.
    on_progress: called with the number of further items counted.
    """
    known, taken = set[str](), set[str]()
    separate, counts = list[Part](), list[int]()
    for part in parts:
        own, items = set[str](), 0
        for item in part.read(read_no_image):
            items += 1
            if isinstance(item, Sample):
                own.add(item.id)
            on_progress(1)
        if shared := len(own & known):
            prefix = _free_label(part.label, taken, own, known)
            part, own = PrefixedPart(part, f"{prefix}/", shared), {f"{prefix}/{name}" for name in own}
        taken.add(part.label)
        known |= own
        separate.append(part)
        counts.append(items)
    return separate, counts


def _free_label(label: str, taken: set[str], own: set[str], known: set[str]) -> str:
    """A prefix that no part has, and with which no id of this part (`own`) is one of `known`."""
    labels = (label if number == 1 else f"{label}-{number}" for number in count(1))
    return next(each for each in labels if each not in taken and known.isdisjoint(f"{each}/{name}" for name in own))


def build_streams(
    sources: Sequence[Path], encoding: Encoding, on_progress: Callable[[int], object] = lambda _: None
) -> list[Stream]:
    """One stream per group of consecutive sample sources, and one per finished version.

    on_progress: called with the number of further items counted.  Raises DataError.
    """
    return opened_streams(open_streams(sources, encoding.reading, on_progress), encoding)


def opened_streams(opened: Sequence[Path | tuple[list[Part], int]], encoding: Encoding) -> list[Stream]:
    """The streams of what `open_streams` found. Raises StoreError for another encoder's version."""
    return [
        version_stream(found, encoding.encoder.fingerprint, encoding.kinds)
        if isinstance(found, Path)
        else sample_stream(found[0], found[1], encoding)
        for found in opened
    ]


def open_streams(
    sources: Sequence[Path], reading: Reading, on_progress: Callable[[int], object] = lambda _: None
) -> list[Path | tuple[list[Part], int]]:
    """The finished versions among the sources, and the parts between them with their items.

    It needs no encoder: a source that cannot be read is refused before a model is loaded.
    """
    found: list[Path | tuple[list[Part], int]] = []
    groups = [(versions, list(group)) for versions, group in groupby(sources, is_version)]
    opened = [paths if versions else open_sources(paths, reading) for versions, paths in groups]
    parts, counts = count_parts([each for group in opened for each in group if not isinstance(each, Path)], on_progress)
    at = 0
    for group in opened:
        if any(isinstance(each, Path) for each in group):
            found += [each for each in group if isinstance(each, Path)]
            continue
        found.append((parts[at : at + len(group)], sum(counts[at : at + len(group)])))
        at += len(group)
    return found


def sample_stream(parts: Sequence[Part], items: int, encoding: Encoding) -> Stream:
    """A stream that encodes images and captions. items: their number."""

    def steps(seen: set[Id], stored: Stored) -> Iterator[SourceStep]:
        def skip(origin: str, name: str) -> bool:
            return name in stored.get(origin, ())

        return encode_steps(
            (item for part in parts for item in part.read(skip)),
            encoding.encoder,
            kinds=encoding.kinds,
            seen=seen,
            done=stored,
            batch=encoding.batch,
            workers=encoding.workers,
            max_pixels=encoding.max_pixels,
        )

    origins = frozenset(origin for part in parts for origin in part.origins)
    return Stream(", ".join(part.name for part in parts), items, origins, steps, parts, encodes=True)


def version_stream(path: Path, encoder: str, kinds: Mapping[Side, KeyKind]) -> Stream:
    """A stream of the pairs of a finished version."""
    manifest = read_compatible_manifest(path, encoder=encoder, kinds=kinds)
    origin = digest_of("version", manifest.to_json())

    def steps(seen: set[Id], stored: Stored) -> Iterator[SourceStep]:
        return read_steps(path, manifest, kinds=kinds, seen=seen, origin=origin, done=stored.get(origin, ()))

    return Stream(manifest.ref, manifest.pairs, frozenset([origin]), steps, version=manifest.ref)


def embedding_stream(source: EmbeddingFolder, encoder: Encoder, *, dry_run: bool = False) -> Stream:
    """A stream of precomputed embeddings; captions without vectors are encoded.

    dry_run: only count, with one unit vector in their place.
    """
    origin = digest_of("embeddings", [stamp(path) for path in source.files], source.id_column)

    def encode(captions: list[str]) -> np.ndarray:
        if dry_run:
            return np.eye(1, encoder.dim, dtype=np.float32).repeat(len(captions), axis=0)
        blocks = [captions[at : at + TEXT_BATCH] for at in range(0, len(captions), TEXT_BATCH)]
        return np.concatenate([encode_texts(block, encoder).vectors for block in blocks])

    def steps(seen: set[Id], stored: Stored) -> Iterator[SourceStep]:
        return embedding_steps(source, seen=seen, origin=origin, done=stored.get(origin, ()), encode=encode)

    encodes = any("text" not in part.sides for part in source.parts)
    return Stream(source.name, source.rows, frozenset([origin]), steps, encodes=encodes)


def chain_streams(
    streams: Iterable[Stream], done: BuildProgress, near: Deduplicator | None = None
) -> Iterator[SourceStep]:
    """The steps of all streams, without what an earlier run has stored.

    near: drops near-duplicate pairs, None = all are kept.
    """
    seen, stored = set[Id](), done.stored()
    steps = (step for stream in streams for step in stream.steps(seen, stored))
    if near is None:
        return steps
    near.restore(done.kept())
    return near.filter(steps)
