"""Fits of gammatones and Gabor functions to the impulse responses of the first layer's filters.

A convolution layer correlates: as a filter, its impulse response is its taps in reverse order. Fits and
their times refer to the impulse response, so a gammatone rises fast and decays slowly, as in the ear.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from soundnet_port.network.architecture import SAMPLE_RATE

GOOD = 0.8  # explained variance from which a filter has a shape at all
CLEAR = 1.2  # how many times the residual of a better shape the others must leave to be ruled out
_LOWEST = 20 / SAMPLE_RATE  # cycles per tap
_NARROWEST = 2.0  # taps, the smallest standard deviation of an envelope

Kind = Literal["gammatone", "reversed_gammatone", "gabor"]
Shape = Literal["gammatone", "reversed gammatone", "Gabor", "ambiguous", "other"]
_Envelope = Callable[[np.ndarray], np.ndarray]


class FilterFit(NamedTuple):
    """A sinusoid under an envelope, fitted to an impulse response by least squares.

    Each kind has five free parameters: peak, width, frequency, phase and amplitude. The sign of a filter is
    in the phase.
    """

    explained: float  #: 1 - residual / energy, from 0 to 1
    frequency: float  #: Hz, of the sinusoid
    bandwidth: float  #: Hz; of a gammatone its b, of a Gabor function 1 / (pi width)
    peak: float  #: ms after the start of the impulse response at which the envelope is largest
    width: float  #: ms, the envelope's standard deviation
    onset: float | None  #: ms at which a gammatone begins (a reversed one: ends); may lie outside the taps
    phase: float  #: radians, of the cosine at the envelope's peak, from -pi to pi
    amplitude: float  #: of the envelope's peak, in the units of the taps


class FilterFits(NamedTuple):
    """The best fit of each kind to a filter."""

    gammatone: FilterFit  #: of order 4: t^3 exp(-2 pi b t) cos(2 pi f t + phase), t from the onset
    reversed_gammatone: FilterFit  #: of order 4, with the slow flank first: attack and decay exchanged
    gabor: FilterFit  #: with a Gaussian, symmetric envelope

    @property
    def shape(self) -> Shape:
        """What the filter is: `other` if none of the fits explains 80 % of its energy.

        It is the kind that fits best if each other kind leaves at least 1.2 times its residual (with 64 taps
        and as many parameters a difference in BIC of 11.7; 10 counts as very strong evidence), else
        `ambiguous`.
        """
        best, second, _ = sorted(self, key=lambda fit: -fit.explained)
        if best.explained < GOOD:
            return "other"
        if 1 - second.explained < CLEAR * (1 - best.explained):
            return "ambiguous"
        names: tuple[Shape, ...] = ("gammatone", "reversed gammatone", "Gabor")
        return names[self.index(best)]


def fit_filters(taps: np.ndarray) -> list[FilterFits]:
    """Fit gammatones of order 4, reversed ones and Gabor functions to filters.

    The envelope's peak lies within the taps, its standard deviation is between 2 taps and the filter's
    length, and the frequency between 20 Hz and half the sample rate, in all three alike.

    Args:
        taps: `(filters, kernel)` at 22,050 Hz, finite, none of the filters all zero; in the order of the
            layer's weights.
    """
    responses = taps[:, ::-1]  # impulse responses
    mirrored = [_mirror(fit, taps.shape[1]) for fit in _fit(taps, _gamma_envelope)]
    rows = zip(_fit(responses, _gamma_envelope), mirrored, _fit(responses, _gaussian_envelope), strict=True)
    return [FilterFits(*row) for row in rows]


def sample_fit(fits: FilterFits, kind: Kind, kernel: int) -> np.ndarray:
    """Return the taps that a fit describes, `(kernel,)`, in the order of the layer's weights."""
    fit = getattr(fits, kind)
    if kind == "reversed_gammatone":
        return _sample(_mirror(fit, kernel), _gamma_envelope, kernel)
    return _sample(fit, _gamma_envelope if kind == "gammatone" else _gaussian_envelope, kernel)[::-1]


def _sample(fit: FilterFit, envelope: _Envelope, kernel: int) -> np.ndarray:
    time = np.arange(kernel) / SAMPLE_RATE - fit.peak / 1000
    carrier = np.cos(2 * np.pi * fit.frequency * time + fit.phase)
    response: np.ndarray = fit.amplitude * envelope(time / (fit.width / 1000)) * carrier
    return response


def _mirror(fit: FilterFit, kernel: int) -> FilterFit:
    """Return a fit to an impulse response played backwards."""
    end = 1000 * (kernel - 1) / SAMPLE_RATE
    onset = None if fit.onset is None else end - fit.onset
    return fit._replace(peak=end - fit.peak, onset=onset, phase=-fit.phase)


# Envelopes take the time since their peak in standard deviations, and are 1 there.


def _gamma_envelope(time: np.ndarray) -> np.ndarray:
    # s^3 exp(-2 pi b s) has its peak at s = 3 / (2 pi b), and as a density the deviation 2 / (2 pi b)
    since_onset = np.maximum(time / 1.5 + 1, 0)  # in units of the time from onset to peak
    envelope: np.ndarray = (since_onset * np.exp(1 - since_onset)) ** 3
    return envelope


def _gaussian_envelope(time: np.ndarray) -> np.ndarray:
    envelope: np.ndarray = np.exp(-0.5 * time**2)
    return envelope


