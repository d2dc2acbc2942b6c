"""A sound that is still going on: what the network says of its last seconds, and its layers so far.

The answer is that of `predict` for the last seconds, as if they were a clip, each time that a chunk
arrives: a head has a frame every 3 s only, and each hears 14.5 s. Layers come from a stream, whose frames
do not change any more; the shallow ones are determined within a fraction of a second.

In memory are the last seconds, and the layers of the last minute as maxima over columns of equal length.
"""

from __future__ import annotations

import math
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from soundnet_port.audio.loudness import NORMALIZED, QUIET
from soundnet_port.inference.alignment import first_edge
from soundnet_port.inference.prediction import HeadPrediction, min_samples, predict
from soundnet_port.network.architecture import CLASSES, FULL_SCALE, SAMPLE_RATE, Layer
from soundnet_port.network.model import SoundNet
from soundnet_port.network.resampling import create_resampler
from soundnet_port.network.streaming import stream
from soundnet_port.network.waveform_scale import scale_known
from soundnet_port.viewing.activation_maps import select_sources
from soundnet_port.viewing.spectrograms import HEIGHT as SPECTROGRAM_HEIGHT
from soundnet_port.viewing.spectrograms import SpectrogramStream
from soundnet_port.viewing.summaries import TOP, encode_levels

MIN_RATE, MAX_RATE = 3_000, 384_000  # Hz; browsers' audio contexts have 8,000 to 96,000, some more
MAX_CHUNK = 20.0  # seconds
MAX_SESSIONS = 4
IDLE_SECONDS = 60.0  # without a chunk, after which a session is closed
KEPT_SECONDS = 60.0  # of layers
LEAST = 1.0  # second of sound for an answer; less, repeated to 11 s, is a tone
# Seconds that an answer may be of, besides the shortest clip that is not repeated. On ESC-10 a linear
# classifier of the answers is right for 71, 74 and 47 % of the clips 3 s after they have begun, and for 71,
# 74 and 79 % once the window holds nothing else.
_WINDOWS = (2.0, 3.0, 5.0)
DEFAULT_WINDOW = 3.0
_COLUMN = 1024  # samples, 46 ms; more for layers of a larger stride
_SPECTRUM = (-100.0, -20.0)  # dB of a full-scale tone, from the darkest to the brightest


