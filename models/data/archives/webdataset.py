"""Reader of webdataset tar files."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from index_store.build.source import Reject
from models.data.archives.members import ReadMember, iterate_members, open_tar
from models.data.folders.files import digest_of, stamp
from models.data.samples import (
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
from models.encoder.image_io.formats import IMAGE_ENDINGS

TEXTS = ("txt", "text", "caption")
SCATTERED = (
    "the members of this key are not next to each other: write the tar again in order of names, as `tar --sort=name -cf` "
    "does"
)


class TarPart:
    """One webdataset tar: members that share a key are one sample."""

    notes: Sequence[str] = ()

    def __init__(self, path: Path, reading: Reading) -> None:
        """Read the names of the members. Raises DataError where the file is not a tar."""
        self.name, self.label = path.name, path.name.partition(".")[0]
        self._path, self._template = path, reading.caption
        self._origin = digest_of("tar", stamp(path), reading.caption)
        self.origins = frozenset([self._origin])
        self._scattered = self._find_scattered()

    def read(self, skip: Skip) -> Iterator[Sample | Reject]:
        """Every item of the tar.

        Members are read as bytes and never extracted, so that a name with ".." or a leading "/" is
        harmless.
        """
        with open_tar(self._path) as tar:
            for key, files in group_members(iterate_members(self._path, tar)):
                if isinstance(files, str):
                    yield Reject(key, files)
                elif key in self._scattered:
                    yield Reject(key, SCATTERED)
                else:
                    for name, own in split_images(key, files):
                        yield from self._read_sample(name, own, skip)

    def _read_sample(self, key: str, files: Mapping[str, ReadMember] | str, skip: Skip) -> Sequence[Sample | Reject]:
        try:
            if isinstance(files, str):
                raise UnusableItem(files)
            record, captions = read_texts(files, self._template)
            image = next(files[kind] for kind in IMAGE_ENDINGS if kind in files)
            numbered = len(captions) > 1 or _has_caption_list(files, record, self._template)
            names = [f"{key}#{i}" for i in range(len(captions))] if numbered else [key]
            data = b"" if all(skip(self._origin, name) for name in names) else image()
            metadata = user_metadata(record)
            return list(split_captions(key, data, captions, metadata, self._origin, numbered=numbered))
        except UnusableItem as error:
            return [Reject(key, str(error))]

    def _find_scattered(self) -> set[str]:
        """Keys that come back after another key, with members of other kinds than before."""
        seen: dict[str, set[str]] = {}
        scattered = set[str]()
        with open_tar(self._path) as tar:
            for key, files in group_members(iterate_members(self._path, tar)):
                if isinstance(files, str):
                    continue
                kinds = {kind.rpartition(".")[2] for kind in files}
                if key in seen and not kinds <= seen[key]:
                    scattered.add(key)
                seen.setdefault(key, set()).update(kinds)
        return scattered


def read_texts(files: Mapping[str, ReadMember], template: str | None) -> tuple[dict[str, Any], list[str]]:
    """The fields and the captions of one sample. Raises UnusableItem.

    The first that has any text counts: the txt, the json's "caption", its "captions", the cls.
    """
    record = parse_json_object(files["json"]()) if "json" in files else {}
    texts = [decode_text(files[kind](), "txt") for kind in TEXTS if kind in files]
    if "cls" in files:
        record = {"cls": decode_text(files["cls"](), "cls").strip(), **record}
    if template is not None:
        text = next((text for text in texts if text.strip()), None)
        return record, fill_template(template, {**({"caption": text} if text else {}), **record})
    found = next((text for text in texts if text.strip()), None)
    return record, choose_captions({**record, "txt": found}, ("txt", "caption", "captions"))


def group_members(
    members: Iterator[tuple[str, ReadMember | str]],
) -> Iterator[tuple[str, dict[str, ReadMember] | str]]:
    """Group consecutive members: (key, members by extension), or (name, why it is unreadable)."""
    key, files = "", dict[str, ReadMember]()
    for name, content in members:
        folder, _, base = name.rpartition("/")
        stem, _, kind = base.partition(".")
        if isinstance(content, str) or not stem or not kind:
            yield name, content if isinstance(content, str) else "its name is not KEY.EXTENSION"
            continue
        member_key, kind = f"{folder}/{stem}" if folder else stem, kind.lower()
        if files and (member_key != key or kind in files):  # a repeated extension starts another sample of the key
            yield key, files
            files = {}
        key, files[kind] = member_key, content
    if files:
        yield key, files


def split_images(key: str, files: Mapping[str, ReadMember]) -> Iterator[tuple[str, Mapping[str, ReadMember] | str]]:
    """One sample per image of a key: (its id, its own members and those that all share).

    A name such as `photo.v2.jpg` has the key `photo`; its text is `photo.v2.txt`, else
    `photo.txt`. Where a key has one image, the id is the key.
    """
    images = [kind for kind in files if kind.rpartition(".")[2] in IMAGE_ENDINGS]
    if not images:
        yield (
            key,
            f"no image among its members ({', '.join(sorted(files)) or 'none'}): "
            f"one of {', '.join(IMAGE_ENDINGS)} is needed",
        )
        return
    if len(images) == 1 and "." not in images[0]:
        yield key, files
        return
    stems = [kind.rpartition(".")[0] for kind in images]
    for kind, stem in zip(images, stems, strict=True):
        name = f"{key}.{kind}" if stems.count(stem) > 1 else f"{key}.{stem}" if stem else key
        own = {kind.rpartition(".")[2]: files[kind]}
        for each in ("json", "cls", *TEXTS):
            member = files.get(f"{stem}.{each}" if stem else each) or files.get(each)
            if member is not None:
                own[each] = member
        yield name, own


def _has_caption_list(files: Mapping[str, ReadMember], record: Mapping[str, Any], template: str | None) -> bool:
    """Whether the captions come from the json's list, whose entries are always numbered."""
    if template is not None or render_texts(record.get("caption"), "caption"):
        return False
    return not any(kind in files and decode_text(files[kind](), "txt").strip() for kind in TEXTS)
