"""Linear layers on the CPU with weights reordered once into oneDNN's blocked layout.

torch's own `Linear` reorders its weights in every call, which takes a sixth of the time of a batch
of one. The operators used here are those by which torch.compile replaces `Linear` on the CPU;
called directly they need no compiler and no compile time.
Alphabet: B batch, L tokens, W width, H heads.
"""

from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.encoder.image_tower import is_self_attention_block

__all__ = ["pack_layers"]


class PackedLinear(nn.Linear):
    """A frozen `nn.Linear` with packed weights, and the GELU behind it fused in where there is one.

    weight: opaque, in oneDNN's layout; no other operator can read it.  The class derives from
    `nn.Linear` because some towers test their layers with isinstance.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, gelu: nn.GELU | None = None) -> None:
        nn.Module.__init__(self)  # nn.Linear.__init__ would allocate a second weight
        self.out_features, self.in_features = weight.shape
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        self.bias = bias  # type: ignore[assignment]
        self._activation, self._approximation = ("none", "") if gelu is None else ("gelu", gelu.approximate)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)."""
        linear = torch.ops.mkldnn._linear_pointwise
        return cast(Tensor, linear(x, self.weight, self.bias, self._activation, [], self._approximation))


class PackedAttention(nn.Module):
    """A frozen `nn.MultiheadAttention` of a sequence to itself, as open_clip's blocks call it."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self._heads, self._batch_first = attention.num_heads, attention.batch_first
        self._in_projection = PackedLinear(attention.in_proj_weight, attention.in_proj_bias)
        self._out_projection = PackedLinear(attention.out_proj.weight, attention.out_proj.bias)

    def forward(
        self, query: Tensor, _key: Tensor, _value: Tensor, *, attn_mask: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        """(B, L, W) -> (B, L, W), or (L, B, W) -> (L, B, W) where the batch is not first.

        attn_mask: (L, L), added to the attention scores.
        """
        x = query if self._batch_first else query.transpose(0, 1)
        batch, length, width = x.shape
        projected = self._in_projection(x).view(batch, length, 3, self._heads, width // self._heads)
        q, k, v = projected.permute(2, 0, 3, 1, 4).unbind()  # (B, H, L, W/H) each
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)  # (B, H, L, W/H)
        output = self._out_projection(attended.transpose(1, 2).reshape(batch, length, width))  # (B, L, W)
        return output if self._batch_first else output.transpose(0, 1), None


def pack_layers(model: nn.Module) -> None:
    """Replace a model's linear layers and its blocks' attention by packed ones.

    Nothing is replaced where the processor does not support the model's dtype. A packed model can
    be neither trained nor saved.
    """
    if not packs_dtype(next(model.parameters()).dtype):
        return
    for module in list(model.modules()):
        children = list(module.named_children())
        next_child = dict(pairwise(children)) if isinstance(module, nn.Sequential) else {}
        for name, child in children:
            if type(child) is nn.Linear:
                next_name, following = next_child.get((name, child), ("", None))
                gelu = following if type(following) is nn.GELU else None
                setattr(module, name, PackedLinear(child.weight, child.bias, gelu))
                if gelu is not None:
                    setattr(module, next_name, nn.Identity())
            elif type(child) is nn.MultiheadAttention and is_self_attention_block(module):
                setattr(module, name, PackedAttention(child))


def packs_dtype(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of this dtype on this processor."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    operators = torch.ops.mkldnn
    half = {torch.bfloat16: operators._is_mkldnn_bf16_supported, torch.float16: operators._is_mkldnn_fp16_supported}
    return dtype == torch.float32 or (dtype in half and bool(half[dtype]()))
