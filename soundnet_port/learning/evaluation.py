"""How well a network's features tell classes apart: linear classifiers on labelled sounds, fold by fold.

Three protocols. "paper" and "paper-dcase" do what the original's eval_esc50.lua and eval_dcase.lua do:

    samples at +-512, twice what the network was trained on
    "paper": repeated to at least 11 s and cut at 10 s; "paper-dcase": the whole sound
    windows of 1/10 ("paper") or 1/6 ("paper-dcase") of the layer's frames, rounded up, stepped by one frame
    each window, flattened, is an example: liblinear -s 1 -c 0.01 -B 1
    a sound's decision values are the mean over its windows'

"modern" is what one would do today: samples at +-256, one pooled vector per sound, standardised, a linear
SVM whose C is chosen within the training folds. It leaves out edge frames (docs/edge-frames.md), which the
original's take in. In all of them a fold's classifier sees nothing of the fold's test sounds.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import warnings
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import torch
from numpy.typing import NDArray

from soundnet_port.audio.finding import Failure
from soundnet_port.audio.loading import DECODERS, read_sound
from soundnet_port.errors import MissingExtraError, SoundNetError
from soundnet_port.files import atomic_write
from soundnet_port.inference.activations import compute_activations
from soundnet_port.inference.pooling import POOLINGS
from soundnet_port.learning.datasets import LabeledSound, LabeledSounds, Split, read_labeled
from soundnet_port.network.architecture import SAMPLE_RATE, Layer
from soundnet_port.network.model import SoundNet
from soundnet_port.network.weights import checksum, cpu_state_dict
from soundnet_port.pretrained import load_pretrained
from soundnet_port.version import __version__

PROTOCOLS = ("modern", "paper", "paper-dcase")
FOLDS = 5  # where a data set has none, and inside training sets that have none
CHOICES_OF_C = (1e-4, 1e-3, 1e-2, 1e-1)  # "modern"
PAPER_C = 0.01
_PAPER_SCALE = 2  # the scripts multiply by 2^-22 what the network is given times 2^-23
_PAPER_SECONDS = 10  # "paper": a clip is cut there,
_PAPER_REPEATED = 11  # after it was repeated to at least this
_PAPER_WINDOW = {"paper": 1 / 10, "paper-dcase": 5 / 30}  # of the frames

Values = NDArray[np.float32]
Decisions = NDArray[np.float64]


class EvaluationError(SoundNetError):
    """An evaluation that cannot be done: why."""


@dataclass(frozen=True)
class Fold:
    """What came of a fold.

    Attributes:
        name: of the fold.
        train: sounds that were learnt from.
        test: sounds that were tested.
        accuracy: share of the test sounds whose class was named.
        c: the SVM's C; for "modern" the one that was chosen.
    """

    name: str
    train: int
    test: int
    accuracy: float
    c: float


@dataclass(frozen=True)
class Answer:
    """A test sound and the class that was named.

    Attributes:
        sound: its file and its true class.
        fold: in whose test it was.
        predicted: the class with the highest decision value.
        decisions: (classes,), the decision value of each class.
    """

    sound: LabeledSound
    fold: str
    predicted: str
    decisions: tuple[float, ...]


@dataclass(frozen=True)
class EvaluationResult:
    """What came of an evaluation.

    Attributes:
        protocol: "modern", "paper" or "paper-dcase".
        layer: name or module number.
        pool: of "modern"; None for the others.
        resampled: whether sounds were resampled to 22,050 Hz.
        edge_frames: whether the features hold edge frames (see `SoundNet.edge_frames`); most layers
            have none.
        classes: in the order of decision values and of `confusion`.
        folds: results of each.
        answers: for each test sound of each fold.
        failures: sounds that could not be used; they are in no fold.
        notes: what one should know about the figures.
    """

    protocol: str
    layer: str | int
    pool: str | None
    resampled: bool
    edge_frames: bool
    classes: tuple[str, ...]
    folds: tuple[Fold, ...]
    answers: tuple[Answer, ...]
    failures: tuple[Failure, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Layer and protocol, such as "pool5, modern", and "with edge frames" where there are any."""
        edges = ", with edge frames" if self.edge_frames else ""
        return f"{self.layer}, {self.protocol}{edges}"

    @property
    def accuracies(self) -> tuple[float, ...]:
        """Of each fold."""
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
        """How often which class was taken for which, (true classes, predicted classes)."""
        index = {label: number for number, label in enumerate(self.classes)}
        counts = np.zeros((len(index), len(index)), np.int64)
        for answer in self.answers:
            counts[index[answer.sound.label], index[answer.predicted]] += 1
        return counts

    def to_dict(self) -> dict[str, Any]:
        """All but the decision values, ready for JSON."""
        return {
            "protocol": self.protocol,
            "layer": self.layer,
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
                    "fold": answer.fold,
                    "file": str(answer.sound.path),
                    "label": answer.sound.label,
                    "predicted": answer.predicted,
                }
                for answer in self.answers
            ],
            "failures": [vars(failure) for failure in self.failures],
            "notes": list(self.notes),
        }


