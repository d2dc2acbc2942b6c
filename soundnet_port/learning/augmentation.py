"""Augment waveforms at random, and mix two of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from soundnet_port.learning.errors import TrainingError
from soundnet_port.network.architecture import FULL_SCALE, SAMPLE_RATE


@dataclass(frozen=True)
class Augmentation:
    """Random changes to a waveform; none by default, as in the original.

    Attributes:
        gain: dB, louder or softer by up to this much; clipped to full scale.
        shift: seconds, earlier or later by up to this much, circularly.
        stretch: factor, faster and higher or slower and lower by up to this much; 1 changes nothing.
        flip: negate half of the waveforms.
        mix: probability from 0 to 1 of mixing a sound with another one, see `mix_waveforms`.
    """

    gain: float = 0.0
    shift: float = 0.0
    stretch: float = 1.0
    flip: bool = False
    mix: float = 0.0

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("gain", self.gain, 0, 200),
            ("shift", self.shift, 0, 1000),
            ("stretch", self.stretch, 1, 10),
            ("mix", self.mix, 0, 1),
        ):
            if not low <= value <= high:
                raise TrainingError(f"augmentation: {name} must be from {low} to {high}, not {value}")

    def __call__(self, waveform: Tensor, generator: np.random.Generator) -> Tensor:
        """Return the augmented waveform, (samples,); `generator` alone decides how."""
        samples = len(waveform)
        if self.stretch > 1:
            length = round(samples * self.stretch ** generator.uniform(-1, 1))
            waveform = F.interpolate(waveform[None, None], size=max(1, length), mode="linear")[0, 0]
            waveform = waveform.repeat(-(-samples // len(waveform)))
        if self.shift:
            limit = round(self.shift * SAMPLE_RATE)
            waveform = waveform.roll(int(generator.integers(-limit, limit, endpoint=True)))
        waveform = waveform[:samples]
        if self.flip and generator.random() < 0.5:
            waveform = -waveform
        if self.gain:
            factor = 10 ** (generator.uniform(-self.gain, self.gain) / 20)
            waveform = (waveform * factor).clamp(-FULL_SCALE, FULL_SCALE)
        return waveform


def mix_waveforms(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Mix two waveforms of the same length so that the first makes up `share` of the perceived sound.

    Mix their labels in the same proportion: between-class learning (Tokozume, Ushiku, Harada, ICLR 2018),
    with root mean squares as loudness.
    """
    loudness = [float(waveform.square().mean()) ** 0.5 + 1e-3 for waveform in (first, second)]
    weight = 1 / (1 + loudness[0] / loudness[1] * (1 - share) / max(share, 1e-6))
    mixture: Tensor = (weight * first + (1 - weight) * second) / (weight**2 + (1 - weight) ** 2) ** 0.5
    return mixture
