"""A sound sent to the server, and the results computed so far.

A thread analyzes the sound once, in blocks; its results can be read at any time. However long the sound is,
only this is kept in memory: the heads' logits, 25 MB for an hour of both at most, and the waveform and the
layers as at most 1,500 maxima over time.
"""

from __future__ import annotations

import base64
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
from soundnet_port.inference.prediction import Prediction, build_prediction, min_samples
from soundnet_port.network.architecture import CLASSES, FULL_SCALE, SAMPLE_RATE, Architecture
from soundnet_port.network.model import SoundNet
from soundnet_port.network.streaming import Stream, stream
from soundnet_port.viewing.figures import write_figure
from soundnet_port.viewing.prediction_plots import plot_prediction
from soundnet_port.viewing.summaries import TOP, HeadSummary, MaxEnvelope

_BLOCK = 1 << 18  # samples, 12 s
_COLUMNS = 1500


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
        state: "sending", "waiting", "computing", "done" or "failed".
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
        self._waveform = MaxEnvelope(2, _COLUMNS)  # of the samples, and of their negatives
        self._meter = LevelMeter()
        architecture = model.architecture
        self._min_samples = min_samples(model, edge_frames)
        self._sources = {  # the layer whose maxima are kept for each layer
            name: architecture.layers[_select_source(architecture, name, self._min_samples)]
            for name, layer in architecture.layers.items()
            if layer.kind != "head"
        }
        self._maxima = {layer.name: MaxEnvelope(layer.channels, _COLUMNS) for layer in self._sources.values()}
        self._largest = dict.fromkeys(self._maxima, 0.0)  # without edge frames, which would hide all others
        self._edge_counts: dict[str, int] = {}  # edge frames of each layer, once the sound has ended
        self._final_maps: dict[str, dict[str, Any]] = {}
        self._heads = {
            head: HeadSummary(size, head == CLASSES) for head, size in architecture.head_sizes.items()
        }
        self._results_lock, self._files_lock = Lock(), Lock()

    def touch(self) -> None:
        """Note that the session is in use."""
        self.last_request = time.monotonic()

    def analyze(self, max_hours: float) -> None:
        """Analyze the file, in a thread of its own; errors become the session's state."""
        try:
            self.state = "computing"
            self._analyze_blocks(max_hours)
            with self._results_lock:
                self._final_maps = {layer: self._build_map(layer) for layer in self._maxima}
                self._maxima.clear()
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
        return stream(self.model, [*self._maxima, *self._heads])

    def describe_error(self, error: AudioError) -> str:
        """Return the message with the sound's name in place of its path."""
        return str(error).replace(str(self.path), self.name)

    def predict(self) -> Prediction:
        """Return what `predict` returns for the file; needs the state "done", and a network with heads."""
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

    def get_map(self, layer: str) -> dict[str, Any]:
        """Return a layer's units over time: square roots of maxima, 255 for the layer's largest value.

        That is the largest of ordinary frames; edge frames, if kept, are clipped to it.
        """
        with self._results_lock:
            source = self._sources[layer].name
            activation_map = self._final_maps.get(source) or self._build_map(source)
            return activation_map | {"edge_frames": self._edge_counts.get(source, 0)}

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
            for block in chain(sound.blocks(max(_BLOCK, self._min_samples)), [None]):
                if self.closed:
                    raise SessionClosed
                if block is None:
                    frames_by_layer = frames_stream.finish()
                else:
                    if not self._samples and len(block) < self._min_samples:
                        self._repeats = math.ceil(self._min_samples / len(block))
                    frames_by_layer = frames_stream.push(block.repeat(self._repeats))
                with self._results_lock:
                    if block is not None:
                        self._samples += len(block)
                        self._meter.add(block)
                        self._waveform.add(torch.stack([block, -block]).numpy())
                    self._edge_counts = frames_stream.edge_frames
                    for layer, frames in frames_by_layer.items():
                        self._add_frames(layer, frames[0].float().cpu())
                if self._samples > max_hours * 3600 * SAMPLE_RATE:
                    raise too_long

    def _add_frames(self, layer: str, frames: Tensor) -> None:
        """Add a layer's next frames, `(channels, frames)`."""
        ordinary = frames[:, : frames.shape[1] - self._edge_counts[layer]]
        kept = frames if self.edge_frames else ordinary
        if layer in self._heads:
            self._heads[layer].add(kept.T)
        else:
            self._maxima[layer].add(kept.numpy())
            if ordinary.shape[1]:
                self._largest[layer] = max(self._largest[layer], float(ordinary.max()))

    def _build_map(self, source: str) -> dict[str, Any]:
        layer, maxima, largest = self._sources[source], self._maxima[source], self._largest[source]
        levels = np.round(255 * np.sqrt(np.clip(maxima.values / (largest or 1), 0, 1)))
        return {
            "units": layer.channels,
            "columns": maxima.values.shape[1],
            "start": (layer.start + layer.receptive_field / 2 - layer.stride / 2) / SAMPLE_RATE,
            "step": maxima.width * layer.stride / SAMPLE_RATE,
            "largest": largest,
            "levels": base64.b64encode(levels.astype(np.uint8).tobytes()).decode(),  # (units, columns)
        }

    def _check_open(self, path: Path) -> Path:
        if self.closed:  # while the file was written
            shutil.rmtree(self.folder, ignore_errors=True)
            raise SessionClosed
        return path


def _select_source(architecture: Architecture, name: str, min_samples: int) -> str:
    """Return the layer whose maxima to keep: its pooling, if no column is narrower than a pooling window.

    The maxima are the same, and frames before pooling, most of the engine's work for all layers, are not
    needed.
    """
    for block in architecture.blocks:
        if block.name == name and block.pool:
            columns = min_samples / architecture.layers[name].stride / (block.pool / 2)
            return block.pool_layer if columns > _COLUMNS + 1 else name
    return name
