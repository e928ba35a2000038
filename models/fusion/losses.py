"""What the fusion learns from: InfoNCE between the refined and the plain embeddings of a batch of pairs."""

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(image: Tensor, text: Tensor, scale: float | Tensor, *, same: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE: row i of one side belongs to row i of the other. A scalar.

    image, text: (B, D) unit.  scale: what the cosines are multiplied with, 100 in CLIP.
    same: (B, B) bool, True where two different rows say the same thing (one class, one photo) and must not repel each other.
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
    """NCE(fused, fused) + NCE(fused image, text) + NCE(image, fused text), each (B, D) unit; each term can be left out. A scalar.

    The two mixed terms are what lets one side be enhanced alone when serving.
    """
    terms = ((both, fused_image, fused_text), (image_only, fused_image, text), (text_only, image, fused_text))
    losses = [info_nce(one, another, scale, same=same) for wanted, one, another in terms if wanted]
    if not losses:
        raise ValueError("all three terms of the loss are switched off: keep at least one")
    return torch.stack(losses).sum()
