"""Untrusted bytes to an RGB image: the header first, then the limits, then the pixels. No torch here."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, UnidentifiedImageError

from models.errors import BrokenImage, ImageTooLarge, UnsupportedImage

FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "AVIF",
)  # an allow-list: each further decoder is more surface for hostile bytes
MAX_PIXELS = 64_000_000
FINER = 3  # times the encoder's frame at which a JPEG is decoded at least: from there the vector of a smaller decoding equals the full one's
_STARTS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*")
_FAILURES = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    UserWarning,  # a damaged tag, where warnings are errors
)
_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow's own alarm is a process-wide limit that warns at one size and fails at twice that; `max_pixels` takes its place.
Image.MAX_IMAGE_PIXELS = None


def read_image(data: bytes, *, max_pixels: int = MAX_PIXELS, frame: tuple[int, int] | None = None) -> Image.Image:
    """The first frame, upright, as RGB; or an ImageError.

    frame: (H, W) that it will be resized to. A JPEG several times as large is then decoded at a half, a quarter or an eighth, which costs a
    third of the time for a photo of 12 megapixels; the cosine of its vector with that of the full decoding stays above 0.999.
    Alpha is dropped as open_clip's convert("RGB") does; 16-bit grey is scaled to 8, where Pillow alone would clip it to white.
    """
    image = _opened(data)
    _check_size(image, max_pixels)
    try:
        if frame is not None:
            image.draft(
                None, (FINER * frame[1], FINER * frame[0])
            )  # nothing happens to other formats, or where a half would be too small
        image.load()
        orientation = _orientation(image)
        rgb = _rgb(image)
    except _FAILURES as error:
        raise BrokenImage(
            f"the {image.format} image does not decode ({_reason(error)}): it is cut or damaged, send it again"
        ) from error
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def check_header(data: bytes, *, max_pixels: int = MAX_PIXELS) -> None:
    """An ImageError where the header alone tells that `read_image` would raise one."""
    _check_size(_opened(data), max_pixels)


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageTooLarge(f"the image has {width}x{height} pixels, the limit is {max_pixels}: send a smaller one")


def _opened(data: bytes) -> Image.Image:
    """The image with its header read and no pixel decoded."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except (UnidentifiedImageError, *_FAILURES) as error:
        if data.startswith(_STARTS) or data[8:12] == b"WEBP" or data[4:12] == b"ftypavif":
            raise BrokenImage("the image's header does not decode: it is cut or damaged, send it again") from error
        kinds = ", ".join(FORMATS)
        raise UnsupportedImage(f"the {len(data)} bytes are not an image of a type read here: send {kinds}") from error


def _orientation(image: Image.Image) -> int:
    """How the camera was held, by EXIF; 1 where nothing legible is said, since a damaged tag does not spoil the picture."""
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except _FAILURES:
        return 1
    return found if isinstance(found, int) else 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UnsupportedImage(
            f"the {image.format} image has {image.mode!r} pixels, whose white is undefined: send 8 or 16 bits"
        )
    return image.convert("RGB")


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:100] or type(error).__name__
