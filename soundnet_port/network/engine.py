"""The fast path: the network of model.py, for inference, in constant memory, with the same numbers.

model.py is the reference that one reads; this is what runs. Three ideas make it fast:

1.  Batch norm is a scale and a shift for each channel, so it goes into the convolution before it:
    with s = gain / sqrt(variance + eps), weight' = s * weight, bias' = s * (bias - mean) + shift.

2.  A convolution is a matrix product without any copying. Frames lie in rows, one after the other,
    so what a filter sees is one contiguous run of numbers, `kernel * channels` of them, and the next
    frame's begins `stride * channels` later:

        rows of x   |a0 a1|b0 b1|c0 c1|d0 d1|e0 e1|f0 f1| ...     2 channels, kernel 4, stride 2
        frame 0      ---------------------
        frame 1                  ---------------------
        frame 2                              ---------------

    These runs overlap, and a matrix whose rows overlap is nothing that a BLAS accepts. But every
    second frame's runs (here; in general every `ceil(kernel / stride)`-th) do not: they are the rows
    of an honest matrix, with a row length (lda) of twice the step. So the frames are computed in
    `ceil(kernel / stride)` interleaved sets, each one matrix product straight out of x and into its
    rows of the result.

3.  The maximum of a pooling window is taken before bias and ReLU. Both are monotone, so it is the
    same number, and only an eighth (or a fourth) of the values is left for them. The window's frames
    come out of one matrix product each, and the running maximum stays in the cache.

The first convolution has a single input channel and too few filters for that to be efficient (64 by
16). There one product gives all eight frames of a pooling window: its matrix holds the filters
eight times, each time two samples further (a Toeplitz matrix, 78 by 128). That is 22 % more
multiplications than needed, and a third less time. It comes out with a row for each filter and frame,
so that the maximum runs over long rows; a product with the identity matrix turns the result around
and adds the bias on the way, faster than a transposing copy.

Sounds are computed in blocks. Between blocks each layer keeps the last rows of its input that later
frames will see, so blocks of any size give the frames that one piece would give, and a sound of any
length takes the memory of a block. Several sounds are computed side by side, each with rows of its
own: none is padded to the length of another, which would be wrong from the second layer on, where
padding has become the bias of the layers before. From the layer on where a single sound has too few
frames for an efficient product, all sounds' windows are collected for one.

docs/engine.md has what was measured, and what was tried and left.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from math import ceil
from threading import Lock, local
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from soundnet_port.network.architecture import Architecture, Block, Head, Layer
from soundnet_port.network.plain import PlainSoundNet

_Result = TypeVar("_Result")

BLOCK = 1 << 21  # samples at a time (95 s): enough frames for the deep layers, some 50 MB in all
_FIRST_ROWS = 1024  # rows of a product: in the first layer what it makes stays in the L2 cache,
_POOLED_ROWS = 256  # in the second, where a maximum runs over several products, in L1
_FEW_ROWS = 16  # interleaved sets of fewer rows are collected into one product
_FEWEST_ROWS = 128  # no thread is woken for less


class Step:
    """Rows in, rows out: row `i` sees the rows `i * advance` up to `i * advance + window`.

    Attributes:
        names: the layers that are made here -> which channels of the result they are.
        padding: rows of zeros before and after the input.
        may_overhang: an input shorter than a window still gives one row (see architecture._out).
        channels: of the result.
        part: rows of the result that are made at a time, by one thread.
    """

    names: dict[str, slice]
    advance: int
    window: int
    padding = 0
    may_overhang = False
    channels: int
    part: int

    def run(self, inputs: list[Tensor], results: list[Tensor]) -> None:
        """Fills each sound's result (rows, channels) from its input, which holds all that it sees."""
        threads = getattr(_thread_state, "threads", 1)
        parts = []
        for x, y in zip(inputs, results, strict=True):
            rows = _evenly(len(y), min(self.part, max(_FEWEST_ROWS, ceil(len(y) / threads))))
            parts += [(x, y, start, min(start + rows, len(y))) for start in range(0, len(y), rows)]
        _in_threads(self.make, parts)

    def make(self, x: Tensor, y: Tensor, start: int, stop: int) -> None:
        """Makes some rows of one sound's result."""
        raise NotImplementedError


