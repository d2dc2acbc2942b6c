"""Pictures: the first layer's filters, and predictions over time (extra `[plot]`).

The figures are matplotlib's, made without pyplot: nothing global changes, and a figure is gone when the
program drops it.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from soundnet_port.errors import MissingExtraError, SoundNetError
from soundnet_port.files import atomic_write
from soundnet_port.inference.prediction import Category, Prediction
from soundnet_port.network.architecture import CLASSES, FULL_SCALE, SAMPLE_RATE
from soundnet_port.network.categories import singular
from soundnet_port.network.model import SoundNet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")
_POINTS = 4096  # of the Fourier transform: a value every 5.4 Hz
_FLOOR = -50  # dB, the lowest that is shown
_COLUMNS = 2000  # of a waveform in a picture
_LABEL = 34  # characters of a category's name
_COLOURS = {"scenes": "Reds", "objects": "Blues", CLASSES: "Greens"}


class PlotError(SoundNetError):
    """A picture cannot be made or written: one line that says why."""


class Filter(NamedTuple):
    """A filter of the first layer, by its magnitude response.

    A filter whose taps are all zero has neither a center nor a bandwidth.
    """

    index: int  # type: ignore[assignment]  #: of the output channel, counted from 0
    center: float | None  #: Hz, where the response is largest
    bandwidth: float | None  #: Hz around it within which it stays above 1 / sqrt(2) of that (-3 dB)


def filters(model: SoundNet) -> list[Filter]:
    """The filters of conv1 by center frequency, the lowest first; those of zeros last.

    64 taps at 22,050 Hz tell frequencies apart that lie some 345 Hz from each other; the response is
    computed every 5.4 Hz (taps padded with zeros), so that a center is that exact.

    Raises:
        PlotError: conv1 holds NaN or infinite values.
    """
    frequencies, responses = _responses(_taps(model))
    found = []
    for index, response in enumerate(responses):
        if response.any():
            low, center, high = frequencies[_band(response)].tolist()
            found.append(Filter(index, center, high - low))
        else:
            found.append(Filter(index, None, None))
    return sorted(found, key=lambda each: (each.center is None, each.center))


def filters_figure(model: SoundNet) -> Figure:
    """conv1's filters by center frequency: each in time, and its magnitude response.

    In time each filter has a scale of its own. Responses are in dB of the largest of all; a dashed
    line marks the center, a band the width (see `filters`).

    Raises:
        PlotError: the extra `[plot]` is not installed, or conv1 holds NaN or infinite values.
    """
    table, taps = filters(model), _taps(model)
    frequencies, responses = _responses(taps)
    largest = responses.max() or 1.0
    decibels = 20 * np.log10(np.maximum(responses / largest, 1e-6))
    milliseconds = 1000 * np.arange(taps.shape[1]) / SAMPLE_RATE
    rows = -(-len(table) // 2)
    figure = _figure(11, 1.1 + 0.95 * rows)
    cells = figure.subplots(rows, 4, sharex="col", squeeze=False, width_ratios=(1, 1.25, 1, 1.25))
    figure.suptitle(f"{model.architecture.blocks[0].name} of {model.architecture.name}, by center frequency")
    for place, (index, center, _) in enumerate(table):
        row, column = place % rows, 2 * (place // rows)
        time, response = cells[row, column], cells[row, column + 1]
        time.plot(milliseconds, taps[index], color="tab:blue", linewidth=1)
        reach = 1.1 * np.abs(taps[index]).max() or 1.0
        time.set(ylim=(-reach, reach), xlim=(0, milliseconds[-1]), yticks=[])
        name = "silent" if center is None else f"{center:,.0f} Hz"
        time.set_ylabel(f"#{index}\n{name}", rotation=0, ha="right", va="center")
        response.plot(frequencies, decibels[index], color="tab:red", linewidth=1)
        response.set(ylim=(_FLOOR, 3), xlim=(0, SAMPLE_RATE / 2), yticks=(-40, -20, 0))
        response.tick_params(labelsize=8)
        response.grid(alpha=0.3)
        if center is not None:
            low, _, high = frequencies[_band(responses[index])]
            response.axvline(center, color="black", linewidth=0.8, linestyle="--")
            response.axvspan(low, high, color="tab:red", alpha=0.15, linewidth=0)
    for column in range(4):
        last = min(rows, len(table) - rows * (column // 2)) - 1
        for row in range(last + 1, rows):
            cells[row, column].set_axis_off()
        if last >= 0:
            cells[0, column].set_title("response (dB)" if column % 2 else "taps", fontsize="medium")
            cells[last, column].set_xlabel("Hz" if column % 2 else "ms")
            cells[last, column].tick_params(labelbottom=True)
    return figure


def prediction_figure(prediction: Prediction, waveform: Tensor | None = None, title: str = "") -> Figure:
    """The categories of a prediction over time; above them the waveform, if it is given.

    Rows are the categories of the clip's list, and below these what else was some frame's best, up to
    twice as many rows in all. Every moment has the color of the frame whose center is nearest: the
    stronger, the more probable. Scenes are red, objects blue, classes of one's own green. Edge frames are
    drawn only where the prediction has them; where it left one out, the heading says so.

    Args:
        prediction: what `predict` gave. Its `top` is how many categories there are.
        waveform: the clip, `(samples,)`, within +-256; repeated here if the prediction repeated it. Or of a
            long clip only `(2, columns)`: the lowest and the highest sample of each of its equal parts.
        title: such as the file's name.

    Raises:
        PlotError: the extra `[plot]` is not installed, or the waveform has another length than the
            clip, or another shape.
    """
    length = prediction.seconds * prediction.repeats
    heads = [head for head in _COLOURS if getattr(prediction, head)]
    rows = {head: _rows(prediction, head) for head in heads}
    heights = [max(1.0, 0.28 * len(rows[head]) + 0.35) for head in heads]
    if waveform is not None:
        columns = waveform.ndim == 2 and len(waveform) == 2
        whole = waveform.ndim == 1 and round(prediction.seconds * SAMPLE_RATE) == len(waveform)
        if not (whole or columns):
            wanted = f"({round(prediction.seconds * SAMPLE_RATE)},)"
            raise PlotError(f"the prediction's waveform is {wanted}, not {tuple(waveform.shape)}")
        heights.insert(0, 1.2)
    figure = _figure(10, sum(heights) + 0.9)
    from matplotlib.colors import PowerNorm  # _figure says what is missing if it is

    panels = list(figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    again = f", played {prediction.repeats} times" if prediction.repeated else ""
    again += ", edge frame left out" if prediction.dropped else ""
    heading = f"{_short(title, 70)}  ({prediction.seconds:.2f} s{again})".lstrip()
    figure.suptitle(heading, parse_math=False)
    if waveform is not None:
        _draw_waveform(panels[0], waveform.detach().cpu().float().numpy(), prediction)
    centers = np.array([frame.center for frame in prediction.frames])
    edges = np.clip([0, *(centers[1:] + centers[:-1]) / 2, length], 0, length)
    for head, axes in zip(heads, panels[-len(heads) :], strict=True):
        values = getattr(prediction, f"{singular(head)}_probabilities").numpy()
        shown = values[[category.index for category in rows[head]]]
        # the square root lets probabilities be seen that are small, as they are among 1000 objects
        mesh = axes.pcolormesh(
            edges,
            np.arange(len(shown) + 1),
            shown,
            cmap=_COLOURS[head],
            norm=PowerNorm(0.5, 0, 1),
            rasterized=shown.size > 2000,
        )
        labels = [_short(category.label, _LABEL) for category in rows[head]]
        axes.set_yticks(np.arange(len(shown)) + 0.5, labels, parse_math=False)
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.set_title(head, loc="left", fontsize="medium")
        for line in range(1, len(shown)):
            axes.axhline(line, color="white", linewidth=1.5)
        figure.colorbar(mesh, ax=axes, ticks=(0, 0.1, 0.5, 1), aspect=12, pad=0.01)
    frame = prediction.frames[0]
    panels[-1].set_xlim(0, length)
    panels[-1].set_xlabel(f"seconds (a frame hears {frame.end - frame.start:.1f} s around where it is drawn)")
    return figure


def drawable(path: str | os.PathLike[str]) -> None:
    """Whether a figure could be written there, before anything is computed.

    Raises:
        PlotError: the name does not end in .png or .svg, or the extra `[plot]` is not installed.
    """
    if Path(path).suffix.lower() not in FORMATS:
        raise PlotError(f"{os.fspath(path)}: pictures are {' or '.join(FORMATS)}")
    _figure(1, 1)


def write_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a figure as PNG or SVG by its name, whole or not at all.

    Raises:
        PlotError: the name does not end in .png or .svg.
        OSError: it cannot be written.
    """
    drawable(path)
    with atomic_write(path) as aside, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name's letters that no font here has
        figure.savefig(aside, format=Path(path).suffix.lower()[1:], dpi=120)


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "plot") from None
    return Figure(figsize=(width, height), layout="constrained")


