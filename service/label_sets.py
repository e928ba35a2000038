"""Label sets: named lists of labels kept on disk, and the cached embeddings of any list, stored or sent, per memory version."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from index_store import Snapshot
from index_store.durable import replace_text, writing
from index_store.errors import NameRefused
from index_store.store import plain
from service.errors import BadRequest, InvalidValue, NotFound, TooLarge
from service.metrics import Metrics

CACHED_LISTS = 64  # embedded lists kept; 64 lists of 10 000 labels at D = 512 are 1.3 GB at the very most


@dataclass(frozen=True, slots=True)
class LabelSet:
    """Candidate classes and the sentences they are put into. Checked where it is born."""

    labels: tuple[str, ...]
    templates: tuple[str, ...] = ("a photo of a {}.",)

    @classmethod
    def of(cls, labels: Sequence[str], templates: Sequence[str], max_texts: int) -> LabelSet:
        """Raises BadRequest for zero labels, InvalidValue for duplicates or a template without one {}, TooLarge beyond max_texts."""
        if not labels:
            raise BadRequest("labels is empty: send at least one label", "labels")
        if len(labels) * len(templates) > max_texts:
            raise TooLarge(f"{len(labels)} labels x {len(templates)} templates, at most {max_texts} texts a set: send fewer", "labels")
        seen: set[str] = set()
        for i, label in enumerate(labels):
            if not label.strip():
                raise InvalidValue(f"labels[{i}] is blank: send a name", f"labels[{i}]")
            if label in seen:
                raise InvalidValue(f"labels[{i}] = {label[:80]!r} stands twice: each label once", f"labels[{i}]")
            seen.add(label)
        for i, template in enumerate(templates):
            if template.count("{}") != 1:
                raise InvalidValue(f"templates[{i}] = {template[:80]!r} needs exactly one {{}} for the label", f"templates[{i}]")
        return cls(tuple(labels), tuple(templates))

    @property
    def digest(self) -> str:
        """Names the content, whatever the set is called."""
        return hashlib.sha256(json.dumps([self.labels, self.templates]).encode()).hexdigest()


class LabelSets:
    """The stored sets and the one cache of embedded lists.

    embed: `Reco.embed_labels`, blocking: (labels, templates, snapshot) -> (labels, D) float32 unit rows.
    State: the files in `folder`, and the cache: a task per (content, memory version), so that all callers wait for one computation.
    """

    def __init__(
        self,
        folder: Path,
        embed: Callable[[Sequence[str], Sequence[str], Snapshot | None], np.ndarray],
        *,
        max_texts: int,
        max_sets: int,
        metrics: Metrics,
    ) -> None:
        self._folder, self._embed, self._metrics = folder, embed, metrics
        self._max_texts, self._max_sets = max_texts, max_sets
        self._cache: OrderedDict[tuple[str, str], asyncio.Task[np.ndarray]] = OrderedDict()

    def checked(self, labels: Sequence[str], templates: Sequence[str]) -> LabelSet:
        """A LabelSet within the operator's limits."""
        return LabelSet.of(labels, templates, self._max_texts)

    def names(self) -> list[str]:
        """The stored sets, sorted."""
        return sorted(path.stem for path in self._folder.glob("*.json")) if self._folder.is_dir() else []

    def get(self, name: str) -> LabelSet:
        """Raises NotFound."""
        try:
            body = json.loads(self._path(name).read_text("utf-8"))
        except FileNotFoundError as error:
            raise NotFound(f"no label set {name!r}: PUT /label-sets/{name} makes it", "label_set") from error
        return LabelSet(tuple(body["labels"]), tuple(body["templates"]))

    def put(self, name: str, labels: LabelSet) -> None:
        """Store or replace a set; a reader sees the old one or the new one, never a part. Raises TooLarge, StoreUnwritable."""
        path = self._path(name)
        if not path.exists() and len(self.names()) >= self._max_sets:
            raise TooLarge(f"{self._max_sets} label sets are stored, the limit: delete one first", "label_set")
        with writing(f"label set {name}"):
            self._folder.mkdir(parents=True, exist_ok=True)
            replace_text(path, json.dumps(asdict(labels), ensure_ascii=False))

    def delete(self, name: str) -> None:
        """Raises NotFound."""
        try:
            self._path(name).unlink()
        except FileNotFoundError as error:
            raise NotFound(f"no label set {name!r}", "label_set") from error

    async def vectors(self, labels: LabelSet, snapshot: Snapshot | None) -> np.ndarray:
        """(labels, D) float32 unit vectors: the mean over the templates, of enhanced texts where a snapshot is given."""
        key = (labels.digest, _version(snapshot))
        task = self._cache.get(key)
        self._metrics.label_cache_total.labels("hit" if task else "miss").inc()
        if task is None:
            task = self._cache[key] = asyncio.create_task(asyncio.to_thread(self._embed, labels.labels, labels.templates, snapshot))
            task.add_done_callback(lambda done: self._settled(key, done))
        self._cache.move_to_end(key)
        return await asyncio.shield(task)  # a caller who leaves must not take the computation from those who wait

    async def warm(self, snapshot: Snapshot) -> None:
        """Embed every stored set under `snapshot`, so that a swap leaves no first caller waiting."""
        for name in self.names():
            await self.vectors(self.get(name), snapshot)

    def _settled(self, key: tuple[str, str], task: asyncio.Task[np.ndarray]) -> None:
        if task.cancelled() or task.exception() is not None:
            self._cache.pop(key, None)
        while len(self._cache) > CACHED_LISTS:
            self._cache.popitem(last=False)

    def _path(self, name: str) -> Path:
        with suppress(NameRefused):
            return self._folder / f"{plain(name)}.json"
        raise InvalidValue(f"label set name {name[:80]!r}: letters, digits, dot, dash and underscore, at most 64", "label_set")


def _version(snapshot: Snapshot | None) -> str:
    """A name that a rebuilt version does not share with the one it replaced."""
    return f"{snapshot.ref}/{snapshot.manifest.created}" if snapshot is not None else ""
