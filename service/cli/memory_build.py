"""`reco memory build` and `reco memory import`: from files to a finished version, stopped and gone on with at will."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from index_store import Store, build_version
from index_store.build.from_version import is_version
from index_store.store import plain, plain_version
from service.cli.commands import Args, progress, settings_of
from service.settings import Settings, UsageError

if TYPE_CHECKING:
    from index_store.build.dedup import Deduplicator
    from index_store.build.source import Done, Reject, Step
    from index_store.storage.manifest import Manifest
    from index_store.types import KeyKind, Side
    from models.data.streams import Encoding, Stream
    from models.encoder.encoder import Encoder

UNVERIFIABLE = (
    "nothing can check that these vectors came from {encoder}: if another encoder made them every neighbour will be wrong; "
    "name the right one with --model and --pretrained"
)


@dataclass(slots=True)
class Tally:
    """What one build has dealt with, this run and those before it."""

    items: int = 0
    before: int = 0  # items that an earlier run dealt with
    rejected: int = 0
    near_duplicates: int = 0

    def begin(self, done: Done) -> None:
        """Go on from what an earlier run did."""
        self.items = self.before = done.items
        self._count(done.rejects())

    def add(self, step: Step) -> None:
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
    """What is to be built, and of what."""

    args: Args
    store: Store
    encoder: Encoder
    streams: list[Stream]
    kinds: Mapping[Side, KeyKind]

    @property
    def items(self) -> int:
        """Of all streams."""
        return sum(stream.items for stream in self.streams)

    @property
    def parent(self) -> str | None:
        """The version that all pairs come from, None where there are several sources, or another kind of them."""
        return self.streams[0].version if len(self.streams) == 1 else None

    def near(self) -> Deduplicator | None:
        """What drops near-duplicates, where asked."""
        from index_store.build.dedup import Deduplicator

        return None if self.args.dedup is None else Deduplicator(self.args.dedup)


def build(args: Args) -> None:
    """reco memory build: encode the sources into one new version."""
    from models.data.sources import expand_sources
    from models.data.streams import Encoding, build_streams, count_items
    from service.pipeline.load import load_encoder

    settings = _checked(args)
    sources = expand_sources(args.sources)
    counts = {
        source: count_items([source], args.caption) for source in sources if not is_version(source)
    }  # bad ones are told at once
    encoder = load_encoder(settings)
    kinds: dict[Side, KeyKind] = {"image": args.image_key, "text": "vector"}
    encoding = Encoding(encoder, kinds, args.caption, settings.max_batch, settings.decode_workers, settings.max_pixels)
    streams = build_streams(sources, encoding, lambda paths: sum(counts[path] for path in paths))
    _carry_out(Plan(args, Store(settings.store), encoder, streams, kinds), encoding)


def import_embeddings(args: Args) -> None:
    """reco memory import: one new version of embeddings made elsewhere, or of another version."""
    from models.data.clip_retrieval import is_embedding_folder, read_embedding_folder
    from models.data.streams import Encoding, embedding_stream, version_stream
    from models.errors import DataError
    from service.pipeline.load import load_encoder

    settings = _checked(args)
    folder: Path = args.folder.resolve()
    if not is_version(folder) and not is_embedding_folder(folder):
        raise DataError(
            f"{folder.name} holds neither img_emb, text_emb and metadata nor a version of our own: give a folder that does"
        )
    encoder = load_encoder(settings)
    kinds: dict[Side, KeyKind] = {"image": "vector", "text": "vector"}
    if is_version(folder):
        from index_store.storage.manifest import read_manifest

        kinds = {"image": read_manifest(folder).key_kind("image"), "text": read_manifest(folder).key_kind("text")}
        streams = [version_stream(folder, encoder.fingerprint, kinds)]
    else:
        streams = [
            embedding_stream(
                read_embedding_folder(folder, dim=encoder.dim, encoder=encoder.fingerprint, id_column=args.id)
            )
        ]
        print(UNVERIFIABLE.format(encoder=encoder.fingerprint))
    _carry_out(Plan(args, Store(settings.store), encoder, streams, kinds), Encoding(encoder, kinds))


def _checked(args: Args) -> Settings:
    """The settings, once names and numbers are known to be right: nothing is read for a build that cannot be written."""
    plain(args.name)
    if args.version is not None:
        plain_version(args.version)
    if args.keep is not None and args.keep < 1:
        raise UsageError(f"--keep {args.keep}: at least 1, the version that is built")
    return settings_of(args)


def _carry_out(plan: Plan, encoding: Encoding) -> None:
    """Build it, or with --dry-run only say what would be built."""
    if plan.args.dry_run:
        from service.cli.dry_run import estimate

        print(
            estimate(plan.streams, encoding, index=plan.args.index, shard_pairs=plan.args.shard_pairs, near=plan.near())
        )
        return
    tally = Tally()
    try:
        manifest = _built(plan, tally)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(
            f"stopped at {tally.items:,} of {plan.items:,} items; run the same command again to go on"
        ) from stop
    _tell(plan, manifest, tally)
    if plan.args.activate:
        plan.store.activate(manifest.name, manifest.version)
        print(
            f"{manifest.ref} is what the next start serves; a running service swaps with `reco memory activate {manifest.ref} --url URL`"
        )
    if plan.args.keep is not None:
        for version in plan.store.prune(manifest.name, plan.args.keep):
            print(
                f"{manifest.name}@{version} is deleted: the newest {plan.args.keep} are kept, the current and the previous one aside"
            )


def _built(plan: Plan, tally: Tally) -> Manifest:
    from index_store.build.source import BuildSource
    from models.data.streams import chain_streams

    args, near = plan.args, plan.near()
    with progress(plan.items, args.name) as bar:

        def steps(done: Done) -> Iterator[Step]:
            tally.begin(done)
            bar.initial = bar.n = done.items  # the rate is that of this run
            for step in chain_streams(plan.streams, done, near):
                tally.add(step)
                yield step
                bar.update(step.items)

        job = BuildSource(
            {"streams": [stream.identity for stream in plan.streams], "dedup": args.dedup}, steps, fresh=args.fresh
        )
        return build_version(
            plan.store, args.name, args.version, job, encoder=plan.encoder.fingerprint, kinds=plan.kinds, index=args.index,
            shard_pairs=args.shard_pairs, recall_floor=args.recall_floor, parent=plan.parent, source=lambda: _source(plan, tally),
        )  # fmt: skip


def _source(plan: Plan, tally: Tally) -> dict[str, Any]:
    """What the manifest tells of where its pairs came from."""
    told: dict[str, Any] = {
        "sources": [stream.name for stream in plan.streams],
        "items": tally.items,
        "rejected": tally.rejected,
    }
    if plan.args.dedup is not None:
        told |= {"dedup": plan.args.dedup, "near_duplicates": tally.near_duplicates}
    return told


def _tell(plan: Plan, manifest: Manifest, tally: Tally) -> None:
    from index_store.storage.layout import rejects_file

    dropped = f", {tally.near_duplicates} near-duplicates dropped" if plan.args.dedup is not None else ""
    before = f"; {tally.before:,} of {tally.items:,} items were done by a run before" if tally.before else ""
    print(
        f"{manifest.ref}: {manifest.pairs} pairs, index {manifest.index['recipe']}, {tally.rejected} rejected{dropped}{before}"
    )
    if tally.rejected or tally.near_duplicates:
        print(f"what was left out, and why: {rejects_file(plan.store.root / manifest.name, manifest.version)}")
