"""Encoding models of synthetic brains: what was put in is found; what must not matter does not."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.synthetic_brain import TR, VOLUMES, respond, write_melodies, z_scored_rows

import soundnet_port as sp
from soundnet_port.inference.activations import compute_activations
from soundnet_port.inference.alignment import align
from soundnet_port.learning import encoding_features
from soundnet_port.learning.encoding import fit_encoding_models
from soundnet_port.learning.encoding_data import Recording
from soundnet_port.learning.encoding_design import AlignedSound, KeptVolumes, assemble_predictors
from soundnet_port.learning.encoding_features import (
    AlignedFeatures,
    ResponseModel,
    default_delays,
    default_layers,
    hemodynamic_response,
    standardize,
)
from soundnet_port.learning.encoding_results import format_encoding, write_encoding

LAYERS = ["pool1", "conv4", "conv6"]
LAG = 3
PER_LAYER = 12
SHARE = 0.6  # of signal in the variance


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    return write_melodies(tmp_path_factory.mktemp("sounds"))


@pytest.fixture(scope="module")
def rows(model, sounds):
    return [{layer: z_scored_rows(model, path, layer) for layer in LAYERS} for path in sounds]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def make_brain(sounds, rows, kernel, share=SHARE, repeats=1, layers=LAYERS):
    """Return recordings of outputs that follow each of the layers."""
    generator = np.random.default_rng(0)
    mixings = {layer: generator.normal(size=(rows[0][layer].shape[1], PER_LAYER)) for layer in layers}
    return [
        Recording(
            path,
            np.concatenate(
                [respond(own[layer], mixings[layer], kernel, share, generator) for layer in layers], 1
            ).astype(np.float32),
            f"{path.stem}{repeat}",
        )
        for path, own in zip(sounds, rows, strict=True)
        for repeat in range(repeats)
    ]


@pytest.fixture(scope="module")
def brain(sounds, rows):
    return make_brain(sounds, rows, np.eye(1, LAG + 1, LAG)[0], repeats=2)


@pytest.fixture(scope="module")
def result(model, brain, cache):
    return fit_encoding_models(model, brain, tr=TR, layers=LAYERS, cache=cache, predictions=True)


# ---- recovery


def test_the_layers_that_responses_were_made_from_are_the_best(result):
    expected = np.repeat(np.arange(len(LAYERS)), PER_LAYER)
    assert np.mean(result.best_layer == expected) >= 0.9  # chance: 1/3
    assert [row["best_for"] for row in result.summarize()] == [
        np.sum(result.best_layer == number) for number in range(len(LAYERS))
    ]


def test_correlations_come_near_the_share_of_signal_and_stay_below(result):
    """pool1's single channel at 4 delays leaves little to estimate from 640 volumes."""
    perfect = np.sqrt(SHARE)
    own = result.correlation[0, :PER_LAYER]
    # a fold's correlation over 160 volumes has a standard error of (1 - 0.6) / sqrt(160) = 0.03
    assert perfect - 0.06 < own.mean() < perfect + 0.02
    assert result.r2[0, :PER_LAYER].mean() == pytest.approx(SHARE, abs=0.08)


def test_the_noise_ceiling_is_the_share_of_signal(result):
    assert result.has_ceiling
    # 36 outputs, five pairs of repeats over 80 volumes: a standard error well below 0.01
    assert result.noise_ceiling.mean() == pytest.approx(np.sqrt(SHARE), abs=0.02)


def test_noise_is_not_predicted(model, brain, cache):
    generator = np.random.default_rng(1)
    noise = [
        replace(own, targets=generator.normal(size=(VOLUMES, 40)).astype(np.float32)) for own in brain[::2]
    ]
    result = fit_encoding_models(model, noise, tr=TR, layers=["conv4"], cache=cache)
    # 200 fold correlations over 80 volumes, each with a standard error of 0.11
    assert abs(result.fold_correlation.mean()) < 0.04
    assert not result.has_ceiling


def test_the_delay_of_the_response_is_found(model, brain, cache):
    def mean_correlation(delay):
        outcome = fit_encoding_models(model, brain[::2], tr=TR, layers=["pool1"], delays=[delay], cache=cache)
        return outcome.correlation[0, :PER_LAYER].mean()

    by_delay = [mean_correlation(delay) for delay in range(6)]
    assert np.argmax(by_delay) == LAG
    assert by_delay[LAG] > 0.7 > 0.3 > max(by_delay[LAG - 2], by_delay[LAG + 2])


