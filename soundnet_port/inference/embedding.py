"""One feature vector for a whole clip."""

from __future__ import annotations

import os

from torch import Tensor

from soundnet_port.inference.activations import compute_activations
from soundnet_port.inference.pooling import POOLINGS
from soundnet_port.network.evaluation_mode import check_is_model
from soundnet_port.network.model import SoundNet


def embed(
    model: SoundNet,
    sound: str | os.PathLike[str] | Tensor,
    *,
    layer: str | int | None = None,
    pool: str = "mean",
    decoder: str = "auto",
    edge_frames: bool = False,
) -> Tensor:
    """Compute one vector for a clip: a layer's activations pooled over time.

    Args:
        model: any SoundNet; it is used in evaluation mode, whatever mode it is in.
        sound: a sound file, or a waveform of shape (samples,) at 22,050 Hz within +-256.
        layer: name, or Torch7's module number; by default pool5, which the paper's classifiers used, or
            with 5 layers conv4.
        pool: "mean", "max", "mean+std" or "mean+max+std" (one after the other; population std).
        decoder: of sound files, see `load_audio`.
        edge_frames: pool over edge frames, too (see `SoundNet.edge_frames`). They are excluded by
            default: in the released network a single one outweighs all other frames of conv7.

    Shape:
        returns `(statistics * channels,)`, such as `(2 * channels,)` for "mean+std"

    Raises:
        AudioError: the file cannot be used.
        ValueError: unknown layer or pooling, or the clip is too short for the layer, or for an ordinary
            frame of it; clips are never repeated.
    """
    if pool not in POOLINGS:
        raise ValueError(f"unknown pooling {pool!r}; choose from {', '.join(POOLINGS)}")
    check_is_model(model)
    key = model.architecture.default_layer if layer is None else layer
    clip = compute_activations(model, sound, [key], decoder=decoder, pool=pool, edge_frames=edge_frames)
    return clip.activations[key]
