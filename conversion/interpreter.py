"""Run a Torch7 graph as it stands in the file, in float64 and NumPy.

This is the independent half of the parity check. It knows Torch7's modules (torch/nn, THNN) and nothing
of SoundNet, PyTorch, this project's network or its mapping: every kernel, stride, padding and
mode is taken from the module itself. It is slow and plain by intent.

Activations are (channels, height, width): Torch7's layout of a sound is (1, samples, 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soundnet_port.conversion.t7_objects import LuaObject, T7Error, Tensor
from soundnet_port.errors import SoundNetError

# Tensor types in which a copy leaves float32 values as they are
FLOATING = ("torch.FloatTensor", "torch.DoubleTensor", "torch.CudaTensor", "torch.CudaDoubleTensor")

Activation = NDArray[np.float64]

_CHUNK = 1 << 20  # float64 elements of unfolded input, and of weights, held at a time (8 MB)


class InterpreterError(SoundNetError):
    """A module, or one of its settings, that the interpreter does not know."""


def run(module: LuaObject, x: Activation, path: str = "") -> Iterator[tuple[str, LuaObject, Activation]]:
    """Feed `x` through `module` and yield (path, leaf module, output) for each leaf.

    Paths count from 1 as Torch7 does: "25.2" is the second child of the 25th module. The branches
    of a `ConcatTable` all get the same input; what follows one would need a table as its input
    and is not interpreted, so stop there.

    Raises:
        NotInterpreted: on reaching an unknown module; in a branch of a `ConcatTable` after the other
            branches have run.
    """
    kind = module_class(module)
    if kind == "ConcatTable":
        first_error: InterpreterError | None = None
        for number, child in enumerate(child_modules(module), 1):
            try:
                yield from run(child, x, f"{path}.{number}".lstrip("."))
            except InterpreterError as error:
                first_error = first_error or error
        if first_error is not None:
            raise first_error
    elif kind in ("Sequential", "DataParallelTable", "GPU"):
        children = child_modules(module)
        if kind == "DataParallelTable":
            children = children[:1]  # the others are its copies on other GPUs
        for number, child in enumerate(children, 1):
            out = x
            for step in run(child, x, f"{path}.{number}".lstrip(".")):
                yield step
                out = step[2]
            x = out
    else:
        yield path, module, apply(module, x)


def apply(module: LuaObject, x: Activation) -> Activation:
    """Compute the output of one leaf module in evaluation mode.

    Raises:
        InterpreterError: the interpreter does not know the module, or its parameters do not fit.
    """
    kind = module_class(module)
    if kind not in _LEAVES:
        raise InterpreterError(f"{module.class_name} is not one of {', '.join(sorted(_LEAVES))}")
    try:
        return _LEAVES[kind](module, x)
    except T7Error:
        raise
    except ValueError as error:  # NumPy on parameters of a wrong shape
        raise InterpreterError(f"{module.class_name}: {error}") from None


def module_class(module: LuaObject) -> str:
    """Return the class without its package: nn., cudnn. or cunn."""
    package, _, kind = module.class_name.partition(".")
    return kind if package in ("nn", "cudnn", "cunn") else module.class_name


def child_modules(module: LuaObject) -> list[LuaObject]:
    """Return the modules of a container, in order.

    Raises:
        InterpreterError: it has no list of them.
    """
    children = module.children()
    if children is None:
        raise InterpreterError(f"{module.class_name} without a list of modules")
    return children


def tensor(module: LuaObject, name: str) -> NDArray[Any]:
    """Load a parameter in the file's own type.

    Raises:
        InterpreterError: the module has no such tensor.
    """
    value = module.fields.get(name)
    if not isinstance(value, Tensor):
        raise InterpreterError(f"{module.class_name} without the tensor {name}")
    return value.array()


def values(module: LuaObject, name: str) -> Activation:
    """Load a vector of parameters in float64."""
    return tensor(module, name).astype(np.float64)


def number(module: LuaObject, *names: str, default: float | None = None) -> Any:
    """Return the first of these fields that the module has; old versions of a class lack some.

    Raises:
        InterpreterError: it has none, and there is no default, or the field is not a number.
    """
    for name in names:
        if name in module.fields:
            value = module.fields[name]
            if not isinstance(value, (int, float)):
                raise InterpreterError(f"{module.class_name}: {name} is not a number")
            return value
    if default is None:
        raise InterpreterError(f"{module.class_name} without {names[0]}")
    return default


def _convolution(module: LuaObject, x: Activation) -> Activation:
    kernel_h, kernel_w = number(module, "kH"), number(module, "kW")
    step_h, step_w = number(module, "dH"), number(module, "dW")
    pad_h, pad_w = (number(module, "padding", name, default=0) for name in ("padH", "padW"))
    if number(module, "groups", default=1) != 1:
        raise InterpreterError(f"{module.class_name} in groups")
    planes = number(module, "nInputPlane")
    fan = planes * kernel_h * kernel_w
    weight = tensor(module, "weight").reshape(-1, fan)
    if len(x) != planes:
        raise InterpreterError(f"{module.class_name} of {planes} planes on {len(x)} channels")
    height = _c_quotient(x.shape[1] + 2 * pad_h - kernel_h, step_h) + 1
    width = _c_quotient(x.shape[2] + 2 * pad_w - kernel_w, step_w) + 1
    # Division towards zero lets a kernel hang over the end. Unfolding with padding checks bounds,
    # so the overhang is zeros; without padding it reads what lies behind the buffer.
    over_h = max(0, kernel_h - x.shape[1] - 2 * pad_h)
    over_w = max(0, kernel_w - x.shape[2] - 2 * pad_w)
    if min(height, width) < 1 or ((over_h or over_w) and not (pad_h or pad_w)):
        raise InterpreterError(f"{module.class_name}: its kernel does not fit on {x.shape}")
    x = np.pad(x, ((0, 0), (pad_h, pad_h + over_h), (pad_w, pad_w + over_w)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (kernel_h, kernel_w), axis=(1, 2))
    windows = windows[:, : height * step_h : step_h, : width * step_w : step_w]
    out = np.empty((len(weight), height, width))
    rows, filters = max(1, _CHUNK // (fan * width)), max(1, _CHUNK // fan)
    for top in range(0, height, rows):
        part = windows[:, top : top + rows]
        unfolded = part.transpose(0, 3, 4, 1, 2).reshape(fan, -1)
        for first in range(0, len(weight), filters):
            kernels = weight[first : first + filters].astype(np.float64)
            product = (kernels @ unfolded).reshape(len(kernels), -1, width)
            out[first : first + filters, top : top + rows] = product
    if module.fields.get("bias") is not None:
        out += values(module, "bias")[:, None, None]
    return out


def _batch_norm(module: LuaObject, x: Activation) -> Activation:
    eps = number(module, "eps", default=1e-5)
    if module.fields.get("running_std") is not None and (
        module.version < 2 or module.fields.get("running_var") is None
    ):
        # Despite its name the running average of 1 / sqrt(var + eps), see BatchNormalization.lua.
        scale = values(module, "running_std")
    else:
        scale = 1 / np.sqrt(values(module, "running_var") + eps)
    out = x - values(module, "running_mean")[:, None, None]
    out *= scale[:, None, None]
    if module.fields.get("weight") is not None:
        out *= values(module, "weight")[:, None, None]
    if module.fields.get("bias") is not None:
        out += values(module, "bias")[:, None, None]
    return out


def _relu(module: LuaObject, x: Activation) -> Activation:
    threshold, value = number(module, "threshold", default=0), number(module, "val", default=0)
    out = np.full_like(x, float(value))
    np.copyto(out, x, where=x > threshold)
    return out


def _max_pooling(module: LuaObject, x: Activation) -> Activation:
    out = x
    round_ = ceil if module.fields.get("ceil_mode") else int
    for axis, k, d, p in ((1, "kH", "dH", "padH"), (2, "kW", "dW", "padW")):
        kernel, step, pad = number(module, k), number(module, d), number(module, p, default=0)
        length = out.shape[axis]
        count = round_((length + 2 * pad - kernel) / step) + 1
        if pad and (count - 1) * step >= length + pad:
            count -= 1  # the last window must start inside
        if count < 1 or length + 2 * pad < kernel:
            raise InterpreterError(f"{module.class_name}: its window does not fit on {x.shape}")
        margins = [(0, 0)] * 3
        margins[axis] = (pad, max(0, (count - 1) * step + kernel - length - pad))
        padded = np.pad(out, margins, constant_values=-np.inf)
        windows = np.lib.stride_tricks.sliding_window_view(padded, kernel, axis=axis)
        index = [slice(None)] * 4
        index[axis] = slice(0, (count - 1) * step + 1, step)
        out = windows[tuple(index)].max(axis=-1)
    return out


def _dropout(module: LuaObject, x: Activation) -> Activation:
    # Since 2015 nn.Dropout scales in training (v2); before, and SpatialDropout always, in evaluation.
    if module_class(module) == "Dropout" and module.fields.get("v2"):
        return x
    return np.asarray(x * (1 - number(module, "p", default=0.5)))


def _identity(module: LuaObject, x: Activation) -> Activation:
    return x


def _copy(module: LuaObject, x: Activation) -> Activation:
    for name in ("intype", "outtype"):
        if module.fields.get(name) not in FLOATING:
            raise InterpreterError(f"{module.class_name} from or to other types than floats")
    return x


def _c_quotient(a: int, b: int) -> int:
    return a // b if a >= 0 else -(-a // b)


_LEAVES = {
    "SpatialConvolution": _convolution,
    "SpatialConvolutionMM": _convolution,
    "SpatialBatchNormalization": _batch_norm,
    "ReLU": _relu,
    "SpatialMaxPooling": _max_pooling,
    "Dropout": _dropout,
    "SpatialDropout": _dropout,
    "Identity": _identity,
    "Contiguous": _identity,
    "Copy": _copy,
}
