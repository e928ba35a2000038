"""Linear layers on the processor with their weights laid out once, as oneDNN reads them fastest.

torch's own `Linear` has the weights packed anew by every call, which for a batch of one is a sixth of the time. The operators here are
those that torch.compile puts in `Linear`'s place on the processor; using them directly needs no compiler and costs no seconds at the start.
Alphabet: B batch, L tokens, W width, H heads.
"""

from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.encoder.image_tower import attends_to_itself

__all__ = ["pack"]


class PackedLinear(nn.Linear):
    """A frozen `nn.Linear`, and the GELU behind it where there is one, while what it is applied to is still in the cache.

    weight: laid out for oneDNN, good for nothing else.  It is a `Linear` for the towers that ask whether it is one.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, gelu: nn.GELU | None = None) -> None:
        nn.Module.__init__(self)  # Linear's own would allocate the weights
        self.out_features, self.in_features = weight.shape
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        self.bias = bias  # type: ignore[assignment]
        self._then = ("none", "") if gelu is None else ("gelu", gelu.approximate)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)."""
        then, how = self._then
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, then, [], how))


class PackedAttention(nn.Module):
    """A frozen `nn.MultiheadAttention` of a sequence to itself, as open_clip's blocks call it."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self._heads, self._batch_first = attention.num_heads, attention.batch_first
        self._into = PackedLinear(attention.in_proj_weight, attention.in_proj_bias)
        self._out = PackedLinear(attention.out_proj.weight, attention.out_proj.bias)

    def forward(
        self, query: Tensor, _key: Tensor, _value: Tensor, *, attn_mask: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        """(B, L, W) -> (B, L, W), or (L, B, W) where the batch is not first. attn_mask: (L, L), added to the scores."""
        x = query if self._batch_first else query.transpose(0, 1)
        batch, length, width = x.shape
        parts = (
            self._into(x).view(batch, length, 3, self._heads, width // self._heads).permute(2, 0, 3, 1, 4)
        )  # (3, B, H, L, W/H)
        q, k, v = parts.unbind()
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        made = self._out(mixed.transpose(1, 2).reshape(batch, length, width))
        return made if self._batch_first else made.transpose(0, 1), None


def pack(model: nn.Module) -> None:
    """Put packed layers in the place of the model's linear ones and of its blocks' attention, if this processor knows its precision.

    From then on the model can be neither trained nor saved.
    """
    if not _known(next(model.parameters()).dtype):
        return
    for module in list(model.modules()):
        children = list(module.named_children())
        following = dict(pairwise(children)) if isinstance(module, nn.Sequential) else {}
        for name, child in children:
            if type(child) is nn.Linear:
                behind, after = following.get((name, child), ("", None))
                gelu = after if type(after) is nn.GELU else None
                setattr(module, name, PackedLinear(child.weight, child.bias, gelu))
                if gelu is not None:
                    setattr(module, behind, nn.Identity())
            elif type(child) is nn.MultiheadAttention and attends_to_itself(module):
                setattr(module, name, PackedAttention(child))


def _known(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies numbers of this type here."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    operators = torch.ops.mkldnn
    half = {torch.bfloat16: operators._is_mkldnn_bf16_supported, torch.float16: operators._is_mkldnn_fp16_supported}
    return dtype == torch.float32 or (dtype in half and bool(half[dtype]()))
