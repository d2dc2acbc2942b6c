"""The paper's two networks as tables, and what follows from their numbers.

Kernel sizes, strides and paddings are written down here alone. Receptive fields, shortest inputs,
frame times, parameter shapes and Torch7's module numbers are computed from them, without torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral

from soundnet_port.network.blocks import Block as Block
from soundnet_port.network.blocks import Head as Head
from soundnet_port.network.blocks import Layer as Layer
from soundnet_port.network.blocks import PooledHead as PooledHead
from soundnet_port.network.blocks import Window, walk_modules

SAMPLE_RATE = 22_050  # Hz; SoundNet was trained on 22.05 kHz mono sound
MIN_RATE, MAX_RATE = 100, 10_000_000  # Hz that can be resampled to that
FULL_SCALE = 256.0  # a full-scale sample in the network's input (Torch7's audio.load times 2^-23)
BATCH_NORM_EPS = 1e-5
CLASSES = "classes"  # the head of a network fine-tuned to classes of the user


@dataclass(frozen=True)
class Architecture:
    """A SoundNet: its blocks, its heads and their geometry.

    The heads are objects and scenes, or the user's own classes (`with_classes`), or there are none, also
    where a pooled head has the user's classes (`with_pooled_head`).
    """

    name: str
    blocks: tuple[Block, ...]
    heads: tuple[Head, ...]
    pooled_head: PooledHead | None = None

    def resized(self, widths: Sequence[int], heads: Mapping[str, int]) -> Architecture:
        """Return the architecture with other channel counts and head sizes.

        Args:
            widths: channels of each block.
            heads: categories by head name; empty for a network without heads.

        Raises:
            ValueError: a wrong number of blocks, unknown heads, or a size below 1.
        """
        widths = tuple(widths)
        if len(widths) != len(self.blocks) or any(width < 1 for width in widths):
            raise ValueError(f"{self.name} has {len(self.blocks)} blocks of width >= 1, not {widths}")
        if heads and (heads.keys() != self.head_sizes.keys() or min(heads.values()) < 1):
            names = " and ".join(self.head_sizes)
            raise ValueError(f"{self.name} has the heads {names} of size >= 1, not {dict(heads)}")
        return replace(
            self,
            blocks=tuple(
                replace(block, channels=width) for block, width in zip(self.blocks, widths, strict=True)
            ),
            heads=tuple(replace(head, categories=heads[head.name]) for head in self.heads) if heads else (),
        )

    def with_classes(self, classes: int, layer: str, kernel: int = 1) -> Architecture:
        """Return the trunk up to a layer, with a single head, "classes".

        Args:
            classes: number of classes.
            layer: the last layer of the trunk, such as "conv7" or "pool5".
            kernel: frames that the head sees at once; main_finetune.lua has 4, on conv7.

        Raises:
            ValueError: the trunk has no such layer, or a size is below 1.

        >>> SOUNDNET8.with_classes(10, "pool5").layer("classes").channels
        10
        """
        if classes < 1 or kernel < 1:
            raise ValueError(f"classes and kernel must be at least 1, not {classes} and {kernel}")
        heads = (Head(CLASSES, classes, kernel, 1, 0),)
        return replace(self, blocks=self._blocks_up_to(layer), heads=heads, pooled_head=None)

    def with_pooled_head(self, classes: int, layers: Sequence[str], seconds: float) -> Architecture:
        """Return the trunk up to the last of these layers, with a pooled head on them.

        Args:
            classes: number of classes.
            layers: such as ("conv4", "pool5", "conv6").
            seconds: length of the longest sound that the head was fitted to.

        Raises:
            ValueError: the trunk has no such layer, or a number is not positive.

        >>> SOUNDNET8.with_pooled_head(10, ("conv4", "pool5"), 5.0).state_shapes()["classes.weight"]
        (10, 2304)
        """
        if classes < 1 or not layers or not seconds > 0:
            raise ValueError(f"a pooled head of {classes} classes, {len(layers)} layers and {seconds} s")
        # conv5 and pool5 are of the same block
        blocks = max(
            (self._blocks_up_to(layer) for layer in layers), key=lambda blocks: (len(blocks), blocks[-1].pool)
        )
        head = PooledHead(classes, tuple(layers), float(seconds))
        return replace(self, blocks=blocks, heads=(), pooled_head=head)

    def _blocks_up_to(self, layer: str) -> tuple[Block, ...]:
        """Return the blocks of a trunk that ends with a layer."""
        for number, block in enumerate(self.blocks, 1):
            if layer == block.name:
                return (*self.blocks[: number - 1], replace(block, pool=0))
            if block.pool and layer == block.pool_layer:
                return self.blocks[:number]
        trunk = [layer.name for layer in self.layers.values() if layer.kind != "head"]
        raise ValueError(f"no head goes on {layer!r}; choose from {', '.join(trunk)}")

    @property
    def last_layer(self) -> str:
        """Name of the trunk's last layer, the input of the heads."""
        return self.blocks[-1].output

    @property
    def default_layer(self) -> str:
        """Name of the layer that features come from where none is given.

        That is pool5, which the paper's classifiers used; with 5 layers conv4, which has the stride and
        the channels of pool5; and the last layer of a trunk that ends before.
        """
        name = "conv4" if self.name == "soundnet5" else "pool5"
        return name if name in self.layers else self.last_layer

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each block."""
        return tuple(block.channels for block in self.blocks)

    @property
    def head_sizes(self) -> dict[str, int]:
        """Categories by head name."""
        return {head.name: head.categories for head in self.heads}

    @property
    def output_sizes(self) -> dict[str, int]:
        """Categories by name of what `predict` tells: those of the heads, or of the pooled head."""
        return {CLASSES: self.pooled_head.classes} if self.pooled_head else self.head_sizes

    @cached_property
    def modules(self) -> tuple[Layer, ...]:
        """The trunk's Torch7 modules in order; number `n` is `modules[n - 1]`."""
        return tuple(layer for layer in walk_modules(self.blocks, self.heads) if layer.kind != "head")

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """The named layers in the order of computation, heads last."""
        return {layer.name: layer for layer in walk_modules(self.blocks, self.heads) if layer.is_layer}

    def layer(self, key: str | int | None) -> Layer:
        """Look up a layer by its name, or a module by Torch7's number; None is the default layer.

        Raises:
            ValueError: there is no such layer; the message lists the choices.

        >>> SOUNDNET8.layer(24).name
        'conv7'
        """
        if key is None:
            key = self.default_layer
        if isinstance(key, str) and key in self.layers:
            return self.layers[key]
        if isinstance(key, Integral) and not isinstance(key, bool) and 1 <= key <= len(self.modules):
            return self.modules[int(key) - 1]
        raise ValueError(
            f"{self.name} has no layer {key!r}; choose from {', '.join(self.layers)}, "
            f"or one of Torch7's module numbers 1 to {len(self.modules)}"
        )

    def frames(self, key: str | int | None, samples: int) -> int:
        """Count the frames that `samples` samples give at a layer; 0 where they are too few.

        >>> SOUNDNET8.frames("conv7", 10 * SAMPLE_RATE)
        8
        """
        frames = samples
        for window in self._windows(self.layer(key)):
            frames = window.count_frames(frames)
        return frames

    def edge_frames(self, key: str | int | None, samples: int) -> int:
        """Count the edge frames at the end of a layer: those that see zeros after the sound's end.

        A frame of the trunk's last convolution (conv7; with 5 layers conv4) is an edge frame if its
        window reaches into the padding after its input's last frame, and so is a frame of a head that
        sees one. Training never saw them: the heads' windows on 20 s end before. In the released 8-layer
        network conv7's is 10 to 100 times as large as the median of the others, and head frames that
        see it answer with nonsense (docs/edge-frames.md). With 5 layers the rule is the same, but
        unmeasured. Earlier layers have none, nor does a trunk that ends earlier, where the loss saw
        every frame::

            conv6's frames    ... n-4 n-3 n-2 n-1 | 0   0     (n even)
            conv7's windows       [  ordinary   ]
                                          [  edge     ]

        Args:
            key: name, Torch7's module number, or None for the default layer.
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
        inputs = self.frames(self.blocks[-2].output, samples) if len(self.blocks) > 1 else samples
        ordinary = self.blocks[-1].windows[0].count_ordinary(inputs)
        if layer.kind == "head":
            ordinary = self._head(layer).window.count_ordinary(ordinary)
        return total - min(ordinary, total)

    def has_edge_frames(self, layer: Layer) -> bool:
        """Whether a layer can have edge frames: the last convolution of a full trunk, or a head on it."""
        is_full = len(self.blocks) == len(ARCHITECTURES[self.name].blocks)
        return is_full and layer.module > len(self.modules) - self.blocks[-1].modules

    def shortest_ordinary(self, key: str | int | None) -> int:
        """Return how many samples give an ordinary frame; `Layer.shortest` where there are no edge frames.

        >>> SOUNDNET8.shortest_ordinary("conv7"), SOUNDNET8.shortest_ordinary("objects")
        (12766, 242142)
        """
        layer = self.layer(key)
        if not self.has_edge_frames(layer):
            return layer.shortest
        block, frames = self.blocks[-1], 1
        if layer.kind == "head":
            head = self._head(layer)
            frames = max(1, head.kernel - head.padding)
        samples = max(1, (frames - 1) * block.stride + block.kernel - block.padding)
        for earlier in reversed(self.blocks[:-1]):
            for window in reversed(earlier.windows):
                samples = window.shortest_input(samples)
        return max(samples, layer.shortest)

    def check_ordinary(self, samples: int, layers: Iterable[Layer]) -> None:
        """Check that a sound gives each layer an ordinary frame.

        Raises:
            ValueError: a layer gets edge frames alone; the message says how long the sound must be.
        """
        for layer in layers:
            least = self.shortest_ordinary(layer.key)
            if layer.shortest <= samples < least:
                raise ValueError(
                    f"{samples:,} samples ({samples / SAMPLE_RATE:.3f} s) give {layer.name} edge frames "
                    f"alone, which hear zeros after the sound's end; use at least {least:,} samples "
                    f"({least / SAMPLE_RATE:.3f} s), an earlier layer, or take them in with edge_frames=True "
                    "(--edge-frames)"
                )

    def check_length(self, samples: int, layers: Iterable[Layer]) -> None:
        """Check that a sound is long enough for each layer.

        Raises:
            ValueError: it is too short; the message says how long it must be.
        """
        for layer in layers:
            if samples < layer.shortest:
                raise ValueError(
                    f"{samples:,} samples ({samples / SAMPLE_RATE:.3f} s) are too short: "
                    f"{describe_shortest(layer)}; use a longer sound, repeat it as predict() does, "
                    "or ask for an earlier layer"
                )

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the name and shape of every tensor that weights of this architecture have."""
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
        if pooled := self.pooled_head:
            widths = sum(self.layers[name].channels for name in pooled.layers)
            shapes[f"{CLASSES}.weight"] = (pooled.classes, widths * pooled.values)
            shapes[f"{CLASSES}.bias"] = (pooled.classes,)
        return shapes

    def _head(self, layer: Layer) -> Head:
        return next(head for head in self.heads if head.name == layer.name)

    def _windows(self, layer: Layer) -> Iterator[Window]:
        """Yield the windows of the modules up to a layer, in order."""
        last = 0
        for block in self.blocks:
            # ReLU is the third module of a block, pooling the fourth
            for window, module in zip(block.windows, (1, 4), strict=False):
                if layer.module < last + module:
                    return
                yield window
            last += block.modules
        if layer.kind == "head":
            yield self._head(layer).window


def describe_shortest(layer: Layer) -> str:
    """Name a layer and its shortest input, for messages."""
    return f"{layer.name} needs at least {layer.shortest:,} samples ({layer.shortest / SAMPLE_RATE:.3f} s)"


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

ARCHITECTURES = {architecture.name: architecture for architecture in (SOUNDNET8, SOUNDNET5)}
