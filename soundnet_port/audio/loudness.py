"""The level of a sound, that of its loudest second, beside the network's training sounds.

The network is not indifferent to gain: it was trained on sounds at the level of their videos, and the same
sound 20 dB lower gets other answers (docs/predict.md has the figures). With the loudest second a bark in
silence is as loud as the bark.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from soundnet_port.network.architecture import FULL_SCALE, SAMPLE_RATE

if TYPE_CHECKING:
    from torch import Tensor

QUIET = -40.0  # dB of full scale; below, three of four first answers on ESC-10 are others
NORMALIZED = -17.0  # dB of full scale: the median of ESC-10's clips
_PIECE = 1 << 21  # samples in float64 at a time


class LevelMeter:
    """The level of a sound that comes in pieces.

    Seconds are counted from the sound's beginning; the rest at its end counts as part of a silent one.
    """

    def __init__(self) -> None:
        self._loudest = 0.0  # mean square
        self._sum, self._count = 0.0, 0  # of the second in progress
        self._seconds = 0

    def add(self, samples: Tensor) -> None:
        """Take in the next samples, within +-256."""
        power = samples.detach().double().cpu().square() / FULL_SCALE**2
        if self._count:
            head, power = power[: SAMPLE_RATE - self._count], power[SAMPLE_RATE - self._count :]
            self._add_power(float(head.sum()), len(head))
        full = len(power) // SAMPLE_RATE * SAMPLE_RATE
        if full:
            seconds = power[:full].reshape(-1, SAMPLE_RATE).mean(1)
            self._loudest = max(self._loudest, float(seconds.max()))
            self._seconds += len(seconds)
        if len(power) > full:
            self._add_power(float(power[full:].sum()), len(power) - full)

    def _add_power(self, power: float, count: int) -> None:
        self._sum, self._count = self._sum + power, self._count + count
        if self._count == SAMPLE_RATE:
            self._loudest = max(self._loudest, self._sum / SAMPLE_RATE)
            self._seconds += 1
            self._sum, self._count = 0.0, 0

    @property
    def level(self) -> float:
        """RMS of the loudest second in dB of full scale; minus infinity for digital silence."""
        if self._seconds or not self._count:
            power = max(self._loudest, self._sum / SAMPLE_RATE)  # the rest, as part of a second
        else:
            power = self._sum / self._count
        return 10 * math.log10(power) if power > 0 else -math.inf


def level(waveform: Tensor) -> float:
    """Compute the RMS of a waveform's loudest second, in dB of full scale.

    Shape:
        waveform: `(samples,)` within +-256

    >>> import torch
    >>> round(level(torch.full((44_100,), 25.6)), 3)
    -20.0
    """
    meter = LevelMeter()
    for start in range(0, len(waveform), _PIECE):
        meter.add(waveform[start : start + _PIECE])
    return meter.level


def normalize(waveform: Tensor) -> Tensor:
    """Bring a waveform's loudest second to `NORMALIZED`, or as far as its peak allows; silence stays.

    Shape:
        waveform: `(samples,)` within +-256; returns the same
    """
    now, peak = level(waveform), float(waveform.abs().max())
    if not peak > 1e-20:  # less is no sound, and its gain no float32
        return waveform
    return waveform * min(10 ** ((NORMALIZED - now) / 20), FULL_SCALE / peak)
