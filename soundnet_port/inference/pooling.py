"""Pooling of activations over time, all at once or piece by piece."""

from __future__ import annotations

import torch
from torch import Tensor

POOLINGS = ("mean", "max", "mean+std", "mean+max+std")
_CHUNK = 1 << 13  # frames in float64 at a time


class Pooling:
    """All frames ("none"), their mean, maximum or population std; "mean+max+std" is one after the other.

    "peak" is "max" with the first frame of each channel's maximum, in `peaks`.

    Frames may come piece by piece. Means are taken in float64, by Chan, Golub and LeVeque's formula for
    the mean and the squared deviations of two sets together.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._frames: list[Tensor] = []
        self._count = 0
        self._largest = torch.tensor(-torch.inf)
        self.peaks = torch.tensor(0)  #: frames of "peak", (channels,)
        self._mean = self._squares = torch.zeros((), dtype=torch.float64)

    def add(self, frames: Tensor) -> None:
        """Take in the next frames, (frames, channels)."""
        if self.kind == "none":
            self._frames.append(frames)
            return
        if not len(frames):
            return
        for chunk in torch.split(frames, _CHUNK):
            if "max" in self.kind:
                self._largest = torch.maximum(self._largest, chunk.amax(0))
            if self.kind == "max":
                continue
            if self.kind == "peak":
                values, positions = chunk.max(0)
                self.peaks = torch.where(values > self._largest, positions + self._count, self.peaks)
                self._largest = torch.maximum(self._largest, values)
                self._count += len(chunk)
                continue
            values = chunk.double()
            mean = values.mean(0)
            deviation, total = mean - self._mean, self._count + len(chunk)
            self._mean = self._mean + deviation * (len(chunk) / total)
            self._squares = self._squares + (values - mean).square().sum(0)
            self._squares = self._squares + deviation.square() * (self._count * len(chunk) / total)
            self._count = total

    def result(self) -> Tensor:
        """Return float32, (statistics * channels,), or for "none" (frames, channels).

        Raises:
            ValueError: NaN or infinite activations.
        """
        if self.kind == "none":
            values = torch.cat(self._frames)
        elif self.kind == "peak":
            values = self._largest
        else:
            statistics = {
                "mean": self._mean,
                "max": self._largest,
                "std": (self._squares / self._count).sqrt(),
            }
            values = torch.cat([statistics[name].double() for name in self.kind.split("+")])
        check_finite(values)
        return values.float()


def count_statistics(kind: str) -> int:
    """Return how many values of each channel a pooling gives."""
    return kind.count("+") + 1


def check_finite(activations: Tensor) -> None:
    """Check that activations are finite.

    Raises:
        ValueError: NaN or infinite ones.
    """
    if not bool(torch.isfinite(activations).all()):
        raise ValueError(
            "its activations are too large for the network's number type; use float32 or bfloat16"
        )
