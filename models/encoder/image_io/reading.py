"""Image decoding from untrusted bytes: parse the header, check the limits, decode the pixels.

This module does not import torch.
"""

import struct
import zlib
from dataclasses import dataclass

import numpy as np
import pillow_heif
from PIL import Image, UnidentifiedImageError

from models.encoder.image_io.decoding_cost import MAX_READS, CountedReads, check_structure
from models.encoder.image_io.formats import FIRST_BOXES, FORMATS, MAGIC_BYTES
from models.errors import BrokenImage, ImageTooLarge, UnsupportedImage

MAX_PIXELS = 64_000_000
# A JPEG is decoded at no less than this many times the size it will be resized to. From 3 on the
# vector of the smaller decoding has a cosine above 0.999 with that of the full one.
MIN_DRAFT_SCALE = 3
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
    RuntimeError,  # libavif
    struct.error,
    zlib.error,
    UserWarning,  # a damaged tag, where warnings are errors
)
_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow's own pixel limit is global, warns at one size and fails at twice that; `max_pixels`
# replaces it.
Image.MAX_IMAGE_PIXELS = None
# Photos of phones: libheif turns them upright itself, and reports them as upright.
pillow_heif.register_heif_opener()


@dataclass(frozen=True, slots=True, eq=False)
class PendingImage:
    """An image whose header is parsed and within the limits; no pixel is decoded yet.

    pixels: that decoding it holds in memory: fewer than the header's where a JPEG is read smaller.
    """

    pixels: int
    _image: Image.Image
    _file: CountedReads

    def decode(self) -> Image.Image:
        """The first frame, turned upright, as RGB. Raises an ImageError."""
        self._file.allowed = MAX_READS
        try:
            self._image.load()
            orientation = _exif_orientation(self._image)
            rgb = _convert_to_rgb(self._image)
        except _FAILURES as error:
            raise BrokenImage(
                f"the {self._image.format} image does not decode ({_short_reason(error)}): it is cut or damaged, "
                "send it again"
            ) from error
        return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def read_image(data: bytes, *, max_pixels: int = MAX_PIXELS, target_size: tuple[int, int] | None = None) -> Image.Image:
    """Decode the first frame of an image, turned upright, as RGB. Raises an ImageError.

    target_size: (H, W) to which the caller will resize the image. A JPEG several times as large is
    then decoded at a half, a quarter or an eighth of its size, which takes a third of the time for
    a photo of 12 megapixels. The alpha channel is dropped, as by open_clip's convert("RGB"). 16-bit
    grey is scaled to 8 bits, where Pillow alone would clip it to white.
    """
    return open_image(data, max_pixels=max_pixels, target_size=target_size).decode()


def open_image(
    data: bytes, *, max_pixels: int = MAX_PIXELS, target_size: tuple[int, int] | None = None
) -> PendingImage:
    """Parse an image and check its limits, for `read_image` in two steps. Raises an ImageError."""
    scans = check_structure(data, max_pixels)
    file = CountedReads(data)
    image = _open_with_pillow(file, data)
    _check_size(image, max_pixels)
    width, height = image.size
    if target_size is not None:
        try:
            # no effect on other formats, or where half the size would be below MIN_DRAFT_SCALE
            image.draft(None, (MIN_DRAFT_SCALE * target_size[1], MIN_DRAFT_SCALE * target_size[0]))
        except _FAILURES as error:
            raise BrokenImage("the image's header does not decode: it is cut or damaged, send it again") from error
    # libjpeg holds an image of several scans at its full size, whatever the scale
    held = width * height if scans > 1 else image.width * image.height
    return PendingImage(held, image, file)


def check_header(data: bytes, *, max_pixels: int = MAX_PIXELS) -> None:
    """Raise the ImageError that `read_image` would raise, as far as the header alone shows it."""
    open_image(data, max_pixels=max_pixels)


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageTooLarge(f"the image has {width}x{height} pixels, the limit is {max_pixels}: send a smaller one")


def _open_with_pillow(file: CountedReads, data: bytes) -> Image.Image:
    """Parse the header; no pixel is decoded."""
    try:
        return Image.open(file, formats=FORMATS)
    except (UnidentifiedImageError, *_FAILURES) as error:
        if data.startswith(MAGIC_BYTES) or data[8:12] == b"WEBP" or data[4:12] in FIRST_BOXES:
            raise BrokenImage("the image's header does not decode: it is cut or damaged, send it again") from error
        accepted = ", ".join(FORMATS)
        raise UnsupportedImage(
            f"the {len(data)} bytes are not an image of a type read here: send {accepted}"
        ) from error


def _exif_orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) where the tag is missing or damaged."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except _FAILURES:
        return 1
    return value if isinstance(value, int) else 1


def _convert_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UnsupportedImage(
            f"the {image.format} image has {image.mode!r} pixels, whose white is undefined: send 8 or 16 bits"
        )
    return image.convert("RGB")


def _short_reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:100] or type(error).__name__
