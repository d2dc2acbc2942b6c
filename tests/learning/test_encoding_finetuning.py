"""Fine-tuning encoding models: it starts from encode's ridge regression, and learns what that cannot."""

import csv
import json
import re
import shutil
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.synthetic_brain import TR, VOLUMES, respond, write_melodies, z_scored_rows

import soundnet_port as sp
from soundnet_port.errors import SoundNetError
from soundnet_port.learning import encoding_finetune_loop
from soundnet_port.learning.encoding_data import Recording
from soundnet_port.learning.encoding_features import AlignedFeatures
from soundnet_port.learning.encoding_finetune_data import RunData
from soundnet_port.learning.encoding_finetune_run import FinetuneEncodingConfig
from soundnet_port.learning.encoding_finetuning import _build_models, finetune_encoding
from soundnet_port.learning.encoding_head import EncodingHead
from soundnet_port.learning.encoding_windows import TrunkWindows
from soundnet_port.learning.errors import EncodingError, TrainingError
from soundnet_port.network import gradients

OUTPUTS = 24
QUICK = FinetuneEncodingConfig(epochs=12, trunk_lr=0.01, lr=0.001)
ALPHAS = [10.0, 100.0, 1000.0]
SETTINGS = {"tr": TR, "test": "4", "config": QUICK, "alphas": ALPHAS, "device": "cpu"}


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    return write_melodies(tmp_path_factory.mktemp("sounds"))


def make_brain(network, sounds):
    """Return recordings of outputs that follow pool5 of a network, three volumes later."""
    generator = np.random.default_rng(0)
    rows = [z_scored_rows(network, path, "pool5") for path in sounds]
    mixing = generator.normal(size=(rows[0].shape[1], OUTPUTS))
    kernel = np.eye(1, 4, 3)[0]
    return [
        Recording(path, respond(own, mixing, kernel, 0.8, generator).astype(np.float32), str(number))
        for number, (path, own) in enumerate(zip(sounds, rows, strict=True))
    ]


@pytest.fixture(scope="module")
def brain(model, sounds):
    """Of a network whose conv4 and conv5 differ from the model's by as much as their weights vary."""
    other, generator = deepcopy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in ("conv4", "conv5"):
            weight = other.get_submodule(name).weight
            weight += weight.std() * torch.randn(weight.shape, generator=generator)
    return make_brain(other, sounds)


@pytest.fixture(scope="module")
def tuned(model, brain, tmp_path_factory):
    return finetune_encoding(brain, tmp_path_factory.mktemp("run"), weights=model, **SETTINGS)


def ridge_alone(model, brain, folder, **settings):
    config = FinetuneEncodingConfig(epochs=0)
    return finetune_encoding(brain, folder, weights=model, **SETTINGS | {"config": config} | settings)


# ---- windows


@pytest.mark.parametrize(
    ("layer", "frozen_blocks", "tr", "align", "offset"),
    [
        ("pool2", 0, 1.5, "center", 0.0),
        ("pool5", 3, 0.7, "end", 0.3),
        ("conv5", 4, 7.0, "center", 0.0),
        ("conv7", 5, 0.1, "center", 0.05),  # with an edge frame
    ],
)
@pytest.mark.parametrize("modules", [False, True], ids=["products", "modules"])
def test_windows_give_the_rows_of_the_whole_sound(
    layer, frozen_blocks, tr, align, offset, modules, model, sounds, monkeypatch
):
    if modules:  # as on a GPU
        monkeypatch.setattr(gradients, "fits", lambda *_: False)
    _, cut = _build_models(model, layer)
    rows, seconds = TrunkWindows(cut, frozen_blocks, tr, align).extract(sounds[0], offset)
    expected, expected_seconds = AlignedFeatures(model, [layer], tr, align).extract(sounds[0], offset)
    assert seconds == expected_seconds
    np.testing.assert_array_equal(np.isnan(rows[layer]), np.isnan(expected[layer]))
    # float32, in another order
    np.testing.assert_allclose(rows[layer], expected[layer], atol=1e-5 * np.nanmax(expected[layer]))


