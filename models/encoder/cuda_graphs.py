"""Encoding at a few fixed batch sizes, on CUDA with one recorded graph per size.

    batch -> padded to the next size -> [pinned memory -> device -> graph -> pinned memory] -> its
    rows

The kernels of a small model finish faster than Python can launch the next one; replaying a CUDA
graph launches them all at once. On the CPU the same code calls the function itself, so that tests
need no GPU. All graphs are recorded while the encoder is loaded, before the first request.
Alphabet: B batch, S a fixed batch size, L tokens, D width.
"""

import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from models.encoder.image_tower import unit_vectors
from models.encoder.text_tower import TrimmedText

__all__ = ["FixedSizeRunner", "FixedTextRunner", "Forward", "GraphStream", "fixed_batch_sizes", "run_unpadded"]

# (B, …) -> several (B, …) on the same device. The operations must depend on the shapes alone.
Forward = Callable[[Tensor], Sequence[Tensor]]
Runner = Callable[[np.ndarray], list[np.ndarray]]  # (B, …) -> several (B, …)
# Lengths in tokens to which texts are padded, beside the context length: half of all captions have
# fewer than 16 tokens.
TEXT_LENGTHS = (8, 16, 32)
WARM_UP_CALLS = 3  # before recording; libraries allocate workspaces in the first calls


def run_unpadded(forward: Forward, device: str) -> Runner:
    """A runner that calls `forward` at the batch's own size."""

    def run(batch: np.ndarray) -> list[np.ndarray]:
        return [output.cpu().numpy() for output in forward(torch.from_numpy(batch).to(device))]

    return run