def _taps(model: SoundNet) -> np.ndarray:
    """(channels, kernel), float64."""
    weight = model.get_parameter(f"{model.architecture.blocks[0].name}.weight")
    taps: np.ndarray = weight.detach().cpu().double().numpy()[:, 0]
    if not np.isfinite(taps).all():
        raise PlotError("the first layer holds NaN or infinite values")
    return taps


def _responses(taps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies in Hz, and the magnitude response of each filter there."""
    frequencies = np.fft.rfftfreq(_POINTS, 1 / SAMPLE_RATE)
    return frequencies, np.abs(np.fft.rfft(taps, _POINTS, axis=1))


def _band(response: np.ndarray) -> list[int]:
    """Where the response is largest, between where it falls below 1 / sqrt(2) of that."""
    peak = int(response.argmax())
    below = np.flatnonzero(response < response[peak] / np.sqrt(2))
    low = max(below[below < peak], default=-1) + 1
    high = min(below[below > peak], default=len(response)) - 1
    return [int(low), peak, int(high)]


def _rows(prediction: Prediction, head: str) -> list[Category]:
    """The clip's list, then other frames' best, the most probable first, at most as many again."""
    listed: list[Category] = getattr(prediction, head)
    known = {category.index for category in listed}
    others: dict[int, Category] = {}
    for frame in prediction.frames:
        best: Category = getattr(frame, head)[0]
        if best.index not in known:
            others[best.index] = max(best, others.get(best.index, best), key=lambda each: each.probability)
    return listed + sorted(others.values(), key=lambda each: -each.probability)[: len(listed)]


def _draw_waveform(axes: Axes, samples: np.ndarray, prediction: Prediction) -> None:
    """Lowest and highest sample of each column, as a band."""
    repeats, seconds = prediction.repeats, prediction.seconds
    low, high = np.tile(samples if samples.ndim == 2 else np.stack([samples, samples]), repeats)
    step = -(-len(low) // _COLUMNS)
    starts = np.arange(0, len(low), step)
    times = starts * (seconds * repeats / len(low))
    low, high = np.minimum.reduceat(low, starts), np.maximum.reduceat(high, starts)
    axes.fill_between(times, low, high, color="0.35", linewidth=0.5)
    reach = max(1.1 * float(max(-low.min(), high.max())), FULL_SCALE / 1000)
    axes.set(ylim=(-reach, reach))
    axes.set_title(f"waveform (full scale is {FULL_SCALE:g})", loc="left", fontsize="medium")
    for number in range(1, repeats) if repeats <= 50 else ():
        axes.axvline(number * seconds, color="black", linewidth=0.8, linestyle=":")


def _short(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"
