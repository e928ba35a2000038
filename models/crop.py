"""Any image to the encoder's frame, as open_clip would, in bounded memory."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

EXTREME = 8  # aspect ratio from which the shortcuts below are taken: resized before cropping, 50000x1 would fill 7.5 GB


@dataclass(frozen=True, slots=True)
class Crop:
    """open_clip's own resize and crop, with a shortcut for very long images.

    size: (H, W).  resize_mode, interpolation: open_clip's words.  transform: its transform, up to the RGB conversion.
    """

    size: tuple[int, int]
    resize_mode: str
    interpolation: str
    transform: Callable[[Image.Image], Image.Image]

    def __call__(self, image: Image.Image) -> Image.Image:
        """Resized and cropped to `size`, RGB."""
        if max(image.size) > EXTREME * min(image.size):
            if self.resize_mode == "shortest":
                return self._centre(image.convert("RGB"))
            if self.resize_mode == "longest":
                image = self._thickened(image)
        return self.transform(image)

    def _centre(self, image: Image.Image) -> Image.Image:
        """The part that survives the central crop, resized alone: the same pixels but for a fraction of one at the borders."""
        (height, width), (w, h) = self.size, image.size
        scale = max(height / h, width / w)
        left, top = (w - width / scale) / 2, (h - height / scale) / 2
        resample = Image.Resampling.BILINEAR if self.interpolation == "bilinear" else Image.Resampling.BICUBIC
        return image.resize((width, height), resample, box=(left, top, w - left, h - top))

    def _thickened(self, image: Image.Image) -> Image.Image:
        """A line made thick enough that a pixel of it is left when its long side fits the frame."""
        thinnest = math.ceil(max(image.size) / min(self.size))
        w, h = (max(side, thinnest) for side in image.size)
        return image.resize((w, h))
