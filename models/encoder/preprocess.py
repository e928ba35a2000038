"""Image resizing and cropping, equal to open_clip's own transform but with bounded memory."""

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

# From this aspect ratio on the image is cropped before it is resized. open_clip resizes first,
# which for an image of 50000x1 pixels would allocate 7.5 GB.
LONG_ASPECT_RATIO = 8


@dataclass(frozen=True, slots=True)
class Crop:
    """open_clip's resize and crop, with a cheaper path for very long images.

    size: (H, W).  resize_mode, interpolation: open_clip's names.
    transform: open_clip's transform up to the RGB conversion.
    """

    size: tuple[int, int]
    resize_mode: str
    interpolation: str
    transform: Callable[[Image.Image], Image.Image]

    def __call__(self, image: Image.Image) -> Image.Image:
        """The image resized and cropped to `size`, as RGB."""
        if max(image.size) > LONG_ASPECT_RATIO * min(image.size):
            if self.resize_mode == "shortest":
                return self._crop_then_resize(image.convert("RGB"))
            if self.resize_mode == "longest":
                image = self._resize_within(image.convert("RGB"))
        return self.transform(image)

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
