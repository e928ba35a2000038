"""A builder's notes: how much of what lies on the disk counts, so that a killed or stopped build
goes on instead of beginning anew.
"""

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

from index_store.build.ids import id_array, read_ids_by_origin
from index_store.build.source import BuildProgress, BuildSource, Kept, Reject, SourceStep
from index_store.build.staging import IDS, LOCK, PROGRESS, REJECTS, Progress
from index_store.errors import VersionExists
from index_store.storage.atomic import fsync_path, replace_text, translate_write_errors
from index_store.storage.columns import map_rows, open_lines
from index_store.types import SIDES, Id, Side

log = logging.getLogger("reco")
KEPT_ROWS = 8192  # rows of one block given back to a source that goes on


def earlier_progress(work: Path, job: BuildSource, digest: str) -> Progress | None:
    """How far an earlier run of this job came in this folder; None where the build begins anew,
    which is logged where work is lost.
    """
    if not (work / PROGRESS).exists():
        return None
    found = _read(work)
    if found is None:
        log.warning("%s: what an interrupted build left cannot be read, it begins anew", work.parent.name)
        return None
    kept = usable_rows(work, found, job, digest)
    if job.fresh or not kept:
        why = "as asked" if job.fresh else "its sources or options were others"
        log.warning("%s: an interrupted build of %d pairs is forgotten, %s", work.parent.name, found.pairs, why)
    elif not _whole(work, found):
        log.warning("%s: what an interrupted build left is damaged, it begins anew", work.parent.name)
    else:
        if kept < found.pairs:
            lost = found.pairs - kept
            log.warning("%s: %d of %d pairs are kept; %d came from or after a source that has changed",
                        work.parent.name, kept, found.pairs, lost)  # fmt: skip
        return found.cut(kept)
    return None


def usable_rows(work: Path, found: Progress, job: BuildSource, digest: str) -> int:
    """How many of the first rows stored a run of this job may keep."""
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
    """The version that an interrupted run was building of which this job may keep the most."""
    usable = dict[str, int]()
    for path in sorted(memory.glob(f".*.partial/{PROGRESS}")):
        found = _read(path.parent)
        if found is not None and (rows := usable_rows(path.parent, found, job, digest)):
            usable[path.parent.name[1:].removesuffix(".partial")] = rows
    return max(usable, key=lambda version: usable[version]) if usable else None


def refuse_other_build(work: Path, job: BuildSource, digest: str, ref: str) -> None:
    """Raise VersionExists where a folder holds an unfinished build that this job cannot go on
    with: its work would be lost.
    """
    found = _read(work)
    if found is not None and not job.fresh and found.pairs and not usable_rows(work, found, job, digest):
        raise VersionExists(
            f"{ref} is the unfinished build of other sources or options, with {found.pairs} pairs: choose another "
            "version, or begin anew with --fresh"
        )


