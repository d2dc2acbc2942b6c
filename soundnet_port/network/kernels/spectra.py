"""Bring weights into the layouts that the kernels read."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FIRST_POINTS = 128  # of each phase in a block of the first layer


def first_spectra(weight: Tensor, lanes: int) -> Tensor:
    """Return the first layer's spectra, even and odd taps, of the frequencies 0 to 64.

    Shape:
        weight: `(channels, 1, kernel)`; returns `(channels / lanes, 65, 4, lanes)`
    """
    even, odd = (spectrum[:, 0, : FIRST_POINTS // 2 + 1] for spectrum in _spectra(weight, FIRST_POINTS))
    parts = np.stack([even.real, even.imag, odd.real, odd.imag], -1)
    vectors = parts.reshape(-1, lanes, FIRST_POINTS // 2 + 1, 4).transpose(0, 2, 3, 1)
    return torch.from_numpy(vectors.astype(np.float32, "C"))


def layer_spectra(weight: Tensor, points: int) -> Tensor:
    """Return for each frequency the matrix from a layer's input spectra to its output spectra.

    Even and odd frames are the real and the imaginary part of one series with the spectrum z, so theirs are
    (z[k] + conj z[-k]) / 2 and (z[k] - conj z[-k]) / 2i. The second half of the channels that come out is the
    imaginary part of the first. The matrix's rows belong to re z[k], im z[k], re z[-k], im z[-k].

    Shape:
        weight: `(channels, channels in, kernel)`; returns `(points, 4 * channels in, channels)`
    """
    even, odd = _spectra(weight, points)
    half = len(even) // 2
    rows = []
    for spectrum in (even - 1j * odd, 1j * even + odd, even + 1j * odd, odd - 1j * even):
        paired = (spectrum[:half] + 1j * spectrum[half:]).transpose(2, 1, 0) / 2
        rows.append(np.concatenate([paired.real, paired.imag], 2))
    return torch.from_numpy(np.concatenate(rows, 1).astype(np.float32, "C"))


def panels(columns: Tensor, panel: int) -> Tensor:
    """Cut columns into panels, the last one filled up with zeros.

    Shape:
        columns: `(terms, channels)`; returns `(panels, terms, panel)`
    """
    padded = torch.nn.functional.pad(columns, (0, -columns.shape[1] % panel))
    return padded.view(len(columns), -1, panel).permute(1, 0, 2).contiguous()


def _spectra(weight: Tensor, points: int) -> list[NDArray[np.complex128]]:
    """Of the even and of the odd taps, as a correlation's, divided by the transform's size."""
    taps = weight.double().numpy()
    spectra = [np.fft.fft(taps[..., phase::2], points) for phase in (0, 1)]
    return [np.conj(spectrum).astype(np.complex128) / points for spectrum in spectra]
