"""The engine's operations by compiled kernels (see `soundnet_port.network.kernels` for how they work)."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor
from torch.nn import functional as F

from soundnet_port.network.blocks import Block, Head
from soundnet_port.network.kernels.library import DONE, NO_MEMORY, Kernels
from soundnet_port.network.kernels.spectra import first_spectra, layer_spectra, panels
from soundnet_port.network.operations import ALL_ROWS, ConvPoolOp, FirstConvPoolOp, Operation
from soundnet_port.network.threads import run_parts, thread_count

# (kernel, pooling) -> function, points of its transform
_SPECTRAL = {(32, 8): ("pooled_64", 64), (16, 8): ("pooled_32", 32), (16, 1): ("plain_32", 32)}
_FIRST_ROWS = 24  # of two blocks, which share their rounding
_FEW_ROWS = 8  # sounds with fewer rows go through the weights together
_MIN_ROWS = 128  # fewer rows are shared out to threads by columns


class _KernelOp(ConvPoolOp):
    """What both kinds of overlap-save have in common."""

    def run(self, inputs: list[Tensor], results: list[Tensor]) -> None:
        Operation.run(self, inputs, results)

    def _compute_around(self, x: Tensor, y: Tensor, start: int, stop: int) -> None:
        """Compute a part whose input is not finite: by products in those granules, by kernels around them.

        Halving stops at granules, so results don't depend on the parts that threads took.
        """
        granules = ceil((stop - start) / self.granule)
        if granules == 1:
            super().compute_part(x, y, start, stop)
        else:
            middle = start + granules // 2 * self.granule
            self.compute_part(x, y, start, middle)
            self.compute_part(x, y, middle, stop)


class FirstKernelOp(_KernelOp):
    """The first block, whose input has one channel, through spectra."""

    granule = _FIRST_ROWS

    def __init__(self, kernels: Kernels, block: Block, weight: Tensor, bias: Tensor) -> None:
        super().__init__({block.pool_layer: slice(None)}, block, weight, bias, block.pool, relu=True)
        self.part = ALL_ROWS
        self._kernel, self._bias = kernels.first_layer, bias.contiguous()
        self._spectra = first_spectra(weight.T[:, None], kernels.lanes)

    @staticmethod
    def fits(kernels: Kernels, block: Block, weight: Tensor) -> bool:
        """Whether the kernels know this shape; they need finite weights, too."""
        shape = block.stride == 2 and block.pool == 8 and block.kernel <= 64 and block.kernel % 2 == 0
        return shape and block.channels % kernels.lanes == 0 and bool(weight.isfinite().all())

    def compute_part(self, x: Tensor, y: Tensor, start: int, stop: int) -> None:
        samples, rows = x[start * self.advance :], y[start:stop]
        status = self._kernel(
            samples.data_ptr(),
            len(samples),
            self._spectra.data_ptr(),
            self._bias.data_ptr(),
            rows.data_ptr(),
            len(rows),
            self.channels,
        )
        if status != DONE:
            self._compute_around(x, y, start, stop)


class SpectralOp(_KernelOp):
    """A block with a long kernel through spectra."""

    def __init__(
        self, kernels: Kernels, names: dict[str, slice], block: Block, weight: Tensor, bias: Tensor, pool: int
    ) -> None:
        super().__init__(names, block, weight, bias, pool, relu=True)
        name, points = _SPECTRAL[block.kernel, pool]
        self._kernel, self._bias = getattr(kernels, name), bias.contiguous()
        self._spectra = layer_spectra(weight.view(block.kernel, -1, len(bias)).permute(2, 1, 0), points)
        self._valid = (points - (block.kernel // 2 - 1)) // 8 * 8
        self.granule = self._valid // pool
        self.part = ALL_ROWS

    @staticmethod
    def fits(kernels: Kernels, block: Block, weight: Tensor, pool: int) -> bool:
        """Whether the kernels know this shape; they need finite weights, too."""
        width = len(weight) // block.kernel
        shape = block.stride == 2 and (block.kernel, pool) in _SPECTRAL and width % kernels.lanes == 0
        whole = block.channels % kernels.panel == 0 and block.channels % (2 * kernels.lanes) == 0
        return shape and whole and bool(weight.isfinite().all())

    def compute_part(self, x: Tensor, y: Tensor, start: int, stop: int) -> None:
        frames, rows = x[start * self.advance :], y[start:stop]
        status = self._kernel(
            frames.data_ptr(),
            len(frames),
            self._spectra.data_ptr(),
            self._bias.data_ptr(),
            rows.data_ptr(),
            len(rows),
            x.shape[1],
            self.channels,
            self._valid,
        )
        if status == NO_MEMORY:
            raise MemoryError("no memory for the spectra of a layer")
        if status != DONE:
            self._compute_around(x, y, start, stop)


class ProductOp(ConvPoolOp):
    """Any other block, or heads, as a product of windows with panels of columns."""

    def __init__(
        self,
        kernels: Kernels,
        names: dict[str, slice],
        row: Block | Head,
        weight: Tensor,
        bias: Tensor,
        pool: int,
        relu: bool,
    ) -> None:
        super().__init__(names, row, weight.new_empty(0, len(bias)), bias, pool, relu)
        self._kernel, self._panel, self._terms = kernels.product_layer, kernels.panel, len(weight)
        self._panels = panels(weight, kernels.panel)
        self._bias = F.pad(bias, (0, -len(bias) % kernels.panel))

    def run(self, inputs: list[Tensor], results: list[Tensor]) -> None:
        few = [i for i, y in enumerate(results) if len(y) * self.pool < _FEW_ROWS and len(results) > 1]
        for i in sorted({*range(len(results))} - {*few}):
            self._run_one(inputs[i], results[i])
        if few:
            self._run_few([inputs[i] for i in few], [results[i] for i in few])

    def _run_one(self, x: Tensor, y: Tensor) -> None:
        frames = y if self.pool == 1 else y.new_empty(len(y) * self.pool, self.channels)
        self._multiply(x, self.stride * x.shape[1], frames)
        if self.pool > 1:
            torch.amax(frames.view(-1, self.pool, self.channels), 1, out=y)

    def _run_few(self, inputs: list[Tensor], results: list[Tensor]) -> None:
        counts = [len(y) * self.pool for y in results]
        windows = self._bias.new_empty(sum(counts), self._terms)
        for x, part in zip(inputs, torch.split(windows, counts), strict=True):
            part.copy_(x.as_strided(part.shape, (self.stride * x.shape[1], 1)))
        frames = windows.new_empty(len(windows), self.channels)
        self._multiply(windows, self._terms, frames)
        pooled = frames.view(-1, self.pool, self.channels).amax(1) if self.pool > 1 else frames
        for y, rows in zip(results, torch.split(pooled, [len(y) for y in results]), strict=True):
            y.copy_(rows)

    def _multiply(self, x: Tensor, step: int, frames: Tensor) -> None:
        """Fill rows, in parts of rows, or of columns where there are few rows."""
        threads, rows = thread_count(), len(frames)
        columns = range(0, self.channels, self._panel)
        if rows >= threads * _MIN_ROWS or len(columns) < threads:
            size = ceil(rows / threads)
            parts = [(start, min(start + size, rows), 0, self.channels) for start in range(0, rows, size)]
        else:
            size = ceil(len(columns) / threads) * self._panel
            parts = [
                (0, rows, start, min(start + size, self.channels))
                for start in columns[:: size // self._panel]
            ]

        def multiply_part(start: int, stop: int, first: int, last: int) -> None:
            self._kernel(
                x.data_ptr() + 4 * start * step,
                step,
                self._terms,
                self._panels.data_ptr() + 4 * first * self._terms,
                self._bias.data_ptr() + 4 * first,
                self.relu,
                frames.data_ptr() + 4 * (start * self.channels + first),
                stop - start,
                last - first,
                self.channels,
            )

        run_parts(multiply_part, parts)


def build_operation(
    kernels: Kernels | None,
    names: dict[str, slice],
    row: Block | Head,
    weight: Tensor,
    bias: Tensor,
    pool: int,
) -> Operation:
    """Return the fastest operation for a block, pooled or not, or for heads that lie side by side.

    Args:
        kernels: for this processor; None for matrix products by PyTorch.
        names: layers that the result holds -> their channels of it.
        row: of the architecture; of several heads the first.
        weight: (kernel * channels in, channels), batch norm folded in.
        bias: (channels,).
        pool: frames of which the maximum is taken; 1 for none.
    """
    if isinstance(row, Block) and pool > 1 and len(weight) == row.kernel:
        if kernels and FirstKernelOp.fits(kernels, row, weight):
            return FirstKernelOp(kernels, row, weight, bias)
        return FirstConvPoolOp(row, weight, bias)
    relu = isinstance(row, Block)
    if kernels is None:
        return ConvPoolOp(names, row, weight, bias, pool, relu)
    if isinstance(row, Block) and SpectralOp.fits(kernels, row, weight, pool):
        return SpectralOp(kernels, names, row, weight, bias, pool)
    return ProductOp(kernels, names, row, weight, bias, pool, relu)
