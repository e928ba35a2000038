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

__all__ = ["FORMATS", "MAX_PIXELS", "PendingImage", "check_header", "open_image", "read_image"]
