"""The first layer's filters: magnitude responses and a figure of them (extra `[plot]`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from soundnet_port.network.architecture import SAMPLE_RATE
from soundnet_port.network.model import SoundNet
from soundnet_port.viewing.figures import PlotError, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FFT_SIZE = 4096  # a value every 5.4 Hz
_FLOOR = -50  # dB, the lowest level shown


class FilterResponse(NamedTuple):
    """The magnitude response of a filter of conv1.

    A filter whose taps are all zero has neither a center frequency nor a bandwidth.
    """

    index: int  # type: ignore[assignment]  #: of the output channel, counted from 0
    center: float | None  #: Hz, where the response is largest
    bandwidth: float | None  #: Hz around the center within which the response stays above -3 dB of it


def measure_filters(model: SoundNet) -> list[FilterResponse]:
    """Measure conv1's filters; sorted by center frequency, filters of zeros last.

    64 taps at 22,050 Hz resolve frequencies some 345 Hz apart. The response is computed every 5.4 Hz
    (zero-padded FFT), which is the precision of the center frequency.

    Raises:
        PlotError: conv1 holds NaN or infinite values.
    """
    frequencies, responses = _compute_responses(_get_taps(model))
    measured = []
    for index, response in enumerate(responses):
        if response.any():
            low, center, high = frequencies[_find_passband(response)].tolist()
            measured.append(FilterResponse(index, center, high - low))
        else:
            measured.append(FilterResponse(index, None, None))
    return sorted(measured, key=lambda row: (row.center is None, row.center))


def plot_filters(model: SoundNet) -> Figure:
    """Plot conv1's filters by center frequency: the taps, and the magnitude response.

    Each plot of taps has its own scale. Responses are in dB relative to the largest of all filters; a
    dashed line marks the center frequency, a band the bandwidth (see `measure_filters`).

    Raises:
        PlotError: conv1 holds NaN or infinite values.
        MissingExtraError: the extra `[plot]` is not installed.
    """
    measured, taps = measure_filters(model), _get_taps(model)
    frequencies, responses = _compute_responses(taps)
    largest = responses.max() or 1.0
    decibels = 20 * np.log10(np.maximum(responses / largest, 1e-6))
    milliseconds = 1000 * np.arange(taps.shape[1]) / SAMPLE_RATE
    rows = -(-len(measured) // 2)
    figure = new_figure(11, 1.1 + 0.95 * rows)
    grid = figure.subplots(rows, 4, sharex="col", squeeze=False, width_ratios=(1, 1.25, 1, 1.25))
    figure.suptitle(f"{model.architecture.blocks[0].name} of {model.architecture.name}, by center frequency")
    for position, (index, center, _) in enumerate(measured):
        row, column = position % rows, 2 * (position // rows)
        time_axes, response_axes = grid[row, column], grid[row, column + 1]
        time_axes.plot(milliseconds, taps[index], color="tab:blue", linewidth=1)
        limit = 1.1 * np.abs(taps[index]).max() or 1.0
        time_axes.set(ylim=(-limit, limit), xlim=(0, milliseconds[-1]), yticks=[])
        name = "silent" if center is None else f"{center:,.0f} Hz"
        time_axes.set_ylabel(f"#{index}\n{name}", rotation=0, ha="right", va="center")
        response_axes.plot(frequencies, decibels[index], color="tab:red", linewidth=1)
        response_axes.set(ylim=(_FLOOR, 3), xlim=(0, SAMPLE_RATE / 2), yticks=(-40, -20, 0))
        response_axes.tick_params(labelsize=8)
        response_axes.grid(alpha=0.3)
        if center is not None:
            low, _, high = frequencies[_find_passband(responses[index])]
            response_axes.axvline(center, color="black", linewidth=0.8, linestyle="--")
            response_axes.axvspan(low, high, color="tab:red", alpha=0.15, linewidth=0)
    for column in range(4):
        last = min(rows, len(measured) - rows * (column // 2)) - 1
        for row in range(last + 1, rows):
            grid[row, column].set_axis_off()
        if last >= 0:
            grid[0, column].set_title("response (dB)" if column % 2 else "taps", fontsize="medium")
            grid[last, column].set_xlabel("Hz" if column % 2 else "ms")
            grid[last, column].tick_params(labelbottom=True)
    return figure


def _get_taps(model: SoundNet) -> np.ndarray:
    """Return conv1's weights, `(channels, kernel)`, float64."""
    weight = model.get_parameter(f"{model.architecture.blocks[0].name}.weight")
    taps: np.ndarray = weight.detach().cpu().double().numpy()[:, 0]
    if not np.isfinite(taps).all():
        raise PlotError(f"{model.architecture.blocks[0].name}: holds NaN or infinite values")
    return taps


def _compute_responses(taps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return frequencies in Hz, and each filter's magnitude response there."""
    frequencies = np.fft.rfftfreq(_FFT_SIZE, 1 / SAMPLE_RATE)
    return frequencies, np.abs(np.fft.rfft(taps, _FFT_SIZE, axis=1))


def _find_passband(response: np.ndarray) -> list[int]:
    """Return the bins of the lower -3 dB limit, the peak, and the upper limit."""
    peak = int(response.argmax())
    below = np.flatnonzero(response < response[peak] / np.sqrt(2))
    low = max(below[below < peak], default=-1) + 1
    high = min(below[below > peak], default=len(response)) - 1
    return [int(low), peak, int(high)]
