"""The parts of an architecture, windows, blocks and heads, and the layers that they give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """What a convolution or pooling sees of its input; all lengths in frames of that input."""

    kernel: int
    stride: int
    padding: int = 0
    may_overhang: bool = False  #: whether a kernel that hangs over the padded end still gives a frame

    def count_frames(self, frames: int) -> int:
        """Return how many frames the window makes of `frames` frames.

        Torch7 divides as C does, towards zero, so a kernel that hangs over the padded end by less
        than a stride still gives one frame. With padding its unfolding checks bounds and the overhang
        acts as zeros: well defined, and the 5-layer heads use it. Without padding it reads past the
        buffer: undefined, so it counts as no frame. In the trunk pooling fails before that happens.
        """
        room = frames + 2 * self.padding - self.kernel
        if frames < 1 or room <= -self.stride or (room < 0 and not (self.may_overhang and self.padding)):
            return 0
        return max(room, 0) // self.stride + 1

    def count_ordinary(self, frames: int) -> int:
        """Return how many of its frames see nothing behind the first `frames` frames."""
        return max(0, (frames + self.padding - self.kernel) // self.stride + 1)

    def shortest_input(self, frames: int) -> int:
        """Return the fewest frames that make `frames` frames; at least 1, since padding is no sound."""
        spare = self.stride - 1 if self.may_overhang and self.padding and frames == 1 else 0
        return max(1, (frames - 1) * self.stride + self.kernel - 2 * self.padding - spare)


@dataclass(frozen=True)
class Block:
    """Convolution, batch norm, ReLU and perhaps max pooling: one or two columns of the paper's table."""

    name: str
    channels: int
    kernel: int
    stride: int
    padding: int
    pool: int = 0  #: pooling window and stride in frames; 0 is no pooling

    @property
    def norm(self) -> str:
        """Name of the block's batch norm, such as `bn1` for `conv1`."""
        return self.name.replace("conv", "bn")

    @property
    def pool_layer(self) -> str:
        """Name of the block's pooled output, such as `pool1` for `conv1`."""
        return self.name.replace("conv", "pool")

    @property
    def output(self) -> str:
        """Name of the block's output, such as `pool1`, or `conv3` where nothing is pooled."""
        return self.pool_layer if self.pool else self.name

    @property
    def modules(self) -> int:
        """Number of Torch7 modules of the block."""
        return 4 if self.pool else 3

    @property
    def windows(self) -> tuple[Window, ...]:
        """Windows of the convolution and the pooling."""
        convolution = Window(self.kernel, self.stride, self.padding)
        return (convolution, Window(self.pool, self.pool)) if self.pool else (convolution,)


@dataclass(frozen=True)
class Head:
    """An output convolution: logits over `categories` for every frame."""

    name: str
    categories: int
    kernel: int
    stride: int
    padding: int

    @property
    def window(self) -> Window:
        """Window of the convolution."""
        return Window(self.kernel, self.stride, self.padding, may_overhang=True)


@dataclass(frozen=True)
class PooledHead:
    """Classes as a linear function of layers pooled over time, see inference/classification.py.

    No layer of the network has its output, for it needs a sound at two speeds.
    """

    classes: int
    layers: tuple[str, ...]
    seconds: float  #: length of the longest sound it was fitted to, and of windows of longer ones
    values: int = 6  #: per channel, which are mean, maximum and std at two speeds


@dataclass(frozen=True)
class Layer:
    """The output of a module and where its frames lie in time.

    Frame `t` sees the samples `start + t * stride` up to (not including)
    `start + t * stride + receptive_field`; where these lie outside the sound it sees zeros.
    """

    name: str  #: "conv7", or "module 22" for a module inside a layer
    module: int  #: Torch7's number, counted from 1
    kind: str  #: conv, norm, relu, pool or head
    parameters: str  #: prefix of its parameters in the state dict ("conv7", "bn7"); "" without any
    channels: int
    stride: int  #: samples from one frame to the next
    receptive_field: int  #: samples
    start: int  #: first sample that frame 0 sees; negative through padding
    shortest: int  #: samples that give one frame

    @property
    def center(self) -> float:
        """Middle of what frame 0 sees, in samples."""
        return self.start + self.receptive_field / 2

    @property
    def is_layer(self) -> bool:
        """Whether it is a layer in the paper's sense, and not a module inside one."""
        return self.kind not in ("conv", "norm")

    @property
    def key(self) -> str | int:
        """Its name, or the number of a module inside a layer; what `Architecture.layer` finds it by."""
        return self.name if self.is_layer else self.module


def walk_modules(blocks: Sequence[Block], heads: Sequence[Head]) -> Iterator[Layer]:
    """Yield all modules and heads in order, with the stride and receptive field of each."""
    windows: list[Window] = []
    stride, field, start, number = 1, 1, 0, 0

    def extend(window: Window) -> tuple[int, int, int]:
        jump = stride * window.stride
        return jump, field + (window.kernel - 1) * stride, start - window.padding * stride

    def build(name: str, kind: str, parameters: str, channels: int, shortest: int = 1) -> Layer:
        for window in reversed(windows):
            shortest = window.shortest_input(shortest)
        return Layer(name, number, kind, parameters, channels, stride, field, start, shortest)

    for block in blocks:
        convolution, *pooling = block.windows
        stride, field, start = extend(convolution)
        windows.append(convolution)
        for kind, parameters in (("conv", block.name), ("norm", block.norm), ("relu", "")):
            number += 1
            name = block.name if kind == "relu" else f"module {number}"
            yield build(name, kind, parameters, block.channels)
        for window in pooling:
            number += 1
            stride, field, start = extend(window)
            windows.append(window)
            yield build(block.pool_layer, "pool", "", block.channels)
    number += 1
    for head in heads:
        trunk = stride, field, start
        stride, field, start = extend(head.window)
        yield build(head.name, "head", head.name, head.categories, head.window.shortest_input(1))
        stride, field, start = trunk
