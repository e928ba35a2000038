"""Images from untrusted bytes: limits first, then pixels. No torch.

`formats` lists what is accepted, `decoding_cost` limits its cost by the bytes alone,
`reading` decodes.
"""

from models.encoder.image_io.decoding_cost import pixels_held_open
from models.encoder.image_io.formats import FORMATS
from models.encoder.image_io.reading import (
    MAX_PIXELS,
    PendingImage,
    check_header,
    open_image,
    read_image,
)

__all__ = [
    "FORMATS",
    "MAX_PIXELS",
    "PendingImage",
    "check_header",
    "open_image",
    "pixels_held_open",
    "read_image",
]
