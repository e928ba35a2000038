"""Images of a few kilobytes that would cost seconds or gigabytes are refused before decoding."""

import struct
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from PIL import Image

from models.encoder.image_io import check_header, read_image
from models.errors import CostlyImage, ImageError, ImageTooLarge, UnsupportedImage
from models.tests.small import image_bytes, picture


def repeat_last_scan(jpeg: bytes, times: int) -> bytes:
    """A progressive JPEG with its last scan repeated."""
    last = jpeg.rfind(b"\xff\xda")
    return jpeg[:-2] + jpeg[last:-2] * times + jpeg[-2:]


def tiff(tags: Mapping[int, Sequence[int]], pixels: bytes = b"") -> bytes:
    """A TIFF with these tags of 32-bit integers, and bytes that the offsets may name: from 8 on."""
    start = 8 + len(pixels)
    lists, at = b"", start + 2 + 12 * len(tags) + 4
    entries = b""
    for tag, values in sorted(tags.items()):
        packed = struct.pack(f"<{len(values)}L", *values)
        field = packed if len(values) == 1 else struct.pack("<L", at + len(lists))
        lists += packed if len(values) > 1 else b""
        entries += struct.pack("<HHL", tag, 4, len(values)) + field
    return b"II*\0" + struct.pack("<L", start) + pixels + struct.pack("<H", len(tags)) + entries + b"\0" * 4 + lists


def grey(width: int, height: int, **more: Sequence[int]) -> dict[int, Sequence[int]]:
    """Tags of an 8-bit grey TIFF; further ones as t322=[16]."""
    found: dict[int, Sequence[int]] = {256: [width], 257: [height], 258: [8], 259: [1], 262: [1], 277: [1]}
    return found | {int(name[1:]): values for name, values in more.items()}


@pytest.mark.parametrize("options", [{"progressive": True}, {"quality": 90, "optimize": True}])
def test_jpegs_of_encoders_are_read(options: dict[str, object]) -> None:
    read = read_image(image_bytes(picture(1), "JPEG", **options))
    assert np.abs(np.asarray(read).astype(int) - np.asarray(picture(1))).mean() < 12


def test_a_jpeg_of_many_scans_is_refused() -> None:
    bomb = repeat_last_scan(image_bytes(picture(1), "JPEG", progressive=True), 600)
    for read in (read_image, check_header):
        with pytest.raises(CostlyImage, match="more than 64 scans"):
            read(bomb)


def test_bytes_after_a_jpeg_are_no_scans_of_it() -> None:
    """Phones append a film to a photo."""
    for options in ({}, {"progressive": True}):
        photo = image_bytes(picture(1), "JPEG", **options)
        assert read_image(photo + b"\xff\xda\0\x02" * 1000).size == picture(1).size


PARTS = {
    "segments": image_bytes(picture(1), "JPEG")[:2] + b"\xff\xfe\0\x02" * 500_000 + image_bytes(picture(1), "JPEG")[2:],
    "fill bytes": b"\xff\xd8\xff" + b"\xff" * 2_000_000,
    "chunks": b"\x89PNG\r\n\x1a\n"
    + (struct.pack(">I", 0) + b"aaAa" + struct.pack(">I", zlib.crc32(b"aaAa"))) * 200_000,
    "blocks": b"GIF89a" + b"\1\0\1\0\0\0\0" + b"!\x01\0" * 500_000,
    "comments": b"GIF89a" + b"\1\0\1\0\0\0\0" + b"!\xfe" + b"\x01a" * 500_000,
}


@pytest.mark.parametrize("parts", PARTS)
def test_headers_of_many_tiny_parts_are_refused(parts: str) -> None:
    with pytest.raises(CostlyImage, match="save it again"):
        read_image(PARTS[parts])


def test_pixels_in_many_tiny_chunks_are_refused() -> None:
    whole = image_bytes(Image.new("L", (2000, 1000)), "PNG", compress_level=0)
    at = whole.index(b"IDAT") - 4
    end = whole.index(b"IEND") - 4
    stream, place = b"", at
    while place < end:
        (length,) = struct.unpack_from(">I", whole, place)
        stream += whole[place + 8 : place + 8 + length]
        place += 12 + length
    tiny = b"".join(struct.pack(">I", 1) + b"IDAT" + stream[i : i + 1] + b"\0\0\0\0" for i in range(150_000))
    with pytest.raises(CostlyImage, match="parts"):
        read_image(whole[:at] + tiny + whole[end:])


