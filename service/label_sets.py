"""Label sets: named lists of labels kept on disk, and the embeddings of any list, stored or sent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from index_store import Snapshot
from index_store.durable import replace_text, writing
from index_store.errors import NameRefused
from index_store.store import plain
from service.errors import InvalidValue, NotFound, TooLarge
from service.label_vectors import Embed, LabelVectors
from service.labels import LabelSet
from service.metrics import Metrics


class LabelSets:
    """The stored sets, and through `vectors` the embedded lists.

    max_texts: labels x templates of a list sent with a request; max_stored: of a stored set.
    State: the files in `folder`, those read so far by name and file version, and the cache of embedded lists.
    """

    def __init__(self, folder: Path, embed: Embed, *, max_texts: int, max_stored: int, max_sets: int, metrics: Metrics) -> None:
        self._folder, self._max_texts, self._max_stored, self._max_sets = folder, max_texts, max_stored, max_sets
        self._read: dict[str, tuple[tuple[int, int], LabelSet]] = {}
        self.vectors = LabelVectors(embed, large=max_texts, metrics=metrics)

    def checked(self, labels: Sequence[str], templates: Sequence[str], *, stored: bool = False) -> LabelSet:
        """A LabelSet within the operator's limits."""
        return LabelSet.of(labels, templates, self._max_stored if stored else self._max_texts)

    def names(self) -> list[str]:
        """The stored sets, sorted."""
        return sorted(path.stem for path in self._folder.glob("*.json")) if self._folder.is_dir() else []

    def get(self, name: str) -> LabelSet:
        """Raises NotFound."""
        path = self._path(name)
        try:
            found = path.stat()
            known = self._read.get(name)
            version = (found.st_mtime_ns, found.st_ino)
            if known is None or known[0] != version:
                body = json.loads(path.read_text("utf-8"))
                known = self._read[name] = version, LabelSet(tuple(body["labels"]), tuple(body["templates"]))
        except FileNotFoundError as error:
            self._read.pop(name, None)
            raise NotFound(f"no label set {name!r}: PUT /label-sets/{name} makes it", "label_set") from error
        return known[1]

    def put(self, name: str, labels: LabelSet) -> None:
        """Store or replace a set; a reader sees the old one or the new one, never a part. Raises TooLarge, StoreUnwritable."""
        path = self._path(name)
        if not path.exists() and len(self.names()) >= self._max_sets:
            raise TooLarge(f"{self._max_sets} label sets are stored, the limit: delete one first", "label_set")
        with writing(f"label set {name}"):
            self._folder.mkdir(parents=True, exist_ok=True)
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
        self._path(name).unlink(missing_ok=True)
        self.vectors.drop(labels)

    async def warm(self, snapshot: Snapshot) -> None:
        """Embed every stored set under `snapshot`, so that a swap leaves no first caller waiting."""
        for name in self.names():
            while self._path(name).exists():
                with suppress(NotFound):  # replaced meanwhile: then as it is by now; deleted: then not at all
                    await self.vectors.get(self.get(name), snapshot)
                    break

    def _path(self, name: str) -> Path:
        with suppress(NameRefused):
            return self._folder / f"{plain(name)}.json"
        raise InvalidValue(f"label set name {name[:80]!r}: letters, digits, dot, dash and underscore, at most 64", "label_set")
