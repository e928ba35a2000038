"""Images from untrusted bytes: limits first, then pixels. No torch.

`formats` lists what is accepted, `structure` limits the cost of decoding by the bytes alone,
`reading` decodes.
"""

from models.encoder.image_io.formats import FORMATS
from models.encoder.image_io.reading import (
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
