"""Compute a sound's features as an evaluation protocol needs them, or read them from the cache."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from soundnet_port.audio.finding import Failure
from soundnet_port.audio.loading import read_sound
from soundnet_port.corpus.processes import available_cpus
from soundnet_port.inference.activations import compute_activations
from soundnet_port.inference.classification import SPEEDS, pool_at_levels
from soundnet_port.inference.pooling import count_statistics
from soundnet_port.learning.feature_cache import FeatureCache, Values, describe_network
from soundnet_port.network.architecture import SAMPLE_RATE, Architecture
from soundnet_port.network.evaluation_mode import evaluation_mode
from soundnet_port.network.model import SoundNet
from soundnet_port.progress import Progress, ProgressCallback

PAPER_SECONDS = 10  # "paper" cuts a clip there,
_PAPER_REPEATED_SECONDS = 11  # after repeating it to at least this
_PAPER_SCALE = 2  # the scripts multiply by 2^-22 what the network is given times 2^-23
_MODERN_LAYERS = {"soundnet8": ("conv4", "pool5", "conv6"), "soundnet5": ("pool2", "pool3", "conv4")}


class FeatureExtractor(ABC):
    """Features of sounds for a network and settings, through a cache.

    Args:
        model: the network.
        layers: names or module numbers.
        edge_frames: include edge frames (see `SoundNet.edge_frames`).
        decoder: of sound files, see `load_audio`.
        cache: where features are kept; None computes all.

    Raises:
        ValueError: an unknown layer.
    """

    def __init__(
        self,
        model: SoundNet,
        layers: Sequence[str | int],
        *,
        edge_frames: bool = False,
        decoder: str = "auto",
        cache: FeatureCache | None = None,
    ) -> None:
        self.model, self.keys = model, tuple(layers)
        self.layers = [model.architecture.layer(key) for key in layers]
        self.edge_frames, self.decoder, self.cache = edge_frames, decoder, cache
        self.has_edge_frames = any(model.architecture.has_edge_frames(layer) for layer in self.layers)

    @abstractmethod
    def _describe(self) -> dict[str, Any]:
        """Return the settings of this kind of features."""

    @abstractmethod
    def _compute(self, sound: Path | Values) -> tuple[Values, float]:
        """Compute a sound's features and its seconds, in evaluation mode."""

    @cached_property
    def settings(self) -> bytes:
        """All that features depend on except the sound, as JSON."""
        settings = {
            **describe_network(self.model),
            "layers": [layer.key for layer in self.layers],
            "decoder": self.decoder,
            **self._describe(),
        }
        if self.has_edge_frames and not self.edge_frames:
            settings["edge_frames"] = False
        return json.dumps(settings).encode()

    def extract(self, sound: Path | Values) -> tuple[Values, float]:
        """Return a sound's features and its seconds.

        Args:
            sound: a file; or a waveform (samples,) at 22,050 Hz within +-256, for those that take one.

        Raises:
            AudioError, ValueError, OSError: the sound cannot be used.
        """
        key = self._cache_key(sound) if self.cache else ""
        cached = self.cache.read(key) if self.cache else None
        if cached is not None:
            return cached
        with evaluation_mode(self.model):  # no check of the scale: of files, or checked by SoundNetFeatures
            features, seconds = self._compute(sound)
        if self.cache:
            self.cache.write(key, features, seconds)
        return features, seconds

    def _cache_key(self, sound: Path | Values) -> str:
        digest = hashlib.sha256()
        if isinstance(sound, Path):
            with open(sound, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        else:
            digest.update(b"samples")
            digest.update(np.ascontiguousarray(sound).data)
        digest.update(self.settings)
        return digest.hexdigest()


class PooledFeatures(FeatureExtractor):
    """One layer pooled over time, (statistics * channels,), of a file or a waveform.

    Args:
        model: the network.
        layer: name or module number.
        pool: as for `embed`.
        **settings: as for `FeatureExtractor`.
    """

    def __init__(self, model: SoundNet, layer: str | int, pool: str, **settings: Any) -> None:
        super().__init__(model, [layer], **settings)
        self.pool = pool

    def _describe(self) -> dict[str, Any]:
        return {"pool": self.pool}

    def _compute(self, sound: Path | Values) -> tuple[Values, float]:
        output = compute_activations(
            self.model,
            sound if isinstance(sound, Path) else torch.tensor(sound),  # a copy: it may be read-only
            self.keys,
            decoder=self.decoder,
            pool=self.pool,
            edge_frames=self.edge_frames,
        )
        return output.activations[self.keys[0]].numpy(), output.samples / SAMPLE_RATE


class ModernFeatures(FeatureExtractor):
    """Layers of a file pooled over time, at three levels and two speeds: (levels, sum of `sizes`).

    See `soundnet_port.inference.classification`.

    Args:
        model: the network.
        layers: names or module numbers.
        pool: as for `embed`.
        **settings: as for `FeatureExtractor`.
    """

    def __init__(self, model: SoundNet, layers: Sequence[str | int], pool: str, **settings: Any) -> None:
        super().__init__(model, layers, **settings)
        self.pool = pool
        self.sizes = [layer.channels * count_statistics(pool) for layer in self.layers] * len(SPEEDS)

    def _describe(self) -> dict[str, Any]:
        return {"protocol": "modern", "pool": self.pool}

    def _compute(self, sound: Path | Values) -> tuple[Values, float]:
        assert isinstance(sound, Path)
        seconds = 0.0

        def read(path: Path) -> Iterator[Tensor]:
            nonlocal seconds
            for speed in SPEEDS:
                clip = read_sound(path, sample_rate=SAMPLE_RATE * speed, decoder=self.decoder)
                seconds = len(clip.waveform) / clip.sample_rate
                yield clip.waveform

        rows = pool_at_levels(self.model, read(sound), self.keys, self.pool, edge_frames=self.edge_frames)
        return rows.numpy(), seconds


class PaperFeatures(FeatureExtractor):
    """One layer's frames, edge frames included, as the original's scripts: (frames, channels).

    Args:
        model: the network.
        layer: name or module number.
        protocol: "paper" or "paper-dcase", see `soundnet_port.learning.evaluation`.
        resample: to 22,050 Hz.
        **settings: as for `FeatureExtractor`.
    """

    def __init__(
        self, model: SoundNet, layer: str | int, protocol: str, *, resample: bool = True, **settings: Any
    ) -> None:
        super().__init__(model, [layer], edge_frames=True, **settings)
        self.protocol, self.resample = protocol, resample

    def _describe(self) -> dict[str, Any]:
        return {"protocol": self.protocol, "resample": self.resample}

    def _compute(self, sound: Path | Values) -> tuple[Values, float]:
        assert isinstance(sound, Path)
        audio = read_sound(sound, sample_rate=SAMPLE_RATE if self.resample else None, decoder=self.decoder)
        waveform, rate = audio.waveform, audio.sample_rate
        seconds = len(waveform) / rate
        if self.protocol == "paper":
            repeats = math.ceil(_PAPER_REPEATED_SECONDS * rate / len(waveform))
            waveform = waveform.repeat(repeats)[: PAPER_SECONDS * rate]
        output = compute_activations(self.model, waveform * _PAPER_SCALE, self.keys)
        return output.activations[self.keys[0]].numpy(), seconds


def modern_layers(architecture: Architecture) -> tuple[str, ...]:
    """Return the layers of "modern": the default layer and its neighbors, as far as the trunk has them."""
    layers = [name for name in _MODERN_LAYERS[architecture.name] if name in architecture.layers]
    return tuple(layers or [architecture.default_layer])


def extract_features(
    extractor: FeatureExtractor, paths: Sequence[Path], progress: ProgressCallback | None
) -> tuple[list[Values | None], list[float], list[Failure]]:
    """Return features of each file (None if it cannot be used), their seconds, and the failures.

    Args:
        extractor: of the features.
        paths: of sound files.
        progress: called after each one, with a message if it cannot be used.
    """
    features: list[Values | None] = []
    lengths, failures = [], []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sounds side by side, rather than many threads for each short operation
    pool = ThreadPoolExecutor(available_cpus(), initializer=torch.set_num_threads, initargs=(1,))
    try:
        tasks = [pool.submit(extractor.extract, path) for path in paths]
        for number, (path, task) in enumerate(zip(paths, tasks, strict=True), 1):
            values, seconds, message = None, 0.0, ""
            try:
                values, seconds = task.result()
            except Exception as error:  # decoders may raise anything; one file must not end it all
                reason = " ".join(str(error).split("\n")[0].removeprefix(f"{path}: ").split())
                failures.append(Failure(str(path), reason or type(error).__name__))
                message = str(failures[-1])
            features.append(values)
            lengths.append(seconds)
            if progress:
                progress(Progress(number, len(paths), "file", message=message))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
    return features, lengths, failures
