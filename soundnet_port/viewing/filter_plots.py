"""The first layer's filters: magnitude responses, shapes, and a figure of them (extra `[plot]`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from soundnet_port.network.architecture import SAMPLE_RATE
from soundnet_port.network.model import SoundNet
from soundnet_port.viewing.figures import PlotError, new_figure
from soundnet_port.viewing.filter_fits import GOOD, FilterFits, fit_filters, sample_fit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

_Number = TypeVar("_Number", float, np.ndarray)
_FFT_SIZE = 4096  # a value every 5.4 Hz
_FLOOR = -50  # dB, the lowest level shown
_PANEL_POINTS = (350, 215)  # about the size of the plot of bandwidths
_KINDS = (
    ("gammatone", "gammatone", "o", "tab:orange"),
    ("reversed_gammatone", "reversed gammatone", "s", "tab:purple"),
    ("gabor", "Gabor", "x", "tab:blue"),
)


class FilterResponse(NamedTuple):
    """A filter of conv1: its magnitude response, and the fits to its impulse response.

    A filter whose taps are all zero has neither.
    """

    index: int  # type: ignore[assignment]  #: of the output channel, counted from 0
    center: float | None  #: Hz, where the response is largest
    bandwidth: float | None  #: Hz around the center within which the response stays above -3 dB of it
    erb: float | None  #: Hz, the equivalent rectangular bandwidth: the power in all, divided by the peak's
    fits: FilterFits | None  #: gammatone, reversed gammatone and Gabor function

    @property
    def shape(self) -> str:
        """`silent` for a filter of zeros, else what the fits say (`FilterFits.shape`)."""
        return self.fits.shape if self.fits else "silent"

    def to_json(self) -> dict[str, Any]:
        """Return all figures by name, with the ear's bandwidth at the center as `auditory_erb`."""
        values = self._asdict()
        del values["fits"]
        fits = self.fits or (None,) * len(FilterFits._fields)
        return {
            **values,
            "auditory_erb": None if self.center is None else compute_auditory_erb(self.center),
            "shape": self.shape,
            **{kind: fit and fit._asdict() for kind, fit in zip(FilterFits._fields, fits, strict=True)},
        }


def compute_auditory_erb(frequency: _Number) -> _Number:
    """Return the ear's equivalent rectangular bandwidth at a frequency, both in Hz.

    Of young listeners at moderate levels (Glasberg and Moore 1990, equation 3).
    """
    return 24.7 * (frequency * 4.37 / 1000 + 1)


def measure_filters(model: SoundNet) -> list[FilterResponse]:
    """Measure conv1's filters; sorted by center frequency, filters of zeros last.

    64 taps at 22,050 Hz resolve frequencies some 345 Hz apart. That is also the least equivalent rectangular
    bandwidth, except near 0 Hz and half the sample rate, where half of the lobe is beyond the end. The
    response is computed every 5.4 Hz (zero-padded FFT), which is the precision of the center frequency.

    Raises:
        PlotError: conv1 holds NaN or infinite values.
    """
    taps = _get_taps(model)
    frequencies, responses = _compute_responses(taps)
    audible = [index for index, response in enumerate(responses) if response.any()]
    fits = dict(zip(audible, fit_filters(taps[audible]), strict=True))
    measured = []
    for index, response in enumerate(responses):
        if index not in fits:
            measured.append(FilterResponse(index, None, None, None, None))
            continue
        low, center, high = frequencies[_find_passband(response)].tolist()
        power = (response / response.max()) ** 2
        erb = float((power[1:] + power[:-1]).sum() / 2 * frequencies[1])  # trapezoids
        measured.append(FilterResponse(index, center, high - low, erb, fits[index]))
    return sorted(measured, key=lambda row: (row.center is None, row.center))


def plot_filters(model: SoundNet, measured: Sequence[FilterResponse] | None = None) -> Figure:
    """Plot conv1's filters by center frequency, and below them their bandwidths and how well each kind fits.

    Each plot of taps has its own scale, and shows the fitted gammatone where it explains 80 % of the energy.
    Responses are in dB relative to the largest of all filters; a dashed line marks the center frequency, a
    band the bandwidth. See `measure_filters`, whose result can be passed as `measured`.

    Raises:
        PlotError: conv1 holds NaN or infinite values.
        MissingExtraError: the extra `[plot]` is not installed.
    """
    measured = measure_filters(model) if measured is None else measured
    rows = -(-len(measured) // 2)
    height = 1.1 + 0.95 * rows
    figure = new_figure(11, height + 4)
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(height, 4))[:, 0]
    above.suptitle(f"{model.architecture.blocks[0].name} of {model.architecture.name}, by center frequency")
    _draw_filters(above, measured, _get_taps(model))
    left, right = below.subplots(1, 2, width_ratios=(1.15, 1))
    _draw_bandwidths(left, measured, SAMPLE_RATE / model.architecture.blocks[0].kernel)
    _draw_residuals(right, measured)
    return figure


