"""Indexes cloned to GPUs. Not yet run on one: the tests take the same path with clones in host memory.

faiss allows one thread at a time on a GPU, and a clone must not be loaded while another is freed there; so each device has one owner
thread on which everything happens in turn. Callers wait for it; a batch in front makes their queue short.
"""

import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import faiss
import numpy as np

from index_store.errors import DeviceRefused

HOST_MEMORY = -1  # in place of a GPU's number: a clone in host memory

_owners: dict[int, "DeviceThread"] = {}  # for the life of the process, as the device's context is
_owners_lock = threading.Lock()


class DeviceThread:
    """The one thread that touches a device, and the resources (streams, scratch memory) that all its clones share."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._thread = ThreadPoolExecutor(1, f"device-{device}")
        self._resources = None if device == HOST_MEMORY else self.submit(faiss.StandardGpuResources).result()

    @staticmethod
    def of(device: int) -> "DeviceThread":
        """The owner of a device, which is the same for every snapshot; DeviceRefused where faiss sees no such GPU."""
        if device != HOST_MEMORY and not 0 <= device < faiss.get_num_gpus():
            raise DeviceRefused(
                f"device {device} is not there, faiss sees {faiss.get_num_gpus()} GPUs: name one of these, or none"
            )
        with _owners_lock:
            if device not in _owners:
                _owners[device] = DeviceThread(device)
            return _owners[device]

    def submit(self, work: Callable[..., Any], *arguments: Any, **options: Any) -> Future[Any]:
        """Do it on the owner's thread, after what was submitted before."""
        return self._thread.submit(work, *arguments, **options)

    def clone(self, index: faiss.Index) -> faiss.Index:
        """A copy of an index on this device; called on the owner's thread."""
        try:
            if self._resources is None:
                return faiss.clone_index(index)
            return faiss.index_cpu_to_gpu(self._resources, self._device, index)
        except RuntimeError as error:
            reason = str(error).rpartition(": ")[2].splitlines()[0]
            raise DeviceRefused(
                f"an index of {index.ntotal} rows cannot be put on device {self._device} ({reason}): add a device, or keep it mapped"
            ) from error


class ClonedIndex:
    """An index on a device, searched as the original would be. Freed on its owner's thread once nobody holds it."""

    def __init__(self, index: faiss.Index, owner: DeviceThread) -> None:
        self.d, self.ntotal = index.d, index.ntotal
        self.shells = wrapper_types(index)
        self._heeds = bool(self.shells) or faiss.try_extract_index_ivf(index) is not None
        self._owner = owner
        self._held = [owner.submit(owner.clone, index).result()]  # in a list that the last act can empty
        weakref.finalize(self, _free, owner, self._held).atexit = False

    def search(self, queries: np.ndarray, k: int, params: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """(B, k) scores and rows.  queries: (B, Dk) float32.  k: at most 2048 on a GPU."""
        found: tuple[np.ndarray, np.ndarray] = self.begin(queries, k, params).result()
        return found

    def begin(self, queries: np.ndarray, k: int, params: Any) -> Future[Any]:
        """The same, not waited for."""
        return self._owner.submit(self._held[0].search, queries, k, params=params if self._heeds else None)


class ClonedShards:
    """Clones of several shards, searched at the same time; rows are numbered through."""

    def __init__(self, clones: Sequence[ClonedIndex]) -> None:
        self._clones = clones
        self._starts = np.cumsum([0, *(clone.ntotal for clone in clones)]).tolist()

    def search(self, queries: np.ndarray, k: int, params: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """(B, k) scores and rows, the best of all; absent ones last, as faiss gives them."""
        begun = [clone.begin(queries, k, params) for clone in self._clones]
        found = [search.result() for search in begun]
        scores = np.hstack([scores for scores, _ in found])  # (B, clones * k)
        rows = np.hstack(
            [np.where(rows >= 0, rows + start, -1) for (_, rows), start in zip(found, self._starts, strict=False)]
        )
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


def wrapper_types(index: faiss.Index) -> list[type[faiss.Index]]:
    """What lies around an index, outermost first, and has parameters of its own: IndexRefine, IndexPreTransform."""
    found: list[type[faiss.Index]] = []
    while isinstance(index, faiss.IndexRefine | faiss.IndexPreTransform):
        inner = index.base_index if isinstance(index, faiss.IndexRefine) else index.index
        found.append(faiss.IndexRefine if isinstance(index, faiss.IndexRefine) else faiss.IndexPreTransform)
        index = faiss.downcast_index(inner)
    return found


def _free(owner: DeviceThread, held: list[faiss.Index]) -> None:
    with suppress(RuntimeError):  # the process is ending, and the thread is gone
        owner.submit(held.clear)
