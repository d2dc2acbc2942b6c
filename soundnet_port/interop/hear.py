"""SoundNet for HEAR, the Holistic Evaluation of Audio Representations (NeurIPS 2021 competition track).

The benchmark's programs take this module: `hear-validator soundnet_port.hear`, and
`python3 -m heareval.embeddings.runner soundnet_port.hear`. It follows
https://hearbenchmark.com/hear-api.html; additional keyword arguments of `load_model` choose layers.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from soundnet_port.inference.pooling import POOLINGS, Pooling, count_statistics
from soundnet_port.network.architecture import FULL_SCALE, SAMPLE_RATE, Layer
from soundnet_port.network.engine import BLOCK
from soundnet_port.network.evaluation_mode import evaluation_mode
from soundnet_port.network.model import SoundNet
from soundnet_port.network.streaming import stream
from soundnet_port.network.waveform_scale import LOUDEST
from soundnet_port.pretrained import load_pretrained

DEFAULT_WEIGHTS = "soundnet8"


class HearModel(nn.Module):
    """A network and the layers of its embeddings; see `load_model`.

    Attributes:
        network: the SoundNet.
        sample_rate: of the input, in Hz.
        timestamp_embedding_size: size of a frame's embedding.
        scene_embedding_size: size of a sound's embedding.
        edge_frames: whether edge frames are included.
    """

    sample_rate: int = SAMPLE_RATE

    def __init__(
        self,
        network: SoundNet,
        timestamp_layer: str | int | None = None,
        scene_layer: str | int | None = None,
        scene_pool: str = "mean",
        edge_frames: bool = False,
    ) -> None:
        super().__init__()
        if scene_pool not in POOLINGS:
            raise ValueError(f"unknown pooling {scene_pool!r}; choose from {', '.join(POOLINGS)}")
        self.network = network
        self.timestamp_layer = _resolve_layer(network, timestamp_layer)
        self.scene_layer = _resolve_layer(network, scene_layer)
        self.scene_pool = scene_pool
        self.edge_frames = edge_frames
        self.timestamp_embedding_size = self.timestamp_layer.channels
        self.scene_embedding_size = self.scene_layer.channels * count_statistics(scene_pool)


def load_model(
    model_file_path: str | os.PathLike[str] = "",
    *,
    timestamp_layer: str | int | None = None,
    scene_layer: str | int | None = None,
    scene_pool: str = "mean",
    edge_frames: bool = False,
) -> HearModel:
    """Load a model for the two functions below, on the CPU; `.to(device)` moves it.

    Args:
        model_file_path: weights as for `load_pretrained`, a name or a path; "" is "soundnet8".
        timestamp_layer: layer of the timestamp embeddings, such as "conv4"; by default pool5, with 5
            layers conv4.
        scene_layer: layer of the scene embeddings; the same default.
        scene_pool: pooling over time for scenes: "mean", "max", "mean+std" or "mean+max+std" (concatenated).
        edge_frames: include edge frames (see `SoundNet.edge_frames`). By default they are left out, except
            for sounds that have no other frames.

    Raises:
        WeightsError: no such weights.
        ValueError: unknown layer or pooling.
    """
    network = load_pretrained(model_file_path or DEFAULT_WEIGHTS)
    return HearModel(network, timestamp_layer, scene_layer, scene_pool, edge_frames)


def get_timestamp_embeddings(audio: Tensor, model: HearModel) -> tuple[Tensor, Tensor]:
    """Compute a layer's frames, and the times of their centers.

    Left out are edge frames (see `load_model`), and frames whose center lies outside the sound, in the
    padding. If no center lies inside (sounds shorter than about 0.1 s with pool5), the nearest frame is
    returned, with its time clipped to the sound. A sound too short for a frame is padded with zeros at its
    end.

    Args:
        audio: mono sounds at 22,050 Hz within [-1, 1], of the same length, on any device.
        model: from `load_model`; it computes on its own device, in eval mode, without gradients.

    Shape:
        - audio: `(sounds, samples)`
        - returns embeddings `(sounds, frames, model.timestamp_embedding_size)`, float32, and their
          times in ms `(sounds, frames)`, float32, on the audio's device

    Raises:
        ValueError: audio of another shape or type, empty, far beyond [-1, 1], or not finite.
    """
    frames = _compute_embeddings(audio, model, model.timestamp_layer, "none")
    seconds = audio.shape[1] / SAMPLE_RATE
    centers = model.network.frame_times(model.timestamp_layer.name, frames.shape[1])[:, 1]
    inside = (centers >= 0) & (centers <= seconds)
    if not inside.any():
        inside[torch.argmin((centers - seconds / 2).abs())] = True
    times = (centers[inside].clamp(0, seconds) * 1000).float()
    return frames[:, inside].to(audio.device), times.to(audio.device).repeat(len(audio), 1)


def get_scene_embeddings(audio: Tensor, model: HearModel) -> Tensor:
    """Compute a vector for each sound: a layer's frames, pooled over time, as `embed` does.

    Edge frames are left out, unless the model includes them or the sound has no others (where `embed` raises
    an error).

    Args:
        audio: as for `get_timestamp_embeddings`, of any length.
        model: from `load_model`.

    Shape:
        - audio: `(sounds, samples)`
        - returns `(sounds, model.scene_embedding_size)`, float32, on the audio's device

    Raises:
        ValueError: as `get_timestamp_embeddings`.
    """
    return _compute_embeddings(audio, model, model.scene_layer, model.scene_pool).to(audio.device)


def _resolve_layer(network: SoundNet, key: str | int | None) -> Layer:
    layer = network.architecture.layer(network.architecture.default_layer if key is None else key)
    if not layer.is_layer:
        raise ValueError(
            f"{layer.name} is inside a layer; choose from {', '.join(network.architecture.layers)}"
        )
    return layer


def _compute_embeddings(audio: Tensor, model: HearModel, layer: Layer, pool: str) -> Tensor:
    """Compute frames `(sounds, frames, channels)` or pooled vectors `(sounds, size)`, on the CPU.

    Never more than a block at once, so that 20 minutes need no more memory than 95 s.
    """
    if not isinstance(audio, Tensor) or not audio.is_floating_point() or audio.ndim != 2:
        shape = f"{audio.dtype} {tuple(audio.shape)}" if isinstance(audio, Tensor) else type(audio).__name__
        raise ValueError(f"audio must be a float tensor (sounds, samples) within [-1, 1], not {shape}")
    if not audio.numel():
        raise ValueError(f"audio of shape {tuple(audio.shape)} is empty")
    samples = max(audio.shape[1], layer.shortest)
    dropped = 0 if model.edge_frames else model.network.edge_frames(layer.name, samples)
    if dropped == model.network.architecture.frames(layer.name, samples):  # HEAR wants a frame for any length
        dropped = 0
    poolings = []
    with evaluation_mode(model.network):
        if samples <= BLOCK:
            for group in torch.split(audio, BLOCK // samples):
                waves = F.pad(_scale(group, model), (0, samples - audio.shape[1]))
                for frames in model.network.extract(waves, [layer.name])[layer.name]:
                    poolings.append(Pooling(pool))
                    poolings[-1].add(frames.T[: frames.shape[1] - dropped].cpu())
        else:
            for sound in audio:
                poolings.append(Pooling(pool))
                frames_stream = stream(model.network, [layer.name])
                for block in torch.split(sound, BLOCK):
                    poolings[-1].add(frames_stream.push(_scale(block, model))[layer.name][0].T.cpu())
                last = frames_stream.finish()[layer.name][0].T  # includes the edge frames
                poolings[-1].add(last[: len(last) - dropped].cpu())
    return torch.stack([pooling.result() for pooling in poolings])


def _scale(audio: Tensor, model: HearModel) -> Tensor:
    """Scale audio from [-1, 1] to +-256, on the network's device."""
    peak = float(audio.abs().max())
    if not peak <= LOUDEST:  # also true for NaN
        problem = "holds NaN or infinite samples" if not peak < torch.inf else f"goes up to {peak:g}"
        raise ValueError(f"audio must be within [-1, 1]; it {problem}")
    return audio.float().to(next(model.parameters()).device) * FULL_SCALE
