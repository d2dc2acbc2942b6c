"""The linear classifiers of the evaluation protocols, on pooled vectors or on windows of frames."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soundnet_port.learning.errors import EvaluationError
from soundnet_port.learning.feature_cache import Values

FOLDS = 5  # where a data set has none, and inside training sets that have none
ALPHAS = (1.0, 0.3, 0.1, 0.03)  # "modern"
PAPER_C = 0.01

DecisionValues = NDArray[np.float64]


@dataclass(frozen=True)
class PooledClassifier:
    """A linear classifier of pooled features: square root, standardization, and ridge regression.

    Attributes:
        mean: of the square roots, (features,).
        scale: that they are divided by, (features,); infinite for constant ones.
        weight: (features, classes).
        intercept: (classes,).
        alpha: the ridge penalty; rows have a squared norm of about 1.
    """

    mean: NDArray[np.float64]
    scale: NDArray[np.float64]
    weight: NDArray[np.float64]
    intercept: NDArray[np.float64]
    alpha: float

    def decide(self, features: Values) -> DecisionValues:
        """Return decision values (sounds, classes), the mean of a sound's rows (sounds, levels, features)."""
        values: DecisionValues = ((take_root(features).mean(1) - self.mean) / self.scale) @ self.weight
        return values + self.intercept


def fit_pooled_classifier(
    features: Values, sizes: Sequence[int], targets: NDArray[Any], groups: Sequence[str], fold: str
) -> PooledClassifier:
    """Fit a linear classifier to sounds' rows, with its penalty chosen by cross-validation within them.

    Pooled activations are skewed, so their square root (with the sign) is taken. Each feature is
    standardized, and each block of features divided by the root of its size, so that a layer of many
    channels weighs as much as one of few. Then ridge regression on +-1, one class against the rest.

    The inner folds are `groups`; where these are fewer than two, or leave a class without training
    sounds, five stratified ones.

    Args:
        features: (sounds, levels, features).
        sizes: of the blocks that a row consists of.
        targets: (sounds,), class indices.
        groups: the fold of each sound.
        fold: name of the test fold, for messages.

    Raises:
        EvaluationError: a class with a single sound.
    """
    from sklearn.model_selection import StratifiedKFold

    names = sorted(set(groups))
    inner = [(np.array(groups) != name, np.array(groups) == name) for name in names]
    classes = set(targets.tolist())
    if len(names) < 2 or any(set(targets[train].tolist()) != classes for train, _ in inner):
        smallest = int(np.bincount(targets)[list(classes)].min())
        if smallest < 2:
            raise EvaluationError(
                f"fold {fold}: a class with a single training sound; alpha cannot be chosen"
            )
        folding = StratifiedKFold(min(FOLDS, smallest), shuffle=True, random_state=0)
        inner = list(folding.split(features, targets))
    correct = dict.fromkeys(ALPHAS, 0)
    for train, test in inner:
        for classifier in _fit_ridge(features[train], sizes, targets[train], ALPHAS):
            predicted = classifier.decide(features[test]).argmax(1)
            correct[classifier.alpha] += int((predicted == targets[test]).sum())
    best = max(ALPHAS, key=lambda alpha: correct[alpha])  # the largest of equal ones: most regularized
    (classifier,) = _fit_ridge(features, sizes, targets, [best])
    return classifier


def _fit_ridge(
    features: Values, sizes: Sequence[int], targets: NDArray[Any], alphas: Sequence[float]
) -> Iterator[PooledClassifier]:
    """Yield a classifier for each penalty; the classes are 0 up to the largest of the targets."""
    from scipy.linalg import solve

    sounds, levels, count = features.shape
    rows = take_root(features).reshape(sounds * levels, count)
    mean, deviation = rows.mean(0), rows.std(0)
    block = np.repeat(np.sqrt(np.multiply(sizes, len(sizes))), sizes)
    scale = np.where(deviation > 1e-6 * np.abs(rows).max(initial=0), deviation * block, np.inf)
    rows = (rows - mean) / scale
    signs = np.where(np.repeat(targets, levels)[:, None] == np.arange(targets.max() + 1), 1.0, -1.0)
    intercept = signs.mean(0)
    wide = count > len(rows)
    gram = rows @ rows.T if wide else rows.T @ rows
    right = signs - intercept if wide else rows.T @ (signs - intercept)
    for alpha in alphas:
        solution = solve(gram + alpha * np.eye(len(gram)), right, assume_a="pos")
        yield PooledClassifier(mean, scale, rows.T @ solution if wide else solution, intercept, alpha)


def take_root(features: Values) -> NDArray[np.float64]:
    """Return the square root of each value's size, with its sign."""
    values = features.astype(np.float64)
    return np.sign(values) * np.sqrt(np.abs(values))


def fit_window_svm(examples: Sequence[Values], targets: NDArray[Any], window: int) -> tuple[Any, bool]:
    """Fit the original's SVM on all windows of these sounds.

    scikit-learn's LinearSVC is liblinear: this is `-s 1 -c 0.01 -B 1`, L2-regularized, squared hinge
    loss, solved in the dual, one class against the rest, with the bias a regularized weight of a constant
    1, to liblinear's default tolerance of 0.1 or 1,000 iterations. Its random order, and with that the
    last digits allowed by the tolerance, are not the original's.

    Args:
        examples: of each sound (frames, channels).
        targets: (sounds,), class indices.
        window: frames.

    Returns:
        the classifier, and whether it converged
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.svm import LinearSVC

    parts = [make_windows(frames, window) for frames in examples]
    classifier = LinearSVC(C=PAPER_C, dual=True, intercept_scaling=1, tol=0.1, max_iter=1000, random_state=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        classifier.fit(np.concatenate(parts), np.repeat(targets, [len(part) for part in parts]))
    return classifier, not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)


def make_windows(frames: Values, window: int) -> Values:
    """Return all windows of consecutive frames, flattened with a channel's frames side by side.

    Negative values, of layers before a ReLU, become 0, as in the original.

    Shape:
        frames: (frames, channels); returns (frames - window + 1, channels * window)
    """
    views = np.lib.stride_tricks.sliding_window_view(frames, window, axis=0)
    return np.maximum(views.reshape(len(views), -1), 0)


def compute_decision_values(classifier: Any, examples: Values) -> DecisionValues:
    """Return decision values (examples, classes); for two classes scikit-learn has the second one's only."""
    values: DecisionValues = classifier.decision_function(examples)
    return values if values.ndim == 2 else np.stack([-values, values], axis=1)
