"""Checkpoints of a build: its pairs in block files, from which a stopped build goes on."""

import json
import logging
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from index_store.build.source import BuildProgress, BuildSource, Reject, SourceStep, StoredRows
from index_store.build.staging import BLOCKS, REJECTS, block_path, stored_blocks
from index_store.errors import DamagedVersion, VersionExists
from index_store.storage.atomic import fsync_path, translate_write_errors
from index_store.storage.blocks import DAMAGE, read_block, write_block
from index_store.storage.columns import encode_record
from index_store.types import SIDES, Id, Pairs

log = logging.getLogger("reco")
OLD_STATE = ".progress.json"  # of unfinished builds before there were blocks


@dataclass(frozen=True, slots=True)
class EarlierRun:
    """What an earlier run left in a staging folder.

    blocks: its whole blocks, in order.  pairs: rows in them.  usable: how many of the first of
    these rows this run may keep.
    """

    blocks: tuple[Path, ...]
    pairs: int
    usable: int

    @classmethod
    def find(cls, work: Path, job: BuildSource, digest: str) -> "EarlierRun":
        """Look through the blocks of a staging folder, as far as they can be read."""
        blocks, pairs, usable = list[Path](), 0, 0
        for path in stored_blocks(work):
            try:
                block = read_block(path, ("job", "origins", "origin"))
            except DAMAGE:
                break
            if usable == pairs and str(block["job"]) == digest:
                usable += _count_usable(block, job.origins)
            pairs += len(block["origin"])
            blocks.append(path)
        return cls(tuple(blocks), pairs, usable)

    def keep_usable(self) -> "EarlierRun":
        """Remove the rows that this run may not keep, the last first, so that a kill leaves no
        gap.
        """
        kept, start = list(self.blocks), self.pairs
        for path in reversed(self.blocks):
            rows = len(_read(path, "origin")["origin"])
            start -= rows
            if start >= self.usable:
                kept.pop().unlink()
            elif start + rows > self.usable:
                write_block(path, _first_rows(_read(path), self.usable - start))
        return EarlierRun(tuple(kept), self.usable, self.usable)

    def read_pairs(self) -> Iterator[Pairs]:
        """The pairs of each block. Raises DamagedVersion."""
        for path in self.blocks:
            block = _read(path)
            lines = block["records"].tobytes().decode("utf-8", "surrogatepass").split("\n")[:-1]
            rows = {name: block[name] for name in ("image", "text", "image_key", "text_key") if name in block}
            yield Pairs(block["ids"], records=[json.loads(line) for line in lines], **rows)

    def progress(self) -> BuildProgress:
        """What a source needs to know in order to continue."""
        return BuildProgress(self.pairs, self._ids_by_origin, self._rows)

    def _ids_by_origin(self) -> dict[str, set[Id]]:
        found: dict[str, set[Id]] = {}
        for path in self.blocks:
            block = _read(path, "ids", "origins", "origin")
            for name, origin in zip(block["ids"].tolist(), block["origins"][block["origin"]].tolist(), strict=True):
                found.setdefault(origin, set()).add(name)
        return found

    def _rows(self) -> Iterator[StoredRows]:
        for path in self.blocks:
            block = _read(path, "ids", *SIDES)
            yield StoredRows(block["ids"], block["image"], block["text"])


def resume(work: Path, job: BuildSource, digest: str) -> EarlierRun:
    """Prepare a staging folder for this run: only rows that it may keep remain, in their blocks.

    Where stored pairs are discarded, it is logged.
    """
    name, found = work.parent.name, EarlierRun.find(work, job, digest)
    kept = EarlierRun(found.blocks, found.pairs, 0) if job.fresh else found
    if found.pairs and not kept.usable:
        why = "as asked" if job.fresh else "its sources or options were others"
        log.warning("%s: an interrupted build of %d pairs is forgotten, %s", name, found.pairs, why)
    elif kept.usable < found.pairs:
        lost = found.pairs - kept.usable
        log.warning("%s: %d of %d pairs are kept; %d came from or after a source that has changed",
                    name, kept.usable, found.pairs, lost)  # fmt: skip
    if block_path(work, len(found.blocks)).exists():
        log.warning("%s: block %d of an interrupted build is damaged: what it held is made anew",
                    name, len(found.blocks))  # fmt: skip
    with translate_write_errors(name):
        kept = kept.keep_usable()
        (work / BLOCKS).mkdir(exist_ok=True)
        for path in {*(work / BLOCKS).iterdir()} - {*kept.blocks}:
            path.unlink()  # begun, or behind a damaged one
        fsync_path(work)
    return kept


def unfinished_version(memory: Path, job: BuildSource, digest: str) -> str | None:
    """The unfinished version of which this job can keep the most rows; None without one."""
    found = {path: EarlierRun.find(path, job, digest).usable for path in sorted(memory.glob(".*.partial"))}
    best = max(found, key=lambda path: found[path], default=None)
    return best.name[1:].removesuffix(".partial") if best is not None and found[best] else None


