"""The parity check: a file's own graph compared with the network loaded from the written weights.

The interpreter runs the graph as it stands in the file, in float64. Compared with it are every module of the
float32 network, on a test signal, and each module with parameters alone, in float64 on noise. The latter
covers weights behind units that are silent on the test signal, and without float32's rounding it is sharp.

`released_parity.py` compares the released network with recordings of real Torch7.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from soundnet_port.conversion import interpreter
from soundnet_port.conversion.mapping import GraphMapping
from soundnet_port.conversion.t7_objects import LuaObject
from soundnet_port.errors import SoundNetError
from soundnet_port.network.model import SoundNet

# Relative to the largest absolute value of a layer. Float32 networks agree with float64 to about
# 2e-6 over all layers and lengths; a wrong weight, mode or statistic shows at 1e-3 and above.
TOLERANCE = 1e-5
# The same in float64: what remains is the order of additions, and a variance rounded to float32 if the file
# holds 1 / sqrt(var + eps) (3e-8)
EXACT = 1e-7
# Bytes of float64 that a layer may take on the test signal: a file of some KB must not ask for GB.
# MIT's conv1 takes 18 MB for its 16 channels.
MAX_ACTIVATION = 256 << 20
_SLICE = 1 << 20  # weights converted to float64 at a time
# Length of the test signal: two head frames, and frames left over at every pooling, so that rounding up
# instead of down shows.
SAMPLES = {"soundnet8": 276_992, "soundnet5": 155_648}
_LABELS = {"conv": "{} (bare)"}  # the bare convolution; "conv1" itself is what follows its ReLU


class ParityError(SoundNetError):
    """The network does not compute what the file's own graph computes.

    Attributes:
        rows: the comparison up to the failure.
    """

    def __init__(self, message: str, rows: Sequence[ModuleParity] = ()) -> None:
        super().__init__(message)
        self.rows = list(rows)


@dataclass(frozen=True)
class ModuleParity:
    """One module of the network compared with the file's graph.

    Attributes:
        module: its path in the file, which is Torch7's number: "24", "25.1".
        layer: its name.
        shape: (channels, frames).
        largest: largest absolute value in the file's graph.
        error: largest absolute difference of the float32 network.
        relative: error / largest.
        alone: the same for the module alone, in float64 on noise; None without parameters.
        exact: the relative error of the network in float64; computed only if an error of the float32 network
            is above the tolerance, which may be its rounding, else None.
    """

    module: str
    layer: str
    shape: tuple[int, ...]
    largest: float
    error: float
    relative: float
    alone: float | None
    exact: float | None = None

    @property
    def passed(self) -> bool:
        """Whether it is within the tolerances."""
        close = self.relative <= TOLERANCE or (self.exact is not None and self.exact <= EXACT)
        return close and not self.wrong

    @property
    def wrong(self) -> bool:
        """Whether the module alone differs, so that neither rounding nor an earlier module is the cause."""
        return self.alone is not None and not self.alone <= EXACT


def check_parity(mapping: GraphMapping, model: SoundNet) -> list[ModuleParity]:
    """Compare every module. The file of `mapping.network` must still be open.

    Raises:
        ParityError: a module differs by more than the tolerance, or has another shape.
    """
    signal = parity_signal(SAMPLES[model.architecture.name])
    for layer in model.architecture.modules:
        size = 8 * layer.channels * model.architecture.frames(layer.module, len(signal))
        if size > MAX_ACTIVATION:
            raise ParityError(
                f"{layer.name} with its {layer.channels:,} channels takes {size:,} bytes to compare, "
                f"at most {MAX_ACTIVATION:,} are allowed"
            )
    rows: list[ModuleParity] = []
    try:
        for row in _compare(mapping, model, signal):
            rows.append(row)
            if row.wrong:
                break
        if not rows[-1].wrong and any(not row.relative <= TOLERANCE for row in rows):
            wide = _compare(mapping, copy.deepcopy(model).double(), signal)
            rows = [replace(row, exact=wide_row.relative) for row, wide_row in zip(rows, wide, strict=True)]
    except interpreter.InterpreterError as error:
        raise ParityError(f"the file's own graph does not run: {error}") from None
    failed = [row for row in rows if not row.passed]
    if failed:
        worst = rows[-1] if rows[-1].wrong else failed[0]
        raise ParityError(
            f"the parity check failed at {worst.layer} (module {worst.module}): the network differs by "
            f"{worst.relative:.1e} of the layer's maximum ({TOLERANCE:.0e} is allowed)"
            + (f", alone in float64 by {worst.alone:.1e} ({EXACT:.0e})" if worst.alone is not None else ""),
            rows,
        )
    return rows


def parity_signal(samples: int) -> NDArray[np.float32]:
    """Return the test signal, within +-256: a sweep over all frequencies, and noise with a varying level."""
    n = np.arange(samples, dtype=np.float64)
    sweep = 90 * np.sin(2 * np.pi * (20 + 5000 * n / samples) * n / 22_050)
    swell = np.abs(n / 11_025 % 2 - 1)
    sound = sweep + 160 * swell * noise(samples, 1)
    # multiples of 1/128, as 16-bit samples are, so that float32 holds them exactly
    result: NDArray[np.float32] = (np.round(sound * 128) / 128).astype(np.float32)
    return result


def noise(count: int, seed: int) -> NDArray[np.float64]:
    """Return uniform noise over [-1, 1): a multiplicative hash of the index, the same on all machines."""
    x = np.arange(count, dtype=np.uint32) + np.uint32(seed * 0x9E3779B1 % 2**32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return np.asarray((x >> np.uint32(8)) / 2**23 - 1.0, np.float64)


def _compare(mapping: GraphMapping, model: SoundNet, signal: NDArray[np.float32]) -> Iterator[ModuleParity]:
    layers = {path: model.architecture.layer(key) for key, path in mapping.modules.items()}
    with _one_thread(), torch.inference_mode():
        # both step by step, so that one activation of each is in memory
        trunk = model.trunk(torch.from_numpy(signal)[None, None].to(next(model.parameters()).dtype))
        deepest = torch.empty(0)
        for path, module, theirs in interpreter.run(
            mapping.network, signal.astype(np.float64)[None, :, None]
        ):
            if path not in layers:  # a module that does nothing
                continue
            layer = layers.pop(path)
            if layer.kind == "head":
                ours = model.head(layer.name, deepest)
            else:
                ours = deepest = next(trunk)[1]
            error, largest = _difference(theirs, ours)
            yield ModuleParity(
                module=path,
                layer=_LABELS.get(layer.kind, "{}").format(layer.parameters or layer.name),
                shape=theirs.shape[:2],
                largest=largest,
                error=error,
                relative=_relative(error, largest),
                alone=_alone(module, model.get_submodule(layer.parameters)) if layer.parameters else None,
            )
            if not layers:  # what follows the heads is not run
                return
    raise ParityError(f"the file's own graph never reaches the modules {', '.join(layers)}")


def _alone(theirs: LuaObject, ours: nn.Module) -> float:
    """Compute the relative error of one module with parameters, in float64 on noise."""
    if isinstance(ours, nn.Conv1d):
        channels, length = ours.in_channels, ours.kernel_size[0] + 15 * ours.stride[0]
        signal = noise(channels * length, channels).reshape(channels, length)
    else:
        # on each channel's own scale, so that mean, variance, gain and bias all matter
        mean = interpreter.values(theirs, "running_mean")[:, None]
        unit = interpreter.apply(theirs, np.stack([mean, mean + 1], axis=1))
        with np.errstate(divide="ignore"):
            scale = 1 / np.abs(unit[:, 1] - unit[:, 0])
        scale[~np.isfinite(scale)] = 1.0
        signal = mean + 2 * scale * noise(len(mean) * 32, 7).reshape(len(mean), 32)
    expected = interpreter.apply(theirs, signal[:, :, None])
    return _relative(*_difference(expected, _in_float64(ours, torch.from_numpy(signal)[None])))


def _in_float64(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Compute a module's output in float64, a slice of its filters at a time."""
    if isinstance(module, nn.Conv1d):
        filters = max(1, _SLICE // module.weight[0].numel())
        assert module.bias is not None
        slices = [
            F.conv1d(x, weight.double(), bias.double(), module.stride, int(module.padding[0]))
            for weight, bias in zip(
                torch.split(module.weight, filters), torch.split(module.bias, filters), strict=True
            )
        ]
        return torch.cat(slices, dim=1)
    assert isinstance(module, nn.BatchNorm1d)
    mean, var, weight, bias = (
        t.double()
        for t in (module.running_mean, module.running_var, module.weight, module.bias)
        if t is not None
    )
    return F.batch_norm(x, mean, var, weight, bias, eps=module.eps)


def _difference(theirs: NDArray[np.float64], ours: torch.Tensor) -> tuple[float, float]:
    """Return (largest difference, largest value): infinite for another shape, NaN for any NaN."""
    if theirs.shape != (*ours.shape[1:], 1):
        return float("inf"), float(np.abs(theirs).max())
    per_channel = [  # copies of all channels would double the memory
        (np.abs(expected[:, 0] - actual).max(), np.abs(expected).max())
        for expected, actual in zip(theirs, ours[0].numpy(), strict=True)
    ]
    error, largest = np.max(per_channel, axis=0)
    return float(error), float(largest)


def _relative(error: float, largest: float) -> float:
    """Divide an error by its scale; NaN stays NaN, which fails every `<=`."""
    if largest > 0:
        return error / largest
    return error if error != error else (0.0 if error == 0 else float("inf"))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread, for the same figures at every conversion."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
