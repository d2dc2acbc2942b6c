"""The linear classifiers of the evaluation protocols, on pooled vectors or on windows of frames."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soundnet_port.learning.errors import EvaluationError
from soundnet_port.learning.feature_cache import Values

FOLDS = 5  # where a data set has none, and inside training sets that have none
C_GRID = (1e-4, 1e-3, 1e-2, 1e-1)  # "modern"
PAPER_C = 0.01

DecisionValues = NDArray[np.float64]


def fit_pooled_svm(
    features: Values, targets: NDArray[Any], groups: Sequence[str], fold: str
) -> tuple[Any, float]:
    """Fit a linear SVM on standardized vectors, with C chosen by cross-validation within them.

    The inner folds are `groups`; where these are fewer than two, or leave a class without training
    sounds, five stratified ones.

    Args:
        features: (sounds, channels).
        targets: (sounds,), class indices.
        groups: the fold of each sound.
        fold: name of the test fold, for messages.

    Returns:
        the classifier and its C

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
            raise EvaluationError(f"fold {fold}: a class with a single training sound; C cannot be chosen")
        folding = StratifiedKFold(min(FOLDS, smallest), shuffle=True, random_state=0)
        inner = list(folding.split(features, targets))
    correct = dict.fromkeys(C_GRID, 0)
    for c in C_GRID:
        for train, test in inner:
            predicted = _pooled_svm(c).fit(features[train], targets[train]).predict(features[test])
            correct[c] += int((predicted == targets[test]).sum())
    best = max(C_GRID, key=lambda c: correct[c])  # the smallest of equal ones: most regularized
    return _pooled_svm(best).fit(features, targets), best


def _pooled_svm(c: float) -> Any:
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC

    # solved in the primal: no random order, and to the end
    return make_pipeline(StandardScaler(), LinearSVC(C=c, dual=False, max_iter=10_000))


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
