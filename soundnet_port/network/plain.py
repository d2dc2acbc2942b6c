"""SoundNet as the paper's table has it: PyTorch modules and nothing else.

Every faster path (engine.py, gradients.py) is tested against these modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from soundnet_port.network.architecture import BATCH_NORM_EPS, SOUNDNET8, Architecture


class Convolution(nn.Conv1d):
    """A 1D convolution by way of PyTorch's 2D kernels, as SoundNet was in Torch7.

    On a CPU they take two thirds of the time, and the 1D ones fall off a cliff at 2**23 samples
    (6.3 minutes: 27 s in place of 1 s).
    """

    def forward(self, x: Tensor) -> Tensor:
        made = F.conv2d(
            x[..., None], self.weight[..., None], self.bias, (self.stride[0], 1), (int(self.padding[0]), 0)
        )
        return made[..., 0]


def maximum(x: Tensor, window: int) -> Tensor:
    """Max pooling over frames, rounding down."""
    if torch.compiler.is_compiling():  # where lengths are symbols the 1D one would take them for constants
        return F.max_pool2d(x[..., None], (window, 1))[..., 0]
    return F.max_pool1d(x, window)  # a sixth of the time


class PlainSoundNet(nn.Module):
    """The modules of SoundNet and the order in which they run; `SoundNet` adds everything else.

    Each block is convolution -> batch norm -> ReLU (-> max pooling); the two heads are convolutions on
    the last block. The numbers are in `architecture.py`.
    """

    def __init__(
        self,
        architecture: Architecture = SOUNDNET8,
        categories: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.categories = {head: tuple(names) for head, names in (categories or {}).items()}
        channels = 1
        for b in architecture.blocks:
            self.add_module(b.name, Convolution(channels, b.channels, b.kernel, b.stride, b.padding))
            self.add_module(b.norm, nn.BatchNorm1d(b.channels, eps=BATCH_NORM_EPS, momentum=0.1))
            channels = b.channels
        for h in architecture.heads:
            self.add_module(h.name, Convolution(channels, h.categories, h.kernel, h.stride, h.padding))

    def trunk(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Torch7's modules below the heads one after the other: (number, output).

        For looking at everything in passing; `extract` is the way to get certain layers.

        Shape:
            x: `(batch, 1, samples)`; each output `(batch, channels, frames)`
        """
        number = 0
        for block in self.architecture.blocks:
            stages: list[Callable[[Tensor], Tensor]] = [
                self.get_submodule(block.name),
                self.get_submodule(block.norm),
                F.relu,
            ]
            if block.pool:
                stages.append(partial(maximum, window=block.pool))
            for stage in stages:
                number += 1
                x = stage(x)
                yield number, x

    def head(self, name: str, x: Tensor) -> Tensor:
        """Logits of one head from the trunk's last output.

        Shape:
            x: `(batch, channels, frames)`; returns `(batch, categories, head frames)`
        """
        conv = self.get_submodule(name)
        assert isinstance(conv, Convolution)
        padding = int(conv.padding[0])
        if padding:  # Torch7's definition of a kernel that hangs over the end; see architecture._out
            overhang = conv.kernel_size[0] - (x.shape[-1] + 2 * padding)
            most: Any = torch.sym_max  # no condition, for torch.export
            x = F.pad(x, (0, most(overhang, 0)))
        logits: Tensor = conv(x)
        return logits