class ConvPoolOp(Step):
    """A convolution, the maximum over `pool` frames of it, bias, and ReLU (not for heads)."""

    def __init__(
        self, names: dict[str, slice], row: Block | Head, weight: Tensor, bias: Tensor, pool: int, relu: bool
    ) -> None:
        self.names, self.padding = names, row.padding
        self.kernel, self.stride, self.pool, self.relu = row.kernel, row.stride, pool, relu
        self.weight, self.bias = weight, bias  # (kernel * channels in, channels), (channels,)
        self.advance, self.window = row.stride * pool, (pool - 1) * row.stride + row.kernel
        self.may_overhang = isinstance(row, Head) and row.padding > 0
        self.channels = len(bias)
        self.sets = ceil(self.kernel / self.advance)
        self.part = self.sets * (_POOLED_ROWS if pool > 1 else BLOCK)

    def run(self, inputs: list[Tensor], results: list[Tensor]) -> None:
        few = [i for i, y in enumerate(results) if len(y) < self.sets * _FEW_ROWS]
        if few:
            self._collected([inputs[i] for i in few], [results[i] for i in few])
        others = [i for i in range(len(results)) if i not in few]
        super().run([inputs[i] for i in others], [results[i] for i in others])

    def make(self, x: Tensor, y: Tensor, start: int, stop: int) -> None:
        """Straight out of x: 2. and 3. above."""
        width = x.shape[1]  # numbers in a row
        for first in range(start, min(start + self.sets, stop)):
            made = y[first : stop : self.sets]
            shape, strides = (len(made), self.kernel * width), (self.sets * self.advance * width, 1)
            for frame in range(self.pool):
                offset = first * self.advance + frame * self.stride
                windows = x.as_strided(shape, strides, offset * width)
                if frame == 0:
                    torch.mm(windows, self.weight, out=made)
                else:
                    torch.maximum(made, torch.mm(windows, self.weight), out=made)
        self._finish(y[start:stop])

    def _collected(self, inputs: list[Tensor], results: list[Tensor]) -> None:
        """All windows of all sounds in one product, for few rows in each."""
        counts = [len(y) * self.pool for y in results]
        windows = self.weight.new_empty(sum(counts), len(self.weight))
        for x, part in zip(inputs, torch.split(windows, counts), strict=True):
            part.copy_(x.as_strided(part.shape, (self.stride * x.shape[1], 1)))
        made = windows.new_empty(len(windows), self.channels)
        share = ceil(self.channels / getattr(_thread_state, "threads", 1))
        columns = [slice(start, start + share) for start in range(0, self.channels, share)]
        _in_threads(
            lambda some: torch.mm(windows, self.weight[:, some], out=made[:, some]),
            [(each,) for each in columns],
        )
        pooled = made.view(-1, self.pool, self.channels).amax(1) if self.pool > 1 else made
        self._finish(pooled)
        for y, part in zip(results, torch.split(pooled, [len(y) for y in results]), strict=True):
            y.copy_(part)

    def _finish(self, y: Tensor) -> None:
        y.add_(self.bias)
        if self.relu:
            y.relu_()


class FirstConvPoolOp(Step):
    """The first block, whose input has one channel: convolution, maximum, bias and ReLU."""

    def __init__(self, block: Block, weight: Tensor, bias: Tensor) -> None:
        self.names, self.padding = {block.pooled: slice(None)}, block.padding
        self.pool, self.channels = block.pool, len(bias)
        self.advance, self.window = block.stride * block.pool, (block.pool - 1) * block.stride + block.kernel
        self.sets = ceil(self.window / self.advance)
        self.part = self.sets * _FIRST_ROWS
        toeplitz = weight.new_zeros(block.pool, self.channels, self.window)
        for frame, filters in enumerate(toeplitz):
            filters[:, frame * block.stride :][:, : block.kernel] = weight.T
        self.filters = toeplitz.flatten(0, 1)
        self.kept = local()  # each thread's own room to work in, for fresh memory costs more than the work
        self.turned = torch.cat([torch.eye(self.channels).to(bias), bias[None]])

    def make(self, x: Tensor, y: Tensor, start: int, stop: int) -> None:
        most = ceil((stop - start) / self.sets)
        frames, largest = self._scratch(most)
        for first in range(start, min(start + self.sets, stop)):
            made = y[first : stop : self.sets]
            n = len(made)
            windows = x.as_strided((self.window, n), (1, self.sets * self.advance), first * self.advance)
            products = torch.mm(self.filters, windows, out=frames[: len(self.filters) * n].view(-1, n))
            torch.amax(products.view(self.pool, -1, n), 0, out=largest[: self.channels, :n])
            torch.mm(largest[:, :n].T, self.turned, out=made)
        y[start:stop].relu_()

    def _scratch(self, rows: int) -> tuple[Tensor, Tensor]:
        kept: tuple[Tensor, Tensor] | None = getattr(self.kept, "scratch", None)
        if kept is None or kept[1].shape[1] < rows:
            kept = (
                self.filters.new_empty(len(self.filters) * rows),
                self.filters.new_ones(self.channels + 1, rows),  # the last row is for the bias
            )
            self.kept.scratch = kept
        return kept


