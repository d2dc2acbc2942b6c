"""The engine's operations: a block or the heads as a few matrix products, with the modules' numbers.

1.  Batch norm is a scale and a shift for each channel, so it goes into the convolution before it:
    with s = gain / sqrt(variance + eps), weight' = s * weight, bias' = s * (bias - mean) + shift.

2.  A convolution is a matrix product without any copying. Frames lie in rows, one after the other,
    so what a filter sees is one contiguous run of numbers, `kernel * channels` of them, and the next
    frame's begins `stride * channels` later:

        rows of x   |a0 a1|b0 b1|c0 c1|d0 d1|e0 e1|f0 f1| ...     2 channels, kernel 4, stride 2
        frame 0      ---------------------
        frame 1                  ---------------------
        frame 2                              ---------------

    These runs overlap, and BLAS accepts no matrix whose rows overlap. But the runs of every second
    frame (here; in general of every `ceil(kernel / stride)`-th) do not: they are the rows of a matrix
    with a row length (lda) of twice the step. So the frames are computed in `ceil(kernel / stride)`
    interleaved sets, each one matrix product straight out of x and into its rows of the result.

3.  The maximum of a pooling window is taken before bias and ReLU. Both are monotone, so it is the
    same number, and only an eighth (or a fourth) of the values is left for them. The window's frames
    come out of one matrix product each, and the running maximum stays in the cache.

The first convolution has a single input channel and too few filters for that to be efficient (64 by
16). There one product gives all eight frames of a pooling window: its matrix holds the filters
eight times, each time two samples further (a Toeplitz matrix, 78 by 128). That is 22 % more
multiplications than needed, and a third less time. It comes out with a row for each filter and frame,
so that the maximum runs over long rows; a product with the identity matrix transposes the result
and adds the bias on the way, faster than a transposing copy.
"""

from __future__ import annotations

from itertools import compress
from math import ceil
from threading import local

import torch
from torch import Tensor

from soundnet_port.network.blocks import Block, Head
from soundnet_port.network.threads import run_parts, thread_count

ALL_ROWS = 1 << 21  # more than a block of sound has
_FIRST_ROWS = 1024  # rows of a product: in the first layer its result stays in the L2 cache,
_POOLED_ROWS = 256  # in the second, where a maximum runs over several products, in L1
_FEW_ROWS = 16  # interleaved sets of fewer rows are collected into one product
_MIN_ROWS = 128  # no thread is woken for less


class Operation:
    """Rows in, rows out: row `i` sees the rows `i * advance` up to `i * advance + window`.

    Attributes:
        names: layers that the result holds -> their channels of it.
        padding: rows of zeros before and after the input.
        may_overhang: whether an input shorter than a window still gives one row (see `Window`).
        channels: of the result.
        part: rows of the result that one thread computes at a time.
        granule: parts start at multiples of so many rows.
    """

    names: dict[str, slice]
    advance: int
    window: int
    padding = 0
    may_overhang = False
    channels: int
    part: int
    granule = 1

    def run(self, inputs: list[Tensor], results: list[Tensor]) -> None:
        """Fill each sound's result (rows, channels) from its input, which holds all that it sees."""
        threads = thread_count()
        parts = []
        for x, y in zip(inputs, results, strict=True):
            rows = min(self.part, max(_MIN_ROWS, ceil(len(y) / threads)))
            rows = ceil(len(y) / ceil(len(y) / rows))  # parts of equal size
            rows = ceil(rows / self.granule) * self.granule
            parts += [(x, y, start, min(start + rows, len(y))) for start in range(0, len(y), rows)]
        run_parts(self.compute_part, parts)

    def compute_part(self, x: Tensor, y: Tensor, start: int, stop: int) -> None:
        """Fill the rows `start` to `stop` of a sound's result."""
        raise NotImplementedError


