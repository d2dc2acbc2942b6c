"""Bounded summaries of a sound that is being analyzed: maxima over time, and what the heads predict."""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TOP = 10  # categories listed for the clip and for each frame
_TRACKS = 5  # of the clip's categories that are drawn over time, and as many of other frames' best
_INITIAL_FRAMES = 1024  # allocated at first; an hour has 1,209


class MaxEnvelope:
    """Maxima over intervals of equal length; when there are too many, pairs are merged.

    Attributes:
        width: frames per interval; the last one may have fewer.
    """

    def __init__(self, channels: int, max_columns: int) -> None:
        self.width = 1
        self._buffer = np.zeros((channels, max_columns), np.float32)  # allocated once, against fragmentation
        self._frames = 0

    @property
    def values(self) -> np.ndarray:
        """The maxima, `(channels, columns)`."""
        return self._buffer[:, : math.ceil(self._frames / self.width)]

    def add(self, frames: np.ndarray) -> None:
        """Add the next frames, `(channels, frames)`."""
        if not frames.shape[1]:
            return
        total = self._frames + frames.shape[1]
        while total > self._buffer.shape[1] * self.width:
            values = self.values
            if values.size:
                merged = np.maximum.reduceat(values, np.arange(0, values.shape[1], 2), axis=1)
                self._buffer[:, : merged.shape[1]] = merged
            self.width *= 2
        columns = np.arange(self._frames, total) // self.width
        first = int(columns[0])
        maxima = np.maximum.reduceat(frames, np.flatnonzero(np.diff(columns, prepend=-1)), axis=1)
        if first < self.values.shape[1]:  # continues the last column
            maxima[:, 0] = np.maximum(maxima[:, 0], self._buffer[:, first])
        self._buffer[:, first : first + maxima.shape[1]] = maxima
        self._frames = total


class HeadSummary:
    """A head's logits so far, and its most probable categories.

    Args:
        categories: how many the head has.
        average_logits: average over time before the softmax, as for a network's own classes (see
            `Prediction.classes`), not after it.
    """

    def __init__(self, categories: int, average_logits: bool) -> None:
        self._average_logits = average_logits
        self._buffer = torch.from_numpy(np.zeros((_INITIAL_FRAMES, categories), np.float32))  # lazily mapped
        self._log_sums = torch.zeros(_INITIAL_FRAMES)  # the softmax's denominator for each frame
        self._sum = torch.zeros(categories, dtype=torch.float64)
        self._frames: list[list[float]] = []  # index, probability, index, ... of each frame's list
        self._best: dict[int, float] = {}  # probability of each category that was a frame's best

    @property
    def logits(self) -> Tensor:
        """The logits of all frames, `(frames, categories)`."""
        return self._buffer[: len(self._frames)]

    def add(self, logits: Tensor) -> None:
        """Add the next frames, `(frames, categories)`."""
        start, stop = len(self._frames), len(self._frames) + len(logits)
        while stop > len(self._log_sums):
            self._buffer = torch.cat([self._buffer, torch.zeros_like(self._buffer)])
            self._log_sums = torch.cat([self._log_sums, torch.zeros_like(self._log_sums)])
        self._buffer[start:stop] = logits
        log_sums = torch.logsumexp(logits, 1)
        self._log_sums[start:stop] = log_sums
        probabilities = (logits - log_sums[:, None]).exp()
        self._sum += (logits if self._average_logits else probabilities).double().sum(0)
        top = probabilities.topk(min(TOP, logits.shape[1]))
        for values, indices in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            pairs = zip(indices, map(_round, values), strict=True)
            self._frames.append([number for pair in pairs for number in pair])
            self._best[indices[0]] = max(values[0], self._best.get(indices[0], 0.0))

    def to_dict(self, first_frame: int) -> dict[str, Any]:
        """Return the clip's list, tracks of probabilities over time, and lists of frames from one on."""
        if not self._frames:
            return {"clip": [], "tracks": [], "frames": []}
        mean = self._sum / len(self._frames)
        values, indices = (mean.softmax(0) if self._average_logits else mean).topk(min(TOP, len(mean)))
        clip = list(zip(indices.tolist(), map(_round, values.tolist()), strict=True))
        rows = [index for index, _ in clip[:_TRACKS]]
        others = sorted(self._best.keys() - set(rows), key=lambda index: -self._best[index])
        rows += others[:_TRACKS]
        tracks = (self.logits[:, rows] - self._log_sums[: len(self._frames), None]).exp().T.tolist()
        return {
            "clip": clip,
            "tracks": [[index, list(map(_round, track))] for index, track in zip(rows, tracks, strict=True)],
            "frames": self._frames[first_frame:],
        }


def encode_levels(levels: NDArray[np.uint8]) -> str:
    """Encode bytes for the page, row by row."""
    return base64.b64encode(levels.tobytes()).decode()


def _round(probability: float) -> float:
    return round(probability, 4)
