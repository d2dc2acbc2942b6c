"""The fast path: named layers in constant memory, with the same numbers as the modules.

plain.py is the reference that one reads; this is what runs, by the operations of operations.py.

Sounds are computed in blocks. Between blocks each layer keeps the last rows of its input that later
frames will see, so blocks of any size give the frames that one piece would give, and a sound of any
length takes the memory of a block. Several sounds are computed side by side, each with rows of its
own: none is padded to the length of another, which would be wrong from the second layer on, where
padding has become the bias of the layers before. From the layer on where a single sound has too few
frames for an efficient product, all sounds' windows are collected for one.

benchmarks/README.md has the measurements, and what was tried and given up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from soundnet_port.network.architecture import Architecture, Block, Head, Layer
from soundnet_port.network.kernel_operations import ProductOp, build_operation
from soundnet_port.network.kernels.library import Kernels, find_kernels
from soundnet_port.network.operations import MaxPoolOp, Operation
from soundnet_port.network.plain import PlainSoundNet
from soundnet_port.network.precision import true_float32
from soundnet_port.network.threads import run_with_parts

_Result = TypeVar("_Result")

BLOCK = 1 << 21  # samples at a time (95 s): enough frames for the deep layers, some 50 MB in all


class Engine:
    """A network's folded weights, and the operations that compute any of its named layers.

    Weights are folded when a layer is first asked for, and kept: as many bytes again as the model's
    layers up to there have.
    """

    def __init__(self, model: PlainSoundNet) -> None:
        self.architecture: Architecture = model.architecture
        self._state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        self._folded: dict[str, tuple[Tensor, Tensor]] = {}
        self._operations: dict[tuple[tuple[str, ...], int], Operation] = {}
        self._eps = {
            block.norm: float(getattr(model.get_submodule(block.norm), "eps"))  # noqa: B009
            for block in self.architecture.blocks
        }
        self.like = next(iter(self._state.values()))  # device and type of all tensors here
        self.kernels = choose_kernels(self.like)

    def plan(self, layers: Sequence[Layer]) -> list[Operation]:
        """Return the operations that compute these layers, in order."""
        names = {layer.name for layer in layers}
        deepest = max((layer.module for layer in layers), default=0)
        operations: list[Operation] = []
        module = 0
        for block in self.architecture.blocks:
            if module >= deepest:
                break
            fused = block.pool > 0 and block.name not in names and deepest >= module + 4
            if fused:
                operations.append(self._operation({block.pool_layer: slice(None)}, [block], block.pool))
            else:
                operations.append(self._operation({block.name: slice(None)}, [block], 1))
                if block.pool and deepest >= module + 4:
                    operations.append(MaxPoolOp(block, block.channels))
            module += block.modules
        heads = [head for head in self.architecture.heads if head.name in names]
        if heads:  # in one product, since they see the same
            channels, start = {}, 0
            for head in heads:
                channels[head.name] = slice(start, start + head.categories)
                start += head.categories
            operations.append(self._operation(channels, heads, 1))
        return operations

    def _operation(self, names: dict[str, slice], rows: Sequence[Block | Head], pool: int) -> Operation:
        key = (tuple(names), pool)
        if key not in self._operations:
            weight, bias = self._fold_side_by_side(*rows)
            self._operations[key] = build_operation(self.kernels, names, rows[0], weight, bias, pool)
            if isinstance(self._operations[key], ProductOp):  # it has a copy in another layout
                self._folded.clear()
        return self._operations[key]

    def filters(self, block: Block) -> tuple[Tensor, Tensor]:
        """Return weight (channels, channels in, kernel) and bias (channels, 1), batch norm folded in."""
        columns, bias = self._fold_side_by_side(block)
        return columns.view(block.kernel, -1, len(bias)).permute(2, 1, 0), bias[:, None]

    def _fold_side_by_side(self, *rows: Block | Head) -> tuple[Tensor, Tensor]:
        """Return weight (kernel * channels in, channels) and bias, batch norm folded in; heads together."""
        key = " ".join(row.name for row in rows)
        folded = self._folded.get(key)
        if folded is None:  # another thread may clear them at any time
            parts = [self._fold(row) for row in rows]
            folded = self._folded[key] = (
                torch.cat([weight for weight, _ in parts], 1),
                torch.cat([bias for _, bias in parts]),
            )
        return folded

    def _fold(self, row: Block | Head) -> tuple[Tensor, Tensor]:
        # on the CPU, since Apple's GPUs have no float64
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


def choose_kernels(parameter: Tensor) -> Kernels | None:
    """Return the compiled kernels for a network with such parameters, if there are any."""
    on_cpu = parameter.device.type == "cpu" and parameter.dtype == torch.float32
    return find_kernels() if on_cpu else None


def kernel_name(parameter: Tensor) -> str:
    """Return the name of the kernels for a network with such parameters; "engine" for none."""
    kernels = choose_kernels(parameter)
    return kernels.name if kernels else "engine"


def describe_path(parameter: Tensor) -> str:
    """Say in a few words what computes a network with such parameters."""
    if parameter.device.type != "cpu":
        return f"convolutions on {parameter.device.type}"
    name = kernel_name(parameter)
    return "matrix products" if name == "engine" else f"{name} kernels"


class StreamState:
    """The state of sounds on their way through the layers, side by side, a piece at a time.

    Args:
        engine: of the network.
        layers: named layers of its architecture.
        sounds: number of sounds.
    """

    def __init__(self, engine: Engine, layers: Sequence[Layer], sounds: int = 1) -> None:
        self._device, self._operations = engine.like.device, engine.plan(layers)
        self._names = {layer.name for layer in layers}
        # for each operation and sound the rows that later frames will see; at first, the padding
        self._pending: list[list[Tensor]] = []
        channels = 1
        for operation in self._operations:
            self._pending.append([engine.like.new_zeros(operation.padding, channels)] * sounds)
            channels = operation.channels
        self._computed = [[0] * sounds for _ in self._operations]  # rows

    def push(self, pieces: Sequence[Tensor], *, last: bool = False) -> dict[str, list[Tensor]]:
        """Take the next samples of each sound and return the frames that are now determined.

        Shape:
            pieces: `(samples,)` each, of any lengths
            returns for each layer a list with each sound's new frames, `(frames, channels)`; with `last`
            all that remain
        """
        return _run_exactly(self._device, self._push, pieces, last)

    def _push(self, pieces: Sequence[Tensor], last: bool) -> dict[str, list[Tensor]]:
        new: dict[str, list[Tensor]] = {}
        if not self._operations:
            return new
        inputs, bodies = self._allocate_inputs(0, [len(piece) for piece in pieces], 1, last)
        for body, piece in zip(bodies, pieces, strict=True):
            body[:, 0].copy_(piece)
        for number, operation in enumerate(self._operations):
            counts = [max(0, (x.shape[0] - operation.window) // operation.advance + 1) for x in inputs]
            if number + 1 < len(self._operations):
                following, results = self._allocate_inputs(number + 1, counts, operation.channels, last)
            else:
                following = results = [
                    x.new_empty(count, operation.channels) for x, count in zip(inputs, counts, strict=True)
                ]
            busy = [i for i, count in enumerate(counts) if count]
            operation.run([inputs[i] for i in busy], [results[i] for i in busy])
            for i, (x, count) in enumerate(zip(inputs, counts, strict=True)):
                self._computed[number][i] += count
                self._pending[number][i] = x[:0] if last else x[count * operation.advance :].clone()
            for name in self._names & operation.names.keys():
                new[name] = [y[:, operation.names[name]] for y in results]
            inputs = following
        return new

    def _allocate_inputs(
        self, number: int, counts: Sequence[int], channels: int, last: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return an operation's inputs, with pending rows before and padding after, and the rows to fill."""
        operation = self._operations[number]
        inputs, bodies = [], []
        for pending, count, computed in zip(
            self._pending[number], counts, self._computed[number], strict=True
        ):
            padding = operation.padding if last else 0
            before = pending.shape[0]
            missing = operation.window - (before + count + padding)
            if last and not computed and operation.may_overhang and 0 < missing < operation.advance:
                padding += missing
            x = pending.new_empty(before + count + padding, channels)
            x[:before] = pending
            if padding:
                x[before + count :] = 0
            inputs.append(x)
            bodies.append(x[before : before + count])
        return inputs, bodies


