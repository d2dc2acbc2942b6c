"""Compute layers of one sound, a file or a waveform; long files take the memory of a block."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from soundnet_port.audio.loading import open_sound
from soundnet_port.audio.loudness import LevelMeter, level, normalize
from soundnet_port.inference.pooling import Pooling
from soundnet_port.network.engine import BLOCK
from soundnet_port.network.evaluation_mode import check_is_model, evaluation_mode
from soundnet_port.network.model import SoundNet
from soundnet_port.network.streaming import stream, streamable

if TYPE_CHECKING:
    pass


def features(
    model: SoundNet, sound: str | os.PathLike[str] | Tensor, layer: str | int, *, decoder: str = "auto"
) -> Tensor:
    """A layer's activations for one clip, all of them, (channels, frames) on the CPU; see `embed`."""
    return compute_activations(model, sound, [layer], decoder=decoder).activations[layer].T


@dataclass(frozen=True)
class LayerActivations:
    """A sound's activations, float32 on the CPU, (frames, channels) or pooled; and what was heard."""

    activations: dict[str | int, Tensor]
    samples: int
    repeats: int
    decoder: str | None
    level: float = math.nan  #: as it was given, of the loudest second, in dB of full scale


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
    check_is_model(model)
    with evaluation_mode(model), ExitStack() as stack:
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
    dropped = count_dropped_frames(model, layers, len(wave), edge_frames)
    for key, each in made.items():
        pooled[key].add(each[0].T[: each.shape[-1] - dropped[key]].cpu())
    return LayerActivations(
        {key: each.result() for key, each in pooled.items()}, len(sound), repeats, ran, loudness
    )


def _streamed(
    model: SoundNet,
    layers: Sequence[str | int],
    blocks: Iterator[Tensor],
    pool: str,
    ran: str,
    edge_frames: bool,
) -> LayerActivations:
    listening, samples, meter = stream(model, layers), 0, LevelMeter()
    pooled = {key: Pooling(pool) for key in layers}
    for block in blocks:
        samples += len(block)
        meter.add(block)
        for key, frames in listening.push(block).items():
            pooled[key].add(frames[0].T.cpu())
    dropped = count_dropped_frames(model, layers, samples, edge_frames)
    for key, frames in listening.finish().items():  # edge frames are among these
        pooled[key].add(frames[0].T[: frames.shape[-1] - dropped[key]].cpu())
    return LayerActivations(
        {key: each.result() for key, each in pooled.items()}, samples, 1, ran, meter.level
    )


def count_dropped_frames(
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
