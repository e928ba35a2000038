"""Limits on the cost of decoding, checked on an image's bytes before a decoder runs.

Width and height bound neither time nor memory: a progressive JPEG may repeat its scans, a TIFF
names the size of its tiles, a WebP the size of its canvas. Images from usual programs are far below
each limit.
"""

import io
import re
import struct
from collections.abc import Mapping, Sequence

from models.errors import BrokenImage, CostlyImage, ImageTooLarge, UnsupportedImage

__all__ = ["MAX_SCANS", "CountedReads", "check_structure", "pixels_held_open"]

# Of a JPEG. Encoders write one scan, about ten where it is progressive.
MAX_SCANS = 64
MAX_SEGMENTS = 4_000
# Pillow parses in Python, one small read at a time: segments of a JPEG, chunks of a PNG, blocks of
# a GIF. Opening a photo takes about 30 reads; a run-length BMP takes two for each run of its rows.
MAX_HEADER_READS = 20_000
MAX_READS = 400_000
# Of a TIFF. Other compressions are rare, and libtiff reads them with more libraries.
COMPRESSIONS = {1: "none", 5: "LZW", 7: "JPEG", 8: "deflate", 32773: "PackBits", 32946: "deflate"}
MAX_TILE_PIXELS = 4096 * 4096
MAX_TAG_VALUES = 2**16

_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # neither a stuffed byte nor a restart
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # frame headers
_SEQUENTIAL = frozenset({0xC0, 0xC1, 0xC9})
_SOS, _EOI = 0xDA, 0xD9
_WIDTH, _HEIGHT, _COMPRESSION, _SAMPLES, _STRIP_ROWS = 256, 257, 259, 277, 278  # TIFF tags
_STRIPS, _TILE_WIDTH, _TILE_HEIGHT, _TILES = 273, 322, 323, 324
_SCALARS = (_WIDTH, _HEIGHT, _COMPRESSION, _SAMPLES, _STRIP_ROWS, _TILE_WIDTH, _TILE_HEIGHT)
_INTEGERS = {1: "B", 3: "H", 4: "L", 16: "Q"}  # TIFF type -> struct format
_BYTES_TYPES = (1, 2, 6, 7)  # TIFF types whose values Pillow keeps as bytes


class CountedReads(io.BytesIO):
    """The bytes of an image, for Pillow to read.

    Raises CostlyImage after `allowed` reads: parsing takes time by reads, not by bytes.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.allowed = MAX_HEADER_READS

    def read(self, size: int | None = -1, /) -> bytes:
        """As BytesIO."""
        self.allowed -= 1
        if self.allowed < 0:
            raise CostlyImage("the image has too many parts, empty or tiny ones: save it again with another program")
        return super().read(size)


def check_structure(data: bytes, max_pixels: int) -> int:
    """Refuse an image that costs too much for its size; return its number of scans.

    Raises CostlyImage, ImageTooLarge for a WebP canvas or a TIFF tile, UnsupportedImage for a
    compression of TIFF, BrokenImage.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return _count_scans(data)
    if _is_webp(data):
        _check_webp(data, max_pixels)
    elif data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        _check_tiff(data, max_pixels)
    return 1


def _count_scans(data: bytes) -> int:
    """The scans that a decoder would go through. Raises CostlyImage beyond the limits.

    A sequential JPEG whose first scan holds all components has no other: its pixels are not
    searched for markers.
    """
    at, scans, components = 2, 0, -1
    sequential = False
    for _ in range(MAX_SEGMENTS):
        found = _NEXT_MARKER.search(data, at)
        if found is None or data[found.end() - 1] == _EOI:
            return scans
        marker, at = data[found.end() - 1], found.end()
        if marker == 0x01 or marker == 0xD8:  # no length follows
            continue
        if marker in _SOF and at + 7 < len(data):
            sequential, components = marker in _SEQUENTIAL, data[at + 7]
        if marker == _SOS:
            scans += 1
            if sequential and at + 2 < len(data) and data[at + 2] == components:
                return scans
            if scans > MAX_SCANS:
                raise CostlyImage(f"the JPEG has more than {MAX_SCANS} scans: save it again, progressive or not")
        at += int.from_bytes(data[at : at + 2], "big")
    raise CostlyImage(f"the JPEG has more than {MAX_SEGMENTS} segments: save it again without its metadata")


def _check_webp(data: bytes, max_pixels: int) -> None:
    width, height = _webp_canvas(data)
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"the WebP's canvas has {width}x{height} pixels, the limit is {max_pixels}: send a smaller one"
        )