class ConvPoolOp(Operation):
    """A convolution, the maximum over `pool` frames of it, bias, and ReLU (not for heads)."""

    def __init__(
        self, names: dict[str, slice], row: Block | Head, weight: Tensor, bias: Tensor, pool: int, relu: bool
    ) -> None:
        self.names, self.padding = names, row.padding
        self.kernel, self.stride, self.pool, self.relu = row.kernel, row.stride, pool, relu
        self.weight, self.bias = weight, bias  # (kernel * channels in, channels), (channels,)
        self.advance, self.window = row.stride * pool, (pool - 1) * row.stride + row.kernel
        self.may_overhang = isinstance(row, Head) and row.padding > 0
        self.terms, self.channels = weight.shape
        self.sets = ceil(self.kernel / self.advance)
        self.part = self.sets * (_POOLED_ROWS if pool > 1 else ALL_ROWS)

    def run(self, inputs: list[Tensor], results: list[Tensor]) -> None:
        few = [self._has_few_rows(y, len(results)) for y in results]
        if any(few):
            self._run_collected(list(compress(inputs, few)), list(compress(results, few)))
        many = [not is_few for is_few in few]
        self._run_directly(list(compress(inputs, many)), list(compress(results, many)))

    def _has_few_rows(self, y: Tensor, sounds: int) -> bool:
        return len(y) < self.sets * _FEW_ROWS

    def _run_directly(self, inputs: list[Tensor], results: list[Tensor]) -> None:
        super().run(inputs, results)

    def compute_part(self, x: Tensor, y: Tensor, start: int, stop: int) -> None:
        """Multiply windows straight out of x: 2. and 3. above."""
        width = x.shape[1]  # numbers in a row
        for first in range(start, min(start + self.sets, stop)):
            rows = y[first : stop : self.sets]
            shape, strides = (len(rows), self.kernel * width), (self.sets * self.advance * width, 1)
            for frame in range(self.pool):
                offset = first * self.advance + frame * self.stride
                windows = x.as_strided(shape, strides, offset * width)
                if frame == 0:
                    torch.mm(windows, self.weight, out=rows)
                else:
                    torch.maximum(rows, torch.mm(windows, self.weight), out=rows)
        self._add_bias(y[start:stop])

    def _run_collected(self, inputs: list[Tensor], results: list[Tensor]) -> None:
        """Multiply all windows of all sounds at once, for few rows in each."""
        counts = [len(y) * self.pool for y in results]
        windows = self.bias.new_empty(sum(counts), self.terms)
        for x, part in zip(inputs, torch.split(windows, counts), strict=True):
            part.copy_(x.as_strided(part.shape, (self.stride * x.shape[1], 1)))
        frames = windows.new_empty(len(windows), self.channels)
        self._multiply_collected(windows, frames)
        pooled = frames.view(-1, self.pool, self.channels).amax(1) if self.pool > 1 else frames
        self._add_bias(pooled)
        for y, rows in zip(results, torch.split(pooled, [len(y) for y in results]), strict=True):
            y.copy_(rows)

    def _multiply_collected(self, windows: Tensor, frames: Tensor) -> None:
        share = ceil(self.channels / thread_count())
        columns = [slice(start, start + share) for start in range(0, self.channels, share)]
        run_parts(
            lambda part: torch.mm(windows, self.weight[:, part], out=frames[:, part]),
            [(part,) for part in columns],
        )

    def _add_bias(self, y: Tensor) -> None:
        y.add_(self.bias)
        if self.relu:
            y.relu_()


class FirstConvPoolOp(Operation):
    """The first block, whose input has one channel: convolution, maximum, bias and ReLU."""

    def __init__(self, block: Block, weight: Tensor, bias: Tensor) -> None:
        self.names, self.padding = {block.pool_layer: slice(None)}, block.padding
        self.pool, self.channels = block.pool, len(bias)
        self.advance, self.window = block.stride * block.pool, (block.pool - 1) * block.stride + block.kernel
        self.sets = ceil(self.window / self.advance)
        self.part = self.sets * _FIRST_ROWS
        toeplitz = weight.new_zeros(block.pool, self.channels, self.window)
        for frame, filters in enumerate(toeplitz):
            filters[:, frame * block.stride :][:, : block.kernel] = weight.T
        self.filters = toeplitz.flatten(0, 1)
        self.identity_and_bias = torch.cat([torch.eye(self.channels).to(bias), bias[None]])
        self.scratch = local()  # buffers of each thread, since fresh memory costs more than the work

    def compute_part(self, x: Tensor, y: Tensor, start: int, stop: int) -> None:
        frames, largest = self._buffers(ceil((stop - start) / self.sets))
        for first in range(start, min(start + self.sets, stop)):
            rows = y[first : stop : self.sets]
            n = len(rows)
            windows = x.as_strided((self.window, n), (1, self.sets * self.advance), first * self.advance)
            products = torch.mm(self.filters, windows, out=frames[: len(self.filters) * n].view(-1, n))
            torch.amax(products.view(self.pool, -1, n), 0, out=largest[: self.channels, :n])
            torch.mm(largest[:, :n].T, self.identity_and_bias, out=rows)
        y[start:stop].relu_()

    def _buffers(self, rows: int) -> tuple[Tensor, Tensor]:
        buffers: tuple[Tensor, Tensor] | None = getattr(self.scratch, "buffers", None)
        if buffers is None or buffers[1].shape[1] < rows:
            buffers = (
                self.filters.new_empty(len(self.filters) * rows),
                self.filters.new_ones(self.channels + 1, rows),  # the last row is for the bias
            )
            self.scratch.buffers = buffers
        return buffers


class MaxPoolOp(Operation):
    """Pooling by itself, where the frames before it are asked for too."""

    def __init__(self, block: Block, channels: int) -> None:
        self.names, self.channels = {block.pool_layer: slice(None)}, channels
        self.advance = self.window = block.pool
        self.part = ALL_ROWS

    def compute_part(self, x: Tensor, y: Tensor, start: int, stop: int) -> None:
        rows = x[start * self.window : stop * self.window]
        torch.amax(rows.view(stop - start, self.window, -1), 1, out=y[start:stop])
