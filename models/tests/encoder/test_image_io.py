import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, features

from models.encoder.image_io import read_image
from models.errors import BrokenImage, ImageError, ImageTooLarge, UnsupportedImage
from models.tests.small import image_bytes, picture


def png(width: int, height: int, *, bits: int = 8, colour: int = 2, rows: bytes = b"") -> bytes:
    """A handmade PNG whose header may contradict its pixel data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


LOSSLESS = ["PNG", "BMP", "TIFF", "WEBP"]


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_formats_keep_all_pixels(kind: str) -> None:
    image = picture(1)
    read = read_image(image_bytes(image, kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert read.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(read), np.asarray(image))


@pytest.mark.parametrize("kind", ["JPEG", "GIF", "AVIF", "HEIF"])
def test_lossy_formats_are_read(kind: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    read = np.asarray(read_image(image_bytes(picture(1), kind))).astype(int)
    assert np.abs(read - np.asarray(picture(1)).astype(int)).mean() < 12


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "LA", "CMYK", "YCbCr", "LAB"])
def test_every_colour_mode_is_converted_as_by_convert_rgb(mode: str) -> None:
    kind = {"CMYK": "TIFF", "YCbCr": "TIFF", "LAB": "TIFF"}.get(mode, "PNG")
    source = picture(2).convert("RGB").convert("L").convert("LA") if mode == "LA" else convert_mode(mode)
    data = image_bytes(source, kind)
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    np.testing.assert_array_equal(np.asarray(read_image(data)), np.asarray(expected))


def convert_mode(mode: str) -> Image.Image:
    if mode == "LAB":
        return Image.merge("LAB", picture(2).split())
    return picture(2).convert(mode)


def test_a_cmyk_jpeg_is_read() -> None:
    assert read_image(image_bytes(picture(2).convert("CMYK"), "JPEG")).mode == "RGB"


def test_transparency_is_dropped_as_by_open_clip() -> None:
    image = picture(3).convert("RGBA")
    image.putalpha(0)
    np.testing.assert_array_equal(np.asarray(read_image(image_bytes(image, "PNG"))), np.asarray(picture(3)))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_to_8_bits(kind: str) -> None:
    shades = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    read = np.asarray(read_image(image_bytes(Image.fromarray(shades), kind)))
    np.testing.assert_array_equal(read[:, :, 0], shades >> 8)


def test_16_bit_colour_is_scaled_to_8_bits() -> None:
    row = b"\0" + struct.pack(">HHH", 0x8000, 0x0040, 0xFFFF) * 3
    assert read_image(png(3, 2, bits=16, rows=row * 2)).getpixel((1, 1)) == (128, 0, 255)


def test_float_pixels_are_refused() -> None:
    with pytest.raises(UnsupportedImage, match="white is undefined"):
        read_image(image_bytes(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_read(kind: str) -> None:
    red, blue = (Image.new("RGB", (20, 10), colour) for colour in ("red", "blue"))
    data = image_bytes(red, kind, save_all=True, append_images=[blue], duration=50)
    pixel = read_image(data).getpixel((5, 5))
    assert isinstance(pixel, tuple)
    assert pixel[0] > 200
    assert pixel[2] < 50


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_image_upright(orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = image_bytes(picture(4), "PNG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(np.asarray(read_image(data)), np.asarray(upright))


def test_an_image_with_damaged_exif_data_is_read() -> None:
    read_image(image_bytes(picture(4), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff garbage"))


@pytest.mark.parametrize("size", [(1, 1), (50_000, 1), (1, 50_000)])
def test_extreme_sizes_are_read(size: tuple[int, int]) -> None:
    assert read_image(image_bytes(Image.new("RGB", size), "PNG")).size == size


def test_the_pixel_limit_is_checked_before_decoding() -> None:
    bomb = png(20_000, 20_000)  # 60 bytes of pixel data: decoding them would fail
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageTooLarge, match=r"20000x20000 pixels, the limit is 64000000: send a smaller one"):
            read_image(bomb)
        with pytest.raises(ImageTooLarge, match="10x10 pixels, the limit is 99"):
            read_image(image_bytes(picture(0, 10, 10), "JPEG"), max_pixels=99)
    assert read_image(image_bytes(picture(0, 10, 10), "JPEG"), max_pixels=100).size == (10, 10)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated_images_are_refused_as_broken(kind: str, share: float) -> None:
    data = image_bytes(picture(5, 200, 150), kind)
    with pytest.raises(BrokenImage, match="cut or damaged"):
        read_image(data[: max(12, int(len(data) * share))])


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"<svg xmlns='x'/>", b"%PDF-1.4", b"RIFF\0\0\0\0WAVEfmt ", b"\0" * 100]
)
def test_other_bytes_are_refused_as_unsupported(data: bytes) -> None:
    with pytest.raises(
        UnsupportedImage, match=f"{len(data)} bytes are not an image of a type read here: send JPEG, PNG"
    ):
        read_image(data)


@pytest.mark.parametrize("kind", ["PPM", "TGA", "ICO", "PCX", "JPEG2000"])
def test_other_image_formats_are_refused_as_unsupported(kind: str) -> None:
    with pytest.raises(UnsupportedImage):
        read_image(image_bytes(picture(6), kind))


def test_corrupted_bytes_raise_image_errors_alone() -> None:
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"):
        clean = np.frombuffer(image_bytes(picture(7), kind), np.uint8)
        for _ in range(60):
            dirty = clean.copy()
            places = rng.integers(0, len(dirty), 6)
            dirty[places] = rng.integers(0, 256, 6)
            try:
                read_image(dirty.tobytes(), max_pixels=1_000_000)
            except ImageError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("width", "height", "read"),
    [
        (1343, 1400, (1343, 1400)),
        (1344, 1400, (672, 700)),
        (4000, 3000, (1000, 750)),
        (9000, 6000, (1125, 750)),
        (20_000, 200, (20_000, 200)),
    ],
)
def test_a_jpeg_far_larger_than_the_target_size_is_decoded_at_a_smaller_scale(
    width: int, height: int, read: tuple[int, int]
) -> None:
    photo = image_bytes(picture(5, width, height), "JPEG")
    assert read_image(photo, target_size=(224, 224)).size == read
    assert read_image(photo).size == (width, height)


def test_a_jpeg_decoded_at_a_smaller_scale_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_image(image_bytes(picture(5, 1600, 1400), "JPEG", exif=exif), target_size=(224, 224)).size == (700, 800)


def test_the_pixel_limit_applies_to_the_full_size_of_the_header() -> None:
    with pytest.raises(ImageTooLarge, match="1600x1400"):
        read_image(image_bytes(picture(5, 1600, 1400), "JPEG"), max_pixels=2_000_000, target_size=(224, 224))


@pytest.mark.parametrize("turn", [1, 3, 6, 8])
def test_a_photo_of_a_phone_is_read_upright(turn: int) -> None:
    photo, exif = picture(1), Image.Exif()
    exif[0x0112] = turn
    photo.info["exif"] = exif.tobytes()  # from which the writer makes HEIF's own property of rotation
    upright = {1: picture(1), 3: picture(1).rotate(180), 6: picture(1).rotate(270, expand=True)}
    expected = upright.get(turn) or picture(1).rotate(90, expand=True)
    read = read_image(image_bytes(photo, "HEIF", quality=95))
    assert read.size == expected.size
    assert np.abs(np.asarray(read).astype(int) - np.asarray(expected).astype(int)).mean() < 12


def test_a_damaged_photo_of_a_phone_is_broken() -> None:
    data = image_bytes(picture(1), "HEIF")
    for damaged in (data[:64], data[: len(data) // 2], data[:100] + b"\xff" * (len(data) - 100)):
        with pytest.raises(BrokenImage):
            read_image(damaged)
