"""The image tower: normalization of pixels, and the features before and after its projection.

Alphabet: B batch, H W pixels, D width, Dt trunk width (features before the projection).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from models.encoder.preprocess import Crop

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ImageTower", "build_crop", "is_self_attention_block", "normalize_pixels", "unit_vectors"]


def build_crop(preprocess: Mapping[str, Any]) -> Crop:
    """The resizing half of open_clip's evaluation transform.

    preprocess: a model's `visual.preprocess_cfg`.  `normalize_pixels` is the other half, ToTensor
    and Normalize.
    """
    from open_clip.transform import PreprocessCfg

    config = PreprocessCfg(**preprocess)
    height, width = (config.size, config.size) if isinstance(config.size, int) else config.size
    return Crop((height, width), config.resize_mode, config.interpolation, config.fill_color)


def normalize_pixels(pixels: "Tensor", preprocess: Mapping[str, Any]) -> "Tensor":
    """(B, 3, H, W) uint8 -> float32, as open_clip's ToTensor and Normalize."""
    scaled = pixels.float() / 255
    mean, std = (scaled.new_tensor(preprocess[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (scaled - mean) / std


def unit_vectors(vectors: "Tensor") -> "Tensor":
    """(B, D) of any precision -> (B, D) float32 of unit length, on the same device."""
    import torch.nn.functional as F

    return F.normalize(vectors.float(), dim=-1)


def is_self_attention_block(block: Any) -> bool:
    """Whether a module is an open_clip block whose attention takes one sequence and a mask."""
    from open_clip.transformer import ResidualAttentionBlock

    return type(block) is ResidualAttentionBlock and not hasattr(block, "ln_1_kv")


class ImageTower:
    """A frozen model's image side on its device.

    dtype: the model's.
    The operations do not depend on the pixels' values, and nothing but the pixels is copied to the
    device, so that a call can be recorded as a CUDA graph.
    """

    def __init__(self, model: Any, device: str) -> None:
        import torch

        self._model, self.dtype = model, model.logit_scale.dtype
        config = model.visual.preprocess_cfg
        self._mean, self._std = (torch.tensor(config[name], device=device).view(3, 1, 1) for name in ("mean", "std"))

    def __call__(self, pixels: "Tensor") -> "list[Tensor]":
        """(B, 3, H, W) uint8 -> [vectors (B, D)] or [vectors (B, D), trunk (B, Dt)], float32 unit.

        trunk: the features before the projection, where the architecture has them.
        """
        vectors, trunk = self._forward(((pixels.float() / 255 - self._mean) / self._std).to(self.dtype))
        return [unit_vectors(vectors)] if trunk is None else [unit_vectors(vectors), unit_vectors(trunk)]

    def _forward(self, pixels: "Tensor") -> "tuple[Tensor, Tensor | None]":
        from open_clip.timm_model import TimmModel
        from open_clip.transformer import VisionTransformer

        visual = self._model.visual
        if isinstance(visual, TimmModel):
            trunk = visual.trunk(pixels)
            return visual.head(trunk), trunk if trunk.ndim == 2 and len(visual.head) else None
        if isinstance(visual, VisionTransformer) and visual.proj is not None and not visual.output_tokens:
            trunk = visual._pool(visual.transformer(visual._embeds(pixels)))[0]  # as VisionTransformer.forward
            return trunk @ visual.proj, trunk
        return self._model.encode_image(pixels, normalize=False), None