def test_a_hemodynamic_response_is_found(model, sounds, rows, cache):
    kernel = hemodynamic_response("glover", TR)
    brain = make_brain(sounds, rows, kernel, layers=["pool1"])

    def mean_correlation(**settings):
        return fit_encoding_models(
            model, brain, tr=TR, layers=["pool1"], cache=cache, **settings
        ).correlation.mean()

    by_model = {hrf: mean_correlation(hrf=hrf) for hrf in ("glover", "spm", "none")}
    assert by_model["glover"] == pytest.approx(np.sqrt(SHARE), abs=0.05)
    assert by_model["glover"] > by_model["spm"] > by_model["none"] + 0.2
    assert by_model["glover"] > mean_correlation() > by_model["none"] + 0.2  # delays come near


def test_predictions_are_those_of_held_out_volumes(result, brain):
    for number in range(len(LAYERS)):
        assert result.predictions[number].shape == (len(brain) * VOLUMES, len(LAYERS) * PER_LAYER)
    first = slice(0, 2 * VOLUMES)  # the fold of the first sound: both repeats
    measured = np.concatenate([standardize(own.targets) for own in brain[:2]])
    for output in (0, PER_LAYER, 3 * PER_LAYER - 1):
        r = np.corrcoef(result.predictions[1][first, output], measured[:, output])[0, 1]
        assert r == pytest.approx(result.fold_correlation[1, 0, output], abs=1e-5)


# ---- what must not matter


def test_mean_and_scale_of_a_run_do_not_matter(model, brain, cache, result):
    scaled = [
        replace(own, targets=own.targets * (number + 1) + 10 * number) for number, own in enumerate(brain)
    ]
    again = fit_encoding_models(model, scaled, tr=TR, layers=LAYERS, cache=cache)
    np.testing.assert_allclose(again.correlation, result.correlation, atol=1e-4)  # float32 targets


def test_targets_may_begin_later_than_the_sound(model, brain, cache):
    """Two volumes are cut off; features before them are heard all the same."""
    later = [replace(own, targets=own.targets[2:], onset=2 * TR) for own in brain[::2]]
    marked = [replace(own, targets=own.targets.copy()) for own in brain[::2]]
    for own in marked:
        own.targets[:2] = np.nan  # censored
    settings = {"tr": TR, "layers": ["conv4"], "cache": cache}
    first, second = (fit_encoding_models(model, own, **settings) for own in (later, marked))
    np.testing.assert_array_equal(first.fold_correlation, second.fold_correlation)
    assert second.notes == ["10 of 400 volumes left out: 10 NaN in all outputs"]


def test_predictors_are_z_scored_within_runs_that_are_parts_of_a_sound():
    values = np.random.default_rng(0).normal(size=(90, 2)).astype(np.float32)
    values[:30] = values[:30] * 5 + 3
    sound = AlignedSound({"pool5": values}, 135.0, 0, 0.0)
    recordings = [Recording(Path("long.wav"), np.zeros((30, 1), np.float32), str(run)) for run in range(3)]
    rows = [KeptVolumes(np.arange(30), np.arange(30) + 30 * run) for run in range(3)]
    predictors, _ = assemble_predictors(recordings, [sound] * 3, rows, "pool5", ResponseModel((0, 2)))
    for run in range(3):
        part = predictors[30 * run : 30 * run + 30]
        np.testing.assert_allclose(part.mean(0), 0, atol=1e-6)  # float32
        np.testing.assert_allclose(part.std(0), 1, atol=1e-6)


def test_a_clock_may_begin_between_two_periods(model, sounds):
    """Periods of 1 s from 0.5 s on are the means of two periods of 0.5 s."""
    layers = ["pool2", "conv7"]
    fine, seconds = AlignedFeatures(model, layers, 0.5).extract(sounds[0])
    coarse, _ = AlignedFeatures(model, layers, 1.0).extract(sounds[0], 0.5)
    assert seconds == VOLUMES * TR
    for layer in layers:
        pairs = fine[layer][1:-1].reshape(-1, 2, fine[layer].shape[1]).mean(1)
        known = ~np.isnan(pairs).any(1)
        assert known.sum() > 100
        np.testing.assert_allclose(
            coarse[layer][: len(pairs)][known], pairs[known], atol=1e-5 * np.nanmax(fine[layer])
        )


