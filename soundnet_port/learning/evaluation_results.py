"""The results of an evaluation, as text, JSON, a table of predictions and a picture."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soundnet_port.audio.finding import Failure
from soundnet_port.errors import require
from soundnet_port.files import atomic_write
from soundnet_port.learning.labeled_sounds import LabeledSound


@dataclass(frozen=True)
class FoldResult:
    """The result of a fold.

    Attributes:
        name: of the fold.
        train: number of training sounds.
        test: number of test sounds.
        accuracy: share of the test sounds classified correctly, 0 to 1.
        regularization: the ridge penalty alpha that was chosen; for the paper's protocols the SVM's C.
    """

    name: str
    train: int
    test: int
    accuracy: float
    regularization: float


@dataclass(frozen=True)
class SoundPrediction:
    """The class predicted for a test sound.

    Attributes:
        sound: its file and its true class.
        fold: the fold in whose test set it was.
        predicted: the class with the highest decision value.
        decision_values: (classes,), the decision value of each class.
    """

    sound: LabeledSound
    fold: str
    predicted: str
    decision_values: tuple[float, ...]


@dataclass(frozen=True)
class EvaluationResult:
    """The result of an evaluation.

    Attributes:
        protocol: "modern", "paper" or "paper-dcase".
        layers: names or module numbers.
        pool: for "modern"; None for the others.
        resampled: whether sounds were resampled to 22,050 Hz.
        edge_frames: whether the features include edge frames (see `SoundNet.edge_frames`); most layers
            have none.
        classes: in the order of decision values and of `confusion`.
        folds: the result of each fold.
        predictions: for each test sound of each fold.
        failures: sounds that could not be used; they are in no fold.
        notes: caveats about the figures.
    """

    protocol: str
    layers: tuple[str | int, ...]
    pool: str | None
    resampled: bool
    edge_frames: bool
    classes: tuple[str, ...]
    folds: tuple[FoldResult, ...]
    predictions: tuple[SoundPrediction, ...]
    failures: tuple[Failure, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Layers and protocol, such as "pool5, paper", and "with edge frames" if there are any."""
        edges = ", with edge frames" if self.edge_frames else ""
        return f"{'+'.join(map(str, self.layers))}, {self.protocol}{edges}"

    @property
    def accuracies(self) -> tuple[float, ...]:
        """The accuracy of each fold."""
        return tuple(fold.accuracy for fold in self.folds)

    @property
    def accuracy(self) -> float:
        """The mean of the folds' accuracies."""
        return float(np.mean(self.accuracies))

    @property
    def std(self) -> float:
        """The population standard deviation of the folds' accuracies."""
        return float(np.std(self.accuracies))

    @property
    def confusion(self) -> NDArray[np.int64]:
        """The confusion matrix, counts of (true classes, predicted classes)."""
        index = {label: number for number, label in enumerate(self.classes)}
        counts = np.zeros((len(index), len(index)), np.int64)
        for prediction in self.predictions:
            counts[index[prediction.sound.label], index[prediction.predicted]] += 1
        return counts

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the decision values, ready for JSON."""
        return {
            "protocol": self.protocol,
            "layers": list(self.layers),
            "pool": self.pool,
            "resampled": self.resampled,
            "edge_frames": self.edge_frames,
            "accuracy": self.accuracy,
            "std": self.std,
            "folds": [vars(fold) for fold in self.folds],
            "classes": list(self.classes),
            "confusion": self.confusion.tolist(),
            "predictions": [
                {
                    "fold": prediction.fold,
                    "file": str(prediction.sound.path),
                    "label": prediction.sound.label,
                    "predicted": prediction.predicted,
                }
                for prediction in self.predictions
            ],
            "failures": [vars(failure) for failure in self.failures],
            "notes": list(self.notes),
        }


def format_confusion(result: EvaluationResult) -> str:
    """Format the confusion matrix as text: a row per true class, a column per predicted one."""
    counts = result.confusion
    width = max(3, len(str(counts.max())) + 1, len(str(len(counts))) + 1)
    label_width = min(24, max(map(len, result.classes)))
    lines = [" " * (label_width + 4) + "".join(f"{number:{width}}" for number in range(1, len(counts) + 1))]
    for number, (label, row) in enumerate(zip(result.classes, counts, strict=True), 1):
        cells = "".join(f"{count or '.':>{width}}" for count in row)
        recall = f"{row[number - 1] / row.sum():7.1%}" if row.sum() else ""
        lines.append(f"{number:3} {label[:label_width]:{label_width}}{cells}{recall}")
    return "\n".join(lines)


def write_evaluation(result: EvaluationResult, folder: str | os.PathLike[str]) -> list[Path]:
    """Write evaluation.json, predictions.tsv (with decision values) and confusion.png.

    Raises:
        MissingExtraError: the extra `[learn]` is not installed.
        OSError: they cannot be written.
    """
    figure_class = require("matplotlib.figure", "learn").Figure
    folder = Path(folder)
    paths = [folder / name for name in ("evaluation.json", "predictions.tsv", "confusion.png")]
    with atomic_write(paths[0]) as temporary:
        temporary.write_text(json.dumps(result.to_dict(), indent=1) + "\n", "utf-8")
    with atomic_write(paths[1]) as temporary, open(temporary, "wb") as file:
        header = ["fold", "file", "label", "predicted", *result.classes]
        file.write(("\t".join(header) + "\n").encode())
        for prediction in result.predictions:
            sound = prediction.sound
            values = [f"{value:.6g}" for value in prediction.decision_values]
            row = [prediction.fold, os.fspath(sound.path), sound.label, prediction.predicted, *values]
            file.write(os.fsencode("\t".join(row) + "\n"))
    counts, count = result.confusion, len(result.classes)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = 3 + 0.32 * count
    figure = figure_class(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(count), result.classes, rotation=90)
    axes.set_yticks(range(count), result.classes)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(f"{result.title}: {result.accuracy:.1%} ± {result.std:.1%}")
    for true, predicted in zip(*np.nonzero(counts), strict=True):
        color = "white" if shares[true, predicted] > 0.5 else "black"
        axes.text(predicted, true, counts[true, predicted], ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    with atomic_write(paths[2]) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return paths
