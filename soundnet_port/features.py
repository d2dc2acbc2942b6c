"""Features of whole clips, and the original's own output files."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from soundnet_port.audio import open_sound
from soundnet_port.engine import BLOCK
from soundnet_port.loudness import LevelMeter, level, normalize
from soundnet_port.model import SoundNet
from soundnet_port.outputs import save_h5
from soundnet_port.streaming import stream, streamable
from soundnet_port.weights import written_aside

if TYPE_CHECKING:
    from soundnet_port.prediction import Prediction

POOLINGS = ("mean", "max", "mean+std")
_POOLED_FRAMES = 1 << 13  # in float64 at a time


def embed(
    model: SoundNet,
    sound: str | os.PathLike[str] | Tensor,
    *,
    layer: str | int | None = None,
    pool: str = "mean",
    decoder: str = "auto",
    edge_frames: bool = False,
) -> Tensor:
    """One vector for a clip: a layer's activations pooled over time.

    Args:
        model: any SoundNet; it is used in evaluation mode, whatever mode it is in.
        sound: a sound file, or a waveform of shape (samples,) at 22,050 Hz within +-256.
        layer: name, or Torch7's module number; by default what the paper's classifiers used, pool5, or
            with 5 layers conv4.
        pool: "mean", "max", or "mean+std" (both, one after the other; population std).
        decoder: of sound files, see `load_audio`.
        edge_frames: pool over edge frames, too (see `SoundNet.edge_frames`). They are left out by
            default: in the released network a single one outweighs all other frames of conv7.

    Shape:
        returns `(channels,)`, or `(2 * channels,)` for "mean+std"

    Raises:
        AudioError: the file cannot be used.
        ValueError: unknown layer or pooling, or the clip is too short for the layer, or leaves it
            nothing but edge frames; embed never repeats clips.
    """
    if pool not in POOLINGS:
        raise ValueError(f"unknown pooling {pool!r}; choose from {', '.join(POOLINGS)}")
    expect_network(model)
    key = model.architecture.usual_layer if layer is None else layer
    clip = heard(model, sound, [key], decoder=decoder, pool=pool, edge_frames=edge_frames)
    return clip.activations[key]


def features(
    model: SoundNet, sound: str | os.PathLike[str] | Tensor, layer: str | int, *, decoder: str = "auto"
) -> Tensor:
    """A layer's activations for one clip, all of them, (channels, frames) on the CPU; see `embed`."""
    return heard(model, sound, [layer], decoder=decoder).activations[layer].T


@dataclass(frozen=True)
class Heard:
    """A sound's activations, float32 on the CPU, (frames, channels) or pooled; and what was heard."""

    activations: dict[str | int, Tensor]
    samples: int
    repeats: int
    decoder: str | None
    level: float = math.nan  #: as it was given, of the loudest second, in dB of full scale


