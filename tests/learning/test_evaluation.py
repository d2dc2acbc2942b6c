"""Evaluation: the original's windows and SVM, no leak from test folds, kept features, the command line."""

import json

import numpy as np
import pytest
import soundfile
import torch
from support.networks import NETS, model_of

pytest.importorskip("sklearn", reason="needs the extra [learn]")

import scipy.optimize
import sklearn.svm

import soundnet_port as sp
from soundnet_port.cli.main import main
from soundnet_port.learning import evaluation
from soundnet_port.learning.datasets import read_labeled
from soundnet_port.learning.evaluation import (
    EvaluationError,
    decisions,
    evaluate,
    learn_pooled,
    learn_windows,
    table,
    windows,
    write_evaluation,
)
from soundnet_port.network.architecture import SOUNDNET8
from soundnet_port.network.weights import write_weights


@pytest.fixture(scope="module")
def model():
    """With two channels in its first layer, enough to tell tones apart."""
    return model_of(NETS["n8_d8"])


TONES = {"low": 300, "middle": 1500, "high": 5000}
FOLDS = "123"


def tones(folder, rate=22_050, seconds=0.5):
    """Two clips of each tone in each of three folds, and their list."""
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
def listed(tmp_path):
    return tones(tmp_path / "tones")


@pytest.fixture
def weights(tmp_path):
    net = NETS["n8_d8"]
    path = tmp_path / "small.safetensors"
    state = {name: each for name, each in model_of(net).state_dict().items() if "batches" not in name}
    write_weights(path, net.architecture, state, {})
    return str(path)


def overlapping(count=60, channels=12, classes=3, seed=1):
    """Examples of classes that no plane separates, with means that differ."""
    random = np.random.default_rng(seed)
    targets = np.arange(count) % classes
    means = random.standard_normal((classes, channels))
    return np.float32(means[targets] + random.standard_normal((count, channels))), targets


# ---- the original's protocol


def test_ten_seconds_are_27_frames_of_pool5_and_25_windows_of_3(model, listed):
    assert SOUNDNET8.frames("pool5", 220_500) == 27
    listening = evaluation.Listening(
        model, "pool5", model.architecture.layer("pool5"), "paper", None, True, "auto", None
    )
    frames, seconds = listening.to(listed.parent / "low1a.wav")
    assert (len(frames), seconds) == (27, 0.5)
    assert windows(frames, 3).shape == (25, 3 * frames.shape[1])


def test_windows_are_flattened_as_torch_does_and_keep_what_is_positive():
    frames = np.array([[1, -2], [3, 4], [5, 6]], np.float32)
    torchs = torch.from_numpy(frames.T)[:, 0:2].reshape(-1).clamp(min=0)
    assert windows(frames, 2)[0].tolist() == torchs.tolist() == [1, 3, 0, 4]
    assert len(windows(frames, 2)) == 2


def test_the_papers_sounds_are_twice_as_loud_repeated_and_cut(model, listed):
    path = listed.parent / "high1a.wav"
    samples = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
    with torch.no_grad():
        wanted = model.extract(samples.repeat(22)[:220_500] * 512, ["pool5"])["pool5"][0].T
    layer = model.architecture.layer("pool5")
    made = evaluation.Listening(model, "pool5", layer, "paper", None, True, "auto", None).to(path)[0]
    # the same numbers, by another path through the engine
    np.testing.assert_allclose(made, wanted, atol=1e-5 * float(wanted.abs().max()))


def test_scenes_are_taken_whole_in_windows_of_a_sixth(model, tmp_path):
    listed = tones(tmp_path / "scenes", seconds=6)
    made = evaluate(model, listed, protocol="paper-dcase", cache=False)
    assert made.accuracy == 1
    layer = model.architecture.layer("pool5")
    whole = evaluation.Listening(model, "pool5", layer, "paper-dcase", None, True, "auto", None)
    assert len(whole.to(tmp_path / "scenes/low1a.wav")[0]) == model.architecture.frames("pool5", 6 * 22_050)


def test_without_resampling_ten_seconds_count_at_the_files_own_rate(model, tmp_path):
    listed = tones(tmp_path / "tones44", rate=44_100)
    layer = model.architecture.layer("pool5")
    literal = evaluation.Listening(model, "pool5", layer, "paper", None, False, "auto", None)
    assert len(literal.to(listed.parent / "low1a.wav")[0]) == model.architecture.frames("pool5", 441_000)


def objective(weights, signs, examples, c):
    """Of liblinear -s 1 and -s 2: the bias is a regularised weight of a constant 1."""
    slack = np.maximum(0, 1 - signs * (examples @ weights))
    value = weights @ weights / 2 + c * (slack @ slack)
    return value, weights - 2 * c * (examples.T @ (signs * slack))