def refuse_other_build(work: Path, job: BuildSource, digest: str, ref: str) -> None:
    """Raise VersionExists where the folder holds an unfinished build that this job cannot resume,
    since its pairs would be lost.
    """
    found = EarlierRun.find(work, job, digest)
    whose = f"other sources or options, with {found.pairs} pairs" if found.pairs else "an older release"
    if not job.fresh and not found.usable and (found.pairs or (work / OLD_STATE).exists()):
        raise VersionExists(
            f"{ref} is the unfinished build of {whose}: choose another version, or begin anew with --fresh"
        )


class BuildCheckpoint:
    """Writes the blocks and the rejects of one run.

    blocks: number of blocks that an earlier run left.  State: the steps since the last block.
    """

    def __init__(self, work: Path, job: BuildSource, digest: str, blocks: int) -> None:
        self._work, self._job, self._digest, self._blocks = work, job, digest, blocks
        self._steps, self._saved_at = list[SourceStep](), time.monotonic()
        self.rejected = 0  # of this run; rejects of earlier runs are tried again
        with translate_write_errors(work.parent.name):
            self._rejects = (work / REJECTS).open("wb")

    def add(self, step: SourceStep) -> None:
        """Take a step into the next block, which is written when it is due."""
        with translate_write_errors(self._work.parent.name):
            self._rejects.writelines(_encode_reject(reject) for reject in step.rejects)
        self.rejected += len(step.rejects)
        if step.pairs is not None and len(step.pairs):
            self._steps.append(step)
        pairs = sum(len(step.pairs) for step in self._steps if step.pairs is not None)
        if pairs >= self._job.every_pairs or time.monotonic() - self._saved_at >= self._job.every_s:
            self.save()

    def save(self) -> None:
        """Write the steps since the last block as one; returns once it is on the disk."""
        if self._steps:
            with translate_write_errors(self._work.parent.name):
                write_block(block_path(self._work, self._blocks), _to_block(self._steps, self._digest))
            self._blocks += 1
            self._steps.clear()
        self._saved_at = time.monotonic()

    def publish_rejects(self, target: Path) -> None:
        """Write the full list of rejects to `target`, or remove it where nothing was rejected."""
        with translate_write_errors(target.name):
            self._rejects.flush()
            if not self.rejected:
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
        with (self._work / REJECTS).open("rb") as file:
            return next((Reject(**json.loads(line)) for line in islice(file, 1)), None)

    def close(self) -> None:
        """Close the files."""
        try:
            self._rejects.close()
        except OSError:  # a full disk
            log.debug("rejects were not flushed", exc_info=True)


def _read(path: Path, *names: str) -> dict[str, np.ndarray]:
    """The named arrays of a block, or all. Raises DamagedVersion."""
    try:
        return read_block(path, names or None)
    except DAMAGE as error:
        memory = path.parent.parent.parent.name
        raise DamagedVersion(
            f"{memory}: the block {path.name} of an interrupted build is damaged ({error}): begin anew with --fresh"
        ) from error


def _to_block(steps: Iterable[SourceStep], digest: str) -> dict[str, np.ndarray]:
    """The arrays of a block: of the job, then of R rows.

    job: () str.  origins: (F,) str.  origin: (R,) int64, which of them.  ids: (R,).  image,
    text, image_key, text_key: (R, D) float16.  records: uint8, R lines of JSON.
    """
    given = [(step.pairs, step.origins or [""] * len(step.pairs)) for step in steps if step.pairs is not None]
    origins, origin = np.unique([each for _, some in given for each in some], return_inverse=True)
    columns = {side: [pairs.values(side) for pairs, _ in given] for side in SIDES}
    columns |= {f"{s}_key": [pairs.keys(s) for pairs, _ in given] for s in SIDES if given[0][0].has_own_keys(s)}  # type: ignore[misc]
    lines = [
        encode_record(name, record)
        for pairs, _ in given
        for name, record in zip(pairs.ids.tolist(), pairs.records, strict=True)
    ]
    return {
        "job": np.array(digest),
        "origins": origins,
        "origin": origin,
        "ids": np.concatenate([pairs.ids for pairs, _ in given]),
        **{name: np.concatenate(rows).astype("<f2", copy=False) for name, rows in columns.items()},
        "records": np.frombuffer(b"".join(lines), np.uint8),
    }


def _first_rows(block: Mapping[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
    """A block of the first `rows` rows of another, at least one."""
    ends = np.flatnonzero(block["records"] == ord("\n"))  # of the lines
    lengths = {name: rows for name in block if name not in ("job", "origins")} | {"records": ends[rows - 1] + 1}
    return {**block, **{name: block[name][:length] for name, length in lengths.items()}}


def _count_usable(block: Mapping[str, np.ndarray], present: Collection[str] | None) -> int:
    """How many of the first rows come from files that the source still has. present: None = all."""
    gone = np.array([present is not None and name not in present for name in block["origins"].tolist()])[
        block["origin"]
    ]
    return int(gone.argmax()) if gone.any() else len(gone)


def _encode_reject(reject: Reject) -> bytes:
    """One JSON line; half a surrogate pair, as in a file name that is not UTF-8, becomes its
    escape.
    """
    return json.dumps(asdict(reject), ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