def heard(
    model: SoundNet,
    sound: str | os.PathLike[str] | Tensor,
    layers: Sequence[str | int],
    *,
    decoder: str = "auto",
    pool: str = "none",
    least: int = 1,
    edge_frames: bool = True,
    normalized: bool = False,
) -> Heard:
    """Layers of a file or waveform, in evaluation; a long file takes the memory of a block.

    Args:
        pool: over time, as for `embed`, or "none".
        least: a shorter sound is repeated a whole number of times to reach so many samples.
        edge_frames: whether they are among the frames (see `SoundNet.edge_frames`).
        normalized: bring the sound to a certain level first (see loudness.py), which takes it whole.

    Raises:
        AudioError: the file cannot be used.
        ValueError: not a (samples,) tensor of finite values, or an empty one; unknown layer, or the
            sound is too short, or leaves a layer nothing but edge frames that are not wanted.
    """
    ran = None
    expect_network(model)
    with evaluating(model), ExitStack() as stack:
        if isinstance(sound, (str, os.PathLike)):
            opened = stack.enter_context(open_sound(sound, decoder=decoder))
            ran, blocks = opened.decoder, opened.blocks(BLOCK)
            sound, more = next(blocks), next(blocks, None)
            if more is not None and model.use_engine and streamable(model, layers) and not normalized:
                return _streamed(model, layers, chain([sound, more], blocks), pool, ran, edge_frames)
            if more is not None:
                sound = torch.cat([sound, more, *blocks])
        elif not isinstance(sound, Tensor):
            raise ValueError(f"the sound must be a path or a tensor, not {type(sound).__name__}")
        if sound.ndim != 1 or not len(sound):
            raise ValueError(f"the waveform must be (samples,) and not empty, not {tuple(sound.shape)}")
        if not sound.is_floating_point():
            raise ValueError(f"the waveform must be a float tensor within +-256, not {sound.dtype}")
        if not bool(torch.isfinite(sound).all()):
            raise ValueError("the waveform holds NaN or infinite samples")
        loudness = level(sound)
        if normalized:
            sound = normalize(sound)
        repeats = max(1, math.ceil(least / len(sound)))
        wave = sound.to(next(model.parameters()).device).repeat(repeats)
        made = model.extract(wave, layers)
    pooled = {key: Pooling(pool) for key in layers}
    dropped = dropped_frames(model, layers, len(wave), edge_frames)
    for key, each in made.items():
        pooled[key].add(each[0].T[: each.shape[-1] - dropped[key]].cpu())
    return Heard({key: each.result() for key, each in pooled.items()}, len(sound), repeats, ran, loudness)


def _streamed(
    model: SoundNet,
    layers: Sequence[str | int],
    blocks: Iterator[Tensor],
    pool: str,
    ran: str,
    edge_frames: bool,
) -> Heard:
    listening, samples, meter = stream(model, layers), 0, LevelMeter()
    pooled = {key: Pooling(pool) for key in layers}
    for block in blocks:
        samples += len(block)
        meter.add(block)
        for key, frames in listening.push(block).items():
            pooled[key].add(frames[0].T.cpu())
    dropped = dropped_frames(model, layers, samples, edge_frames)
    for key, frames in listening.finish().items():  # edge frames are among these
        pooled[key].add(frames[0].T[: frames.shape[-1] - dropped[key]].cpu())
    return Heard({key: each.result() for key, each in pooled.items()}, samples, 1, ran, meter.level)


def dropped_frames(
    model: SoundNet, layers: Sequence[str | int], samples: int, edge_frames: bool
) -> dict[str | int, int]:
    """How many frames at the end of each layer are left out: its edge frames, unless they are wanted.

    Raises:
        ValueError: nothing would be left of a layer; the message says how long the sound must be.
    """
    if edge_frames:
        return dict.fromkeys(layers, 0)
    model.architecture.check_ordinary(samples, [model.architecture.layer(key) for key in layers])
    return {key: model.edge_frames(key, samples) for key in layers}


