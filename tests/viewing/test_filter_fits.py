"""Gammatones, reversed ones, Gabor functions and noise are told apart."""

import numpy as np
import pytest

from soundnet_port.viewing.filter_fits import fit_filters, sample_fit


def gammatone(frequency, b, onset, phase=0.0):
    """Taps of a filter whose impulse response is a gammatone; the onset is in ms."""
    time = np.arange(64) / 22_050 - onset / 1000
    response = np.maximum(time, 0) ** 3 * np.exp(-2 * np.pi * b * time)
    return (response * np.cos(2 * np.pi * frequency * time + phase))[::-1] / response.max()


def gabor(frequency, width, center, phase=0.0):
    """Taps under a Gaussian; width and center in ms."""
    time = np.arange(64) / 22.05 - center
    return np.exp(-0.5 * (time / width) ** 2) * np.cos(2 * np.pi * frequency / 1000 * time + phase)


def noise(level):
    return level * np.random.default_rng(0).normal(size=64)


# the last begins before the taps, and is cut off after them
GAMMATONES = [(1000, 500, 0.2, 0.0), (2500, 700, 1.0, np.pi), (5000, 1019, 0.5, 1.0), (600, 300, -0.3, 2.0)]


def test_gammatones_are_recognized_with_their_parameters():
    for (frequency, b, onset, phase), fits in zip(
        GAMMATONES, fit_filters(np.stack([gammatone(*row) for row in GAMMATONES])), strict=True
    ):
        fit = fits.gammatone
        assert fits.shape == "gammatone"
        # a least-squares minimum of 0, found to the precision of the differences taken
        assert fit[:3] == pytest.approx((1, frequency, b), rel=1e-4)
        assert fit.onset == pytest.approx(onset, abs=1e-3)
        assert fit.amplitude == pytest.approx(1, abs=0.01)  # the largest tap is beside the envelope's peak
        at_peak = phase + 2 * np.pi * frequency * (fit.peak - onset) / 1000
        assert np.cos(fit.phase - at_peak) == pytest.approx(1, abs=1e-4)


def test_a_reversed_gammatone_is_none():
    """The taps of a convolution layer run against time."""
    (fits,) = fit_filters(gammatone(*GAMMATONES[0])[None, ::-1])
    assert fits.shape == "reversed gammatone"
    assert fits.reversed_gammatone[:3] == pytest.approx((1, 1000, 500), rel=1e-4)
    assert fits.reversed_gammatone.onset == pytest.approx(1000 * 63 / 22_050 - 0.2, abs=1e-3)


def test_gabors_and_noise_are_not_called_gammatones():
    taps = [gabor(1200, 0.4, 1.4), gabor(3000, 0.3, 1.0, 1.0), gabor(800, 0.6, 1.8, 2.0), noise(1)]
    shapes = [fits.shape for fits in fit_filters(np.stack(taps))]
    assert shapes == ["Gabor", "Gabor", "Gabor", "other"]


def test_what_the_taps_do_not_decide_is_ambiguous():
    """A sinusoid as long as the filter has no envelope to tell kinds apart by."""
    flat = np.cos(2 * np.pi * 900 * np.arange(64) / 22_050) + noise(0.2)
    (fits,) = fit_filters(flat[None])
    assert min(fit.explained for fit in fits) > 0.8
    assert fits.shape == "ambiguous"


@pytest.mark.parametrize("kind", ["gammatone", "reversed_gammatone", "gabor"])
def test_sampled_fits_explain_what_they_say(kind):
    taps = gabor(1200, 0.7, 1.0, 1.0) + noise(0.1)
    (fits,) = fit_filters(taps[None])
    residual = taps - sample_fit(fits, kind, 64)
    assert 1 - (residual**2).sum() / (taps**2).sum() == pytest.approx(getattr(fits, kind).explained, abs=1e-6)
