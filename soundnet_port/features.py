"""Features of whole clips, and the original's own output files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from soundnet_port.audio import read_sound
from soundnet_port.model import SoundNet
from soundnet_port.weights import written_aside

if TYPE_CHECKING:
    from soundnet_port.prediction import Prediction

POOLINGS = ("mean", "max", "mean+std")


def embed(
    model: SoundNet,
    sound: str | os.PathLike[str] | Tensor,
    *,
    layer: str | int = "pool5",
    pool: str = "mean",
    decoder: str = "auto",
) -> Tensor:
    """One vector for a clip: a layer's activations pooled over time.

    Args:
        model: any SoundNet; it is used in evaluation mode, whatever mode it is in.
        sound: a sound file, or a waveform of shape (samples,) at 22,050 Hz within +-256.
        layer: name, or Torch7's module number. The paper's classifiers used pool5.
        pool: "mean", "max", or "mean+std" (both, one after the other; population std).
        decoder: of sound files, see `load_audio`.

    Shape:
        returns `(channels,)`, or `(2 * channels,)` for "mean+std"

    Raises:
        AudioError: the file cannot be used.
        ValueError: unknown layer or pooling, or the clip is too short for the layer; embed never
            repeats clips.
    """
    if pool not in POOLINGS:
        raise ValueError(f"unknown pooling {pool!r}; choose from {', '.join(POOLINGS)}")
    frames = features(model, sound, layer, decoder=decoder)
    if pool == "mean":
        return frames.mean(1)
    if pool == "max":
        return frames.amax(1)
    return torch.cat([frames.mean(1), frames.std(1, correction=0)])


def features(
    model: SoundNet, sound: str | os.PathLike[str] | Tensor, layer: str | int, *, decoder: str = "auto"
) -> Tensor:
    """A layer's activations for one clip, (channels, frames) on the CPU; see `embed`."""
    waveform, _ = as_clip(sound, decoder)
    with evaluating(model):
        made = model.extract(waveform.to(next(model.parameters()).device), [layer])[layer]
    return made[0].float().cpu()


def as_clip(sound: str | os.PathLike[str] | Tensor, decoder: str) -> tuple[Tensor, str | None]:
    """(waveform, the decoder that read it) of a path or a waveform, checked to be a clip.

    Raises:
        AudioError: the file cannot be used.
        ValueError: not a (samples,) tensor of finite values, or an empty one.
    """
    ran = None
    if isinstance(sound, (str, os.PathLike)):
        loaded = read_sound(sound, decoder=decoder)
        sound, ran = loaded.waveform, loaded.decoder
    if not isinstance(sound, Tensor):
        raise ValueError(f"the sound must be a path or a tensor, not {type(sound).__name__}")
    if sound.ndim != 1 or not len(sound):
        raise ValueError(f"the waveform must be (samples,) and not empty, not {tuple(sound.shape)}")
    if not bool(torch.isfinite(sound).all()):
        raise ValueError("the waveform holds NaN or infinite samples")
    return sound, ran


@contextmanager
def evaluating(model: SoundNet) -> Iterator[None]:
    """The model in evaluation mode and without gradients, and each module afterwards as before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


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
        import h5py
    except ImportError:
        raise ValueError("HDF5 files need the extra [hdf5]: pip install 'soundnet-port[hdf5]'") from None
    try:
        with written_aside(path) as aside, h5py.File(aside, "w") as file:
            group: Any = file
            for name, values in datasets.items():
                group.create_dataset(name, data=values.numpy())
    except OSError as error:  # ends this file, not a whole batch of them
        raise ValueError(f"{path}: cannot be written ({error.strerror or error})") from None
