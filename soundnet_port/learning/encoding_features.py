"""Features for encoding models: rows of several layers on a recording's clock, cached, and delayed.

A response follows what is heard by seconds, and is spread over seconds. Two models of that:

- delays (a finite impulse response): each channel comes several times, delayed by whole periods, and each
  output learns its own response as a weight per delay;
- a hemodynamic response function of canonical shape (HRF): each channel comes once, convolved with it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from soundnet_port.audio.loading import DECODERS, open_sound
from soundnet_port.files import stream_sha256
from soundnet_port.inference.activations import compute_activations
from soundnet_port.inference.alignment import Clock
from soundnet_port.learning.errors import EncodingError
from soundnet_port.learning.feature_cache import FeatureCache, Values, describe_network
from soundnet_port.network.architecture import SAMPLE_RATE, Architecture
from soundnet_port.network.engine import BLOCK
from soundnet_port.network.evaluation_mode import evaluation_mode
from soundnet_port.network.model import SoundNet
from soundnet_port.network.streaming import stream, streamable

HRFS = ("glover", "spm", "none")
# time to peak, time to undershoot, dispersion, weight of the undershoot, of a difference of gamma densities:
# Glover (1999) as nilearn and AFNI have it; SPM's canonical function
_GAMMAS = {"glover": (6.0, 12.0, 0.9, 0.35), "spm": (6.0, 16.0, 1.0, 1 / 6)}
_HRF_SECONDS, _HRF_STEPS = 32.0, 100  # length; points per second
_FIR_SECONDS = (2.0, 8.0)  # delays by default: where the hemodynamic response is large
_MOST_DELAYS = 5  # by default; a faster clock takes _SPARSE_DELAYS
_SPARSE_DELAYS = (2.0, 4.0, 6.0, 8.0)
_MOST_DELAY = 1000  # periods


def default_layers(architecture: Architecture) -> list[str]:
    """Return the trunk's layers, after pooling where there is one: what the next layer is given."""
    return [block.output for block in architecture.blocks]


def default_delays(tr: float) -> tuple[int, ...]:
    """Return delays in periods that cover 2 to 8 s, where the hemodynamic response is large.

    >>> default_delays(1.5), default_delays(2.0), default_delays(0.72)
    ((2, 3, 4, 5), (1, 2, 3, 4), (3, 6, 8, 11))
    """
    first, last = (seconds / tr for seconds in _FIR_SECONDS)
    delays = tuple(range(math.ceil(first - 1e-9), math.floor(last + 1e-9) + 1))
    if len(delays) > _MOST_DELAYS:
        return tuple(round(seconds / tr) for seconds in _SPARSE_DELAYS)
    return delays or (0, 1)


def hemodynamic_response(name: str, tr: float) -> NDArray[np.float64]:
    """Return the weight of each preceding period, from the current one on; their sum is 1.

    A weight is the function's integral over the times between the middle of the predicted period and the
    other period.

    Args:
        name: "glover" or "spm".
        tr: the period in seconds.
    """
    peak, undershoot, dispersion, ratio = _GAMMAS[name]
    times = np.arange(_HRF_SECONDS * _HRF_STEPS) / _HRF_STEPS

    def gamma(center: float) -> NDArray[np.float64]:
        shape, middles = center / dispersion, (times + 0.5 / _HRF_STEPS) / dispersion
        return np.asarray(np.exp((shape - 1) * np.log(middles) - middles - math.lgamma(shape)))

    integral = np.cumsum(gamma(peak) - ratio * gamma(undershoot))
    edges = (np.arange(math.floor(_HRF_SECONDS / tr + 0.5) + 2) - 0.5) * tr
    weights = np.diff(np.interp(edges, times + 1 / _HRF_STEPS, integral, left=0))
    return np.asarray(weights / weights.sum())


