"""The two networks of the paper as tables, and all that follows from their numbers.

This is the one place where kernel sizes, strides and paddings are written down. Receptive
fields, shortest inputs, frame times, parameter shapes and Torch7's module numbers are computed
from it. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral

SAMPLE_RATE = 22_050  # Hz; SoundNet was trained on 22.05 kHz mono sound
FULL_SCALE = 256.0  # a full-scale sample in the network's input (Torch7's audio.load times 2^-23)
BATCH_NORM_EPS = 1e-5
CLASSES = "classes"  # the head of networks that were trained on classes of their own


@dataclass(frozen=True)
class Block:
    """A row of the paper's table: convolution, batch norm, ReLU and perhaps max pooling."""

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
    def pooled(self) -> str:
        """Name of the block's pooled output, such as `pool1` for `conv1`."""
        return self.name.replace("conv", "pool")

    @property
    def end(self) -> str:
        """Name of the block's output, such as `pool1`, or `conv3` where nothing is pooled."""
        return self.pooled if self.pool else self.name

    @property
    def modules(self) -> int:
        """How many Torch7 modules the block is."""
        return 4 if self.pool else 3


@dataclass(frozen=True)
class Head:
    """An output convolution: logits over `categories` for every frame."""

    name: str
    categories: int
    kernel: int
    stride: int
    padding: int


@dataclass(frozen=True)
class Layer:
    """One module's output and where its frames lie in time.

    Frame `t` sees the samples `start + t * stride` up to (not including)
    `start + t * stride + receptive_field`; where these lie outside the sound it sees zeros.
    """

    name: str  #: "conv7"; for a module without a name of its own "module 22"
    module: int  #: Torch7's number, counted from 1
    kind: str  #: conv, norm, relu, pool or head
    parameters: str  #: prefix of its parameters in the state dict ("conv7", "bn7"); "" without any
    channels: int
    stride: int  #: samples from one frame to the next
    receptive_field: int  #: samples
    start: int  #: first sample that frame 0 sees; negative through padding
    shortest: int  #: samples that give one frame

    @property
    def is_layer(self) -> bool:
        """Whether it is a layer in the paper's sense, and not a module inside one."""
        return self.kind not in ("conv", "norm")

    def describe(self) -> str:
        seconds = self.shortest / SAMPLE_RATE
        return f"{self.name} needs at least {self.shortest:,} samples ({seconds:.3f} s)"