def test_the_svm_solves_liblinears_problem():
    examples, targets = overlapping()
    frames = [each[None] for each in np.abs(examples)]  # windows of one frame
    classifier, converged = learn_windows(frames, targets, 1)
    assert converged
    data = np.hstack([np.abs(examples), np.ones((len(examples), 1))]).astype(np.float64)
    exact = np.stack(
        [
            scipy.optimize.minimize(
                objective,
                np.zeros(data.shape[1]),
                (np.where(targets == one, 1.0, -1.0), data, evaluation.PAPER_C),
                jac=True,
                method="L-BFGS-B",
                options={"ftol": 1e-15, "gtol": 1e-10, "maxiter": 10_000},
            ).x
            for one in range(3)
        ]
    )
    # liblinear stops when no example's gradient in the dual is off by more than 0.1 of the margin 1
    np.testing.assert_allclose(decisions(classifier, np.abs(examples)), data @ exact.T, atol=0.1)
    tighter = classifier.set_params(tol=1e-8, max_iter=100_000).fit(np.abs(examples), targets)
    np.testing.assert_allclose(decisions(tighter, np.abs(examples)), data @ exact.T, atol=1e-5)


def test_the_svm_is_liblinears():
    liblinear = pytest.importorskip("liblinear.liblinearutil", reason="needs liblinear-official")
    examples, targets = overlapping()
    classifier, _ = learn_windows([each[None] for each in np.abs(examples)], targets, 1)
    theirs = liblinear.train(targets.tolist(), np.abs(examples), "-s 1 -c 0.01 -B 1 -q")
    _, _, values = liblinear.predict(targets.tolist(), np.abs(examples), theirs, "-q")
    order = np.argsort(theirs.get_labels())
    # both within liblinear's tolerance of the optimum, in random orders of their own
    ours = decisions(classifier, np.abs(examples))
    np.testing.assert_allclose(ours, np.array(values)[:, order], atol=0.05)


def test_two_classes_have_two_decision_values():
    examples, targets = overlapping(classes=2)
    classifier, _ = learn_windows([each[None] for each in np.abs(examples)], targets, 1)
    values = decisions(classifier, np.abs(examples))
    assert values.shape == (60, 2)
    assert (classifier.predict(np.abs(examples)) == values.argmax(1)).all()


# ---- folds


@pytest.mark.parametrize("protocol", ["modern", "paper"])
def test_tones_are_told_apart(model, listed, protocol):
    made = evaluate(model, listed, protocol=protocol, cache=False)
    assert made.accuracies == (1, 1, 1)
    assert (made.accuracy, made.std) == (1, 0)
    assert [(fold.name, fold.train, fold.test) for fold in made.folds] == [(name, 12, 6) for name in FOLDS]
    assert made.confusion.tolist() == [[6, 0, 0], [0, 6, 0], [0, 0, 6]]
    assert made.classes == ("high", "low", "middle")
    json.dumps(made.to_dict())


def test_test_sounds_have_no_say_in_what_is_learnt(model, listed, monkeypatch):
    learnt = []

    def spied(*arguments):
        classifier, c = learn_pooled(*arguments)
        learnt.append((classifier[-1].coef_, classifier[0].mean_, c))
        return classifier, c

    monkeypatch.setattr(evaluation, "learn_pooled", spied)
    evaluate(model, listed, cache=False)
    random = np.random.default_rng(2)
    for path in listed.parent.glob("*1?.wav"):  # fold 1 becomes noise
        soundfile.write(path, random.uniform(-1, 1, 11_025), 22_050)
    evaluate(model, listed, cache=False)
    before, after = learnt[0], learnt[3]
    assert (before[0] == after[0]).all()
    assert (before[1] == after[1]).all()
    assert before[2] == after[2]
    assert (learnt[1][0] != learnt[4][0]).any()  # fold 2's classifier does learn from fold 1


def test_c_is_chosen_with_whole_folds_left_out(monkeypatch):
    examples, targets = overlapping()
    groups = ["1"] * 20 + ["2"] * 20 + ["3"] * 20
    tested = []

    class Spied(sklearn.svm.LinearSVC):
        def predict(self, features):
            tested.append(len(features))
            return super().predict(features)

    monkeypatch.setattr(sklearn.svm, "LinearSVC", Spied)
    _, c = learn_pooled(examples, targets, groups, "4")
    assert c in evaluation.CHOICES_OF_C
    assert tested == [20] * 3 * len(evaluation.CHOICES_OF_C)


