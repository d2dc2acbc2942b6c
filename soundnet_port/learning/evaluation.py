"""Evaluate a network's features with linear classifiers on labeled sounds, fold by fold.

Three protocols. "paper" and "paper-dcase" do what the original's eval_esc50.lua and eval_dcase.lua do:

    samples at +-512, twice what the network was trained on
    "paper": repeated to at least 11 s and cut at 10 s; "paper-dcase": the full sound
    windows of 1/10 ("paper") or 1/6 ("paper-dcase") of the layer's frames, rounded up, stepped by one frame
    each window, flattened, is an example: liblinear -s 1 -c 0.01 -B 1
    a sound's decision values are the mean over its windows'

"modern" is what does best with a linear classifier: three layers together, each pooled over time by mean,
max and std, of the sound at two speeds and three levels (see `ModernFeatures`), and ridge regression whose
penalty is chosen within the training folds (see `fit_pooled_classifier`). It leaves out edge frames
(docs/edge-frames.md), which the original's include. In all of them a fold's classifier sees nothing of the
fold's test sounds.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from soundnet_port.audio.finding import Failure
from soundnet_port.audio.loading import DECODERS
from soundnet_port.errors import require
from soundnet_port.inference.pooling import POOLINGS
from soundnet_port.learning.classifiers import (
    FOLDS,
    PAPER_C,
    compute_decision_values,
    fit_pooled_classifier,
    fit_window_svm,
    make_windows,
)
from soundnet_port.learning.datasets import read_labeled
from soundnet_port.learning.errors import EvaluationError
from soundnet_port.learning.evaluation_results import EvaluationResult, FoldResult, SoundPrediction
from soundnet_port.learning.feature_cache import Values, open_cache
from soundnet_port.learning.labeled_sounds import LabeledSounds, Split
from soundnet_port.learning.protocol_features import (
    PAPER_SECONDS,
    FeatureExtractor,
    ModernFeatures,
    PaperFeatures,
    extract_features,
    modern_layers,
)
from soundnet_port.network.model import SoundNet
from soundnet_port.pretrained import load_pretrained
from soundnet_port.progress import ProgressCallback

PROTOCOLS = ("modern", "paper", "paper-dcase")
_WINDOW_SHARE = {"paper": 1 / 10, "paper-dcase": 5 / 30}  # of the frames


def evaluate(
    model: SoundNet | str | os.PathLike[str],
    source: LabeledSounds | str | os.PathLike[str],
    *,
    layers: Sequence[str | int] | None = None,
    protocol: str = "modern",
    pool: str = "mean+max+std",
    resample: bool = True,
    edge_frames: bool = False,
    decoder: str = "auto",
    cache: str | os.PathLike[str] | bool = True,
    progress: ProgressCallback | None = None,
) -> EvaluationResult:
    """Measure the accuracy of linear classifiers on a layer's features, fold by fold.

    Args:
        model: a SoundNet, or weights as for `load_pretrained`.
        source: labeled sounds, or what `read_labeled` reads. Without folds, five stratified ones are
            made, always the same.
        layers: names, or Torch7's module numbers; by default conv4, pool5 and conv6 (with 5 layers pool2,
            pool3 and conv4). The paper's protocols take one, by default pool5 (conv4).
        protocol: "modern", or "paper" (eval_esc50.lua) or "paper-dcase" (eval_dcase.lua), see
            `soundnet_port.learning.evaluation`.
        pool: over time, for "modern": "mean", "max", "mean+std" or "mean+max+std".
        resample: to 22,050 Hz, which the network was trained on. Without it, sounds at 44,100 Hz
            come at half their speed and pitch, as in the original's scripts, which never resample;
            10 s are then counted at the file's own rate, as there. Not for "modern".
        edge_frames: for "modern", pool over edge frames, too (see `SoundNet.edge_frames`). The others
            include all frames, as the original does.
        decoder: of sound files, see `load_audio`.
        cache: folder that keeps features for evaluations with the same sounds and network; True is a
            folder in the user's cache, False none. It holds up to 2 GB, or `SOUNDNET_CACHE_SIZE` GB;
            beyond that the least recently used features are removed.
        progress: called after every sound, with a message if it cannot be used.

    Raises:
        EvaluationError: an unknown layer, protocol or pooling; folds without training or test sounds.
        LabeledSoundsError: the source cannot be used.
        WeightsError: no such weights.
        MissingExtraError: the extra `[learn]` is not installed.
    """
    require("matplotlib", "learn")  # `write_evaluation` needs it, after all the work
    require("sklearn", "learn")
    for setting, value, choices in (
        ("protocol", protocol, PROTOCOLS),
        ("pooling", pool, POOLINGS),
        ("decoder", decoder, DECODERS),
    ):
        if value not in choices:
            raise EvaluationError(f"unknown {setting} {value!r}; choose from {', '.join(choices)}")
    if isinstance(layers, (str, int)):
        raise EvaluationError(f"layers must be a list, such as [{layers!r}]")
    if layers is not None and not (len(layers) == 1 or (layers and protocol == "modern")):
        raise EvaluationError(f"layers: {protocol} takes one layer, not {len(layers)}")
    if protocol == "modern" and not resample:
        raise EvaluationError("modern always resamples; use one of the paper's protocols")
    labeled = source if isinstance(source, LabeledSounds) else read_labeled(source)
    if not isinstance(model, SoundNet):
        model = load_pretrained(model)
    feature_cache = open_cache(cache, model)
    try:
        extractor = _create_extractor(
            model,
            layers,
            protocol,
            pool,
            resample,
            edge_frames=edge_frames,
            decoder=decoder,
            cache=feature_cache,
        )
    except ValueError as error:
        raise EvaluationError(f"layers: {error}") from None
    features, failures, notes = _compute_features(extractor, labeled, progress)
    splits, split_notes = _split(labeled)
    folds, predictions = [], []
    for split in splits:
        fold, fold_predictions, fold_notes = _evaluate_fold(labeled, split, features, extractor)
        folds.append(fold)
        predictions += fold_predictions
        split_notes += fold_notes
    return EvaluationResult(
        protocol,
        extractor.keys,
        pool if protocol == "modern" else None,
        resample,
        extractor.edge_frames and extractor.has_edge_frames,
        labeled.classes,
        tuple(folds),
        tuple(predictions),
        tuple(failures),
        tuple(notes + split_notes),
    )


def _create_extractor(
    model: SoundNet,
    layers: Sequence[str | int] | None,
    protocol: str,
    pool: str,
    resample: bool,
    *,
    edge_frames: bool,
    **settings: Any,
) -> FeatureExtractor:
    if protocol == "modern":
        keys = modern_layers(model.architecture) if layers is None else layers
        return ModernFeatures(model, keys, pool, edge_frames=edge_frames, **settings)
    (key,) = [model.architecture.default_layer] if layers is None else layers
    return PaperFeatures(model, key, protocol, resample=resample, **settings)


def _compute_features(
    extractor: FeatureExtractor, labeled: LabeledSounds, progress: ProgressCallback | None
) -> tuple[list[Values | None], list[Failure], list[str]]:
    """Return the features of each sound (None if it cannot be used), failures and notes."""
    paths = [sound.path for sound in labeled.sounds]
    features, seconds, failures = extract_features(extractor, paths, progress)
    if len(failures) == len(features):
        raise EvaluationError(f"none of the {len(features):,} sounds can be used; the first: {failures[0]}")
    notes = []
    longer = sum(length > PAPER_SECONDS for length in seconds)
    if longer and isinstance(extractor, PaperFeatures) and extractor.protocol == "paper":
        notes.append(f"{longer:,} sounds are cut at 10 s; paper-dcase uses them in full")
    if extractor.cache and extractor.cache.write_error:
        notes.append(f"features are not cached: {extractor.cache.write_error}")
    return features, failures, notes


def _split(labeled: LabeledSounds) -> tuple[Sequence[Split], list[str]]:
    """Return the data set's splits, or stratified ones with a note."""
    from sklearn.model_selection import StratifiedKFold

    if labeled.splits:
        return labeled.splits, []
    smallest = min(labeled.targets.count(target) for target in range(len(labeled.classes)))
    if smallest < 2:
        raise EvaluationError("no folds, and a class with a single sound; add sounds or folds")
    count = min(FOLDS, smallest)
    order = sorted(range(len(labeled.sounds)), key=lambda index: labeled.sounds[index].path)
    folding = StratifiedKFold(count, shuffle=True, random_state=0)
    parts = folding.split(order, [labeled.targets[index] for index in order])
    return [
        Split(str(fold), tuple(order[i] for i in train), tuple(order[i] for i in test))
        for fold, (train, test) in enumerate(parts, 1)
    ], [
        f"the data set has no folds; {count} stratified ones were made, always the same. Parts of one "
        "recording in both training and test set inflate the figures"
    ]