def test_the_second_run_computes_no_features(model, brain, cache, result, monkeypatch):
    monkeypatch.setattr(AlignedFeatures, "_compute", None)
    again = fit_encoding_models(model, brain, tr=TR, layers=LAYERS, cache=cache)
    np.testing.assert_array_equal(again.fold_correlation, result.fold_correlation)


def test_modules_inside_layers_are_aligned_as_layers_are(model, sounds):
    """The ReLU of pool1's input is a layer by its number, too; the batch norm before it is not streamed."""
    extractor = AlignedFeatures(model, ["conv1", 2], TR)
    rows, _ = extractor.extract(sounds[0])
    assert rows[2].shape == rows["conv1"].shape
    assert (rows[2].mean(0) <= rows["conv1"].mean(0) + 1e-6).all()


# ---- volumes


def test_delays_do_not_reach_before_the_sound():
    rows = np.arange(1, 6, dtype=np.float32)[:, None]
    assert ResponseModel((1, 3)).predictors(rows).tolist() == [[0, 0], [1, 0], [2, 0], [3, 1], [4, 2]]
    assert ResponseModel((0, 7)).predictors(rows)[:, 1].tolist() == [0] * 5
    assert ResponseModel((0, 1), (0.5, 0.25)).predictors(rows)[:, 0].tolist() == [0.5, 1.25, 2, 2.75, 3.5]


def test_volumes_without_features_cannot_be_predicted():
    known = np.array([False, True, True, True, False])
    assert ResponseModel((0,)).predictable(known).tolist() == [False, True, True, True, False]
    # the unknown row at the end is not needed two volumes later
    assert ResponseModel((2,)).predictable(known).tolist() == [False, True, True, True, True]
    assert not ResponseModel((2,)).predictable(np.zeros(5, bool)).any()


@pytest.mark.parametrize("alignment", ["center", "end"])
def test_all_layers_are_tested_on_the_same_volumes_and_the_others_are_counted(alignment, model, brain, cache):
    tr = TR / 3  # shorter than a frame of conv7
    longer = []
    for own in brain[::2]:
        targets = np.repeat(own.targets, 3, axis=0)
        longer.append(replace(own, targets=np.concatenate([targets, targets[:4]]), onset=-2 * tr))
    output = compute_activations(model, brain[0].sound, ["conv7"])
    rows, _ = align(model, "conv7", output.activations["conv7"], VOLUMES * TR, tr=tr, to=alignment)
    unknown = int(torch.isnan(rows[:, 0]).sum())
    assert unknown > 0  # the edge frame, or before the first frame's end
    settings = {"tr": tr, "delays": [0], "align": alignment, "cache": cache}
    both = fit_encoding_models(model, longer, layers=["pool1", "conv7"], **settings)
    # 2 volumes before each sound and 2 after it
    assert both.notes[0] == (
        f"{20 + 5 * unknown} of 1,220 volumes left out: 20 before or after their sound, {5 * unknown} "
        "without frames of all layers (before the first ones, or edge frames)"
    )
    alone = fit_encoding_models(model, longer, layers=["pool1"], **settings)
    assert (both.volumes, alone.volumes) == (1200 - 5 * unknown, 1200)


def test_targets_of_a_small_part_of_the_sounds_are_noted(model, brain, cache):
    few = [replace(own, targets=own.targets[:30]) for own in brain[::2]]
    notes = fit_encoding_models(model, few, tr=TR, layers=["pool1"], cache=cache).notes
    assert notes[:2] == ["all 150 volumes are used", "the targets last 225 s, the sounds 600 s; is tr right?"]


def test_constant_and_missing_outputs_are_left_out(model, brain, cache, result):
    changed = [replace(own, targets=own.targets.copy()) for own in brain]
    changed[3].targets[:, 1] = 7
    changed[2].targets[5, 4] = np.nan
    outcome = fit_encoding_models(model, changed, tr=TR, layers=LAYERS, cache=cache)
    assert np.flatnonzero(~outcome.usable).tolist() == [1, 4]
    assert (outcome.best_layer[[1, 4]] == -1).all()
    assert np.isnan(outcome.fold_correlation[:, :, [1, 4]]).all()
    assert "2 of 36 outputs are constant or NaN in a run; left out" in outcome.notes
    others = outcome.usable
    np.testing.assert_allclose(outcome.correlation[:, others], result.correlation[:, others], atol=1e-5)


