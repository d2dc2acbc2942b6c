"""A figure of a prediction over time (extra `[plot]`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from soundnet_port.inference.prediction import Category, Prediction
from soundnet_port.inference.prediction_formats import split_between_centers
from soundnet_port.network.architecture import CLASSES, FULL_SCALE, SAMPLE_RATE
from soundnet_port.viewing.figures import PlotError, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 2000  # of the waveform
_LABEL_LENGTH = 34  # characters
_COLOR_MAPS = {"scenes": "Reds", "objects": "Blues", CLASSES: "Greens"}


def plot_prediction(prediction: Prediction, waveform: Tensor | None = None, title: str = "") -> Figure:
    """Plot a prediction's categories over time, with the waveform above them if it is given.

    Rows are the categories of the clip's list, followed by other frames' best categories, up to as many
    again. Each moment has the color of the frame whose center is nearest; more probable is darker. Scenes
    are red, objects blue, a network's own classes green. Edge frames are drawn only if the prediction
    includes them; otherwise the title says that they were left out.

    Args:
        prediction: from `predict`, whose `top` sets the number of categories.
        waveform: the clip, `(samples,)`, within +-256; repeated here if the prediction repeated it. For a
            long clip also `(2, columns)`: the lowest and the highest sample of equal parts.
        title: such as the file's name.

    Raises:
        PlotError: the waveform has another length than the clip, or another shape.
        MissingExtraError: the extra `[plot]` is not installed.
    """
    length = prediction.seconds * prediction.repeats
    heads = [head for head in _COLOR_MAPS if head in prediction.heads]
    rows = {head: _select_rows(prediction, head) for head in heads}
    heights = [max(1.0, 0.28 * len(rows[head]) + 0.35) for head in heads]
    if waveform is not None:
        samples = round(prediction.seconds * SAMPLE_RATE)
        is_envelope = waveform.ndim == 2 and len(waveform) == 2
        if not is_envelope and waveform.shape != (samples,):
            raise PlotError(
                f"waveform: shape {tuple(waveform.shape)} does not match the clip's, ({samples},)"
            )
        heights.insert(0, 1.2)
    figure = new_figure(10, sum(heights) + 0.9)
    from matplotlib.colors import PowerNorm

    panels = list(figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    notes = f", played {prediction.repeats} times" if prediction.repeated else ""
    notes += ", edge frame left out" if prediction.dropped else ""
    heading = f"{_shorten(title, 70)}  ({prediction.seconds:.2f} s{notes})".lstrip()
    figure.suptitle(heading, parse_math=False)
    if waveform is not None:
        _draw_waveform(panels[0], waveform.detach().cpu().float().numpy(), prediction)
    edges = split_between_centers(prediction.frames, length)
    for head, axes in zip(heads, panels[-len(heads) :], strict=True):
        probabilities = prediction.heads[head].probabilities.numpy()
        tracks = probabilities[[category.index for category in rows[head]]]
        # the square root makes small probabilities visible, which are common among 1000 objects
        mesh = axes.pcolormesh(
            edges,
            np.arange(len(tracks) + 1),
            tracks,
            cmap=_COLOR_MAPS[head],
            norm=PowerNorm(0.5, 0, 1),
            rasterized=tracks.size > 2000,
        )
        labels = [_shorten(category.label, _LABEL_LENGTH) for category in rows[head]]
        axes.set_yticks(np.arange(len(tracks)) + 0.5, labels, parse_math=False)
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.set_title(head, loc="left", fontsize="medium")
        for line in range(1, len(tracks)):
            axes.axhline(line, color="white", linewidth=1.5)
        figure.colorbar(mesh, ax=axes, ticks=(0, 0.1, 0.5, 1), aspect=12, pad=0.01)
    frame = prediction.frames[0]
    panels[-1].set_xlim(0, length)
    panels[-1].set_xlabel(f"seconds (each frame covers {frame.end - frame.start:.1f} s around its position)")
    return figure


def _select_rows(prediction: Prediction, head: str) -> list[Category]:
    """Return the clip's list, then other frames' best categories, at most as many again."""
    listed = prediction.heads[head].top
    indices = {category.index for category in listed}
    others: dict[int, Category] = {}
    for frame in prediction.frames:
        best = frame.top[head][0]
        if best.index not in indices:
            others[best.index] = max(best, others.get(best.index, best), key=lambda row: row.probability)
    return listed + sorted(others.values(), key=lambda row: -row.probability)[: len(listed)]


def _draw_waveform(axes: Axes, samples: np.ndarray, prediction: Prediction) -> None:
    """Draw the lowest and highest sample of each column as a band."""
    repeats, seconds = prediction.repeats, prediction.seconds
    low, high = np.tile(samples if samples.ndim == 2 else np.stack([samples, samples]), repeats)
    step = -(-len(low) // _COLUMNS)
    starts = np.arange(0, len(low), step)
    times = starts * (seconds * repeats / len(low))
    low, high = np.minimum.reduceat(low, starts), np.maximum.reduceat(high, starts)
    axes.fill_between(times, low, high, color="0.35", linewidth=0.5)
    limit = max(1.1 * float(max(-low.min(), high.max())), FULL_SCALE / 1000)
    axes.set(ylim=(-limit, limit))
    axes.set_title(f"waveform (full scale is {FULL_SCALE:g})", loc="left", fontsize="medium")
    for number in range(1, repeats) if repeats <= 50 else ():
        axes.axvline(number * seconds, color="black", linewidth=0.8, linestyle=":")


def _shorten(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"
