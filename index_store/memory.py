"""The one mutable thing of the package: which snapshot is being served."""

import threading

from index_store.snapshot import Snapshot


class Memory:
    """The snapshot being served. The only mutable thing in this package is one reference."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._current = snapshot
        self._writer = threading.Lock()  # writers only: readers take the reference and keep it

    @property
    def current(self) -> Snapshot:
        """The snapshot to pin for one batch: take it once and keep it until the batch ends."""
        return self._current

    def swap(self, snapshot: Snapshot) -> Snapshot:
        """Publish `snapshot`; return the retired one, alive until its last batch ends."""
        with self._writer:
            retired, self._current = self._current, snapshot
        return retired
