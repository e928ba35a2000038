"""What a folder holds: tables, tars and photos, and which of these belong together."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from models.data.archives.members import is_tar_name
from models.data.folders.files import is_hidden, is_image, is_kind, place_fault, real_path, walk_folder
from models.data.samples import Reading
from models.data.tables.documents import NO_CAPTIONS
from models.data.tables.table import KINDS, open_table
from models.errors import DataError

# Tables by name, the first that a folder holds is meant; a table of another name must have known
# columns.
PREFERRED = ("captions", "metadata")
QUIET = (".txt", ".token", ".json")  # files of these kinds that are no tables are nothing special
NO_TABLES = ("_stats.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


@dataclass(slots=True)
class Places:
    """What one folder holds.

    tables: (file, folder that holds its images).  photos: (folder relative to the root, its files).
    notes: what is left alone.  refused: (name, reason) of what cannot be read.
    """

    tables: list[tuple[Path, Path]] = field(default_factory=list)
    tars: list[Path] = field(default_factory=list)
    photos: list[tuple[Path, list[str]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)

    @property
    def any(self) -> bool:
        """Whether there is anything to read, or to refuse."""
        return bool(self.tables or self.tars or self.photos or self.refused)


def find_places(root: Path, reading: Reading) -> Places:
    """Walk a folder and tell its tables, tars and photos apart.

    A table or tar that lies elsewhere, through a link or a name in `state.json`, is refused unless
    links are followed.
    Raises DataError where a folder holds two tables of captions, of which one must be meant.
    """
    places, tables, links = Places(), list[Path](), 0

    def refuse_folder(error: OSError) -> None:
        name = Path(error.filename).name[:80]
        places.refused.append((name, f"the folder {name} cannot be read ({error.strerror}): grant permission"))

    for folder, folders, files in walk_folder(root, follow_links=reading.follow_links, on_error=refuse_folder):
        if not reading.follow_links:
            links += sum(is_kind(folder / name, Path.is_symlink) for name in folders)
        if "dataset_info.json" in files and any(name.endswith(".arrow") for name in files):
            places.tables += [(path, folder) for path in _admitted(_arrow_files(folder, files), root, reading, places)]
            folders.clear()
            continue
        tars = [folder / name for name in files if is_tar_name(name) and not is_hidden(name)]
        places.tars += _admitted(tars, root, reading, places)
        tables += _find_tables(root, folder, folders, files, reading, places)
        if any(is_image(name) and not is_hidden(name) for name in files):
            places.photos.append((folder.relative_to(root), files))
    if links:
        places.notes.append(f"{links} linked folders are not entered: --follow-links enters them")
    places.tars.sort()
    _assign_photos(root, tables, places)
    return places


def _admitted(paths: Sequence[Path], root: Path, reading: Reading, places: Places) -> list[Path]:
    """The files that may be read; the others are named in `places`, as are photos of that kind."""
    kept = []
    for path in paths:
        fault = place_fault(real_path(path), real_path(root), follow_links=reading.follow_links)
        if fault is None or (not is_kind(path, Path.exists) and real_path(path).is_relative_to(real_path(root))):
            kept.append(path)  # of one that is missing the build gives the system's reason
        elif path.suffix.lower() in QUIET:
            places.notes.append(f"{path.name} is left alone: it {fault}")
        else:
            places.refused.append((path.name, f"{path.name} {fault}"))
    return kept


def _find_tables(
    root: Path, folder: Path, folders: Sequence[str], files: Sequence[str], reading: Reading, places: Places
) -> list[Path]:
    """The tables of one folder that name images."""
    images = {Path(name).stem for name in files if is_image(name)}
    shards = {*folders, *(name.partition(".")[0] for name in files if is_tar_name(name))}
    named = [
        folder / name
        for name in files
        if Path(name).suffix.lower() in KINDS
        and not is_hidden(name)
        and not name.endswith(NO_TABLES)
        and Path(name).stem not in images
        # what img2dataset writes beside its output
        and not (name.lower().endswith(".parquet") and Path(name).stem in shards)
    ]
    found = _admitted(named, root, reading, places)
    for stem in PREFERRED:
        named = [path for path in found if path.stem.lower() == stem and path.suffix.lower() not in (".json", ".txt")]
        if len(named) > 1:
            raise DataError(
                f"{real_path(folder).name} holds {' and '.join(path.name for path in named)}: keep the one that is meant"
            )
        if named:
            return named
    return list(_known_tables(found, reading, places.notes))


def _known_tables(found: Sequence[Path], reading: Reading, notes: list[str]) -> Iterator[Path]:
    """The tables whose columns are known, or that are damaged: the build names these."""
    for path in found:
        try:
            open_table(path, reading)
        except DataError as error:
            quiet = path.suffix.lower() in QUIET
            if NO_CAPTIONS in str(error) or (not quiet and "has the columns" in str(error) and len(found) > 1):
                notes.append(f"{path.name} is left alone: {error}")
                continue
            if quiet:
                continue
        yield path


def _arrow_files(folder: Path, files: Sequence[str]) -> list[Path]:
    """The data files of a `save_to_disk` folder, in their order."""
    try:
        listed = json.loads((folder / "state.json").read_bytes())["_data_files"]
        return [folder / each["filename"] for each in listed]
    except (OSError, ValueError, KeyError, TypeError):
        return [folder / name for name in files if name.endswith(".arrow")]


def _assign_photos(root: Path, tables: Sequence[Path], places: Places) -> None:
    """Give each table the folder of its images; photos of a table are no photos of their own.

    Tables of one folder may share their images, as COCO's two do; of those in the folders beneath
    the table that lies higher is read alone.
    """
    with_photos = [root / folder for folder, _ in places.photos]
    taken: list[tuple[Path, Path]] = []  # of each table its folder, and the folder of its images
    for table in tables:
        own = table.parent
        if any(own != folder and own.is_relative_to(folder) for folder, _ in taken):
            places.notes.append(f"{table.name} of {own.name} is left alone: a table above names its photos")
            continue
        base = own if any(folder.is_relative_to(own) for folder in with_photos) else root
        holds_images = table.suffix.lower() in (".arrow", ".feather")
        places.tables.append((table, base))
        if not holds_images and with_photos:
            taken.append((own, base))
    places.photos = [
        (folder, files)
        for folder, files in places.photos
        if not any((root / folder).is_relative_to(base) for _, base in taken)
    ]
    left = [tar for tar in places.tars if any(tar.is_relative_to(table.parent) for table in tables)]
    if left and tables:
        places.tars = [tar for tar in places.tars if tar not in left]
        places.notes.append(f"{len(left)} tars beside a table are left alone: name them as sources of their own")
