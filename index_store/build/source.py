"""Sources of a build: blocks of pairs with rejects, and what a resumed build needs to know."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from index_store.types import Id, Pairs


@dataclass(frozen=True, slots=True)
class Reject:
    """One item that was left out.

    item: its id or name.  reason: one line.
    kind: "folded" for a repeated caption of the same image, "duplicate" for a repeated id or a
    near-duplicate, "reject" for an unusable item.
    """

    item: str
    reason: str
    kind: Literal["reject", "duplicate", "folded"] = field(default="reject", compare=False)


@dataclass(frozen=True, slots=True, eq=False)
class SourceStep:
    """One step of a source.

    pairs: the next block, None where every item was rejected.  items: number of the source's items
    in this step, rejects included.
    origins: per pair the digest of the files that it was read from; empty where the source has
    none.  stored: how many of the items an earlier run has stored.
    """

    pairs: Pairs | None
    items: int
    rejects: Sequence[Reject] = ()
    origins: Sequence[str] = ()
    stored: int = 0


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Rows that an earlier run has stored.

    ids: (R,).  image, text: (R, D) float16.
    """

    ids: np.ndarray
    image: np.ndarray
    text: np.ndarray


@dataclass(frozen=True, slots=True)
class BuildProgress:
    """What an earlier run of the same job has stored; its rejects are tried again.

    pairs: their number.  stored: their ids by origin, read from the disk when called.  kept: their
    rows, block by block.
    """

    pairs: int = 0
    stored: Callable[[], Mapping[str, set[Id]]] = field(default=dict)
    kept: Callable[[], Iterator[StoredRows]] = field(default=lambda: iter(()))


@dataclass(frozen=True, slots=True)
class BuildSource:
    """A source that can resume where an earlier run stopped.

    identity: JSON, the options; only runs with an equal identity resume each other.
    origins: digests of the files that the source has now. Stored rows are kept up to the first
    whose origin is not among them; None = all are kept.
    steps: maps what an earlier run stored to the remaining steps.
    fresh: discard the earlier run.  every_pairs, every_s: pairs, and seconds, after which a block
    is written, which waits for the disk.
    """

    identity: Mapping[str, Any]
    steps: Callable[[BuildProgress], Iterable[SourceStep]]
    origins: Collection[str] | None = None
    fresh: bool = False
    every_pairs: int = 4096
    every_s: float = 30.0

    def digest(self, **built: Any) -> str:
        """sha256 of the identity and of the builder's own arguments."""
        return hashlib.sha256(json.dumps([self.identity, built], sort_keys=True).encode()).hexdigest()


def first_of_each(ids: Sequence[Id], seen: set[Id]) -> list[bool]:
    """Per id whether it occurs for the first time; all ids are added to `seen`."""
    first = []
    for name in ids:
        first.append(name not in seen)
        seen.add(name)
    return first
