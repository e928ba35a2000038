"""Carrying out a build: its options, its plan, the counts that must balance, and its report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from models.progress import progress
from service.settings import UsageError

if TYPE_CHECKING:
    from index_store import Store
    from index_store.build.dedup import Deduplicator
    from index_store.build.source import BuildProgress, BuildSource, SourceStep
    from index_store.storage.manifest import Manifest
    from index_store.types import KeyKind, Side
    from models.data.streams import Encoding, Stream
    from models.encoder.encoder import Encoder


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
    """Counts of one build: items read, pairs stored, and what was left out, by kind."""

    items: int = 0
    pairs: int = 0
    before: int = 0  # of the pairs, those that earlier runs stored
    near_duplicates: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    def add(self, step: SourceStep) -> None:
        """Count one step."""
        self.items += step.items
        self.before += step.stored
        self.pairs += step.stored + (0 if step.pairs is None else len(step.pairs))
        self.left_out.update(reject.kind for reject in step.rejects)
        self.near_duplicates += sum(reject.reason.startswith("near-duplicate of") for reject in step.rejects)

    @property
    def rejected(self) -> int:
        """Items left out, near-duplicates aside."""
        return self.left_out.total() - self.near_duplicates

    def summary(self) -> str:
        """The sum of what became of all items. Raises RuntimeError where it does not balance."""
        folded, duplicates, rejects = (self.left_out[kind] for kind in ("folded", "duplicate", "reject"))
        line = (
            f"{self.items} items = {self.pairs} pairs + {folded} captions folded + {duplicates} duplicates "
            f"+ {rejects} rejects"
        )
        if self.items != self.pairs + folded + duplicates + rejects:
            raise RuntimeError(f"the counts of the build do not balance ({line}): this is a bug, report it")
        return line


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be built, from which streams, into which store.

    reading: JSON of how the sources are read, part of what makes two builds the same.
    key_choice: how the image key was chosen, for the manifest.
    """

    name: str
    options: VersionOptions
    store: Store
    encoder: Encoder
    streams: list[Stream]
    kinds: Mapping[Side, KeyKind]
    reading: Any = None
    key_choice: Mapping[str, Any] | None = None

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


def carry_out(plan: Plan, encoding: Encoding) -> None:
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
    if options.activate or not _has_current(plan.store, manifest.name):
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


def _has_current(store: Store, name: str) -> bool:
    """Whether a version of the memory is current: the first one built becomes it."""
    from index_store.errors import UnknownVersion

    try:
        store.current(name)
    except UnknownVersion:
        return False
    return True


def build_source(plan: Plan, tally: Tally, meter: Any) -> BuildSource:
    """The plan's streams as a source that a stopped build goes on from."""
    from index_store.build.source import BuildSource
    from models.data.streams import chain_streams

    def steps(done: BuildProgress) -> Iterator[SourceStep]:
        meter.start_at(done.pairs)
        for step in chain_streams(plan.streams, done, plan.deduplicator()):
            tally.add(step)
            yield step
            meter.advance(step.items - step.stored)
        tally.summary()  # before the version exists

    identity = {"reading": plan.reading, "dedup": plan.options.dedup}
    origins = frozenset(origin for stream in plan.streams for origin in stream.origins)
    return BuildSource(identity, steps, origins, fresh=plan.options.fresh)


def _build_version(plan: Plan, tally: Tally) -> Manifest:
    from index_store import build_version

    options = plan.options
    with progress(plan.items, plan.name) as meter:
        return build_version(
            plan.store,
            plan.name,
            options.version,
            build_source(plan, tally, meter),
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
    if tally.left_out["folded"]:
        facts["folded"] = tally.left_out["folded"]
    if plan.key_choice:
        facts["image_key"] = dict(plan.key_choice)
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
    print(tally.summary())
    if tally.rejected or tally.near_duplicates:
        print(f"what was left out, and why: {rejects_path(plan.store.root / manifest.name, manifest.version)}")