def extract(engine: Engine, waveforms: Sequence[Tensor], layers: Sequence[Layer]) -> list[dict[str, Tensor]]:
    """Compute named layers of sounds of any lengths, each as if it were alone.

    Shape:
        waveforms: `(samples,)` each, long enough for the layers
        returns for each sound its layers, `(channels, frames)`
    """
    return _run_exactly(engine.like.device, _extract, engine, waveforms, layers)


def _extract(engine: Engine, waveforms: Sequence[Tensor], layers: Sequence[Layer]) -> list[dict[str, Tensor]]:
    results: list[dict[str, Tensor]] = []
    group: list[Tensor] = []
    for number, waveform in enumerate(waveforms):
        group.append(waveform)
        following = len(waveforms[number + 1]) if number + 1 < len(waveforms) else BLOCK
        if sum(map(len, group)) + following <= BLOCK:
            continue
        state = StreamState(engine, layers, len(group))
        parts: dict[str, list[list[Tensor]]] = {layer.name: [[] for _ in group] for layer in layers}
        # several fit into a block together; one that is longer goes by blocks
        starts = range(0, max(len(sound) for sound in group), BLOCK)
        for start in starts:
            pieces = [sound[start : start + BLOCK] for sound in group]
            for name, frames in state.push(pieces, last=start == starts[-1]).items():
                for sound_parts, new in zip(parts[name], frames, strict=True):
                    sound_parts.append(new)
        results += [
            {name: _join(frames[i]).T.contiguous() for name, frames in parts.items()}
            for i in range(len(group))
        ]
        group = []
    return results


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def extract_by_convolution(
    engine: Engine, model: PlainSoundNet, x: Tensor, layers: Sequence[Layer]
) -> dict[str, Tensor]:
    """Compute named layers by a device's own convolutions, for GPUs: operations.py's 1. and 3. without 2.

    There a library's convolution beats products of windows. But batch norm needs no pass over the frames
    here either, and bias and ReLU only one over the maxima.

    Shape:
        x: `(batch, 1, samples)`, on any device
        returns `(batch, channels, frames)` by layer name
    """
    outputs: dict[str, Tensor] = {}
    names = {layer.name for layer in layers}
    deepest = max((layer.module for layer in layers), default=0)
    module = 0
    with torch.no_grad(), true_float32(x.device):
        for block in engine.architecture.blocks:
            if module >= deepest:
                break
            filters, bias = engine.filters(block)
            padding, stride = (block.padding, 0), (block.stride, 1)
            x = F.conv2d(x[..., None], filters[..., None], None, stride, padding)[..., 0]
            if block.name in names:
                outputs[block.name] = (x + bias).relu_()
            if block.pool and deepest >= module + 4:
                x = F.max_pool1d(x, block.pool)
            x = (x + bias).relu_()
            if block.pool_layer in names:
                outputs[block.pool_layer] = x
            module += block.modules
        return outputs | {layer.name: model.head(layer.name, x) for layer in layers if layer.kind == "head"}


def _run_exactly(device: torch.device, work: Callable[..., _Result], *arguments: Any) -> _Result:
    """Run the work in true float32; on a GPU in this thread, which owns its stream there."""
    with true_float32(device):
        return run_with_parts(work, *arguments) if device.type == "cpu" else work(*arguments)
