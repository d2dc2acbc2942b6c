"""Fine-tuning without training: evaluate's linear classifier, written as weights with a pooled head.

The trunk stays as it is, so its features are computed once, through evaluate's cache, and the classifier is
fitted in seconds. On ESC-10, training the trunk further from there, by gradient descent on augmented sounds,
gained nothing (docs/finetune.md).
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soundnet_port.errors import require
from soundnet_port.inference.classification import POOL, compute_logits
from soundnet_port.inference.prediction import predict
from soundnet_port.learning.classifiers import PooledClassifier, fit_pooled_classifier, take_root
from soundnet_port.learning.errors import TrainingError
from soundnet_port.learning.feature_cache import FeatureCache, Values
from soundnet_port.learning.finetune_run import FinetuneResult, FinetuneRun, write_result
from soundnet_port.learning.protocol_features import ModernFeatures, extract_features, modern_layers
from soundnet_port.learning.run_files import WEIGHTS, write_trained_weights
from soundnet_port.network.architecture import CLASSES
from soundnet_port.network.model import SoundNet
from soundnet_port.network.weights import build_model
from soundnet_port.progress import Progress, ProgressCallback

_SHARPEST = 100.0  # factor of the logits


def fit_pooled_head(
    run: FinetuneRun, cache: FeatureCache | None, progress: ProgressCallback | None
) -> FinetuneResult:
    """Fit a pooled head to a run's training sounds, and write the run's files.

    Args:
        run: whose model is the network that gives the features.
        cache: of features, shared with `evaluate`.
        progress: called after every sound, with a message if it cannot be used.

    Raises:
        TrainingError: a class with fewer than two training sounds that can be read.
        MissingExtraError: the extra `[learn]` is not installed.
    """
    require("sklearn", "learn")
    started, data = time.monotonic(), run.data
    extractor = ModernFeatures(run.model, modern_layers(run.model.architecture), POOL, cache=cache)
    used = sorted({*run.train, *run.test})
    paths = [data.sounds[index].path for index in used]
    values, lengths, failures = extract_features(extractor, paths, progress)
    features = {index: value for index, value in zip(used, values, strict=True) if value is not None}
    seconds = dict(zip(used, lengths, strict=True))
    train, test = (tuple(index for index in part if index in features) for part in (run.train, run.test))
    targets = np.array([data.targets[index] for index in train])
    counts = np.bincount(targets, minlength=len(data.classes))
    if counts.min() < 2:
        few = [name for name, count in zip(data.classes, counts, strict=True) if count < 2]
        raise TrainingError(f"fewer than two training sounds of {', '.join(few)}")
    rows = np.stack([features[index] for index in train])
    groups = [data.sounds[index].fold for index in train]
    if progress:
        progress(Progress(0, 1, "fit", note=f"{len(train):,} sounds"))
    classifier = fit_pooled_classifier(rows, extractor.sizes, targets, groups, run.fold)
    factor = _fit_temperature(classifier, rows, targets)
    longest = max(seconds[index] for index in train)
    model = build_pooled_model(run.model, classifier, extractor, data.classes, longest, factor)
    training = run.settings | {"alpha": classifier.alpha}
    run.folder.mkdir(parents=True, exist_ok=True)
    write_trained_weights(run.folder / WEIGHTS, model, training)
    accuracy, predictions = None, []
    for index in test:
        if seconds[index] <= longest:
            winner = int(compute_logits(model, torch.from_numpy(features[index])).argmax())
            label = data.classes[winner]
        else:  # in windows, which are not in the cache
            label = predict(model, data.sounds[index].path, top=1).classes[0].label
        predictions.append((str(data.sounds[index].path), data.sounds[index].label, label))
    if predictions:
        accuracy = float(np.mean([label == predicted for _, label, predicted in predictions]))
    if progress:
        progress(Progress(1, 1, "fit"))
    unreadable = {str(failure.path): str(failure) for failure in failures}
    return write_result(run, 0, accuracy, predictions, unreadable, time.monotonic() - started)


def build_pooled_model(
    model: SoundNet,
    classifier: PooledClassifier,
    extractor: ModernFeatures,
    classes: Sequence[str],
    seconds: float,
    factor: float = 1.0,
) -> SoundNet:
    """Build a network with a classifier's decision values, times a factor, as its pooled head's logits.

    Args:
        model: that the features are of.
        classifier: fitted to them.
        extractor: of the features.
        classes: their names, in the classifier's order.
        seconds: length of the longest sound that it was fitted to.
        factor: of the decision values, for a softmax.
    """
    layers = [layer.name for layer in extractor.layers]
    architecture = model.architecture.with_pooled_head(len(classes), layers, seconds)
    weight = (classifier.weight / classifier.scale[:, None]).T
    bias = classifier.intercept - weight @ classifier.mean
    state: dict[str, Tensor] = {
        name: tensor.detach().float().cpu()
        for name, tensor in model.state_dict().items()
        if name in architecture.state_shapes() and not name.startswith(f"{CLASSES}.")
    }
    state[f"{CLASSES}.weight"] = torch.from_numpy(factor * weight).float()
    state[f"{CLASSES}.bias"] = torch.from_numpy(factor * bias).float()
    return build_model(architecture, state, {CLASSES: classes})


def _fit_temperature(classifier: PooledClassifier, features: Values, targets: NDArray[np.int64]) -> float:
    """Return the factor of decision values whose softmax predicts left-out sounds best (least cross entropy).

    Ridge regression has its leave-one-out decision values in closed form: with the hat matrix H, a sound's
    residuals r at all its levels become (1 - H_ss)^-1 r_s. Mean and scale of the features are kept.
    """
    sounds, levels, _ = features.shape
    rows = (take_root(features) - classifier.mean) / classifier.scale
    rows = rows.reshape(sounds * levels, -1)
    gram = rows @ rows.T
    hat = np.linalg.solve(gram + classifier.alpha * np.eye(len(gram)), gram)
    signs = np.where(np.repeat(targets, levels)[:, None] == np.arange(len(classifier.intercept)), 1.0, -1.0)
    residuals = (signs - classifier.intercept - hat @ (signs - classifier.intercept)).reshape(
        sounds, levels, -1
    )
    own = hat.reshape(sounds, levels, sounds, levels)[np.arange(sounds), :, np.arange(sounds)]
    left_out = signs.reshape(residuals.shape) - np.linalg.solve(np.eye(levels) - own, residuals)
    logits, labels = torch.from_numpy(left_out.mean(1)), torch.from_numpy(targets)
    factors = np.geomspace(1, _SHARPEST, 93)  # steps of 5 %
    losses = [float(torch.nn.functional.cross_entropy(logits * factor, labels)) for factor in factors]
    return float(factors[int(np.argmin(losses))])