def _fit(responses: np.ndarray, envelope: _Envelope) -> list[FilterFit]:
    """Fit one kind to impulse responses `(filters, kernel)`.

    Amplitude and phase are linear, and solved for. Peak, width and frequency come from a grid, whose best
    point at each width is refined by the Levenberg-Marquardt method, for all filters at once.
    """
    kernel = responses.shape[1]
    normalized = responses / np.linalg.norm(responses, axis=1, keepdims=True)
    low = np.array([0, math.log(_NARROWEST), _LOWEST])
    high = np.array([kernel - 1, math.log(kernel), 0.5])
    # frequencies in steps of half the distance that so many taps resolve
    peaks, widths, frequencies = map(np.linspace, low, high, (12, 8, kernel))
    starts = []
    for width in widths:
        points = np.stack(np.meshgrid(peaks, width, frequencies), -1).reshape(-1, 3)
        cosine, sine = _carriers(points, kernel, envelope)
        explained, _ = _project(cosine, sine, normalized @ cosine.T, normalized @ sine.T)
        starts.append(points[explained.argmax(1)])
    refined, residuals = _refine(
        np.stack(starts, 1),
        lambda points: _compute_residuals(points, normalized[:, None], envelope),
        low,
        high,
    )
    best = (residuals**2).sum(-1).argmin(1)
    chosen = refined[np.arange(len(best)), best]
    return [_describe(response, point, envelope) for response, point in zip(responses, chosen, strict=True)]


def _refine(
    points: np.ndarray, residuals_at: Callable[[np.ndarray], np.ndarray], low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Minimize sums of squared residuals from starts `(..., 3)`, within bounds (Levenberg-Marquardt)."""
    step = 1e-5 * (high - low)
    damping = np.full((*points.shape[:-1], 1, 1), 1e-2)
    residuals = residuals_at(points)
    for _ in range(25):
        columns = [(residuals_at(points + d) - residuals_at(points - d)) / 2e-5 for d in np.diag(step)]
        jacobian = np.stack(columns, -1)  # per width of the bounds
        gradient = np.einsum("...kp,...k->...p", jacobian, residuals)
        # a parameter that would leave its bounds stays there
        held = ((points <= low) & (gradient > 0)) | ((points >= high) & (gradient < 0))
        jacobian, gradient = jacobian * ~held[..., None, :], gradient * ~held
        normal = np.einsum("...kp,...kq->...pq", jacobian, jacobian)
        scale = np.eye(3) * (np.einsum("...pp->...p", normal)[..., None, :] + 1e-9)
        change = np.linalg.solve(normal + damping * scale, -gradient[..., None])[..., 0]
        tried = np.clip(points + change * (high - low), low, high)
        new = residuals_at(tried)
        better = (new**2).sum(-1, keepdims=True) < (residuals**2).sum(-1, keepdims=True)
        points, residuals = np.where(better, tried, points), np.where(better, new, residuals)
        damping = np.clip(np.where(better[..., None], damping / 4, damping * 4), 1e-9, 1e9)
    return points, residuals


def _compute_residuals(points: np.ndarray, responses: np.ndarray, envelope: _Envelope) -> np.ndarray:
    """Return what the best amplitude and phase leave of impulse responses, `(..., kernel)`."""
    cosine, sine = _carriers(points, responses.shape[-1], envelope)
    _, (a, b) = _project(cosine, sine, (responses * cosine).sum(-1), (responses * sine).sum(-1))
    residuals: np.ndarray = responses - a[..., None] * cosine - b[..., None] * sine
    return residuals


def _carriers(points: np.ndarray, kernel: int, envelope: _Envelope) -> tuple[np.ndarray, np.ndarray]:
    """Return cosines and sines under their envelopes, `(..., kernel)`.

    Points `(..., 3)` are the peak in taps, the logarithm of the width in taps, and cycles per tap.
    """
    peak, width, frequency = (points[..., index, None] for index in range(3))
    time = np.arange(kernel) - peak
    levels = envelope(time / np.exp(width))
    angle = 2 * np.pi * frequency * time
    return levels * np.cos(angle), levels * np.sin(angle)


def _project(
    cosine: np.ndarray, sine: np.ndarray, with_cosine: np.ndarray, with_sine: np.ndarray
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Project on the plane of a cosine and a sine, given the products with them.

    Return the energy explained, and both coefficients.
    """
    cc, ss, cs = (cosine**2).sum(-1), (sine**2).sum(-1), (cosine * sine).sum(-1)
    ss = ss + 1e-9 * cc  # at half the sample rate the sine may be zero at all taps
    determinant = cc * ss - cs**2
    a = (ss * with_cosine - cs * with_sine) / determinant
    b = (cc * with_sine - cs * with_cosine) / determinant
    return a * with_cosine + b * with_sine, (a, b)


def _describe(response: np.ndarray, point: np.ndarray, envelope: _Envelope) -> FilterFit:
    cosine, sine = _carriers(point, len(response), envelope)
    explained, (a, b) = _project(cosine, sine, response @ cosine, response @ sine)
    milliseconds = 1000 / SAMPLE_RATE
    peak, width = point[0] * milliseconds, math.exp(point[1]) * milliseconds
    return FilterFit(
        explained=float(explained / (response @ response)),
        frequency=float(point[2] * SAMPLE_RATE),
        bandwidth=1000 / (math.pi * width),
        peak=float(peak),
        width=width,
        onset=float(peak - 1.5 * width) if envelope is _gamma_envelope else None,
        phase=math.atan2(-b, a),
        amplitude=math.hypot(a, b),
    )
