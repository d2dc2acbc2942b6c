"""Training on a CPU: each block's forward and backward pass as a few matrix products.

PyTorch's own convolutions and poolings spend most of a training step on layouts and on memory.
Here, as in the engine, activations are (frames, channels), so that a convolution is a product with
overlapping windows of its input, read where they lie. With `w[k]` the filters' tap `k`, stride `s`:

    forward        y[t] = sum_k  x[s t + k] w[k]               windows of x, times the filters
    filters        dw[k] = sum_t x[s t + k]^T dy[t]            windows of x transposed, times dy
    input          dx[s u + q] = sum_j dy[u - j] w[s j + q]^T  windows of dy, times the filters

In the last one the `s` samples from `s u` on are made together, from `kernel / s` frames of dy.

Batch norm and pooling need no pass of their own over all frames. The filters of channels with a
negative gain are turned round first; then the affine part of batch norm rises, so that it commutes
with the maximum, as ReLU does. What is left for all frames are the sums for mean and variance, and
the maximum, which follow each product while its result is in the cache. The gradient is

    dy = scale (g at the maxima - mean(g) - yhat mean(g yhat))      (means over all frames)

with `g` the gradient behind batch norm, which is there at the maxima only.

The modules of model.py are the reference that this is tested against; `SoundNet.extract` comes here.
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

_CHUNK = 1 << 20  # numbers of a result that are made at a time, to stay in the cache; whole clips
_FEW_ROWS = 256  # interleaved sets of fewer rows are collected into one product


def fits(model: PlainSoundNet, layers: Iterable[Layer]) -> bool:
    """Whether these layers can be computed here: what blocks end with, and heads, in float32."""
    ends = {block.end for block in model.architecture.blocks}
    return (
        all(layer.name in ends or layer.kind == "head" for layer in layers)
        and all(block.kernel % block.stride == 0 for block in model.architecture.blocks)
        and all(parameter.dtype == torch.float32 for parameter in model.parameters())
    )


def extract(model: PlainSoundNet, x: Tensor, layers: Sequence[Layer]) -> dict[str, Tensor]:
    """Layers that fit, as the modules compute them, with gradients and running statistics.

    Batch norms in training mode use the batch's statistics, and count them; those in evaluation mode
    use the running ones.

    Args:
        model: see `fits`.
        x: waveforms.
        layers: which.

    Shape:
        x: `(batch, 1, samples)`
        returns `(batch, channels, frames)` by layer name
    """
    made: dict[str, Tensor] = {}
    names = {layer.name for layer in layers}
    deepest = max((layer.module for layer in layers), default=0)
    module = 0
    x = x.transpose(1, 2)
    for block in model.architecture.blocks:
        if module >= deepest:
            break
        conv, norm = model.get_submodule(block.name), model.get_submodule(block.norm)
        x = _Block.apply(x, conv.weight, conv.bias, norm.weight, norm.bias, block, norm)  # type: ignore[no-untyped-call]
        if block.end in names:
            made[block.end] = x.transpose(1, 2)
        module += block.modules
    for layer in layers:
        if layer.kind == "head":
            made[layer.name] = model.head(layer.name, x.transpose(1, 2))
    return made


def keep_freed_memory() -> None:
    """Has the C library keep freed memory for the next step, for this process.

    By default (glibc) it hands large blocks back at once, and getting them again, page by page, takes
    as long as the computation. Does nothing where the library is another one.
    """
    if sys.platform.startswith("linux") and (library := ctypes.util.find_library("c")):
        mallopt = getattr(ctypes.CDLL(library), "mallopt", None)
        if mallopt:
            mallopt(-4, 0)  # M_MMAP_MAX: no block apart from the heap
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep what is free at its end
            mallopt(-2, 1 << 28)  # M_TOP_PAD: grow it in large steps


@dataclass(frozen=True)
class _Plan:
    """How clips lie in memory: padded to a common length, one behind the other.

    Each clip has `length` rows of input and `rows` rows of result, of which the first `frames` count;
    the others see parts of two clips. They are at least as many as a window of dy needs zeros.
    """

    block: Block
    clips: int
    samples: int  # rows of input that a clip has
    inputs: int  # channels
    frames: int
    length: int
    together: int  # frames that one product makes side by side: a Toeplitz matrix

    @classmethod
    def of(cls, block: Block, x: Tensor) -> _Plan:
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
        """Numbers from one product's window to the next."""
        return self.together * self.block.stride * self.inputs

    @property
    def window(self) -> int:
        """Numbers in a window."""
        return ((self.together - 1) * self.block.stride + self.block.kernel) * self.inputs

    def chunks(self) -> Iterator[slice]:
        """The clips, a few at a time."""
        some = max(1, _CHUNK // (self.rows * self.block.channels))
        return (slice(start, min(start + some, self.clips)) for start in range(0, self.clips, some))

    def padded(self, x: Tensor) -> Tensor:
        """Clips, (clips, samples, channels), as they have to lie: one vector."""
        flat = x.new_zeros(len(x) * self.length * self.inputs + self.window)
        body = flat[: len(x) * self.length * self.inputs].view(len(x), self.length, self.inputs)
        body[:, self.block.padding :][:, : self.samples] = x
        return flat

    def columns(self, filters: Tensor) -> Tensor:
        """Filters, (channels, inputs, kernel), as the matrix that windows are multiplied with."""
        plain = filters.permute(2, 1, 0).flatten(0, 1)
        if self.together == 1:
            return plain
        toeplitz = plain.new_zeros(self.window, self.together, len(filters))
        for frame, part in enumerate(self._diagonals(toeplitz)):
            part[:, frame] = plain
        return toeplitz.flatten(1)

    def filters(self, columns: Tensor) -> Tensor:
        """The gradient of filters from that of their matrix."""
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
        plan = _Plan.of(block, x)
        sign = torch.where(gain < 0, -1.0, 1.0)
        turned = weight * sign[:, None, None]
        columns = plan.columns(turned)
        y = x.new_empty(plan.clips, plan.rows, block.channels)  # without bias, each chunk about its mean
        largest = x.new_empty(plan.clips, plan.pooled, block.channels) if block.pool else y[:, : plan.frames]
        where = torch.empty(largest.shape, dtype=torch.int64) if block.pool else None
        about = x.new_zeros(plan.clips, 1, block.channels)
        squares = x.new_zeros(block.channels)
        for some in plan.chunks():
            made = y[some]
            rows = made.view(-1, plan.together * block.channels)
            _multiply(plan.padded(x[some]), plan.advance, columns, rows)
            flat = made.view(-1, block.channels)
            if norm.training:
                made[:, plan.frames :] = 0
                mean = flat.sum(0) / (len(made) * plan.frames)
                flat -= mean
                made[:, plan.frames :] = 0
                squares += flat.square().sum(0)
                about[some] = mean
            if where is not None:
                frames = made.view(len(made), -1, block.pool, block.channels)[:, : plan.pooled]
                torch.max(frames, 2, out=(largest[some], where[some]))
        if norm.training:
            n = plan.clips * plan.frames
            mean = about.mean((0, 1))
            squares += (about - mean).square().sum((0, 1)) * plan.frames
            variance = squares / n
            _count(norm, sign * mean + bias, variance * (n / max(n - 1, 1)))
        else:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            mean, variance = sign * (norm.running_mean - bias), norm.running_var
        inverse = (variance + norm.eps).rsqrt()
        scale = gain.abs() * inverse
        about = about - mean
        out = torch.addcmul(shift, largest + about, scale).relu_()
        ctx.plan, ctx.training = plan, norm.training
        ctx.save_for_backward(x, turned, y, where, largest, about, out, scale, inverse, sign)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y, where, largest, about, out, scale, inverse, sign = ctx.saved_tensors
        plan: _Plan = ctx.plan
        block, stride = plan.block, plan.block.stride
        g = gradients[0] * (out > 0)
        shift = g.sum((0, 1))
        gain = (g * (largest + about)).sum((0, 1)) * inverse
        g *= scale
        n = plan.clips * plan.frames
        slope = -scale * inverse * gain / n
        constant = slope * about - scale * shift / n
        taps = block.kernel // stride  # of dy, for each sample of dx
        dx = back = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            each = weight.unflatten(2, (taps, stride)).flip(2)  # (channels, inputs, taps, stride)
            back = each.permute(2, 0, 3, 1).reshape(taps * block.channels, -1)
        dcolumns = x.new_zeros(plan.window, plan.together * block.channels)
        for some in plan.chunks():
            made = y[some]
            flat = g.new_zeros(taps - 1 + len(made) * plan.rows, block.channels)  # what comes before is 0
            dy = flat[taps - 1 :].view(len(made), plan.rows, block.channels)
            valid = dy[:, : plan.frames]
            if ctx.training:
                torch.addcmul(constant[some], made[:, : plan.frames], slope, out=valid)
            if where is None:
                valid += g[some]
            else:
                frames = dy.view(len(made), -1, block.pool, block.channels)[:, : plan.pooled]
                frames.scatter_add_(2, where[some][:, :, None], g[some][:, :, None])
            rows = dy.view(-1, plan.together * block.channels)
            _correlate(plan.padded(x[some]), plan.advance, rows, dcolumns)
            if dx is not None and back is not None:
                padded = x.new_empty(len(made), plan.length, plan.inputs)
                _multiply(flat.view(-1), block.channels, back, padded.view(-1, stride * plan.inputs))
                dx[some] = padded[:, block.padding :][:, : plan.samples]
        dweight = plan.filters(dcolumns) * sign[:, None, None]
        # batch norm takes the mean away, and the bias with it
        dbias = torch.zeros_like(sign) if ctx.training else sign * scale * shift
        return dx, dweight, dbias, gain * sign, shift, None, None


def _multiply(flat: Tensor, advance: int, columns: Tensor, out: Tensor) -> None:
    """Row `i` of `out` is the window from `i * advance` on, times the columns."""
    for windows, rows in _windows(flat, advance, len(columns), out):
        torch.mm(windows, columns, out=rows)


def _correlate(flat: Tensor, advance: int, rows: Tensor, out: Tensor) -> None:
    """Adds the sum over all rows of their window, as a column, times the row."""
    for windows, some in _windows(flat, advance, len(out), rows):
        out.addmm_(windows.T, some)


def _windows(flat: Tensor, advance: int, window: int, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Overlapping windows with the rows they belong to; interleaved sets where there are many.

    BLAS takes no matrix whose rows overlap, so each set holds rows that do not.
    """
    sets = ceil(window / advance)
    if len(rows) < sets * _FEW_ROWS:
        yield flat.as_strided((len(rows), window), (advance, 1)).contiguous(), rows
        return
    for first in range(sets):
        some = rows[first::sets]
        yield flat.as_strided((len(some), window), (sets * advance, 1), first * advance), some


def _count(norm: nn.BatchNorm1d, mean: Tensor, variance: Tensor) -> None:
    """Moves the running statistics, as nn.BatchNorm1d does."""
    if norm.track_running_stats and norm.running_mean is not None and norm.running_var is not None:
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked += 1
        momentum = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        norm.running_mean.lerp_(mean, momentum)
        norm.running_var.lerp_(variance, momentum)
