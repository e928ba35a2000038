"""The snapshot reference of one served memory, swapped by a single assignment."""

from index_store.snapshot import Snapshot


class Memory:
    """A mutable reference to the snapshot being served.

    Readers take no lock: assigning a reference is atomic, so `current` is the old snapshot or the
    new one. Writers must not overlap, or two swaps may return the same retired snapshot; the
    service's `MemoryRegistry` swaps on its event loop only.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self._current = snapshot

    @property
    def current(self) -> Snapshot:
        """The snapshot being served: take it once per batch and use it until the batch ends."""
        return self._current

    def swap(self, snapshot: Snapshot) -> Snapshot:
        """Serve `snapshot` from now on; the retired one, which lives until its last batch ends."""
        retired, self._current = self._current, snapshot
        return retired