def _draw_filters(figure: SubFigure, measured: Sequence[FilterResponse], taps: np.ndarray) -> None:
    frequencies, responses = _compute_responses(taps)
    decibels = 20 * np.log10(np.maximum(responses / (responses.max() or 1.0), 1e-6))
    milliseconds = 1000 * np.arange(taps.shape[1]) / SAMPLE_RATE
    rows = -(-len(measured) // 2)
    grid = figure.subplots(rows, 4, sharex="col", squeeze=False, width_ratios=(1, 1.25, 1, 1.25))
    for position, filter_response in enumerate(measured):
        index, center = filter_response.index, filter_response.center
        row, column = position % rows, 2 * (position // rows)
        time_axes, response_axes = grid[row, column], grid[row, column + 1]
        time_axes.plot(milliseconds, taps[index], color="tab:blue", linewidth=1)
        fits = filter_response.fits
        if fits and fits.gammatone.explained >= GOOD:
            fitted = sample_fit(fits, "gammatone", taps.shape[1])
            time_axes.plot(milliseconds, fitted, color="tab:orange", linewidth=1, linestyle="--")
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
            title = "response (dB)" if column % 2 else "taps (dashed: gammatone)"
            grid[0, column].set_title(title, fontsize="medium")
            grid[last, column].set_xlabel("Hz" if column % 2 else "ms")
            grid[last, column].tick_params(labelbottom=True)


def _draw_bandwidths(axes: Axes, measured: Sequence[FilterResponse], resolution: float) -> None:
    """Draw bandwidths by center frequency, with the ear's."""
    lowest, nyquist = 50.0, SAMPLE_RATE / 2
    audible = [row for row in measured if row.center is not None and row.erb is not None]
    centers = np.array([max(row.center or 0, lowest) for row in audible])
    erbs = np.array([row.erb for row in audible], float)
    line = np.geomspace(lowest, nyquist, 200)
    axes.plot(line, compute_auditory_erb(line), color="tab:green", label="ear's ERB (Glasberg & Moore 1990)")
    axes.axhline(
        resolution, color="gray", linewidth=1, linestyle=":", label=f"{resolution:,.0f} Hz: resolution"
    )
    bands = np.array([row.bandwidth for row in audible], float)
    axes.plot(centers, bands, "_", color="tab:red", markersize=9, label="-3 dB bandwidth")
    axes.plot(centers, erbs, "o", color="tab:blue", markersize=5, label="ERB of the filter")
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(0.8 * lowest, 1.1 * nyquist),
        ylim=(20, max(3000.0, 4 * erbs.max(initial=0))),
    )
    axes.set(xlabel=f"center frequency (Hz; below {lowest:.0f} at the edge)", ylabel="bandwidth (Hz)")
    axes.set_title("bandwidths, with the filters' numbers", fontsize="medium")
    for values, ticks in (
        (axes.xaxis, (100, 300, 1000, 3000, 10_000)),
        (axes.yaxis, (30, 100, 300, 1000, 3000)),
    ):
        values.set_ticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    _label_points(axes, np.stack((centers, erbs), 1), [str(row.index) for row in audible])


def _label_points(axes: Axes, points: np.ndarray, labels: Sequence[str]) -> None:
    """Write labels beside points on logarithmic axes where they touch neither each other nor other points."""
    limits = np.log([axes.get_xlim(), axes.get_ylim()])
    places = (np.log(points) - limits[:, 0]) / (limits[:, 1] - limits[:, 0]) * _PANEL_POINTS
    angles = np.pi * np.array([0.5, 1.5, 0.25, 1.75, 0.75, 1.25, 0, 1])
    offsets = [r * np.array([np.cos(a), np.sin(a)]) for r in (9, 16, 24, 32, 40) for a in angles]
    taken = list(places)
    for place, (x, y), label in zip(places, points, labels, strict=True):
        others = np.array([other for other in taken if other is not place]).reshape(-1, 2)

        def clearance(offset: np.ndarray, place: np.ndarray = place, others: np.ndarray = others) -> float:
            # digits are some 10 points high and 12 wide
            return float(np.abs((others - place - offset) / (12, 10)).max(1).min(initial=1))

        offset = next((o for o in offsets if clearance(o) >= 1), offsets[0])
        taken.append(place + offset)
        axes.annotate(
            label,
            (x, y),
            (offset[0], offset[1]),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "shrinkA": 4, "shrinkB": 2}
            if np.hypot(*offset) > 10
            else None,
        )


def _draw_residuals(axes: Axes, measured: Sequence[FilterResponse]) -> None:
    """Draw what each kind of fit leaves of each filter's energy."""
    audible = [row for row in measured if row.fits]
    for kind, name, marker, color in _KINDS:
        left = [100 * (1 - getattr(row.fits, kind).explained) for row in audible]
        axes.plot(range(len(audible)), left, marker, color=color, markersize=6, fillstyle="none", label=name)
    axes.axhline(100 * (1 - GOOD), color="gray", linewidth=1, linestyle=":")
    axes.set(yscale="log", ylim=(0.4, 130), ylabel="energy left unexplained (%)", xlabel="filter")
    rotation = 90 if len(audible) > 20 else 0
    axes.set_xticks(range(len(audible)), [str(row.index) for row in audible], fontsize=8, rotation=rotation)
    axes.set_yticks((1, 3, 10, 30, 100), ("1", "3", "10", "30", "100"))
    axes.minorticks_off()
    axes.set_title("fits: lower is better", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize=8)


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
