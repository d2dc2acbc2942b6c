"""Evaluation: the original's windows and SVM, no leak from test folds, results, the command line."""

import json

import numpy as np
import pytest
import soundfile
import torch
from support.networks import NETS, model_of

pytest.importorskip("sklearn", reason="needs the extra [learn]")

import scipy.optimize
import sklearn.linear_model
import sklearn.pipeline
import sklearn.preprocessing

import soundnet_port as sp
from soundnet_port.audio.loudness import normalize
from soundnet_port.cli.main import main
from soundnet_port.learning import evaluation
from soundnet_port.learning.classifiers import (
    ALPHAS,
    PAPER_C,
    PooledClassifier,
    compute_decision_values,
    fit_pooled_classifier,
    fit_window_svm,
    make_windows,
)
from soundnet_port.learning.datasets import read_labeled
from soundnet_port.learning.errors import EvaluationError
from soundnet_port.learning.evaluation import evaluate
from soundnet_port.learning.evaluation_results import format_confusion, write_evaluation
from soundnet_port.learning.protocol_features import ModernFeatures, PaperFeatures, modern_layers
from soundnet_port.network.architecture import SOUNDNET5, SOUNDNET8
from soundnet_port.network.weights import write_weights


@pytest.fixture(scope="module")
def model():
    """A network with two channels in its first layer, enough to classify tones."""
    return model_of(NETS["n8_d8"])


TONES = {"low": 300, "middle": 1500, "high": 5000}
FOLDS = "123"


def write_tones(folder, rate=22_050, seconds=0.5):
    """Write two clips of each tone in each of three folds, and return their list."""
    random = np.random.default_rng(0)
    folder.mkdir()
    lines = []
    for label, pitch in TONES.items():
        for fold in FOLDS:
            for take in "ab":
                time = np.arange(round(rate * seconds)) / rate
                samples = 0.5 * np.sin(2 * np.pi * (pitch * time + random.random()))
                samples += 0.01 * random.standard_normal(len(time))
                soundfile.write(folder / f"{label}{fold}{take}.wav", samples, rate)
                lines.append(f"{label}{fold}{take}.wav\t{label}\t{fold}\n")
    (folder / "list.tsv").write_text("".join(lines))
    return folder / "list.tsv"


@pytest.fixture
def tones(tmp_path):
    return write_tones(tmp_path / "tones")


@pytest.fixture
def weights(tmp_path):
    net = NETS["n8_d8"]
    path = tmp_path / "small.safetensors"
    state = {name: tensor for name, tensor in model_of(net).state_dict().items() if "batches" not in name}
    write_weights(path, net.architecture, state, {})
    return str(path)


def overlapping(count=60, channels=12, classes=3, seed=1):
    """Draw examples of classes that no plane separates, with different means."""
    random = np.random.default_rng(seed)
    targets = np.arange(count) % classes
    means = random.standard_normal((classes, channels))
    return np.float32(means[targets] + random.standard_normal((count, channels))), targets


# ---- the original's protocol


def test_ten_seconds_are_27_frames_of_pool5_and_25_windows_of_3(model, tones):
    assert SOUNDNET8.frames("pool5", 220_500) == 27
    frames, seconds = PaperFeatures(model, "pool5", "paper").extract(tones.parent / "low1a.wav")
    assert (len(frames), seconds) == (27, 0.5)
    assert make_windows(frames, 3).shape == (25, 3 * frames.shape[1])


def test_windows_are_flattened_as_by_torch_and_negative_values_become_0():
    frames = np.array([[1, -2], [3, 4], [5, 6]], np.float32)
    expected = torch.from_numpy(frames.T)[:, 0:2].reshape(-1).clamp(min=0)
    assert make_windows(frames, 2)[0].tolist() == expected.tolist() == [1, 3, 0, 4]
    assert len(make_windows(frames, 2)) == 2


def test_the_paper_protocol_doubles_repeats_and_cuts_sounds(model, tones):
    path = tones.parent / "high1a.wav"
    samples = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
    with torch.no_grad():
        expected = model.extract(samples.repeat(22)[:220_500] * 512, ["pool5"])["pool5"][0].T
    features, _ = PaperFeatures(model, "pool5", "paper").extract(path)
    # the engine computes these in another order
    np.testing.assert_allclose(features, expected, atol=1e-5 * float(expected.abs().max()))


