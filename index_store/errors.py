"""Exceptions of the store, one tree below StoreError.

    StoreError
    ├── NameRefused            a memory or version name that is not a plain name
    ├── UnknownMemory          no memory of this name in the store
    ├── UnknownVersion         the memory exists, the version does not (or none is current)
    ├── VersionExists          a finished version is never overwritten
    ├── DamagedVersion         a file is missing, truncated, altered or contradicts the manifest
    ├── IncompatibleSnapshot   intact, but built by another encoder or in another format
    ├── PairsRefused           rows that this memory cannot hold: shape, length, ids, widths
    ├── QueryRefused           a search that this memory cannot answer: width, k, not finite
    ├── RecipeRefused          faiss cannot build such an index from these rows
    ├── DeviceRefused          a GPU that does not exist or has no memory left for a shard
    ├── RecallTooLow           the index misses too many of the exact answers
    ├── StoreBusy              another process is building or editing this version
    └── StoreUnwritable        no permission or no space left where the store lies

Messages are one line with the value, the limit and the remedy. Paths in them are relative to the
store, never absolute.
"""


class StoreError(Exception):
    """Base class of every error of this package; the memory being served stays untouched."""


class NameRefused(StoreError):
    """The name of a memory or version is not a plain name, for example a path."""


class UnknownMemory(StoreError):
    """The store holds no finished version under this name."""


class UnknownVersion(StoreError):
    """The version does not exist, or no version has been activated yet."""


class VersionExists(StoreError):
    """A build would overwrite a finished version."""


class DamagedVersion(StoreError):
    """A file is missing, truncated, altered or unlike the manifest, or an edit is unreadable."""


class IncompatibleSnapshot(StoreError):
    """The version was built by another encoder than the querying one, or in another format."""


class PairsRefused(StoreError):
    """Pairs are misaligned, empty, not finite, not of unit length, of a wrong width or id type.

    Also raised where an id occurs twice.
    """


class QueryRefused(StoreError):
    """The search does not fit this memory: wrong width, k below one, a value not finite."""


class RecipeRefused(StoreError):
    """Faiss cannot build the index recipe from these rows."""


class DeviceRefused(StoreError):
    """Faiss sees no such GPU, or the GPU has no memory left for an index."""


class RecallTooLow(StoreError):
    """The index finds fewer of the stored exact answers than its recall floor requires."""


class StoreBusy(StoreError):
    """Another process is building or editing this version, or has activated another one."""


class StoreUnwritable(StoreError):
    """The folder of the store cannot be written: no permission, or no space left."""


def faiss_message(error: RuntimeError) -> str:
    """The message of a faiss error in one line, without the location in faiss' sources."""
    return str(error).rpartition("Error: ")[2].partition("\n")[0]
