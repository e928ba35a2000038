"""Encoding at a few fixed shapes: memory that stays where it is, and on CUDA a graph per shape that is recorded once and replayed.

    batch -> padded to the next size -> [pinned memory -> device -> graph -> pinned memory] -> the rows that were asked for

A small model's kernels end faster than Python can start the next one; a replayed graph starts them all at once. On the CPU the same path
runs the function itself, so that tests need no GPU. Everything is recorded before the encoder exists: no first caller waits for it.
Alphabet: B batch, S a fixed size, L tokens, D width.
"""

import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from models.encoder.image_tower import unit
from models.encoder.text_tower import TrimmedText

__all__ = ["FixedTexts", "Forward", "Replay", "Stage", "as_they_come", "sizes_to"]

Forward = Callable[
    [Tensor], Sequence[Tensor]
]  # (B, …) -> some (B, …), on the device, with the same work whatever the values
Run = Callable[[np.ndarray], list[np.ndarray]]
LENGTHS = (
    8,
    16,
    32,
)  # tokens of a text's fixed shapes, and the context length itself: half of all captions are shorter than 16
WARM = 3  # calls before recording: libraries choose their algorithms and take their workspaces in the first ones


def as_they_come(forward: Forward, device: str) -> Run:
    """Batches at the size they have."""

    def run(batch: np.ndarray) -> list[np.ndarray]:
        return [made.cpu().numpy() for made in forward(torch.from_numpy(batch).to(device))]

    return run


def sizes_to(largest: int) -> tuple[int, ...]:
    """Batch sizes up to `largest`, ascending; padding to the next one adds less than half.

    >>> sizes_to(10)
    (1, 2, 3, 4, 6, 8, 10)
    """
    steps = sorted({size for power in range(largest.bit_length()) for size in (2**power, 3 * 2**power // 2)})
    return (*(size for size in steps if size < largest), largest)


class Stage:
    """Where recorded functions are played, one at a time: on CUDA they share one stream and one pool of memory."""

    def __init__(self, device: str) -> None:
        self.device, self.turn = device, threading.Lock()
        self.cuda = device.startswith("cuda")
        self.stream = torch.cuda.Stream(device) if self.cuda else None  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle() if self.cuda else None

    def playing(self) -> AbstractContextManager[object]:
        """The stage's stream is the current one."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)


class Replay:
    """A function of a batch at fixed sizes.

    sizes: ascending; a batch is padded to the next one with what was there before, a larger batch than the last is taken in parts.
    item: (…) of one row, whose shape and type all share.  State: the buffers of each size, used under the stage's lock.
    """

    def __init__(self, forward: Forward, item: Tensor, sizes: Sequence[int], stage: Stage) -> None:
        self._stage, self._sizes = stage, tuple(sizes)
        # the largest first: the smaller ones then fit into the memory it took
        self._shapes = {
            size: _Shape(forward, item.expand(size, *item.shape), stage) for size in sorted(sizes, reverse=True)
        }

    def __call__(self, batch: np.ndarray) -> list[np.ndarray]:
        """(B, …) -> each of the function's results, (B, …)."""
        most = self._sizes[-1]
        parts = [self._part(batch[at : at + most]) for at in range(0, max(1, len(batch)), most)]
        return parts[0] if len(parts) == 1 else [np.concatenate(made) for made in zip(*parts, strict=True)]

    def _part(self, rows: np.ndarray) -> list[np.ndarray]:
        with self._stage.turn:
            return self._shapes[self._sizes[bisect_left(self._sizes, len(rows))]].run(rows)


class _Shape:
    """One size: memory for its batch on both sides, and on CUDA the graph between them. example: (S, …) on the CPU."""

    def __init__(self, forward: Forward, example: Tensor, stage: Stage) -> None:
        self._forward, self._stage = forward, stage
        self._host = (
            example.contiguous().pin_memory() if stage.cuda else example.clone(memory_format=torch.contiguous_format)
        )
        self._device = self._host.to(stage.device)  # on the CPU the same memory
        self._graph = self._recorded() if stage.cuda else None

    def run(self, rows: np.ndarray) -> list[np.ndarray]:
        """(n, …) -> (n, …) each, n <= S. The caller holds the stage's lock."""
        count = len(rows)
        self._host[:count].copy_(torch.from_numpy(rows))
        if self._graph is None:
            return [made[:count].numpy() for made in self._forward(self._device)]
        assert self._stage.stream is not None  # noqa: S101  a graph was recorded on it
        with self._stage.playing():
            self._device.copy_(self._host, non_blocking=True)
            self._graph.replay()
            for there, here in zip(self._made, self._told, strict=True):
                here.copy_(there, non_blocking=True)
            self._stage.stream.synchronize()
        return [here[:count].numpy().copy() for here in self._told]

    def _recorded(self) -> torch.cuda.CUDAGraph:
        assert self._stage.stream is not None  # noqa: S101  a stage on CUDA has one
        self._stage.stream.wait_stream(torch.cuda.current_stream())
        with self._stage.playing():
            for _ in range(WARM):
                self._forward(self._device)
            self._stage.stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self._stage.pool, stream=self._stage.stream, capture_error_mode="thread_local"
        ):
            self._made = self._forward(self._device)
        self._told = [torch.empty(made.shape, dtype=made.dtype, pin_memory=True) for made in self._made]
        return graph


class FixedTexts:
    """A trimmed text tower at fixed lengths: each text runs with those of its length bucket, in a `Replay` of its own."""

    def __init__(self, trimmed: TrimmedText, context: int, sizes: Sequence[int], stage: Stage) -> None:
        self._trimmed = trimmed
        self._lengths = np.array([*(length for length in LENGTHS if length < context), context])
        self._played = {int(length): self._replay(int(length), sizes, stage) for length in self._lengths[::-1]}

    def __call__(self, tokens: np.ndarray) -> list[np.ndarray]:
        """(B, L) int64 -> the vectors (B, D) float32 unit. Where each text ends is found here, so that the device is never waited for."""
        ends = self._trimmed.ends(torch.from_numpy(tokens)).numpy()  # (B,)
        buckets = self._lengths[np.searchsorted(self._lengths, ends + 1)]  # (B,)
        rows = [np.flatnonzero(buckets == length) for length in np.unique(buckets)]
        packed = [np.column_stack([tokens[some, : buckets[some[0]]], ends[some]]) for some in rows]  # (n, length + 1)
        made = np.concatenate([self._played[each.shape[1] - 1](each)[0] for each in packed])  # (B, D)
        back = np.argsort(np.concatenate(rows))
        return [made[back]]

    def _replay(self, length: int, sizes: Sequence[int], stage: Stage) -> Replay:
        """A row is `length` tokens, and behind them where the text ends."""
        return Replay(
            lambda packed: [unit(self._trimmed.part(packed[:, :length], packed[:, length]))],
            torch.zeros(length + 1, dtype=torch.int64),
            sizes,
            stage,
        )