def test_scenes_are_used_in_full_in_windows_of_a_sixth(model, tmp_path):
    tones = write_tones(tmp_path / "scenes", seconds=6)
    result = evaluate(model, tones, protocol="paper-dcase", cache=False)
    assert result.accuracy == 1
    frames, _ = PaperFeatures(model, "pool5", "paper-dcase").extract(tmp_path / "scenes/low1a.wav")
    assert len(frames) == model.architecture.frames("pool5", 6 * 22_050)


def test_without_resampling_ten_seconds_count_at_the_files_own_rate(model, tmp_path):
    tones = write_tones(tmp_path / "tones44", rate=44_100)
    frames, _ = PaperFeatures(model, "pool5", "paper", resample=False).extract(tones.parent / "low1a.wav")
    assert len(frames) == model.architecture.frames("pool5", 441_000)


def objective(weights, signs, examples, c):
    """Compute that of liblinear -s 1 and -s 2: the bias is a regularized weight of a constant 1."""
    slack = np.maximum(0, 1 - signs * (examples @ weights))
    value = weights @ weights / 2 + c * (slack @ slack)
    return value, weights - 2 * c * (examples.T @ (signs * slack))


def test_the_svm_solves_liblinears_problem():
    examples, targets = overlapping()
    frames = [example[None] for example in np.abs(examples)]  # windows of one frame
    classifier, converged = fit_window_svm(frames, targets, 1)
    assert converged
    data = np.hstack([np.abs(examples), np.ones((len(examples), 1))]).astype(np.float64)
    exact = np.stack(
        [
            scipy.optimize.minimize(
                objective,
                np.zeros(data.shape[1]),
                (np.where(targets == target, 1.0, -1.0), data, PAPER_C),
                jac=True,
                method="L-BFGS-B",
                options={"ftol": 1e-15, "gtol": 1e-10, "maxiter": 10_000},
            ).x
            for target in range(3)
        ]
    )
    # liblinear stops when no example's gradient in the dual is off by more than 0.1 of the margin 1
    np.testing.assert_allclose(
        compute_decision_values(classifier, np.abs(examples)), data @ exact.T, atol=0.1
    )
    exact_classifier = classifier.set_params(tol=1e-8, max_iter=100_000).fit(np.abs(examples), targets)
    np.testing.assert_allclose(
        compute_decision_values(exact_classifier, np.abs(examples)), data @ exact.T, atol=1e-5
    )


def test_the_svm_is_liblinears():
    liblinear = pytest.importorskip("liblinear.liblinearutil", reason="needs liblinear-official")
    examples, targets = overlapping()
    classifier, _ = fit_window_svm([example[None] for example in np.abs(examples)], targets, 1)
    reference = liblinear.train(targets.tolist(), np.abs(examples), "-s 1 -c 0.01 -B 1 -q")
    _, _, values = liblinear.predict(targets.tolist(), np.abs(examples), reference, "-q")
    order = np.argsort(reference.get_labels())
    # both within liblinear's tolerance of the optimum, in random orders of their own
    ours = compute_decision_values(classifier, np.abs(examples))
    np.testing.assert_allclose(ours, np.array(values)[:, order], atol=0.05)


def test_two_classes_have_two_decision_values():
    examples, targets = overlapping(classes=2)
    classifier, _ = fit_window_svm([example[None] for example in np.abs(examples)], targets, 1)
    values = compute_decision_values(classifier, np.abs(examples))
    assert values.shape == (60, 2)
    assert (classifier.predict(np.abs(examples)) == values.argmax(1)).all()


# ---- folds


@pytest.mark.parametrize("protocol", ["modern", "paper"])
def test_tones_are_classified(model, tones, protocol):
    result = evaluate(model, tones, protocol=protocol, cache=False)
    assert result.accuracies == (1, 1, 1)
    assert (result.accuracy, result.std) == (1, 0)
    assert [(fold.name, fold.train, fold.test) for fold in result.folds] == [(name, 12, 6) for name in FOLDS]
    assert result.confusion.tolist() == [[6, 0, 0], [0, 6, 0], [0, 0, 6]]
    assert result.classes == ("high", "low", "middle")
    json.dumps(result.to_dict())


