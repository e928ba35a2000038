"""Builds of a version: pairs are written into a staging folder, the manifest last, then it is
renamed.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from index_store.build.checkpoint import refuse_other_build, unfinished_version
from index_store.build.index import index_version
from index_store.build.shards import VersionWriter, write_blocks, write_source
from index_store.build.source import BuildSource
from index_store.build.staging import BLOCKS, remove_build_files, staging_folder
from index_store.search.probes import RECALL_K
from index_store.storage.atomic import file_digests, fsync_path, replace_text, translate_write_errors
from index_store.storage.checksums import FileStats, record_verified
from index_store.storage.layout import partial_folder
from index_store.storage.manifest import MANIFEST_FILE, Manifest
from index_store.store import Store, check_name, check_version_name
from index_store.types import KeyKind, Pairs, Side

READ_ONLY = 0o444  # a version never changes, and truncating a mapped file raises SIGBUS


def build_version(
    store: Store,
    name: str,
    version: str | None,
    blocks: Iterable[Pairs] | BuildSource,
    *,
    encoder: str,
    kinds: Mapping[Side, KeyKind],
    index: str = "auto",
    shard_pairs: int = 1_000_000,
    recall_floor: float = 0.99,
    parent: str | None = None,
    source: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
) -> Manifest:
    """Write the pairs of all blocks as one new version of a memory; return its manifest.

    blocks: pairs, or a source, which resumes an interrupted build and lists its rejects in
    rejects-VERSION.jsonl.  version: None = the unfinished build's, or the next free name.
    index: "auto" or a faiss factory string.  kinds: what each side's search compares.
    source: JSON for the manifest; a callable is called last. A stopped build leaves no version.
    """
    job = blocks if isinstance(blocks, BuildSource) else None
    digest = "" if job is None else job.digest(encoder=encoder, kinds=dict(kinds), shard_pairs=shard_pairs)
    version = _choose_version(store, name, version, job, digest)
    with staging_folder(store.root / check_name(name), version) as work:
        writer = VersionWriter(work, kinds, index, shard_pairs)
        content = (
            write_blocks(writer, blocks)
            if isinstance(blocks, Iterable)
            else write_source(writer, blocks, digest, version)
        )
        fields = {**content.manifest_fields(), "index": {"asked": index}, "parent": parent}
        recall = {"k": RECALL_K, "floor": recall_floor}
        created = datetime.now(UTC).isoformat(timespec="seconds")
        origin = dict(source() if callable(source) else source or {})
        draft = Manifest(
            name=name, version=version, encoder=encoder, recall=recall, created=created, source=origin, **fields
        )
        return _publish(work, *index_version(work, draft))


def _choose_version(store: Store, name: str, version: str | None, job: BuildSource | None, digest: str) -> str:
    """The given version, else the one that an interrupted run of this job was building, else the
    next free name.

    Raises VersionExists for the name of an unfinished build of something else.
    """
    store.remove_deleted(name)
    memory = store.root / name
    for blocks in memory.glob(f"[!.]*/{BLOCKS}"):
        remove_build_files(blocks.parent)  # a kill has left them in a finished version
    if version is None:
        return (job and unfinished_version(memory, job, digest)) or store.next_version(name)
    check_version_name(version)
    if job is not None:
        refuse_other_build(partial_folder(memory, version), job, digest, f"{name}@{version}")
    return version


def _publish(work: Path, indexed: Manifest, written: Iterable[str]) -> Manifest:
    """Sync all files, write the manifest last, then rename the folder, which publishes the version.

    written: files written after those of the shards.
    """
    names = [*indexed.files, *written]
    for name in names:
        (work / name).chmod(READ_ONLY)  # changes the ctime, so before the stats are collected
    stats = FileStats.collect(work, names)  # before the digests, so that the first opening need not read the files
    manifest = dataclasses.replace(indexed, files=file_digests(work, names))
    with translate_write_errors(manifest.ref):
        for name in manifest.files:
            fsync_path(work / name)
        for folder in {(work / name).parent for name in manifest.files}:
            fsync_path(folder)
        replace_text(work / MANIFEST_FILE, manifest.to_json())
        (work / MANIFEST_FILE).chmod(READ_ONLY)
        finished = work.with_name(manifest.version)
        work.rename(finished)
        fsync_path(finished.parent)
    remove_build_files(finished)
    record_verified(finished, manifest, stats)
    return manifest