def evaluate(
    model: SoundNet | str | os.PathLike[str],
    source: LabeledSounds | str | os.PathLike[str],
    *,
    layer: str | int | None = None,
    protocol: str = "modern",
    pool: str = "mean+std",
    resample: bool = True,
    edge_frames: bool = False,
    decoder: str = "auto",
    cache: str | os.PathLike[str] | bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> EvaluationResult:
    """Accuracy of linear classifiers on a layer's features, fold by fold.

    Args:
        model: a SoundNet, or weights as for `load_pretrained`.
        source: labelled sounds, or what `read_labeled` reads. Without folds, five are made, with
            as many sounds of each class, the same ones every time.
        layer: name, or Torch7's module number; by default the paper's choice, pool5, or with 5
            layers conv4, which has as many channels and frames.
        protocol: "modern", or "paper" (eval_esc50.lua) or "paper-dcase" (eval_dcase.lua), see
            `soundnet_port.learning.evaluation`.
        pool: over time, of "modern": "mean", "max" or "mean+std".
        resample: to 22,050 Hz, which the network was trained on. Without it, sounds at 44,100 Hz
            come at half their speed and pitch, as in the original's scripts, which never resample;
            10 s are then counted at the file's own rate, as there. Not for "modern".
        edge_frames: of "modern", pool over edge frames, too (see `SoundNet.edge_frames`). The others
            take in all frames, as the original does.
        decoder: of sound files, see `load_audio`.
        cache: folder in which features are kept, for evaluations with the same sounds and network;
            True is a folder in the user's cache, False none.
        progress: called with the number of sounds that are through and of all.

    Raises:
        EvaluationError: an unknown layer, protocol or pooling; folds that cannot be learnt from;
            the extra `[learn]` is not installed.
        LabelledError: the source cannot be used.
        WeightsError: no such weights.
    """
    try:
        import matplotlib  # noqa: F401  (what `write_evaluation` needs, after all the work)
        import sklearn  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(str(error.name), "learn") from None
    for what, value, choices in (
        ("protocol", protocol, PROTOCOLS),
        ("pooling", pool, POOLINGS),
        ("decoder", decoder, DECODERS),
    ):
        if value not in choices:
            raise EvaluationError(f"unknown {what} {value!r}; choose from {', '.join(choices)}")
    if protocol == "modern" and not resample:
        raise EvaluationError("sounds as they are, not resampled, are for the paper's protocols")
    labelled = source if isinstance(source, LabeledSounds) else read_labeled(source)
    if not isinstance(model, SoundNet):
        model = load_pretrained(model)
    key = layer if layer is not None else model.architecture.default_layer
    try:
        asked = model.architecture.layer(key)
    except ValueError as error:
        raise EvaluationError(f"layer: {error}") from None
    listening = Listening(
        model,
        key,
        asked,
        protocol,
        None if protocol != "modern" else pool,
        resample,
        decoder,
        cache_folder(cache),
        edge_frames,
    )
    values: list[Values | None] = []
    failures, notes, longer = [], [], 0
    for number, sound in enumerate(labelled.sounds, 1):
        try:
            made, seconds = listening.to(sound.path)
            values.append(made)
            longer += protocol == "paper" and seconds > _PAPER_SECONDS
        except Exception as error:  # decoders may raise anything; one file must not end it all
            text = " ".join(str(error).split("\n")[0].removeprefix(f"{sound.path}: ").split())
            failures.append(Failure(str(sound.path), text or type(error).__name__))
            values.append(None)
        if progress:
            progress(number, len(labelled.sounds))
    if len(failures) == len(values):
        raise EvaluationError(f"none of the {len(values):,} sounds can be used; the first: {failures[0]}")
    if longer:
        notes.append(f"{longer:,} sounds are longer than 10 s, cut there; paper-dcase takes them whole")
    if listening.trouble:
        notes.append(f"features are not kept: {listening.trouble}")
    splits, more = _splits(labelled)
    folds, answers = [], []
    for split in splits:
        fold, answered, said = _evaluated(labelled, split, values, protocol)
        folds.append(fold)
        answers += answered
        more += said
    return EvaluationResult(
        protocol,
        key,
        listening.pool,
        resample,
        listening.edge_frames and listening.can_have_edge_frames,
        labelled.classes,
        tuple(folds),
        tuple(answers),
        tuple(failures),
        tuple(notes + more),
    )


# ---- folds


def _splits(labelled: LabeledSounds) -> tuple[Sequence[Split], list[str]]:
    """The data set's, or some that are made, with a note."""
    from sklearn.model_selection import StratifiedKFold

    if labelled.splits:
        return labelled.splits, []
    fewest = min(labelled.targets.count(target) for target in range(len(labelled.classes)))
    if fewest < 2:
        raise EvaluationError("there are no folds, and a class with a single sound; none can be made")
    count = min(FOLDS, fewest)
    order = sorted(range(len(labelled.sounds)), key=lambda number: labelled.sounds[number].path)
    folding = StratifiedKFold(count, shuffle=True, random_state=0)
    made = folding.split(order, [labelled.targets[number] for number in order])
    return [
        Split(str(fold), tuple(order[i] for i in train), tuple(order[i] for i in test))
        for fold, (train, test) in enumerate(made, 1)
    ], [
        f"the data set has no folds; {count} were made, the same ones every time. Parts of one recording "
        "in training and test make figures too good"
    ]


def _evaluated(
    labelled: LabeledSounds, split: Split, values: Sequence[Values | None], protocol: str
) -> tuple[Fold, list[Answer], list[str]]:
    """A fold: learns from its training sounds, then looks at the others."""
    train = [number for number in split.train if values[number] is not None]
    test = [number for number in split.test if values[number] is not None]
    if not test:
        raise EvaluationError(f"fold {split.fold}: no test sounds")
    unknown = {labelled.targets[number] for number in test} - {labelled.targets[number] for number in train}
    if unknown or not train:
        names = ", ".join(labelled.classes[target] for target in sorted(unknown))
        raise EvaluationError(f"fold {split.fold}: no training sounds of {names}")
    targets = np.array([labelled.targets[number] for number in train])
    if len(set(targets.tolist())) < 2:
        raise EvaluationError(f"fold {split.fold}: all training sounds are {labelled.classes[targets[0]]}")
    examples = [each for number in train if (each := values[number]) is not None]
    if protocol == "modern":
        groups = [labelled.sounds[number].fold for number in train]
        classifier, c = learn_pooled(np.stack(examples), targets, groups, split.fold)
        window, notes = 0, []
    else:
        window = math.ceil(_PAPER_WINDOW[protocol] * len(examples[0]))
        for number in train + test:
            if (each := values[number]) is not None and len(each) < window:
                path = labelled.sounds[number].path
                raise EvaluationError(f"{path}: {len(each)} frames, and a window has {window}; too short")
        classifier, converged = learn_windows(examples, targets, window)
        c = PAPER_C
        notes = [] if converged else [f"fold {split.fold}: the SVM stopped at liblinear's 1,000 iterations"]
    answers = []
    for number in test:
        each = values[number]
        assert each is not None
        seen = each[None] if protocol == "modern" else windows(each, window)
        found = decisions(classifier, seen).mean(0)
        whole = np.full(len(labelled.classes), -np.inf)
        whole[classifier.classes_] = found
        answers.append(
            Answer(
                labelled.sounds[number],
                split.fold,
                labelled.classes[int(whole.argmax())],
                tuple(whole.tolist()),
            )
        )
    right = sum(answer.predicted == answer.sound.label for answer in answers)
    return Fold(split.fold, len(train), len(test), right / len(test), c), answers, notes


# ---- classifiers


def learn_pooled(
    features: Values, targets: NDArray[Any], groups: Sequence[str], fold: str
) -> tuple[Any, float]:
    """A linear SVM on standardised vectors, and the C that was best inside these training sounds.

    Inside, each fold's sounds in turn are tested, by the others. Where the training sounds are not of
    several folds that all leave every class, five stratified ones are made.

    Shape:
        features: (sounds, channels); targets: (sounds,); groups: the fold of each sound
    """
    from sklearn.model_selection import StratifiedKFold

    names = sorted(set(groups))
    inner = [(np.array(groups) != name, np.array(groups) == name) for name in names]
    everything = set(targets.tolist())
    if len(names) < 2 or any(set(targets[learnt].tolist()) != everything for learnt, _ in inner):
        fewest = int(np.bincount(targets)[list(everything)].min())
        if fewest < 2:
            raise EvaluationError(f"fold {fold}: a class with a single training sound; C cannot be chosen")
        folding = StratifiedKFold(min(FOLDS, fewest), shuffle=True, random_state=0)
        inner = list(folding.split(features, targets))
    right = dict.fromkeys(CHOICES_OF_C, 0)
    for c in CHOICES_OF_C:
        for learnt, tested in inner:
            named = _pooled_svm(c).fit(features[learnt], targets[learnt]).predict(features[tested])
            right[c] += int((named == targets[tested]).sum())
    best = max(CHOICES_OF_C, key=lambda c: right[c])  # of equal ones the smallest: most regularised
    return _pooled_svm(best).fit(features, targets), best


def _pooled_svm(c: float) -> Any:
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC

    # solved in the primal: no random order, and to the end
    return make_pipeline(StandardScaler(), LinearSVC(C=c, dual=False, max_iter=10_000))


def learn_windows(examples: Sequence[Values], targets: NDArray[Any], window: int) -> tuple[Any, bool]:
    """The original's SVM on all windows of these sounds, and whether it converged.

    scikit-learn's LinearSVC is liblinear: this is `-s 1 -c 0.01 -B 1`, L2-regularised, squared hinge
    loss, solved in the dual, one class against the rest, with the bias a regularised weight of a constant
    1, to liblinear's default tolerance of 0.1 or 1,000 iterations. Its random order, and with that the
    last digits allowed by the tolerance, are not the original's.

    Shape:
        examples: (frames, channels) each; targets: (sounds,)
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.svm import LinearSVC

    parts = [windows(each, window) for each in examples]
    classifier = LinearSVC(C=PAPER_C, dual=True, intercept_scaling=1, tol=0.1, max_iter=1000, random_state=0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        classifier.fit(np.concatenate(parts), np.repeat(targets, [len(part) for part in parts]))
    return classifier, not any(issubclass(each.category, ConvergenceWarning) for each in said)


def windows(frames: Values, window: int) -> Values:
    """Every stretch of so many frames, flattened with a channel's frames side by side.

    The original gave its SVM only what was above 0; other values, of layers before a ReLU, count as 0.

    Shape:
        frames: (frames, channels); returns (frames - window + 1, channels * window)
    """
    views = np.lib.stride_tricks.sliding_window_view(frames, window, axis=0)
    return np.maximum(views.reshape(len(views), -1), 0)


def decisions(classifier: Any, examples: Values) -> Decisions:
    """(examples, classes) decision values; with two classes scikit-learn has just the second one's."""
    found: Decisions = classifier.decision_function(examples)
    return found if found.ndim == 2 else np.stack([-found, found], axis=1)


# ---- features, and keeping them


def cache_folder(cache: str | os.PathLike[str] | bool) -> Path | None:
    """Where features are kept: True is a folder in the user's cache, False (None) nowhere."""
    if isinstance(cache, bool):
        folder = platformdirs.user_cache_path("soundnet-port", appauthor=False) / "evaluate"
        return folder if cache else None
    return Path(cache).expanduser()


class Listening:
    """Features of sounds as a protocol wants them, computed or as they were kept."""

    def __init__(
        self,
        model: SoundNet,
        key: str | int,
        layer: Layer,
        protocol: str,
        pool: str | None,
        resample: bool,
        decoder: str,
        folder: Path | None,
        edge_frames: bool = False,
    ) -> None:
        self.model, self.key, self.layer, self.protocol, self.pool = model, key, layer, protocol, pool
        self.resample, self.decoder, self.folder = resample, decoder, folder
        self.edge_frames = edge_frames or protocol != "modern"
        self.can_have_edge_frames = model.architecture.has_edge_frames(layer)
        self.trouble = ""

    @cached_property
    def settings(self) -> bytes:
        """All that features depend on, beside the sound."""
        settings = {
            "version": __version__,
            "weights": checksum(cpu_state_dict(self.model, torch.float32)),
            "dtype": str(next(self.model.parameters()).dtype),
            "layer": self.layer.name if self.layer.is_layer else self.layer.module,
            "protocol": self.protocol,
            "pool": self.pool,
            "resample": self.resample,
            "decoder": self.decoder,
        }
        if self.can_have_edge_frames and not self.edge_frames:  # entries of all else stay valid
            settings["edge_frames"] = False
        return json.dumps(settings).encode()

    def to(self, sound: Path | Values) -> tuple[Values, float]:
        """A sound's features, (frames, channels) or (channels,) if pooled, and its seconds.

        Args:
            sound: a file; or, with "modern", a waveform (samples,) at 22,050 Hz within +-256.

        Raises:
            AudioError, ValueError, OSError: the sound cannot be used.
        """
        entry = None
        if self.folder is not None:
            digest = hashlib.sha256()
            if isinstance(sound, Path):
                with open(sound, "rb") as file:
                    while piece := file.read(1 << 20):
                        digest.update(piece)
            else:
                digest.update(b"samples")
                digest.update(np.ascontiguousarray(sound).data)
            digest.update(self.settings)
            entry = self.folder / digest.hexdigest()[:2] / f"{digest.hexdigest()}.npz"
            kept = _kept(entry)
            if kept is not None:
                return kept
        made, seconds = self._computed(sound)
        if entry is not None and not self.trouble:
            aside = entry.with_name(f".{secrets.token_hex(4)}.part")
            try:
                entry.parent.mkdir(parents=True, exist_ok=True)
                with open(aside, "wb") as out:  # not synchronised: what a crash damages is made again
                    np.savez(out, features=made, seconds=np.float64(seconds))
                os.replace(aside, entry)
            except OSError as error:
                self.trouble = f"{error.filename or entry}: {error.strerror or error}"
                with suppress(OSError):
                    aside.unlink()
        return made, seconds

    def _computed(self, sound: Path | Values) -> tuple[Values, float]:
        if self.protocol == "modern":
            given = sound if isinstance(sound, Path) else torch.tensor(sound)  # a copy: it may be read-only
            found = compute_activations(
                self.model,
                given,
                [self.key],
                decoder=self.decoder,
                pool=self.pool or "none",
                edge_frames=self.edge_frames,
            )
            return found.activations[self.key].numpy(), found.samples / SAMPLE_RATE
        assert isinstance(sound, Path)
        read = read_sound(sound, sample_rate=SAMPLE_RATE if self.resample else None, decoder=self.decoder)
        wave, rate = read.waveform, read.sample_rate
        seconds = len(wave) / rate
        if self.protocol == "paper":
            wave = wave.repeat(math.ceil(_PAPER_REPEATED * rate / len(wave)))[: _PAPER_SECONDS * rate]
        found = compute_activations(self.model, wave * _PAPER_SCALE, [self.key])
        return found.activations[self.key].numpy(), seconds


def _kept(entry: Path) -> tuple[Values, float] | None:
    """What is in the cache; None if there is nothing, or something damaged (zip files have checksums)."""
    try:
        with open(entry, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            made, seconds = file["features"], float(file["seconds"])
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile):
        return None
    return made, seconds


# ---- to look at


def table(evaluation: EvaluationResult) -> str:
    """The confusion matrix as text: a row per true class, a column per predicted one."""
    counts = evaluation.confusion
    width = max(3, len(str(counts.max())) + 1, len(str(len(counts))) + 1)
    longest = min(24, max(map(len, evaluation.classes)))
    lines = [" " * (longest + 4) + "".join(f"{number:{width}}" for number in range(1, len(counts) + 1))]
    for number, (label, row) in enumerate(zip(evaluation.classes, counts, strict=True), 1):
        cells = "".join(f"{count or '.':>{width}}" for count in row)
        right = f"{row[number - 1] / row.sum():7.1%}" if row.sum() else ""
        lines.append(f"{number:3} {label[:longest]:{longest}}{cells}{right}")
    return "\n".join(lines)


def write_evaluation(evaluation: EvaluationResult, folder: str | os.PathLike[str]) -> list[Path]:
    """Writes evaluation.json, predictions.tsv (with decision values) and confusion.png.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OSError: they cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "learn") from None

    folder = Path(folder)
    paths = [folder / name for name in ("evaluation.json", "predictions.tsv", "confusion.png")]
    with atomic_write(paths[0]) as aside:
        aside.write_text(json.dumps(evaluation.to_dict(), indent=1) + "\n", "utf-8")
    with atomic_write(paths[1]) as aside, open(aside, "wb") as out:
        header = ["fold", "file", "label", "predicted", *evaluation.classes]
        out.write(("\t".join(header) + "\n").encode())
        for answer in evaluation.answers:
            values = [f"{value:.6g}" for value in answer.decisions]
            row = [answer.fold, os.fspath(answer.sound.path), answer.sound.label, answer.predicted, *values]
            out.write(os.fsencode("\t".join(row) + "\n"))
    counts, count = evaluation.confusion, len(evaluation.classes)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = 3 + 0.32 * count
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(count), evaluation.classes, rotation=90)
    axes.set_yticks(range(count), evaluation.classes)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(f"{evaluation.title}: {evaluation.accuracy:.1%} ± {evaluation.std:.1%}")
    for true, predicted in zip(*np.nonzero(counts), strict=True):
        colour = "white" if shares[true, predicted] > 0.5 else "black"
        axes.text(
            predicted, true, counts[true, predicted], ha="center", va="center", color=colour, fontsize=8
        )
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    with atomic_write(paths[2]) as aside:
        figure.savefig(aside, format="png", dpi=120)
    return paths
