"""SoundNet as a plain `nn.Module`: the reference that every faster path is tested against."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from soundnet_port.network import engine, gradients
from soundnet_port.network.architecture import (
    CLASSES,
    SAMPLE_RATE,
    Block,
    Head,
    Layer,
)
from soundnet_port.network.plain import Convolution, PlainSoundNet

LayerKey = TypeVar("LayerKey", str, int, str | int)


class Logits(NamedTuple):
    """Both heads' logits; a softmax over dimension 1 gives each frame's probabilities."""

    objects: Tensor  #: (batch, 1000, frames)
    scenes: Tensor  #: (batch, 401, frames)


class ClassLogits(NamedTuple):
    """Logits of a network with classes of its own."""

    classes: Tensor  #: (batch, classes, frames)


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _has_global_hooks() -> bool:
    return bool(nn.modules.module._has_any_global_hook())  # type: ignore[no-untyped-call]


def _in_torch_func() -> bool:
    """Whether a transform of torch.func is at work, such as vmap or grad."""
    return torch._C._functorch.peek_interpreter_stack() is not None


class SoundNet(PlainSoundNet):
    """The network of Aytar, Vondrick and Torralba, NIPS 2016 (section 3), both depths.

    Each block is convolution -> batch norm -> ReLU (-> max pooling); the two heads are
    convolutions on the last block. The numbers are in `architecture.py`.

    Named layers are computed by the engine (engine.py) in evaluation without gradients: the same numbers
    up to float32's rounding, several times as fast. `use_engine = False`, on a model or on the class, has
    the modules compute everything. For training loops `fast_gradients = True` opts in to gradients.py, which
    computes forward and backward passes on a CPU by matrix products; it has first derivatives only, calls no
    backward hooks and knows nothing of `torch.func`.

    Args:
        architecture: `SOUNDNET8`, `SOUNDNET5`, or one of them `.resized()` or `.with_classes()`.
        categories: names of the outputs by head (`"objects"`, `"scenes"`; `"classes"`), if they are
            known.
    """

    use_engine = True
    fast_gradients = False

    def forward(self, waveform: Tensor) -> Logits | ClassLogits:
        """Logits of both heads, or of the classes, for every head frame.

        Args:
            waveform: float samples at 22,050 Hz within +-256 (as `load_audio` gives them).

        Shape:
            - waveform: `(samples,)`, `(batch, samples)` or `(batch, 1, samples)`
            - objects: `(batch, 1000, frames)`, scenes: `(batch, 401, frames)`; the batch dimension
              is always there. 10 s give 1 frame, 20 s give 4 (8 layers).
            - classes, in place of these: `(batch, classes, frames)`

        Raises:
            ValueError: the sound is too short, the input has another shape or is not float, or
                these weights have no heads.
        """
        if not self.architecture.heads:
            raise ValueError("these weights have no heads; use extract() for the trunk's layers")
        heads = [head.name for head in self.architecture.heads]
        kind = ClassLogits if heads == [CLASSES] else Logits
        return kind(**self.extract(waveform, heads))

    def extract(self, waveform: Tensor, layers: Sequence[LayerKey]) -> dict[LayerKey, Tensor]:
        """Activations of any layers, computed no deeper than asked.

        Args:
            waveform: float samples at 22,050 Hz within +-256.
            layers: names such as `"pool5"` or `"conv7"`, which mean a block's output after batch
                norm and ReLU (and pooling), `"objects"` and `"scenes"` (logits), or Torch7's
                module numbers, which give exactly that module's output: 22 is the bare
                convolution, 23 its batch norm, 24 the same as `"conv7"`.

        Shape:
            - waveform: `(samples,)`, `(batch, samples)` or `(batch, 1, samples)`
            - each value of the result: `(batch, channels, frames)`, under the key asked for

        Raises:
            ValueError: unknown layer (the message lists the choices), or a sound that is too
                short for a layer; nothing is padded or repeated here.
        """
        if isinstance(layers, (str, int)):
            raise ValueError(f"layers must be a list, such as [{layers!r}]")
        wanted: dict[LayerKey, Layer] = {key: self.architecture.layer(key) for key in layers}
        x = self._checked(waveform, wanted.values())
        fits = self._engine_fits(x, wanted.values())
        if fits and x.device.type != "cpu":
            made = engine.convolved(self, x, list(wanted.values()))
            return {key: made[layer.name] for key, layer in wanted.items()}
        if fits:
            sounds = engine.extract(self, list(x[:, 0]), list(wanted.values()))
            return {
                key: torch.stack([sound[layer.name] for sound in sounds]) for key, layer in wanted.items()
            }
        if self._gradients_fit(x, wanted.values()):
            made = gradients.extract(self, x, list(wanted.values()))
            return {key: made[layer.name] for key, layer in wanted.items()}
        deepest = max((layer.module for layer in wanted.values()), default=1)
        in_trunk = {layer.module for layer in wanted.values() if layer.kind != "head"}
        kept: dict[int, Tensor] = {}
        with engine.true_float32(x.device) if not self.training else nullcontext():
            for number, output in self.trunk(x):
                x = output
                if number in in_trunk:
                    kept[number] = x
                if number == deepest:
                    break
            return {
                key: self.head(layer.name, x) if layer.kind == "head" else kept[layer.module]
                for key, layer in wanted.items()
            }

    def extract_each(
        self, waveforms: Sequence[Tensor], layers: Sequence[LayerKey]
    ) -> list[dict[LayerKey, Tensor]]:
        """Activations of sounds of any lengths, each as if it were alone, but faster together.

        Padding a batch to one length would change the numbers: from the second layer on, padded
        samples are no zeros but biases. So nothing is padded here.

        Shape:
            waveforms: `(samples,)` each
            returns for each sound what `extract` gives, `(1, channels, frames)` per layer

        Raises:
            ValueError: as `extract`, or waveforms of another shape.
        """
        if isinstance(layers, (str, int)):
            raise ValueError(f"layers must be a list, such as [{layers!r}]")
        wanted = {key: self.architecture.layer(key) for key in layers}
        for waveform in waveforms:
            if waveform.ndim != 1:
                raise ValueError(f"each waveform must be (samples,), not {tuple(waveform.shape)}")
        sounds = [self._checked(waveform, wanted.values()) for waveform in waveforms]
        if not all(x.device.type == "cpu" and self._engine_fits(x, wanted.values()) for x in sounds):
            return [self.extract(waveform, layers) for waveform in waveforms]
        made = engine.extract(self, [x[0, 0] for x in sounds], list(wanted.values()))
        return [{key: each[layer.name][None] for key, layer in wanted.items()} for each in made]

    def frame_times(self, layer: str | int, frames: int) -> Tensor:
        """When a layer's frames are: start, center and end in seconds of what each one sees.

        The times are not clipped to the sound: through padding the first frames start before 0.

        Shape:
            returns `(frames, 3)`, float64
        """
        g = self.architecture.layer(layer)
        start = g.start + g.stride * torch.arange(frames, dtype=torch.float64)
        times = torch.stack([start, start + g.receptive_field / 2, start + g.receptive_field], dim=1)
        return times / SAMPLE_RATE

    def edge_frames(self, layer: str | int, samples: int) -> int:
        """Count the edge frames at the end of a layer, see `Architecture.edge_frames`."""
        return self.architecture.edge_frames(layer, samples)

    def refresh(self) -> None:
        """Have the engine look at the parameters again.

        It notices whatever PyTorch counts, changed settings of batch norms, and changes behind PyTorch's
        back that reach one of some 64 values of each tensor that it looks at before each call, such as
        `weight.data.mul_(2)`. It cannot notice a single value that was changed in place through `.data`
        or NumPy: call this then.
        """
        engine.drop_engine(self)

    def _repr_html_(self) -> str:
        """For notebooks: the layers."""
        names = "layer", "channels", "stride (samples)", "stride (s)", "receptive field (s)"
        rows = ["".join(f"<th>{name}</th>" for name in names)]
        for name, layer in self.architecture.layers.items():
            stride, field = layer.stride / SAMPLE_RATE, layer.receptive_field / SAMPLE_RATE
            cells = name, f"{layer.channels:,}", f"{layer.stride:,}", f"{stride:.4f}", f"{field:.3f}"
            rows.append("".join(f"<td>{cell}</td>" for cell in cells))
        parameters = sum(p.numel() for p in self.parameters())
        caption = html.escape(f"{self.architecture.name}, {parameters:,} parameters")
        table = "".join(f"<tr>{row}</tr>" for row in rows)
        return f"<table><caption>{caption}</caption>{table}</table>"

    def _engine_fits(self, x: Tensor, layers: Iterable[Layer]) -> bool:
        """Whether the engine computes what the modules would: named layers, evaluation, no gradients."""
        return (
            self._as_made(x)
            and all(layer.is_layer for layer in layers)
            and not any(module.training for module in self.modules())
            and not (
                torch.is_grad_enabled()
                and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
            )
            and not any(p.is_inference() for p in self.parameters())  # changes to such are not counted
        )

    def _gradients_fit(self, x: Tensor, layers: Iterable[Layer]) -> bool:
        """Whether gradients.py computes what the modules would, with gradients or the batch's statistics."""
        on_cpu = x.device.type == "cpu"
        return self.fast_gradients and on_cpu and self._as_made(x) and gradients.fits(self, layers)

    def _as_made(self, x: Tensor) -> bool:
        """Whether the modules are as they were made, nobody listening to them or recording them."""
        modules = list(self.modules())
        table: list[Block | Head] = [*self.architecture.blocks, *self.architecture.heads]
        return (
            self.use_engine
            and not (torch.compiler.is_compiling() or torch._C._get_tracing_state())
            and not (_in_torch_func() or _has_global_hooks())
            and type(x) in (Tensor, nn.Parameter)
            and len(x) > 0
            and (type(self).trunk, type(self).head) == (SoundNet.trunk, SoundNet.head)
            and all(type(module) in (Convolution, nn.BatchNorm1d) for module in modules if module is not self)
            and not any(_has_hooks(module) for module in modules)
            and not any(
                module.running_mean is None or module.weight is None
                for module in modules
                if isinstance(module, nn.BatchNorm1d)
            )
            and all(
                isinstance(conv := getattr(self, row.name), Convolution)
                and (conv.stride, conv.padding, conv.dilation) == ((row.stride,), (row.padding,), (1,))
                for row in table
            )
            and not torch.is_autocast_enabled(x.device.type)
        )

    def _checked(self, waveform: Tensor, layers: Iterable[Layer]) -> Tensor:
        """The waveform as (batch, 1, samples), long enough for every layer asked for."""
        x = waveform
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"the waveform must be a float tensor within +-256, not {kind}")
        if x.ndim == 1:
            x = x[None, None]
        elif x.ndim == 2:
            x = x[:, None]
        elif x.ndim != 3 or x.shape[1] != 1:
            raise ValueError(
                "the waveform must be (samples,), (batch, samples) or (batch, 1, samples), "
                f"not {tuple(x.shape)}; SoundNet hears one channel"
            )
        self.architecture.check_length(x.shape[-1], layers)
        return x.to(next(self.parameters()).dtype)
