"""Sources of samples: what a person gives is taken apart into tars, tables and walked folders."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from index_store.build.source import Reject
from models.data.archives.members import is_tar_name
from models.data.archives.webdataset import TarPart
from models.data.folders.discover import find_places
from models.data.folders.files import digest_of, real_path
from models.data.folders.tabled import TablePart, share_photos
from models.data.folders.walked import WalkedPart
from models.data.samples import Part, Reading, Sample, Skip, check_template, read_all_images
from models.data.tables.table import KINDS
from models.errors import DataError

BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
ACCEPTED = (
    "a .tar, a table (.csv, .tsv, .jsonl, .json, .parquet, .arrow, .xlsx), or a folder of these or of photos with "
    "sidecars or class names"
)


class FailedPart:
    """A part that cannot be read as a whole: one reject, with its reason."""

    notes: Sequence[str] = ()

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.label, self.reason = name, name, reason
        self.origins = frozenset[str]()

    def read(self, skip: Skip) -> Iterator[Sample | Reject]:
        """The one reject."""
        yield Reject(self.name, self.reason)


class NotedPart:
    """What is left alone beside the parts of a folder; it holds no item."""

    def __init__(self, name: str, notes: Sequence[str]) -> None:
        self.name, self.label, self.notes = name, name, notes
        self.origins = frozenset[str]()

    def read(self, skip: Skip) -> Iterator[Sample | Reject]:
        """Nothing."""
        return iter(())


class PrefixedPart:
    """A part whose ids begin with the part's name, since a part before it has some of them too."""

    def __init__(self, part: Part, prefix: str, shared: int) -> None:
        self._part, self._prefix = part, prefix
        self.name, self.label = part.name, prefix.removesuffix("/")
        self.notes = (*part.notes, f"{shared} of its ids came before: its ids begin with {prefix!r}")
        self.origins = frozenset(self._marked(origin) for origin in part.origins)

    def read(self, skip: Skip) -> Iterator[Sample | Reject]:
        """The items of the part, with longer ids."""
        for item in self._part.read(lambda origin, name: skip(self._marked(origin), self._prefix + name)):
            if isinstance(item, Sample):
                yield replace(item, id=self._prefix + item.id, origin=self._marked(item.origin))
            else:
                yield replace(item, item=self._prefix + item.item)

    def _marked(self, origin: str) -> str:
        return digest_of(origin, self._prefix)


def open_sources(sources: Iterable[Path], reading: Reading) -> list[Part]:
    """Open every source, in order; a part that cannot be read becomes a `FailedPart`.

    Raises DataError where a path does not exist or is of no known kind, and where no part of any
    source can be read.
    """
    check_template(reading.caption)
    parts = [part for source in sources for path in expand_braces(source) for part in _open(path, reading)]
    share_photos([part for part in parts if isinstance(part, TablePart)])
    failed = [part for part in parts if isinstance(part, FailedPart)]
    if failed and all(isinstance(part, FailedPart | NotedPart) for part in parts):
        raise DataError(failed[0].reason)
    return parts


def read_samples(source: Path, *, caption: str | None = None) -> Iterator[Sample | Reject]:
    """Read the samples of one source with their images.

    caption: a template over the metadata, such as "a photo of {class}".  Raises DataError.
    """
    return read_all([source], Reading(caption))


def read_all(sources: Iterable[Path], reading: Reading) -> Iterator[Sample | Reject]:
    """Read the samples of several sources, one after the other. Raises DataError."""
    parts = open_sources(sources, reading)
    return (item for part in parts for item in part.read(read_all_images))


def expand_braces(source: Path) -> list[Path]:
    """The files of a brace range such as `{00000..00010}.tar`, which a shell may leave as it is."""
    found = BRACES.search(str(source))
    if found is None or source.exists():
        return [source]
    first, last = int(found[1]), int(found[2])
    width = len(found[1])
    step = 1 if first <= last else -1  # as a shell counts
    names = (f"{number:0{width}d}" for number in range(first, last + step, step))
    text = str(source)
    paths = [Path(text[: found.start()] + name + text[found.end() :]) for name in names]
    return [each for path in paths for each in expand_braces(path)]


def _open(source: Path, reading: Reading) -> Iterator[Part]:
    """The parts of one path."""
    if source.is_dir():
        yield from _open_folder(source, reading)
        return
    if not source.is_file() or not (is_tar_name(source.name) or source.suffix.lower() in KINDS):
        what = "is neither a" if source.exists() else "does not exist: it is neither a"
        raise DataError(f"{source.name} {what} .tar file, a table nor a folder: give {ACCEPTED}")
    yield _opened_file(source, source.parent, reading)


def _open_folder(source: Path, reading: Reading) -> Iterator[Part]:
    """The parts of a folder."""
    places, name = find_places(source, reading), real_path(source).name
    if not places.any:
        raise DataError(f"{name} holds no table of captions, no tar and no photo: give {ACCEPTED}")
    for path, root in (*places.tables, *((path, path.parent) for path in places.tars)):
        yield _opened_file(path, root, reading)
    if places.photos:
        try:
            yield WalkedPart(source, places.photos, reading)
        except DataError as error:
            yield FailedPart(name, str(error))
    yield from (FailedPart(each, reason) for each, reason in places.refused)
    if places.notes:
        yield NotedPart(name, places.notes)


def _opened_file(path: Path, root: Path, reading: Reading) -> Part:
    try:
        return TarPart(path, reading) if is_tar_name(path.name) else TablePart(path, root, reading)
    except DataError as error:
        return FailedPart(path.name, str(error))
    except OSError as error:
        return FailedPart(path.name, f"{path.name} cannot be read ({error.strerror})")
