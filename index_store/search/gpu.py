"""Faiss indexes cloned to GPUs, each device used by one thread only.

Faiss allows one thread at a time on a GPU, and no clone may be loaded while another is freed there.
So each device has one thread on which loading, searching and freeing run one after the other.
Not yet run on a GPU: the tests take the same path with clones in host memory.
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

HOST_MEMORY = -1  # device number of clones in host memory

_device_threads: dict[int, "DeviceThread"] = {}  # kept for the life of the process, as CUDA contexts are
_device_threads_lock = threading.Lock()


class DeviceThread:
    """The only thread that uses a device, and the faiss resources (streams, scratch) there."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._thread = ThreadPoolExecutor(1, f"device-{device}")
        self._resources = None if device == HOST_MEMORY else self.submit(faiss.StandardGpuResources).result()

    @staticmethod
    def get(device: int) -> "DeviceThread":
        """The thread of a device, for all snapshots. Raises DeviceRefused for an unknown GPU."""
        if device != HOST_MEMORY and not 0 <= device < faiss.get_num_gpus():
            raise DeviceRefused(
                f"device {device} is not there, faiss sees {faiss.get_num_gpus()} GPUs: name one of these, or none"
            )
        with _device_threads_lock:
            if device not in _device_threads:
                _device_threads[device] = DeviceThread(device)
            return _device_threads[device]

    def submit(self, work: Callable[..., Any], *arguments: Any, **options: Any) -> Future[Any]:
        """Run `work` on the device's thread, after everything submitted before."""
        return self._thread.submit(work, *arguments, **options)

    def clone(self, index: faiss.Index) -> faiss.Index:
        """Copy an index to the device; call it on the device's thread.

        Raises DeviceRefused where faiss cannot clone the index or the device's memory is full.
        """
        try:
            if self._resources is None:
                return faiss.clone_index(index)
            return faiss.index_cpu_to_gpu(self._resources, self._device, index)
        except RuntimeError as error:
            reason = str(error).rpartition(": ")[2].splitlines()[0]
            raise DeviceRefused(
                f"an index of {index.ntotal} rows cannot be put on device {self._device} ({reason}): "
                "add a device, or keep it mapped"
            ) from error


class ClonedIndex:
    """A copy of an index on a device, with the same results as the original.

    Garbage collection of this object frees the copy on the device's thread.
    """

    def __init__(self, index: faiss.Index, device_thread: DeviceThread) -> None:
        self.d, self.ntotal = index.d, index.ntotal
        self.wrapper_types = wrapper_types(index)
        self._takes_params = bool(self.wrapper_types) or faiss.try_extract_index_ivf(index) is not None
        self._device_thread = device_thread
        self._held = [device_thread.submit(device_thread.clone, index).result()]  # a list, so that _free can clear it
        weakref.finalize(self, _free, device_thread, self._held).atexit = False

    def search(self, queries: np.ndarray, k: int, params: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """(B, k) scores and rows.  queries: (B, Dk) float32.  k: at most 2048 on a GPU."""
        found: tuple[np.ndarray, np.ndarray] = self.submit_search(queries, k, params).result()
        return found

    def submit_search(self, queries: np.ndarray, k: int, params: Any) -> Future[Any]:
        """The future of a search, queued on the device's thread."""
        params = params if self._takes_params else None
        return self._device_thread.submit(self._held[0].search, queries, k, params=params)


class ClonedShards:
    """Clones of several shards searched concurrently; row numbers count through all shards."""

    def __init__(self, clones: Sequence[ClonedIndex]) -> None:
        self._clones = clones
        self._starts = np.cumsum([0, *(clone.ntotal for clone in clones)]).tolist()

    def search(self, queries: np.ndarray, k: int, params: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """(B, k) scores and rows, the best of all shards; absent rows are -1 and come last."""
        searches = [clone.submit_search(queries, k, params) for clone in self._clones]
        found = [search.result() for search in searches]
        scores = np.hstack([scores for scores, _ in found])  # (B, clones * k)
        rows = np.hstack(
            [np.where(rows >= 0, rows + start, -1) for (_, rows), start in zip(found, self._starts, strict=False)]
        )
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


def wrapper_types(index: faiss.Index) -> list[type[faiss.Index]]:
    """The wrappers around an index that take search parameters of their own, outermost first.

    Each is IndexRefine or IndexPreTransform.
    """
    found: list[type[faiss.Index]] = []
    while isinstance(index, faiss.IndexRefine | faiss.IndexPreTransform):
        inner = index.base_index if isinstance(index, faiss.IndexRefine) else index.index
        found.append(faiss.IndexRefine if isinstance(index, faiss.IndexRefine) else faiss.IndexPreTransform)
        index = faiss.downcast_index(inner)
    return found


def _free(device_thread: DeviceThread, held: list[faiss.Index]) -> None:
    with suppress(RuntimeError):  # at process exit the thread has already ended
        device_thread.submit(held.clear)
