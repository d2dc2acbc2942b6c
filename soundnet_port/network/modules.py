"""The modules of the plain network where PyTorch's own are slower, or differ from Torch7's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Convolution(nn.Conv1d):
    """A 1D convolution by way of PyTorch's 2D kernels, as SoundNet was in Torch7.

    On a CPU they take two thirds of the time, and the 1D ones fall off a cliff at 2**23 samples
    (6.3 minutes: 27 s in place of 1 s).
    """

    def forward(self, x: Tensor) -> Tensor:
        stride, padding = (self.stride[0], 1), (int(self.padding[0]), 0)
        return F.conv2d(x[..., None], self.weight[..., None], self.bias, stride, padding)[..., 0]


def runs_eagerly() -> bool:
    """Whether no compiler, tracer or transform of torch.func (such as vmap or grad) sees what is computed."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks of its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def list_tensors(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Return modules' own parameters and buffers, several times as fast as PyTorch, which names them all."""
    stores = [store for module in modules for store in (module._parameters, module._buffers)]
    return [tensor for store in stores for tensor in store.values() if tensor is not None]


def max_pool(x: Tensor, window: int) -> Tensor:
    """Take the maximum of each window of frames; a rest at the end is dropped.

    Shape:
        x: `(batch, channels, frames)`; returns `(batch, channels, frames // window)`
    """
    if torch.compiler.is_compiling():  # the 1D one would take symbolic lengths for constants
        return F.max_pool2d(x[..., None], (window, 1))[..., 0]
    return F.max_pool1d(x, window)  # a sixth of the time


def pad_overhang(x: Tensor, convolution: Convolution) -> Tensor:
    """Append zeros where a padded head's kernel hangs over the end, as Torch7 does (see `Window`)."""
    padding = int(convolution.padding[0])
    if not padding:
        return x
    overhang = convolution.kernel_size[0] - (x.shape[-1] + 2 * padding)
    most: Any = torch.sym_max  # no condition, for torch.export
    return F.pad(x, (0, most(overhang, 0)))