def test_gradients_of_windows_are_those_of_the_whole_sounds_rows(model, sounds):
    """The derivative along a direction, beside the difference of two networks' rows."""
    _, cut = _build_models(model, "pool5")
    generator = torch.Generator().manual_seed(0)
    names = ("conv4.weight", "conv5.weight", "conv5.bias")
    parameters = [cut.get_parameter(name).requires_grad_(True) for name in names]
    directions = [own.detach().std() * torch.randn(own.shape, generator=generator) for own in parameters]
    rows, _ = TrunkWindows(cut, 3, TR).window(sounds[0], 0.0, 20, 50)
    weights = torch.randn(rows.shape, generator=generator)
    (rows * weights).sum().backward()
    derivative = sum(
        float((own.grad * along).sum()) for own, along in zip(parameters, directions, strict=True)
    )
    sums, step = [], 1e-3
    for sign in (1, -1):
        moved = deepcopy(model)
        with torch.no_grad():
            for name, along in zip(names, directions, strict=True):
                moved.get_parameter(name).add_(sign * step * along)
        values = AlignedFeatures(moved, ["pool5"], TR).extract(sounds[0])[0]["pool5"][20:50]
        sums.append(float((torch.from_numpy(values) * weights).double().sum()))
    # the maxima of some windows of pooling are elsewhere after a step
    assert derivative == pytest.approx((sums[0] - sums[1]) / (2 * step), rel=0.02)


# ---- the start


@pytest.mark.parametrize("response", [{}, {"hrf": "glover"}, {"delays": [3], "align": "end"}], ids=str)
def test_before_any_step_it_is_encodes_ridge_regression(response, model, brain, tmp_path):
    result = ridge_alone(model, brain, tmp_path, **response)
    others = [own for own in brain if own.run != "3"]  # which is for validation
    expected = sp.fit_encoding_models(
        model, others, tr=TR, layers=["pool5"], alphas=ALPHAS, cache=False, **response
    )
    assert expected.folds[-1] == result.held_out == "4"
    for scores in (result.ridge, result.finetuned):
        # features by windows and by blocks differ by float32's rounding
        np.testing.assert_allclose(scores.correlation, expected.fold_correlation[0, -1], atol=1e-5)
        np.testing.assert_allclose(scores.r2, expected.fold_r2[0, -1], atol=1e-5)
    head = EncodingHead.load(result.head)
    np.testing.assert_array_equal(head.alpha, expected.alpha[0, -1])
    assert result.epoch == 0


def test_the_ridge_solution_is_the_minimum_of_what_the_head_is_trained_on(
    model, brain, tmp_path, monkeypatch
):
    """Its gradient over all windows of an epoch vanishes beside that of a head a hundredth smaller."""
    gradient = []

    def collect(loop):
        for factor in (1.0, 0.99):
            head, total = loop.network.head, 0
            with torch.no_grad():
                head.mul_(factor)
            windows = loop.data.draw_windows(np.random.default_rng(0))
            volumes = len(loop.data.targets["training"])
            for window in windows:
                target = loop.data.window_targets(window)
                error = (loop.data.window_predictors(window) @ head - target).square().sum()
                total = total + error / target.shape[1] / volumes
            total = total + (head.square().sum(0) * loop.penalty).mean()
            gradient.append(float(torch.autograd.grad(total, head)[0].norm()))
        raise KeyboardInterrupt

    monkeypatch.setattr(encoding_finetune_loop.EncodingLoop, "_train_epoch", collect)
    with pytest.raises(KeyboardInterrupt):
        finetune_encoding(brain, tmp_path, weights=model, **SETTINGS)
    assert gradient[0] < 1e-3 * gradient[1]


# ---- training


def test_training_improves_on_ridge_where_the_trunk_differs(tuned):
    """Ridge reaches 0.57 of the 0.89 that the noise leaves."""
    gain = tuned.finetuned.correlation - tuned.ridge.correlation
    # with 80 volumes of noise the standard error of the mean over outputs is below 0.01
    assert gain.mean() > 0.03
    assert tuned.finetuned.loss < tuned.ridge.loss
    assert tuned.epoch > 0


def test_where_ridge_is_right_training_does_not_get_worse(model, sounds, tmp_path):
    result = finetune_encoding(make_brain(model, sounds), tmp_path, weights=model, **SETTINGS)
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    losses = [float(row["validation loss"]) for row in rows]
    assert result.epoch == np.argmin(losses)  # 0, the ridge solution, is one of these
    assert (result.finetuned.correlation - result.ridge.correlation).mean() > -0.005


