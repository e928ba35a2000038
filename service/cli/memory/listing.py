"""`reco memory list`, `show` and `verify`: what lies in the store."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from models.progress import progress
from service.cli.memory.tables import age, print_table, size
from service.cli.options import STORE, complete_memory, with_settings
from service.cli.paths import check_output_file
from service.settings import Settings

if TYPE_CHECKING:
    from index_store import Store
    from index_store.storage.manifest import Manifest

COLUMNS = ("memory", "version", "", "pairs", "index", "recall@10", "mapped", "resident", "age", "encoder")

app = typer.Typer(rich_markup_mode=None)
Ref = Annotated[
    str,
    typer.Argument(metavar="NAME[@VERSION]", help="without a version: the current one", autocompletion=complete_memory),
]


@app.command("list")
@with_settings(*STORE)
def list_memories(
    settings: Settings, as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False
) -> None:
    """Print a table of every version; one that cannot be read is named with its reason.

    Unfinished builds follow, with their age and size.
    """
    from index_store import Store
    from index_store.build.staging import unfinished_builds

    store = Store(settings.store)
    found = [version for name in store.names() for version in _versions(store, name)]
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    if not found:
        print(f"no memory in {store.root}: build one with `reco memory build NAME SOURCE`", file=sys.stderr)
    else:
        print_table([COLUMNS, *(_row(version) for version in found)], titled=True)
    for build in unfinished_builds(store.root):
        ref = f"{build.name}@{build.version}"
        went_on = age(datetime.fromtimestamp(build.changed, UTC).isoformat())
        print(
            f"{ref} is unfinished: {build.pairs:,} pairs, {size(build.size)}, {went_on} old; the command that began it "
            f"goes on, `reco memory delete {ref}` removes it",
            file=sys.stderr,
        )
    for version in found:
        if "error" in version:
            print(version["error"], file=sys.stderr)


@app.command("show")
@with_settings(*STORE)
def show(
    settings: Settings,
    ref: Ref,
    as_json: Annotated[bool, typer.Option("--json", help="print its manifest instead")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="draw recall against latency as measured at the build")
    ] = None,
) -> None:
    """Print one version as a table or as its manifest; draw its curve where asked."""
    from index_store import Store

    check_output_file(plot, "--plot")
    store = Store(settings.store)
    name, version = _split_ref(store, ref)
    manifest, current = store.manifest(name, version), version == _current(store, name)
    if plot:
        from service.cli.memory.plot import draw_curve

        draw_curve(manifest, plot)
    if as_json:
        print(json.dumps({**asdict(manifest), "current": current}, indent=2, ensure_ascii=False))
        return
    edits = ("edits", f"{store.count_edits(name, version):,} made online on top of it")
    print_table([*_describe(manifest, current), edits])
    print()
    print_table([("recipe", "lists visited", "recall@10", "ms/query"), *_curve(manifest)], titled=True)


@app.command("verify")
@with_settings(*STORE)
def verify(settings: Settings, ref: Ref) -> None:
    """Read every byte of a version and of its edits, then answer its probe queries."""
    from index_store import Store

    store = Store(settings.store)
    name, version = _split_ref(store, ref)
    manifest = store.manifest(name, version)
    with progress(sum(int(file["bytes"]) for file in manifest.files.values()), f"verify {manifest.ref}", "B") as meter:
        store.verify(name, version, on_progress=meter.advance)
    snapshot = store.open(name, version, encoder=manifest.encoder)
    recall = snapshot.check_recall()
    print(
        f"{snapshot.ref}: {len(manifest.files)} files, {size(manifest.bytes['mapped'])}, as they were written; "
        f"recall@10 image {recall['image']:.3f}, text {recall['text']:.3f}"
    )


def _versions(store: Store, name: str) -> list[dict[str, Any]]:
    """Facts of every version of one memory; of one that cannot be read, its error."""
    from index_store import StoreError

    serving, found = _current(store, name), []
    for version in store.versions(name):
        facts: dict[str, Any] = {"name": name, "version": version, "current": version == serving}
        try:
            facts |= _facts(store.manifest(name, version))
        except StoreError as error:
            facts["error"] = str(error)
        found.append(facts)
    return found


def _facts(manifest: Manifest) -> dict[str, Any]:
    """What the list says of a version. recall: at 10, of the worse side.  Sizes in bytes."""
    return {
        "pairs": manifest.pairs,
        "index": manifest.index["recipe"],
        "recall": min(manifest.recall[side] for side in ("image", "text")),
        "mapped_bytes": manifest.bytes["mapped"],
        "resident_bytes": manifest.bytes["resident"],
        "created": manifest.created,
        "encoder": manifest.encoder,
    }


def _row(version: dict[str, Any]) -> tuple[str, ...]:
    """One line of the list, as COLUMNS names them."""
    head = (version["name"], version["version"], "current" if version["current"] else "")
    if "error" in version:
        return (*head, "not readable", *[""] * 6)
    sizes = [size(version[f"{tier}_bytes"]) for tier in ("mapped", "resident")]
    recall = f"{version['recall']:.3f}"
    return (
        *head, f"{version['pairs']:,}", version["index"], recall, *sizes, age(version["created"]), version["encoder"],
    )  # fmt: skip


def _describe(manifest: Manifest, current: bool) -> list[tuple[str, str]]:
    """What one version is, a fact a row."""
    index, recall, tiers = manifest.index, manifest.recall, manifest.bytes
    visited = f", {index['probes']} lists visited per query" if index["probes"] else ""
    keys = ", ".join(f"{side} {manifest.key_kind(side)} {manifest.key_dim(side)}" for side in ("image", "text"))
    shards = f"{len(manifest.shards)} shard{'s' * (len(manifest.shards) > 1)}"
    return [
        ("version", manifest.ref + (" (current)" if current else "")),
        ("age", f"{age(manifest.created)}, built {manifest.created}"),
        ("parent", manifest.parent or "none"),
        ("encoder", manifest.encoder),
        ("pairs", f"{manifest.pairs:,} in {shards}, vectors of {manifest.dim}"),
        ("searched", keys),
        ("index", f"{index['recipe']}{visited}; asked for: {index['asked']}"),
        ("recall", f"image {recall['image']:.4f}, text {recall['text']:.4f} at {recall['k']}, floor {recall['floor']}"),
        ("bytes", f"{size(tiers['mapped'])} mapped in {len(manifest.files)} files, {size(tiers['resident'])} resident"),
        ("source", json.dumps(manifest.source, ensure_ascii=False)),
    ]


def _curve(manifest: Manifest) -> list[tuple[str, str, str, str]]:
    """The settings of the index measured at the build, the one that serves marked with <."""
    rows = []
    for point in manifest.index["curve"]:
        serves = all(point[key] == manifest.index[key] for key in ("recipe", "probes"))
        rows.append(
            (
                point["recipe"],
                str(point["probes"] or "all"),
                f"{point['recall']:.4f}",
                f"{point['ms']:.3f}" + " <" * serves,
            )
        )
    return rows


def _split_ref(store: Store, ref: str) -> tuple[str, str]:
    """The name and the version of NAME[@VERSION], by default the current one."""
    name, _, version = ref.partition("@")
    return name, version or store.current(name)


def _current(store: Store, name: str) -> str | None:
    """The version being served, None where none was ever activated."""
    from index_store import StoreError

    try:
        return store.current(name)
    except StoreError:
        return None
