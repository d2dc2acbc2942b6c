"""Training on a CPU: each block's forward and backward pass as a few matrix products.

PyTorch's own convolutions and poolings spend most of a training step on layouts and on memory.
Here, as in the engine, activations are (frames, channels), so that a convolution is a product with
overlapping windows of its input, read where they lie. With `w[k]` the filters' tap `k`, stride `s`:

    forward        y[t] = sum_k  x[s t + k] w[k]               windows of x, times the filters
    filters        dw[k] = sum_t x[s t + k]^T dy[t]            windows of x transposed, times dy
    input          dx[s u + q] = sum_j dy[u - j] w[s j + q]^T  windows of dy, times the filters

In the last one the `s` samples from `s u` on are computed together, from `kernel / s` frames of dy.

Batch norm and pooling need no pass of their own over all frames. The filters of channels with a
negative gain change their sign first; then the affine part of batch norm rises, so that it commutes
with the maximum, as ReLU does. What is left for all frames are the sums for mean and variance, and
the maximum, which follow each product while its result is in the cache. The gradient is

    dy = scale (g at the maxima - mean(g) - yhat mean(g yhat))      (means over all frames)

with `g` the gradient after batch norm, which is zero except at the maxima.

The modules of plain.py are the reference that this is tested against.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from soundnet_port.network.architecture import Block, Layer
from soundnet_port.network.plain import PlainSoundNet

_CHUNK = 1 << 20  # numbers of a result that are computed at a time, to stay in the cache; in whole clips
_FEW_ROWS = 256  # interleaved sets of fewer rows are collected into one product


def fits(model: PlainSoundNet, layers: Iterable[Layer]) -> bool:
    """Whether these layers can be computed here: blocks' outputs and heads, in float32."""
    ends = {block.output for block in model.architecture.blocks}
    return (
        all(layer.name in ends or layer.kind == "head" for layer in layers)
        and all(block.kernel % block.stride == 0 for block in model.architecture.blocks)
        and all(parameter.dtype == torch.float32 for parameter in model.parameters())
    )


def extract(model: PlainSoundNet, x: Tensor, layers: Sequence[Layer], first: int = 0) -> dict[str, Tensor]:
    """Compute layers as the modules do, with gradients and running statistics.

    Batch norms in training mode use the batch's statistics and update the running ones; those in
    evaluation mode use the running ones.

    Args:
        model: see `fits`.
        x: waveforms, or the output of the block before `first`.
        layers: see `fits`; not those before `first`.
        first: number of the first block to compute, counted from 0.

    Shape:
        x: `(batch, 1, samples)`, or `(batch, channels, frames)`
        returns `(batch, channels, frames)` by layer name
    """
    outputs: dict[str, Tensor] = {}
    names = {layer.name for layer in layers}
    deepest = max((layer.module for layer in layers), default=0)
    blocks = model.architecture.blocks
    module = sum(block.modules for block in blocks[:first])
    x = x.transpose(1, 2)
    for block in blocks[first:]:
        if module >= deepest:
            break
        conv, norm = model.get_submodule(block.name), model.get_submodule(block.norm)
        x = _Block.apply(x, conv.weight, conv.bias, norm.weight, norm.bias, block, norm)  # type: ignore[no-untyped-call]
        if block.output in names:
            outputs[block.output] = x.transpose(1, 2)
        module += block.modules
    for layer in layers:
        if layer.kind == "head":
            outputs[layer.name] = model.head(layer.name, x.transpose(1, 2))
    return outputs


def keep_freed_memory() -> None:
    """Make the C library (glibc) keep freed memory for the next training step.

    By default it returns large blocks to the system at once, and getting them again, page by page, takes
    as long as the computation. This changes the whole process, for good: it holds the most memory that it
    ever used. So it is for programs that own their process (the command line, worker processes), never
    for library functions. With other C libraries nothing happens.
    """
    if sys.platform.startswith("linux") and (library := ctypes.util.find_library("c")):
        mallopt = getattr(ctypes.CDLL(library), "mallopt", None)
        if mallopt:
            mallopt(-4, 0)  # M_MMAP_MAX: all blocks on the heap
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep free memory at its end
            mallopt(-2, 1 << 28)  # M_TOP_PAD: grow it in large steps


