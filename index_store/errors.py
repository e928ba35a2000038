"""Every way a memory can refuse, drawn as one tree.

    StoreError
    ├── NameRefused            a memory or version name that is not a plain name
    ├── UnknownMemory          no memory of this name in the store
    ├── UnknownVersion         the memory exists, the version does not (or none is current)
    ├── VersionExists          a version is written once and never overwritten
    ├── DamagedVersion         a file is missing, cut, altered, or disagrees with the manifest; edits with a hole among them
    ├── IncompatibleSnapshot   sound, but made by another encoder or a newer format
    ├── PairsRefused           rows that this memory may not hold: misaligned, not unit, not finite, of other ids or widths
    ├── QueryRefused           a search that this memory cannot answer: width, k, not finite
    ├── RecipeRefused          faiss cannot make such an index of these rows
    ├── DeviceRefused          a GPU that is not there, or has no room for a shard
    ├── RecallTooLow           the index misses too many of the exact answers
    ├── StoreBusy              another process is building or editing this very version
    └── StoreUnwritable        no permission, or no room left, where the store lies

Messages are one line with the value, the limit and the remedy; paths are relative to the store, never absolute.
"""


class StoreError(Exception):
    """Any refusal of this package; catching it leaves the memory that serves untouched."""


class NameRefused(StoreError):
    """A memory or a version is asked for by something that is not a plain name, such as a path."""


class UnknownMemory(StoreError):
    """The store holds no finished version under this name."""


class UnknownVersion(StoreError):
    """The version asked for does not exist, or nothing has been activated yet."""


class VersionExists(StoreError):
    """A build would overwrite a finished version."""


class DamagedVersion(StoreError):
    """A file of the version is missing, cut, altered, or holds other counts than the manifest, or an acknowledged edit cannot be read."""


class IncompatibleSnapshot(StoreError):
    """The version was built by another encoder than the one asking, or in a newer format."""


class PairsRefused(StoreError):
    """The rows offered are misaligned, empty, not finite, not of unit length, of another width, or carry an id twice or of another type."""


class QueryRefused(StoreError):
    """The search asked for does not fit this memory: wrong width, k below one, a value that is not finite."""


class RecipeRefused(StoreError):
    """The index recipe is not one that faiss can build from these rows."""


class DeviceRefused(StoreError):
    """A GPU is asked for that faiss does not see, or that has no room for an index."""


class RecallTooLow(StoreError):
    """The index finds fewer of the stored exact answers than its floor promises."""


class StoreBusy(StoreError):
    """Another process is building or editing this very version at this moment, or has moved on from it."""


class StoreUnwritable(StoreError):
    """The store's folder cannot be written: no permission, or no room left."""


def reason(error: RuntimeError) -> str:
    """What faiss complains of, in one line and without the place in its own sources."""
    return str(error).rpartition("Error: ")[2].partition("\n")[0]