def test_without_folds_the_same_five_are_made_every_time(model, tmp_path, listed):
    text = listed.read_text().replace("\t1\n", "\n").replace("\t2\n", "\n").replace("\t3\n", "\n")
    listed.write_text(text)
    one = evaluate(model, listed, cache=tmp_path / "cache")
    two = evaluate(model, listed, cache=tmp_path / "cache")
    assert len(one.folds) == 5
    assert one.answers == two.answers
    assert "the data set has no folds; 5 were made" in one.notes[0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"protocol": "papers"}, "unknown protocol 'papers'; choose from modern, paper"),
        ({"pool": "median"}, "unknown pooling 'median'"),
        ({"layer": "pool9"}, "layer: .*pool9"),
        ({"resample": False}, "not resampled, are for the paper's"),
    ],
)
def test_settings_that_cannot_work_are_refused(model, listed, settings, said):
    with pytest.raises(EvaluationError, match=said):
        evaluate(model, listed, cache=False, **settings)


def test_a_class_that_is_only_tested_is_refused(model, listed):
    lines = [line for line in listed.read_text().splitlines() if "high" not in line or line.endswith("1")]
    listed.write_text("\n".join(lines))
    with pytest.raises(EvaluationError, match="fold 1: no training sounds of high"):
        evaluate(model, listed, cache=False)


# ---- features that are kept


def test_features_are_computed_once_for_each_content_network_and_setting(
    model, listed, tmp_path, monkeypatch
):
    computed = []
    real = evaluation.Listening._computed
    monkeypatch.setattr(
        evaluation.Listening, "_computed", lambda self, path: computed.append(path) or real(self, path)
    )
    cache = tmp_path / "cache"
    first = evaluate(model, listed, cache=cache)
    assert len(computed) == 18
    (listed.parent / "low1a.wav").rename(listed.parent / "renamed.wav")
    listed.write_text(listed.read_text().replace("low1a", "renamed"))
    second = evaluate(model, listed, cache=cache)
    assert len(computed) == 18
    assert [each.decisions for each in first.answers] == [each.decisions for each in second.answers]

    entries = sorted(cache.glob("*/*.npz"))
    assert len(entries) == 18
    entries[0].write_bytes(entries[0].read_bytes()[:-50])
    damaged = bytearray(entries[1].read_bytes())
    damaged[200] ^= 1  # among the features
    entries[1].write_bytes(damaged)
    entries[2].write_bytes(b"")
    third = evaluate(model, listed, cache=cache)
    assert len(computed) == 21
    assert [each.decisions for each in first.answers] == [each.decisions for each in third.answers]

    evaluate(model, listed, layer="conv4", cache=cache)
    evaluate(model_of(NETS["n8_d16"]), listed, cache=cache)
    assert len(computed) == 57
    assert not list(cache.rglob("*.part"))


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(model, listed, tmp_path):
    (tmp_path / "file").write_text("")
    made = evaluate(model, listed, cache=tmp_path / "file")
    assert made.accuracy == 1
    assert any("features are not kept" in note for note in made.notes)


# ---- edge frames


def listening(model, layer, protocol="modern", edge_frames=False):
    pool = "mean" if protocol == "modern" else None
    key = model.architecture.layer(layer)
    return evaluation.Listening(model, layer, key, protocol, pool, True, "auto", None, edge_frames)


def test_modern_leaves_edge_frames_out_unless_they_are_wanted(model, listed):
    path = listed.parent / "low1a.wav"
    samples = torch.from_numpy(soundfile.read(path, dtype="float32")[0]).repeat(4)
    soundfile.write(path, samples.numpy(), 22_050)
    frames = sp.inference.activations.features(model, path, "conv7").T
    assert len(frames) == 2
    # pooled in float64; the mean of two is off by float32's rounding at most
    for edge_frames, wanted in ((False, frames[0]), (True, frames.mean(0))):
        made, _ = listening(model, "conv7", edge_frames=edge_frames).to(path)
        np.testing.assert_allclose(made, wanted, rtol=1e-6)
        shown = evaluate(model, listed, layer="pool5", edge_frames=edge_frames, cache=False)
        assert not shown.edge_frames  # pool5 has none
        assert shown.title == "pool5, modern"


@pytest.mark.parametrize("protocol", ["paper", "paper-dcase"])
def test_the_papers_protocols_take_all_frames_in(model, tmp_path, protocol):
    listed = tones(tmp_path / "scenes", seconds=6)
    for edge_frames in (False, True):
        made, _ = listening(model, "conv7", protocol, edge_frames).to(tmp_path / "scenes/low1a.wav")
        assert len(made) == model.architecture.frames("conv7", (10 if protocol == "paper" else 6) * 22_050)
    evaluated = evaluate(model, listed, layer="conv7", protocol=protocol, cache=False)
    assert evaluated.edge_frames
    assert evaluated.to_dict()["edge_frames"]
    assert evaluated.title == f"conv7, {protocol}, with edge frames"


