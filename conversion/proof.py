"""The proof: the file's own graph against the network loaded from the written weights.

The interpreter runs the graph as it stands in the file, in float64. Against it stand the network as
it is, in float32, on a test sound, every module compared; and each module with parameters alone, on
noise and in float64. The second is there because a unit that is silent on the test sound hides the
weights behind it, and because without float32's rounding hardly anything can be off unseen.
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
from soundnet_port.conversion.mapping import Found
from soundnet_port.conversion.t7 import LuaObject
from soundnet_port.errors import SoundNetError
from soundnet_port.network.model import SoundNet

# Relative to the largest absolute value of a layer. Float32 networks agree with float64 to about
# 2e-6 over all layers and lengths; a wrong weight, mode or statistic shows at 1e-3 and above.
TOLERANCE = 1e-5
# The same in float64, where nothing is left but the order of additions, and the rounding of a variance
# to float32 where the file holds 1 / sqrt(var + eps) (3e-8)
EXACT = 1e-7
# Bytes of float64 that a layer may take on the test sound: a file of some KB must not ask for GB.
# MIT's conv1 takes 18 MB for its 16 channels.
MAX_ACTIVATION = 256 << 20
_SLICE = 1 << 20  # weights made float64 at a time
# Length of the test sound: two head frames, and at every pooling frames left over, for only then
# rounding up instead of down shows.
SAMPLES = {"soundnet8": 276_992, "soundnet5": 155_648}
_LABELS = {"conv": "{} (bare)"}  # the bare convolution; "conv1" itself is what follows its ReLU


class ParityFailed(SoundNetError):
    """The network does not compute what the file's own graph computes.

    Attributes:
        rows: the comparison as far as it went; where it shows, some rows have not passed.
    """

    def __init__(self, message: str, rows: Sequence[Row] = ()) -> None:
        super().__init__(message)
        self.rows = list(rows)


@dataclass(frozen=True)
class Row:
    """One module: how far the network is from the file's graph.

    Attributes:
        module: its path in the file, which is Torch7's number: "24", "25.1".
        layer: its name.
        shape: (channels, frames).
        largest: largest absolute value in the file's graph.
        error: largest absolute difference of the float32 network.
        relative: error / largest.
        alone: the same for the module alone, in float64 on noise; None without parameters.
        exact: the same for the whole network in float64; only where float32's own rounding is
            above the tolerance, which says nothing against the network, else None.
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
        """Within the tolerances."""
        close = self.relative <= TOLERANCE or (self.exact is not None and self.exact <= EXACT)
        return close and not self.wrong

    @property
    def wrong(self) -> bool:
        """Off by itself, which neither rounding nor a module before it explains."""
        return self.alone is not None and not self.alone <= EXACT


def check_parity(found: Found, model: SoundNet) -> list[Row]:
    """Compares every module. `found.network`'s file must still be open.

    Raises:
        ProofFailed: a module is further off than allowed, or gives another shape.
    """
    signal = proof_signal(SAMPLES[model.architecture.name])
    for layer in model.architecture.modules:
        taken = 8 * layer.channels * model.architecture.frames(layer.module, len(signal))
        if taken > MAX_ACTIVATION:
            raise ParityFailed(
                f"{layer.name} with its {layer.channels:,} channels takes {taken:,} bytes to be proven, "
                f"at most {MAX_ACTIVATION:,} are allowed"
            )
    rows: list[Row] = []
    try:
        for row in _compare(found, model, signal):
            rows.append(row)
            if row.wrong:
                break
        if not rows[-1].wrong and any(not row.relative <= TOLERANCE for row in rows):
            wide = _compare(found, copy.deepcopy(model).double(), signal)
            rows = [replace(row, exact=each.relative) for row, each in zip(rows, wide, strict=True)]
    except interpreter.NotInterpreted as error:
        raise ParityFailed(f"the file's own graph does not run: {error}") from None
    failed = [row for row in rows if not row.passed]
    if failed:
        worst = rows[-1] if rows[-1].wrong else failed[0]
        raise ParityFailed(
            f"the proof failed at {worst.layer} (module {worst.module}): the network is off by "
            f"{worst.relative:.1e} of the layer's maximum ({TOLERANCE:.0e} is allowed)"
            + (f", alone in float64 by {worst.alone:.1e} ({EXACT:.0e})" if worst.alone is not None else ""),
            rows,
        )
    return rows


