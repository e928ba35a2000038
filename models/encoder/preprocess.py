"""Image resizing and cropping, equal to open_clip's own transform but with bounded memory.

No torch: the processes that decode images import this module.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

# From this aspect ratio on the image is cropped before it is resized. open_clip resizes first,
# which for an image of 50000x1 pixels would allocate 7.5 GB.
LONG_ASPECT_RATIO = 8


@dataclass(frozen=True, slots=True)
class Crop:
    """open_clip's resize and crop, with a cheaper path for very long images.

    size: (H, W).  resize_mode, interpolation: open_clip's names.  fill: of the padding, 0 to 255.
    """

    size: tuple[int, int]
    resize_mode: str
    interpolation: str
    fill: int = 0

    def __call__(self, image: Image.Image) -> Image.Image:
        """The image resized and cropped to `size`, as RGB."""
        if max(image.size) > LONG_ASPECT_RATIO * min(image.size):
            if self.resize_mode == "shortest":
                return self._crop_then_resize(image.convert("RGB"))
            if self.resize_mode == "longest":
                image = self._resize_within(image.convert("RGB"))
        resized = self._resize(image, self._resized_size(image.size))
        return (resized if self.resize_mode == "squash" else self._crop_center(resized)).convert("RGB")

    def pixels(self, image: Image.Image) -> np.ndarray:
        """(3, H, W) uint8 of the image resized and cropped; not yet normalized."""
        return np.ascontiguousarray(np.asarray(self(image)).transpose(2, 0, 1))

    def _resized_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) to which an image of that size is resized, rounded as by open_clip."""
        (height, width), (w, h) = self.size, size
        if self.resize_mode == "squash":
            return width, height
        if self.resize_mode == "shortest" and height == width:
            return (width, int(height * h / w)) if w <= h else (int(width * w / h), height)
        ratios = (h / height, w / width)
        ratio = max(ratios) if self.resize_mode == "longest" else min(ratios)
        return round(w / ratio), round(h / ratio)

    def _resize(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        # open_clip forgets the interpolation where the shorter side is fitted to a frame that is
        # not square
        forgotten = self.resize_mode == "shortest" and self.size[0] != self.size[1]
        resample = Image.Resampling.BICUBIC if forgotten else self._resample
        return image if image.size == size else image.resize(size, resample)

    def _crop_center(self, image: Image.Image) -> Image.Image:
        """Cut the centre out; pad a side that is too short."""
        height, width = self.size
        missing_w, missing_h = max(0, width - image.width), max(0, height - image.height)
        if missing_w or missing_h:
            border = (missing_w // 2, missing_h // 2, (missing_w + 1) // 2, (missing_h + 1) // 2)
            fill = self.fill if self.resize_mode == "longest" else 0
            bands = len(image.getbands())
            image = ImageOps.expand(image, border, fill=fill if bands == 1 else (fill,) * bands)
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        return image.crop((left, top, left + width, top + height))

    def _crop_then_resize(self, image: Image.Image) -> Image.Image:
        """Resize only the part that the central crop keeps.

        The pixels equal those of resize-then-crop up to a fraction of one pixel at the borders.
        """
        (height, width), (w, h) = self.size, image.size
        scale = max(height / h, width / w)
        left, top = (w - width / scale) / 2, (h - height / scale) / 2
        return image.resize((width, height), self._resample, box=(left, top, w - left, h - top))

    def _resize_within(self, image: Image.Image) -> Image.Image:
        """Resize the whole image to fit within `size`, with a short side of at least one pixel.

        open_clip rounds the short side of such an image to zero and fails.
        """
        (height, width), (w, h) = self.size, image.size
        scale = min(height / h, width / w)
        return image.resize((max(1, round(w * scale)), max(1, round(h * scale))), self._resample)

    @property
    def _resample(self) -> Image.Resampling:
        return Image.Resampling.BILINEAR if self.interpolation == "bilinear" else Image.Resampling.BICUBIC