@dataclass(frozen=True)
class Architecture:
    """A SoundNet: its blocks, its heads and their geometry.

    The heads are objects and scenes, or classes of one's own (`with_classes`), or there are none.
    """

    name: str
    blocks: tuple[Block, ...]
    heads: tuple[Head, ...]

    def resized(self, widths: Sequence[int], heads: Mapping[str, int]) -> Architecture:
        """The same architecture with other channel counts and head sizes.

        Args:
            widths: channels of each block.
            heads: categories by head name; empty for a network without heads.

        Raises:
            ValueError: another number of blocks, unknown heads, or a size below 1.
        """
        widths = tuple(widths)
        if len(widths) != len(self.blocks) or any(width < 1 for width in widths):
            raise ValueError(f"{self.name} has {len(self.blocks)} blocks of width >= 1, not {widths}")
        if heads and (set(heads) != {h.name for h in self.heads} or min(heads.values()) < 1):
            names = " and ".join(h.name for h in self.heads)
            raise ValueError(f"{self.name} has the heads {names} of size >= 1, not {dict(heads)}")
        return replace(
            self,
            blocks=tuple(replace(b, channels=c) for b, c in zip(self.blocks, widths, strict=True)),
            heads=tuple(replace(h, categories=heads[h.name]) for h in self.heads) if heads else (),
        )

    def with_classes(self, classes: int, layer: str, kernel: int = 1) -> Architecture:
        """The trunk up to a layer, and on it one head, "classes", in place of the others.

        Args:
            classes: how many.
            layer: the last one of the trunk, such as "conv7" or "pool5".
            kernel: frames that the head sees at once. main_finetune.lua has 4, on conv7.

        Raises:
            ValueError: no such layer of the trunk, or sizes below 1.

        >>> SOUNDNET8.with_classes(10, "pool5").layer("classes").channels
        10
        """
        if classes < 1 or kernel < 1:
            raise ValueError(f"classes and kernel must be at least 1, not {classes} and {kernel}")
        for number, block in enumerate(self.blocks, 1):
            if layer == block.name:
                last = replace(block, pool=0)
            elif block.pool and layer == block.pooled:
                last = block
            else:
                continue
            heads = (Head(CLASSES, classes, kernel, 1, 0),)
            return replace(self, blocks=(*self.blocks[: number - 1], last), heads=heads)
        trunk = [name for name, each in self.layers.items() if each.kind != "head"]
        raise ValueError(f"no head goes on {layer!r}; choose from {', '.join(trunk)}")

    @property
    def last_layer(self) -> str:
        """The last layer of the trunk, which the heads are on."""
        return self.blocks[-1].end

    @property
    def default_layer(self) -> str:
        """Pool5, which the paper's classifiers used, is the layer for features where none is named.

        With 5 layers conv4, which has its stride and its number of channels. Where a trunk of one's own
        ends before, its end.
        """
        usual = "conv4" if self.name == "soundnet5" else "pool5"
        return usual if usual in self.layers else self.last_layer

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(block.channels for block in self.blocks)

    @property
    def head_sizes(self) -> dict[str, int]:
        return {head.name: head.categories for head in self.heads}

    @cached_property
    def modules(self) -> tuple[Layer, ...]:
        """The trunk's Torch7 modules in order; number `n` is `modules[n - 1]`."""
        return tuple(layer for layer in self._walk() if layer.kind != "head")

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """The named layers in the order in which they are computed, heads last."""
        return {layer.name: layer for layer in self._walk() if layer.is_layer}

    def layer(self, key: str | int) -> Layer:
        """The layer of that name, or Torch7's module of that number.

        Raises:
            ValueError: there is no such layer; the message lists the choices.

        >>> SOUNDNET8.layer(24).name
        'conv7'
        """
        if isinstance(key, str) and key in self.layers:
            return self.layers[key]
        if isinstance(key, Integral) and not isinstance(key, bool) and 1 <= key <= len(self.modules):
            return self.modules[int(key) - 1]
        raise ValueError(
            f"{self.name} has no layer {key!r}; choose from {', '.join(self.layers)}, "
            f"or one of Torch7's module numbers 1 to {len(self.modules)}"
        )

    def frames(self, key: str | int, samples: int) -> int:
        """Number of frames that `samples` samples give at a layer; 0 where they are too few.

        >>> SOUNDNET8.frames("conv7", 10 * SAMPLE_RATE)
        8
        """
        target = self.layer(key)
        frames = samples
        for step, (kernel, stride, padding) in self._strided(target):
            frames = _out(frames, kernel, stride, padding, overhang=step == "head")
            if frames < 1:
                return 0
        return frames

    def edge_frames(self, key: str | int, samples: int) -> int:
        """Count the edge frames at the end of a layer: those that hear zeros where the sound has ended.

        A frame of the last convolution of the trunk (conv7; with 5 layers conv4) is an edge frame if its
        window reaches into the padding after its input's last frame, and so is a frame of a head that looks
        at one. Training never saw them: the heads' windows on 20 s end before. In the released 8-layer
        network conv7's is 10 to 100 times as large as the median of the others, and the answers of head
        frames that look at it have nothing to do with the sound (docs/edge-frames.md). With 5 layers the
        rule is the same, but unmeasured. Earlier layers have none, nor does anything on a trunk that ends
        earlier: there the loss saw every frame::

            conv6's frames    ... n-4 n-3 n-2 n-1 | 0   0     (n even)
            conv7's windows       [  ordinary   ]
                                          [  edge     ]

        Args:
            key: name, or Torch7's module number.
            samples: length of the sound.

        Raises:
            ValueError: there is no such layer.

        >>> SOUNDNET8.edge_frames("conv7", 5 * SAMPLE_RATE)
        1
        >>> [SOUNDNET8.edge_frames("objects", s * SAMPLE_RATE) for s in (10, 15, 20)]
        [1, 0, 0]
        >>> [SOUNDNET5.edge_frames(layer, 20 * SAMPLE_RATE) for layer in ("pool3", "conv4", "scenes")]
        [0, 2, 0]
        >>> SOUNDNET8.edge_frames("pool5", 5 * SAMPLE_RATE)
        0
        """
        layer = self.layer(key)
        total = self.frames(key, samples)
        if not self.has_edge_frames(layer) or not total:
            return 0
        block = self.blocks[-1]
        before = self.frames(self.blocks[-2].end, samples) if len(self.blocks) > 1 else samples
        ordinary = _inside(before, block.kernel, block.stride, block.padding)
        if layer.kind == "head":
            head = next(h for h in self.heads if h.name == layer.name)
            ordinary = _inside(ordinary, head.kernel, head.stride, head.padding)
        return total - min(ordinary, total)

    def has_edge_frames(self, layer: Layer) -> bool:
        """Whether a layer can have edge frames: the last convolution of a whole trunk, or a head on it."""
        whole = len(self.blocks) == len(ARCHITECTURES[self.name].blocks)
        return whole and layer.module > len(self.modules) - self.blocks[-1].modules

    def shortest_ordinary(self, key: str | int) -> int:
        """Samples that give a frame which is no edge frame; for most layers `Layer.shortest`.

        >>> SOUNDNET8.shortest_ordinary("conv7"), SOUNDNET8.shortest_ordinary("objects")
        (12766, 242142)
        """
        layer = self.layer(key)
        if not self.has_edge_frames(layer):
            return layer.shortest
        block, wanted = self.blocks[-1], 1
        if layer.kind == "head":
            head = next(h for h in self.heads if h.name == layer.name)
            wanted = max(1, head.kernel - head.padding)
        samples = max(1, (wanted - 1) * block.stride + block.kernel - block.padding)
        for earlier in reversed(self.blocks[:-1]):
            if earlier.pool:
                samples = _least(samples, earlier.pool, earlier.pool, 0)
            samples = _least(samples, earlier.kernel, earlier.stride, earlier.padding)
        return max(samples, layer.shortest)

    def check_ordinary(self, samples: int, layers: Iterable[Layer]) -> None:
        """Raises a ValueError if a sound gives a layer edge frames alone, with what to do about it."""
        for layer in layers:
            key = layer.name if layer.is_layer else layer.module
            if samples >= layer.shortest and samples < self.shortest_ordinary(key):
                least = self.shortest_ordinary(key)
                raise ValueError(
                    f"{samples:,} samples ({samples / SAMPLE_RATE:.3f} s) give {layer.name} edge frames "
                    f"alone, which hear zeros after the sound's end; use at least {least:,} samples "
                    f"({least / SAMPLE_RATE:.3f} s), an earlier layer, or take them in with edge_frames=True "
                    "(--edge-frames)"
                )

    def check_length(self, samples: int, layers: Iterable[Layer]) -> None:
        """Raises a ValueError if a sound is too short for a layer, with what to do about it."""
        for layer in layers:
            if samples < layer.shortest:
                raise ValueError(
                    f"{samples:,} samples ({samples / SAMPLE_RATE:.3f} s) are too short: "
                    f"{layer.describe()}; use a longer sound, repeat it as predict() does, "
                    "or ask for an earlier layer"
                )

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor in the state dict of these weights."""
        shapes: dict[str, tuple[int, ...]] = {}
        channels = 1
        for block in self.blocks:
            shapes[f"{block.name}.weight"] = (block.channels, channels, block.kernel)
            shapes[f"{block.name}.bias"] = (block.channels,)
            for field in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"{block.norm}.{field}"] = (block.channels,)
            channels = block.channels
        for head in self.heads:
            shapes[f"{head.name}.weight"] = (head.categories, channels, head.kernel)
            shapes[f"{head.name}.bias"] = (head.categories,)
        return shapes

    def _strided(self, target: Layer) -> Iterator[tuple[str, tuple[int, int, int]]]:
        """(kind, (kernel, stride, padding)) of the strided modules up to `target`, in order."""
        number = 0
        for block in self.blocks:
            number += 3
            yield "conv", (block.kernel, block.stride, block.padding)
            if number >= target.module:
                return
            if block.pool:
                number += 1
                yield "pool", (block.pool, block.pool, 0)
                if number >= target.module:
                    return
        head = next(h for h in self.heads if h.name == target.name)
        yield "head", (head.kernel, head.stride, head.padding)

    def _walk(self) -> Iterator[Layer]:
        """All modules and heads in order, with stride and receptive field carried along."""
        strided: list[tuple[int, int, int]] = []
        stride, field, start, number = 1, 1, 0, 0

        def extended(kernel: int, step: int, padding: int) -> tuple[int, int, int]:
            return stride * step, field + (kernel - 1) * stride, start - padding * stride

        def layer(name: str, kind: str, params: str, channels: int, shortest: int = 1) -> Layer:
            for kernel, step, padding in reversed(strided):
                shortest = _least(shortest, kernel, step, padding)
            return Layer(name, number, kind, params, channels, stride, field, start, shortest)

        for block in self.blocks:
            stride, field, start = extended(block.kernel, block.stride, block.padding)
            strided.append((block.kernel, block.stride, block.padding))
            for kind, params in (("conv", block.name), ("norm", block.norm), ("relu", "")):
                number += 1
                name = block.name if kind == "relu" else f"module {number}"
                yield layer(name, kind, params, block.channels)
            if block.pool:
                number += 1
                stride, field, start = extended(block.pool, block.pool, 0)
                strided.append((block.pool, block.pool, 0))
                yield layer(block.pooled, "pool", "", block.channels)
        number += 1
        for head in self.heads:
            trunk = stride, field, start
            stride, field, start = extended(head.kernel, head.stride, head.padding)
            shortest = _least(1, head.kernel, head.stride, head.padding, overhang=True)
            yield layer(head.name, "head", head.name, head.categories, shortest)
            stride, field, start = trunk


def _out(frames: int, kernel: int, stride: int, padding: int, *, overhang: bool = False) -> int:
    """Frames that a convolution or pooling makes of `frames` frames.

    Torch7 divides as C does, towards zero, so a kernel that hangs over the padded end by less
    than a stride still gives one frame. With padding its unfolding checks bounds and the overhang
    acts as zeros: well defined, and the 5-layer heads use it. Without padding it reads past the
    buffer: undefined, so it counts as no frame. In the trunk pooling fails before that happens.
    """
    room = frames + 2 * padding - kernel
    if frames < 1 or room <= -stride or (room < 0 and not (overhang and padding)):
        return 0
    return max(room, 0) // stride + 1


def _inside(frames: int, kernel: int, stride: int, padding: int) -> int:
    """Windows that end within the first `frames` input frames, counted from the beginning."""
    return max(0, (frames + padding - kernel) // stride + 1)


def _least(frames: int, kernel: int, stride: int, padding: int, *, overhang: bool = False) -> int:
    """Fewest frames from which `_out` makes `frames`; at least 1, for padding alone is no sound."""
    spare = stride - 1 if overhang and padding and frames == 1 else 0
    return max(1, (frames - 1) * stride + kernel - 2 * padding - spare)


SOUNDNET8 = Architecture(
    "soundnet8",
    blocks=(
        #     name   channels kernel stride padding  pool
        Block("conv1", 16, 64, 2, 32, pool=8),
        Block("conv2", 32, 32, 2, 16, pool=8),
        Block("conv3", 64, 16, 2, 8),
        Block("conv4", 128, 8, 2, 4),
        Block("conv5", 256, 4, 2, 2, pool=4),
        Block("conv6", 512, 4, 2, 2),
        Block("conv7", 1024, 4, 2, 2),
    ),
    heads=(  # together the paper's conv8
        Head("objects", 1000, 8, 2, 0),
        Head("scenes", 401, 8, 2, 0),
    ),
)

SOUNDNET5 = Architecture(
    "soundnet5",
    blocks=(
        Block("conv1", 32, 64, 2, 32, pool=8),
        Block("conv2", 64, 32, 2, 16, pool=8),
        Block("conv3", 128, 16, 2, 8, pool=8),
        Block("conv4", 256, 8, 2, 4),
    ),
    heads=(  # together the paper's conv5
        Head("objects", 1000, 16, 12, 4),
        Head("scenes", 401, 16, 12, 4),
    ),
)

ARCHITECTURES = {a.name: a for a in (SOUNDNET8, SOUNDNET5)}


MAX_RATE = 10_000_000  # Hz, wanted or a file's own


MIN_RATE = 100  # a file's own; below, it would grow a thousandfold by resampling
