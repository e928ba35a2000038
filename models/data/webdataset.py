"""Reader of webdataset tar files."""

import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

from index_store.build.source import Reject
from models.data.samples import (
    MAX_BYTES,
    Sample,
    UnusableItem,
    clean_caption,
    decode_utf8,
    fill_template,
    parse_json_object,
    user_metadata,
)
from models.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
EXTENDED_TYPES = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
MAX_HEADER_BYTES = 2**20  # of the names and attributes of one member
ReadMember = Callable[[], bytes]  # called only where the bytes are needed, so that counting reads no image


class _BoundedHeader(tarfile.TarInfo):
    """A member's header; one of names or attributes that claims an absurd size is refused.

    tarfile would ask for that much memory before it reads.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Raise SubsequentHeaderError, which tarfile turns into ReadError."""
        header = super().frombuf(buf, encoding, errors)
        if header.type in EXTENDED_TYPES and header.size > MAX_HEADER_BYTES:
            raise tarfile.SubsequentHeaderError(  # type: ignore[attr-defined]
                f"an extended header of {header.size} bytes, the limit is {MAX_HEADER_BYTES}"
            )
        return header


def read_tar(path: Path, template: str | None, skip: int) -> Iterator[Sample | Reject]:
    """Read the samples of a tar. Raises DataError where the file is not a plain tar.

    Members are read as bytes and never extracted, so that a name with ".." or a leading "/" is
    harmless.  template, skip: as in `sources.read_samples`.
    """
    items = 0
    with _open_tar(path) as tar:
        for key, files in _group_members(path, tar):
            for item in _read_items(key, files, template, skip - items):
                items += 1
                yield item


def _read_items(
    key: str, files: Mapping[str, ReadMember] | str, template: str | None, skip: int
) -> Sequence[Sample | Reject]:
    try:
        return [Reject(key, files)] if isinstance(files, str) else _read_samples(key, files, template, skip)
    except UnusableItem as error:
        return [Reject(key, str(error))]


def _read_samples(key: str, files: Mapping[str, ReadMember], template: str | None, skip: int) -> list[Sample]:
    """The samples of one key. They share one bytes object; the first `skip` have no image."""
    read_image = next((files[kind] for kind in IMAGE_EXTENSIONS if kind in files), None)
    if read_image is None:
        raise UnusableItem(
            f"no image among its members ({', '.join(sorted(files)) or 'none'}): "
            f"one of {', '.join(IMAGE_EXTENSIONS)} is needed"
        )
    record = parse_json_object(files["json"]()) if "json" in files else {}
    captions = _read_captions(key, files, record, template)
    image = read_image() if skip < len(captions) else b""
    metadata = user_metadata(record)
    return [Sample(name, image if i >= skip else b"", caption, metadata) for i, (name, caption) in enumerate(captions)]


def _read_captions(
    key: str, files: Mapping[str, ReadMember], record: Mapping[str, object], template: str | None
) -> list[tuple[str, str]]:
    """(id, caption) of each sample of one key."""
    if template is not None:
        return [(key, fill_template(template, record))]
    caption, captions = record.get("caption"), record.get("captions")
    if "txt" in files:
        return [(key, clean_caption(decode_utf8(files["txt"](), "txt")))]
    if caption is not None or not isinstance(captions, list) or not captions:
        return [(key, clean_caption(caption))]
    return [(f"{key}#{i}", clean_caption(each)) for i, each in enumerate(captions)]


def _group_members(path: Path, tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, ReadMember] | str]]:
    """Group consecutive members: (key, members by extension), or (name, why it is unreadable)."""
    key, files = "", dict[str, ReadMember]()
    for name, content in _iterate_members(path, tar):
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


def _open_tar(path: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(path, "r:", tarinfo=_BoundedHeader)
    except (tarfile.TarError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path.name} is not a plain .tar file ({reason}): unpack a compressed one first") from error


def _iterate_members(path: Path, tar: tarfile.TarFile) -> Iterator[tuple[str, ReadMember | str]]:
    """Each member's name with a function that reads it, or with why it cannot be read.

    A damaged archive ends with one such reason.
    """
    size = path.stat().st_size
    try:
        while (member := tar.next()) is not None:
            # tarfile keeps every member that it has seen, a gigabyte per million
            tar.members.clear()  # type: ignore[attr-defined]
            # checked before reading, so that counting and building find the same items
            if member.isreg() and member.offset_data + member.size > size:
                yield path.name, f"the archive breaks off in {member.name}: what lay behind is lost"
                return
            if not member.isdir():
                yield member.name, _member_reader(tar, member)
    except (tarfile.TarError, OSError) as error:
        yield path.name, f"the archive breaks off ({error}): what lay behind is lost"
        return
    if not _has_end_mark(path, tar.offset):
        yield path.name, f"the archive breaks off at byte {tar.offset}: what lay behind, if anything, is lost"


def _has_end_mark(path: Path, offset: int) -> bool:
    """Whether a tar's end mark, a block of zeros, is at this offset. tarfile ends at damage too."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def _member_reader(tar: tarfile.TarFile, member: tarfile.TarInfo) -> ReadMember | str:
    if not member.isreg():
        return "not a plain file"
    if member.size > MAX_BYTES:
        return f"{member.size} bytes, the limit is {MAX_BYTES}"

    def read() -> bytes:
        content = tar.extractfile(member)
        return b"" if content is None else content.read()

    return read