def test_default_delays_cover_the_hemodynamic_response():
    assert default_delays(1.5) == (2, 3, 4, 5)
    assert default_delays(2.0) == (1, 2, 3, 4)
    assert default_delays(0.72) == (3, 6, 8, 11)
    assert default_delays(10.0) == (0, 1)


@pytest.mark.parametrize(("name", "peak", "trough"), [("glover", 5.0, 12.0), ("spm", 5.0, 15.8)])
def test_hemodynamic_responses_are_the_published_functions(name, peak, trough):
    """As differences of SciPy's gamma densities."""
    gamma = pytest.importorskip("scipy.stats").gamma
    delay, undershoot, dispersion, ratio = {"glover": (6, 12, 0.9, 0.35), "spm": (6, 16, 1, 1 / 6)}[name]
    weights = hemodynamic_response(name, 0.1)
    times = np.arange(len(weights)) / 10
    expected = gamma.pdf(times, delay / dispersion, scale=dispersion) - ratio * gamma.pdf(
        times, undershoot / dispersion, scale=dispersion
    )
    assert weights.sum() == pytest.approx(1)
    # means over 0.1 s beside values; a period is short beside the function's curvature
    np.testing.assert_allclose(weights, expected / expected.sum(), atol=2e-3 * weights.max())
    assert times[weights.argmax()] == pytest.approx(peak, abs=0.3)
    assert times[weights.argmin()] == pytest.approx(trough, abs=0.5)


def test_default_layers_are_those_after_pooling():
    assert default_layers(sp.SOUNDNET8) == ["pool1", "pool2", "conv3", "conv4", "pool5", "conv6", "conv7"]
    assert default_layers(sp.SOUNDNET5) == ["pool1", "pool2", "pool3", "conv4"]


# ---- files


def test_results_are_written(result, tmp_path):
    written = write_encoding(result, tmp_path / "results")
    names = {path.relative_to(tmp_path / "results").as_posix() for path in written}
    assert names == {
        *(f"{name}.npy" for name in "correlation r2 fold_correlation fold_r2 alpha best_layer".split()),
        *(f"predictions/{layer}.npy" for layer in LAYERS),
        "noise_ceiling.npy",
        "encoding.json",
        "encoding.png",
    }
    outputs = len(LAYERS) * PER_LAYER
    assert np.load(tmp_path / "results" / "correlation.npy").shape == (len(LAYERS), outputs)
    assert np.load(tmp_path / "results" / "fold_r2.npy").shape == (len(LAYERS), 5, outputs)
    about = json.loads((tmp_path / "results" / "encoding.json").read_text())
    assert about["tr"] == TR
    assert about["delays"] == [2, 3, 4, 5]
    assert [row["layer"] for row in about["layers"]] == LAYERS
    assert (tmp_path / "results" / "encoding.png").read_bytes().startswith(b"\x89PNG")
    again = write_encoding(result, tmp_path / "again")
    assert [path.read_bytes() for path in written] == [path.read_bytes() for path in again]
    assert format_encoding(result).splitlines()[1].split()[0] == "pool1"


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"tr": 0}, "tr: must be 0.001 to 3600 seconds, not 0"),
        ({"delays": [1, 1]}, "delays: different whole numbers"),
        ({"delays": [-1]}, "delays: different whole numbers"),
        ({"hrf": "boxcar"}, "unknown hrf 'boxcar'; choose from glover, spm, none"),
        ({"hrf": "spm", "delays": [1]}, "delays and hrf: choose one"),
        ({"alphas": [1, 0]}, "alphas: positive numbers"),
        ({"folds": 1}, "folds: a whole number of 2 or more"),
        ({"align": "start"}, "unknown alignment 'start'"),
        ({"layers": ["pool9"]}, "no layer 'pool9'"),
    ],
)
def test_impossible_settings_are_refused(settings, error, model, brain):
    with pytest.raises(sp.EncodingError, match=error):
        fit_encoding_models(model, brain, **{"tr": TR, "cache": False, **settings})


def test_hrf_lengths_fit_any_period():
    for tr in (0.1, 1.5, 10.0, 60.0):
        weights = hemodynamic_response("spm", tr)
        assert len(weights) == int(encoding_features._HRF_SECONDS / tr + 0.5) + 1
        assert np.isfinite(weights).all()
