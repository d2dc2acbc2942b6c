"""A scikit-learn transformer from sounds to features (extra `[learn]`)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from soundnet_port.errors import MissingExtraError, WaveformScaleWarning, warn_caller

try:
    from joblib import effective_n_jobs
    from sklearn.base import BaseEstimator, TransformerMixin
    from sklearn.utils.parallel import Parallel, delayed
    from sklearn.utils.validation import check_array, check_is_fitted
except ImportError:  # needed now, for base classes
    raise MissingExtraError("scikit-learn", "learn") from None

from soundnet_port.inference.pooling import POOLINGS
from soundnet_port.learning.feature_cache import Values, open_cache
from soundnet_port.learning.protocol_features import PooledFeatures
from soundnet_port.network.architecture import FULL_SCALE, SAMPLE_RATE
from soundnet_port.network.model import SoundNet
from soundnet_port.network.waveform_scale import LOUDEST, looks_like_unit_scale
from soundnet_port.network.weights import build_model, read_weights
from soundnet_port.pretrained import locate_weights

_BATCHES_PER_JOB = 4  # as sounds take different times


class SoundNetFeatures(TransformerMixin, BaseEstimator):  # type: ignore[misc]  # sklearn has no types
    """Transform sounds to vectors: a layer's activations pooled over time, as `embed` computes them.

    Nothing is learned: `fit` checks the settings and the form of the sounds. It sets `layer_`, and
    `weights_sha256_`, the weights' checksum. Pickles do not contain the network; the same weights must be
    found where they are loaded.

    Args:
        weights: name or path, as for `load_pretrained`.
        layer: a name, or Torch7's module number; by default pool5, with 5 layers conv4.
        pool: over time, "mean", "max", "mean+std" or "mean+max+std" (concatenated).
        full_scale: value of a full-scale sample in arrays: 256 for `load_audio`, 1 for floats of soundfile or
            librosa, 32768 for 16-bit integers. Not used for paths.
        device: of the network, such as "cuda".
        cache: folder of computed features, keyed by the sound's content, the network and the settings; True
            is the folder of `evaluate` in the user's cache; False is none.
        edge_frames: pool over edge frames too (see `SoundNet.edge_frames`).
        n_jobs: processes, as everywhere in scikit-learn.
    """

    def __init__(
        self,
        weights: str | os.PathLike[str] = "soundnet8",
        layer: str | int | None = None,
        pool: str = "mean",
        *,
        full_scale: float = FULL_SCALE,
        device: str = "cpu",
        cache: str | os.PathLike[str] | bool = True,
        edge_frames: bool = False,
        n_jobs: int | None = None,
    ) -> None:
        self.weights = weights
        self.layer = layer
        self.pool = pool
        self.full_scale = full_scale
        self.device = device
        self.cache = cache
        self.edge_frames = edge_frames
        self.n_jobs = n_jobs

    def fit(self, X: Any, y: Any = None) -> SoundNetFeatures:  # noqa: N803  (scikit-learn's name)
        """Check the settings.

        Args:
            X: sounds, as for `transform`; files are not opened.
            y: ignored.

        Raises:
            ValueError: unknown layer or pooling, no such weights, or sounds of another form.
        """
        if self.pool not in POOLINGS:
            raise ValueError(f"unknown pooling {self.pool!r}; choose from {', '.join(POOLINGS)}")
        network, sha256 = _load_network(self.weights, self.device)
        layer = network.architecture.layer(
            network.architecture.default_layer if self.layer is None else self.layer
        )
        self._parse_sounds(X)
        self.layer_ = layer.key
        self.weights_sha256_ = sha256
        self._channels = layer.channels
        return self

    def transform(self, X: Any) -> Values:  # noqa: N803
        """Compute the features of sounds.

        Args:
            X: a list or a column of paths, or waveforms at 22,050 Hz: a list of arrays of any lengths, or an
                array `(sounds, samples)`.

        Shape:
            returns `(sounds, channels)`, with "+" in `pool` as many times the channels, float32

        Raises:
            ValueError: a sound that cannot be read, is too short for the layer, or gives it only edge frames;
                sounds of another form or scale; other weights than in `fit`.
        """
        check_is_fitted(self)
        _, sha256 = _load_network(self.weights, self.device)
        if sha256 != self.weights_sha256_:
            raise ValueError(f"{self.weights}: not the weights that this was fitted with; call fit again")
        sounds, jobs = self._parse_sounds(X), effective_n_jobs(self.n_jobs)
        size = -(-len(sounds) // (jobs * _BATCHES_PER_JOB if jobs > 1 else 1))
        batches = Parallel(n_jobs=self.n_jobs)(
            delayed(_compute_features)(self, sounds[first : first + size], first)
            for first in range(0, len(sounds), size)
        )
        for error in {error for _, error in batches if error}:
            warnings.warn(f"features are not cached: {error}", stacklevel=2)
        return np.concatenate([features for features, _ in batches])

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray[Any, np.dtype[Any]]:
        """Return names such as "pool5_mean_0": layer, pooling and channel.

        Args:
            input_features: ignored.
        """
        check_is_fitted(self)
        layer = self.layer_ if isinstance(self.layer_, str) else f"module{self.layer_}"
        names = [f"{layer}_{kind}_{n}" for kind in self.pool.split("+") for n in range(self._channels)]
        return np.array(names, dtype=object)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # older pickles belong to estimators that were fitted with edge frames
        super().__setstate__({"edge_frames": True, **state})

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags

    def _parse_sounds(self, X: Any) -> list[Path] | list[Values]:  # noqa: N803
        """Return paths, or waveforms within +-256."""
        if isinstance(X, (str, os.PathLike)):
            raise ValueError(f"sounds must be a list of paths, such as [{os.fspath(X)!r}]")
        sounds = np.asarray(X) if hasattr(X, "__array__") else X
        if isinstance(sounds, np.ndarray) and sounds.dtype.kind in "OUT" and sounds.shape[1:] in ((), (1,)):
            sounds = sounds.ravel()  # a column of paths, or of arrays
        elif not isinstance(sounds, (list, tuple)):
            sounds = check_array(sounds, dtype=np.float32, input_name="X", estimator=self)
        items = list(sounds)
        if not items:
            raise ValueError("no sounds")
        if all(isinstance(item, (str, os.PathLike)) for item in items):
            return [Path(item) for item in items]
        waves, peaks = zip(*(self._scale_waveform(item, n) for n, item in enumerate(items)), strict=True)
        enough = sum(map(len, waves)) >= SAMPLE_RATE  # shorter sounds are often silence
        if self.full_scale > LOUDEST and enough and looks_like_unit_scale(max(peaks)):
            warn_caller(
                f"no sample is beyond +-{max(peaks):.2g} with full_scale {self.full_scale:g}: nearly "
                "silence; use full_scale=1 for floats of soundfile and librosa",
                WaveformScaleWarning,
            )
        return list(waves)

    def _scale_waveform(self, item: Any, number: int) -> tuple[Values, float]:
        """Return a waveform within +-256, and its peak before."""
        try:
            values = np.asarray(item)
        except ValueError:  # a list of lists of unequal lengths
            values = np.empty((0, 0))
        if values.dtype.kind not in "fiu" or values.ndim != 1 or not len(values):
            raise ValueError(
                f"sounds must be paths, or waveforms (samples,); sound {number} is a "
                f"{type(item).__name__} of shape {values.shape} and type {values.dtype}"
            )
        peak = max(float(values.max()), -float(values.min()))
        if not peak <= LOUDEST * self.full_scale:
            problem = f"goes up to {peak:g}" if np.isfinite(peak) else "holds NaN or infinity"
            raise ValueError(f"sound {number} {problem}; full_scale is {self.full_scale:g}")
        wave: Values = values.astype(np.float32) * np.float32(FULL_SCALE / self.full_scale)
        return wave, peak


def _compute_features(
    settings: SoundNetFeatures, sounds: Sequence[Path | Values], first: int
) -> tuple[Values, str]:
    """Return features `(sounds, size)`, and why they could not be cached, if so."""
    network, _ = _load_network(settings.weights, settings.device)
    cache = open_cache(settings.cache, network)
    extractor = PooledFeatures(
        network, settings.layer_, settings.pool, cache=cache, edge_frames=settings.edge_frames
    )
    features = []
    for number, sound in enumerate(sounds, first):
        try:
            features.append(extractor.extract(sound)[0])
        except (ValueError, OSError) as error:
            name = str(sound) if isinstance(sound, Path) else f"sound {number}"
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            raise ValueError(f"{name}: {reason.removeprefix(f'{name}: ')}") from None
    return np.stack(features), cache.write_error if cache else ""


def _load_network(weights: str | os.PathLike[str], device: str) -> tuple[SoundNet, str]:
    """Return the network and its tensors' sha256, cached, as a grid search makes thousands of calls."""
    path = locate_weights(weights)
    status = path.stat()
    return _load_cached(path, (status.st_mtime_ns, status.st_size), device)


@lru_cache(maxsize=2)
def _load_cached(path: Path, stamp: tuple[int, int], device: str) -> tuple[SoundNet, str]:
    architecture, state, metadata = read_weights(path)
    return build_model(architecture, state, device=device), metadata["sha256"]
