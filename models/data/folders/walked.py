"""A folder of images without a table: sidecar files beside them, or class names as folders."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from index_store.build.source import Reject
from models.data.folders.files import Finder, digest_of, is_hidden, is_image, read_bytes, real_path
from models.data.samples import (
    DEFAULT_TEMPLATE,
    Reading,
    Sample,
    Skip,
    UnusableItem,
    choose_captions,
    decode_text,
    fill_template,
    parse_json_object,
    render_texts,
    split_captions,
    user_metadata,
)
from models.errors import DataError

SIDECARS = (".txt", ".json", ".caption")


class WalkedPart:
    """The images of some folders beneath a root.

    folders: (path relative to the root, names of its files) of each folder that holds images.
    """

    def __init__(self, root: Path, folders: Sequence[tuple[Path, list[str]]], reading: Reading) -> None:
        """Choose sidecars or class names. Raises DataError where neither gives a caption."""
        self.name = self.label = real_path(root).name
        self._root, self._folders, self._reading = root, folders, reading
        self._finder = Finder(root, follow_links=reading.follow_links)
        self._has_sidecars = any(_sidecars(files) for _, files in folders)
        self._template = reading.caption
        named = sum(folder != Path() for folder, _ in folders)
        if self._template is None and not self._has_sidecars:
            if not named:
                raise DataError(
                    f"{self.name} holds photos and no caption: put a captions.csv (file,caption) there, a .txt beside "
                    "each photo, or the photos in one folder per class; or give --caption, as in '{name}'"
                )
            self._template = DEFAULT_TEMPLATE
        self._origins = {folder: self._folder_digest(folder, files) for folder, files in folders}
        self.origins = frozenset(self._origins.values())

    @property
    def notes(self) -> list[str]:
        """Where captions come from, and the files that are left alone."""
        notes, others, images = [], Counter[str](), 0
        for _, files in self._folders:
            kept = {Path(name).stem for name in files if is_image(name) and not is_hidden(name)}
            for name in files:
                if is_hidden(name):
                    others["hidden or left by a system, such as ._*"] += 1
                elif is_image(name):
                    images += 1
                elif not (Path(name).suffix.lower() in SIDECARS and Path(name).stem in kept):
                    others[Path(name).suffix.lower() or "no ending"] += 1
        classes = len({folder.name for folder, _ in self._folders if folder != Path()})
        if self._reading.caption is None:
            how = (
                "captions from the .txt or .json beside each photo"
                if self._has_sidecars
                else f"{classes} classes by folder, captions {DEFAULT_TEMPLATE!r} (change it with --caption)"
            )
            notes.append(f"{images} photos, {how}")
        if others:
            listed = ", ".join(f"{count} × {kind}" for kind, count in others.most_common(5))
            notes.append(f"{sum(others.values())} other files left alone: {listed}")
        return notes

    def read(self, skip: Skip) -> Iterator[Sample | Reject]:
        """One item per caption of every image, folder by folder."""
        for folder, files in self._folders:
            origin, beside = self._origins[folder], _sidecars(files)
            for name in files:
                if not is_image(name) or is_hidden(name):
                    continue
                item = (folder / name).as_posix()
                try:
                    yield from self._items(item, origin, beside.get(Path(name).stem, ()), skip)
                except UnusableItem as error:
                    yield Reject(item, str(error))

    def _items(self, item: str, origin: str, sidecars: Sequence[str], skip: Skip) -> Iterator[Sample | Reject]:
        path = self._finder.find(item)
        folder = Path(item).parent
        record, text = self._read_sidecars(self._root / folder, sidecars)
        place = {"class": folder.name, "folder": folder.as_posix(), "name": Path(item).stem}
        if folder == Path():
            place["class"] = place["folder"] = ""
        if self._template is not None:
            captions = fill_template(self._template, {**place, **({"caption": text} if text else {}), **record})
        else:
            captions = choose_captions({"text": text, **record}, ("text", "caption", "captions"))
        metadata = user_metadata(record)
        if not self._has_sidecars and place["class"]:
            metadata = {"class": place["class"], **metadata}
        several = len(captions) > 1
        names = [f"{item}#{i}" for i in range(len(captions))] if several else [item]
        data = b"" if all(skip(origin, name) for name in names) else read_bytes(path)
        yield from split_captions(item, data, captions, metadata, origin, numbered=several)

    def _read_sidecars(self, folder: Path, names: Sequence[str]) -> tuple[dict[str, Any], str]:
        """The fields of the .json and the text of the .txt beside an image."""
        record: dict[str, Any] = {}
        text = ""
        for name in names:
            path = self._finder.find((folder / name).relative_to(self._root).as_posix())
            if name.lower().endswith(".json"):
                record = parse_json_object(read_bytes(path), "json")
            else:
                text = text or " ".join(render_texts(decode_text(read_bytes(path), "txt"), "txt"))
        return record, text

    def _folder_digest(self, folder: Path, files: Sequence[str]) -> str:
        """Digest of names, sizes and times of a folder's images and sidecars."""
        facts, beside = [], {name for names in _sidecars(files).values() for name in names}
        for name in files:
            if name not in beside and (not is_image(name) or is_hidden(name)):
                continue
            try:
                found = (self._root / folder / name).stat()
                facts.append([name, found.st_size, found.st_mtime_ns])
            except OSError:
                facts.append([name, 0, 0])
        own = [self._reading.caption, self._template, self._has_sidecars, dict(self._reading.columns)]
        return digest_of("walk", str(real_path(self._root / folder)), facts, own)


def _sidecars(files: Sequence[str]) -> Mapping[str, list[str]]:
    """The .txt and .json files of each image, by its stem."""
    stems = {Path(name).stem for name in files if is_image(name)}
    found: dict[str, list[str]] = {}
    for name in files:
        path = Path(name)
        if path.suffix.lower() in SIDECARS and path.stem in stems and not is_hidden(name):
            found.setdefault(path.stem, []).append(name)
    return found
