"""What a fine-tuning run is: its hyperparameters, its data and network, and its result on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soundnet_port.files import atomic_write
from soundnet_port.learning.augmentation import Augmentation
from soundnet_port.learning.errors import TrainingError
from soundnet_port.learning.labeled_sounds import LabeledSounds
from soundnet_port.learning.run_files import WEIGHTS, check_settings, read_result_file, reading_result
from soundnet_port.network.model import SoundNet

RESULT = "result.json"
_DEFAULT_AUGMENTATION = Augmentation(gain=6, shift=5, stretch=1.12, flip=True, mix=0.2)


@dataclass(frozen=True)
class FinetuneConfig:
    """Hyperparameters of fine-tuning; the defaults suit a few hundred to a few thousand clips.

    Attributes:
        epochs: passes over the training sounds.
        batch: sounds per step.
        lr: peak learning rate of AdamW's one-cycle cosine schedule (Smith and Topin, 2018); by default
            0.003 from random values, and 0.001 from weights.
        trunk_lr: that of layers from weights; by default a tenth of `lr`.
        decay: AdamW's weight decay, of weights but not of biases and batch norms.
        dropout: probability, on the head's input.
        seconds: of a random crop; shorter sounds are repeated.
        augmentation: of each crop.
        variants: with frozen layers, train on so many augmented crops of each sound in turn, for which
            these layers are computed once (on a CPU) and kept in memory; 0: on new ones every epoch, as
            where nothing is frozen or the features of all would take more than 2 GB.
        patience: with validation sounds, stop after this many epochs without improvement; 0: never.
        seed: of initialization, order, crops, augmentation and dropout.
        train_batch_norm: let batch norms from weights use each batch's statistics, and change with training.
            By default they stay as they are: few sounds would replace the statistics of two million.
            Those of a network with random values are always trained.
        edge_frames: include head frames that see edge frames in training and predictions (see
            `SoundNet.edge_frames`). By default they are left out, and a crop or clip that has no others
            is repeated until it does. Only a head on conv7 (conv4 with 5 layers) has any.
    """

    epochs: int = 60
    batch: int = 16
    lr: float | None = None
    trunk_lr: float | None = None
    decay: float = 0.05
    dropout: float = 0.3
    seconds: float = 5.0
    augmentation: Augmentation = _DEFAULT_AUGMENTATION
    variants: int = 8
    patience: int = 0
    seed: int = 0
    train_batch_norm: bool = False
    edge_frames: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (
            ("epochs", 1, 10**6),
            ("batch", 2, 10**5),
            ("lr", 1e-9, 10),
            ("trunk_lr", 0, 10),
            ("decay", 0, 10),
            ("dropout", 0, 0.99),
            ("seconds", 0.2, 3600),
            ("variants", 0, 10**6),
            ("patience", 0, 10**6),
            ("seed", 0, 2**63),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise TrainingError(f"{name} must be from {low} to {high}, not {value}")


@dataclass(frozen=True)
class FinetuneResult:
    """The result of a fine-tuning run.

    Attributes:
        folder: of the run.
        weights: the file, for `load_pretrained` and `predict`.
        classes: names, in the order of the outputs.
        epoch: the one whose weights these are; 0 for a pooled head, which is fitted without epochs.
        fold: name of the held-out fold; "" without one.
        accuracy: of `predict`'s top class on the held-out sounds, 0 to 1; None without any.
        predictions: for each held-out sound its path, its class, and the predicted class.
        unreadable: reason by path, of sounds that were left out.
        seconds: training time, over all interruptions.
        edge_frames: whether training and predictions included edge frames; predict with such a network
            with `edge_frames=True`.
    """

    folder: Path
    weights: Path
    classes: tuple[str, ...]
    epoch: int
    fold: str
    accuracy: float | None
    predictions: tuple[tuple[str, str, str], ...]
    unreadable: Mapping[str, str]
    seconds: float
    edge_frames: bool = False


@dataclass(frozen=True)
class FinetuneRun:
    """A run that is ready to start.

    Attributes:
        folder: of the run.
        data: labeled sounds.
        model: the network before the first step; with a pooled head the one that gives the features.
        pooled: whether a pooled head is fitted, and nothing else trained.
        pretrained: whether the trunk is from weights.
        frozen_blocks: how many of its first blocks stay as they are.
        config: with the learning rate.
        train: indices of sounds.
        test: indices of the held-out sounds.
        validation: indices of the sounds that choose the epoch.
        fold: name of the held-out fold; "" without one.
        settings: all that the result depends on, as checkpoint and result.json record it.
    """

    folder: Path
    data: LabeledSounds
    model: SoundNet
    pooled: bool
    pretrained: bool
    frozen_blocks: int
    config: FinetuneConfig
    train: tuple[int, ...]
    test: tuple[int, ...]
    validation: tuple[int, ...]
    fold: str
    settings: dict[str, Any]

    def read_result(self) -> FinetuneResult | None:
        """Read the result of this run; None if it is not done.

        Raises:
            TrainingError: the folder holds a run with other settings.
        """
        path = self.folder / RESULT
        result = read_result_file(path)
        if result is None:
            return None
        self.check_settings(result.get("settings"))
        weights = self.folder / WEIGHTS
        if not weights.is_file():
            raise TrainingError(f"{weights}: does not exist; remove {RESULT} to start over")
        with reading_result(path):
            return FinetuneResult(
                self.folder,
                weights,
                tuple(self.data.classes),
                result["epoch"],
                self.fold,
                result["accuracy"],
                tuple(tuple(prediction) for prediction in result["predictions"]),
                result["unreadable"],
                result["seconds"],
                self.settings.get("edge_frames", False),
            )

    def check_settings(self, saved: Any) -> None:
        """Raise a TrainingError if the settings in the folder differ from this run's."""
        if isinstance(saved, Mapping) and "edge_frames" in self.settings:
            saved = {"edge_frames": True, **saved}  # runs from before it was a setting included them
        if isinstance(saved, Mapping) and "variants" in self.settings:
            saved = {"variants": 0, **saved}  # and had new crops every epoch
        check_settings(self.folder, "run", saved, self.settings)


def write_result(
    run: FinetuneRun,
    epoch: int,
    accuracy: float | None,
    predictions: Sequence[tuple[str, str, str]],
    unreadable: Mapping[str, str],
    seconds: float,
) -> FinetuneResult:
    """Write a run's result.json, and return what it holds; for the arguments see `FinetuneResult`."""
    result = {
        "settings": run.settings,
        "epoch": epoch,
        "accuracy": accuracy,
        "seconds": seconds,
        "predictions": list(predictions),
        "unreadable": dict(unreadable),
    }
    with atomic_write(run.folder / RESULT) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    written = run.read_result()
    assert written is not None
    return written
