"""A webdataset tar, as a stream of samples and rejects."""

import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from index_store.build.source import Reject
from models.data.samples import MAX_BYTES, Sample, Unusable, filled, metadata, parsed, said, utf8
from models.errors import DataError

IMAGES = ("jpg", "jpeg", "png", "webp")
Member = Callable[[], bytes]  # read when it is wanted: what is only counted is not


def read_tar(path: Path, template: str | None, skip: int) -> Iterator[Sample | Reject]:
    """Members are read as bytes and never extracted, so a name with .. or a leading / is only a name.

    skip: items passed over, their images unread.
    """
    given = 0
    with _opened(path) as tar:
        for key, files in _groups(path, tar):
            for item in _items(key, files, template, skip - given):
                given += 1
                yield item


def _items(key: str, files: Mapping[str, Member] | str, template: str | None, skip: int) -> Sequence[Sample | Reject]:
    try:
        return [Reject(key, files)] if isinstance(files, str) else _samples(key, files, template, skip)
    except Unusable as error:
        return [Reject(key, str(error))]


def _samples(key: str, files: Mapping[str, Member], template: str | None, skip: int) -> list[Sample]:
    """The samples of one key, all sharing one bytes object; the first `skip` of them without."""
    image = next((files[kind] for kind in IMAGES if kind in files), None)
    if image is None:
        raise Unusable(
            f"no image among its members ({', '.join(sorted(files)) or 'none'}): one of {', '.join(IMAGES)} is needed"
        )
    record = parsed(files["json"]()) if "json" in files else {}
    said_of = _captions(key, files, record, template)
    data = image() if skip < len(said_of) else b""
    own = metadata(record)
    return [Sample(name, data if i >= skip else b"", caption, own) for i, (name, caption) in enumerate(said_of)]


def _captions(
    key: str, files: Mapping[str, Member], record: Mapping[str, object], template: str | None
) -> list[tuple[str, str]]:
    """(id, caption) of every sample of one key."""
    if template is not None:
        return [(key, filled(template, record))]
    own, captions = record.get("caption"), record.get("captions")
    if "txt" in files:
        return [(key, said(utf8(files["txt"](), "txt")))]
    if own is not None or not isinstance(captions, list) or not captions:
        return [(key, said(own))]
    return [(f"{key}#{i}", said(each)) for i, each in enumerate(captions)]


def _groups(path: Path, tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, Member] | str]]:
    """Neighbouring members with one key, by extension; or, in their place, why an item cannot be read."""
    key, files = "", dict[str, Member]()
    for name, content in _members(path, tar):
        folder, _, base = name.rpartition("/")
        stem, _, kind = base.partition(".")
        if isinstance(content, str) or not stem or not kind:
            yield name, content if isinstance(content, str) else "its name is not KEY.EXTENSION"
            continue
        found, kind = f"{folder}/{stem}" if folder else stem, kind.lower()
        if files and (found != key or kind in files):  # an extension twice begins a second sample of the same key
            yield key, files
            files = {}
        key, files[kind] = found, content
    if files:
        yield key, files


def _opened(path: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(path, "r:")
    except (tarfile.TarError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path.name} is not a plain .tar file ({reason}): unpack a compressed one first") from error


def _members(path: Path, tar: tarfile.TarFile) -> Iterator[tuple[str, Member | str]]:
    """Every member's name with how to read it, or with why it cannot be. A damaged archive ends with one line about what was lost."""
    size = path.stat().st_size
    try:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile remembers every member it has seen: a gigabyte per million
            if (
                member.isreg() and member.offset_data + member.size > size
            ):  # told without reading: a count finds what a build finds
                yield path.name, f"the archive breaks off in {member.name}: what lay behind is lost"
                return
            if not member.isdir():
                yield member.name, _reader(tar, member)
    except (tarfile.TarError, OSError) as error:
        yield path.name, f"the archive breaks off ({error}): what lay behind is lost"
        return
    if not _ends_at(path, tar.offset):
        yield path.name, f"the archive breaks off at byte {tar.offset}: what lay behind, if anything, is lost"


def _ends_at(path: Path, offset: int) -> bool:
    """True where the end mark of a tar, a block of zeros, stands; tarfile itself takes damage for the end."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def _reader(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Member | str:
    if not member.isreg():
        return "not a plain file"
    if member.size > MAX_BYTES:
        return f"{member.size} bytes, the limit is {MAX_BYTES}"

    def read() -> bytes:
        content = tar.extractfile(member)
        return b"" if content is None else content.read()

    return read
