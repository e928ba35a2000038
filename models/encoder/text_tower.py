"""The text tower on the tokens that matter: what stands after the end of a text is left out, with equal vectors.

Alphabet: B batch, L tokens, W the tower's width, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, cast

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TrimmedText", "build_text_encoder"]

# Tokens whose work equals the fixed cost of one more pass: below it, padding is cheaper than a part of its own. ViT-B-32 in one CPU thread
# takes 22 ms a pass and 1 ms a token, and of 0 to 128 this was the fastest on mixed lengths; a GPU (not measured) holds a few thousand.
PASS_TOKENS = {"cpu": 32, "cuda": 4096}


def build_text_encoder(model: Any) -> "Callable[[Tensor], Tensor]":
    """An open_clip model's `encode_text`: (B, L) int64 -> (B, D), without the padding where the tower allows it.

    It does where attention is causal and the vector is read at the end of the text. Hugging Face towers, two-way towers (SigLIP) and
    towers with a class token (CoCa) see all of the padding and stay open_clip's own.
    """
    tower = getattr(model, "text", model)
    pool = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
    if (
        pool not in ("argmax", "eos")
        or getattr(tower, "cls_emb", None) is not None
        or not _causal(getattr(tower, "attn_mask", None))
    ):
        return cast("Callable[[Tensor], Tensor]", model.encode_text)
    return TrimmedText(tower, pool, getattr(tower, "text_eos_id", getattr(tower, "eos_id", None)))


@dataclass(frozen=True, slots=True)
class TrimmedText:
    """A causal tower that encodes texts of similar length together, each part as long as its longest text."""

    tower: Any
    pool: Literal["argmax", "eos"]
    eos_id: int | None

    def __call__(self, tokens: "Tensor") -> "Tensor":
        """(B, L) int64 -> (B, D), in order."""
        import torch

        end = self.ends(tokens)
        order = end.argsort()
        lengths = [place + 1 for place in end[order].tolist()]
        sizes = _sizes(lengths, PASS_TOKENS.get(tokens.device.type, PASS_TOKENS["cuda"]))
        parts = [
            self.part(tokens[rows, : lengths[last]], end[rows])
            for rows, last in zip(torch.split(order, sizes), _last(sizes), strict=True)
        ]
        return torch.cat(parts)[order.argsort()]

    def ends(self, tokens: "Tensor") -> "Tensor":
        """(B, L) int64 -> (B,) int64, the place at which each vector is read; what follows it does not matter."""
        return tokens.argmax(-1) if self.pool == "argmax" else tokens.eq(self.eos_id or 0).int().argmax(-1)

    def part(self, tokens: "Tensor", end: "Tensor") -> "Tensor":
        """As open_clip's encode_text, on texts cut to L tokens, of which `end` (B,) is one: the same kernels whatever the values."""
        import torch

        tower, length = self.tower, tokens.shape[1]
        dtype = tower.transformer.get_cast_dtype()
        x = tower.token_embedding(tokens).to(dtype) + tower.positional_embedding[:length].to(dtype)  # (B, L, W)
        x = tower.transformer(x, attn_mask=tower.attn_mask[:length, :length])
        pooled = tower.ln_final(x[torch.arange(len(x), device=x.device), end])  # (B, W)
        projection = tower.text_projection
        if projection is None:
            return cast("Tensor", pooled)
        return cast("Tensor", projection(pooled) if isinstance(projection, torch.nn.Linear) else pooled @ projection)


def _last(sizes: list[int]) -> list[int]:
    """The place of each part's last text, which is its longest."""
    return [total - 1 for total in accumulate(sizes)]


def _causal(mask: "Tensor | None") -> bool:
    """Whether an additive (L, L) mask hides from each token all that follows it, and nothing else."""
    import torch

    return mask is not None and torch.equal(mask.isneginf(), torch.ones_like(mask, dtype=torch.bool).triu(1))


def _sizes(lengths: list[int], pass_tokens: int) -> list[int]:
    """How many texts each part takes. lengths: ascending. A part ends where padding it further costs more than another pass.

    >>> _sizes([5, 5, 6, 40], pass_tokens=32)
    [3, 1]
    """
    sizes, padding = [0], 0
    for i, length in enumerate(lengths):
        padding += sizes[-1] * (length - lengths[i - 1]) if sizes[-1] else 0
        if padding > pass_tokens:
            sizes.append(0)
            padding = 0
        sizes[-1] += 1
    return sizes
