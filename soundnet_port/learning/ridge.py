"""Ridge regression with nested cross-validation, all splits from one decomposition.

With X = rows of features, one eigendecomposition of X'X (or of XX', where that is smaller) gives scores
Z = X V with Z'Z = diag(l). The fit to all rows with penalty a is H y, H = Z diag(1 / (l + a)) Z'. The errors
in rows B of a model that was fitted without them follow exactly (leave-group-out by the hat matrix):

    e_B = (I - H_BB)^-1 (y - H y)_B                      a system as large as the block, or
    e_B = y_B - Z_B (diag(l + a) - Z_B'Z_B)^-1 (Z'y - Z_B'y_B)    as large as the number of features

The outer split leaves out a fold j; the inner one, which chooses the penalty of each output, another fold k,
too: B = j + k. Its errors in k count for the model tested on j, and those in j for the one tested on k. So
n folds need n (n - 1) / 2 such systems per penalty, where refitting needs as many decompositions of all rows.

Reported figures are computed in float64. The inner errors, nearly all of the work, only rank penalties: they
are computed in float32 where the penalty makes the systems well conditioned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soundnet_port.learning.errors import EncodingError

DEFAULT_ALPHAS = tuple(float(f"{alpha:.3g}") for alpha in np.logspace(1, 7, 13))  # coarser ones lose accuracy
_CONSTANT = 1e-9  # deviations of a prediction, of those of the target
_CHUNK = 2048  # outputs at a time: about 100 MB per 6,000 rows
_PARTS = 3  # of a fold, for the inner split where there are two folds
_CONDITION = 1e4  # l / a up to which float32 leaves errors three digits at least, on real sounds six
_NARROW = 0.7  # features per row of a block, below which the system of the features is the faster one


@dataclass(frozen=True)
class RidgeResult:
    """Figures of held-out rows, by fold and output.

    Attributes:
        correlation: Pearson correlation of prediction and target, (folds, outputs); 0 where a prediction is
            constant.
        r2: share of the target's variance that the prediction explains; negative if worse than the mean.
        alpha: the penalty that was chosen without the fold.
        predictions: (rows, outputs), float32, each row by the model that was fitted without its fold; None
            if not requested.
    """

    correlation: NDArray[np.float32]
    r2: NDArray[np.float32]
    alpha: NDArray[np.float32]
    predictions: NDArray[np.float32] | None


@dataclass(frozen=True)
class _InnerSplit:
    """Two blocks of rows that are left out together.

    Errors in `validated` count for the model tested on `tested`; if `mutual`, also the other way round.
    """

    tested: int
    test_rows: slice
    validated: int
    validation_rows: slice
    mutual: bool


@dataclass(frozen=True)
class RidgeFit:
    """A fit to all rows.

    Attributes:
        weights: (features, outputs).
        alpha: the penalty of each output.
    """

    weights: NDArray[np.float32]
    alpha: NDArray[np.float32]


def check_alphas(alphas: Sequence[float] | None) -> tuple[float, ...]:
    """Return penalties in increasing order; by default thirteen from 10 to 1e7.

    Raises:
        EncodingError: not all are positive numbers.
    """
    chosen = DEFAULT_ALPHAS if alphas is None else alphas
    if not len(chosen) or not all(0 < alpha < np.inf for alpha in chosen):
        raise EncodingError(f"alphas: positive numbers, not {list(chosen)}")
    return tuple(sorted({float(alpha) for alpha in chosen}))


def cross_validate_ridge(
    features: NDArray[np.float32],
    targets: NDArray[np.float32],
    folds: NDArray[np.int64],
    alphas: Sequence[float],
    *,
    predictions: bool = False,
    device: torch.device | str = "cpu",
    on_step: Callable[[], None] = lambda: None,
) -> RidgeResult:
    """Fit ridge regression without each fold, and predict the fold.

    The penalty of each output is the one with the least squared error when the other folds are left out
    one at a time; with two folds, thirds of the other fold, contiguous in the order of the rows. There is no
    intercept: features and targets are expected to be centered.

    Args:
        features: (rows, features).
        targets: (rows, outputs).
        folds: (rows,), the fold of each row, counted from 0; none may be empty.
        alphas: the penalties to choose from, as scikit-learn's `Ridge(alpha)`.
        predictions: return them, too.
        device: where to compute; in float64.
        on_step: called after each penalty, `count_steps` times.

    Raises:
        EncodingError: a penalty is too small for the features to be fitted.
    """
    order, tests = _sort_folds(folds)
    inner = _split_again(tests)
    scores, spectrum = _decompose(torch.from_numpy(features[order]).to(device, torch.float64))
    exact = _LeftOut(scores, spectrum, tests)
    quick = _LeftOut(scores.float(), spectrum.float(), tests)
    shape = (len(tests), targets.shape[1])
    result = RidgeResult(
        np.zeros(shape, np.float32),
        np.zeros(shape, np.float32),
        np.zeros(shape, np.float32),
        np.zeros_like(targets) if predictions else None,
    )
    for start in range(0, targets.shape[1], _CHUNK):
        outputs = slice(start, start + _CHUNK)
        exact.set_targets(torch.from_numpy(targets[order, outputs]).to(device, torch.float64))
        quick.set_targets(exact.targets.float())
        least = torch.full((len(tests), exact.targets.shape[1]), torch.inf, dtype=torch.float64)
        for alpha in alphas:
            error = _inner_error(quick if _is_quick(spectrum, alpha) else exact, alpha, inner, least)
            for fold, rows in enumerate(tests):
                chosen = (error[fold] < least[fold]).numpy()
                if chosen.any():
                    columns = outputs.start + np.flatnonzero(chosen)
                    _record(result, exact, alpha, fold, rows, columns, chosen, order)
            least = torch.minimum(least, error)
            on_step()
    return result


def fit_ridge(
    features: NDArray[np.float32],
    targets: NDArray[np.float32],
    folds: NDArray[np.int64],
    alphas: Sequence[float],
    *,
    device: torch.device | str = "cpu",
    on_step: Callable[[], None] = lambda: None,
) -> RidgeFit:
    """Fit ridge regression to all rows.

    The penalty of each output is the one with the least squared error when the folds are left out one at a
    time; with one fold, its thirds. So it is the fit that `cross_validate_ridge` tests on a further fold. For
    arguments and errors see there.
    """
    order, parts = _sort_folds(folds)
    if len(parts) == 1:
        parts = _split_fold(parts[0])
    rows = torch.from_numpy(features[order]).to(device, torch.float64)
    scores, spectrum = _decompose(rows)
    exact = _LeftOut(scores, spectrum, parts)
    quick = _LeftOut(scores.float(), spectrum.float(), parts)
    weights = np.zeros((features.shape[1], targets.shape[1]), np.float32)
    penalties = np.zeros(targets.shape[1], np.float32)
    for start in range(0, targets.shape[1], _CHUNK):
        outputs = slice(start, start + _CHUNK)
        exact.set_targets(torch.from_numpy(targets[order, outputs]).to(device, torch.float64))
        quick.set_targets(exact.targets.float())
        errors = []
        for alpha in alphas:
            systems = quick if _is_quick(spectrum, alpha) else exact
            systems.set_alpha(alpha)
            left_out = torch.cat([systems.errors(part)[0] for part in parts])
            errors.append(torch.linalg.vector_norm(left_out, dim=0).double().cpu())
            on_step()
        chosen = torch.tensor(alphas, dtype=torch.float64)[torch.stack(errors).argmin(0)]
        column = spectrum[:, None]  # w = V shares, and V = X'Z diag(1 / l)
        shares = (scores.T @ exact.targets) / (column + chosen.to(column.device))
        weights[:, outputs] = (rows.T @ (scores @ (shares / column))).float().cpu().numpy()
        penalties[outputs] = chosen.numpy()
    return RidgeFit(weights, penalties)


def count_steps(outputs: int, alphas: int) -> int:
    """Count the steps of `cross_validate_ridge`."""
    return -(-outputs // _CHUNK) * alphas


def _sort_folds(folds: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[slice]]:
    """Return the order in which rows of a fold are contiguous, and the rows of each fold in it."""
    order = np.argsort(folds, kind="stable")
    bounds = np.searchsorted(folds[order], np.arange(folds.max() + 2))
    return order, [slice(int(start), int(stop)) for start, stop in pairwise(bounds)]


def _split_fold(fold: slice) -> list[slice]:
    """Return the parts of a fold that are left out where there is no other one."""
    parts = np.array_split(np.arange(fold.start, fold.stop), _PARTS)
    return [slice(int(part[0]), int(part[-1]) + 1) for part in parts if len(part)]


def _is_quick(spectrum: Tensor, alpha: float) -> bool:
    """Whether float32 is accurate enough to rank this penalty."""
    return len(spectrum) == 0 or spectrum.max().item() <= _CONDITION * alpha


def _split_again(tests: Sequence[slice]) -> list[_InnerSplit]:
    if len(tests) > 2:
        return [
            _InnerSplit(j, tests[j], k, tests[k], mutual=True)
            for j in range(len(tests))
            for k in range(j + 1, len(tests))
        ]
    splits = []
    for tested, other in ((0, 1), (1, 0)):
        splits += [
            _InnerSplit(tested, tests[tested], other, part, mutual=False)
            for part in _split_fold(tests[other])
        ]
    return splits


def _inner_error(systems: _LeftOut, alpha: float, splits: Sequence[_InnerSplit], like: Tensor) -> Tensor:
    """Sum the squared errors of validation rows, (folds, outputs)."""
    systems.set_alpha(alpha)
    total = torch.zeros_like(like)
    for split in splits:
        test, validation = systems.errors(split.test_rows, split.validation_rows)
        total[split.tested] += torch.linalg.vector_norm(validation, dim=0).square().cpu()
        if split.mutual:
            total[split.validated] += torch.linalg.vector_norm(test, dim=0).square().cpu()
    return total


def _record(
    result: RidgeResult,
    systems: _LeftOut,
    alpha: float,
    fold: int,
    rows: slice,
    outputs: NDArray[np.int64],
    chosen: NDArray[np.bool_],
    order: NDArray[np.int64],
) -> None:
    """Enter the figures of some outputs in a held-out fold."""
    columns = torch.from_numpy(chosen).to(systems.targets.device)
    systems.set_alpha(alpha)
    (errors,) = systems.errors(rows)
    targets = systems.targets[rows][:, columns]
    predicted = targets - errors[:, columns]
    correlation, r2 = score_predictions(predicted, targets)
    result.correlation[fold, outputs] = correlation.cpu().numpy()
    result.r2[fold, outputs] = r2.cpu().numpy()
    result.alpha[fold, outputs] = alpha
    if result.predictions is not None:
        result.predictions[np.ix_(order[rows], outputs)] = predicted.float().cpu().numpy()


def score_predictions(predicted: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return correlation and R2 of each output, of (rows, outputs) in float64; see `RidgeResult`."""
    centered = targets - targets.mean(0)
    deviations = predicted - predicted.mean(0)
    norms = centered.norm(dim=0), deviations.norm(dim=0)
    constant = norms[1] <= _CONSTANT * norms[0]  # but for rounding
    correlation = (centered * deviations).sum(0) / (norms[0] * norms[1]).where(~constant, torch.inf)
    return correlation, 1 - (targets - predicted).square().sum(0) / centered.square().sum(0)