def _evaluate_fold(
    labeled: LabeledSounds, split: Split, features: Sequence[Values | None], extractor: FeatureExtractor
) -> tuple[FoldResult, list[SoundPrediction], list[str]]:
    """Fit a classifier on a fold's training sounds, and classify its test sounds."""
    train = {index: values for index in split.train if (values := features[index]) is not None}
    test = {index: values for index in split.test if (values := features[index]) is not None}
    if not test:
        raise EvaluationError(f"fold {split.fold}: no test sounds")
    unknown = {labeled.targets[index] for index in test} - {labeled.targets[index] for index in train}
    if unknown or not train:
        names = ", ".join(labeled.classes[target] for target in sorted(unknown))
        raise EvaluationError(f"fold {split.fold}: no training sounds of {names}")
    targets = np.array([labeled.targets[index] for index in train])
    if len(set(targets.tolist())) < 2:
        raise EvaluationError(f"fold {split.fold}: all training sounds are {labeled.classes[targets[0]]}")
    examples = list(train.values())
    decisions = np.full((len(test), len(labeled.classes)), -np.inf)
    notes = []
    if isinstance(extractor, ModernFeatures):
        groups = [labeled.sounds[index].fold for index in train]
        present, positions = np.unique(targets, return_inverse=True)
        pooled = fit_pooled_classifier(np.stack(examples), extractor.sizes, positions, groups, split.fold)
        decisions[:, present] = pooled.decide(np.stack(list(test.values())))
        regularization = pooled.alpha
    else:
        assert isinstance(extractor, PaperFeatures)
        window = math.ceil(_WINDOW_SHARE[extractor.protocol] * len(examples[0]))
        for index, frames in (train | test).items():
            if len(frames) < window:
                path = labeled.sounds[index].path
                raise EvaluationError(f"{path}: too short, {len(frames)} frames; a window has {window}")
        classifier, converged = fit_window_svm(examples, targets, window)
        notes = [] if converged else [f"fold {split.fold}: the SVM stopped at liblinear's 1,000 iterations"]
        for row, values in zip(decisions, test.values(), strict=True):
            row[classifier.classes_] = compute_decision_values(classifier, make_windows(values, window)).mean(
                0
            )
        regularization = PAPER_C
    predictions = [
        SoundPrediction(
            labeled.sounds[index], split.fold, labeled.classes[int(row.argmax())], tuple(row.tolist())
        )
        for index, row in zip(test, decisions, strict=True)
    ]
    correct = sum(prediction.predicted == prediction.sound.label for prediction in predictions)
    fold = FoldResult(split.fold, len(train), len(test), correct / len(test), regularization)
    return fold, predictions, notes
