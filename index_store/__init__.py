"""Versioned, verified memories of image-text pairs on disk, with nearest-neighbour search.

A running service can edit a memory online and replace its version without stopping.
"""

from index_store.build.build import build_version
from index_store.errors import StoreError
from index_store.memory import Memory
from index_store.neighbors import Neighbors
from index_store.search.filters import SearchParams
from index_store.snapshot import Snapshot
from index_store.store import Store
from index_store.types import Pairs, Side

__all__ = ["Memory", "Neighbors", "Pairs", "SearchParams", "Side", "Snapshot", "Store", "StoreError", "build_version"]