def _decompose(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return scores Z, (rows, components), and the spectrum l: Z'Z = diag(l), ZZ' = XX'."""
    rows, columns = features.shape
    if columns <= rows:
        spectrum, vectors = torch.linalg.eigh(features.T @ features)
    else:
        spectrum, vectors = torch.linalg.eigh(features @ features.T)
    # without what rounding has left of a zero; all of them if all features are constant
    largest = spectrum.max().item() if columns else 0.0
    kept = spectrum > largest * rows * torch.finfo(torch.float64).eps
    spectrum, vectors = spectrum[kept], vectors[:, kept]
    return features @ vectors if columns <= rows else vectors * spectrum.sqrt(), spectrum


class _LeftOut:
    """Errors in rows that the model was fitted without, for one penalty at a time."""

    targets: Tensor  # (rows, outputs)
    _projections: Tensor  # (components, outputs), Z'y
    _residuals: Tensor | None  # (rows, outputs), y - H y
    _hat: Tensor | None  # (rows, rows), H; blocks of folds on and above the diagonal

    def __init__(self, scores: Tensor, spectrum: Tensor, folds: Sequence[slice]) -> None:
        self._scores, self._spectrum, self._folds = scores, spectrum, folds
        self._grams: dict[tuple[int, int], Tensor] = {}
        self._block_projections: dict[tuple[int, int], Tensor] = {}
        self._alpha = 0.0

    def set_targets(self, targets: Tensor) -> None:
        self.targets = targets
        self._projections = self._scores.T @ targets
        self._block_projections.clear()
        self._residuals = None

    def set_alpha(self, alpha: float) -> None:
        if alpha != self._alpha:
            self._alpha, self._residuals, self._hat = alpha, None, None

    def errors(self, *blocks: slice) -> list[Tensor]:
        """Return e_B of blocks that are left out together, a tensor per block."""
        sizes = [block.stop - block.start for block in blocks]
        if len(self._spectrum) <= _NARROW * sum(sizes):
            system = torch.diag(self._spectrum + self._alpha)
            right = self._projections.clone()
            for block in blocks:
                gram, projections = self._block(block)
                system -= gram
                right -= projections
            weights = self._solve(system, right)
            return [torch.addmm(self.targets[b], self._scores[b], weights, alpha=-1) for b in blocks]
        if self._residuals is None:
            shares = self._projections / (self._spectrum + self._alpha)[:, None]
            self._residuals = torch.addmm(self.targets, self._scores, shares, alpha=-1)
        if len(blocks) == 1:
            hat = self._weighted(blocks[0]) @ self._scores[blocks[0]].T
        else:
            hat = torch.cat([torch.cat([self._hat_block(i, j) for j in blocks], 1) for i in blocks])
        system = hat.neg_()
        system.diagonal().add_(1)
        residuals = torch.cat([self._residuals[block] for block in blocks])
        return list(torch.split(self._solve(system, residuals), sizes))

    def _solve(self, system: Tensor, right: Tensor) -> Tensor:
        factor, failed = torch.linalg.cholesky_ex(system)
        if failed.item():
            raise EncodingError(
                f"alpha {self._alpha:g}: too small, the features of some rows determine those of others; "
                "use larger ones"
            )
        return torch.cholesky_solve(right, factor)

    def _block(self, block: slice) -> tuple[Tensor, Tensor]:
        """Return Z_B'Z_B and Z_B'y_B."""
        key = (block.start, block.stop)
        if key not in self._grams:
            self._grams[key] = self._scores[block].T @ self._scores[block]
        if key not in self._block_projections:
            self._block_projections[key] = self._scores[block].T @ self.targets[block]
        return self._grams[key], self._block_projections[key]

    def _weighted(self, rows: slice) -> Tensor:
        return self._scores[rows] / (self._spectrum + self._alpha)

    def _hat_block(self, rows: slice, columns: slice) -> Tensor:
        if rows.start > columns.start:
            return self._hat_block(columns, rows).T
        if self._hat is None:
            count = len(self._scores)
            self._hat = self._scores.new_empty(count, count)
            for fold in self._folds:  # H is symmetric: half of it
                torch.mm(
                    self._weighted(fold), self._scores[fold.start :].T, out=self._hat[fold, fold.start :]
                )
        return self._hat[rows, columns]