class LiveSession:
    """A sound so far.

    Args:
        model: any SoundNet.
        rate: of the samples, in Hz.
        edge_frames: see `predict`.

    Attributes:
        id: cannot be guessed.
        rate: as it was given.
        busy: a chunk is on its way.
        last_request: when one came last, by time.monotonic().

    Raises:
        ValueError: an impossible sample rate.
    """

    def __init__(self, model: SoundNet, rate: int, edge_frames: bool = False) -> None:
        if not MIN_RATE <= rate <= MAX_RATE:
            raise ValueError(f"the sample rate must be {MIN_RATE:,} to {MAX_RATE:,} Hz, not {rate:,}")
        self.id, self.rate, self.busy = secrets.token_urlsafe(24), rate, False
        self._model, self._edge_frames = model, edge_frames
        self._resampler = create_resampler(rate)
        self._received, self._samples = 0, 0  # at its rate; at 22,050 Hz
        self._last = torch.zeros(0)  # the last seconds at 22,050 Hz, within +-256
        self._longest = round(max(list_windows(model, edge_frames)) * SAMPLE_RATE)
        self._sources = select_sources(model.architecture, _COLUMN + 1)
        self._strips = {layer.name: _build_strip(layer) for layer in self._sources.values()}
        self._stream = stream(model, list(self._strips))
        self._spectra = SpectrogramStream(_COLUMN)
        self._spectrogram = _Strip(1, -_COLUMN / 2, _COLUMN, SPECTROGRAM_HEIGHT)
        self.touch()

    def touch(self) -> None:
        """Note that the session is in use."""
        self.last_request = time.monotonic()

    def push(self, samples: NDArray[np.float32]) -> None:
        """Take the next samples.

        Shape:
            samples: `(samples,)` at the session's rate, a full-scale sample at 1; what is beyond is clipped

        Raises:
            ValueError: there are NaN or infinite ones.
        """
        if not np.isfinite(samples).all():
            raise ValueError("the samples hold NaN or infinite values")
        self._received += len(samples)
        samples = np.clip(samples, -1.0, 1.0)  # as `load_audio`
        if self._resampler is not None:
            samples = self._resampler.resample_chunk(samples)
        waveform = torch.from_numpy(samples * np.float32(FULL_SCALE))
        self._samples += len(waveform)
        self._last = torch.cat([self._last, waveform])[-self._longest :]
        self._spectrogram.add(self._spectra.push(waveform).numpy())
        with scale_known():
            for layer, frames in self._stream.push(waveform).items():
                self._strips[layer].add(frames[0].float().cpu().numpy())

    @property
    def state(self) -> dict[str, float]:
        """How many seconds were heard, and how many more the resampler holds back."""
        return {
            "seconds": self._samples / SAMPLE_RATE,
            "delay": max(0.0, self._received / self.rate - self._samples / SAMPLE_RATE),
        }

    def answer(self, seconds: float, normalize: bool = False) -> dict[str, Any] | None:
        """Return what `predict` returns for the last seconds.

        That is None before there is enough sound, and for a network without heads.

        Args:
            seconds: 1 to the longest of `list_windows`; the answer is of less if there was no more so far.
            normalize: see `predict`.
        """
        if self._samples < LEAST * SAMPLE_RATE or not self._model.architecture.output_sizes:
            return None
        window = self._last[-max(1, round(seconds * SAMPLE_RATE)) :]
        with scale_known():
            prediction = predict(
                self._model, window, top=TOP, edge_frames=self._edge_frames, normalize=normalize
            )
        return {
            "seconds": prediction.seconds,
            "repeats": prediction.repeats,
            "level": prediction.level if math.isfinite(prediction.level) else None,
            "quiet": prediction.level < QUIET,
            "heads": {name: _describe_head(name, head) for name, head in prediction.heads.items()},
        }

    def get_units(self, layer: str, first: int) -> dict[str, Any]:
        """Return a layer's maxima of the last minute, from column `first` on, counted since the beginning.

        `levels`, `(units, columns)`, are square roots of values, 255 for `largest`, that of these columns.
        Column 0 begins at `start` seconds and each lasts `step`.
        """
        strip = self._strips[self._sources[layer].name]
        description, columns = strip.get_columns(first)
        largest = float(columns.max(initial=0))
        return description | {"layer": layer, "largest": largest, "levels": _encode(columns / (largest or 1))}

    def get_spectrogram(self, first: int) -> dict[str, Any]:
        """Return mel bands of the last minute, the highest first, as `get_units`; levels are decibels."""
        description, power = self._spectrogram.get_columns(first)
        tone = (FULL_SCALE * SpectrogramStream.SIZE / 4) ** 2  # of full scale, in its bin
        decibels = 10 * np.log10(np.maximum(power / tone, 1e-20))
        lowest, highest = _SPECTRUM
        levels = np.clip((decibels - lowest) / (highest - lowest), 0, 1)
        return description | {"levels": _encode(np.square(levels))}


class _Strip:
    """Maxima of the last frames of something, over columns of equal length.

    Args:
        width: frames per column.
        start: of the first frame, in samples.
        stride: of the frames, in samples.
        units: number of rows.
    """

    def __init__(self, width: int, start: float, stride: int, units: int) -> None:
        self._width, self._start, self._step = width, start, width * stride
        self._limit = math.ceil(KEPT_SECONDS * SAMPLE_RATE / self._step)
        self._columns = self._rest = np.zeros((units, 0), np.float32)
        self._first = 0  # number of the first column that is kept

    def add(self, frames: NDArray[np.float32]) -> None:
        """Add the next frames, `(units, frames)`."""
        frames = np.concatenate([self._rest, frames], 1)
        count = frames.shape[1] // self._width
        full, self._rest = np.split(frames, [count * self._width], 1)
        columns = np.concatenate([self._columns, full.reshape(len(full), count, self._width).max(2)], 1)
        self._first += max(0, columns.shape[1] - self._limit)
        self._columns = columns[:, -self._limit :]

    def get_columns(self, first: int) -> tuple[dict[str, Any], NDArray[np.float32]]:
        """Return columns from a number on, `(units, columns)`, and what they are."""
        units, count = self._columns.shape
        first = min(max(first, self._first), self._first + count)
        description = {
            "first": first,
            "units": units,
            "columns": count - (first - self._first),
            "start": self._start / SAMPLE_RATE,
            "step": self._step / SAMPLE_RATE,
        }
        return description, self._columns[:, first - self._first :]


