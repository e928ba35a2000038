"""Any image to the encoder's frame, as open_clip would, in bounded memory."""

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
                image = self._fitted(image.convert("RGB"))
        return self.transform(image)

    def _centre(self, image: Image.Image) -> Image.Image:
        """The part that survives the central crop, resized alone: the same pixels but for a fraction of one at the borders."""
        (height, width), (w, h) = self.size, image.size
        scale = max(height / h, width / w)
        left, top = (w - width / scale) / 2, (h - height / scale) / 2
        return image.resize((width, height), self._resample, box=(left, top, w - left, h - top))

    def _fitted(self, image: Image.Image) -> Image.Image:
        """The whole image within the frame, its short side at least one pixel, where open_clip would round it to none and fail."""
        (height, width), (w, h) = self.size, image.size
        scale = min(height / h, width / w)
        return image.resize((max(1, round(w * scale)), max(1, round(h * scale))), self._resample)

    @property
    def _resample(self) -> Image.Resampling:
        return Image.Resampling.BILINEAR if self.interpolation == "bilinear" else Image.Resampling.BICUBIC
