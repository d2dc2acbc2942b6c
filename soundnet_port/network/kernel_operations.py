"""The engine's operations by compiled kernels (see `soundnet_port.network.kernels` for how they work)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


class _OverlapSaveOp(ConvPoolOp):
    """A convolution, pooled or not, bias and ReLU through spectra, block by block.

    Args:
        kernel: function of the library.
        spectra: of the filters, in the kernel's layout.
        sizes: the kernel's last arguments.
    """

    def __init__(
        self,
        names: dict[str, slice],
        block: Block,
        weight: Tensor,
        bias: Tensor,
        pool: int,
        kernel: Callable[..., int],
        spectra: Tensor,
        sizes: Sequence[int],
    ) -> None:
        super().__init__(names, block, weight, bias, pool, relu=True)
        self.part = ALL_ROWS
        self._kernel, self._spectra, self._sizes = kernel, spectra, sizes
        self._bias = bias.contiguous()

    def run(self, inputs: list[Tensor], results: list[Tensor]) -> None:
        self._run_directly(inputs, results)

    def compute_part(self, x: Tensor, y: Tensor, start: int, stop: int) -> None:
        """Compute by the kernel; where the input is not finite, by products in those granules alone.

        Halving stops at granules, so results don't depend on the parts that threads took.
        """
        frames, rows = x[start * self.advance :], y[start:stop]
        pointers = [values.data_ptr() for values in (self._spectra, self._bias, rows)]
        status = self._kernel(frames.data_ptr(), len(frames), *pointers, len(rows), *self._sizes)
        granules = ceil(len(rows) / self.granule)
        if status == NO_MEMORY:
            raise MemoryError("no memory for the spectra of a layer")
        if status != DONE and granules == 1:
            super().compute_part(x, y, start, stop)
        elif status != DONE:
            middle = start + granules // 2 * self.granule
            self.compute_part(x, y, start, middle)
            self.compute_part(x, y, middle, stop)


class FirstKernelOp(_OverlapSaveOp):
    """The first block, whose input has one channel."""

    granule = _FIRST_ROWS

    def __init__(self, kernels: Kernels, block: Block, weight: Tensor, bias: Tensor) -> None:
        names, spectra = {block.pool_layer: slice(None)}, first_spectra(weight.T[:, None], kernels.lanes)
        sizes = (len(bias),)
        super().__init__(names, block, weight, bias, block.pool, kernels.first_layer, spectra, sizes)

    @staticmethod
    def fits(kernels: Kernels, block: Block, weight: Tensor) -> bool:
        """Whether the kernels know this shape; they need finite weights, too."""
        shape = block.stride == 2 and block.pool == 8 and block.kernel <= 64 and block.kernel % 2 == 0
        return shape and block.channels % kernels.lanes == 0 and bool(weight.isfinite().all())


class SpectralOp(_OverlapSaveOp):
    """A block of many channels with a long kernel."""

    def __init__(
        self, kernels: Kernels, names: dict[str, slice], block: Block, weight: Tensor, bias: Tensor, pool: int
    ) -> None:
        name, points = _SPECTRAL[block.kernel, pool]
        filters = weight.view(block.kernel, -1, len(bias)).permute(2, 1, 0)
        valid = (points - (block.kernel // 2 - 1)) // 8 * 8
        self.granule = valid // pool
        sizes = (filters.shape[1], len(bias), valid)
        spectra = layer_spectra(filters, points)
        super().__init__(names, block, weight, bias, pool, getattr(kernels, name), spectra, sizes)

    @staticmethod
    def fits(kernels: Kernels, block: Block, weight: Tensor, pool: int) -> bool:
        """Whether the kernels know this shape; they need finite weights, too."""
        width = len(weight) // block.kernel
        shape = block.stride == 2 and (block.kernel, pool) in _SPECTRAL and width % kernels.lanes == 0
        whole = block.channels % kernels.panel == 0 and block.channels % (2 * kernels.lanes) == 0
        return shape and whole and bool(weight.isfinite().all())


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
        super().__init__(names, row, weight, bias, pool, relu)
        self.weight = weight.new_empty(0, len(bias))  # the panels are all that is kept
        self._kernel, self._panel = kernels.product_layer, kernels.panel
        self._panels = panels(weight, kernels.panel)
        self._bias = F.pad(bias, (0, -len(bias) % kernels.panel))

    def _has_few_rows(self, y: Tensor, sounds: int) -> bool:
        return sounds > 1 and len(y) * self.pool < _FEW_ROWS

    def _run_directly(self, inputs: list[Tensor], results: list[Tensor]) -> None:
        for x, y in zip(inputs, results, strict=True):
            frames = y if self.pool == 1 else y.new_empty(len(y) * self.pool, self.channels)
            self._multiply(x, self.stride * x.shape[1], frames)
            if self.pool > 1:
                torch.amax(frames.view(-1, self.pool, self.channels), 1, out=y)

    def _multiply_collected(self, windows: Tensor, frames: Tensor) -> None:
        self._multiply(windows, self.terms, frames)

    def _add_bias(self, y: Tensor) -> None:
        """Do nothing; the kernel has added it."""

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
                self.terms,
                self._panels.data_ptr() + 4 * first * self.terms,
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
