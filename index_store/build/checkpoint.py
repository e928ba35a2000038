"""Checkpoints of a build: which stored rows are valid, so that a stopped build can be resumed."""

import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from index_store.build.ids import read_ids_by_origin, to_id_array
from index_store.build.source import BuildProgress, BuildSource, Reject, SourceStep, StoredRows
from index_store.build.staging import IDS, LOCK, PROGRESS, REJECTS, BuildState, read_state
from index_store.errors import VersionExists
from index_store.storage.atomic import fsync_path, replace_text, translate_write_errors
from index_store.storage.columns import map_rows, open_lines
from index_store.types import SIDES, Id, Side

log = logging.getLogger("reco")
KEPT_ROWS = 8192  # rows of one block given back to a source that goes on


def find_earlier_state(work: Path, job: BuildSource, digest: str) -> BuildState | None:
    """State of an earlier run of this job in the folder, cut to the rows that this run may keep.

    None where the build starts from zero, which is logged where stored pairs are discarded.
    """
    if not (work / PROGRESS).exists():
        return None
    found = read_state(work)
    if found is None:
        log.warning("%s: what an interrupted build left cannot be read, it begins anew", work.parent.name)
        return None
    kept = usable_rows(work, found, job, digest)
    if job.fresh or not kept:
        why = "as asked" if job.fresh else "its sources or options were others"
        log.warning("%s: an interrupted build of %d pairs is forgotten, %s", work.parent.name, found.pairs, why)
    elif not _is_complete(work, found):
        log.warning("%s: what an interrupted build left is damaged, it begins anew", work.parent.name)
    else:
        if kept < found.pairs:
            lost = found.pairs - kept
            log.warning("%s: %d of %d pairs are kept; %d came from or after a source that has changed",
                        work.parent.name, kept, found.pairs, lost)  # fmt: skip
        return found.first_rows(kept)
    return None


def usable_rows(work: Path, found: BuildState, job: BuildSource, digest: str) -> int:
    """Number of leading stored rows that a run of this job may keep."""
    if found.job != digest:
        return 0
    if job.origins is None:
        return found.pairs
    rows = 0
    with suppress(OSError, ValueError), (work / IDS).open("rb") as file:
        for line in islice(file, found.pairs):
            if json.loads(line)[1] not in job.origins:
                break
            rows += 1
    return rows


def unfinished_version(memory: Path, job: BuildSource, digest: str) -> str | None:
    """The unfinished version of which this job can keep the most rows; None without one."""
    usable = dict[str, int]()
    for path in sorted(memory.glob(f".*.partial/{PROGRESS}")):
        found = read_state(path.parent)
        if found is not None and (rows := usable_rows(path.parent, found, job, digest)):
            usable[path.parent.name[1:].removesuffix(".partial")] = rows
    return max(usable, key=lambda version: usable[version]) if usable else None


def refuse_other_build(work: Path, job: BuildSource, digest: str, ref: str) -> None:
    """Raise VersionExists where the folder holds an unfinished build that this job cannot resume,
    since its pairs would be lost.
    """
    found = read_state(work)
    if found is not None and not job.fresh and found.pairs and not usable_rows(work, found, job, digest):
        raise VersionExists(
            f"{ref} is the unfinished build of other sources or options, with {found.pairs} pairs: choose another "
            "version, or begin anew with --fresh"
        )


def remove_uncounted(work: Path, progress: BuildState) -> None:
    """Remove files that the state does not cover: partial indexes, and shards begun after the last
    checkpoint.
    """
    known = {folder for folder, _ in progress.rows()}
    files = {*progress.files, *(f"{progress.open_folder}/{name}" for name in _row_files(progress.keys))}
    with translate_write_errors(work.parent.name):
        for entry in work.iterdir():
            if entry.is_dir() and entry.name not in known:
                shutil.rmtree(entry)
            elif entry.is_file() and entry.name not in (LOCK, PROGRESS, IDS, REJECTS):
                entry.unlink()
        for folder in known:
            for file in (work / folder).iterdir():
                if f"{folder}/{file.name}" not in files:
                    file.unlink()


