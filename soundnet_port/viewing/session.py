"""A sound sent to the server, and the results computed so far.

A thread analyzes the sound once, in blocks; its results can be read at any time. However long the sound is,
only this is kept in memory: the heads' logits, 25 MB for an hour of both at most, and waveform, spectrogram
and layers as at most 1,500 maxima over time.
"""

from __future__ import annotations

import math
import shutil
import sys
import time
from concurrent.futures import Future
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor

from soundnet_port.audio.finding import SUFFIXES
from soundnet_port.audio.loading import AudioError, open_sound
from soundnet_port.audio.loudness import QUIET, LevelMeter
from soundnet_port.files import atomic_write
from soundnet_port.inference.activations import LayerActivations
from soundnet_port.inference.classification import classify_windows
from soundnet_port.inference.prediction import Prediction, build_prediction, min_samples
from soundnet_port.network.architecture import CLASSES, FULL_SCALE, SAMPLE_RATE
from soundnet_port.network.model import SoundNet
from soundnet_port.network.streaming import Stream, stream
from soundnet_port.viewing.activation_maps import MAX_COLUMNS, ActivationMaps
from soundnet_port.viewing.figures import write_figure
from soundnet_port.viewing.prediction_plots import plot_prediction
from soundnet_port.viewing.spectrograms import DYNAMIC_RANGE, HEIGHT, LOWEST_FREQUENCY, SpectrogramStream
from soundnet_port.viewing.summaries import TOP, HeadSummary, MaxEnvelope, encode_levels

_BLOCK = 1 << 18  # samples, 12 s
_HOPS = (128, 512)  # samples between the spectrogram's frames: the least, and the most


class SessionClosed(Exception):
    """The session was closed, and its files are removed."""


