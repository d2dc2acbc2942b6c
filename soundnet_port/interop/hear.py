"""SoundNet for HEAR, the Holistic Evaluation of Audio Representations (NeurIPS 2021 competition track).

The module itself is what the benchmark's programs take: `hear-validator soundnet_port.interop.hear`, and
`python3 -m heareval.embeddings.runner soundnet_port.interop.hear`. The interface is that of
https://hearbenchmark.com/hear-api.html; keyword arguments of `load_model` beyond it choose layers.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from soundnet_port.audio.loading import LOUDEST
from soundnet_port.inference.pooling import POOLINGS, Pooling
from soundnet_port.network.architecture import FULL_SCALE, SAMPLE_RATE, Layer
from soundnet_port.network.engine import BLOCK
from soundnet_port.network.evaluation_mode import evaluation_mode
from soundnet_port.network.model import SoundNet
from soundnet_port.network.streaming import stream
from soundnet_port.pretrained import load_pretrained

DEFAULT_WEIGHTS = "soundnet8"


class HearModel(nn.Module):
    """A network and the layers that its embeddings come from; made by `load_model`.

    Attributes:
        network: the SoundNet.
        sample_rate: of the sounds that it takes, in Hz.
        timestamp_embedding_size: numbers in the embedding of a moment.
        scene_embedding_size: numbers in the embedding of a whole sound.
        edge_frames: whether embeddings are of edge frames, too.
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
        self.timestamp_layer = _layer(network, timestamp_layer)
        self.scene_layer = _layer(network, scene_layer)
        self.scene_pool = scene_pool
        self.edge_frames = edge_frames
        self.timestamp_embedding_size = self.timestamp_layer.channels
        self.scene_embedding_size = self.scene_layer.channels * (2 if scene_pool == "mean+std" else 1)


def load_model(
    model_file_path: str | os.PathLike[str] = "",
    *,
    timestamp_layer: str | int | None = None,
    scene_layer: str | int | None = None,
    scene_pool: str = "mean",
    edge_frames: bool = False,
) -> HearModel:
    """A model for the two functions below, on the CPU; `.to(device)` moves it.

    Args:
        model_file_path: weights as for `load_pretrained`, a name or a path; "" is "soundnet8".
        timestamp_layer: layer of the timestamp embeddings, such as "conv4"; by default pool5, or
            with 5 layers conv4.
        scene_layer: layer of the scene embeddings; the same default.
        scene_pool: over time, for scenes: "mean", "max" or "mean+std" (both, at twice the size).
        edge_frames: take in edge frames, too (see `SoundNet.edge_frames`). They are left out by default,
            but of sounds that have no others.

    Raises:
        WeightsError: no such weights; the message says how to get them.
        ValueError: unknown layer or pooling.
    """
    network = load_pretrained(model_file_path or DEFAULT_WEIGHTS)
    return HearModel(network, timestamp_layer, scene_layer, scene_pool, edge_frames)


def get_timestamp_embeddings(audio: Tensor, model: HearModel) -> tuple[Tensor, Tensor]:
    """A layer's frames, and the moments that they are centered on.

    These are the network's frames but for edge frames (see `load_model`) and for those that are centered
    before the sound or after it (through padding, they see a part of it). A sound in which no frame is
    centered, shorter than some 0.1 s with pool5, has one all the same, the nearest; its time is then
    clipped to the sound. A sound too short for a frame is filled up with silence at its end.

    Args:
        audio: mono sounds at 22,050 Hz within [-1, 1], of one length, on any device.
        model: from `load_model`; it computes where it is, in evaluation mode, without gradients.

    Shape:
        - audio: `(sounds, samples)`
        - returns embeddings `(sounds, frames, model.timestamp_embedding_size)`, float32, and their
          times in ms `(sounds, frames)`, float32, on the audio's device

    Raises:
        ValueError: audio of another shape or type, empty, far louder than [-1, 1], or not finite.
    """
    frames = _heard(audio, model, model.timestamp_layer, "none")
    seconds = audio.shape[1] / SAMPLE_RATE
    centers = model.network.frame_times(model.timestamp_layer.name, frames.shape[1])[:, 1]
    inside = (centers >= 0) & (centers <= seconds)
    if not inside.any():
        inside[torch.argmin((centers - seconds / 2).abs())] = True
    times = (centers[inside].clamp(0, seconds) * 1000).float()
    return frames[:, inside].to(audio.device), times.to(audio.device).repeat(len(audio), 1)


