"""Label sets: named, versioned lists of labels kept on disk, and the embeddings of any list, stored or sent.

    animals.json                  what `animals` names now
    animals@5f0c2a91b7e3.json     what it named before, kept so that a caller may pin it

A version is named by its content: putting the same labels again is the same version, which is how one goes back.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from index_store import Snapshot
from index_store.errors import NameRefused
from index_store.storage.atomic import replace_text, translate_write_errors
from index_store.store import check_name
from service.errors import InvalidValue, NotFound, RetiredVersion, TooLarge
from service.labels.cache import Embed, LabelVectors
from service.labels.label_set import LabelSet
from service.observability.metrics import Metrics

EARLIER = 3  # versions kept beside the current one


class LabelSets:
    """The stored sets, and through `vectors` the embedded lists.

    max_texts: labels x templates of a list sent with a request; max_stored: of a stored set.
    State: the files in `folder`, those read so far by file and its stat, and the cache of embedded lists.
    """

    def __init__(
        self,
        folder: Path,
        embed: Embed,
        *,
        scale: float,
        max_texts: int,
        max_stored: int,
        max_sets: int,
        metrics: Metrics,
    ) -> None:
        self._folder, self._max_texts, self._max_stored, self._max_sets = folder, max_texts, max_stored, max_sets
        self._read: dict[str, tuple[tuple[int, int], LabelSet]] = {}
        self.vectors = LabelVectors(embed, scale=scale, large=max_texts, metrics=metrics)

    def checked(self, labels: Sequence[str], templates: Sequence[str], *, stored: bool = False) -> LabelSet:
        """A LabelSet within the operator's limits."""
        return LabelSet.of(labels, templates, self._max_stored if stored else self._max_texts)

    def names(self) -> list[str]:
        """The stored sets, sorted."""
        return (
            sorted(path.stem for path in self._folder.glob("*.json") if "@" not in path.stem)
            if self._folder.is_dir()
            else []
        )

    def versions(self, name: str) -> list[str]:
        """What may be pinned: the current version, then the earlier ones, newest first. Raises NotFound."""
        current = self.get(name).version
        return [
            current,
            *(path.stem.partition("@")[2] for path in self._earlier(name) if path.stem != f"{name}@{current}"),
        ]

    def get(self, wanted: str) -> LabelSet:
        """The set called NAME, or NAME@VERSION. Raises NotFound, RetiredVersion for a version that is not kept."""
        name, _, version = wanted.partition("@")
        current = self._file(self._path(name), name)
        if not version or version == current.version:
            return current
        with suppress(NotFound):
            return self._file(self._path(name, version), wanted)
        raise RetiredVersion(
            f"label set {name}@{version[:80]} is not kept, {name}@{current.version} is current: pin that", "label_set"
        )

    def put(self, name: str, labels: LabelSet) -> None:
        """Store or replace a set; a reader sees the old one or the new one, never a part. Raises TooLarge, StoreUnwritable."""
        path = self._path(name)
        if not path.exists() and len(self.names()) >= self._max_sets:
            raise TooLarge(f"{self._max_sets} label sets are stored, the limit: delete one first", "label_set")
        with translate_write_errors(f"label set {name}"):
            self._folder.mkdir(parents=True, exist_ok=True)
            if path.exists():
                self._keep(name, path)
            replace_text(path, json.dumps(labels.body, ensure_ascii=False))

    async def replace(self, name: str, labels: LabelSet, snapshot: Snapshot | None) -> None:
        """`put` beside the event loop; forget what it replaces, and begin to embed a large set under `snapshot`."""
        old = self.get(name) if self._path(name).exists() else None
        await asyncio.to_thread(self.put, name, labels)
        if old is not None and old.digest != labels.digest:
            self.vectors.drop(old)
        self.vectors.prepare(labels, snapshot)

    def delete(self, name: str) -> None:
        """Raises NotFound."""
        labels = self.get(name)
        for path in (self._path(name), *self._earlier(name)):
            path.unlink(missing_ok=True)
        self.vectors.drop(labels)

    async def warm(self, snapshot: Snapshot) -> None:
        """Embed every stored set under `snapshot`, so that a swap leaves no first caller waiting."""
        for name in self.names():
            while self._path(name).exists():
                with suppress(NotFound):  # replaced meanwhile: then as it is by now; deleted: then not at all
                    await self.vectors.get(self.get(name), snapshot)
                    break

    def _file(self, path: Path, wanted: str) -> LabelSet:
        """What stands in a file, read again only where it was replaced. Raises NotFound."""
        try:
            found = path.stat()
            known = self._read.get(path.stem)
            version = (found.st_mtime_ns, found.st_ino)
            if known is None or known[0] != version:
                body = json.loads(path.read_text("utf-8"))
                known = self._read[path.stem] = version, LabelSet(tuple(body["labels"]), tuple(body["templates"]))
        except FileNotFoundError as error:
            self._read.pop(path.stem, None)
            raise NotFound(
                f"no label set {wanted[:80]!r}: PUT /label-sets/{wanted[:80]} makes it", "label_set"
            ) from error
        return known[1]

    def _keep(self, name: str, path: Path) -> None:
        """Give the current file its version's name as well, and let the oldest go."""
        with suppress(FileExistsError):
            self._path(name, self.get(name).version).hardlink_to(path)
        for old in self._earlier(name)[EARLIER:]:
            old.unlink(missing_ok=True)
            self._read.pop(old.stem, None)

    def _earlier(self, name: str) -> list[Path]:
        """The files of its versions, the newest first."""
        return sorted(self._folder.glob(f"{name}@*.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)

    def _path(self, name: str, version: str | None = None) -> Path:
        with suppress(NameRefused):
            return self._folder / (
                f"{check_name(name)}.json" if version is None else f"{check_name(name)}@{check_name(version)}.json"
            )
        raise InvalidValue(
            f"label set name {name[:80]!r}: letters, digits, dot, dash and underscore, at most 64", "label_set"
        )
