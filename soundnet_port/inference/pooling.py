"""Pool activations over time, all at once or bit by bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    pass


POOLINGS = ("mean", "max", "mean+std")


_POOLED_FRAMES = 1 << 13  # in float64 at a time


class Pooling:
    """All frames ("none"), their mean, their maximum, or mean and population std ("mean+std").

    "peak", for units.py alone, is "max" that knows the first frame in which each channel has it.

    Frames may come bit by bit. Means are taken in float64, by Chan, Golub and LeVeque's formula for
    the mean and the squared deviations of two sets together.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._kept: list[Tensor] = []
        self._count = 0
        self._largest = torch.tensor(-torch.inf)
        self.peaks = torch.tensor(0)  #: frames of "peak", (channels,)
        self._mean = self._squares = torch.zeros((), dtype=torch.float64)

    def add(self, frames: Tensor) -> None:
        """More frames, (frames, channels)."""
        if self.kind == "none":
            self._kept.append(frames)
            return
        if not len(frames):
            return
        for some in torch.split(frames, _POOLED_FRAMES):
            if self.kind == "max":
                self._largest = torch.maximum(self._largest, some.amax(0))
                continue
            if self.kind == "peak":
                values, frames = some.max(0)
                self.peaks = torch.where(values > self._largest, frames + self._count, self.peaks)
                self._largest = torch.maximum(self._largest, values)
                self._count += len(some)
                continue
            values = some.double()
            mean = values.mean(0)
            apart, total = mean - self._mean, self._count + len(some)
            self._mean = self._mean + apart * (len(some) / total)
            self._squares = self._squares + (values - mean).square().sum(0)
            self._squares = self._squares + apart.square() * (self._count * len(some) / total)
            self._count = total

    def result(self) -> Tensor:
        """Float32, (channels,), (2 * channels,) for "mean+std", (frames, channels) for "none".

        Raises:
            ValueError: NaN or infinite activations.
        """
        if self.kind == "none":
            made = torch.cat(self._kept)
        elif self.kind in ("max", "peak"):
            made = self._largest
        elif self.kind == "mean":
            made = self._mean
        else:
            made = torch.cat([self._mean, (self._squares / self._count).sqrt()])
        check_finite(made)
        return made.float()


def check_finite(activations: Tensor) -> None:
    """Raises a ValueError for NaN or infinite activations."""
    if not bool(torch.isfinite(activations).all()):
        raise ValueError(
            "its activations are too large for the network's number type; take float32 or bfloat16"
        )