def test_the_trunk_is_a_network_like_others_and_changes_where_it_is_trained(tuned, model, brain):
    network = sp.load_pretrained(tuned.weights)
    assert network.architecture == model.architecture.resized(model.architecture.widths, {})
    state = model.state_dict()
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, state[name])}
    assert changed == {"conv4.weight", "conv4.bias", "conv5.weight", "conv5.bias"}
    correlations = [
        sp.fit_encoding_models(
            own, brain, tr=TR, layers=["pool5"], alphas=ALPHAS, cache=False
        ).fold_correlation[0, 4]
        for own in (model, network)
    ]
    assert (correlations[1] - correlations[0]).mean() > 0.03


def test_the_head_predicts_a_run_that_was_held_out(tuned, model, brain):
    network, head = sp.load_pretrained(tuned.weights), sp.EncodingHead.load(tuned.head)
    assert head.weights.shape == (OUTPUTS, 4, 16)
    assert (head.delays, head.tr, head.layer) == ((2, 3, 4, 5), TR, "pool5")
    predicted = head.predict(network, brain[4].sound)
    correlation = [np.corrcoef(*pair)[0, 1] for pair in zip(predicted.T, brain[4].targets.T, strict=True)]
    np.testing.assert_allclose(correlation, tuned.finetuned.correlation, atol=1e-5)
    with pytest.raises(EncodingError, match="conv3 has 4 channels, where the head has 16"):
        replace(head, layer="conv3").predict(network, brain[4].sound)
    with pytest.raises(EncodingError, match="the network is not the one that was trained with this head"):
        head.predict(model, brain[4].sound)


def test_files_of_a_run(tuned):
    names = {path.name for path in tuned.folder.iterdir()}
    arrays = {f"{prefix}{name}.npy" for prefix in ("finetuned_", "ridge_") for name in ("correlation", "r2")}
    assert names == arrays | {"weights.safetensors", "head.npz", "result.json", "log.csv", "curves.png"}
    about = json.loads((tuned.folder / "result.json").read_text())
    assert about["settings"]["delays"] == [2, 3, 4, 5]
    assert about["finetuned"]["median_correlation"] == np.median(tuned.finetuned.correlation)


def test_a_resumed_run_gives_the_numbers_of_an_uninterrupted_one(tuned, model, brain, tmp_path, one_thread):
    def train_until(epochs):
        def stop(progress):
            if progress.unit == "epoch" and progress.done == epochs and progress.note:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            finetune_encoding(brain, tmp_path, weights=model, progress=stop, **SETTINGS)

    train_until(0)
    train_until(3)
    reports = []
    again = finetune_encoding(brain, tmp_path, weights=model, progress=reports.append, **SETTINGS)
    assert [own.done for own in reports if own.unit == "epoch"] == list(range(3, QUICK.epochs + 1))
    expected = (tuned.folder / "log.csv").read_text().splitlines()
    resumed = (tmp_path / "log.csv").read_text().splitlines()
    assert len(resumed) == len(expected) == 1 + 1 + QUICK.epochs
    for line, own in zip(expected[1:], resumed[1:], strict=True):
        assert [float(x) for x in own.split(",")] == pytest.approx(
            [float(x) for x in line.split(",")], rel=1e-4
        )
    np.testing.assert_allclose(again.finetuned.correlation, tuned.finetuned.correlation, atol=1e-4)


def test_trunk_and_head_stay_a_pair_where_a_run_is_killed_between_their_files(model, brain, tmp_path):
    """Resuming must not keep the weights of one attempt beside the head of another."""

    def kill(*_):
        raise KeyboardInterrupt

    settings = SETTINGS | {"config": replace(QUICK, epochs=2)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EncodingHead, "save", kill)
        with pytest.raises(KeyboardInterrupt):
            finetune_encoding(brain, tmp_path, weights=model, **settings)
    (tmp_path / "weights.safetensors").write_bytes(b"of another epoch")
    result = finetune_encoding(brain, tmp_path, weights=model, **settings)
    predicted = EncodingHead.load(result.head).predict(sp.load_pretrained(result.weights), brain[4].sound)
    correlation = [np.corrcoef(*pair)[0, 1] for pair in zip(predicted.T, brain[4].targets.T, strict=True)]
    np.testing.assert_allclose(correlation, result.finetuned.correlation, atol=1e-5)


