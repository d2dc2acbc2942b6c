"""The closed form against refitting every split with scikit-learn."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from soundnet_port.learning import ridge
from soundnet_port.learning.errors import EncodingError
from soundnet_port.learning.ridge import cross_validate_ridge, fit_ridge

ALPHAS = [0.01, 1, 10, 100, 10_000]


def make_data(rows, features, folds, outputs=7):
    generator = np.random.default_rng(rows + features)
    x = generator.normal(size=(rows, features)).astype(np.float32)
    signal = x[:, :5] @ generator.normal(size=(min(5, features), outputs))
    y = (signal + 2 * generator.normal(size=signal.shape)).astype(np.float32)
    return x, y, generator.permutation(np.arange(rows) % folds)


def refit(x, y, folds):
    """Return correlation, R2, penalties and predictions of nested cross-validation, one fit per split."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    shape = (folds.max() + 1, y.shape[1])
    correlation, r2, alpha, predictions = np.zeros(shape), np.zeros(shape), np.zeros(shape), np.zeros(y.shape)

    def predict(train, test, penalty, outputs):
        model = Ridge(alpha=penalty, fit_intercept=False, solver="svd")
        return model.fit(x[train], y[train][:, outputs]).predict(x[test]).reshape(-1, len(outputs))

    for fold in range(shape[0]):
        test, others = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        if shape[0] > 2:
            validations = [np.flatnonzero(folds == k) for k in range(shape[0]) if k != fold]
        else:
            validations = np.array_split(others, 3)
        error = np.zeros((len(ALPHAS), shape[1]))
        for number, penalty in enumerate(ALPHAS):
            for validation in validations:
                predicted = predict(
                    np.setdiff1d(others, validation), validation, penalty, np.arange(shape[1])
                )
                error[number] += ((y[validation] - predicted) ** 2).sum(0)
        alpha[fold] = np.array(ALPHAS)[error.argmin(0)]
        for output in range(shape[1]):
            predicted = predict(others, test, alpha[fold, output], [output])[:, 0]
            target = y[test, output]
            predictions[test, output] = predicted
            correlation[fold, output] = np.corrcoef(predicted, target)[0, 1]
            r2[fold, output] = 1 - ((target - predicted) ** 2).sum() / ((target - target.mean()) ** 2).sum()
    return correlation, r2, alpha, predictions


@pytest.mark.parametrize(
    ("rows", "features", "folds"),
    [(60, 5, 4), (60, 25, 4), (60, 200, 4), (61, 40, 3), (40, 30, 2), (41, 8, 2)],
    ids=["narrow", "wide", "more features than rows", "uneven folds", "two folds, wide", "two folds, narrow"],
)
def test_nested_cross_validation_equals_refitting(rows, features, folds):
    x, y, fold = make_data(rows, features, folds)
    correlation, r2, alpha, predictions = refit(x, y, fold)
    result = cross_validate_ridge(x, y, fold, ALPHAS, predictions=True)
    assert len(set(alpha.ravel())) > 1  # there was something to choose
    np.testing.assert_array_equal(result.alpha, alpha.astype(np.float32))
    # float64, rounded to float32 in the results
    np.testing.assert_allclose(result.correlation, correlation, atol=1e-6)
    np.testing.assert_allclose(result.r2, r2, atol=1e-6)
    np.testing.assert_allclose(result.predictions, predictions, atol=1e-5)


def test_neither_chunks_of_outputs_nor_the_precision_of_inner_errors_change_anything(monkeypatch):
    x, y, fold = make_data(90, 60, 5, outputs=8)
    expected = cross_validate_ridge(x, y, fold, ALPHAS, predictions=True)
    steps = []
    monkeypatch.setattr(ridge, "_CHUNK", 3)
    monkeypatch.setattr(ridge, "_CONDITION", 0)  # float64 throughout
    result = cross_validate_ridge(x, y, fold, ALPHAS, predictions=True, on_step=lambda: steps.append(1))
    assert len(steps) == ridge.count_steps(8, len(ALPHAS)) == 3 * len(ALPHAS)
    np.testing.assert_array_equal(result.alpha, expected.alpha)
    np.testing.assert_allclose(result.predictions, expected.predictions, atol=1e-5)
    np.testing.assert_allclose(result.correlation, expected.correlation, atol=1e-6)


def test_features_without_variance_predict_nothing():
    _, y, fold = make_data(30, 5, 3)
    for width in (0, 4):
        result = cross_validate_ridge(np.zeros((30, width), np.float32), y, fold, ALPHAS, predictions=True)
        assert not result.correlation.any()
        assert not result.predictions.any()


def test_a_penalty_that_cannot_be_computed_with_is_refused():
    x, y, fold = make_data(30, 60, 3)
    with pytest.raises(EncodingError, match="alpha 1e-30: too small"):
        cross_validate_ridge(x, y, fold, [1e-30])


@pytest.mark.parametrize("features", [20, 200])  # fewer and more than rows
def test_a_prediction_that_is_constant_correlates_with_nothing(features):
    """As of silence, whose features are all 0; rounding leaves 1e-15 of it where rows are fewer."""
    x, y, folds = make_data(60, features, 3)
    x[folds == 1] = 0
    assert (cross_validate_ridge(x, y, folds, ALPHAS).correlation[1] == 0).all()


@pytest.mark.parametrize(
    ("rows", "features", "folds"),
    [(60, 25, 4), (60, 200, 4), (40, 30, 1)],
    ids=["narrow", "wide", "one fold"],
)
def test_the_fit_to_all_rows_is_the_one_that_a_further_fold_tests(rows, features, folds):
    x, y, fold = make_data(rows, features, folds)
    x[:, 3] = 0  # as a channel that is constant in all runs
    fit = fit_ridge(x, y, fold, ALPHAS)
    assert len(set(fit.alpha)) > 1
    for output, penalty in enumerate(fit.alpha):
        expected = Ridge(alpha=penalty, fit_intercept=False, solver="svd").fit(x, y[:, output]).coef_
        np.testing.assert_allclose(fit.weights[:, output], expected, atol=1e-6)  # float64, rounded to float32
    assert not fit.weights[3].any()
    further_x, further_y, _ = make_data(20, features, 1)
    tested = cross_validate_ridge(
        np.concatenate([x, further_x]),
        np.concatenate([y, further_y]),
        np.concatenate([fold, np.full(20, folds)]),
        ALPHAS,
        predictions=True,
    )
    np.testing.assert_array_equal(tested.alpha[folds], fit.alpha)
    np.testing.assert_allclose(tested.predictions[rows:], further_x @ fit.weights, atol=1e-5)
