"""What a build is made of, whatever it comes from: stretches of known length whose steps can be begun anywhere."""

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
from models.data.sources import SKIP_ALL, files_of, read_all
from models.encoder.encoder import Encoder
from models.encoder.image_io import MAX_PIXELS


@dataclass(frozen=True, slots=True)
class Stream:
    """One stretch of input.

    name: for people.  items: how many it has, rejects included.  identity: JSON that changes where its files do.
    steps: (ids taken so far, items to pass over) -> what remains.  samples: the files to look into, none where nothing is encoded.
    version: the name@version whose pairs they are, if any.
    """

    name: str
    items: int
    identity: Any
    steps: Callable[[set[Id], int], Iterator[SourceStep]]
    samples: Sequence[Path] = ()
    version: str | None = None


@dataclass(frozen=True, slots=True)
class Encoding:
    """How samples become pairs. caption: a template or None, as in `read_samples`."""

    encoder: Encoder
    kinds: Mapping[Side, KeyKind]
    caption: str | None = None
    batch: int = 32
    workers: int = 2
    max_pixels: int = MAX_PIXELS


def count_items(sources: Iterable[Path], caption: str | None) -> int:
    """How many items some sources of samples have; no image is read."""
    return sum(1 for _ in read_all(sources, caption=caption, skip=SKIP_ALL))


def build_streams(sources: Sequence[Path], encoding: Encoding, count: Callable[[Sequence[Path]], int]) -> list[Stream]:
    """Neighbouring sources of samples as one stream, each version of our own as another.  count: items of sources of samples."""
    found: list[Stream] = []
    for ours, group in groupby(sources, is_version):
        paths = list(group)
        found += [version_stream(path, encoding.encoder.fingerprint, encoding.kinds) for path in paths] if ours else []
        found += [] if ours else [sample_stream(paths, encoding, count(paths))]
    return found


def sample_stream(sources: Sequence[Path], encoding: Encoding, items: int) -> Stream:
    """Images and captions to encode."""

    def steps(seen: set[Id], skip: int) -> Iterator[SourceStep]:
        samples = read_all(sources, caption=encoding.caption, skip=skip)
        return encode_steps(
            samples, encoding.encoder, kinds=encoding.kinds, seen=seen, skip=skip, batch=encoding.batch, workers=encoding.workers,
            max_pixels=encoding.max_pixels,
        )  # fmt: skip

    identity = [
        _stamps([file for source in sources for file in files_of(source)]),
        encoding.caption,
        encoding.max_pixels,
    ]
    return Stream(", ".join(source.name for source in sources), items, identity, steps, sources)


def version_stream(path: Path, encoder: str, kinds: Mapping[Side, KeyKind]) -> Stream:
    """The pairs of a finished version."""
    manifest = stored_manifest(path, encoder=encoder, kinds=kinds)

    def steps(seen: set[Id], skip: int) -> Iterator[SourceStep]:
        return stored_steps(path, manifest, kinds=kinds, seen=seen, skip=skip)

    return Stream(manifest.ref, manifest.pairs, manifest.to_json(), steps, version=manifest.ref)


def embedding_stream(source: EmbeddingFolder) -> Stream:
    """Embeddings made elsewhere."""

    def steps(seen: set[Id], skip: int) -> Iterator[SourceStep]:
        return embedding_steps(source, seen=seen, skip=skip)

    return Stream(source.name, source.rows, [_stamps(source.files), source.id_column], steps)


def chain_streams(
    streams: Iterable[Stream], done: BuildProgress, near: Deduplicator | None = None
) -> Iterator[SourceStep]:
    """The steps of all streams that an earlier run has not done, near-duplicates dropped where asked."""
    if near is None:
        return _chained(streams, done.items)
    near.restore(done.kept())
    return near.filter(_chained(streams, done.items))


def _chained(streams: Iterable[Stream], skip: int) -> Iterator[SourceStep]:
    seen = set[Id]()
    for stream in streams:
        passed = min(skip, stream.items)
        skip -= passed
        yield from stream.steps(seen, passed)


def _stamps(files: Iterable[Path]) -> list[list[str | int]]:
    """Path, size and time of change: of a folder that is its table, since asking after every image would take minutes."""
    return [[str(path.resolve()), (stat := path.stat()).st_size, stat.st_mtime_ns] for path in files]
