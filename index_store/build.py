"""Pairs in, a finished version out: everything beside the store's eyes, the manifest last, then one rename."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from index_store.durable import digest, replace_text, sync, writing
from index_store.filling import Content, Filling, fill, fill_from
from index_store.indexing import measure, recipe_for, write_index
from index_store.ledger import unfinished_version
from index_store.manifest import FILE_NAME, Manifest
from index_store.pairs import SIDES, KeyKind, Pairs, Side
from index_store.probes import DEPTH
from index_store.search import Fan
from index_store.shard import Shard
from index_store.steps import Job
from index_store.store import Store, plain, plain_version
from index_store.workplace import forget_notes, workplace


def build_version(
    store: Store,
    name: str,
    version: str | None,
    blocks: Iterable[Pairs] | Job,
    *,
    encoder: str,
    kinds: Mapping[Side, KeyKind],
    index: str = "auto",
    shard_pairs: int = 1_000_000,
    recall_floor: float = 0.99,
    parent: str | None = None,
    source: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
) -> Manifest:
    """Write the pairs of all blocks as one new version of a memory, and return its manifest; it is not activated.

    blocks: the pairs, or a Job: then a second run of the same job goes on where this one was stopped, and what was left out is listed
    in rejects-VERSION.jsonl beside the version.  version: None takes the next free name of today, or the one that the job was building.
    kinds: what each side's search compares.  index: "auto" or a faiss factory string.
    source: free JSON for the manifest; a callable is asked once all blocks are read, when the counts are known.
    Whatever stops it, a kill included, leaves no version: neither listed nor openable, and a second run succeeds.
    """
    job = blocks.digest(encoder=encoder, kinds=dict(kinds), shard_pairs=shard_pairs) if isinstance(blocks, Job) else ""
    version = _chosen(store, name, job) if version is None else plain_version(version)
    with workplace(store.root / plain(name), version) as work:
        filling = Filling(work, kinds, index, shard_pairs)
        content = fill_from(filling, blocks, job, version) if isinstance(blocks, Job) else fill(filling, blocks)
        _index_shards(work, content, index)
        draft = Manifest(
            name=name,
            version=version,
            encoder=encoder,
            **content.described(),
            index={"recipe": recipe_for(index, content.shards[0]["pairs"], content.pairs), "probes": 0},
            recall={"k": DEPTH, "floor": recall_floor, "image": 0.0, "text": 0.0},
            files=_digests(work, content.files),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            parent=parent,
            source=dict(source() if callable(source) else source or {}),
        )
        manifest = _measured(work, draft)
        _publish(work, manifest)
    return manifest


def _chosen(store: Store, name: str, job: str) -> str:
    """The version that an interrupted run of this job was building, else the next free name."""
    return unfinished_version(store.root / plain(name), job) or store.next_version(name)


def _index_shards(work: Path, content: Content, index: str) -> None:
    """Index every shard; one that an earlier run left is made again."""
    for number, shard in enumerate(content.shards):
        recipe = recipe_for(index, shard["pairs"], content.pairs)
        content.files += _write_indexes(work / shard["folder"], content, recipe, last=0 < number == len(content.shards) - 1)


def _write_indexes(path: Path, content: Content, recipe: str, *, last: bool) -> list[str]:
    """One index per side of one shard; the names written."""
    names = []
    for side in SIDES:
        file = f"{side}.npy" if content.keys[side]["kind"] == "vector" else f"{side}_key.npy"
        keys = np.asarray(np.load(path / file, mmap_mode="r", allow_pickle=False))
        names += write_index(path, side, keys, recipe, may_stay_flat=last)
    return names


def _measured(work: Path, draft: Manifest) -> Manifest:
    """Open the shards as a reader would, sample probe queries, and settle how many lists a search visits."""
    shards = [Shard(work, shard["folder"], shard["pairs"], draft) for shard in draft.shards]
    fans = {side: Fan(shards, side) for side in SIDES}
    probes, recall, questions = measure(fans, draft.recall["floor"], draft.index["recipe"])
    with writing("probes"):
        names = [name for side in SIDES for name in questions[side].write(work, side)]
    return dataclasses.replace(
        draft,
        index={**draft.index, "probes": probes},
        recall={**draft.recall, "k": min(DEPTH, draft.pairs), "image": recall["image"], "text": recall["text"]},
        files={**draft.files, **_digests(work, names)},
    )


def _digests(work: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    return {name: digest(work / name) for name in names}


def _publish(work: Path, manifest: Manifest) -> None:
    """Everything onto the disk, the manifest last, then the one rename that makes the version exist."""
    with writing(manifest.ref):
        for name in manifest.files:
            sync(work / name)
        for folder in {(work / name).parent for name in manifest.files}:
            sync(folder)
        replace_text(work / FILE_NAME, manifest.to_json())
        finished = work.with_name(manifest.version)
        work.rename(finished)
        sync(finished.parent)
    forget_notes(finished)
