"""Features on a stimulus clock: a row for each volume of an fMRI run, or step of another recording.

Encoding models predict what was measured in a period from the sound in it. A layer's frames come at
their own rate, one every 0.37 s in pool5 and every 1.49 s in conv7, so they have to be brought to the
recording's. Each frame is taken to last until the next one, and a period's row is the mean of the
frames that last in it, weighted by how long: an average for layers faster than the clock, the current
frame for slower ones. That is linear, invents nothing between frames, and never overshoots.

    frames      0      1      2      3          where a frame begins: by "center" around the middle of
              |......|......|......|......|     what it sees, by "end" when it has seen all of it
    periods   |   0    |   1    |   2    |
"""

from __future__ import annotations

from math import ceil

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soundnet_port.inference.pooling import check_finite
from soundnet_port.network.architecture import SAMPLE_RATE, Layer
from soundnet_port.network.model import SoundNet

ALIGNMENTS = ("center", "end")
_CHUNK = 1 << 13  # frames in float64 at a time


def align(
    model: SoundNet,
    layer: str | int | None,
    frames: Tensor,
    seconds: float,
    *,
    tr: float,
    to: str = "center",
    edge_frames: bool = False,
) -> tuple[Tensor, Tensor]:
    """Align a layer's frames with a clock that starts with the sound and ticks every `tr` seconds.

    With "center" a frame belongs to the middle of what it sees, as is usual where the measured delay is
    modeled separately; it sees up to half its receptive field beyond that. With "end" it belongs to the
    time when it has seen everything: no row depends on sound after its period, and periods before the
    first frame has ended are NaN.

    Args:
        model: the network that the frames come from.
        layer: name, Torch7's module number, or None for the default layer.
        frames: all of the sound's, `(frames, channels)`, as `extract(...)[layer][0].T`.
        seconds: length of the sound; there are `ceil(seconds / tr)` rows.
        tr: the period in seconds: fMRI's repetition time.
        to: "center" or "end".
        edge_frames: whether edge frames (see `SoundNet.edge_frames`) count. By default they do not, and
            periods in which nothing but them lasts are NaN.

    Shape:
        returns `(periods, channels)`, float32; and `(periods, 3)`, float64: start of what the row
        sees, the middle of its period, and end of what it sees, in seconds

    Raises:
        ValueError: an impossible period or alignment, no frames, NaN or infinite ones, or an unknown layer.
    """
    samples = round(seconds * SAMPLE_RATE)
    edge = 0 if edge_frames else min(model.edge_frames(layer, samples), len(frames))
    clock = Clock(model.architecture.layer(layer), tr, to)
    clock.add(frames[: len(frames) - edge])
    return clock.result(samples, edge)


def check_clock(tr: float, to: str) -> None:
    """Check a clock's period and alignment.

    Raises:
        ValueError: the period is out of range, or the alignment unknown.
    """
    if not 0.001 <= tr <= 3600:
        raise ValueError(f"the period must be 0.001 to 3600 seconds, not {tr:g}")
    if to not in ALIGNMENTS:
        raise ValueError(f"unknown alignment {to!r}; choose from {', '.join(ALIGNMENTS)}")


def first_edge(layer: Layer, to: str = "center") -> float:
    """Return where frame 0 begins to last, in samples; each frame lasts for a stride, see `align`."""
    return layer.center - layer.stride / 2 if to == "center" else layer.start + layer.receptive_field