def test_results_of_encode_are_not_written_over(model, brain, tmp_path):
    (tmp_path / "encoding.json").write_text("{}")
    np.save(tmp_path / "correlation.npy", np.zeros((7, OUTPUTS)))
    with pytest.raises(TrainingError, match="holds results of encode; choose another folder"):
        ridge_alone(model, brain, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def damage(name, text):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (damage("result.json", "[]"), "result.json: not the result of a run; remove it to start over"),
        (damage("result.json", '{"settings": {}}'), "holds another kind of run; use another folder"),
        (lambda folder: remove_key(folder, "epoch"), "result.json: damaged (no 'epoch'); remove it"),
        (lambda folder: (folder / "head.npz").unlink(), "head.npz: does not exist; remove result.json to"),
        (damage("ridge_r2.npy", "nonsense"), "ridge_r2.npy: cannot be used"),
        (
            lambda folder: np.save(folder / "finetuned_r2.npy", np.zeros((7, OUTPUTS))),
            "finetuned_r2.npy: cannot be used (float64 (7, 24), not one number per output)",
        ),
    ],
    ids=["list", "classes", "key", "head", "array", "shape"],
)
def test_a_damaged_result_says_so(change, error, tuned, model, brain, tmp_path):
    folder = shutil.copytree(tuned.folder, tmp_path / "run")
    change(folder)
    with pytest.raises(TrainingError, match=re.escape(error)):
        finetune_encoding(brain, folder, weights=model, **SETTINGS)


def remove_key(folder, key):
    result = json.loads((folder / "result.json").read_text())
    del result[key]
    (folder / "result.json").write_text(json.dumps(result))


def test_a_failed_start_leaves_no_folder_and_a_file_is_no_folder(model, brain, tmp_path):
    with pytest.raises(
        EncodingError, match="pool5: no predictor varies in the training runs; see the sounds"
    ):
        ridge_alone(model, brain, tmp_path / "run", delays=[VOLUMES + 5])
    assert not (tmp_path / "run").exists()
    (tmp_path / "runs.tsv").write_text("file\ttargets\n")
    with pytest.raises(TrainingError, match=r"runs\.tsv: is a file, not a folder"):
        ridge_alone(model, brain, tmp_path / "runs.tsv")


def test_a_finished_run_is_only_read_and_others_are_refused(tuned, model, brain):
    before = tuned.weights.stat().st_mtime_ns
    again = finetune_encoding(brain, tuned.folder, weights=model, **SETTINGS)
    assert tuned.weights.stat().st_mtime_ns == before
    np.testing.assert_array_equal(again.ridge.r2, tuned.ridge.r2)
    with pytest.raises(
        TrainingError, match=r"holds a run with other settings \(layer pool5 there, conv4 now"
    ):
        finetune_encoding(brain, tuned.folder, weights=model, layer="conv4", **SETTINGS)


def test_training_stops_where_patience_ends(model, brain, tmp_path):
    config = replace(QUICK, lr=0.3, patience=2)  # too large
    result = finetune_encoding(brain, tmp_path, weights=model, **SETTINGS | {"config": config})
    assert (result.epoch, len((tmp_path / "log.csv").read_text().splitlines())) == (0, 4)
    assert "no epoch improved on the ridge solution in the validation runs; it is kept" in result.notes
    np.testing.assert_allclose(result.finetuned.correlation, result.ridge.correlation, atol=1e-6)


# ---- recordings


def test_text_and_numbers_of_numpy_are_accepted_as_in_encode(model, brain, tmp_path):
    settings = {
        "tr": np.float32(TR),
        "edge_frames": np.bool_(True),
        "test": 4,
        "validation": np.int64(3),
        "delays": [np.int64(3)],
        "config": FinetuneEncodingConfig(epochs=np.int64(0), lr=np.float32(0.5), seconds=60),
    }
    texts = [replace(own, sound=str(own.sound)) for own in brain]
    result = ridge_alone(model, texts, tmp_path, **settings)
    assert (result.part, result.held_out) == ("test", "4")
    about = json.loads((tmp_path / "result.json").read_text())["settings"]
    assert (about["tr"], about["edge_frames"], about["validation"]) == (TR, True, "3")
    assert (about["tuning"]["lr"], about["tuning"]["epochs"]) == (0.5, 0)
    with pytest.raises(TrainingError, match=r"epochs must be a whole number, not 1\.5"):
        FinetuneEncodingConfig(epochs=1.5)