class MaxPoolOp(Step):
    """Pooling by itself, where the frames before it were asked for too."""

    def __init__(self, block: Block, channels: int) -> None:
        self.names, self.channels = {block.pooled: slice(None)}, channels
        self.advance = self.window = block.pool
        self.part = BLOCK

    def make(self, x: Tensor, y: Tensor, start: int, stop: int) -> None:
        rows = x[start * self.window : stop * self.window]
        torch.amax(rows.view(stop - start, self.window, -1), 1, out=y[start:stop])


class Engine:
    """A network's folded weights, and the steps that compute any of its named layers.

    Weights are folded when a layer is first asked for, and kept: as many bytes again as the model's
    layers on the way there have.
    """

    def __init__(self, model: PlainSoundNet) -> None:
        self.architecture: Architecture = model.architecture
        self._state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        self._folded: dict[str, tuple[Tensor, Tensor]] = {}
        self._first: FirstConvPoolOp | None = None
        self._eps = {
            block.norm: float(getattr(model.get_submodule(block.norm), "eps"))  # noqa: B009
            for block in self.architecture.blocks
        }
        self.like = next(iter(self._state.values()))  # device and type of all tensors here

    def steps(self, layers: Sequence[Layer]) -> list[Step]:
        """What has to be computed for these layers, in order."""
        names = {layer.name for layer in layers}
        deepest = max((layer.module for layer in layers), default=0)
        steps: list[Step] = []
        module = 0
        for block in self.architecture.blocks:
            if module >= deepest:
                break
            weight, bias = self._weights(block)
            fused = block.pool > 0 and block.name not in names and deepest >= module + 4
            if fused and not steps:
                self._first = self._first or FirstConvPoolOp(block, weight, bias)
                steps.append(self._first)
            else:
                made = {block.pooled if fused else block.name: slice(None)}
                steps.append(ConvPoolOp(made, block, weight, bias, block.pool if fused else 1, relu=True))
                if block.pool and not fused and deepest >= module + 4:
                    steps.append(MaxPoolOp(block, block.channels))
            module += block.modules
        heads = [head for head in self.architecture.heads if head.name in names]
        if heads:  # in one product, for they see the same
            weight, bias = self._weights(*heads)
            made, start = {}, 0
            for head in heads:
                made[head.name] = slice(start, start + head.categories)
                start += head.categories
            steps.append(ConvPoolOp(made, heads[0], weight, bias, 1, relu=False))
        return steps

    def filters(self, block: Block) -> tuple[Tensor, Tensor]:
        """Weight (channels, channels in, kernel) and bias (channels, 1) with batch norm folded in."""
        columns, bias = self._weights(block)
        return columns.view(block.kernel, -1, len(bias)).permute(2, 1, 0), bias[:, None]

    def _weights(self, *rows: Block | Head) -> tuple[Tensor, Tensor]:
        """Weight (kernel * channels in, channels) and bias with batch norm folded in; heads side by side."""
        key = " ".join(row.name for row in rows)
        if key not in self._folded:
            parts = [self._fold(row) for row in rows]
            self._folded[key] = (
                torch.cat([weight for weight, _ in parts], 1),
                torch.cat([bias for _, bias in parts]),
            )
        return self._folded[key]

    def _fold(self, row: Block | Head) -> tuple[Tensor, Tensor]:
        # on the CPU, for Apple's GPUs have no float64
        weight, bias = (self._state[f"{row.name}.{name}"].cpu() for name in ("weight", "bias"))
        columns = weight.permute(2, 1, 0).flatten(0, 1)  # (tap, channel) in the order of x's rows
        if isinstance(row, Head):
            return columns.to(self.like), bias.to(self.like)
        mean, variance, gain, shift = (
            self._state[f"{row.norm}.{name}"].cpu().double()
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        scale = gain / (variance + self._eps[row.norm]).sqrt()
        folded = (bias.double() - mean) * scale + shift
        return (columns.double() * scale).to(self.like), folded.to(self.like)


class StreamState:
    """Sounds on their way through the layers, side by side, a piece at a time.

    Args:
        engine: of the network.
        layers: named layers of its architecture.
        sounds: how many go side by side.
    """

    def __init__(self, engine: Engine, layers: Sequence[Layer], sounds: int = 1) -> None:
        self.device, self.steps = engine.like.device, engine.steps(layers)
        self.names = {layer.name for layer in layers}
        # for each step and sound the rows that later frames will see; at first, the padding
        self._pending: list[list[Tensor]] = []
        channels = 1
        for step in self.steps:
            self._pending.append([engine.like.new_zeros(step.padding, channels)] * sounds)
            channels = step.channels
        self._made = [[0] * sounds for _ in self.steps]

    def push(self, pieces: Sequence[Tensor], *, last: bool = False) -> dict[str, list[Tensor]]:
        """The next samples of each sound.

        Shape:
            pieces: `(samples,)` each, of any lengths
            returns for each layer a list with each sound's new frames, `(frames, channels)`; without
            `last` those that are determined whatever follows
        """
        return _exactly(self.device, self._push, pieces, last)

    def _push(self, pieces: Sequence[Tensor], last: bool) -> dict[str, list[Tensor]]:
        new: dict[str, list[Tensor]] = {}
        if not self.steps:
            return new
        inputs, bodies = self._framed(0, [len(piece) for piece in pieces], 1, last)
        for body, piece in zip(bodies, pieces, strict=True):
            body[:, 0].copy_(piece)
        for number, step in enumerate(self.steps):
            counts = [max(0, (len(x) - step.window) // step.advance + 1) for x in inputs]
            if number + 1 < len(self.steps):
                following, results = self._framed(number + 1, counts, step.channels, last)
            else:
                following = results = [
                    x.new_empty(n, step.channels) for x, n in zip(inputs, counts, strict=True)
                ]
            busy = [i for i, count in enumerate(counts) if count]
            step.run([inputs[i] for i in busy], [results[i] for i in busy])
            for i, (x, count) in enumerate(zip(inputs, counts, strict=True)):
                self._made[number][i] += count
                self._pending[number][i] = x[:0] if last else x[count * step.advance :].clone()
            for name in self.names & step.names.keys():
                new[name] = [y[:, step.names[name]] for y in results]
            inputs = following
        return new

    def _framed(
        self, number: int, counts: Sequence[int], channels: int, last: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """A step's inputs, what is pending before and padding after; and the part still to be filled."""
        step = self.steps[number]
        inputs, bodies = [], []
        for before, count, made in zip(self._pending[number], counts, self._made[number], strict=True):
            after = step.padding if last else 0
            length = len(before) + count + after
            if last and not made and step.may_overhang and 0 < step.window - length < step.advance:
                after += step.window - length
            x = before.new_empty(len(before) + count + after, channels)
            x[: len(before)] = before
            x[len(x) - after :] = 0
            inputs.append(x)
            bodies.append(x[len(before) : len(before) + count])
        return inputs, bodies


def extract(
    model: PlainSoundNet, waveforms: Sequence[Tensor], layers: Sequence[Layer]
) -> list[dict[str, Tensor]]:
    """Named layers of sounds of any lengths, each as if it were alone.

    Shape:
        waveforms: `(samples,)` each, long enough for the layers
        returns for each sound its layers, `(channels, frames)`
    """
    engine = get_engine(model)
    return _exactly(engine.like.device, _extract, engine, waveforms, layers)


def _extract(engine: Engine, waveforms: Sequence[Tensor], layers: Sequence[Layer]) -> list[dict[str, Tensor]]:
    results: list[dict[str, Tensor]] = []
    group: list[Tensor] = []
    for number, waveform in enumerate(waveforms):
        group.append(waveform)
        following = len(waveforms[number + 1]) if number + 1 < len(waveforms) else BLOCK
        if sum(map(len, group)) + following <= BLOCK:
            continue
        flow = StreamState(engine, layers, len(group))
        made: dict[str, list[list[Tensor]]] = {layer.name: [[] for _ in group] for layer in layers}
        # several fit into a block together; one that is longer goes by blocks
        blocks = range(0, max(len(each) for each in group), BLOCK)
        for start in blocks:
            pieces = [each[start : start + BLOCK] for each in group]
            for name, frames in flow.push(pieces, last=start == blocks[-1]).items():
                for kept, new in zip(made[name], frames, strict=True):
                    kept.append(new)
        results += [
            {name: torch.cat(frames[i]).T.contiguous() for name, frames in made.items()}
            for i in range(len(group))
        ]
        group = []
    return results


def convolved(model: PlainSoundNet, x: Tensor, layers: Sequence[Layer]) -> dict[str, Tensor]:
    """Named layers by way of a device's own convolutions, for GPUs: 1. and 3. above without 2.

    There a library's convolution is better than products of windows. But batch norm takes no pass over
    the frames here either, and bias and ReLU only one over the maxima.

    Shape:
        x: `(batch, 1, samples)`, on any device
        returns `(batch, channels, frames)` by layer name
    """
    engine, made = get_engine(model), {}
    names = {layer.name for layer in layers}
    deepest = max((layer.module for layer in layers), default=0)
    module = 0
    with torch.no_grad(), true_float32(x.device):
        for block in model.architecture.blocks:
            if module >= deepest:
                break
            filters, bias = engine.filters(block)
            padding, stride = (block.padding, 0), (block.stride, 1)
            x = F.conv2d(x[..., None], filters[..., None], None, stride, padding)[..., 0]
            if block.name in names:
                made[block.name] = (x + bias).relu_()
            if block.pool and deepest >= module + 4:
                x = F.max_pool1d(x, block.pool)
            x = (x + bias).relu_()
            if block.pooled in names:
                made[block.pooled] = x
            module += block.modules
        return made | {layer.name: model.head(layer.name, x) for layer in layers if layer.kind == "head"}


def get_engine(model: PlainSoundNet) -> Engine:
    """The model's engine, made anew where its parameters are not what they were."""
    known = _ENGINES.get(model)
    if known is None or not known[0].still_fits(model):
        known = _ENGINES[model] = (_Stamp(model), Engine(model))
    return known[1]


def drop_engine(model: PlainSoundNet) -> None:
    """Have the model's engine made anew at the next call."""
    _ENGINES.pop(model, None)


class _Stamp:
    """What tells a model's parameters from those that its engine was made of, cheaply against any call.

    That is where its tensors lie, PyTorch's counts of changes to them, batch norm's eps, and, for changes
    that PyTorch does not count (through `.data` or NumPy), the bits of some values of each tensor.
    """

    def __init__(self, model: PlainSoundNet) -> None:
        self._identity = _identity(model)
        tensors = [t.detach() for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
        flat = [t.reshape(-1) for t in tensors]
        # a tensor that is not contiguous has a copy there; its values are then looked at anew each time
        self._copied = [t for t in tensors if not t.is_contiguous()]
        self._views = [
            view[:: max(1, len(view) // _PROBED)]
            for t, view in zip(tensors, flat, strict=True)
            if t.is_contiguous()
        ]
        self._probe = self._values()

    def still_fits(self, model: PlainSoundNet) -> bool:
        return self._identity == _identity(model) and torch.equal(self._probe, self._values())

    def _values(self) -> Tensor:
        copied = [t.reshape(-1) for t in self._copied]
        values = torch.cat([*self._views, *(view[:: max(1, len(view) // _PROBED)] for view in copied)])
        return values.view(torch.uint8)  # bits, for NaN is not equal to itself


def _identity(model: PlainSoundNet) -> tuple[Any, ...]:
    tensors = tuple((t.data_ptr(), t._version) for t in (*model.parameters(), *model.buffers()))
    norms = tuple(getattr(model.get_submodule(block.norm), "eps") for block in model.architecture.blocks)  # noqa: B009
    return tensors, norms


_PROBED = 64  # values of each tensor, at least
_ENGINES: weakref.WeakKeyDictionary[PlainSoundNet, tuple[_Stamp, Engine]] = weakref.WeakKeyDictionary()


class _TrueFloat32:
    """A context in which float32 is float32, whatever PyTorch is set to.

    Convolutions on a GPU are TF32 by default, off by 1e-3; `torch.set_float32_matmul_precision` makes matrix
    products that too, or bfloat16 on some CPUs. The settings are the whole process's, so of several threads
    that are inside at once the first one changes them and the last one puts them back.
    """

    def __init__(self, *, gpu: bool) -> None:
        self._gpu, self._inside = gpu, 0
        self._changing, self._undo = Lock(), ExitStack()

    def __enter__(self) -> None:
        with self._changing:
            if not self._inside:
                self._change()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._changing:
            self._inside -= 1
            if not self._inside:
                self._undo.close()

    def _change(self) -> None:
        backends: Any = torch.backends
        settings: list[tuple[Any, str, Any]]
        if hasattr(backends.cudnn, "conv"):  # PyTorch 2.9 and later
            gpu = (backends.cudnn.conv, backends.cuda.matmul)
            holders = gpu if self._gpu else (backends.mkldnn.matmul,)
            settings = [(holder, "fp32_precision", "ieee") for holder in holders]
        else:
            settings = [(backends.cudnn, "allow_tf32", False)] if self._gpu else []
            self._undo.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        for holder, name, exact in settings:
            self._undo.callback(setattr, holder, name, getattr(holder, name))
            setattr(holder, name, exact)


_ON_CPU, _ON_GPU = _TrueFloat32(gpu=False), _TrueFloat32(gpu=True)


def true_float32(device: torch.device) -> _TrueFloat32:
    """See above."""
    return _ON_CPU if device.type == "cpu" else _ON_GPU


def _exactly(device: torch.device, work: Callable[..., _Result], *arguments: Any) -> _Result:
    """Does the work on any device; on a GPU in this thread, for its stream there is the thread's own."""
    with true_float32(device):
        return _with_own_threads(work, *arguments) if device.type == "cpu" else work(*arguments)


def _with_own_threads(work: Callable[..., _Result], *arguments: Any) -> _Result:
    """Does the work with as many threads as PyTorch may use here, but not in PyTorch's way.

    PyTorch shares every single operation out to its threads. The operations here are short, so these
    would mostly wait for each other, and where another process has one of the processors, all of them
    for that one: fifty times as long. So the work goes to a thread in which PyTorch has one thread only,
    and that shares out whole parts of a layer (`_in_threads`).
    """
    threads = torch.get_num_threads()
    if threads == 1 or hasattr(_thread_state, "threads"):
        return work(*arguments)

    def inside() -> _Result:
        torch.set_num_threads(1)  # of this thread; only MKL's number is everybody's
        _thread_state.threads = threads
        try:
            with torch.no_grad():
                return work(*arguments)
        finally:
            del _thread_state.threads
            torch.set_num_threads(threads)

    return _pool("soundnet-engine", 64).submit(inside).result()


def _in_threads(work: Callable[..., object], parts: Sequence[tuple[Any, ...]]) -> None:
    """Does all parts, each in one thread."""
    left = iter(parts)
    taking = Lock()

    def share() -> None:
        torch.set_num_threads(1)
        while True:
            with taking:
                part = next(left, None)
            if part is None:
                return
            work(*part)

    others = min(getattr(_thread_state, "threads", 1), len(parts)) - 1
    if others < 1:
        for part in parts:
            work(*part)
        return
    pool = _pool("soundnet-engine-part", _thread_state.threads)
    shares = [pool.submit(share) for _ in range(others)]
    share()
    for done in shares:
        done.result()


@cache
def _pool(name: str, count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, name)


_thread_state = local()  # `threads`, in a thread that `_with_own_threads` made
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads stay with the parent


def _evenly(rows: int, most: int) -> int:
    """Rows of a part where `rows` are parted evenly into parts of at most `most`."""
    return ceil(rows / ceil(rows / most))
