"""The text tower without padding: equal vectors, without the tokens after the end of each text.

Alphabet: B batch, L tokens, W the tower's width, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, cast

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TrimmedText", "build_text_encoder", "trimmed_text"]

# The fixed cost of one pass through the tower, in tokens: texts of unequal length share a pass as
# long as they add fewer tokens of padding than this. ViT-B-32 in one CPU thread takes 22 ms a pass
# and 1 ms a token; of 0 to 128, 32 was the fastest on mixed lengths. The GPU value is an estimate.
PASS_OVERHEAD_TOKENS = {"cpu": 32, "cuda": 4096}


def build_text_encoder(model: Any) -> "Callable[[Tensor], Tensor]":
    """An open_clip model's `encode_text`, (B, L) int64 -> (B, D), trimmed where possible."""
    return trimmed_text(model) or cast("Callable[[Tensor], Tensor]", model.encode_text)


def trimmed_text(model: Any) -> "TrimmedText | None":
    """The trimmed text tower of an open_clip model, None where the padding affects the vectors.

    It does not where attention is causal and the vector is read at the end of the text. Hugging
    Face towers, bidirectional towers (SigLIP) and towers with a class token (CoCa) read all of it.
    """
    tower = getattr(model, "text", model)
    pool = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
    if (
        pool not in ("argmax", "eos")
        or getattr(tower, "cls_emb", None) is not None
        or not _is_causal(getattr(tower, "attn_mask", None))
    ):
        return None
    return TrimmedText(tower, pool, getattr(tower, "text_eos_id", getattr(tower, "eos_id", None)))


@dataclass(frozen=True, slots=True)
class TrimmedText:
    """A causal text tower that groups texts of similar length and cuts them to the longest."""

    tower: Any
    pool: Literal["argmax", "eos"]
    eos_id: int | None

    def __call__(self, tokens: "Tensor") -> "Tensor":
        """(B, L) int64 -> (B, D), in the order of the texts."""
        import torch

        end = self.end_positions(tokens)
        order = end.argsort()
        lengths = [position + 1 for position in end[order].tolist()]
        sizes = _group_sizes(lengths, PASS_OVERHEAD_TOKENS.get(tokens.device.type, PASS_OVERHEAD_TOKENS["cuda"]))
        last_of_group = [total - 1 for total in accumulate(sizes)]  # the longest text of each group
        groups = [
            self.encode_cut(tokens[rows, : lengths[last]], end[rows])
            for rows, last in zip(torch.split(order, sizes), last_of_group, strict=True)
        ]
        return torch.cat(groups)[order.argsort()]

    def end_positions(self, tokens: "Tensor") -> "Tensor":
        """(B, L) int64 -> (B,) int64, the position of the end token, where the vector is read."""
        return tokens.argmax(-1) if self.pool == "argmax" else tokens.eq(self.eos_id or 0).int().argmax(-1)

    def encode_cut(self, tokens: "Tensor", end: "Tensor") -> "Tensor":
        """open_clip's encode_text on texts cut to any length: (B, L) int64 -> (B, D).

        end: (B,) int64, `end_positions` of the texts.  The operations depend on the shapes alone,
        so that a call can be recorded as a CUDA graph.
        """
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


def _is_causal(mask: "Tensor | None") -> bool:
    """Whether an additive (L, L) mask hides from each token exactly those that follow it."""
    import torch

    return mask is not None and torch.equal(mask.isneginf(), torch.ones_like(mask, dtype=torch.bool).triu(1))


def _group_sizes(lengths: list[int], pass_overhead: int) -> list[int]:
    """How many texts each pass takes. lengths: ascending.

    A group ends where further padding would cost more than another pass.

    >>> _group_sizes([5, 5, 6, 40], pass_overhead=32)
    [3, 1]
    """
    sizes, padding = [0], 0
    for i, length in enumerate(lengths):
        padding += sizes[-1] * (length - lengths[i - 1]) if sizes[-1] else 0
        if padding > pass_overhead:
            sizes.append(0)
            padding = 0
        sizes[-1] += 1
    return sizes
