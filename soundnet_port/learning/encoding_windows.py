"""A layer's rows on a recording's clock, with gradients: the blocks that are trained, on windows of sounds.

What the frozen blocks give is computed once per sound and kept. The other blocks are computed for some
periods at a time, from as much of that as their frames see, so that each row is the one that the whole
sound would give.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from soundnet_port.audio.loading import load_audio
from soundnet_port.inference.activations import compute_activations
from soundnet_port.inference.alignment import check_clock, first_edge
from soundnet_port.inference.pooling import check_finite
from soundnet_port.learning.feature_cache import Values
from soundnet_port.learning.finetune_loop import build_frozen_trunk
from soundnet_port.network import gradients
from soundnet_port.network.architecture import SAMPLE_RATE
from soundnet_port.network.model import SoundNet
from soundnet_port.network.modules import max_pool

_PASS_SECONDS = 120  # of sound at a time, without gradients


@dataclass(frozen=True)
class _Sound:
    """A sound on the clock of a recording; times in samples after the start of its first period.

    Attributes:
        inputs: what the frozen blocks give, or the waveform, (channels, frames).
        samples: its length.
        edges: where each ordinary frame begins to last, and where the last one ends; see `align`.
        periods: how many there are.
    """

    inputs: Tensor
    samples: int
    edges: NDArray[np.float64]
    periods: int


class TrunkWindows:
    """The last layer of a network on windows of sound files, with gradients for the blocks not frozen.

    Args:
        model: a trunk that ends with the layer; its batch norms must be in evaluation mode. Its device
            computes all.
        frozen_blocks: how many of its first blocks stay as they are.
        tr: the period in seconds.
        align: "center" or "end", see `soundnet_port.inference.alignment.align`.
        edge_frames: include edge frames.
        decoder: of sound files, see `load_audio`.

    Raises:
        ValueError: an impossible clock.
    """

    def __init__(
        self,
        model: SoundNet,
        frozen_blocks: int,
        tr: float,
        align: str = "center",
        *,
        edge_frames: bool = False,
        decoder: str = "auto",
    ) -> None:
        check_clock(tr, align)
        self.model, self.tr, self.align = model, tr, align
        self._frozen_blocks, self._edge_frames, self._decoder = frozen_blocks, edge_frames, decoder
        self._layer = model.architecture.layer(model.architecture.last_layer)
        self._frozen_trunk = build_frozen_trunk(model, frozen_blocks) if frozen_blocks else None
        stride, field, start = 1, 1, 0
        if self._frozen_trunk:
            self._frozen_trunk.to(next(model.parameters()).device)
            frozen = model.architecture.layer(self._frozen_trunk.architecture.last_layer)
            stride, field, start = frozen.stride, frozen.receptive_field, frozen.start
        # frame t sees the inputs from t * stride + start on; the start is 0 or negative, through padding
        self._stride = self._layer.stride // stride
        self._field = (self._layer.receptive_field - field) // stride + 1
        self._start = (self._layer.start - start) // stride
        self._sounds: dict[tuple[str, float], _Sound] = {}

    def extract(self, sound: Path, offset: float = 0.0) -> tuple[dict[str | int, Values], float]:
        """Return the rows of the layer as they are now, (periods, channels), and the sound's seconds.

        For arguments and errors see `AlignedFeatures.extract`.
        """
        prepared = self._prepare(sound, offset)
        rows = np.full((prepared.periods, self._layer.channels), np.nan, np.float32)
        step = max(1, round(_PASS_SECONDS / self.tr))
        with torch.no_grad():
            for start in range(0, prepared.periods, step):
                stop = min(start + step, prepared.periods)
                values, known = self.window(sound, offset, start, stop)
                check_finite(values)
                rows[start:stop][known] = values.float().cpu().numpy()[known]
        return {self._layer.name: rows}, prepared.samples / SAMPLE_RATE

    def window(self, sound: Path, offset: float, start: int, stop: int) -> tuple[Tensor, NDArray[np.bool_]]:
        """Return the rows of some periods, (periods, channels), and which of them are known; others are 0.

        Args:
            sound: a sound file.
            offset: where its first period starts, in seconds.
            start: the first period.
            stop: the one after the last.
        """
        prepared = self._prepare(sound, offset)
        periods, frames, weights = _overlaps(prepared.edges, self.tr * SAMPLE_RATE, start, stop)
        known = np.isin(np.arange(stop - start), periods)
        device = next(self.model.parameters()).device
        rows = torch.zeros(stop - start, self._layer.channels, device=device)
        if not len(frames):
            return rows, known
        first = int(frames[0])
        values = self._compute(prepared.inputs, first, int(frames[-1]) + 1).float()
        index = torch.from_numpy(frames - first).to(device)
        shares = torch.from_numpy(weights).to(device, torch.float32)[:, None]
        return rows.index_add(0, torch.from_numpy(periods).to(device), values[index] * shares), known

    def _prepare(self, sound: Path, offset: float) -> _Sound:
        key = os.path.realpath(sound), offset
        if key not in self._sounds:
            if self._frozen_trunk:
                name = self._frozen_trunk.architecture.last_layer
                output = compute_activations(self._frozen_trunk, sound, [name], decoder=self._decoder)
                inputs, samples = output.activations[name].T, output.samples
            else:
                inputs = load_audio(sound, decoder=self._decoder)[None]
                samples = inputs.shape[1]
            self._sounds[key] = self._place(inputs, samples, round(offset * SAMPLE_RATE))
        return self._sounds[key]

    def _place(self, inputs: Tensor, samples: int, shift: int) -> _Sound:
        """Return a sound whose clock begins `shift` samples after it.

        Raises:
            ValueError: it is too short.
        """
        layer, architecture = self._layer, self.model.architecture
        architecture.check_length(samples, [layer])
        dropped = 0
        if not self._edge_frames:
            architecture.check_ordinary(samples, [layer])
            dropped = architecture.edge_frames(layer.name, samples)
        count = architecture.frames(layer.name, samples) - dropped
        period = self.tr * SAMPLE_RATE
        periods = ceil((samples - shift) / period - 1e-9)
        first = first_edge(layer, self.align) - shift
        edges = first + layer.stride * np.arange(count + 1, dtype=np.float64)
        if self.align == "center":  # the first frame also lasts before its beginning
            edges[0] = 0
        if not dropped:  # the last one lasts to the end
            edges[-1] = max(periods * period, edges[-2])
        return _Sound(inputs, samples, edges.clip(0), periods)

    def _compute(self, inputs: Tensor, start: int, stop: int) -> Tensor:
        """Return frames of the layer, (frames, channels), as the whole input would give them."""
        # frames before these would see zeros in place of earlier inputs
        spare = -(self._start // self._stride)
        begin = max(0, start - spare)
        end = (stop - 1) * self._stride + self._start + self._field
        part = inputs[None, :, begin * self._stride : max(end, 0)]
        x = part.to(next(self.model.parameters()).device)
        frames = _run_blocks(self.model, x, self._frozen_blocks)[0].T
        return frames[start - begin : stop - begin]


def _overlaps(
    edges: NDArray[np.float64], period: float, start: int, stop: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return which frames last in which periods, counted from `start`, and their shares there; by time.

    A row of the clock is the sum of its frames times their shares (see
    `soundnet_port.inference.alignment.Clock`, which has no gradients).
    """
    marks = period * np.arange(start, stop + 1)
    low, high = max(marks[0], edges[0]), min(marks[-1], edges[-1])
    inner = edges[np.searchsorted(edges, low) : np.searchsorted(edges, high)]
    points = np.unique(np.concatenate([inner, marks.clip(low, max(low, high))]))
    lengths, middles = np.diff(points), (points[1:] + points[:-1]) / 2
    periods = np.searchsorted(marks, middles, side="right") - 1
    frames = np.searchsorted(edges, middles, side="right") - 1
    totals = np.bincount(periods, lengths, stop - start)
    return periods, frames, lengths / totals[periods]


def _run_blocks(model: SoundNet, x: Tensor, first: int) -> Tensor:
    """Return the trunk's last output, given that of the block before `first`, with gradients."""
    layer = model.architecture.layer(model.architecture.last_layer)
    is_plain = x.device.type != "cpu" or torch.is_autocast_enabled("cpu")
    if not is_plain and gradients.fits(model, [layer]):
        return gradients.extract(model, x, [layer], first)[layer.name]
    for block in model.architecture.blocks[first:]:
        x = F.relu(model.get_submodule(block.norm)(model.get_submodule(block.name)(x)))
        if block.pool:
            x = max_pool(x, block.pool)
    return x