def fixed_batch_sizes(largest: int) -> tuple[int, ...]:
    """Batch sizes up to `largest`, ascending; padding to the next one adds less than half.

    >>> fixed_batch_sizes(10)
    (1, 2, 3, 4, 6, 8, 10)
    """
    steps = sorted({size for power in range(largest.bit_length()) for size in (2**power, 3 * 2**power // 2)})
    return (*(size for size in steps if size < largest), largest)


class GraphStream:
    """The CUDA stream, memory pool and lock that several recorded graphs share.

    The lock lets one graph run at a time. On the CPU there is the lock alone.
    """

    def __init__(self, device: str) -> None:
        self.device, self.lock = device, threading.Lock()
        self.cuda = device.startswith("cuda")
        self.stream = torch.cuda.Stream(device) if self.cuda else None  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle() if self.cuda else None

    def activate(self) -> AbstractContextManager[object]:
        """A context in which the stream is the current one."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)


class FixedSizeRunner:
    """Runs a function at fixed batch sizes.

    sizes: ascending. A batch is padded to the next size with whatever rows the buffer held before;
    a batch larger than the last size is split.
    item: (…) an example of one row, for the shape and dtype of all.
    State: the buffers of each size, used under the stream's lock.
    """

    def __init__(self, forward: Forward, item: Tensor, sizes: Sequence[int], stream: GraphStream) -> None:
        self._stream, self._sizes = stream, tuple(sizes)
        # the largest size is recorded first: the smaller ones then reuse its memory
        self._buffers = {
            size: _SizeBuffers(forward, item.expand(size, *item.shape), stream) for size in sorted(sizes, reverse=True)
        }

    def __call__(self, batch: np.ndarray) -> list[np.ndarray]:
        """(B, …) -> the function's outputs, (B, …) each."""
        largest = self._sizes[-1]
        blocks = [self._run_block(batch[at : at + largest]) for at in range(0, max(1, len(batch)), largest)]
        return blocks[0] if len(blocks) == 1 else [np.concatenate(outputs) for outputs in zip(*blocks, strict=True)]

    def _run_block(self, rows: np.ndarray) -> list[np.ndarray]:
        with self._stream.lock:
            return self._buffers[self._sizes[bisect_left(self._sizes, len(rows))]].run(rows)


class _SizeBuffers:
    """The buffers of one batch size on host and device, and on CUDA its graph.

    example: (S, …) on the CPU.
    """

    def __init__(self, forward: Forward, example: Tensor, stream: GraphStream) -> None:
        self._forward, self._stream = forward, stream
        self._host_input = (
            example.contiguous().pin_memory() if stream.cuda else example.clone(memory_format=torch.contiguous_format)
        )
        self._device_input = self._host_input.to(stream.device)  # on the CPU the same memory
        self._graph = self._record_graph() if stream.cuda else None

    def run(self, rows: np.ndarray) -> list[np.ndarray]:
        """(n, …) -> (n, …) each, n <= S. The caller holds the stream's lock."""
        count = len(rows)
        self._host_input[:count].copy_(torch.from_numpy(rows))
        if self._graph is None:
            return [output[:count].numpy() for output in self._forward(self._device_input)]
        assert self._stream.stream is not None  # noqa: S101  the graph was recorded on it
        with self._stream.activate():
            self._device_input.copy_(self._host_input, non_blocking=True)
            self._graph.replay()
            for device_output, host_output in zip(self._device_outputs, self._host_outputs, strict=True):
                host_output.copy_(device_output, non_blocking=True)
            self._stream.stream.synchronize()
        return [output[:count].numpy().copy() for output in self._host_outputs]

    def _record_graph(self) -> torch.cuda.CUDAGraph:
        assert self._stream.stream is not None  # noqa: S101  a stream on CUDA has one
        self._stream.stream.wait_stream(torch.cuda.current_stream())
        with self._stream.activate():
            for _ in range(WARM_UP_CALLS):
                self._forward(self._device_input)
            self._stream.stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self._stream.pool, stream=self._stream.stream, capture_error_mode="thread_local"
        ):
            self._device_outputs = self._forward(self._device_input)
        self._host_outputs = [
            torch.empty(output.shape, dtype=output.dtype, pin_memory=True) for output in self._device_outputs
        ]
        return graph


class FixedTextRunner:
    """A trimmed text tower at fixed lengths: a `FixedSizeRunner` for each length bucket.

    context: the tower's context length in tokens.  sizes: batch sizes, ascending.
    """

    def __init__(self, trimmed: TrimmedText, context: int, sizes: Sequence[int], stream: GraphStream) -> None:
        self._trimmed = trimmed
        self._lengths = np.array([*(length for length in TEXT_LENGTHS if length < context), context])
        self._runners = {int(length): self._build_runner(int(length), sizes, stream) for length in self._lengths[::-1]}

    def __call__(self, tokens: np.ndarray) -> list[np.ndarray]:
        """(B, L) int64 -> [vectors (B, D) float32 unit].

        The end of each text is computed on the host, so that the device is not synchronized for it.
        """
        ends = self._trimmed.end_positions(torch.from_numpy(tokens)).numpy()  # (B,)
        lengths = self._lengths[np.searchsorted(self._lengths, ends + 1)]  # (B,) the bucket of each text
        buckets = [np.flatnonzero(lengths == length) for length in np.unique(lengths)]  # row numbers, (n,) each
        cut = [np.column_stack([tokens[rows, : lengths[rows[0]]], ends[rows]]) for rows in buckets]  # (n, length + 1)
        vectors = np.concatenate([self._runners[rows.shape[1] - 1](rows)[0] for rows in cut])  # (B, D), by bucket
        order = np.argsort(np.concatenate(buckets))
        return [vectors[order]]

    def _build_runner(self, length: int, sizes: Sequence[int], stream: GraphStream) -> FixedSizeRunner:
        """A runner whose rows are `length` tokens followed by the position of the text's end."""
        return FixedSizeRunner(
            lambda rows: [unit_vectors(self._trimmed.encode_cut(rows[:, :length], rows[:, length]))],
            torch.zeros(length + 1, dtype=torch.int64),
            sizes,
            stream,
        )
