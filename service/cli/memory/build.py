"""`reco memory build` and `reco memory import`: from sources to a finished version.

A build that was interrupted goes on where it stopped when the same command is run again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from models.progress import progress
from service.cli.options import MODEL, complete_memory, with_settings
from service.settings import Settings, UsageError

if TYPE_CHECKING:
    from index_store import Store
    from index_store.build.dedup import Deduplicator
    from index_store.build.source import BuildProgress, Reject, SourceStep
    from index_store.storage.manifest import Manifest
    from index_store.types import KeyKind, Side
    from models.data.streams import Encoding, Stream
    from models.encoder.encoder import Encoder

UNVERIFIABLE = (
    "nothing can check that these vectors came from {encoder}: if another encoder made them every neighbour will be "
    "wrong; name the right one with --model and --pretrained"
)
SOURCES = (
    "webdataset .tar files or folders of them, folders with captions.csv, .jsonl or .parquet, or finished versions"
)

app = typer.Typer(rich_markup_mode=None)
Name = Annotated[str, typer.Argument(metavar="NAME", autocompletion=complete_memory)]


@dataclass(frozen=True, slots=True)
class VersionOptions:
    """Flags of every command that makes a version."""

    version: Annotated[str | None, typer.Option(metavar="VERSION", help="default: today and a letter")] = None
    index: Annotated[str, typer.Option(metavar="auto|FACTORY", help="'auto', or a faiss factory string")] = "auto"
    shard_pairs: Annotated[int, typer.Option(metavar="N", help="pairs of one shard")] = 1_000_000
    recall_floor: Annotated[float, typer.Option(metavar="R", help="recall@10 that the index must reach")] = 0.99
    dedup: Annotated[
        float | None,
        typer.Option(metavar="COSINE", help="drop pairs whose image and text both come this near to an earlier one"),
    ] = None
    dry_run: Annotated[bool, typer.Option("--dry-run", help="count and estimate only, write nothing")] = False
    fresh: Annotated[
        bool, typer.Option("--fresh", help="begin anew where an interrupted run could be gone on from")
    ] = False
    activate: Annotated[
        bool, typer.Option("--activate", help="make it the version that the next `reco serve` serves")
    ] = False
    keep: Annotated[
        int | None,
        typer.Option(metavar="N", help="delete older versions but the newest N; the current and the previous one stay"),
    ] = None

    def check(self, name: str) -> None:
        """Refuse names and numbers before any source is read. Raises NameRefused, UsageError."""
        from index_store.store import check_name, check_version_name

        check_name(name)
        if self.version is not None:
            check_version_name(self.version)
        if self.keep is not None and self.keep < 1:
            raise UsageError(f"--keep {self.keep}: at least 1, the version that is built")


@dataclass(slots=True)
class Tally:
    """Counts of one build: items read, by this run and by earlier ones, and what was left out."""

    items: int = 0
    before: int = 0  # items that earlier runs read
    rejected: int = 0
    near_duplicates: int = 0

    def begin(self, done: BuildProgress) -> None:
        """Take over the counts of an earlier run."""
        self.items = self.before = done.items
        self._count(done.rejects())

    def add(self, step: SourceStep) -> None:
        """Count one step."""
        self.items += step.items
        self._count(step.rejects)

    def _count(self, rejects: Iterable[Reject]) -> None:
        for reject in rejects:
            near = reject.reason.startswith("near-duplicate of")
            self.near_duplicates += near
            self.rejected += not near


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be built, from which streams, into which store."""

    name: str
    options: VersionOptions
    store: Store
    encoder: Encoder
    streams: list[Stream]
    kinds: Mapping[Side, KeyKind]

    @property
    def items(self) -> int:
        """Items of all streams."""
        return sum(stream.items for stream in self.streams)

    @property
    def parent(self) -> str | None:
        """The version that all pairs come from, None for several sources or another kind."""
        return self.streams[0].version if len(self.streams) == 1 else None

    def deduplicator(self) -> Deduplicator | None:
        """What drops near-duplicates, None without --dedup."""
        from index_store.build.dedup import Deduplicator

        return None if self.options.dedup is None else Deduplicator(self.options.dedup)


@app.command("build")
@with_settings(*MODEL)
def build(
    settings: Settings,
    name: Name,
    sources: Annotated[list[Path], typer.Argument(metavar="SOURCE", help=SOURCES)],
    options: VersionOptions,
    caption: Annotated[
        str | None,
        typer.Option(metavar="TEMPLATE", help="over the item's JSON fields or columns, such as 'a photo of {class}'"),
    ] = None,
    image_key: Annotated[Literal["vector", "trunk"], typer.Option(help="what the image search compares")] = "vector",
) -> None:
    """Encode the sources into one new version."""
    from index_store import Store
    from index_store.build.from_version import is_version
    from models.data.sources import expand_sources
    from models.data.streams import Encoding, build_streams, count_items
    from service.pipeline.load import load_encoder

    options.check(name)
    sources = expand_sources(sources)
    # counted first: a source that cannot be read is refused before the model is loaded
    counts = {source: count_items([source], caption) for source in sources if not is_version(source)}
    encoder = load_encoder(settings)
    kinds: dict[Side, KeyKind] = {"image": image_key, "text": "vector"}
    encoding = Encoding(encoder, kinds, caption, settings.max_batch, settings.decode_workers, settings.max_pixels)
    streams = build_streams(sources, encoding, lambda paths: sum(counts[path] for path in paths))
    _carry_out(Plan(name, options, Store(settings.store), encoder, streams, kinds), encoding)