def test_test_sounds_do_not_influence_training(model, tones, monkeypatch):
    fitted = []

    def spy(*arguments):
        classifier = fit_pooled_classifier(*arguments)
        fitted.append((classifier.weight, classifier.mean, classifier.alpha))
        return classifier

    monkeypatch.setattr(evaluation, "fit_pooled_classifier", spy)
    evaluate(model, tones, cache=False)
    random = np.random.default_rng(2)
    for path in tones.parent.glob("*1?.wav"):  # fold 1 becomes noise
        soundfile.write(path, random.uniform(-1, 1, 11_025), 22_050)
    evaluate(model, tones, cache=False)
    before, after = fitted[0], fitted[3]
    assert (before[0] == after[0]).all()
    assert (before[1] == after[1]).all()
    assert before[2] == after[2]
    assert (fitted[1][0] != fitted[4][0]).any()  # fold 2's classifier is trained on fold 1


def test_the_penalty_is_chosen_with_whole_folds_left_out(monkeypatch):
    examples, targets = overlapping()
    groups = ["1"] * 20 + ["2"] * 20 + ["3"] * 20
    test_sizes = []
    decide = PooledClassifier.decide
    monkeypatch.setattr(
        PooledClassifier,
        "decide",
        lambda self, features: test_sizes.append(len(features)) or decide(self, features),
    )
    classifier = fit_pooled_classifier(examples[:, None], [12], targets, groups, "4")
    assert classifier.alpha in ALPHAS
    assert test_sizes == [20] * 3 * len(ALPHAS)


@pytest.mark.parametrize("count", [12, 300])  # fewer and more features than rows
def test_the_pooled_classifier_is_ridge_regression(count):
    examples, targets = overlapping(channels=count)
    examples[:, 3] = 5  # constant: counts for nothing
    levels = np.stack([examples, examples * 0.5], 1)
    classifier = fit_pooled_classifier(levels, [4, count - 4], targets, [""] * 60, "1")
    rows = np.sign(levels) * np.sqrt(np.abs(levels.astype(np.float64)))
    pipeline = sklearn.pipeline.make_pipeline(
        sklearn.preprocessing.StandardScaler(),
        sklearn.preprocessing.FunctionTransformer(
            lambda x: x / np.repeat(np.sqrt([2 * 4, 2 * (count - 4)]), [4, count - 4])
        ),
        sklearn.linear_model.Ridge(classifier.alpha),
    )
    signs = np.where(targets[:, None] == np.arange(3), 1.0, -1.0)
    pipeline.fit(rows.reshape(120, -1), np.repeat(signs, 2, axis=0))
    expected = pipeline.predict(rows.reshape(120, -1)).reshape(60, 2, 3).mean(1)
    # both solve in float64, in another order
    np.testing.assert_allclose(classifier.decide(levels), expected, rtol=0, atol=1e-9)


def test_without_folds_five_are_made_always_the_same(model, tmp_path, tones):
    text = tones.read_text().replace("\t1\n", "\n").replace("\t2\n", "\n").replace("\t3\n", "\n")
    tones.write_text(text)
    one = evaluate(model, tones, cache=tmp_path / "cache")
    two = evaluate(model, tones, cache=tmp_path / "cache")
    assert len(one.folds) == 5
    assert one.predictions == two.predictions
    assert "the data set has no folds; 5 stratified ones were made" in one.notes[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"protocol": "papers"}, "unknown protocol 'papers'; choose from modern, paper"),
        ({"pool": "median"}, "unknown pooling 'median'"),
        ({"layers": ["pool9"]}, "layers: .*pool9"),
        ({"layers": "pool5"}, r"layers must be a list, such as \['pool5'\]"),
        ({"layers": []}, "modern takes one layer, not 0"),
        ({"layers": ["conv4", "pool5"], "protocol": "paper"}, "paper takes one layer, not 2"),
        ({"resample": False}, "modern always resamples"),
    ],
)
def test_invalid_settings_are_refused(model, tones, settings, message):
    with pytest.raises(EvaluationError, match=message):
        evaluate(model, tones, cache=False, **settings)


def test_a_class_that_is_only_tested_is_refused(model, tones):
    lines = [line for line in tones.read_text().splitlines() if "high" not in line or line.endswith("1")]
    tones.write_text("\n".join(lines))
    with pytest.raises(EvaluationError, match="fold 1: no training sounds of high"):
        evaluate(model, tones, cache=False)


