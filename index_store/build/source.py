"""What a build reads: blocks of pairs with what was left out between them, and how a stopped build
goes on.
"""

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
    kind: "folded" for a caption that the same image has already, "duplicate" for a pair that came
    before (by its id, or as a near-duplicate), "reject" for what cannot be used.
    """

    item: str
    reason: str
    kind: Literal["reject", "duplicate", "folded"] = field(default="reject", compare=False)


@dataclass(frozen=True, slots=True, eq=False)
class SourceStep:
    """What a source gives at once.

    pairs: the next block, None where all was rejected.  items: how many of the source's items this
    step deals with, rejects included.
    origins: for each pair the digest of the files that it was read from; empty where the source
    has none.  stored: how many of the items an earlier run has stored.
    """

    pairs: Pairs | None
    items: int
    rejects: Sequence[Reject] = ()
    origins: Sequence[str] = ()
    stored: int = 0


@dataclass(frozen=True, slots=True)
class Kept:
    """Some rows that a builder has stored.  ids: (R,).  image, text: (R, D) float16."""

    ids: np.ndarray
    image: np.ndarray
    text: np.ndarray


@dataclass(frozen=True, slots=True)
class BuildProgress:
    """What an earlier run of the same job has stored; what it rejected is tried again.

    pairs: their number.  stored: their ids by origin, read from the disk when called.
    kept: their rows, block by block.
    """

    pairs: int = 0
    stored: Callable[[], Mapping[str, set[Id]]] = field(default=dict)
    kept: Callable[[], Iterator[Kept]] = field(default=lambda: iter(()))


@dataclass(frozen=True, slots=True)
class BuildSource:
    """A source that can be read on from where an earlier run stopped.

    identity: JSON, the options; runs with the same may go on from one another.
    origins: the digests of the files that the source has now. Rows of an earlier run are kept up
    to the first whose origin is not among them; None = all are kept.
    steps: told what the earlier run stored, the steps that remain.
    fresh: forget the earlier run.  every_pairs, every_s: how much work a kill may cost; the first
    is not kept more often than every second, since a checkpoint waits for the disk.
    """

    identity: Mapping[str, Any]
    steps: Callable[[BuildProgress], Iterable[SourceStep]]
    origins: Collection[str] | None = None
    fresh: bool = False
    every_pairs: int = 4096
    every_s: float = 30.0
    least_s: float = 1.0

    def digest(self, **built: Any) -> str:
        """sha256 of the identity, and of what the builder itself was asked for."""
        return hashlib.sha256(json.dumps([self.identity, built], sort_keys=True).encode()).hexdigest()


def first_of_each(ids: Sequence[Id], seen: set[Id]) -> list[bool]:
    """For each id, whether it comes here for the first time; all of them are added to `seen`."""
    first = []
    for name in ids:
        first.append(name not in seen)
        seen.add(name)
    return first
