"""Resizing and cropping with Pillow alone gives the pixels of open_clip's transform."""

from typing import Any

import numpy as np
import pytest
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from models.encoder.image_tower import build_crop
from models.tests.small import picture

FRAMES: list[dict[str, Any]] = [
    {"size": 48, "resize_mode": mode, "interpolation": interpolation, "fill_color": 90}
    for mode in ("shortest", "longest", "squash")
    for interpolation in ("bicubic", "bilinear")
] + [{"size": (40, 56), "resize_mode": mode, "interpolation": "bilinear"} for mode in ("shortest", "longest", "squash")]
SIZES = [(48, 48), (80, 64), (64, 97), (31, 20), (20, 33), (48, 200), (7, 50), (333, 50), (1, 1), (47, 49)]


@pytest.mark.parametrize("frame", FRAMES, ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_pixels_equal_those_of_open_clip(frame: dict[str, Any], mode: str) -> None:
    *resizing, _to_tensor, _normalize = image_transform_v2(PreprocessCfg(**frame), is_train=False).transforms
    crop = build_crop(frame)
    for size in SIZES:
        image = picture(3, *size).convert(mode)
        expected: Image.Image = image
        for step in resizing:
            expected = step(expected)
        np.testing.assert_array_equal(np.asarray(crop(image)), np.asarray(expected), err_msg=f"{size}")
        assert crop.pixels(image).shape == (3, *crop.size)