def test_a_tiff_with_one_huge_tile_is_refused() -> None:
    data = tiff(grey(16, 16, t322=[16384], t323=[16384], t324=[8], t325=[256]), b"\x80" * 256)
    with pytest.raises(ImageTooLarge, match="a tile of the TIFF has 16384x16384 pixels, the limit is 16777216"):
        read_image(data)


def test_tiles_and_strips_that_fit_are_read() -> None:
    tiled = tiff(grey(20, 10, t322=[16], t323=[16], t324=[8, 264], t325=[256, 256]), b"\x80" * 256 + b"\x40" * 256)
    read = read_image(tiled)
    assert (read.getpixel((0, 0)), read.getpixel((19, 9))) == ((128, 128, 128), (64, 64, 64))
    strips = tiff(grey(20, 10, t273=[8, 108], t278=[5], t279=[100, 100]), b"\x80" * 100 + b"\x40" * 100)
    assert read_image(strips).getpixel((0, 9)) == (64, 64, 64)
    one = tiff(grey(20, 10, t273=[8], t278=[2**32 - 1], t279=[200]), b"\x80" * 200)
    assert read_image(one).size == (20, 10)


@pytest.mark.parametrize(
    "tags", [{"t273": [8] * 100_000, "t278": [9]}, {"t324": [8] * 1000, "t322": [16], "t323": [9]}]
)
def test_a_tiff_with_more_blocks_than_cover_it_is_refused(tags: dict[str, Sequence[int]]) -> None:
    with pytest.raises(CostlyImage, match="values"):
        read_image(tiff(grey(16, 10, **tags), b"\x80" * 160))


@pytest.mark.parametrize("number", [2, 3, 4, 6, 34925, 50000, 50001])
def test_rare_compressions_of_tiff_are_refused(number: int) -> None:
    with pytest.raises(UnsupportedImage, match=f"method {number}: send one with none, LZW, JPEG"):
        read_image(tiff(grey(16, 16, t273=[8], t259=[number]), b"\0" * 64))


@pytest.mark.parametrize("name", ["raw", "tiff_lzw", "jpeg", "tiff_adobe_deflate", "packbits", "tiff_deflate"])
def test_usual_compressions_of_tiff_are_read(name: str) -> None:
    assert read_image(image_bytes(picture(2), "TIFF", compression=name)).size == picture(2).size


def test_a_webp_with_a_huge_canvas_is_refused_before_the_canvas_is_made() -> None:
    canvas = (16_383).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<L", 10) + b"\2\0\0\0" + canvas * 2 + b"ANIM" + struct.pack("<L", 0)
    data = b"RIFF" + struct.pack("<L", len(body)) + body
    assert len(data) == 38
    with pytest.raises(ImageTooLarge, match="canvas has 16384x16384 pixels"):
        read_image(data)


@pytest.mark.parametrize("options", [{"lossless": True}, {}, {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"}])
def test_the_size_of_every_kind_of_webp_is_checked(options: dict[str, object]) -> None:
    data = image_bytes(picture(3, 90, 60), "WEBP", **options)
    assert read_image(data, max_pixels=90 * 60).size == (90, 60)
    with pytest.raises(ImageTooLarge, match="90x60"):
        read_image(data, max_pixels=90 * 60 - 1)


def test_damaged_bytes_of_a_checked_format_raise_image_errors_alone() -> None:
    rng = np.random.default_rng(1)
    sources = [
        repeat_last_scan(image_bytes(picture(1), "JPEG", progressive=True), 2),
        tiff(grey(20, 10, t322=[16], t323=[16], t324=[8, 264], t325=[256, 256]), b"\x80" * 512),
        image_bytes(picture(1), "WEBP"),
        image_bytes(picture(1), "AVIF"),
    ]
    for source in sources:
        for _ in range(80):
            dirty = np.frombuffer(source, np.uint8).copy()
            dirty[rng.integers(0, min(len(dirty), 700), 4)] = rng.integers(0, 256, 4)
            try:
                read_image(dirty.tobytes(), max_pixels=1_000_000)
            except ImageError as error:
                assert "\n" not in str(error)