def test_progress_counts_sounds_and_says_which_cannot_be_used(model, tones):
    (tones.parent / "low1a.wav").write_text("no sound")
    reports = []
    evaluate(model, tones, cache=False, progress=reports.append)
    assert [(report.done, report.total, report.unit) for report in reports] == [
        (done, 18, "file") for done in range(1, 19)
    ]
    assert [report.message.partition(": ")[0] for report in reports if report.message] == [
        str(tones.parent / "low1a.wav")
    ]


# ---- cached features


def test_features_are_computed_once_for_each_content_network_and_setting(model, tones, tmp_path, monkeypatch):
    computed = []
    real = ModernFeatures._compute
    monkeypatch.setattr(
        ModernFeatures, "_compute", lambda self, path: computed.append(path) or real(self, path)
    )
    cache = tmp_path / "cache"
    first = evaluate(model, tones, cache=cache)
    assert len(computed) == 18
    (tones.parent / "low1a.wav").rename(tones.parent / "renamed.wav")
    tones.write_text(tones.read_text().replace("low1a", "renamed"))
    second = evaluate(model, tones, cache=cache)
    assert len(computed) == 18
    assert [prediction.decision_values for prediction in first.predictions] == [
        prediction.decision_values for prediction in second.predictions
    ]

    entries = sorted(cache.glob("*/*.npz"))
    assert len(entries) == 18
    entries[0].write_bytes(entries[0].read_bytes()[:-50])
    damaged = bytearray(entries[1].read_bytes())
    damaged[200] ^= 1  # among the features
    entries[1].write_bytes(damaged)
    entries[2].write_bytes(b"")
    third = evaluate(model, tones, cache=cache)
    assert len(computed) == 21
    assert [prediction.decision_values for prediction in first.predictions] == [
        prediction.decision_values for prediction in third.predictions
    ]

    evaluate(model, tones, layers=["conv4"], cache=cache)
    evaluate(model_of(NETS["n8_d16"]), tones, cache=cache)
    assert len(computed) == 57
    assert not list(cache.rglob("*.part"))


def test_a_cache_that_cannot_be_written_does_not_stop_an_evaluation(model, tones, tmp_path):
    (tmp_path / "file").write_text("")
    result = evaluate(model, tones, cache=tmp_path / "file")
    assert result.accuracy == 1
    assert any("features are not cached" in note for note in result.notes)


# ---- edge frames


