"""A scikit-learn transformer from sounds to features, for pipelines and searches over layers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from soundnet_port.errors import MissingExtraError

try:
    from joblib import effective_n_jobs
    from sklearn.base import BaseEstimator, TransformerMixin
    from sklearn.utils.parallel import Parallel, delayed
    from sklearn.utils.validation import check_array, check_is_fitted
except ImportError:
    raise MissingExtraError("scikit-learn", "learn") from None

from soundnet_port.audio.loading import LOUDEST
from soundnet_port.inference.pooling import POOLINGS
from soundnet_port.learning.evaluation import Listening, Values, cache_folder
from soundnet_port.network.architecture import FULL_SCALE
from soundnet_port.network.model import SoundNet
from soundnet_port.network.weights import build_model, read_weights
from soundnet_port.pretrained import locate_weights

_PARTS = 4  # for each job, for sounds take differently long


class SoundNetFeatures(TransformerMixin, BaseEstimator):  # type: ignore[misc]  # sklearn has no types
    """A vector for each sound: a layer's activations pooled over time, as `embed` gives them.

    There is nothing to learn: `fit` looks at the settings and at what the sounds are given as. After it
    `layer_` is the layer, `weights_sha256_` the weights' checksum. The network is not part of a pickle;
    where it is opened, the same weights must be found.

    Args:
        weights: name or path, as for `load_pretrained`.
        layer: its name, or Torch7's module number; by default pool5, or with 5 layers conv4.
        pool: over time, "mean", "max" or "mean+std" (both, one after the other).
        full_scale: of waveforms given as arrays, the value of a full-scale sample: 256 for what
            `load_audio` gives, 1 for floats of soundfile or librosa, 32768 for 16-bit integers.
            Paths have no need of it.
        device: where the network computes, such as "cuda".
        cache: folder in which features are kept under the content of the sound, the network and the
            settings; True is a folder in the user's cache, which `evaluate` uses too, False none.
        edge_frames: pool over edge frames, too (see `SoundNet.edge_frames`), as `embed` can.
        n_jobs: processes among which the sounds are shared out, as everywhere in scikit-learn.
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
        """Checks the settings.

        Args:
            X: sounds, as for `transform`; only arrays are looked at, no file is opened.
            y: ignored.

        Raises:
            ValueError: unknown layer or pooling, no such weights, or sounds of another form.
        """
        if self.pool not in POOLINGS:
            raise ValueError(f"unknown pooling {self.pool!r}; choose from {', '.join(POOLINGS)}")
        network, sha256 = _network(self.weights, self.device)
        layer = network.architecture.layer(
            network.architecture.default_layer if self.layer is None else self.layer
        )
        self._sounds(X)
        self.layer_ = layer.name if layer.is_layer else layer.module
        self.weights_sha256_ = sha256
        self._channels = layer.channels
        return self

    def transform(self, X: Any) -> Values:  # noqa: N803
        """The sounds' features.

        Args:
            X: sound files (a list or a column of paths), or waveforms at 22,050 Hz: a list of arrays
                of any lengths, or an array (sounds, samples).

        Shape:
            returns `(sounds, channels)`, or `(sounds, 2 * channels)` for "mean+std", float32

        Raises:
            ValueError: a sound that cannot be read, is too short for the layer, or leaves it edge frames
                alone, named; sounds of another form or scale; other weights than those that were fitted.
        """
        check_is_fitted(self)
        _, sha256 = _network(self.weights, self.device)
        if sha256 != self.weights_sha256_:
            raise ValueError(f"the weights {self.weights} are not those that this was fitted with")
        sounds, jobs = self._sounds(X), effective_n_jobs(self.n_jobs)
        size = -(-len(sounds) // (jobs * _PARTS if jobs > 1 else 1))
        made = Parallel(n_jobs=self.n_jobs)(
            delayed(_features)(self, sounds[first : first + size], first)
            for first in range(0, len(sounds), size)
        )
        for trouble in {said for _, said in made if said}:
            warnings.warn(f"features are not kept: {trouble}", stacklevel=2)
        return np.concatenate([values for values, _ in made])

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray[Any, np.dtype[Any]]:
        """Such as "pool5_mean_0": layer, pooling and channel.

        Args:
            input_features: ignored.
        """
        check_is_fitted(self)
        layer = self.layer_ if isinstance(self.layer_, str) else f"module{self.layer_}"
        names = [f"{layer}_{kind}_{n}" for kind in self.pool.split("+") for n in range(self._channels)]
        return np.array(names, dtype=object)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # pickled before there was a choice, and what comes after it was fitted with edge frames
        super().__setstate__({"edge_frames": True, **state})

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags

    def _sounds(self, X: Any) -> list[Path] | list[Values]:  # noqa: N803
        """Paths, or waveforms within +-256."""
        if isinstance(X, (str, os.PathLike)):
            raise ValueError(f"sounds must be a list of paths, such as [{os.fspath(X)!r}]")
        given = np.asarray(X) if hasattr(X, "__array__") else X
        if isinstance(given, np.ndarray) and given.dtype.kind in "OUT" and given.shape[1:] in ((), (1,)):
            given = given.ravel()  # a column of paths, or of arrays
        elif not isinstance(given, (list, tuple)):
            given = check_array(given, dtype=np.float32, input_name="X", estimator=self)
        items = list(given)
        if not items:
            raise ValueError("there are no sounds")
        if all(isinstance(item, (str, os.PathLike)) for item in items):
            return [Path(item) for item in items]
        waves = [self._wave(item, number) for number, item in enumerate(items)]
        loudest = max(float(np.abs(wave).max()) for wave in waves)
        if self.full_scale > 1 and 0 < loudest * self.full_scale / FULL_SCALE <= 1:
            warnings.warn(
                f"all samples are within [-1, 1] and full_scale is {self.full_scale:g}: all but silence; "
                "full_scale=1 is for floats as soundfile and librosa give them",
                stacklevel=3,
            )
        return waves

    def _wave(self, item: Any, number: int) -> Values:
        try:
            values = np.asarray(item)
        except ValueError:  # a list of lists of unequal lengths
            values = np.empty((0, 0))
        if values.dtype.kind not in "fiu" or values.ndim != 1 or not len(values):
            raise ValueError(
                f"sounds must be paths, or waveforms (samples,); sound {number} is a "
                f"{type(item).__name__} of shape {values.shape} and type {values.dtype}"
            )
        largest = max(float(values.max()), -float(values.min()))
        if not largest <= LOUDEST * self.full_scale:
            what = f"goes up to {largest:g}" if np.isfinite(largest) else "holds NaN or infinity"
            raise ValueError(f"sound {number} {what}; full_scale is {self.full_scale:g}")
        wave: Values = values.astype(np.float32) * np.float32(FULL_SCALE / self.full_scale)
        return wave


def _features(settings: SoundNetFeatures, sounds: Sequence[Path | Values], first: int) -> tuple[Values, str]:
    """Features (sounds, size), and why they could not be kept, if so."""
    network, _ = _network(settings.weights, settings.device)
    key, folder = settings.layer_, cache_folder(settings.cache)
    layer = network.architecture.layer(key)
    listening = Listening(
        network, key, layer, "modern", settings.pool, True, "auto", folder, settings.edge_frames
    )
    made = []
    for number, sound in enumerate(sounds, first):
        try:
            made.append(listening.to(sound)[0])
        except (ValueError, OSError) as error:
            name = str(sound) if isinstance(sound, Path) else f"sound {number}"
            text = (error.strerror if isinstance(error, OSError) else None) or str(error)
            raise ValueError(f"{name}: {text.removeprefix(f'{name}: ')}") from None
    return np.stack(made), listening.trouble


def _network(weights: str | os.PathLike[str], device: str) -> tuple[SoundNet, str]:
    """The network and its tensors' sha256, kept for the next call, for a search has thousands of them."""
    path = locate_weights(weights)
    found = path.stat()
    return _loaded(path, (found.st_mtime_ns, found.st_size), device)


@lru_cache(maxsize=2)
def _loaded(path: Path, stamp: tuple[int, int], device: str) -> tuple[SoundNet, str]:
    architecture, state, metadata = read_weights(path)
    return build_model(architecture, state, device=device), metadata["sha256"]
