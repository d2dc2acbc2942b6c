"""Compute a sound's features as an evaluation protocol needs them, or read them from the cache."""

from __future__ import annotations

import hashlib
import json
import math
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from soundnet_port.audio.loading import read_sound
from soundnet_port.inference.activations import compute_activations
from soundnet_port.learning.feature_cache import FeatureCache, Values
from soundnet_port.network.architecture import SAMPLE_RATE
from soundnet_port.network.engine import kernel_name
from soundnet_port.network.model import SoundNet
from soundnet_port.network.weights import checksum, cpu_state_dict
from soundnet_port.version import __version__

PAPER_SECONDS = 10  # "paper" cuts a clip there,
_PAPER_REPEATED_SECONDS = 11  # after repeating it to at least this
_PAPER_SCALE = 2  # the scripts multiply by 2^-22 what the network is given times 2^-23


class FeatureExtractor:
    """Features of sounds for one network, layer and protocol, through a cache.

    Args:
        model: the network.
        layer: name or module number.
        protocol: "modern", "paper" or "paper-dcase", see `soundnet_port.learning.evaluation`.
        pool: over time, for "modern"; None for the others.
        resample: to 22,050 Hz.
        decoder: of sound files, see `load_audio`.
        cache: where features are kept; None computes all.
        edge_frames: include edge frames; the paper's protocols always do.

    Raises:
        ValueError: an unknown layer.
    """

    def __init__(
        self,
        model: SoundNet,
        layer: str | int,
        protocol: str = "modern",
        pool: str | None = None,
        *,
        resample: bool = True,
        decoder: str = "auto",
        cache: FeatureCache | None = None,
        edge_frames: bool = False,
    ) -> None:
        self.model, self.key, self.protocol, self.pool = model, layer, protocol, pool
        self.layer = model.architecture.layer(layer)
        self.resample, self.decoder, self.cache = resample, decoder, cache
        self.edge_frames = edge_frames or protocol != "modern"
        self.can_have_edge_frames = model.architecture.has_edge_frames(self.layer)

    @cached_property
    def settings(self) -> bytes:
        """All that features depend on except the sound, as JSON."""
        settings = {
            "version": __version__,
            "weights": checksum(cpu_state_dict(self.model, torch.float32)),
            "dtype": str(next(self.model.parameters()).dtype),
            "kernel": kernel_name(next(self.model.parameters())) if self.model.use_engine else "modules",
            "layer": self.layer.name if self.layer.is_layer else self.layer.module,
            "protocol": self.protocol,
            "pool": self.pool,
            "resample": self.resample,
            "decoder": self.decoder,
        }
        if self.can_have_edge_frames and not self.edge_frames:
            settings["edge_frames"] = False
        return json.dumps(settings).encode()

    def extract(self, sound: Path | Values) -> tuple[Values, float]:
        """Return a sound's features and its seconds.

        Args:
            sound: a file; or, for "modern", a waveform (samples,) at 22,050 Hz within +-256.

        Shape:
            features: `(frames, channels)`, or `(channels,)` if pooled

        Raises:
            AudioError, ValueError, OSError: the sound cannot be used.
        """
        if self.cache is None:
            return self._compute(sound)
        key = self._cache_key(sound)
        cached = self.cache.read(key)
        if cached is not None:
            return cached
        features, seconds = self._compute(sound)
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

    def _compute(self, sound: Path | Values) -> tuple[Values, float]:
        if self.protocol == "modern":
            output = compute_activations(
                self.model,
                sound if isinstance(sound, Path) else torch.tensor(sound),  # a copy: it may be read-only
                [self.key],
                decoder=self.decoder,
                pool=self.pool or "none",
                edge_frames=self.edge_frames,
            )
            return output.activations[self.key].numpy(), output.samples / SAMPLE_RATE
        assert isinstance(sound, Path)
        audio = read_sound(sound, sample_rate=SAMPLE_RATE if self.resample else None, decoder=self.decoder)
        waveform, rate = audio.waveform, audio.sample_rate
        seconds = len(waveform) / rate
        if self.protocol == "paper":
            repeats = math.ceil(_PAPER_REPEATED_SECONDS * rate / len(waveform))
            waveform = waveform.repeat(repeats)[: PAPER_SECONDS * rate]
        output = compute_activations(self.model, waveform * _PAPER_SCALE, [self.key])
        return output.activations[self.key].numpy(), seconds