@pytest.mark.parametrize("edge_frames", [False, True])
def test_modern_hears_two_speeds_and_three_levels(model, tones, edge_frames):
    """Sounds too short for a layer, or for an ordinary frame, are repeated: conv7 needs 12,766 samples."""
    path = tones.parent / "low1a.wav"
    keys = ["conv4", "conv7"]
    features, seconds = ModernFeatures(model, keys, "mean+max+std", edge_frames=edge_frames).extract(path)
    assert (features.shape, seconds) == ((3, 2 * 3 * (16 + 128)), 0.5)
    at = 0
    for speed in (1, 2):
        waveform = sp.load_audio(path, sample_rate=22_050 * speed)
        waveform = waveform.repeat(2 if speed == 1 and not edge_frames else 1)
        for level, version in enumerate((waveform, waveform / 4, normalize(waveform))):
            frames = model.extract(version, keys)
            offset = at
            for key in keys:
                rows = frames[key][0].T.double()
                if not edge_frames:
                    rows = rows[: len(rows) - model.edge_frames(key, len(version))]
                expected = torch.cat([rows.mean(0), rows.amax(0), rows.std(0, correction=0)])
                part = features[level, offset : offset + len(expected)]
                # pooled in float64; the waveforms are the same, but for normalize's rounding
                np.testing.assert_allclose(part, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
                offset += len(expected)
        at = offset


def test_modern_leaves_edge_frames_out_by_default(model, tones):
    for edge_frames in (False, True):
        result = evaluate(model, tones, layers=["pool5"], edge_frames=edge_frames, cache=False)
        assert not result.edge_frames  # pool5 has none
        assert result.title == "pool5, modern"


@pytest.mark.parametrize("protocol", ["paper", "paper-dcase"])
def test_the_paper_protocols_include_all_frames(model, tmp_path, protocol):
    tones = write_tones(tmp_path / "scenes", seconds=6)
    features, _ = PaperFeatures(model, "conv7", protocol).extract(tmp_path / "scenes/low1a.wav")
    assert len(features) == model.architecture.frames("conv7", (10 if protocol == "paper" else 6) * 22_050)
    result = evaluate(model, tones, layers=["conv7"], protocol=protocol, cache=False)
    assert result.edge_frames
    assert result.to_dict()["edge_frames"]
    assert result.title == f"conv7, {protocol}, with edge frames"


def test_only_features_without_edge_frames_have_an_extra_cache_setting(model):
    for layer in ("pool5", "conv6", "conv7", 22, "objects"):
        with_them, without = (
            json.loads(ModernFeatures(model, [layer], "mean", edge_frames=edge_frames).settings)
            for edge_frames in (True, False)
        )
        assert without == with_them | ({} if layer in ("pool5", "conv6") else {"edge_frames": False})
        assert "edge_frames" not in json.loads(PaperFeatures(model, layer, "paper").settings)


def test_modern_takes_the_default_layer_and_its_neighbors():
    assert modern_layers(SOUNDNET8) == ("conv4", "pool5", "conv6")
    assert modern_layers(SOUNDNET5) == ("pool2", "pool3", "conv4")
    assert modern_layers(SOUNDNET8.with_classes(3, "conv4", 1)) == ("conv4",)
    assert modern_layers(SOUNDNET8.with_classes(3, "conv2", 1)) == ("conv2",)


# ---- results and the command line


def test_results_are_printed_and_written(tones, weights, tmp_path, capsys):
    out, cache = tmp_path / "out", str(tmp_path / "cache")
    assert main(["evaluate", str(tones), "-w", weights, "-o", str(out), "--cache", cache]) == 0
    printed = capsys.readouterr().out
    assert "fold 1: 100.0% of 6 sounds, alpha " in printed
    assert "conv4+pool5+conv6, modern: 100.0%, std over folds 0.0%" in printed
    assert json.loads((out / "evaluation.json").read_text())["accuracy"] == 1
    rows = [line.split("\t") for line in (out / "predictions.tsv").read_text().splitlines()]
    assert rows[0] == ["fold", "file", "label", "predicted", "high", "low", "middle"]
    assert len(rows) == 19
    assert all(row[2] == row[3] == rows[0][4 + int(np.argmax(list(map(float, row[4:]))))] for row in rows[1:])
    assert (out / "confusion.png").read_bytes()[1:4] == b"PNG"

    assert main(["evaluate", str(tones), "-w", weights, "-o", str(out), "--cache", cache]) == 2
    assert "already has an evaluation; use --force" in capsys.readouterr().err
    assert main(["evaluate", str(tones), "-w", weights, "--json", "--cache", cache]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["confusion"] == [[6, 0, 0], [0, 6, 0], [0, 0, 6]]
    assert result["edge_frames"] is False


def test_the_command_line_includes_edge_frames_and_says_so(tmp_path, weights, capsys):
    tones = str(write_tones(tmp_path / "tones", seconds=0.7))
    for extra, message in (([], "conv7, modern: "), (["--edge-frames"], "conv7, modern, with edge frames: ")):
        command = ["evaluate", tones, "-w", weights, "-l", "conv7", "--no-cache", *extra]
        assert main(command) == 0
        assert f"\n{message}" in capsys.readouterr().out


def test_a_bad_sound_is_reported_and_left_out(tones, weights, capsys):
    (tones.parent / "low1a.wav").write_text("no sound")
    assert main(["evaluate", str(tones), "-w", weights, "--no-cache", "--json"]) == 1
    printed = capsys.readouterr()
    assert "low1a.wav: " in printed.err
    result = json.loads(printed.out)
    assert sum(fold["test"] for fold in result["folds"]) == 17
    assert [failure["path"].endswith("low1a.wav") for failure in result["failures"]] == [True]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--layers", "99"], "layers: "),
        (["--cache", "x", "--no-cache"], "exclude each other"),
        (["--no-resample"], "modern always resamples"),
        (["--esc10"], "no esc10 column"),
        (["-w", "nothing"], "nothing"),
    ],
)
def test_misuse_is_a_line_and_exit_code_2(tones, weights, capsys, extra, message):
    cache = [] if "--cache" in extra else ["--no-cache"]
    assert main(["evaluate", str(tones), "-w", weights, *cache, *extra]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


def test_the_confusion_matrix_has_true_classes_in_rows(model, tones):
    result = evaluate(model, read_labeled(tones), cache=False)
    assert format_confusion(result).splitlines()[1:3] == [
        "  1 high    6  .  . 100.0%",
        "  2 low     .  6  . 100.0%",
    ]
    assert len(write_evaluation(result, tones.parent / "out")) == 3
