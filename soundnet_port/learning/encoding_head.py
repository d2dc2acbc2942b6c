"""The linear head of a fine-tuned encoding model: a file, and what it predicts for a sound."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from soundnet_port.files import atomic_write
from soundnet_port.learning.encoding_features import (
    AlignedFeatures,
    ResponseModel,
    check_decoder,
    standardize,
)
from soundnet_port.learning.errors import EncodingError
from soundnet_port.learning.feature_cache import Values
from soundnet_port.network.model import SoundNet
from soundnet_port.network.weights import checksum, cpu_state_dict


@dataclass(frozen=True)
class EncodingHead:
    """Weights from a layer's z-scored rows to z-scored targets; there is no intercept.

    Attributes:
        weights: (outputs, delays, channels), with an HRF (outputs, 1, channels); NaN for outputs that could
            not be fitted.
        alpha: (outputs,), the ridge penalties; NaN for outputs that could not be fitted.
        layer: name of the layer.
        tr: the period in seconds.
        align: "center" or "end", see `soundnet_port.inference.alignment.align`.
        edge_frames: whether edge frames are included.
        delays: in periods.
        hrf: weight of each delay, where a hemodynamic response sums them; empty otherwise.
        trunk: checksum of the weights that it was trained with; "" fits all.
    """

    weights: Values
    alpha: Values
    layer: str
    tr: float
    align: str
    edge_frames: bool
    delays: tuple[int, ...]
    hrf: tuple[float, ...] = ()
    trunk: str = ""

    @property
    def response(self) -> ResponseModel:
        """How rows turn into predictors of later periods."""
        return ResponseModel(self.delays, self.hrf)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an .npz file with an array per attribute."""
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            np.savez(
                file,
                weights=self.weights,
                alpha=self.alpha,
                layer=np.array(self.layer),
                tr=np.float64(self.tr),
                align=np.array(self.align),
                edge_frames=np.bool_(self.edge_frames),
                delays=np.array(self.delays, np.int64),
                hrf=np.array(self.hrf, np.float64),
                trunk=np.array(self.trunk),
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EncodingHead:
        """Read the file of a head, such as `head.npz` in the folder of a run.

        Raises:
            EncodingError: the file cannot be read, or holds no head.
        """
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                head = cls(
                    arrays["weights"],
                    arrays["alpha"],
                    str(arrays["layer"]),
                    float(arrays["tr"]),
                    str(arrays["align"]),
                    bool(arrays["edge_frames"]),
                    tuple(arrays["delays"].tolist()),
                    tuple(arrays["hrf"].tolist()),
                    str(arrays["trunk"]),
                )
            sets = 1 if head.hrf else len(head.delays)
            if head.weights.ndim != 3 or head.weights.shape[1] != sets or head.weights.dtype.kind != "f":
                raise ValueError("weights of another shape")
            return head
        except OSError as error:
            raise EncodingError(f"{path}: {error.strerror or error}") from None
        except Exception:  # damaged archives and headers may raise anything
            raise EncodingError(
                f"{path}: not the head of an encoding model; use the head.npz of a run"
            ) from None

    def predict(self, model: SoundNet, sound: str | os.PathLike[str], *, decoder: str = "auto") -> Values:
        """Predict the targets while a sound is played, z-scored, as the run that one sound fills.

        The first period starts with the sound, whatever the onset of a recording: its volume 0 is row
        onset / tr, so shift one of them before you compare them.

        Args:
            model: the trunk that was trained with this head.
            sound: a sound file.
            decoder: of the file, see `load_audio`.

        Shape:
            returns (periods, outputs); NaN where an output has no weights, and in periods without frames

        Raises:
            EncodingError: the network is not the trunk that was trained with this head.
            AudioError, ValueError: the sound cannot be used, or the network has other layers.
        """
        check_decoder(decoder)
        if self.trunk and self.trunk != checksum(cpu_state_dict(model, torch.float32)):
            raise EncodingError(
                "the network is not the one that was trained with this head; use the weights.safetensors "
                "beside it"
            )
        features = AlignedFeatures(
            model, [self.layer], self.tr, self.align, edge_frames=self.edge_frames, decoder=decoder
        )
        rows = features.extract(Path(sound))[0][self.layer]
        known = self.response.predictable(~np.isnan(rows[:, 0]))
        predictors = self.response.predictors(standardize(rows))
        weights = self.weights.reshape(len(self.weights), -1)
        if predictors.shape[1] != weights.shape[1]:
            raise EncodingError(
                f"{self.layer} has {rows.shape[1]:,} channels, where the head has "
                f"{self.weights.shape[2]:,}; use the weights.safetensors beside it"
            )
        predicted = np.full((len(rows), len(weights)), np.nan, np.float32)
        predicted[known] = standardize(predictors[known]) @ weights.T
        return predicted