class Pooling:
    """All frames ("none"), their mean, their maximum, or mean and population std ("mean+std").

    "peak", for units.py alone, is "max" that knows the first frame in which each channel has it.

    Frames may come bit by bit. Means are taken in float64, by Chan, Golub and LeVeque's formula for
    the mean and the squared deviations of two sets together.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._kept: list[Tensor] = []
        self._count = 0
        self._largest = torch.tensor(-torch.inf)
        self.peaks = torch.tensor(0)  #: frames of "peak", (channels,)
        self._mean = self._squares = torch.zeros((), dtype=torch.float64)

    def add(self, frames: Tensor) -> None:
        """More frames, (frames, channels)."""
        if self.kind == "none":
            self._kept.append(frames)
            return
        if not len(frames):
            return
        for some in torch.split(frames, _POOLED_FRAMES):
            if self.kind == "max":
                self._largest = torch.maximum(self._largest, some.amax(0))
                continue
            if self.kind == "peak":
                values, frames = some.max(0)
                self.peaks = torch.where(values > self._largest, frames + self._count, self.peaks)
                self._largest = torch.maximum(self._largest, values)
                self._count += len(some)
                continue
            values = some.double()
            mean = values.mean(0)
            apart, total = mean - self._mean, self._count + len(some)
            self._mean = self._mean + apart * (len(some) / total)
            self._squares = self._squares + (values - mean).square().sum(0)
            self._squares = self._squares + apart.square() * (self._count * len(some) / total)
            self._count = total

    def result(self) -> Tensor:
        """Float32, (channels,), (2 * channels,) for "mean+std", (frames, channels) for "none".

        Raises:
            ValueError: NaN or infinite activations.
        """
        if self.kind == "none":
            made = torch.cat(self._kept)
        elif self.kind in ("max", "peak"):
            made = self._largest
        elif self.kind == "mean":
            made = self._mean
        else:
            made = torch.cat([self._mean, (self._squares / self._count).sqrt()])
        check_finite(made)
        return made.float()


def check_finite(activations: Tensor) -> None:
    """Raises a ValueError for NaN or infinite activations."""
    if not bool(torch.isfinite(activations).all()):
        raise ValueError(
            "its activations are too large for the network's number type; take float32 or bfloat16"
        )


def expect_network(model: object) -> None:
    """Raises ValueError where weights' or a sound's name stands in a network's place."""
    if isinstance(model, (str, os.PathLike)):
        raise ValueError(
            f"the first argument must be a network, such as load_pretrained gives, not {os.fspath(model)!r}"
        )


@contextmanager
def evaluating(model: SoundNet) -> Iterator[None]:
    """The model in evaluation mode and without gradients, and each module afterwards as before.

    Of several threads that are inside at once the first one changes the modes, the last one puts them back.
    """
    with _modes_lock:
        modes, inside = _modes.get(model, ([], 0))
        if not inside:
            modes = [(module, module.training) for module in model.modules()]
            model.eval()
        _modes[model] = modes, inside + 1
    try:
        with torch.no_grad():
            yield
    finally:
        with _modes_lock:
            modes, inside = _modes.pop(model)
            if inside > 1:
                _modes[model] = modes, inside - 1
            else:
                for module, mode in modes:
                    module.training = mode


_modes: weakref.WeakKeyDictionary[SoundNet, tuple[list[tuple[nn.Module, bool]], int]]
_modes = weakref.WeakKeyDictionary()
_modes_lock = Lock()


def write_torch7_features(sound: str | os.PathLike[str], number: int, frames: Tensor) -> Path:
    """Writes what extract_feat.lua wrote: `<sound>.soundnet.h5` with the dataset `layer<N>`.

    Args:
        sound: the sound file's path; the result lies beside it.
        number: Torch7's module number.
        frames: (channels, frames); squeezed in the file, so one frame gives just (channels,).
    """
    path = torch7_path(sound, "soundnet")
    _write_h5(path, {f"layer{number}": frames.squeeze()})
    return path


def write_torch7_prediction(sound: str | os.PathLike[str], prediction: Prediction) -> Path:
    """Writes what extract_predictions.lua wrote: `<sound>.soundnet_categories.h5`.

    Datasets `object` (1, 1000, frames, 1) and `scene` (1, 401, frames, 1): probabilities.
    """
    path = torch7_path(sound, "soundnet_categories")
    _write_h5(
        path,
        {
            "object": prediction.object_probabilities[None, :, :, None],
            "scene": prediction.scene_probabilities[None, :, :, None],
        },
    )
    return path


def torch7_path(sound: str | os.PathLike[str], kind: str) -> Path:
    """Where the original's script puts its result: its suffix comes after the sound's own."""
    return Path(f"{os.fspath(sound)}.{kind}.h5")


def _write_h5(path: Path, datasets: dict[str, Tensor]) -> None:
    try:
        import h5py  # noqa: F401
    except ImportError:
        raise ValueError("HDF5 files need the extra [hdf5]: pip install 'soundnet-port[hdf5]'") from None
    try:
        with written_aside(path) as aside:
            save_h5(aside, [(name, values.numpy()) for name, values in datasets.items()], {})
    except OSError as error:  # ends this file, not a whole batch of them
        raise ValueError(f"{path}: cannot be written ({error.strerror or error})") from None
