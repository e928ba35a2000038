"""Images from untrusted bytes: limits first, then pixels. No torch.

`structure` judges the bytes before a decoder sees them, `reading` decodes.
"""

from models.encoder.image_io.reading import (
    FORMATS,
    MAX_PIXELS,
    PendingImage,
    check_header,
    open_image,
    read_image,
)
from models.encoder.image_io.structure import pixels_held_open

__all__ = [
    "FORMATS",
    "MAX_PIXELS",
    "PendingImage",
    "check_header",
    "open_image",
    "pixels_held_open",
    "read_image",
]
