"""Files of one folder: which are images, and which file a name in a table means."""

import hashlib
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote

from models.data.samples import MAX_BYTES, UnusableItem
from models.encoder.image_io.formats import IMAGE_ENDINGS

URL = re.compile(r"(https?|s3|gs|ftp)://", re.IGNORECASE)
IGNORED = {"__macosx", "thumbs.db", "desktop.ini", "@eadir"}


def is_image(name: str) -> bool:
    """Whether a file name ends like an image."""
    return name.rpartition(".")[2].lower() in IMAGE_ENDINGS


def is_hidden(name: str) -> bool:
    """Whether a name is one that systems leave behind, such as `._a.jpg` and `.DS_Store`."""
    return name.startswith(".") or name.lower() in IGNORED


def walk_folder(
    root: Path, *, follow_links: bool, on_error: Callable[[OSError], object] = lambda _: None
) -> Iterator[tuple[Path, list[str], list[str]]]:
    """(folder, names of sub-folders, names of files) of each folder beneath, in a fixed order.

    The caller may shorten the list of sub-folders. A link to a folder is entered only where
    links are followed, and no folder twice.  on_error: called for a folder that cannot be read.
    """
    seen: set[Path] = set()
    for folder, folders, files in os.walk(root, followlinks=follow_links, onerror=on_error):
        real = real_path(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield Path(folder), folders, sorted(files)


def real_path(path: Path | str) -> Path:
    """The absolute path without links. `Path.resolve` raises RuntimeError for a link to itself."""
    return Path(os.path.realpath(path))


def digest_of(*facts: object) -> str:
    """A short digest of JSON values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def stamp(path: Path) -> list[str | int]:
    """Name, size and modification time of a file, by which a change is recognised."""
    found = path.stat()
    return [str(real_path(path)), found.st_size, found.st_mtime_ns]


def file_fault(path: Path) -> str | None:
    """Why a file is not what its name says, for the kinds of damage that downloads leave."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    if not head:
        return "it has 0 bytes: download it again"
    if head.startswith(b"version https://git-lfs.github.com/spec"):
        return "it is a pointer of Git LFS, not the file: run `git lfs pull`"
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "it is an HTML page, such as a login or an error: download it again"
    return None


def is_kind(path: Path, test: Callable[[Path], bool]) -> bool:
    """What `Path.is_file` or a test like it says; False where the path cannot be looked at."""
    try:
        return test(path)
    except OSError:
        return False


def place_fault(real: Path, root: Path, *, follow_links: bool) -> str | None:
    """Why a file must not be read from this place, or None.  real, root: paths without links."""
    if not is_kind(real, Path.is_file):
        return "is not a file within the folder"
    if not follow_links and not real.is_relative_to(root):
        return "is not a file within the folder (--follow-links lets links leave it)"
    return None


class Finder:
    """Files of one folder by the names that a table gives them.

    A name is tried as it is, then with "/" for a back-slash, without %-escapes, in both Unicode
    normal forms, without its "#number", and last by comparing letters without case, in any
    sub-folder where one file alone has the name. `spellings` counts what was needed.
    """

    def __init__(self, root: Path, *, follow_links: bool) -> None:
        self.root = real_path(root)
        self.spellings = Counter[str]()
        self._follow_links = follow_links
        self._index: dict[str, list[Path]] | None = None

    def find(self, name: str) -> Path:
        """The file of a name. Raises UnusableItem for a URL and for any file outside."""
        if URL.match(name):
            raise UnusableItem("it is a URL, and nothing is downloaded here: fetch it with img2dataset first")
        for spelling, candidate in _spellings(name):
            try:
                path = Path(os.path.realpath(self.root / candidate, strict=True))
            except (OSError, ValueError):
                continue
            return self._counted(spelling, self._checked(path))
        found = self._look_up(name)
        if found is None:
            raise UnusableItem("the file cannot be read (no such file, also under other spellings of its name)")
        return self._counted("letter case or folder", self._checked(real_path(found)))

    def images(self) -> dict[str, list[Path]]:
        """All image files beneath, by their comparable name."""
        if self._index is None:
            self._index = {}
            for folder, _, files in walk_folder(self.root, follow_links=self._follow_links):
                for file in files:
                    if is_image(file) and not is_hidden(file):
                        self._index.setdefault(comparable(file), []).append(folder / file)
        return self._index

    def _look_up(self, name: str) -> Path | None:
        """The one file whose path ends like the name, compared without case."""
        wanted = comparable(name)
        base = wanted.rpartition("/")[2]
        ending = [path for path in self.images().get(base, ()) if _ends_with(path, self.root, wanted)]
        same_folder = [path for path in ending if comparable(str(path.relative_to(self.root))) == wanted]
        some = same_folder or ending
        return some[0] if len(some) == 1 else None

    def _checked(self, path: Path) -> Path:
        if (reason := place_fault(path, self.root, follow_links=self._follow_links)) is not None:
            raise UnusableItem(f"it {reason}")
        return path

    def _counted(self, spelling: str, path: Path) -> Path:
        if spelling:
            self.spellings[spelling] += 1
        return path


def read_bytes(path: Path) -> bytes:
    """The bytes of a file. Raises UnusableItem."""
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise UnusableItem(f"{size} bytes, the limit is {MAX_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise UnusableItem(f"the file cannot be read ({error.strerror or 'no such name'})") from error


def comparable(name: str) -> str:
    """A relative name as it is compared where its spelling differs."""
    plain = unicodedata.normalize("NFC", unquote(name).replace("\\", "/")).casefold()
    return re.sub(r"^(\./)+", "", re.sub(r"#\d+$", "", plain)).strip()


def _spellings(name: str) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    plain = name.strip()
    slashed = plain.replace("\\", "/")
    bare = re.sub(r"#\d+$", "", slashed)
    for spelling, candidate in (
        ("", name),
        ("", plain),
        ("", bare if slashed == plain else name),
        ("back-slashes", slashed),
        ("%-escapes", unquote(bare)),
        ("Unicode form", unicodedata.normalize("NFC", unquote(bare))),
        ("Unicode form", unicodedata.normalize("NFD", unquote(bare))),
    ):
        if candidate not in seen and candidate:
            seen.add(candidate)
            yield spelling, candidate


def _ends_with(path: Path, root: Path, wanted: str) -> bool:
    own = comparable(str(path.relative_to(root)))
    return own == wanted or own.endswith(f"/{wanted}")
