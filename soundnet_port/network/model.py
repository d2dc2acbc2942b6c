"""SoundNet for use: the plain modules, with layers by name and the engine behind them."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from soundnet_port.errors import TrainingModeWarning, warn_caller
from soundnet_port.network import engine, gradients
from soundnet_port.network.architecture import SAMPLE_RATE, Block, Head, Layer
from soundnet_port.network.engine_cache import drop_engine, get_engine
from soundnet_port.network.kernels.library import KernelError
from soundnet_port.network.modules import Convolution, has_hooks, list_tensors, runs_eagerly
from soundnet_port.network.plain import ClassLogits as ClassLogits
from soundnet_port.network.plain import Logits as Logits
from soundnet_port.network.plain import PlainSoundNet, collect_logits
from soundnet_port.network.precision import true_float32
from soundnet_port.network.waveform_scale import ScaleWatch, is_scale_known

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from 3.11

LayerKey = TypeVar("LayerKey", str, int, str | int)
_MODULES = (Convolution, nn.BatchNorm1d, nn.Linear)  # the last one is a pooled head


def _has_global_hooks() -> bool:
    return bool(nn.modules.module._has_any_global_hook())  # type: ignore[no-untyped-call]


class SoundNet(PlainSoundNet):
    """The network of Aytar, Vondrick and Torralba, NIPS 2016 (section 3), both depths.

    Each block is convolution -> batch norm -> ReLU (-> max pooling); the two heads are
    convolutions on the last block. The numbers are in architecture.py.

    In evaluation without gradients the engine (engine.py) computes named layers: the same numbers up to
    float32's rounding, several times as fast. With `use_engine = False`, on a model or on the class, the
    modules compute everything. For training loops `fast_gradients = True` opts in to gradients.py, which
    computes forward and backward passes on a CPU by matrix products; it has first derivatives only, calls no
    backward hooks and does not support `torch.func`.

    The first waveforms are compared with +-256 (see waveform_scale.py), with a `WaveformScaleWarning` if they
    look as if they were at another scale. `check_scale` is True until one has settled the question; False,
    on a model or on the class, prevents the check.

    Args:
        architecture: `SOUNDNET8`, `SOUNDNET5`, or one of them `.resized()` or `.with_classes()`.
        categories: names of the outputs by head (`"objects"`, `"scenes"`; `"classes"`), if they are known.
    """

    use_engine = True
    fast_gradients = False
    check_scale = True
    _scale_watch: ScaleWatch | None = None
    _warned_of_training_mode = False

    def train(self, mode: bool = True) -> Self:
        """Set training mode, or evaluation mode, as PyTorch does.

        With a `TrainingModeWarning`, once per model, where all parameters are frozen: batch norm then uses
        each batch's statistics, and every forward pass still changes the running ones.
        """
        super().train(mode)
        if mode and not self._warned_of_training_mode and self._only_statistics_change():
            self._warned_of_training_mode = True
            warn_caller(
                "SoundNet.train(): all parameters are frozen, but in training mode batch norm uses the "
                "batch's statistics, and every forward pass changes the running ones; call model.eval() for "
                "features, or model.requires_grad_(True) first to fine-tune",
                TrainingModeWarning,
            )
        return self

    def forward(self, waveform: Tensor) -> Logits | ClassLogits:
        """Compute the logits of both heads, or of the classes, for every head frame.

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
        if self.architecture.pooled_head:
            raise ValueError("these classes are of whole sounds, not of frames; use predict()")
        if not self.architecture.heads:
            raise ValueError("these weights have no heads; use extract() for the trunk's layers")
        return collect_logits(self.extract(waveform, [head.name for head in self.architecture.heads]))

    def extract(self, waveform: Tensor, layers: Sequence[LayerKey]) -> dict[LayerKey, Tensor]:
        """Compute the activations of any layers, no deeper than needed.

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
        x = self._check_waveform(waveform, wanted.values())
        self.watch_scale(waveform)
        outputs = self._compute(x, list(wanted.values()))
        return {key: outputs[layer.name] for key, layer in wanted.items()}

    def extract_each(
        self, waveforms: Sequence[Tensor], layers: Sequence[LayerKey]
    ) -> list[dict[LayerKey, Tensor]]:
        """Compute the activations of sounds of any lengths, each as if it were alone, but faster together.

        Nothing is padded to one length, which would change the numbers: from the second layer on, padded
        samples are no longer zeros but biases.

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
        inputs = [self._check_waveform(waveform, wanted.values()) for waveform in waveforms]
        on_cpu = all(x.device.type == "cpu" for x in inputs)
        if not (on_cpu and self._engine_fits(inputs, wanted.values())):
            return [self.extract(waveform, layers) for waveform in waveforms]
        for waveform in waveforms:
            self.watch_scale(waveform)
        sounds = engine.extract(get_engine(self), [x[0, 0] for x in inputs], list(wanted.values()))
        return [{key: sound[layer.name][None] for key, layer in wanted.items()} for sound in sounds]

    def frame_times(self, layer: str | int | None, frames: int) -> Tensor:
        """Return start, center and end in seconds of what each frame of a layer sees.

        The times are not clipped to the sound: through padding the first frames start before 0.

        Shape:
            returns `(frames, 3)`, float64
        """
        field = self.architecture.layer(layer)
        start = field.start + field.stride * torch.arange(frames, dtype=torch.float64)
        times = torch.stack([start, start + field.receptive_field / 2, start + field.receptive_field], dim=1)
        return times / SAMPLE_RATE

    def edge_frames(self, layer: str | int | None, samples: int) -> int:
        """Count the edge frames at the end of a layer, see `Architecture.edge_frames`."""
        return self.architecture.edge_frames(layer, samples)

    def watch_scale(self, waveform: Tensor, watch: ScaleWatch | None = None) -> None:
        """Compare a waveform with +-256 unless earlier ones were; `extract` and its relatives call this.

        Args:
            waveform: `(..., samples)`, float.
            watch: counts samples for itself, such as those of a stream.
        """
        if torch.compiler.is_compiling() or not self.check_scale or is_scale_known():
            return
        if watch is None:
            watch = self._scale_watch = self._scale_watch or ScaleWatch()
        if watch.settles(waveform):
            self.check_scale = False

    def refresh(self) -> None:
        """Make the engine read the parameters again.

        Call this after a single value was changed in place through `.data` or NumPy. All other
        changes it notices: what PyTorch counts, settings of batch norms, and changes behind PyTorch's back,
        such as `weight.data.mul_(2)`, that reach one of some 64 values of each tensor that it compares
        before each call.
        """
        drop_engine(self)

    def extra_repr(self) -> str:
        """Say what computes named layers in evaluation."""
        parameter = next(self.parameters(), None)
        if parameter is None or not self.use_engine:
            return "computed by the modules"
        try:
            return f"computed by {engine.describe_path(parameter)}"
        except KernelError as error:  # a repr never raises
            return str(error)

    def _repr_html_(self) -> str:
        """Show the layers in notebooks."""
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

    def _compute(self, x: Tensor, layers: Sequence[Layer]) -> dict[str, Tensor]:
        """Compute layers, (batch, channels, frames) by name, in the fastest way with the modules' numbers."""
        if self._engine_fits([x], layers):
            if x.device.type != "cpu":
                return engine.extract_by_convolution(get_engine(self), self, x, layers)
            sounds = engine.extract(get_engine(self), list(x[:, 0]), layers)
            if len(sounds) == 1:  # without another copy
                return {name: frames[None] for name, frames in sounds[0].items()}
            return {layer.name: torch.stack([sound[layer.name] for sound in sounds]) for layer in layers}
        if self._gradients_fit(x, layers):
            return gradients.extract(self, x, layers)
        deepest = max((layer.module for layer in layers), default=1)
        names = {layer.module: layer.name for layer in layers if layer.kind != "head"}
        outputs: dict[str, Tensor] = {}
        with true_float32(x.device) if not self.training else nullcontext():
            for number, output in self.trunk(x):
                x = output
                if number in names:
                    outputs[names[number]] = x
                if number == deepest:
                    break
            return outputs | {
                layer.name: self.head(layer.name, x) for layer in layers if layer.kind == "head"
            }

    def _only_statistics_change(self) -> bool:
        """Whether training mode changes batch norm's running statistics and nothing else."""
        return not any(parameter.requires_grad for parameter in self.parameters()) and any(
            module.track_running_stats for module in self.modules() if isinstance(module, nn.BatchNorm1d)
        )

    def _engine_fits(self, inputs: Sequence[Tensor], layers: Iterable[Layer]) -> bool:
        """Whether the engine computes what the modules would: named layers, evaluation, no gradients."""
        modules = list(self.modules())
        tensors = list_tensors(modules)
        return (
            self._modules_unchanged(inputs, modules)
            and all(layer.is_layer for layer in layers)
            and not any(module.training for module in modules)
            and not (torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, *tensors)))
            and not any(t.is_inference() for t in tensors)  # changes to such are not counted
        )

    def _gradients_fit(self, x: Tensor, layers: Iterable[Layer]) -> bool:
        """Whether gradients.py computes what the modules would, with gradients or the batch's statistics."""
        return (
            self.fast_gradients
            and x.device.type == "cpu"
            and self._modules_unchanged([x], list(self.modules()))
            and gradients.fits(self, layers)
        )

    def _modules_unchanged(self, inputs: Sequence[Tensor], modules: Sequence[nn.Module]) -> bool:
        """Whether the modules are those of the architecture, without hooks, tracing or transforms."""
        table: list[Block | Head] = [*self.architecture.blocks, *self.architecture.heads]
        return (
            self.use_engine
            and runs_eagerly()
            and not _has_global_hooks()
            and all(type(x) in (Tensor, nn.Parameter) and len(x) > 0 for x in inputs)
            and (type(self).trunk, type(self).head) == (SoundNet.trunk, SoundNet.head)
            and all(type(module) in _MODULES for module in modules if module is not self)
            and not any(has_hooks(module) for module in modules)
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
            and not any(torch.is_autocast_enabled(x.device.type) for x in inputs[:1])
        )

    def _check_waveform(self, waveform: Tensor, layers: Iterable[Layer]) -> Tensor:
        """Return the waveform as (batch, 1, samples), long enough for every layer."""
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
