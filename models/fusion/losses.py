"""Training losses: InfoNCE between the refined and the plain embeddings of a batch of pairs."""

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(image: Tensor, text: Tensor, scale: float | Tensor, *, same: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE, a scalar. Row i of one side belongs to row i of the other.

    image, text: (B, D) unit.  scale: the factor of the cosines, 100 in CLIP.
    same: (B, B) bool, True where two different rows have one meaning (one class, one photo), so
    that they do not count as negatives.
    """
    logits = scale * image @ text.T  # (B, B)
    if same is not None:
        others = same & ~torch.eye(len(image), dtype=torch.bool, device=image.device)
        logits = logits.masked_fill(others, torch.finfo(logits.dtype).min)
    target = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def reco_loss(
    fused_image: Tensor,
    fused_text: Tensor,
    image: Tensor,
    text: Tensor,
    scale: float | Tensor,
    *,
    both: bool = True,
    image_only: bool = True,
    text_only: bool = True,
    same: Tensor | None = None,
) -> Tensor:
    """The paper's loss, a scalar: the sum of three InfoNCE terms, on vectors (B, D) unit.

    both: fused image with fused text.  image_only: fused image with text.  text_only: image with
    fused text.  The last two train the fusion for serving where one side alone is refined.
    ValueError where all three are switched off.
    """
    terms = ((both, fused_image, fused_text), (image_only, fused_image, text), (text_only, image, fused_text))
    losses = [info_nce(one, another, scale, same=same) for wanted, one, another in terms if wanted]
    if not losses:
        raise ValueError("all three terms of the loss are switched off: keep at least one")
    return torch.stack(losses).sum()
