"""The store of label sets: named, versioned lists of labels on disk, and the vectors of any list.

    animals.json                  the current version of `animals`
    animals@5f0c2a91b7e3.json     an earlier version, kept so that a caller may pin it

A version is named by a hash of its content: storing the old labels again restores it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from index_store import Snapshot
from index_store.errors import NameRefused, StoreError
from index_store.storage.atomic import replace_text, translate_write_errors
from index_store.store import check_name
from service.errors import InvalidValue, NotFound, TooLarge, VersionNotServed
from service.labels.cache import LabelVectors
from service.labels.label_set import LabelSet
from service.labels.list_embedding import Embed
from service.labels.scoring import ScoreFunction
from service.observability.metrics import Metrics

EARLIER_VERSIONS = 3  # kept beside the current one

log = logging.getLogger("reco")


class DamagedLabelSet(StoreError):
    """The file of a label set does not hold a label set; other sets and memories are not
    affected.
    """


class LabelSets:
    """The stored sets, and through `vectors` the embedded lists.

    max_texts: labels x templates of a list sent with a request; max_stored: of a stored set.
    max_chars: characters of all texts of a list sent with a request; of a stored set as many more
    as it may have more texts.
    Methods that touch files block: call them outside the event loop.
    State: the files in `folder`, the sets read so far with the stat of their file, and the cache of
    vectors. One lock serialises writers.
    """

    def __init__(
        self,
        folder: Path,
        embed: Embed,
        *,
        function: ScoreFunction,
        max_texts: int,
        max_chars: int,
        max_stored: int,
        max_sets: int,
        metrics: Metrics,
    ) -> None:
        self._folder, self._max_texts, self._max_stored, self._max_sets = folder, max_texts, max_stored, max_sets
        self._max_chars = max_chars
        self._cached: dict[str, tuple[tuple[int, int], LabelSet]] = {}
        self._writer = threading.Lock()
        self.vectors = LabelVectors(
            embed, function=function, large=max_texts, max_characters=max_chars, metrics=metrics
        )

    def check(self, labels: Sequence[str], templates: Sequence[str], *, stored: bool = False) -> LabelSet:
        """Make a LabelSet within the operator's limits.

        Raises BadRequest, InvalidValue, TooLarge.
        """
        if stored:
            per_text = max(1, self._max_chars // self._max_texts)
            return LabelSet.of(labels, templates, self._max_stored, max(self._max_chars, per_text * self._max_stored))
        return LabelSet.of(labels, templates, self._max_texts, self._max_chars)

    def names(self) -> list[str]:
        """The names of the stored sets, sorted."""
        return (
            sorted(path.stem for path in self._folder.glob("*.json") if "@" not in path.stem)
            if self._folder.is_dir()
            else []
        )

    def versions(self, name: str) -> list[str]:
        """The versions that may be pinned: the current one, then earlier ones, newest first.

        Raises NotFound.
        """
        current = self.get(name).version
        return [
            current,
            *(path.stem.partition("@")[2] for path in self._earlier(name) if path.stem != f"{name}@{current}"),
        ]

    def get(self, wanted: str) -> LabelSet:
        """Return the set called NAME, or NAME@VERSION.

        Raises NotFound, RetiredVersion for a version that is not kept, DamagedLabelSet.
        """
        name, _, version = wanted.partition("@")
        current = self._read(self._path(name), name)
        if not version or version == current.version:
            return current
        with suppress(NotFound):
            return self._read(self._path(name, version), wanted)
        raise VersionNotServed(
            f"label set {name}@{version[:80]} is not kept, {name}@{current.version} is current: pin that", "label_set"
        )

    def put(self, name: str, labels: LabelSet) -> None:
        """Store or replace a set; a reader sees the old or the new set. The last writer wins.

        Raises TooLarge, StoreUnwritable.
        """
        path = self._path(name)
        with self._writer, translate_write_errors(f"label set {name}"):
            if not path.exists() and len(self.names()) >= self._max_sets:
                raise TooLarge(f"{self._max_sets} label sets are stored, the limit: delete one first", "label_set")
            self._folder.mkdir(parents=True, exist_ok=True)
            if path.exists():
                self._keep_version(name, path)
            replace_text(path, json.dumps({**labels.body, "sha256": labels.digest}, ensure_ascii=False))

    async def replace(self, name: str, labels: LabelSet, snapshot: Snapshot | None) -> None:
        """`put` outside the event loop; then drop the vectors of the old set and start to embed a
        large one.
        """
        old = await asyncio.to_thread(self._swap_in, name, labels)
        if old is not None and old.digest != labels.digest:
            self.vectors.drop(old)
        self.vectors.prepare(labels, snapshot)

    def _swap_in(self, name: str, labels: LabelSet) -> LabelSet | None:
        """Store the set; the set that it replaces, None without a readable one."""
        with suppress(NotFound, DamagedLabelSet):
            old = self.get(name)
            self.put(name, labels)
            return old
        self.put(name, labels)
        return None

    async def delete(self, name: str) -> None:
        """Delete a set with its versions, a damaged one too. Raises NotFound, StoreUnwritable."""
        labels = await asyncio.to_thread(self._remove, name)
        if labels is not None:
            self.vectors.drop(labels)

    def _remove(self, name: str) -> LabelSet | None:
        """Delete the files; the set, None where it was damaged."""
        labels = None
        with suppress(DamagedLabelSet):
            labels = self.get(name)
        with self._writer, translate_write_errors(f"label set {name}"):
            for path in (self._path(name), *self._earlier(name)):
                path.unlink(missing_ok=True)
                self._cached.pop(path.stem, None)
        return labels

    async def embed_all(self, snapshot: Snapshot) -> None:
        """Embed every stored set under `snapshot`, so that no request waits for it after a swap.

        A damaged set is logged and left out.
        """
        for name in await asyncio.to_thread(self.names):
            try:
                await self._embed(name, snapshot)
            except DamagedLabelSet as error:
                log.warning("%s", error)

    async def _embed(self, name: str, snapshot: Snapshot) -> None:
        while self._path(name).exists():
            # replaced meanwhile: embed the new one; deleted: nothing to embed
            with suppress(NotFound):
                await self.vectors.get(await asyncio.to_thread(self.get, name), snapshot)
                return

    def _read(self, path: Path, wanted: str) -> LabelSet:
        """Read a file, again only where it was replaced. Raises NotFound, DamagedLabelSet."""
        try:
            found = path.stat()
            known = self._cached.get(path.stem)
            version = (found.st_mtime_ns, found.st_ino)
            if known is None or known[0] != version:
                known = self._cached[path.stem] = version, _parse(path.read_text("utf-8"))
        except FileNotFoundError as error:
            self._cached.pop(path.stem, None)
            raise NotFound(
                f"no label set {wanted[:80]!r}: PUT /label-sets/{wanted[:80]} makes it", "label_set"
            ) from error
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DamagedLabelSet(
                f"label set {wanted[:80]!r} cannot be read ({type(error).__name__}): PUT it again, or DELETE it"
            ) from error
        return known[1]

    def _keep_version(self, name: str, path: Path) -> None:
        """Give the current file the name of its version too, and remove the oldest version."""
        # a damaged file is no version to go back to
        with suppress(FileExistsError, DamagedLabelSet):
            self._path(name, self.get(name).version).hardlink_to(path)
        for old in self._earlier(name)[EARLIER_VERSIONS:]:
            old.unlink(missing_ok=True)
            self._cached.pop(old.stem, None)

    def _earlier(self, name: str) -> list[Path]:
        """The files of the versions of a set, newest first."""
        return sorted(self._folder.glob(f"{name}@*.json"), key=_modified, reverse=True)

    def _path(self, name: str, version: str | None = None) -> Path:
        with suppress(NameRefused):
            return self._folder / (
                f"{check_name(name)}.json" if version is None else f"{check_name(name)}@{check_name(version)}.json"
            )
        raise InvalidValue(
            f"label set name {name[:80]!r}: letters, digits, dot, dash and underscore, at most 64", "label_set"
        )


def _modified(path: Path) -> int:
    """When a file was written, in nanoseconds; 0 where another request has deleted it."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _parse(text: str) -> LabelSet:
    """Raises ValueError, KeyError, TypeError or RecursionError for anything but a label set.

    A file of an older program holds no checksum.
    """
    body = json.loads(text)
    if not all(isinstance(body[name], list) and body[name] for name in ("labels", "templates")):
        raise TypeError("labels and templates are lists, neither of them empty")
    if not all(isinstance(each, str) for name in ("labels", "templates") for each in body[name]):
        raise TypeError("labels and templates are lists of strings")
    labels = LabelSet(tuple(body["labels"]), tuple(body["templates"]))
    if body.get("sha256", labels.digest) != labels.digest:
        raise ValueError("the content does not have its checksum")
    return labels