def proof_signal(samples: int) -> NDArray[np.float32]:
    """A fixed sound within +-256: a sweep over all frequencies, and noise that comes and goes."""
    n = np.arange(samples, dtype=np.float64)
    sweep = 90 * np.sin(2 * np.pi * (20 + 5000 * n / samples) * n / 22_050)
    swell = np.abs(n / 11_025 % 2 - 1)
    sound = sweep + 160 * swell * noise(samples, 1)
    # multiples of 1/128, which are what 16-bit samples become; so no rounding enters here
    result: NDArray[np.float32] = (np.round(sound * 128) / 128).astype(np.float32)
    return result


def noise(count: int, seed: int) -> NDArray[np.float64]:
    """Evenly spread over [-1, 1): a multiplicative hash of the index, the same everywhere."""
    x = np.arange(count, dtype=np.uint32) + np.uint32(seed * 0x9E3779B1 % 2**32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return np.asarray((x >> np.uint32(8)) / 2**23 - 1.0, np.float64)


def _compare(found: Found, model: SoundNet, signal: NDArray[np.float32]) -> Iterator[Row]:
    at = {path: model.architecture.layer(key) for key, path in found.modules.items()}
    with _one_thread(), torch.inference_mode():
        # both side by side, so that no more than an activation of each is held
        trunk = model.trunk(torch.from_numpy(signal)[None, None].to(next(model.parameters()).dtype))
        deepest = torch.empty(0)
        for path, module, theirs in interpreter.run(found.network, signal.astype(np.float64)[None, :, None]):
            if path not in at:  # a module that does nothing
                continue
            layer = at.pop(path)
            if layer.kind == "head":
                ours = model.head(layer.name, deepest)
            else:
                ours = deepest = next(trunk)[1]
            error, largest = _difference(theirs, ours)
            yield Row(
                module=path,
                layer=_LABELS.get(layer.kind, "{}").format(layer.parameters or layer.name),
                shape=theirs.shape[:2],
                largest=largest,
                error=error,
                relative=_relative(error, largest),
                alone=_alone(module, model.get_submodule(layer.parameters)) if layer.parameters else None,
            )
            if not at:  # what follows the heads is not run
                return
    raise ParityFailed(f"the file's own graph never reaches the modules {', '.join(at)}")


def _alone(theirs: LuaObject, ours: nn.Module) -> float:
    """Relative error of one module with parameters, in float64 on noise."""
    if isinstance(ours, nn.Conv1d):
        channels, length = ours.in_channels, ours.kernel_size[0] + 15 * ours.stride[0]
        signal = noise(channels * length, channels).reshape(channels, length)
    else:
        # as wide as the channel's own scale, so that mean, variance, gain and bias all matter
        mean = interpreter.values(theirs, "running_mean")[:, None]
        unit = interpreter.apply(theirs, np.stack([mean, mean + 1], axis=1))
        with np.errstate(divide="ignore"):
            scale = 1 / np.abs(unit[:, 1] - unit[:, 0])
        scale[~np.isfinite(scale)] = 1.0
        signal = mean + 2 * scale * noise(len(mean) * 32, 7).reshape(len(mean), 32)
    expected = interpreter.apply(theirs, signal[:, :, None])
    return _relative(*_difference(expected, _in_float64(ours, torch.from_numpy(signal)[None])))


def _in_float64(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the module computes, but for its precision; a slice of its filters at a time."""
    if isinstance(module, nn.Conv1d):
        filters = max(1, _SLICE // module.weight[0].numel())
        assert module.bias is not None
        made = [
            F.conv1d(x, weight.double(), bias.double(), module.stride, int(module.padding[0]))
            for weight, bias in zip(
                torch.split(module.weight, filters), torch.split(module.bias, filters), strict=True
            )
        ]
        return torch.cat(made, dim=1)
    assert isinstance(module, nn.BatchNorm1d)
    mean, var, weight, bias = (
        t.double()
        for t in (module.running_mean, module.running_var, module.weight, module.bias)
        if t is not None
    )
    return F.batch_norm(x, mean, var, weight, bias, eps=module.eps)


def _difference(theirs: NDArray[np.float64], ours: torch.Tensor) -> tuple[float, float]:
    """(largest difference, largest value); infinite for another shape, NaN for any NaN."""
    if theirs.shape != (*ours.shape[1:], 1):
        return float("inf"), float(np.abs(theirs).max())
    per_channel = [  # channel by channel: whole copies would double the memory
        (np.abs(each[:, 0] - mine).max(), np.abs(each).max())
        for each, mine in zip(theirs, ours[0].numpy(), strict=True)
    ]
    error, largest = np.max(per_channel, axis=0)
    return float(error), float(largest)


def _relative(error: float, largest: float) -> float:
    """Error against scale; NaN stays NaN, so that it fails every `<=`."""
    if largest > 0:
        return error / largest
    return error if error != error else (0.0 if error == 0 else float("inf"))


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread, so that the figures of a conversion are the same each time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
