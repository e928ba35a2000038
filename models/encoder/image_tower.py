"""open_clip's image tower taken apart: pixels, the numbers it wants, the features before its projection.

Alphabet: B batch, H W pixels, D width, Dt width of the trunk.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from models.encoder.preprocess import Crop

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ImageTower", "attends_to_itself", "build_crop", "normalize_pixels", "unit"]


def build_crop(preprocess: Mapping[str, Any]) -> Crop:
    """The half of open_clip's evaluation transform that makes pixels; its ToTensor and Normalize are `normalize_pixels`."""
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from torchvision.transforms import Compose

    config = PreprocessCfg(**preprocess)
    height, width = (config.size, config.size) if isinstance(config.size, int) else config.size
    *pixels, _to_tensor, _normalize = image_transform_v2(config, is_train=False).transforms
    return Crop((height, width), config.resize_mode, config.interpolation, Compose(pixels))


def normalize_pixels(pixels: "Tensor", preprocess: Mapping[str, Any]) -> "Tensor":
    """(B, 3, H, W) uint8 -> float32, as open_clip's ToTensor and Normalize."""
    scaled = pixels.float() / 255
    mean, std = (scaled.new_tensor(preprocess[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (scaled - mean) / std


def unit(vectors: "Tensor") -> "Tensor":
    """(B, D) any precision -> float32 unit, where it is."""
    import torch.nn.functional as F

    return F.normalize(vectors.float(), dim=-1)


def attends_to_itself(block: Any) -> bool:
    """Whether this is one of open_clip's blocks whose `attn` takes one sequence three times, a mask and nothing else."""
    from open_clip.transformer import ResidualAttentionBlock

    return type(block) is ResidualAttentionBlock and not hasattr(block, "ln_1_kv")


class ImageTower:
    """A frozen model's image side on its device. The same work whatever the pixels are, and nothing crosses to the device but they."""

    def __init__(self, model: Any, device: str) -> None:
        import torch

        self._model, self._dtype = model, model.logit_scale.dtype
        wanted = model.visual.preprocess_cfg
        self._mean, self._std = (torch.tensor(wanted[name], device=device).view(3, 1, 1) for name in ("mean", "std"))

    def __call__(self, pixels: "Tensor") -> "list[Tensor]":
        """(B, 3, H, W) uint8 -> the vectors (B, D) float32 unit and, where the tower shows them, its features before projection (B, Dt)."""
        vectors, trunk = self._seen(((pixels.float() / 255 - self._mean) / self._std).to(self._dtype))
        return [unit(vectors)] if trunk is None else [unit(vectors), unit(trunk)]

    def _seen(self, pixels: "Tensor") -> "tuple[Tensor, Tensor | None]":
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