class SoundSession:
    """A sound's file, and the results computed so far.

    Args:
        model: any SoundNet.
        folder: of its files.
        name: of the sound, as shown to the user; never part of a path.
        edge_frames: keep edge frames (see `SoundNet.edge_frames`).

    Attributes:
        id: name of the folder.
        path: of the file that was sent.
        state: "sending", "waiting", "computing", "classifying" (of a pooled head), "done" or "failed".
        error: why it failed.
        last_request: when it was last asked for, by time.monotonic().
        closed: its results are no longer wanted.
        task: the analysis, once it is scheduled.
    """

    def __init__(self, model: SoundNet, folder: Path, name: str, edge_frames: bool = False) -> None:
        self.model, self.folder, self.name, self.edge_frames = model, folder, name, edge_frames
        self.id = folder.name
        suffix = Path(name).suffix.lower()
        self.path = folder / f"sound{suffix if suffix in SUFFIXES else ''}"
        self.state, self.error, self.closed = "sending", "", False
        self.touch()
        self.task: Future[None] | None = None
        self._samples, self._repeats = 0, 1
        self._announced_seconds: float | None = None
        self._decoder: str | None = None
        self._waveform = MaxEnvelope(2, MAX_COLUMNS)  # of the samples, and of their negatives
        self._power, self._hop = MaxEnvelope(HEIGHT, MAX_COLUMNS), _HOPS[-1]
        self._meter = LevelMeter()
        architecture = model.architecture
        self._min_samples = min_samples(model, edge_frames)
        self._maps = ActivationMaps(architecture, self._min_samples, edge_frames)
        self._edge_counts: dict[str, int] = {}  # edge frames of each layer, once the sound has ended
        self._heads = {
            head: HeadSummary(size, head == CLASSES) for head, size in architecture.output_sizes.items()
        }
        self._windows: tuple[LayerActivations, Tensor] | None = None  # of a pooled head, and their times
        self._results_lock, self._files_lock = Lock(), Lock()

    def touch(self) -> None:
        """Note that the session is in use."""
        self.last_request = time.monotonic()

    def analyze(self, max_hours: float) -> None:
        """Analyze the file, in a thread of its own; errors become the session's state."""
        try:
            self.state = "computing"
            self._analyze_blocks(max_hours)
            if self.model.architecture.pooled_head:
                self._classify()
            self._maps.finish()  # without the lock, since the first results may be asked for meanwhile
            self.state = "done"
        except SessionClosed:
            pass
        except AudioError as error:  # includes whatever is raised while the file is open
            self.error = self.describe_error(error)
        except Exception as error:  # the server goes on
            self.error = f"{self.name}: could not be computed ({type(error).__name__}: {error})"
            print(f"soundnet-port: {self.error}", file=sys.stderr, flush=True)
        finally:
            if self.state != "done":
                self.error = self.error or "cancelled"
                self.state = "failed"

    def open_stream(self) -> Stream[str]:
        """Return a stream of all layers whose frames are kept."""
        return stream(self.model, [*self._maps.layers, *self.model.architecture.head_sizes])

    def describe_error(self, error: AudioError) -> str:
        """Return the message with the sound's name in place of its path."""
        return str(error).replace(str(self.path), self.name)

    def predict(self) -> Prediction:
        """Return what `predict` returns for the file; needs the state "done", and a network with heads."""
        if self._windows:
            return build_prediction(self.model, self._windows[0], TOP, times=self._windows[1])
        logits: dict[str | int, Tensor] = {head: summary.logits for head, summary in self._heads.items()}
        clip = LayerActivations(logits, self._samples, self._repeats, self._decoder, self._meter.level)
        return build_prediction(self.model, clip, TOP, self.edge_frames)

    def to_dict(self, first_frame: int) -> dict[str, Any]:
        """Return the results so far as plain types; lists of frames only from `first_frame` on."""
        with self._results_lock:
            high, low = (np.round(self._waveform.values / FULL_SCALE, 3) + 0.0).tolist()
            return {
                "name": self.name,
                "state": self.state,
                "error": self.error,
                "seconds": self._samples / SAMPLE_RATE,
                "announced_seconds": self._announced_seconds,
                "repeats": self._repeats,
                "edge_frames": max((self._edge_counts.get(head, 0) for head in self._heads), default=0),
                "quiet": self.state == "done" and self._meter.level < QUIET,
                "waveform": {"step": self._waveform.width / SAMPLE_RATE, "high": high, "low": low},
                "heads": {head: summary.to_dict(first_frame) for head, summary in self._heads.items()},
            }

    def get_map(self, layer: str, criterion: str = "number") -> dict[str, Any]:
        """Return a layer's units over time, see `ActivationMaps.get`, with the order of the active ones.

        Args:
            layer: its name.
            criterion: one of `activation_maps.ORDERS`, or "number", for which `order` is None.
        """
        with self._results_lock:
            activation_map = self._maps.get(layer)
            order = None if criterion == "number" else self._maps.order(layer, criterion)
            return activation_map | {"order": order}

    def get_spectrogram(self) -> dict[str, Any]:
        """Return maxima of the power in mel bands over time.

        `levels`, `(bands, columns)` as base64, are in dB: 255 is the largest, 0 is `range` dB below it, or
        less. The highest band comes first. Columns of `step` seconds begin at `start`.
        """
        with self._results_lock:
            power, width = self._power.values, self._power.width
            largest = float(power.max(initial=0.0)) or 1.0
            floor = 10 ** (-DYNAMIC_RANGE / 10)
            decibels = 10 * np.log10(np.clip(power / largest, floor, 1))
        levels = np.round(255 * (1 + decibels / DYNAMIC_RANGE)).astype(np.uint8)
        return {
            "bands": HEIGHT,
            "columns": levels.shape[1],
            "start": -self._hop / 2 / SAMPLE_RATE,
            "step": width * self._hop / SAMPLE_RATE,
            "range": DYNAMIC_RANGE,
            "frequencies": [LOWEST_FREQUENCY, SAMPLE_RATE / 2],
            "levels": encode_levels(levels),
        }

    def write_wav(self) -> Path:
        """Write the sound as the network's input, for browsers that cannot play the file; return the path.

        Raises:
            AudioError: the file cannot be decoded.
            SessionClosed: meanwhile.
        """
        path = self.folder / "input.wav"
        with self._files_lock:
            if not path.exists():
                with (
                    atomic_write(path) as temporary,
                    open_sound(self.path) as sound,
                    soundfile.SoundFile(temporary, "w", SAMPLE_RATE, 1, "PCM_16", format="WAV") as file,
                ):
                    for block in sound.blocks(_BLOCK):
                        file.write(block.numpy() / FULL_SCALE)
        return self._check_open(path)

    def write_picture(self) -> Path:
        """Write the figure of waveform and categories over time; return the path.

        Raises:
            SessionClosed: meanwhile.
        """
        path = self.folder / "picture.png"
        with self._files_lock:
            if not path.exists():
                high, inverted_low = self._waveform.values
                waveform = torch.from_numpy(np.stack([-inverted_low, high]))
                write_figure(plot_prediction(self.predict(), waveform, self.name), path)
        return self._check_open(path)

    def _analyze_blocks(self, max_hours: float) -> None:
        too_long = ValueError(f"longer than {max_hours:g} hours, the limit of this server")
        frames_stream = self.open_stream()
        with open_sound(self.path) as sound:
            self._announced_seconds, self._decoder = sound.seconds, sound.decoder
            if (sound.seconds or 0) > max_hours * 3600:
                raise too_long
            self._hop = _choose_hop(sound.seconds)
            spectra = SpectrogramStream(self._hop)
            for block in chain(sound.blocks(max(_BLOCK, self._min_samples)), [None]):
                if self.closed:
                    raise SessionClosed
                if block is None:
                    frames_by_layer = frames_stream.finish()
                else:
                    if not self._samples and len(block) < self._min_samples:
                        self._repeats = math.ceil(self._min_samples / len(block))
                        self._maps.limit(len(block))  # the page shows the first time
                    frames_by_layer = frames_stream.push(block.repeat(self._repeats))
                power = spectra.finish() if block is None else spectra.push(block)
                with self._results_lock:
                    if block is not None:
                        self._samples += len(block)
                        self._meter.add(block)
                        self._waveform.add(torch.stack([block, -block]).numpy())
                    self._power.add(power.numpy())
                    self._edge_counts = frames_stream.edge_frames
                    for layer, frames in frames_by_layer.items():
                        self._add_frames(layer, frames[0].float().cpu())
                if self._samples > max_hours * 3600 * SAMPLE_RATE:
                    raise too_long

    def _classify(self) -> None:
        """Compute a pooled head's classes, which need the sound at two speeds and three levels."""
        self.state = "classifying"
        windows = classify_windows(self.model, self.path)
        with self._results_lock:
            self._windows = windows
            self._heads[CLASSES].add(windows[0].activations[CLASSES])

    def _add_frames(self, layer: str, frames: Tensor) -> None:
        """Add a layer's next frames, `(channels, frames)`."""
        edge_frames = self._edge_counts[layer]
        if layer in self._heads:
            kept = frames if self.edge_frames else frames[:, : frames.shape[1] - edge_frames]
            self._heads[layer].add(kept.T)
        else:
            self._maps.add(layer, frames, edge_frames)

    def _check_open(self, path: Path) -> Path:
        if self.closed:  # while the file was written
            shutil.rmtree(self.folder, ignore_errors=True)
            raise SessionClosed
        return path


def _choose_hop(seconds: float | None) -> int:
    """Return the samples between the spectrogram's frames: enough columns, but no more work than that."""
    least, most = _HOPS
    if seconds is None:
        return most
    hop = least
    while hop < most and seconds * SAMPLE_RATE / hop > MAX_COLUMNS:
        hop *= 2
    return hop
