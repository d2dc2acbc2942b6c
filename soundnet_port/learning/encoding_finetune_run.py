"""What fine-tuning an encoding model takes and gives: hyperparameters, recordings, network, results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soundnet_port.files import atomic_write
from soundnet_port.learning.encoding_data import Recording, name_runs
from soundnet_port.learning.encoding_features import ResponseModel
from soundnet_port.learning.encoding_head import EncodingHead
from soundnet_port.learning.errors import TrainingError
from soundnet_port.learning.feature_cache import Values
from soundnet_port.learning.finetune_run import RESULT
from soundnet_port.learning.run_files import (
    CHECKPOINT,
    WEIGHTS,
    check_settings,
    read_result_file,
    reading_result,
    write_trained_weights,
)
from soundnet_port.network.model import SoundNet
from soundnet_port.network.weights import checksum, cpu_state_dict

HEAD = "head.npz"
RIDGE, FINETUNED = "ridge", "finetuned"  # whose figures
PARTS = TRAIN, VALIDATION, TEST = "training", "validation", "test"  # of the recordings


@dataclass(frozen=True)
class FinetuneEncodingConfig:
    """Hyperparameters of fine-tuning an encoding model.

    Attributes:
        epochs: passes over the training runs; 0 keeps the ridge solution.
        seconds: length of a window; a step has one.
        lr: peak learning rate of the head (Adam; it rises for a tenth of the epochs, and falls as a cosine).
        trunk_lr: that of the trunk.
        patience: stop after this many epochs without improvement on the validation runs; 0: never.
        seed: of the order and position of windows.
    """

    epochs: int = 20
    seconds: float = 120.0
    lr: float = 0.0003
    trunk_lr: float = 0.003
    patience: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("epochs", 0, 10**6),
            ("seconds", 1, 10**5),
            ("lr", 0, 10),
            ("trunk_lr", 0, 10),
            ("patience", 0, 10**6),
            ("seed", 0, 2**63),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise TrainingError(f"{name} must be from {low} to {high}, not {value}")
            kind = type(getattr(FinetuneEncodingConfig, name))
            if kind is int and not isinstance(value, Integral):
                raise TrainingError(f"{name} must be a whole number, not {value}")
            object.__setattr__(self, name, kind(value))  # NumPy's numbers cannot be saved as JSON


@dataclass(frozen=True)
class Scores:
    """Figures of predictions.

    Attributes:
        loss: mean squared error of z-scored targets, over volumes and usable outputs.
        correlation: by output; NaN for those that could not be fitted.
        r2: by output.
    """

    loss: float
    correlation: Values
    r2: Values

    @property
    def usable(self) -> Values:
        """Correlations of the outputs that could be fitted."""
        return self.correlation[~np.isnan(self.correlation)]

    def summarize(self) -> dict[str, float]:
        """Return the loss, and medians over outputs."""
        return {
            "loss": self.loss,
            "median_correlation": float(np.median(self.usable)),
            "p90_correlation": float(np.quantile(self.usable, 0.9)),
            "median_r2": float(np.nanmedian(self.r2)),
        }


@dataclass(frozen=True)
class FinetuneEncodingResult:
    """The result of fine-tuning an encoding model.

    Attributes:
        folder: of the run.
        weights: file of the trunk, without heads, for `load_pretrained`, `extract` and `encode`.
        head: file of the linear head, for `EncodingHead.load`.
        layer: that the head is on.
        epoch: the one that these are of; 0 is the ridge solution, which no epoch improved on.
        part: that the figures are of: "test", or without test runs "validation".
        held_out: names of its runs; validation runs chose the epoch.
        ridge: figures of the ridge solution, from which training started.
        finetuned: figures of the chosen epoch.
        notes: caveats, and how many volumes were left out.
        seconds: time, over all interruptions.
    """

    folder: Path
    weights: Path
    head: Path
    layer: str
    epoch: int
    part: str
    held_out: str
    ridge: Scores
    finetuned: Scores
    notes: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return files and summaries, ready for JSON."""
        return {
            "weights": str(self.weights),
            "head": str(self.head),
            "layer": self.layer,
            "epoch": self.epoch,
            "part": self.part,
            "held_out": self.held_out,
            "ridge": self.ridge.summarize(),
            "finetuned": self.finetuned.summarize(),
            "notes": list(self.notes),
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class EncodingRun:
    """A run that is ready to start.

    Attributes:
        folder: of the run.
        recordings: all of them.
        parts: of each recording: TRAIN, VALIDATION or TEST.
        folds: of each recording, for choosing penalties; of use for those in TRAIN.
        model: the network before the first step, cut off after the layer.
        complete: the network that is written, with the layers after that.
        frozen_blocks: how many of its first blocks stay as they are.
        response: how rows turn into predictors.
        tr: the period in seconds.
        align: "center" or "end".
        edge_frames: whether edge frames are included.
        alphas: ridge penalties to choose from.
        decoder: of sound files.
        config: hyperparameters.
        settings: all that the result depends on, as checkpoint and result.json record it.
    """

    folder: Path
    recordings: Sequence[Recording]
    parts: Sequence[str]
    folds: Sequence[int]
    model: SoundNet
    complete: SoundNet
    frozen_blocks: int
    response: ResponseModel
    tr: float
    align: str
    edge_frames: bool
    alphas: Sequence[float]
    decoder: str
    config: FinetuneEncodingConfig
    settings: dict[str, Any]

    @property
    def layer(self) -> str:
        """Name of the layer."""
        return self.model.architecture.last_layer

    @property
    def measured(self) -> str:
        """The part that figures are reported of."""
        return TEST if TEST in self.parts else VALIDATION

    def name_part(self, part: str) -> str:
        """Name the runs of a part."""
        return name_runs([own for own, at in zip(self.recordings, self.parts, strict=True) if at == part])

    def check_settings(self, saved: Any) -> None:
        """Raise a TrainingError if the settings in the folder differ from this run's."""
        check_settings(self.folder, "run", saved, self.settings)

    def read_result(self) -> FinetuneEncodingResult | None:
        """Read the result of this run; None if it is not done.

        Raises:
            TrainingError: the folder holds a run with other settings, or is damaged.
        """
        path = self.folder / RESULT
        result = read_result_file(path)
        if result is None:
            return None
        self.check_settings(result.get("settings"))
        weights, head = self.folder / WEIGHTS, self.folder / HEAD
        for file in (weights, head):
            if not file.is_file():
                raise TrainingError(f"{file}: does not exist; remove {RESULT} to start over")
        with reading_result(path):
            return FinetuneEncodingResult(
                self.folder,
                weights,
                head,
                self.layer,
                int(result["epoch"]),
                str(result["part"]),
                str(result["held_out"]),
                self.read_scores(RIDGE, float(result[RIDGE]["loss"])),
                self.read_scores(FINETUNED, float(result[FINETUNED]["loss"])),
                tuple(result["notes"]),
                float(result["seconds"]),
            )

    def write_scores(self, whose: str, scores: Scores) -> None:
        """Write correlation and R2 as arrays, of RIDGE or FINETUNED."""
        for name in ("correlation", "r2"):
            with (
                atomic_write(self.folder / f"{whose}_{name}.npy") as temporary,
                open(temporary, "wb") as file,
            ):
                np.save(file, getattr(scores, name))

    def read_scores(self, whose: str, loss: float) -> Scores:
        """Read what `write_scores` wrote.

        Raises:
            TrainingError: the arrays cannot be read, or are others.
        """
        arrays, shape = [], (self.recordings[0].targets.shape[1],)
        for path in (self.folder / f"{whose}_{name}.npy" for name in ("correlation", "r2")):
            try:
                array = np.load(path, allow_pickle=False)
                if array.shape != shape or array.dtype.kind != "f":
                    raise ValueError(f"{array.dtype} {array.shape}, not one number per output")
            except Exception as error:  # a damaged header may raise anything
                reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
                raise TrainingError(
                    f"{path}: cannot be used ({reason}); remove {RESULT} and {CHECKPOINT} to start over"
                ) from None
            arrays.append(array)
        return Scores(loss, *arrays)


def write_best(
    run: EncodingRun,
    epoch: int,
    trunk: Mapping[str, Tensor],
    head: Values,
    alpha: NDArray[np.float64],
    usable: NDArray[np.bool_],
) -> None:
    """Write the trunk, with the layers after it as they were, and the head.

    Args:
        run: that is done.
        epoch: the one that is written.
        trunk: state of the run's cut network.
        head: (usable outputs, predictors).
        alpha: penalty of each usable output.
        usable: which outputs were fitted.
    """
    run.complete.load_state_dict(trunk, strict=False)
    write_trained_weights(run.folder / WEIGHTS, run.complete, run.settings | {"epoch": epoch})
    weights = np.full((len(usable), head.shape[1]), np.nan, np.float32)
    penalties = np.full(len(usable), np.nan, np.float32)
    weights[usable], penalties[usable] = head, alpha
    sets = 1 if run.response.weights else len(run.response.delays)
    EncodingHead(
        weights=weights.reshape(len(weights), sets, -1),
        alpha=penalties,
        layer=run.layer,
        tr=run.tr,
        align=run.align,
        edge_frames=run.edge_frames,
        delays=run.response.delays,
        hrf=run.response.weights,
        trunk=checksum(cpu_state_dict(run.complete, torch.float32)),
    ).save(run.folder / HEAD)


def write_result(
    run: EncodingRun, epoch: int, ridge: Scores, finetuned: Scores, notes: Sequence[str], seconds: float
) -> FinetuneEncodingResult:
    """Write a run's figures and result.json, and return what they hold; see `FinetuneEncodingResult`."""
    run.write_scores(FINETUNED, finetuned)
    result: Mapping[str, Any] = {
        "settings": run.settings,
        "epoch": epoch,
        "part": run.measured,
        "held_out": run.name_part(run.measured),
        RIDGE: ridge.summarize(),
        FINETUNED: finetuned.summarize(),
        "notes": list(notes),
        "seconds": seconds,
    }
    with atomic_write(run.folder / RESULT) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    written = run.read_result()
    assert written is not None
    return written