def _build_strip(layer: Layer) -> _Strip:
    return _Strip(max(1, _COLUMN // layer.stride), first_edge(layer), layer.stride, layer.channels)


class LiveStore:
    """Live sessions by their ids, and the thread that computes them.

    Args:
        model: any SoundNet.
        edge_frames: see `predict`.
    """

    def __init__(self, model: SoundNet, edge_frames: bool = False) -> None:
        self._model, self._edge_frames = model, edge_frames
        self._sessions: dict[str, LiveSession] = {}
        # one, so that memory is bounded; with threads left for files
        threads = max(1, torch.get_num_threads() // 2)
        self.executor = ThreadPoolExecutor(1, "live", torch.set_num_threads, (threads,))
        self.executor.submit(self._warm_up).result()

    def describe(self) -> dict[str, Any]:
        """Return what a page needs to know: windows, levels and limits, in seconds and dB of full scale."""
        return {
            "windows": list_windows(self._model, self._edge_frames),
            "window": DEFAULT_WINDOW,
            "least": LEAST,
            "kept": KEPT_SECONDS,
            "quiet": QUIET,
            "normalized": NORMALIZED,
        }

    def create(self, rate: int) -> LiveSession | None:
        """Create a session; return None if there are too many.

        Raises:
            ValueError: an impossible sample rate.
        """
        self.close_idle()
        if len(self._sessions) >= MAX_SESSIONS:
            return None
        session = LiveSession(self._model, rate, self._edge_frames)
        self._sessions[session.id] = session
        return session

    def get(self, session_id: str) -> LiveSession | None:
        """Return a session; it then counts as recently used."""
        session = self._sessions.get(session_id)
        if session is not None:
            session.touch()
        return session

    def close(self, session_id: str) -> None:
        """Forget a session."""
        self._sessions.pop(session_id, None)

    def close_idle(self) -> None:
        """Close the sessions that got no sound in a while."""
        for session_id, session in list(self._sessions.items()):
            if not session.busy and time.monotonic() - session.last_request > IDLE_SECONDS:
                self.close(session_id)

    def shut_down(self) -> None:
        """Close all sessions and wait for the thread to end."""
        self._sessions.clear()
        self.executor.shutdown(cancel_futures=True)

    def _warm_up(self) -> None:
        """Let the engine fold its weights before the first sound."""
        session = LiveSession(self._model, SAMPLE_RATE, self._edge_frames)
        session.push(np.zeros(round(LEAST * SAMPLE_RATE), np.float32))
        session.answer(LEAST)


def list_windows(model: SoundNet, edge_frames: bool = False) -> list[float]:
    """Return how many seconds an answer may be of: few, and the shortest clip that is not repeated.

    >>> import soundnet_port as sp
    >>> list_windows(sp.SoundNet(sp.SOUNDNET8.resized([1] * 7, {"objects": 2, "scenes": 2})))
    [2.0, 3.0, 5.0, 10.99]
    """
    complete = math.ceil(min_samples(model, edge_frames) / SAMPLE_RATE * 100) / 100
    return [*_WINDOWS, complete] if complete > max(_WINDOWS) else list(_WINDOWS)


def _describe_head(name: str, head: HeadPrediction) -> dict[str, Any]:
    """Return the most probable categories, and square roots of all probabilities as bytes."""
    probabilities = head.probabilities
    # as in `build_prediction`; the mean of logits is, up to a constant, that of log-probabilities
    mean = probabilities.log().mean(1).softmax(0) if name == CLASSES else probabilities.mean(1)
    top = [(category.index, round(category.probability, 4)) for category in head.top]
    return {"top": top, "levels": _encode(mean.cpu().numpy())}


def _encode(values: NDArray[np.float32]) -> str:
    """Encode values from 0 to 1 as bytes, 255 times their square roots."""
    levels = np.round(255 * np.sqrt(np.clip(values, 0, 1)))
    return encode_levels(levels.astype(np.uint8))