@app.command("import")
@with_settings(*MODEL)
def import_embeddings(
    settings: Settings,
    name: Name,
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="holds img_emb/*.npy, text_emb/*.npy and metadata/*.parquet")
    ],
    options: VersionOptions,
    id_column: Annotated[
        str | None,
        typer.Option(
            "--id",
            metavar="COLUMN",
            help="of the metadata, that names a pair (default key, image_path, url, else its number)",
        ),
    ] = None,
) -> None:
    """Make one new version of embeddings made elsewhere, or of another version."""
    from index_store import Store
    from models.data.streams import Encoding
    from service.pipeline.load import load_encoder

    options.check(name)
    folder = folder.resolve()
    _check_folder(folder)
    encoder = load_encoder(settings)
    stream, kinds = _open_folder(folder, encoder, id_column)
    _carry_out(Plan(name, options, Store(settings.store), encoder, [stream], kinds), Encoding(encoder, kinds))


def _check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be imported, before a model is loaded. Raises DataError."""
    from index_store.build.from_version import is_version
    from models.data.clip_retrieval import is_embedding_folder
    from models.errors import DataError

    if not is_version(folder) and not is_embedding_folder(folder):
        raise DataError(
            f"{folder.name} holds neither img_emb, text_emb and metadata nor a version of our own: give a folder "
            "that does"
        )


def _open_folder(folder: Path, encoder: Encoder, id_column: str | None) -> tuple[Stream, dict[Side, KeyKind]]:
    """The stream of a version, or of embeddings made elsewhere, and what each side searches."""
    from index_store.build.from_version import is_version
    from index_store.storage.manifest import read_manifest
    from models.data.clip_retrieval import read_embedding_folder
    from models.data.streams import embedding_stream, version_stream

    if is_version(folder):
        manifest = read_manifest(folder)
        kinds: dict[Side, KeyKind] = {side: manifest.key_kind(side) for side in ("image", "text")}
        return version_stream(folder, encoder.fingerprint, kinds), kinds
    found = read_embedding_folder(folder, dim=encoder.dim, encoder=encoder.fingerprint, id_column=id_column)
    print(UNVERIFIABLE.format(encoder=encoder.fingerprint))
    return embedding_stream(found), {"image": "vector", "text": "vector"}


def _carry_out(plan: Plan, encoding: Encoding) -> None:
    """Build the version, or with --dry-run print what would be built."""
    options = plan.options
    if options.dry_run:
        from service.cli.memory.dry_run import estimate

        near = plan.deduplicator()
        print(estimate(plan.streams, encoding, index=options.index, shard_pairs=options.shard_pairs, near=near))
        return
    tally = Tally()
    try:
        manifest = _build_version(plan, tally)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(
            f"stopped at {tally.items:,} of {plan.items:,} items; run the same command again to go on"
        ) from stop
    _report(plan, manifest, tally)
    if options.activate:
        plan.store.activate(manifest.name, manifest.version)
        print(
            f"{manifest.ref} is what the next start serves; a running service swaps with "
            f"`reco memory activate {manifest.ref} --url URL`"
        )
    if options.keep is not None:
        for version in plan.store.prune(manifest.name, options.keep):
            print(
                f"{manifest.name}@{version} is deleted: the newest {options.keep} are kept, the current and the "
                "previous one aside"
            )


def _build_version(plan: Plan, tally: Tally) -> Manifest:
    from index_store import build_version
    from index_store.build.source import BuildSource
    from models.data.streams import chain_streams

    options, near = plan.options, plan.deduplicator()
    with progress(plan.items, plan.name) as meter:

        def steps(done: BuildProgress) -> Iterator[SourceStep]:
            tally.begin(done)
            meter.start_at(done.items)
            for step in chain_streams(plan.streams, done, near):
                tally.add(step)
                yield step
                meter.advance(step.items)

        identity = {"streams": [stream.identity for stream in plan.streams], "dedup": options.dedup}
        return build_version(
            plan.store,
            plan.name,
            options.version,
            BuildSource(identity, steps, fresh=options.fresh),
            encoder=plan.encoder.fingerprint,
            kinds=plan.kinds,
            index=options.index,
            shard_pairs=options.shard_pairs,
            recall_floor=options.recall_floor,
            parent=plan.parent,
            source=lambda: _describe_source(plan, tally),
        )


def _describe_source(plan: Plan, tally: Tally) -> dict[str, Any]:
    """What the manifest says of where its pairs came from."""
    facts: dict[str, Any] = {
        "sources": [stream.name for stream in plan.streams],
        "items": tally.items,
        "rejected": tally.rejected,
    }
    if plan.options.dedup is not None:
        facts |= {"dedup": plan.options.dedup, "near_duplicates": tally.near_duplicates}
    return facts


def _report(plan: Plan, manifest: Manifest, tally: Tally) -> None:
    """Print what was built, and where the list of rejects lies."""
    from index_store.storage.layout import rejects_path

    dropped = f", {tally.near_duplicates} near-duplicates dropped" if plan.options.dedup is not None else ""
    before = f"; {tally.before:,} of {tally.items:,} items were done by a run before" if tally.before else ""
    print(
        f"{manifest.ref}: {manifest.pairs} pairs, index {manifest.index['recipe']}, {tally.rejected} rejected"
        f"{dropped}{before}"
    )
    if tally.rejected or tally.near_duplicates:
        print(f"what was left out, and why: {rejects_path(plan.store.root / manifest.name, manifest.version)}")
