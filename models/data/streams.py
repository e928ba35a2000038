"""Build inputs as streams: each has a known number of items and can be resumed at any of them.

A stream is a group of sample sources, a finished version, or a folder of embeddings.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from index_store.build.dedup import Deduplicator
from index_store.build.from_version import is_version, stored_manifest, stored_steps
from index_store.build.source import BuildProgress, SourceStep
from index_store.types import Id, KeyKind, Side
from models.data.clip_retrieval import EmbeddingFolder, embedding_steps
from models.data.encode import encode_steps
from models.data.sources import SKIP_ALL, identity_files, read_all
from models.encoder.encoder import Encoder
from models.encoder.image_io import MAX_PIXELS


@dataclass(frozen=True, slots=True)
class Stream:
    """One part of a build's input.

    name: for display.  items: their number, rejects included.
    identity: a JSON value that changes when the input files do.
    steps: (ids so far, items to skip) -> the remaining steps.
    samples: the sample sources, empty where nothing is encoded.
    version: name@version of the version that is read, if it is one.
    """

    name: str
    items: int
    identity: Any
    steps: Callable[[set[Id], int], Iterator[SourceStep]]
    samples: Sequence[Path] = ()
    version: str | None = None


@dataclass(frozen=True, slots=True)
class Encoding:
    """How samples are encoded to pairs. Fields as in `read_samples` and `encode_samples`."""

    encoder: Encoder
    kinds: Mapping[Side, KeyKind]
    caption: str | None = None
    batch: int = 32
    workers: int = 2
    max_pixels: int = MAX_PIXELS


def count_items(sources: Iterable[Path], caption: str | None) -> int:
    """The number of items of sample sources, rejects included. No image is read."""
    return sum(1 for _ in read_all(sources, caption=caption, skip=SKIP_ALL))


def build_streams(sources: Sequence[Path], encoding: Encoding, count: Callable[[Sequence[Path]], int]) -> list[Stream]:
    """One stream per group of consecutive sample sources, and one per finished version.

    count: the number of items of sample sources, such as `count_items`.
    """
    streams: list[Stream] = []
    for versions, group in groupby(sources, is_version):
        paths = list(group)
        if versions:
            streams += [version_stream(path, encoding.encoder.fingerprint, encoding.kinds) for path in paths]
        else:
            streams.append(sample_stream(paths, encoding, count(paths)))
    return streams


def sample_stream(sources: Sequence[Path], encoding: Encoding, items: int) -> Stream:
    """A stream that encodes images and captions. items: their number."""

    def steps(seen: set[Id], skip: int) -> Iterator[SourceStep]:
        samples = read_all(sources, caption=encoding.caption, skip=skip)
        return encode_steps(
            samples,
            encoding.encoder,
            kinds=encoding.kinds,
            seen=seen,
            skip=skip,
            batch=encoding.batch,
            workers=encoding.workers,
            max_pixels=encoding.max_pixels,
        )

    identity = [
        _file_stamps([file for source in sources for file in identity_files(source)]),
        encoding.caption,
        encoding.max_pixels,
    ]
    return Stream(", ".join(source.name for source in sources), items, identity, steps, sources)


def version_stream(path: Path, encoder: str, kinds: Mapping[Side, KeyKind]) -> Stream:
    """A stream of the pairs of a finished version."""
    manifest = stored_manifest(path, encoder=encoder, kinds=kinds)

    def steps(seen: set[Id], skip: int) -> Iterator[SourceStep]:
        return stored_steps(path, manifest, kinds=kinds, seen=seen, skip=skip)

    return Stream(manifest.ref, manifest.pairs, manifest.to_json(), steps, version=manifest.ref)


def embedding_stream(source: EmbeddingFolder) -> Stream:
    """A stream of precomputed embeddings."""

    def steps(seen: set[Id], skip: int) -> Iterator[SourceStep]:
        return embedding_steps(source, seen=seen, skip=skip)

    return Stream(source.name, source.rows, [_file_stamps(source.files), source.id_column], steps)


def chain_streams(
    streams: Iterable[Stream], done: BuildProgress, near: Deduplicator | None = None
) -> Iterator[SourceStep]:
    """The steps of all streams that an earlier run has not done.

    near: drops near-duplicate pairs, None = all are kept.
    """
    if near is None:
        return _remaining_steps(streams, done.items)
    near.restore(done.kept())
    return near.filter(_remaining_steps(streams, done.items))


def _remaining_steps(streams: Iterable[Stream], skip: int) -> Iterator[SourceStep]:
    seen = set[Id]()
    for stream in streams:
        skipped = min(skip, stream.items)
        skip -= skipped
        yield from stream.steps(seen, skipped)


def _file_stamps(files: Iterable[Path]) -> list[list[str | int]]:
    """Path, size and modification time of each file.

    Of a folder only the table counts: a stat of every image would take minutes.
    """
    return [[str(path.resolve()), (stat := path.stat()).st_size, stat.st_mtime_ns] for path in files]