@dataclass(frozen=True)
class _Layout:
    """The layout of clips in memory: padded to a common length, one behind the other.

    Each clip has `length` rows of input and `rows` rows of result, of which the first `frames` count;
    the others see parts of two clips. They are at least as many as a window of dy needs zeros.
    """

    block: Block
    clips: int
    samples: int  # rows of input that a clip has
    inputs: int  # channels of the input
    frames: int
    length: int
    together: int  # frames that one product computes side by side: a Toeplitz matrix

    @classmethod
    def of(cls, block: Block, x: Tensor) -> _Layout:
        clips, samples, inputs = x.shape
        padded = samples + 2 * block.padding
        unit = block.stride * max(block.pool, 1)
        return cls(
            block,
            clips,
            samples,
            inputs,
            frames=(padded - block.kernel) // block.stride + 1,
            length=ceil(padded / unit) * unit,
            together=block.pool if block.pool and inputs == 1 else 1,
        )

    @property
    def rows(self) -> int:
        return self.length // self.block.stride

    @property
    def pooled(self) -> int:
        return self.frames // max(self.block.pool, 1)

    @property
    def advance(self) -> int:
        """Numbers from the window of one row to the next."""
        return self.together * self.block.stride * self.inputs

    @property
    def window(self) -> int:
        """Numbers in a window."""
        return ((self.together - 1) * self.block.stride + self.block.kernel) * self.inputs

    def chunks(self) -> Iterator[slice]:
        """Yield the clips, a few at a time."""
        clips = max(1, _CHUNK // (self.rows * self.block.channels))
        return (slice(start, min(start + clips, self.clips)) for start in range(0, self.clips, clips))

    def pad(self, x: Tensor) -> Tensor:
        """Return clips (clips, samples, channels) in this layout, as one vector."""
        flat = x.new_zeros(len(x) * self.length * self.inputs + self.window)
        body = flat[: len(x) * self.length * self.inputs].view(len(x), self.length, self.inputs)
        body[:, self.block.padding :][:, : self.samples] = x
        return flat

    def columns(self, filters: Tensor) -> Tensor:
        """Return filters (channels, inputs, kernel) as the matrix that windows are multiplied with."""
        plain = filters.permute(2, 1, 0).flatten(0, 1)
        if self.together == 1:
            return plain
        toeplitz = plain.new_zeros(self.window, self.together, len(filters))
        for frame, part in enumerate(self._diagonals(toeplitz)):
            part[:, frame] = plain
        return toeplitz.flatten(1)

    def filters(self, columns: Tensor) -> Tensor:
        """Return the gradient of the filters from that of their matrix."""
        shared = columns.view(self.window, self.together, -1)
        plain = sum(
            (part[:, frame] for frame, part in enumerate(self._diagonals(shared))), start=torch.tensor(0.0)
        )
        return plain.view(self.block.kernel, self.inputs, -1).permute(2, 1, 0)

    def _diagonals(self, toeplitz: Tensor) -> list[Tensor]:
        step = self.block.stride * self.inputs
        return [toeplitz[frame * step :][: self.block.kernel * self.inputs] for frame in range(self.together)]


class _Block(torch.autograd.Function):
    """Convolution, batch norm, ReLU and perhaps pooling, on (batch, frames, channels)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        gain: Tensor,
        shift: Tensor,
        block: Block,
        norm: nn.BatchNorm1d,
    ) -> Tensor:
        layout = _Layout.of(block, x)
        sign = torch.where(gain < 0, -1.0, 1.0)
        signed = weight * sign[:, None, None]
        columns = layout.columns(signed)
        # without bias, and in training minus the chunk's mean
        y = x.new_empty(layout.clips, layout.rows, block.channels)
        largest = (
            x.new_empty(layout.clips, layout.pooled, block.channels) if block.pool else y[:, : layout.frames]
        )
        where = torch.empty(largest.shape, dtype=torch.int64) if block.pool else None
        offsets = x.new_zeros(layout.clips, 1, block.channels)
        squares = x.new_zeros(block.channels)
        for chunk in layout.chunks():
            part = y[chunk]
            rows = part.view(-1, layout.together * block.channels)
            _multiply(layout.pad(x[chunk]), layout.advance, columns, rows)
            flat = part.view(-1, block.channels)
            if norm.training:
                part[:, layout.frames :] = 0
                mean = flat.sum(0) / (len(part) * layout.frames)
                flat -= mean
                part[:, layout.frames :] = 0
                squares += flat.square().sum(0)
                offsets[chunk] = mean
            if where is not None:
                frames = part.view(len(part), -1, block.pool, block.channels)[:, : layout.pooled]
                torch.max(frames, 2, out=(largest[chunk], where[chunk]))
        if norm.training:
            n = layout.clips * layout.frames
            mean = offsets.mean((0, 1))
            squares += (offsets - mean).square().sum((0, 1)) * layout.frames
            variance = squares / n
            _update_statistics(norm, sign * mean + bias, variance * (n / max(n - 1, 1)))
        else:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            mean, variance = sign * (norm.running_mean - bias), norm.running_var
        inverse = (variance + norm.eps).rsqrt()
        scale = gain.abs() * inverse
        offsets = offsets - mean
        out = torch.addcmul(shift, largest + offsets, scale).relu_()
        ctx.layout, ctx.training = layout, norm.training
        ctx.save_for_backward(x, signed, y, where, largest, offsets, out, scale, inverse, sign)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y, where, largest, offsets, out, scale, inverse, sign = ctx.saved_tensors
        layout: _Layout = ctx.layout
        block, stride = layout.block, layout.block.stride
        g = gradients[0] * (out > 0)
        shift = g.sum((0, 1))
        gain = (g * (largest + offsets)).sum((0, 1)) * inverse
        g *= scale
        n = layout.clips * layout.frames
        slope = -scale * inverse * gain / n
        constant = slope * offsets - scale * shift / n
        taps = block.kernel // stride  # of dy, for each sample of dx
        dx = back = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            flipped = weight.unflatten(2, (taps, stride)).flip(2)  # (channels, inputs, taps, stride)
            back = flipped.permute(2, 0, 3, 1).reshape(taps * block.channels, -1)
        dcolumns = x.new_zeros(layout.window, layout.together * block.channels)
        for chunk in layout.chunks():
            part = y[chunk]
            # the rows before the first are 0
            flat = g.new_zeros(taps - 1 + len(part) * layout.rows, block.channels)
            dy = flat[taps - 1 :].view(len(part), layout.rows, block.channels)
            valid = dy[:, : layout.frames]
            if ctx.training:
                torch.addcmul(constant[chunk], part[:, : layout.frames], slope, out=valid)
            if where is None:
                valid += g[chunk]
            else:
                frames = dy.view(len(part), -1, block.pool, block.channels)[:, : layout.pooled]
                frames.scatter_add_(2, where[chunk][:, :, None], g[chunk][:, :, None])
            rows = dy.view(-1, layout.together * block.channels)
            _correlate(layout.pad(x[chunk]), layout.advance, rows, dcolumns)
            if dx is not None and back is not None:
                padded = x.new_empty(len(part), layout.length, layout.inputs)
                _multiply(flat.view(-1), block.channels, back, padded.view(-1, stride * layout.inputs))
                dx[chunk] = padded[:, block.padding :][:, : layout.samples]
        dweight = layout.filters(dcolumns) * sign[:, None, None]
        # batch norm subtracts the mean, and the bias with it
        dbias = torch.zeros_like(sign) if ctx.training else sign * scale * shift
        return dx, dweight, dbias, gain * sign, shift, None, None


def _multiply(flat: Tensor, advance: int, columns: Tensor, out: Tensor) -> None:
    """Fill `out`: row `i` is the window from `i * advance` on, times the columns."""
    for windows, rows in _windows(flat, advance, len(columns), out):
        torch.mm(windows, columns, out=rows)


def _correlate(flat: Tensor, advance: int, rows: Tensor, out: Tensor) -> None:
    """Add to `out` the sum over all rows of their window, as a column, times the row."""
    for windows, part in _windows(flat, advance, len(out), rows):
        out.addmm_(windows.T, part)


def _windows(flat: Tensor, advance: int, window: int, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield overlapping windows with the rows they belong to; interleaved sets where there are many.

    BLAS takes no matrix whose rows overlap, so each set holds rows that do not.
    """
    sets = ceil(window / advance)
    if len(rows) < sets * _FEW_ROWS:
        yield flat.as_strided((len(rows), window), (advance, 1)).contiguous(), rows
        return
    for first in range(sets):
        part = rows[first::sets]
        yield flat.as_strided((len(part), window), (sets * advance, 1), first * advance), part


def _update_statistics(norm: nn.BatchNorm1d, mean: Tensor, variance: Tensor) -> None:
    """Update the running statistics as nn.BatchNorm1d does."""
    if norm.track_running_stats and norm.running_mean is not None and norm.running_var is not None:
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked += 1
        momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        norm.running_mean.lerp_(mean, momentum)
        norm.running_var.lerp_(variance, momentum)