class Clock:
    """Alignment of frames that may come piece by piece, in the memory of the rows; see `align`.

    A row is an integral over its period, which is a difference of two values of the frames' running sum.
    """

    def __init__(self, layer: Layer, tr: float, to: str = "center") -> None:
        check_clock(tr, to)
        self._layer, self._period = layer, tr * SAMPLE_RATE  # samples, as all times in here
        self._first = first_edge(layer, to)
        self._backwards = to == "center"  # the first frame also lasts before its beginning
        self._count = 0
        self._last: Tensor | None = None  # it lasts to the end, wherever that is
        self._sums: dict[int, NDArray[np.float64]] = {}  # of what lasted in a period, times how long
        self._lasted: dict[int, float] = {}

    def add(self, frames: Tensor) -> None:
        """Take in the next frames, (frames, channels).

        Raises:
            ValueError: NaN or infinite ones; in rows NaN means unknown.
        """
        for chunk in torch.split(frames.detach().cpu(), _CHUNK):
            if not len(chunk):
                continue
            check_finite(chunk)
            values = chunk if self._last is None else torch.cat([self._last, chunk])
            begin = self._count - (self._last is not None)
            self._count += len(chunk)
            self._last = values[-1:]
            edges = self._first + self._layer.stride * np.arange(begin, self._count, dtype=np.float64)
            self._spread(values[:-1], edges)

    def _spread(self, values: Tensor, edges: NDArray[np.float64]) -> None:
        """Add frames to the periods they last in; `edges`: where each begins, and where the last ends."""
        if not len(values):
            return
        if self._backwards and self._first > 0 and edges[0] == self._first:
            edges = edges.copy()
            edges[0] = 0
        edges = edges.clip(0)
        numbers = values.double().numpy()
        sums = np.zeros((len(edges), numbers.shape[1]))
        np.cumsum(numbers * np.diff(edges)[:, None], axis=0, out=sums[1:])
        periods = range(int(edges[0] // self._period), ceil(edges[-1] / self._period))
        marks = np.clip(np.array([*periods, periods.stop]) * self._period, edges[0], edges[-1])
        at = np.clip(np.searchsorted(edges, marks, side="right") - 1, 0, len(numbers) - 1)
        pieces = np.diff(sums[at] + (marks - edges[at])[:, None] * numbers[at], axis=0)
        for period, piece, lasted in zip(periods, pieces, np.diff(marks).tolist(), strict=True):
            self._sums[period] = self._sums.get(period, 0) + piece
            self._lasted[period] = self._lasted.get(period, 0.0) + lasted

    def result(self, samples: int, dropped: int = 0) -> tuple[Tensor, Tensor]:
        """Return the rows and times of a sound, as `align` does.

        Args:
            samples: length of the sound.
            dropped: edge frames after those that were added; nothing lasts in their place.

        Raises:
            ValueError: there were no frames.
        """
        if self._last is None and not dropped:
            raise ValueError("there are no frames to align")
        count = ceil(samples / self._period - 1e-9)
        channels = self._layer.channels if self._last is None else self._last.shape[1]
        rows = np.full((count, channels), np.nan)
        if self._last is None:
            times = np.full((count, 3), np.nan)
            times[:, 1] = (np.arange(count) + 0.5) * self._period / SAMPLE_RATE
            return torch.from_numpy(rows).float(), torch.from_numpy(times)
        last_edge = self._first + self._layer.stride * (self._count - 1)
        end = last_edge + self._layer.stride if dropped else max(count * self._period, last_edge)
        self._spread(self._last, np.array([last_edge, end]))
        for period in range(count):
            if self._lasted.get(period, 0) > 0:
                rows[period] = self._sums[period] / self._lasted[period]
        return torch.from_numpy(rows).float(), torch.from_numpy(self._times(count))

    def _times(self, count: int) -> NDArray[np.float64]:
        layer, period = self._layer, self._period
        begins = period * np.arange(count)
        last = self._count - 1
        # the frames that last in each period: from the one that it begins in to the one that it ends in
        lowest = np.floor((begins - self._first) / layer.stride)
        highest = np.ceil((begins + period - self._first) / layer.stride) - 1
        lasted = np.array([self._lasted.get(period, 0) > 0 for period in range(count)])
        starts = layer.start + layer.stride * lowest.clip(0, last)
        ends = layer.start + layer.stride * highest.clip(0, last) + layer.receptive_field
        times = np.stack([starts, begins + period / 2, ends], axis=1) / SAMPLE_RATE
        times[~lasted, 0] = times[~lasted, 2] = np.nan
        return times