def keep_only(work: Path, progress: Progress) -> None:
    """Remove what does not count: half-made indexes, shards begun after the last checkpoint."""
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
    """The notes of one run.

    `note` after every step is cheap; `save` waits for the disk, and is what a kill leaves.
    """

    def __init__(self, work: Path, job: BuildSource, digest: str, earlier: Progress | None) -> None:
        self._work, self._job, self._digest = work, job, digest
        self._rejected = 0
        self._settled = earlier
        self._saved, self._saved_at = earlier, time.monotonic()
        with translate_write_errors(work.parent.name):
            self._ids, _ = open_lines(work / IDS, earlier.pairs if earlier else 0)
            self._rejects, _ = open_lines(work / REJECTS, 0)

    def note(self, step: SourceStep) -> None:
        """Remember what a step brought; it counts once `settle` says that its rows are written."""
        with translate_write_errors(self._work.parent.name):
            if step.pairs is not None:
                names = step.pairs.ids.tolist()
                origins = step.origins or [""] * len(names)
                self._ids.writelines(json.dumps(pair).encode() + b"\n" for pair in zip(names, origins, strict=True))
            self._rejects.writelines(_line(reject) for reject in step.rejects)
        self._rejected += len(step.rejects)

    def settle(self, **stored: Any) -> None:
        """From here on a run may go on after this step.  stored: the fields of Progress that the
        shards answer for.
        """
        self._settled = Progress(job=self._digest, **stored)

    def due(self) -> bool:
        """True where a kill would by now cost more work than a checkpoint does."""
        if self._settled is None or self._settled == self._saved:
            return False
        waited = time.monotonic() - self._saved_at
        shards, pairs = (len(self._saved.shards), self._saved.pairs) if self._saved else (0, 0)
        enough = self._settled.pairs - pairs >= self._job.every_pairs and waited >= self._job.least_s
        return enough or waited >= self._job.every_s or len(self._settled.shards) > shards

    def save(self) -> None:
        """Sync everything that is settled, then say so in one step.

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
        """Put the list of rejects, whole, where people look for it; none where nothing was
        rejected.
        """
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
        """For an error that explains why nothing is left."""
        self._rejects.flush()
        return next(iter(read_rejects(self._work, 1)), None)

    @property
    def rejected(self) -> int:
        """Items left out by this run; what earlier runs left out is tried again."""
        return self._rejected

    def close(self) -> None:
        """Let go of the files."""
        for file in (self._ids, self._rejects):
            try:
                file.close()
            except OSError:  # a full disk: the last checkpoint stands
                log.debug("notes were not flushed", exc_info=True)


def done_of(work: Path, progress: Progress | None) -> BuildProgress:
    """What a source is told so that it goes on."""
    if progress is None:
        return BuildProgress()
    kept = progress
    return BuildProgress(progress.pairs, lambda: read_ids_by_origin(work, kept.pairs), lambda: _kept(work, kept))


def read_rejects(work: Path, count: int) -> Iterable[Reject]:
    """The first rejects noted."""
    with (work / REJECTS).open("rb") as file:
        return [Reject(**json.loads(line)) for line in islice(file, count)]


def _kept(work: Path, progress: Progress) -> Iterator[Kept]:
    with (work / IDS).open("rb") as file:
        for folder, rows in progress.rows():
            image, text = (map_rows(work / folder / f"{side}.npy", progress.dim, rows) for side in SIDES)
            for start in range(0, rows, KEPT_ROWS):
                part = slice(start, min(rows, start + KEPT_ROWS))
                ids: list[Id] = [json.loads(line)[0] for line in islice(file, part.stop - part.start)]
                yield Kept(id_array(ids, progress.id_kind), np.asarray(image[part]), np.asarray(text[part]))


def _line(reject: Reject) -> bytes:
    """For people to read; half a surrogate pair, as in a name that was not UTF-8, becomes its JSON
    escape.
    """
    return json.dumps(asdict(reject), ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _read(work: Path) -> Progress | None:
    try:
        return Progress(**json.loads((work / PROGRESS).read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _row_files(keys: dict[Side, dict[str, Any]]) -> list[str]:
    own = [f"{side}_key.npy" for side in SIDES if keys[side]["kind"] != "vector"]
    return ["image.npy", "text.npy", *own, "records.jsonl"]


def _whole(work: Path, progress: Progress) -> bool:
    """True where every row that counts is really there: a disk that lost power may have lost more
    than the notes know.
    """
    try:
        for folder, rows in progress.rows():
            for side in SIDES:
                map_rows(work / folder / f"{side}.npy", progress.dim, rows)
                if progress.keys[side]["kind"] != "vector":
                    map_rows(work / folder / f"{side}_key.npy", progress.keys[side]["dim"], rows)
        records = f"{progress.open_folder}/records.jsonl"
        for name, lines in ((IDS, progress.pairs), (records, progress.filled)):
            if lines and _lines(work / name, lines) < lines:
                return False
        return all((work / name).is_file() for name in progress.files)
    except (OSError, ValueError, KeyError):
        return False


def _lines(path: Path, most: int) -> int:
    with path.open("rb") as file:
        return sum(line.endswith(b"\n") for line in islice(file, most))
