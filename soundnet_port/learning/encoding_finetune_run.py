"""What fine-tuning an encoding model takes and gives: hyperparameters, recordings, network, results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from soundnet_port.files import atomic_write
from soundnet_port.learning.encoding_data import Recording, name_runs
from soundnet_port.learning.encoding_features import ResponseModel
from soundnet_port.learning.errors import TrainingError
from soundnet_port.learning.feature_cache import Values
from soundnet_port.learning.finetune_run import RESULT
from soundnet_port.learning.run_files import WEIGHTS, check_settings
from soundnet_port.network.model import SoundNet

HEAD = "head.npz"
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
        held_out: names of the runs that the figures are of: the test runs, or without any the validation
            runs, which chose the epoch.
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
        try:
            result = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise TrainingError(f"{path}: {error}; remove it to start over") from None
        self.check_settings(result.get("settings"))
        return FinetuneEncodingResult(
            self.folder,
            self.folder / WEIGHTS,
            self.folder / HEAD,
            self.layer,
            result["epoch"],
            result["held_out"],
            self.read_scores("ridge_", result["ridge"]["loss"]),
            self.read_scores("", result["finetuned"]["loss"]),
            tuple(result["notes"]),
            result["seconds"],
        )

    def write_scores(self, prefix: str, scores: Scores) -> None:
        """Write correlation and R2 as arrays."""
        for name in ("correlation", "r2"):
            with (
                atomic_write(self.folder / f"{prefix}{name}.npy") as temporary,
                open(temporary, "wb") as file,
            ):
                np.save(file, getattr(scores, name))

    def read_scores(self, prefix: str, loss: float) -> Scores:
        """Read what `write_scores` wrote.

        Raises:
            TrainingError: the arrays cannot be read.
        """
        paths = [self.folder / f"{prefix}{name}.npy" for name in ("correlation", "r2")]
        try:
            return Scores(loss, *(np.load(path, allow_pickle=False) for path in paths))
        except (OSError, ValueError, EOFError) as error:
            raise TrainingError(
                f"{self.folder}: {prefix}correlation.npy or r2.npy is damaged ({error}); remove "
                f"{RESULT} and checkpoint.pt to start over"
            ) from None


def write_result(
    run: EncodingRun, epoch: int, ridge: Scores, finetuned: Scores, notes: Sequence[str], seconds: float
) -> FinetuneEncodingResult:
    """Write a run's figures and result.json, and return what they hold; see `FinetuneEncodingResult`."""
    run.write_scores("", finetuned)
    result: Mapping[str, Any] = {
        "settings": run.settings,
        "epoch": epoch,
        "held_out": run.name_part(run.measured),
        "ridge": ridge.summarize(),
        "finetuned": finetuned.summarize(),
        "notes": list(notes),
        "seconds": seconds,
    }
    with atomic_write(run.folder / RESULT) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    written = run.read_result()
    assert written is not None
    return written