class BuildCheckpoint:
    """Writes the checkpoints of one run.

    `note` after every step is cheap; `save` waits for the disk, and a killed build resumes from it.
    """

    def __init__(self, work: Path, job: BuildSource, digest: str, earlier: BuildState | None) -> None:
        self._work, self._job, self._digest = work, job, digest
        self._rejected = 0
        self._settled = earlier
        self._saved, self._saved_at = earlier, time.monotonic()
        with translate_write_errors(work.parent.name):
            self._ids, _ = open_lines(work / IDS, earlier.pairs if earlier else 0)
            self._rejects, _ = open_lines(work / REJECTS, 0)

    def note(self, step: SourceStep) -> None:
        """Record ids, origins and rejects of a step; they count once `mark_stored` is called."""
        with translate_write_errors(self._work.parent.name):
            if step.pairs is not None:
                names = step.pairs.ids.tolist()
                origins = step.origins or [""] * len(names)
                self._ids.writelines(json.dumps(pair).encode() + b"\n" for pair in zip(names, origins, strict=True))
            self._rejects.writelines(_encode_reject(reject) for reject in step.rejects)
        self._rejected += len(step.rejects)

    def mark_stored(self, **stored: Any) -> None:
        """Include the steps so far in the next checkpoint.

        stored: the fields of BuildState that the shards know.
        """
        self._settled = BuildState(job=self._digest, **stored)

    def is_due(self) -> bool:
        """Whether the work since the last checkpoint is worth another one."""
        if self._settled is None or self._settled == self._saved:
            return False
        waited = time.monotonic() - self._saved_at
        shards, pairs = (len(self._saved.shards), self._saved.pairs) if self._saved else (0, 0)
        enough = self._settled.pairs - pairs >= self._job.every_pairs and waited >= self._job.least_s
        return enough or waited >= self._job.every_s or len(self._settled.shards) > shards

    def save(self) -> None:
        """Sync all rows marked as stored, then replace the state file atomically.

        The shard's own rows must have been flushed.
        """
        if self._settled is None or self._settled == self._saved:
            return
        with translate_write_errors(self._work.parent.name):
            for file in (self._ids, self._rejects):
                file.flush()
                os.fsync(file.fileno())
            for folder, _ in list(self._settled.rows())[len(self._saved.shards) if self._saved else 0 :]:
                for path in (*(self._work / folder).iterdir(), self._work / folder):
                    fsync_path(path)
            replace_text(self._work / PROGRESS, json.dumps(asdict(self._settled)))
        self._saved, self._saved_at = self._settled, time.monotonic()

    def publish_rejects(self, target: Path) -> None:
        """Write the full list of rejects to `target`, or remove it where nothing was rejected."""
        with translate_write_errors(target.name):
            self._rejects.flush()
            if not self._rejected:
                target.unlink(missing_ok=True)
                return
            fresh = target.with_name(f".{target.name}.fresh")
            shutil.copyfile(self._work / REJECTS, fresh)
            fsync_path(fresh)
            fresh.replace(target)
            fsync_path(target.parent)

    def first_reject(self) -> Reject | None:
        """The first reject, for the error of a build without any pair."""
        self._rejects.flush()
        return next(iter(read_rejects(self._work, 1)), None)

    @property
    def rejected_count(self) -> int:
        """Items rejected by this run; rejects of earlier runs are tried again."""
        return self._rejected

    def close(self) -> None:
        """Close the files."""
        for file in (self._ids, self._rejects):
            try:
                file.close()
            except OSError:  # a full disk: the last checkpoint stands
                log.debug("notes were not flushed", exc_info=True)


def describe_progress(work: Path, progress: BuildState | None) -> BuildProgress:
    """What a source needs to know of an earlier run in order to continue."""
    if progress is None:
        return BuildProgress()
    kept = progress
    return BuildProgress(progress.pairs, lambda: read_ids_by_origin(work, kept.pairs), lambda: _stored_rows(work, kept))


def read_rejects(work: Path, count: int) -> Iterable[Reject]:
    """The first `count` rejects."""
    with (work / REJECTS).open("rb") as file:
        return [Reject(**json.loads(line)) for line in islice(file, count)]


def _stored_rows(work: Path, progress: BuildState) -> Iterator[StoredRows]:
    with (work / IDS).open("rb") as file:
        for folder, rows in progress.rows():
            image, text = (map_rows(work / folder / f"{side}.npy", progress.dim, rows) for side in SIDES)
            for start in range(0, rows, KEPT_ROWS):
                part = slice(start, min(rows, start + KEPT_ROWS))
                ids: list[Id] = [json.loads(line)[0] for line in islice(file, part.stop - part.start)]
                yield StoredRows(to_id_array(ids, progress.id_kind), np.asarray(image[part]), np.asarray(text[part]))


def _encode_reject(reject: Reject) -> bytes:
    """One JSON line; half a surrogate pair, as in a file name that is not UTF-8, becomes its
    escape.
    """
    return json.dumps(asdict(reject), ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _row_files(keys: dict[Side, dict[str, Any]]) -> list[str]:
    own = [f"{side}_key.npy" for side in SIDES if keys[side]["kind"] != "vector"]
    return ["image.npy", "text.npy", *own, "records.jsonl"]


def _is_complete(work: Path, progress: BuildState) -> bool:
    """Whether all rows of the state are on the disk; after a power loss some may be missing."""
    try:
        for folder, rows in progress.rows():
            for side in SIDES:
                map_rows(work / folder / f"{side}.npy", progress.dim, rows)
                if progress.keys[side]["kind"] != "vector":
                    map_rows(work / folder / f"{side}_key.npy", progress.keys[side]["dim"], rows)
        records = f"{progress.open_folder}/records.jsonl"
        for name, lines in ((IDS, progress.pairs), (records, progress.filled)):
            if lines and _count_lines(work / name, lines) < lines:
                return False
        return all((work / name).is_file() for name in progress.files)
    except (OSError, ValueError, KeyError):
        return False


def _count_lines(path: Path, most: int) -> int:
    with path.open("rb") as file:
        return sum(line.endswith(b"\n") for line in islice(file, most))
