"""Mel spectrograms of excerpts, and pictures of them (extra `[plot]`)."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from soundnet_port.errors import require
from soundnet_port.network.architecture import SAMPLE_RATE

WIDTH, HEIGHT = 320, 112  # pixels for a whole receptive field
LOWEST_FREQUENCY = 50.0  # Hz
DYNAMIC_RANGE = 60.0  # dB below the maximum


def mel(hertz: float) -> float:
    """Convert a frequency to the mel scale (O'Shaughnessy 1987)."""
    return 2595 * math.log10(1 + hertz / 700)


def compute_spectrogram(samples: Tensor, receptive_field: int) -> Tensor:
    """Compute power in dB relative to the maximum, from 0 down to -60; the highest mel band comes first.

    Shape:
        samples: `(samples,)`, an excerpt of a receptive field of that many samples; returns
        `(112, columns)`, 320 columns for a whole receptive field
    """
    size = min(1024, max(64, 1 << (receptive_field // 8).bit_length()))
    columns = max(2, round(WIDTH * len(samples) / receptive_field))
    starts = torch.linspace(0, len(samples) - 1, columns).long()  # in the padded signal
    padded = torch.nn.functional.pad(samples, (size // 2, size // 2))
    windows = padded.unfold(0, size, 1)[starts] * torch.hann_window(size)
    power = _mel_filter_bank(size) @ torch.fft.rfft(windows).abs().square().T
    largest = power.max()
    if not largest:
        return torch.full_like(power, -DYNAMIC_RANGE)
    return 10 * torch.log10((power / largest).clamp(min=10 ** (-DYNAMIC_RANGE / 10)))


class SpectrogramStream:
    """Power in mel bands of a sound that comes in blocks.

    Frame `k` is of the 1,024 samples around sample `k * hop`, with zeros before the sound and after it.
    """

    SIZE = 1024  # samples, 46 ms

    def __init__(self, hop: int) -> None:
        self.hop = hop
        self._rest = torch.zeros(self.SIZE // 2)

    def push(self, samples: Tensor) -> Tensor:
        """Return the frames that are complete, the highest band first.

        Shape:
            samples: `(samples,)`; returns `(112, frames)`
        """
        samples = torch.cat([self._rest, samples])
        frames = max(0, (len(samples) - self.SIZE) // self.hop + 1)
        self._rest = samples[frames * self.hop :].clone()
        if not frames:
            return torch.zeros(HEIGHT, 0)
        windows = samples.unfold(0, self.SIZE, self.hop) * torch.hann_window(self.SIZE)
        power: Tensor = _mel_filter_bank(self.SIZE) @ torch.fft.rfft(windows).abs().square().T
        return power

    def finish(self) -> Tensor:
        """Return the last frames, as `push`."""
        return self.push(torch.zeros(self.SIZE // 2))


def draw_spectrogram(samples: Tensor, receptive_field: int, path: Path) -> None:
    """Write an excerpt's spectrogram as a PNG file."""
    from PIL import Image

    decibels = compute_spectrogram(samples, receptive_field)
    levels = (255 * (1 + decibels / DYNAMIC_RANGE)).round().to(torch.uint8)
    image = Image.fromarray(levels.numpy())
    image.putpalette(get_palette())
    image.save(path)


@cache
def get_palette() -> bytes:
    """Return 256 RGB colors, dark to bright.

    Raises:
        MissingExtraError: the extra `[plot]` is not installed.
    """
    require("PIL.Image", "plot")
    colors = require("matplotlib", "plot").colormaps["magma"](np.arange(256), bytes=True)
    palette: bytes = colors[:, :3].tobytes()
    return palette


@cache
def _mel_filter_bank(size: int) -> Tensor:
    """Return the weights of FFT bins in mel bands: triangles, no narrower than a bin."""
    bins = torch.arange(size // 2 + 1) * SAMPLE_RATE / size
    edges = torch.linspace(mel(SAMPLE_RATE / 2), mel(LOWEST_FREQUENCY), HEIGHT + 1)
    centers = 700 * (10 ** ((edges[1:] + edges[:-1]) / 2 / 2595) - 1)
    widths = torch.gradient(centers)[0].abs().clamp(min=SAMPLE_RATE / size)
    weights = (1 - (bins - centers[:, None]).abs() / widths[:, None]).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)