def test_caveats_are_reported_before_training(model, brain, tmp_path):
    reports = []
    changed = [replace(brain[0], onset=10 * TR), *brain[1:]]
    result = ridge_alone(model, changed, tmp_path, progress=reports.append)
    messages = {own.message: own.unit for own in reports if own.message}
    caveat = next(note for note in result.notes if "volumes left out" in note)
    assert messages[caveat] == "sound"
    assert next(own.unit for own in reports[::-1] if own.message) == "epoch"  # after it


def test_runs_and_stimuli_are_held_out_as_a_whole(model, brain, tmp_path):
    targets = brain[0].targets.copy()
    targets[:, 2] = 1  # constant
    repeated = [
        replace(brain[0], targets=targets),
        *brain[1:],
        replace(brain[4], run="5"),
        replace(brain[3], run="6"),
    ]
    data = {}
    original = RunData.__init__

    def keep(self, run, progress):
        original(self, run, progress)
        data.update(members=self.members, folds=run.folds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunData, "__init__", keep)
        result = ridge_alone(model, repeated, tmp_path, validation="6")
    assert data["members"] == {"training": [0, 1, 2], "validation": [3, 6], "test": [4, 5]}
    assert data["folds"][:3] == [0, 1, 2]
    assert result.held_out == "4, 5"
    assert np.isnan(result.ridge.correlation).nonzero()[0].tolist() == [2]
    assert "1 of 24 outputs are constant or NaN in a run; left out" in result.notes
    assert np.isnan(EncodingHead.load(result.head).weights[:, 0, 0]).nonzero()[0].tolist() == [2]


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"test": "9"}, "test: no run '9'; choose from 0, 1, 2, 3, 4"),
        ({"validation": "4"}, "validation: run '4' is the test run, or shares its stimulus"),
        ({"layer": "conv9"}, "layer: no 'conv9' in the trunk; choose from conv1, pool1,"),
        (
            {"layer": "conv4", "frozen": "conv4"},
            "frozen: 'conv4' is no layer below conv4; choose from pool1,",
        ),
        ({"align": "left"}, "unknown align 'left'; choose from center, end"),
        ({"tr": 0.0}, "tr: must be 0.001 to 3600 seconds"),
        ({"hrf": "glover", "delays": [1]}, "delays and hrf: choose one of them"),
        ({"alphas": [0.0]}, "alphas: positive numbers"),
        ({"precision": "8-true"}, "unknown precision '8-true'"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_used_say_why(settings, error, model, brain, tmp_path):
    with pytest.raises(SoundNetError, match=error):
        finetune_encoding(brain, tmp_path / "run", weights=model, **SETTINGS | settings)
    assert not (tmp_path / "run").exists()


def test_two_runs_are_too_few_for_three_parts(model, brain, tmp_path):
    with pytest.raises(EncodingError, match="2 independent runs; 3 are needed, one for training"):
        finetune_encoding(brain[3:], tmp_path, weights=model, **SETTINGS)
    result = ridge_alone(model, brain[3:], tmp_path, test=None)  # penalties from thirds of the only run
    assert result.held_out == "4"
    assert result.finetuned.correlation.mean() > 0.2


def test_a_trunk_that_is_cut_off_is_refused(brain, tmp_path):
    narrow = sp.SOUNDNET8.resized([4] * 7, {}).with_classes(3, "conv6")
    with pytest.raises(TrainingError, match="weights: a trunk of 6 blocks, fine-tuned to classes"):
        finetune_encoding(brain, tmp_path, weights=sp.SoundNet(narrow), **SETTINGS)


def test_a_head_that_cannot_be_read_says_so(tmp_path):
    (tmp_path / "head.npz").write_bytes(b"nonsense")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    flat = EncodingHead(np.zeros(3, np.float32), np.ones(3, np.float32), "pool5", 2.0, "center", False, (1,))
    flat.save(tmp_path / "flat.npz")
    errors = {"head": "not the head", "other": "not the head", "flat": "not the head", "none": "No such file"}
    for name, error in errors.items():
        with pytest.raises(EncodingError, match=error):
            EncodingHead.load(tmp_path / f"{name}.npz")
