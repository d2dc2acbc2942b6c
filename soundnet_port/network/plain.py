"""SoundNet as the paper's table has it: PyTorch modules one after the other, and nothing else.

The 8-layer network (section 3 of the paper; the heads are its conv8). Batch norm and ReLU follow
every convolution but the heads:

    layer     channels   kernel   stride   padding
    conv1           16       64        2        32
    pool1                     8        8
    conv2           32       32        2        16
    pool2                     8        8
    conv3           64       16        2         8
    conv4          128        8        2         4
    conv5          256        4        2         2
    pool5                     4        4
    conv6          512        4        2         2
    conv7         1024        4        2         2
    objects       1000        8        2         0
    scenes         401        8        2         0

The faster paths (engine.py, gradients.py) are tested against these modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from soundnet_port.network.architecture import BATCH_NORM_EPS, CLASSES, SOUNDNET8, Architecture
from soundnet_port.network.modules import Convolution, max_pool, pad_overhang


class Logits(NamedTuple):
    """Both heads' logits; a softmax over dimension 1 gives each frame's probabilities."""

    objects: Tensor  #: (batch, 1000, frames)
    scenes: Tensor  #: (batch, 401, frames)


class ClassLogits(NamedTuple):
    """Logits of a network fine-tuned to classes of the user."""

    classes: Tensor  #: (batch, classes, frames)


class PlainSoundNet(nn.Module):
    """The modules of SoundNet in their order; `SoundNet` adds layers by name and the faster paths.

    Args:
        architecture: the table.
        categories: names of the outputs by head, if they are known.
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
        for block in architecture.blocks:
            convolution = Convolution(channels, block.channels, block.kernel, block.stride, block.padding)
            self.add_module(block.name, convolution)
            self.add_module(block.norm, nn.BatchNorm1d(block.channels, eps=BATCH_NORM_EPS, momentum=0.1))
            channels = block.channels
        for head in architecture.heads:
            convolution = Convolution(channels, head.categories, head.kernel, head.stride, head.padding)
            self.add_module(head.name, convolution)
        if architecture.pooled_head:
            classes, features = architecture.state_shapes()[f"{CLASSES}.weight"]
            self.add_module(CLASSES, nn.Linear(features, classes))

    def forward(self, waveform: Tensor) -> Logits | ClassLogits:
        """Compute the heads' logits.

        Shape:
            waveform: `(batch, 1, samples)`; returns `(batch, categories, frames)` for each head
        """
        x = waveform
        for _, output in self.trunk(waveform):
            x = output
        return collect_logits({head.name: self.head(head.name, x) for head in self.architecture.heads})

    def trunk(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Run Torch7's modules below the heads one after the other; yield each one's number and output.

        Shape:
            x: `(batch, 1, samples)`; each output `(batch, channels, frames)`
        """
        number = 0
        for block in self.architecture.blocks:
            modules: list[Callable[[Tensor], Tensor]] = [
                self.get_submodule(block.name),
                self.get_submodule(block.norm),
                F.relu,
            ]
            if block.pool:
                modules.append(partial(max_pool, window=block.pool))
            for module in modules:
                number += 1
                x = module(x)
                yield number, x

    def head(self, name: str, x: Tensor) -> Tensor:
        """Compute one head's logits from the trunk's last output.

        Shape:
            x: `(batch, channels, frames)`; returns `(batch, categories, head frames)`
        """
        convolution = self.get_submodule(name)
        assert isinstance(convolution, Convolution)
        logits: Tensor = convolution(pad_overhang(x, convolution))
        return logits


def collect_logits(logits: Mapping[str, Tensor]) -> Logits | ClassLogits:
    """Return the logits of all heads as a tuple with their names."""
    return (ClassLogits if list(logits) == [CLASSES] else Logits)(**logits)
