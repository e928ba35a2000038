"""Members of a tar, plain or compressed, one after the other; nothing is extracted to disk."""

import tarfile
import zlib
from collections.abc import Callable, Iterator
from lzma import LZMAError
from pathlib import Path
from typing import Self

from models.data.folders.files import file_fault, is_hidden
from models.data.samples import MAX_BYTES, UnusableItem
from models.errors import DataError

# Called only where the bytes are needed, so that counting reads no image. Raises UnusableItem.
ReadMember = Callable[[], bytes]
ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
EXTENDED_TYPES = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
MAX_HEADER_BYTES = 2**20  # of the names and attributes of one member
# ValueError, OverflowError: numbers of extended headers, which tarfile reads unchecked
_BREAKS = (tarfile.TarError, OSError, EOFError, zlib.error, LZMAError, ValueError, OverflowError)


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


def is_tar_name(name: str) -> bool:
    """Whether a file name ends like a tar."""
    return name.lower().endswith(ENDINGS)


def open_tar(path: Path) -> tarfile.TarFile:
    """Open a tar, plain or compressed. Raises DataError with what the file really is."""
    fault = file_fault(path)
    try:
        if fault is None:
            return tarfile.open(path, "r:*", tarinfo=_BoundedHeader)
    except _BREAKS as error:
        fault = getattr(error, "strerror", None) or "no tar header, plain or compressed"
    raise DataError(f"{path.name} is not a readable .tar file ({fault})")


def iterate_members(path: Path, tar: tarfile.TarFile) -> Iterator[tuple[str, ReadMember | str]]:
    """Each member's name with a function that reads it, or with why it cannot be read.

    A damaged archive ends with one such reason. What systems leave behind (`._*`) is passed over.
    A member of a compressed tar is read at once: going back in it would decompress it anew.
    """
    plain = _is_plain(path)
    size = path.stat().st_size
    try:
        while (member := tar.next()) is not None:
            if member.size < 0 or tar.offset <= member.offset:  # it would be read again and again
                raise tarfile.ReadError(f"{member.name[:80]} has a size of {member.size} bytes")
            # tarfile keeps every member that it has seen, a gigabyte per million
            tar.members.clear()  # type: ignore[attr-defined]
            # checked before reading, so that counting and building find the same items
            if plain and member.isreg() and member.offset_data + member.size > size:
                yield path.name, f"the archive breaks off in {member.name}: what lay behind is lost"
                return
            base = member.name.rpartition("/")[2]
            if not member.isdir() and not (is_hidden(base) and base.startswith("._")):
                yield member.name, _member_reader(tar, member, at_once=not plain)
    except _BREAKS as error:
        yield path.name, f"the archive breaks off ({error}): what lay behind is lost"
        return
    if plain and not _has_end_mark(path, tar.offset):
        yield path.name, f"the archive breaks off at byte {tar.offset}: what lay behind, if anything, is lost"


def _is_plain(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(6)
    return not head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ"))


def _has_end_mark(path: Path, offset: int) -> bool:
    """Whether a tar's end mark, a block of zeros, is at this offset. tarfile ends at damage too."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def _member_reader(tar: tarfile.TarFile, member: tarfile.TarInfo, *, at_once: bool) -> ReadMember | str:
    if not member.isreg():
        return "not a plain file"
    if member.size > MAX_BYTES:
        return f"{member.size} bytes, the limit is {MAX_BYTES}"

    def read() -> bytes:
        content = tar.extractfile(member)
        data = b"" if content is None else content.read()
        if len(data) < member.size:
            raise EOFError(f"{member.name} is cut")
        return data

    def read_later() -> bytes:
        try:
            return read()
        except _BREAKS as error:
            raise UnusableItem(f"it cannot be read from the archive ({error})") from error

    if not at_once:
        return read_later
    data = read()
    return lambda: data