@dataclass(frozen=True)
class ResponseModel:
    """How rows of features turn into predictors of later periods.

    Attributes:
        delays: in periods, 0 or more.
        weights: of each delay, if the delayed rows are summed; empty if each is a predictor of its own.
    """

    delays: tuple[int, ...]
    weights: tuple[float, ...] = ()

    def describe(self, hrf: str | None) -> dict[str, Any]:
        """Return delays, or the name of the hemodynamic response that it was created of, as JSON's types."""
        return {"delays": None if self.weights else list(self.delays), "hrf": hrf if self.weights else None}

    def predictable(self, known: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return which periods have predictors, given which rows of a sound are known.

        Rows before the first known one count as silence, as those before the sound do; but these periods
        themselves, and those that need an unknown row at the sound's end, have no predictors.
        """
        if not known.any():
            return np.zeros_like(known)
        first = int(known.argmax())
        usable = known.copy()
        usable[:first] = True
        result = np.arange(len(known)) >= first
        for delay in self.delays:
            result[delay:] &= usable[: max(0, len(known) - delay)]
        return result

    def predictors(self, rows: Values) -> Values:
        """Return (periods, predictors) of a sound's z-scored rows; zeros stand before the sound.

        Unknown rows (NaN) count as zeros; see `predictable`.
        """
        known = torch.from_numpy(np.nan_to_num(rows))
        if self.weights:
            known = known.double()  # a sum of many
        return np.asarray(self.delay(known).float().numpy())

    def delay(self, rows: Tensor) -> Tensor:
        """Return (periods, predictors) of rows without NaN, with gradients; zeros stand before the first."""
        delayed = (F.pad(rows, (0, 0, delay, 0))[: len(rows)] for delay in self.delays)
        if not self.weights:
            return torch.cat(list(delayed), 1)
        total = torch.zeros_like(rows)
        for weight, own in zip(self.weights, delayed, strict=True):
            total = total + weight * own
        return total


def create_response(tr: float, delays: Sequence[int] | None, hrf: str | None) -> ResponseModel:
    """Create the response model of these settings; for arguments see `fit_encoding_models`.

    Raises:
        EncodingError: the settings cannot be used.
    """
    if not 0.001 <= tr <= 3600:
        raise EncodingError(f"tr: must be 0.001 to 3600 seconds, not {tr:g}")
    if hrf is not None and delays is not None:
        raise EncodingError("delays and hrf: choose one of them")
    if hrf is not None and hrf not in HRFS:
        raise EncodingError(f"unknown hrf {hrf!r}; choose from {', '.join(HRFS)}")
    if hrf == "none":
        return ResponseModel((0,))
    if hrf is not None:
        weights = hemodynamic_response(hrf, tr)
        return ResponseModel(tuple(range(len(weights))), tuple(weights.tolist()))
    chosen = default_delays(tr) if delays is None else tuple(delays)
    if (
        not chosen
        or len(set(chosen)) != len(chosen)
        or not all(isinstance(delay, Integral) and 0 <= delay <= _MOST_DELAY for delay in chosen)
    ):
        raise EncodingError(
            f"delays: different whole numbers of periods, 0 to {_MOST_DELAY:,}, not {list(chosen)}"
        )
    return ResponseModel(tuple(int(delay) for delay in chosen))


def check_decoder(decoder: str) -> None:
    """Raise an EncodingError if there is no such decoder."""
    if decoder not in DECODERS:
        raise EncodingError(f"unknown decoder {decoder!r}; choose from {', '.join(DECODERS)}")


def standardize(values: Values) -> Values:
    """Return columns with mean 0 and standard deviation 1, over rows that are not NaN.

    Constant columns become 0.
    """
    return Scaling.of(values).apply(values)


@dataclass(frozen=True)
class Scaling:
    """What z-scores columns: (values - mean) * factor, in float64; the factor of constant columns is 0."""

    mean: NDArray[np.float64]
    factor: NDArray[np.float64]

    @classmethod
    def of(cls, values: Values) -> Scaling:
        """Return the scaling of columns with mean 0 and standard deviation 1, over rows that are not NaN."""
        known = values[~np.isnan(values).any(1)].astype(np.float64)
        if not len(known):
            return cls(np.zeros(values.shape[1]), np.zeros(values.shape[1]))
        mean, std = known.mean(0), known.std(0)
        constant = std <= 1e-6 * np.abs(known).max(0)  # rounding of float32
        return cls(mean, np.where(constant, 0, 1 / np.where(constant, 1, std)))

    def apply(self, values: Values) -> Values:
        """Return the z-scored values; NaN stays NaN."""
        return np.asarray((values - self.mean) * self.factor, np.float32)


class AlignedFeatures:
    """Layers of sound files on a clock, through a cache; all layers from one pass over the sound.

    Args:
        model: the network.
        layers: names, or Torch7's module numbers.
        tr: the period in seconds.
        align: "center" or "end", see `soundnet_port.inference.alignment.align`.
        edge_frames: include edge frames; otherwise rows with nothing else are NaN.
        decoder: of sound files, see `load_audio`.
        cache: where rows are kept; None computes all.

    Raises:
        ValueError: an unknown layer, or an impossible clock.
    """

    def __init__(
        self,
        model: SoundNet,
        layers: Sequence[str | int],
        tr: float,
        align: str = "center",
        *,
        edge_frames: bool = False,
        decoder: str = "auto",
        cache: FeatureCache | None = None,
    ) -> None:
        self.model, self.layers, self.tr, self.align = model, list(layers), tr, align
        self.edge_frames, self.decoder, self.cache = edge_frames, decoder, cache
        for key in layers:
            Clock(model.architecture.layer(key), tr, align)
        self._settings: dict[str, Any] | None = None

    def extract(self, sound: Path, offset: float = 0.0) -> tuple[dict[str | int, Values], float]:
        """Return the rows of each layer, `(periods, channels)`, and the sound's seconds.

        Args:
            sound: a sound file.
            offset: where the first period starts, 0 to `tr` seconds after the sound's start.

        Raises:
            AudioError, ValueError, OSError: the sound cannot be used.
        """
        if self.cache is None:
            return self._compute(sound, self.layers, offset)
        with open(sound, "rb") as file:
            digest = stream_sha256(file)
        keys = {layer: self._cache_key(digest, layer, offset) for layer in self.layers}
        rows: dict[str | int, Values] = {}
        seconds = 0.0
        for layer, key in keys.items():
            if (entry := self.cache.read(key)) is not None:
                rows[layer], seconds = entry
        missing = [layer for layer in self.layers if layer not in rows]
        if missing:
            computed, seconds = self._compute(sound, missing, offset)
            for layer, values in computed.items():
                self.cache.write(keys[layer], values, seconds)
            rows |= computed
        return {layer: rows[layer] for layer in self.layers}, seconds

    def _cache_key(self, digest: str, layer: str | int, offset: float) -> str:
        if self._settings is None:
            self._settings = {
                **describe_network(self.model),
                "clock": [self.tr, self.align],
                "edge_frames": self.edge_frames,
                "decoder": self.decoder,
            }
        entry = {
            "sound": digest,
            "layer": self.model.architecture.layer(layer).key,
            "offset": offset,
            **self._settings,
        }
        return hashlib.sha256(json.dumps(entry).encode()).hexdigest()

    def _compute(
        self, sound: Path, layers: Sequence[str | int], offset: float
    ) -> tuple[dict[str | int, Values], float]:
        shift = round(offset * SAMPLE_RATE)
        clocks = {}
        for key in layers:
            layer = self.model.architecture.layer(key)
            clocks[key] = Clock(replace(layer, start=layer.start - shift), self.tr, self.align)
        if self.model.use_engine and streamable(self.model, layers):
            samples = self._stream(sound, clocks)
        else:  # modules inside layers need the sound in one piece
            output = compute_activations(self.model, sound, layers, decoder=self.decoder)
            samples = output.samples
            for key, clock in clocks.items():
                frames = output.activations[key]
                clock.add(frames[: len(frames) - self._edge_frames(key, samples)])
        if not self.edge_frames:
            self.model.architecture.check_ordinary(samples, map(self.model.architecture.layer, layers))
        rows = {
            key: clock.result(samples - shift, self._edge_frames(key, samples))[0].numpy()
            for key, clock in clocks.items()
        }
        return rows, samples / SAMPLE_RATE

    def _stream(self, sound: Path, clocks: dict[str | int, Clock]) -> int:
        """Add the frames of a sound to clocks, block by block; return its samples."""
        samples = 0
        with evaluation_mode(self.model), open_sound(sound, decoder=self.decoder) as reader:
            frames = stream(self.model, list(clocks))
            for block in reader.blocks(BLOCK):
                samples += len(block)
                for key, new in frames.push(block).items():
                    clocks[key].add(new[0].T)
            for key, new in frames.finish().items():  # edge frames are among these
                values = new[0].T
                clocks[key].add(values[: len(values) - self._edge_frames(key, samples)])
        return samples

    def _edge_frames(self, key: str | int, samples: int) -> int:
        return 0 if self.edge_frames else self.model.edge_frames(key, samples)
