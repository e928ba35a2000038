"""Linear layers on the CPU with weights reordered once into oneDNN's blocked layout.

torch's own `Linear` reorders its weights in every call, which takes a sixth of the time of a batch
of one. The operators used here are those by which torch.compile replaces `Linear` on the CPU;
called directly they need no compiler and no compile time.
Alphabet: B batch, L tokens, W width, H heads.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.encoder.image_tower import is_self_attention_block

__all__ = ["ReplacedLayer", "pack_layers", "packs_dtype", "record_layer_calls", "unpack_layers"]


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

        attn_mask: (L, L), or (B*H, L, L) with one mask per text and head as in CoCa; added to the
        attention scores.
        """
        x = query if self._batch_first else query.transpose(0, 1)
        batch, length, width = x.shape
        projected = self._in_projection(x).view(batch, length, 3, self._heads, width // self._heads)
        q, k, v = projected.permute(2, 0, 3, 1, 4).unbind()  # (B, H, L, W/H) each
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.view(batch, self._heads, length, length)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)  # (B, H, L, W/H)
        output = self._out_projection(attended.transpose(1, 2).reshape(batch, length, width))  # (B, L, W)
        return output if self._batch_first else output.transpose(0, 1), None


class ReplacedLayer(NamedTuple):
    """A layer that packing took out of its parent module, for `unpack_layers`."""

    parent: nn.Module
    name: str
    layer: nn.Module


@contextmanager
def record_layer_calls(model: nn.Module) -> Iterator[Collection[nn.Module]]:
    """Collect the linear and attention layers that are called within the context.

    A layer whose weights the model hands to a functional call (the attention pool of CLIP's
    ResNets, EVA's attention) is never called itself, so it is not collected.
    """
    called = set[nn.Module]()
    packable = [layer for layer in model.modules() if type(layer) in (nn.Linear, nn.MultiheadAttention)]
    hooks = [layer.register_forward_pre_hook(lambda layer, _: called.add(layer)) for layer in packable]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()


def pack_layers(model: nn.Module, layers: Collection[nn.Module]) -> list[ReplacedLayer]:
    """Replace these linear layers, and the attention of open_clip's blocks, by packed ones.

    layers: the candidates.  Returns what was replaced. A model with packed layers can be neither
    trained nor saved.
    """
    replaced = list[ReplacedLayer]()

    def replace(parent: nn.Module, name: str, packed: nn.Module) -> None:
        replaced.append(ReplacedLayer(parent, name, parent.get_submodule(name)))
        setattr(parent, name, packed)

    for parent in list(model.modules()):
        children = list(parent.named_children())
        next_child = dict(pairwise(children)) if isinstance(parent, nn.Sequential) else {}
        for name, child in children:
            if child not in layers:
                continue
            if type(child) is nn.Linear:
                next_name, following = next_child.get((name, child), ("", None))
                gelu = following if type(following) is nn.GELU else None
                replace(parent, name, PackedLinear(child.weight, child.bias, gelu))
                if gelu is not None:
                    replace(parent, next_name, nn.Identity())
            elif type(child) is nn.MultiheadAttention and is_self_attention_block(parent):
                replace(parent, name, PackedAttention(child))
    return replaced


def unpack_layers(replaced: Sequence[ReplacedLayer]) -> None:
    """Put the layers back that `pack_layers` replaced."""
    for parent, name, layer in replaced:
        setattr(parent, name, layer)


def packs_dtype(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of this dtype on this processor."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    operators = torch.ops.mkldnn
    half = {torch.bfloat16: operators._is_mkldnn_bf16_supported, torch.float16: operators._is_mkldnn_fp16_supported}
    return dtype == torch.float32 or (dtype in half and bool(half[dtype]()))