def test_a_sound_that_gives_edge_frames_alone_is_reported_and_left_out(model, tmp_path):
    listed = tones(tmp_path / "tones", seconds=1.2)
    short = tmp_path / "tones/low1a.wav"
    soundfile.write(short, np.sin(np.arange(12_765) / 10) / 2, 22_050)
    (failure,) = evaluate(model, listed, layer="conv7", cache=False).failures
    assert failure.path == str(short)
    said = "12,765 samples (0.579 s) give conv7 edge frames alone, which hear zeros after the sound's end"
    assert failure.reason.startswith(f"{said}; use at least 12,766 samples")
    whole = evaluate(model, listed, layer="conv7", edge_frames=True, cache=False)
    assert (whole.failures, whole.edge_frames) == ((), True)


def test_features_without_edge_frames_are_kept_apart_and_all_others_where_they_were(model):
    before = {"version", "weights", "dtype", "layer", "protocol", "pool", "resample", "decoder"}
    for layer in ("pool5", "conv6", "conv7", 22, "objects"):
        with_them, without = (json.loads(listening(model, layer, edge_frames=e).settings) for e in (1, 0))
        assert set(with_them) == before
        known = {} if layer in ("pool5", "conv6") else {"edge_frames": False}
        assert without == with_them | known
        assert set(json.loads(listening(model, layer, "paper").settings)) == before


# ---- results and the command line


def test_results_are_printed_and_written(listed, weights, tmp_path, capsys):
    out, cache = tmp_path / "out", str(tmp_path / "cache")
    assert main(["evaluate", str(listed), "-w", weights, "-o", str(out), "--cache", cache]) == 0
    printed = capsys.readouterr().out
    assert "fold 1: 100.0% of 6 sounds, C " in printed
    assert "pool5, modern: 100.0%, std over folds 0.0%" in printed
    assert json.loads((out / "evaluation.json").read_text())["accuracy"] == 1
    rows = [line.split("\t") for line in (out / "predictions.tsv").read_text().splitlines()]
    assert rows[0] == ["fold", "file", "label", "predicted", "high", "low", "middle"]
    assert len(rows) == 19
    assert all(row[2] == row[3] == rows[0][4 + int(np.argmax(list(map(float, row[4:]))))] for row in rows[1:])
    assert (out / "confusion.png").read_bytes()[1:4] == b"PNG"

    assert main(["evaluate", str(listed), "-w", weights, "-o", str(out), "--cache", cache]) == 2
    assert "has an evaluation already; --force" in capsys.readouterr().err
    assert main(["evaluate", str(listed), "-w", weights, "--json", "--cache", cache]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["confusion"] == [[6, 0, 0], [0, 6, 0], [0, 0, 6]]
    assert made["edge_frames"] is False


def test_the_command_line_takes_edge_frames_in_and_says_so(tmp_path, weights, capsys):
    listed = str(tones(tmp_path / "tones", seconds=0.7))
    for extra, said in (([], "conv7, modern: "), (["--edge-frames"], "conv7, modern, with edge frames: ")):
        command = ["evaluate", listed, "-w", weights, "-l", "conv7", "--no-cache", *extra]
        assert main(command) == 0
        assert f"\n{said}" in capsys.readouterr().out


def test_a_bad_sound_is_reported_and_left_out(listed, weights, capsys):
    (listed.parent / "low1a.wav").write_text("no sound")
    assert main(["evaluate", str(listed), "-w", weights, "--no-cache", "--json"]) == 1
    printed = capsys.readouterr()
    assert "low1a.wav: " in printed.err
    made = json.loads(printed.out)
    assert sum(fold["test"] for fold in made["folds"]) == 17
    assert [failure["path"].endswith("low1a.wav") for failure in made["failures"]] == [True]


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--layer", "99"], "layer: "),
        (["--cache", "x", "--no-cache"], "contradict each other"),
        (["--no-resample"], "for the paper's protocols"),
        (["--esc10"], "no esc10 column"),
        (["-w", "nothing"], "nothing"),
    ],
)
def test_misuse_is_a_line_and_exit_code_2(listed, weights, capsys, extra, said):
    cache = [] if "--cache" in extra else ["--no-cache"]
    assert main(["evaluate", str(listed), "-w", weights, *cache, *extra]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.out == ""


def test_the_table_counts_true_classes_in_rows(model, listed):
    made = evaluate(model, read_labeled(listed), cache=False)
    assert table(made).splitlines()[1:3] == ["  1 high    6  .  . 100.0%", "  2 low     .  6  . 100.0%"]
    assert len(write_evaluation(made, listed.parent / "out")) == 3
