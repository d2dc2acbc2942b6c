"""How loud a sound is, against what the network was trained on.

The network is not indifferent to gain: it was trained on sounds at the level of their videos, and the same
sound 20 dB lower gets other answers (docs/predict.md has the figures). The level meant here is that of the
loudest second, so that a bark in silence counts for what it is.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from soundnet_port.network.architecture import FULL_SCALE, SAMPLE_RATE

if TYPE_CHECKING:
    from torch import Tensor

QUIET = -40.0  # dB of full scale; below, three of four first answers on ESC-10 are others
NORMALIZED = -17.0  # dB of full scale: the median of ESC-10's clips


class LevelMeter:
    """Measures the loudest second of a sound that comes in pieces.

    Seconds are counted from the sound's beginning; what is left at its end counts as part of a silent one.
    """

    def __init__(self) -> None:
        self._loudest = 0.0  # mean square
        self._sum, self._count = 0.0, 0  # of the second that has begun
        self._seconds = 0

    def add(self, samples: Tensor) -> None:
        """Take in the next samples, within +-256."""
        power = samples.detach().double().cpu().square() / FULL_SCALE**2
        if self._count:
            head, power = power[: SAMPLE_RATE - self._count], power[SAMPLE_RATE - self._count :]
            self._take(float(head.sum()), len(head))
        whole = len(power) // SAMPLE_RATE * SAMPLE_RATE
        if whole:
            seconds = power[:whole].reshape(-1, SAMPLE_RATE).mean(1)
            self._loudest = max(self._loudest, float(seconds.max()))
            self._seconds += len(seconds)
        if len(power) > whole:
            self._take(float(power[whole:].sum()), len(power) - whole)

    def _take(self, power: float, count: int) -> None:
        self._sum, self._count = self._sum + power, self._count + count
        if self._count == SAMPLE_RATE:
            self._loudest = max(self._loudest, self._sum / SAMPLE_RATE)
            self._seconds += 1
            self._sum, self._count = 0.0, 0

    @property
    def level(self) -> float:
        """RMS of the loudest second in dB of full scale; minus infinity for digital silence."""
        if self._seconds or not self._count:
            power = max(self._loudest, self._sum / SAMPLE_RATE)  # what is left, as part of a second
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
    meter.add(waveform)
    return meter.level


def normalize(waveform: Tensor) -> Tensor:
    """Bring a waveform's loudest second to `NORMALIZED`, or as far as its peak allows; silence stays.

    Shape:
        waveform: `(samples,)` within +-256; returns the same
    """
    now, peak = level(waveform), float(waveform.abs().max())
    if not peak > 1e-20:  # what is less than that is no sound, and its gain no float32
        return waveform
    return waveform * min(10 ** ((NORMALIZED - now) / 20), FULL_SCALE / peak)