def pixels_held_open(data: bytes) -> int:
    """Pixels allocated by opening the image, since libwebp allocates its canvas then."""
    width, height = _webp_canvas(data) if _is_webp(data) else (0, 0)
    return width * height


def _is_webp(data: bytes) -> bool:
    return data[:4] == b"RIFF" and data[8:12] == b"WEBP"


def _webp_canvas(data: bytes) -> tuple[int, int]:
    """(width, height) by the header of a WebP of any kind."""
    kind, head = data[12:16], data[20:30].ljust(10, b"\0")
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[4:7], "little"), 1 + int.from_bytes(head[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack("<HH", head[6:10])
    return width & 0x3FFF, height & 0x3FFF


def _check_tiff(data: bytes, max_pixels: int) -> None:
    """Check the first image of a TIFF, with the values of every entry of a repeated tag."""
    entries = _read_entries(data)
    for tag, kind, count, _ in entries:
        if tag in _SCALARS and (count != 1 or kind not in _INTEGERS):
            raise BrokenImage(f"the TIFF's tag {tag} is not one number: it is damaged, send it again")
    values: dict[int, Sequence[int]] = {
        tag: [value for each, _, _, value in entries if each == tag] for tag in (*_SCALARS, _STRIPS, _TILES)
    }
    for number in values[_COMPRESSION]:
        if number not in COMPRESSIONS:
            names = ", ".join(dict.fromkeys(COMPRESSIONS.values()))
            raise UnsupportedImage(f"the TIFF is compressed by method {number}: send one with {names}")
    width, height = max(values[_WIDTH], default=0), max(values[_HEIGHT], default=0)
    block_width = max(values[_TILE_WIDTH], default=width)
    block_height = max(values[_TILE_HEIGHT], default=0) or min(max(values[_STRIP_ROWS], default=height), height)
    limit = min(max_pixels, MAX_TILE_PIXELS) if values[_TILE_WIDTH] or values[_TILE_HEIGHT] else max_pixels
    if block_width * block_height > limit:
        raise ImageTooLarge(
            f"a tile of the TIFF has {block_width}x{block_height} pixels, the limit is {limit}: send smaller tiles"
        )
    _check_blocks(entries, width, height, values)


def _check_blocks(
    entries: Sequence[tuple[int, int, int, int]], width: int, height: int, values: Mapping[int, Sequence[int]]
) -> None:
    """Refuse more strips or tiles than cover the image: Pillow decodes each."""
    rows = min((*values[_TILE_HEIGHT], *values[_STRIP_ROWS], height or 1)) or 1
    columns = min((*values[_TILE_WIDTH], width or 1)) or 1
    samples = min(max(values[_SAMPLES], default=1), 8)
    needed = -(-height // rows) * -(-width // columns) * max(samples, 1)
    for tag, kind, count, _ in entries:
        limit = needed if tag in (_STRIPS, _TILES) else MAX_TAG_VALUES
        if kind not in _BYTES_TYPES and count > limit:
            raise CostlyImage(f"the TIFF's tag {tag} has {count} values: save it again with another program")


def _read_entries(data: bytes) -> list[tuple[int, int, int, int]]:
    """The first directory: tag, type, count, and the value where it is one unsigned integer.

    Raises BrokenImage for a directory that is cut.
    """
    order, big = "<" if data[:2] == b"II" else ">", 43 in data[2:4]
    head, size, step, room = ("Q", 8, 20, 8) if big else ("H", 2, 12, 4)
    try:
        (start,) = struct.unpack_from(order + ("Q" if big else "L"), data, 8 if big else 4)
        (count,) = struct.unpack_from(order + head, data, start)
        if count > MAX_SEGMENTS:
            raise CostlyImage(f"the TIFF has {count} tags, at most {MAX_SEGMENTS}: save it again without its metadata")
        entries = []
        for at in range(start + size, start + size + step * count, step):
            tag, kind, values = struct.unpack_from(order + ("HHQ" if big else "HHL"), data, at)
            code = _INTEGERS.get(kind, "")
            inline = values == 1 and code and struct.calcsize(order + code) <= room
            value = struct.unpack_from(order + code, data, at + step - room)[0] if inline else 0
            if values <= len(data):  # Pillow passes over a tag that is longer than the file
                entries.append((tag, kind, values, value))
    except (struct.error, OverflowError) as error:
        raise BrokenImage("the TIFF's directory is cut or damaged: send it again") from error
    return entries
