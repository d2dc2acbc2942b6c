"""Layers of one sound, a file or a waveform; long files take the memory of a block."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from soundnet_port.audio.loading import open_sound
from soundnet_port.audio.loudness import LevelMeter, level, normalize
from soundnet_port.inference.pooling import Pooling
from soundnet_port.network.engine import BLOCK
from soundnet_port.network.evaluation_mode import check_is_model, evaluation_mode
from soundnet_port.network.model import SoundNet
from soundnet_port.network.streaming import stream, streamable


def features(
    model: SoundNet,
    sound: str | os.PathLike[str] | Tensor,
    layer: str | int | None = None,
    *,
    decoder: str = "auto",
) -> Tensor:
    """Compute all of a layer's activations for one clip, edge frames included; see `embed`.

    Shape:
        returns `(channels, frames)`, on the CPU
    """
    check_is_model(model)
    key = model.architecture.default_layer if layer is None else layer
    return compute_activations(model, sound, [key], decoder=decoder).activations[key].T


@dataclass(frozen=True)
class LayerActivations:
    """The activations of one sound, and how they were computed.

    Attributes:
        activations: by layer, float32 on the CPU, (frames, channels), or pooled as `Pooling` does.
        samples: length of the sound as it was given.
        repeats: how often it was played in a row.
        decoder: which one read the file; None for a waveform.
        level: RMS of its loudest second as it was given, in dB of full scale.
    """

    activations: dict[str | int, Tensor]
    samples: int
    repeats: int
    decoder: str | None
    level: float = math.nan


def compute_activations(
    model: SoundNet,
    sound: str | os.PathLike[str] | Tensor,
    layers: Sequence[str | int],
    *,
    decoder: str = "auto",
    pool: str = "none",
    least: int = 1,
    edge_frames: bool = True,
    normalized: bool = False,
) -> LayerActivations:
    """Compute layers of a file or waveform in evaluation mode; long files are processed in blocks.

    Args:
        model: any SoundNet.
        sound: a sound file, or a waveform of shape (samples,) at 22,050 Hz within +-256.
        layers: names, or Torch7's module numbers.
        decoder: of sound files, see `load_audio`.
        pool: over time, as for `embed`, or "none".
        least: samples; a shorter sound is repeated a whole number of times to reach them.
        edge_frames: whether to include edge frames (see `SoundNet.edge_frames`).
        normalized: bring the sound to a certain level first (see loudness.py), which holds it in memory.
            A waveform's scale is then of no importance, and not checked.

    Raises:
        AudioError: the file cannot be used.
        ValueError: the waveform is not (samples,), empty, or not finite; a layer is unknown, or the
            sound too short for it, or for an ordinary frame of it where edge frames are excluded.
    """
    used_decoder = None
    check_is_model(model)
    if isinstance(sound, Tensor):
        check_waveform(sound)
        if not normalized:
            model.watch_scale(sound)
    with evaluation_mode(model), ExitStack() as stack:
        if isinstance(sound, (str, os.PathLike)):
            reader = stack.enter_context(open_sound(sound, decoder=decoder))
            used_decoder, blocks = reader.decoder, reader.blocks(BLOCK)
            sound, second = next(blocks), next(blocks, None)
            if second is not None and model.use_engine and streamable(model, layers) and not normalized:
                blocks = chain([sound, second], blocks)
                return _stream_blocks(model, layers, blocks, pool, used_decoder, edge_frames)
            if second is not None:
                sound = torch.cat([sound, second, *blocks])
        elif not isinstance(sound, Tensor):
            raise ValueError(f"the sound must be a path or a tensor, not {type(sound).__name__}")
        loudness = level(sound)
        if normalized:
            sound = normalize(sound)
        repeats = max(1, math.ceil(least / len(sound)))
        waveform = sound.to(next(model.parameters()).device).repeat(repeats)
        outputs = model.extract(waveform, layers)
    pools = {key: Pooling(pool) for key in layers}
    dropped = count_dropped_frames(model, layers, len(waveform), edge_frames)
    for key, frames in outputs.items():
        pools[key].add(frames[0].T[: frames.shape[-1] - dropped[key]].cpu())
    activations = {key: pooling.result() for key, pooling in pools.items()}
    return LayerActivations(activations, len(sound), repeats, used_decoder, loudness)


def check_waveform(sound: Tensor) -> None:
    """Check that a waveform is (samples,), not empty, and finite.

    Raises:
        ValueError: it is not.
    """
    if sound.ndim != 1 or not len(sound):
        raise ValueError(f"the waveform must be (samples,) and not empty, not {tuple(sound.shape)}")
    if not sound.is_floating_point():
        raise ValueError(f"the waveform must be a float tensor within +-256, not {sound.dtype}")
    if not bool(torch.isfinite(sound).all()):
        raise ValueError("the waveform holds NaN or infinite samples")


def _stream_blocks(
    model: SoundNet,
    layers: Sequence[str | int],
    blocks: Iterator[Tensor],
    pool: str,
    decoder: str,
    edge_frames: bool,
) -> LayerActivations:
    features, samples, meter = stream(model, layers), 0, LevelMeter()
    pools = {key: Pooling(pool) for key in layers}
    for block in blocks:
        samples += len(block)
        meter.add(block)
        for key, frames in features.push(block).items():
            pools[key].add(frames[0].T.cpu())
    dropped = count_dropped_frames(model, layers, samples, edge_frames)
    for key, frames in features.finish().items():  # edge frames are among these
        pools[key].add(frames[0].T[: frames.shape[-1] - dropped[key]].cpu())
    activations = {key: pooling.result() for key, pooling in pools.items()}
    return LayerActivations(activations, samples, 1, decoder, meter.level)


def count_dropped_frames(
    model: SoundNet, layers: Sequence[str | int], samples: int, edge_frames: bool
) -> dict[str | int, int]:
    """Count the frames to drop at the end of each layer: its edge frames, unless they are included.

    Raises:
        ValueError: a layer would have no frame left; the message says how long the sound must be.
    """
    if edge_frames:
        return dict.fromkeys(layers, 0)
    model.architecture.check_ordinary(samples, [model.architecture.layer(key) for key in layers])
    return {key: model.edge_frames(key, samples) for key in layers}
