"""`reco memory list`, `show` and `verify`: what lies in the store, told as tables."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from index_store import Store, StoreError
from index_store.types import SIDES
from service.cli.commands import settings_of

if TYPE_CHECKING:
    from index_store.storage.manifest import Manifest

Args = argparse.Namespace


def list_memories(args: Args) -> None:
    """reco memory list: a table of every version; why one cannot be read is told below it."""
    store = Store(settings_of(args).store)
    rows: list[tuple[str, ...]] = [
        ("memory", "version", "", "pairs", "index", "recall@10", "mapped", "resident", "age", "encoder")
    ]
    reasons = []
    for name in store.names():
        serving = _current(store, name)
        for version in store.versions(name):
            mark = "current" if version == serving else ""
            try:
                rows.append((name, version, mark, *_facts(store.manifest(name, version))))
            except StoreError as error:
                rows.append((name, version, mark, "not readable", *[""] * 6))
                reasons.append(str(error))
    if len(rows) == 1:
        print(f"no memory in {store.root}: build one with `reco memory build NAME SOURCE`", file=sys.stderr)
        return
    print(_table(rows))
    for reason in reasons:
        print(reason, file=sys.stderr)


def show(args: Args) -> None:
    """reco memory show: one version as a table, as its manifest, or its curve as a picture."""
    store = Store(settings_of(args).store)
    name, version = _parts(store, args.ref)
    manifest, current = store.manifest(name, version), version == _current(store, name)
    if args.plot:
        from service.cli.plot import draw_curve

        draw_curve(manifest, args.plot)
    if args.json:
        print(json.dumps({**asdict(manifest), "current": current}, indent=2, ensure_ascii=False))
        return
    print(
        _table([*_described(manifest, current), ("edits", f"{store.edits(name, version):,} made online on top of it")])
    )
    print("\n" + _table([("recipe", "lists visited", "recall@10", "ms/query"), *_curve(manifest)]))


def verify(args: Args) -> None:
    """reco memory verify: every byte, of its edits too, then the probe queries."""
    store = Store(settings_of(args).store)
    name, version = _parts(store, args.ref)
    store.verify(name, version)
    manifest = store.manifest(name, version)
    snapshot = store.open(name, version, encoder=manifest.encoder)
    recall = snapshot.prove()
    print(
        f"{snapshot.ref}: {len(manifest.files)} files, {size(manifest.bytes['mapped'])}, as they were written; "
        f"recall@10 image {recall['image']:.3f}, text {recall['text']:.3f}"
    )


def size(count: int) -> str:
    """Bytes as people read them.

    >>> size(0), size(999), size(8_157_144), size(2_048_000_000)
    ('0', '999 B', '8.2 MB', '2.0 GB')
    """
    if count < 1000:
        return f"{count} B" if count else "0"
    amount, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount >= 999.95:
            amount, unit = amount / 1000, larger
    return f"{amount:.1f} {unit}"


def age(created: str, now: datetime | None = None) -> str:
    """How long ago a moment in ISO 8601 was, in its largest whole unit.

    >>> age("2026-11-22T09:30:00+00:00", datetime(2026, 11, 24, 10, tzinfo=UTC))
    '2 d'
    """
    seconds = ((now or datetime.now(UTC)) - datetime.fromisoformat(created)).total_seconds()
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def _facts(manifest: Manifest) -> tuple[str, ...]:
    """What the list tells of one version."""
    tiers = [size(manifest.bytes[tier]) for tier in ("mapped", "resident")]
    recall = f"{min(manifest.recall[side] for side in SIDES):.3f}"
    return f"{manifest.pairs:,}", manifest.index["recipe"], recall, *tiers, age(manifest.created), manifest.encoder


def _described(manifest: Manifest, current: bool) -> list[tuple[str, str]]:
    """What one version is, a fact a row."""
    index, recall, tiers = manifest.index, manifest.recall, manifest.bytes
    visited = f", {index['probes']} lists visited per query" if index["probes"] else ""
    keys = ", ".join(f"{side} {manifest.key_kind(side)} {manifest.key_dim(side)}" for side in SIDES)
    return [
        ("version", manifest.ref + (" (current)" if current else "")),
        ("age", f"{age(manifest.created)}, built {manifest.created}"),
        ("parent", manifest.parent or "none"),
        ("encoder", manifest.encoder),
        (
            "pairs",
            f"{manifest.pairs:,} in {len(manifest.shards)} shard{'s' * (len(manifest.shards) > 1)}, vectors of {manifest.dim}",
        ),
        ("searched", keys),
        ("index", f"{index['recipe']}{visited}; asked for: {index['asked']}"),
        ("recall", f"image {recall['image']:.4f}, text {recall['text']:.4f} at {recall['k']}, floor {recall['floor']}"),
        ("bytes", f"{size(tiers['mapped'])} mapped in {len(manifest.files)} files, {size(tiers['resident'])} resident"),
        ("source", json.dumps(manifest.source, ensure_ascii=False)),
    ]


def _curve(manifest: Manifest) -> list[tuple[str, str, str, str]]:
    """The points measured at the build, the one that serves marked."""
    chosen = (manifest.index["recipe"], manifest.index["probes"])
    return [
        (
            point["recipe"],
            str(point["probes"] or "all"),
            f"{point['recall']:.4f}",
            f"{point['ms']:.3f}" + " <" * (_key(point) == chosen),
        )
        for point in manifest.index["curve"]
    ]


def _key(point: dict[str, object]) -> tuple[object, object]:
    return point["recipe"], point["probes"]


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _parts(store: Store, ref: str) -> tuple[str, str]:
    name, _, version = ref.partition("@")
    return name, version or store.current(name)


def _current(store: Store, name: str) -> str | None:
    """The version being served, None where none was ever activated."""
    try:
        return store.current(name)
    except StoreError:
        return None