def get_scene_embeddings(audio: Tensor, model: HearModel) -> Tensor:
    """A vector for each sound: a layer's frames, pooled over time, as `embed` does.

    Edge frames are left out, unless the model takes them in or the sound has no others (where `embed`
    raises an error).

    Args:
        audio: as for `get_timestamp_embeddings`, as short as one likes.
        model: from `load_model`.

    Shape:
        - audio: `(sounds, samples)`
        - returns `(sounds, model.scene_embedding_size)`, float32, on the audio's device

    Raises:
        ValueError: as `get_timestamp_embeddings`.
    """
    return _heard(audio, model, model.scene_layer, model.scene_pool).to(audio.device)


def _layer(network: SoundNet, key: str | int | None) -> Layer:
    layer = network.architecture.layer(network.architecture.default_layer if key is None else key)
    if not layer.is_layer:
        raise ValueError(
            f"{layer.name} is inside a layer; choose from {', '.join(network.architecture.layers)}"
        )
    return layer


def _heard(audio: Tensor, model: HearModel, layer: Layer, pool: str) -> Tensor:
    """Each sound's frames or, pooled, its vector, on the CPU: (sounds, frames, channels) or (sounds, size).

    Never more than a block at once, so that 20 minutes need no more memory than 95 s do.
    """
    if not isinstance(audio, Tensor) or not audio.is_floating_point() or audio.ndim != 2:
        shape = f"{audio.dtype} {tuple(audio.shape)}" if isinstance(audio, Tensor) else type(audio).__name__
        raise ValueError(f"audio must be a float tensor (sounds, samples) within [-1, 1], not {shape}")
    if not audio.numel():
        raise ValueError(f"audio of shape {tuple(audio.shape)} holds no sound")
    samples = max(audio.shape[1], layer.shortest)
    dropped = 0 if model.edge_frames else model.network.edge_frames(layer.name, samples)
    if dropped == model.network.architecture.frames(layer.name, samples):  # any length must give a frame
        dropped = 0
    made = []
    with evaluation_mode(model.network):
        if samples <= BLOCK:
            for group in torch.split(audio, BLOCK // samples):
                waves = F.pad(_scaled(group, model), (0, samples - audio.shape[1]))
                for frames in model.network.extract(waves, [layer.name])[layer.name]:
                    made.append(Pooling(pool))
                    made[-1].add(frames.T[: frames.shape[1] - dropped].cpu())
        else:
            for sound in audio:
                made.append(Pooling(pool))
                listening = stream(model.network, [layer.name])
                for block in torch.split(sound, BLOCK):
                    made[-1].add(listening.push(_scaled(block, model))[layer.name][0].T.cpu())
                last = listening.finish()[layer.name][0].T  # edge frames are among these
                made[-1].add(last[: len(last) - dropped].cpu())
    return torch.stack([each.result() for each in made])


def _scaled(audio: Tensor, model: HearModel) -> Tensor:
    """Audio within [-1, 1] as the network wants it: within +-256, where it is."""
    loudest = float(audio.abs().max())
    if not loudest <= LOUDEST:  # NaN too
        what = "holds NaN or infinite samples" if not loudest < torch.inf else f"goes up to {loudest:g}"
        raise ValueError(f"audio must be within [-1, 1]; it {what}")
    return audio.float().to(next(model.parameters()).device) * FULL_SCALE
