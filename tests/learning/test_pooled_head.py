"""Pooled heads: evaluate's classifier as weights, and what `predict` makes of them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

import soundnet_port as sp
from soundnet_port.cli import main as cli
from soundnet_port.inference.classification import (
    POOL,
    SPEEDS,
    classify_windows,
    compute_logits,
    pool_at_levels,
)
from soundnet_port.learning.augmentation import Augmentation
from soundnet_port.learning.classifiers import fit_pooled_classifier
from soundnet_port.learning.errors import TrainingError
from soundnet_port.learning.finetune_run import FinetuneConfig
from soundnet_port.learning.finetuning import cross_validate, finetune
from soundnet_port.learning.pooled_head import build_pooled_model
from soundnet_port.learning.protocol_features import ModernFeatures, modern_layers
from soundnet_port.network.weights import WeightsError, read_metadata, write_weights

RATE = 44_100
CLASSES = ("high", "low", "noise")


def sound(label, number, seconds=1.0):
    generator = np.random.default_rng([CLASSES.index(label), number])
    time = np.arange(round(seconds * RATE)) / RATE
    pitch = {"high": 4000, "low": 150}.get(label, 0) * generator.uniform(0.9, 1.1)
    samples = np.sin(2 * np.pi * pitch * time) if pitch else generator.uniform(-1, 1, len(time))
    return 0.3 * samples * 10 ** generator.uniform(-1, 0)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return sp.SoundNet(sp.SOUNDNET8.resized([4, 4, 4, 4, 8, 8, 8], {})).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    """A list of six sounds per class, in three folds."""
    folder = tmp_path_factory.mktemp("labeled")
    lines = []
    for label in CLASSES:
        for number in range(6):
            soundfile.write(folder / f"{label}{number}.wav", sound(label, number), RATE)
            lines.append(f"{label}{number}.wav\t{label}\t{number % 3 + 1}\n")
    path = folder / "list.tsv"
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def folds(listed, network, cache, tmp_path_factory):
    """A run for each fold."""
    return cross_validate(listed, tmp_path_factory.mktemp("runs"), weights=network, cache=cache)


@pytest.fixture(scope="module")
def run(folds):
    return folds[2]


def test_it_has_the_accuracy_of_evaluate(listed, network, cache, folds):
    evaluation = sp.evaluate(network, listed, cache=cache)
    expected = {str(item.sound.path): item.predicted for item in evaluation.predictions}
    assert {path: label for result in folds for path, _, label in result.predictions} == expected
    assert np.mean([result.accuracy for result in folds]) == evaluation.accuracy > 0.6
    assert len(list(cache.rglob("*.npz"))) == 18  # both use the same features


def test_predict_has_the_classifiers_decision_values_for_logits(listed, network):
    extractor = ModernFeatures(network, modern_layers(network.architecture), POOL)
    paths = sorted(listed.parent.glob("*.wav"))
    features = np.stack([extractor.extract(path)[0] for path in paths])
    targets = np.repeat(range(3), 6)
    classifier = fit_pooled_classifier(features, extractor.sizes, targets, [""] * 18, "")
    model = build_pooled_model(network, classifier, extractor, CLASSES, 1.0)
    expected = torch.from_numpy(classifier.decide(features)).float()
    # weights are rounded to float32; decision values are about 1
    assert torch.allclose(compute_logits(model, torch.from_numpy(features)), expected, atol=1e-4)
    clip, times = classify_windows(model, paths[0])
    assert torch.allclose(clip.activations["classes"], expected[:1], atol=1e-4)
    assert times.tolist() == [[0, 0.5, 1]]


def test_rows_are_those_of_evaluate(listed, network):
    path = listed.parent / "noise1.wav"
    extractor = ModernFeatures(network, ("conv4", "pool5"), POOL)
    speeds = [sp.load_audio(path, sample_rate=22_050 * speed) for speed in SPEEDS]
    rows = pool_at_levels(network, speeds, ("conv4", "pool5"))
    assert np.array_equal(extractor.extract(path)[0], rows.numpy())
    assert rows.shape == (3, 2 * 3 * (4 + 8))  # speeds, statistics, channels


def test_the_weights_load_and_predict_by_file_and_waveform(run, listed, network):
    model = sp.load_pretrained(run.weights)
    assert model.categories == {"classes": CLASSES}
    assert model.architecture.last_layer == "conv6"  # conv7 is not used
    for path, _, answer in run.predictions:
        prediction = sp.predict(model, path, top=2)
        assert prediction.classes[0].label == answer
        assert len(prediction.classes) == 2
        assert prediction.class_probabilities.sum(0).tolist() == pytest.approx([1])
        assert [frame[:3] for frame in prediction.frames] == [(0, 0.5, 1)]
        assert not prediction.repeated
    low = sp.predict(model, sp.load_audio(listed.parent / "low1.wav"))  # nothing above 11 kHz is missing
    file = sp.predict(model, listed.parent / "low1.wav")
    assert low.class_probabilities.flatten().tolist() == pytest.approx(
        file.class_probabilities.flatten().tolist(), abs=0.05
    )
    pooled = sp.embed(model, listed.parent / "low1.wav", layer="pool5")
    assert torch.equal(pooled, sp.embed(network, listed.parent / "low1.wav", layer="pool5"))
    with pytest.raises(ValueError, match="of whole sounds"):
        model(torch.randn(22_050))
    with pytest.raises(ValueError, match="leaves out edge frames"):
        sp.predict(model, torch.randn(22_050), edge_frames=True)


def test_longer_sounds_are_classified_in_windows(run, tmp_path):
    model = sp.load_pretrained(run.weights)
    parts = [sound("low", 1, 2), sound("noise", 2, 2), sound("low", 3, 0.2)]
    soundfile.write(tmp_path / "long.wav", np.concatenate(parts), RATE)
    prediction = sp.predict(model, tmp_path / "long.wav")
    starts = [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.2]  # the last window ends with the sound
    assert [frame.start for frame in prediction.frames] == pytest.approx(starts, abs=1e-4)
    assert all(frame.end - frame.start == pytest.approx(1) for frame in prediction.frames)
    assert prediction.seconds == pytest.approx(4.2)
    soundfile.write(tmp_path / "window.wav", np.concatenate(parts)[RATE * 3 // 2 :][:RATE], RATE)
    alone = sp.predict(model, tmp_path / "window.wav")
    # resampling sees beyond the window's ends
    assert prediction.class_probabilities[:, 3].tolist() == pytest.approx(
        alone.class_probabilities[:, 0].tolist(), abs=0.05
    )
    logits = classify_windows(model, tmp_path / "long.wav")[0].activations["classes"]
    mean = torch.softmax(logits.mean(0), 0)
    assert prediction.classes[0].probability == pytest.approx(float(mean.max()))


def test_probabilities_are_scaled_to_sounds_that_were_left_out(folds):
    losses = dict.fromkeys((0.25, 1, 4), 0.0)
    for result in folds:
        model = sp.load_pretrained(result.weights)
        for path, label, _ in result.predictions:
            logits = classify_windows(model, path)[0].activations["classes"][0]
            for factor in losses:
                losses[factor] -= float(torch.log_softmax(factor * logits, 0)[CLASSES.index(label)])
    assert min(losses, key=losses.get) == 1


def test_a_finished_run_is_only_read_and_another_one_refused(run, listed, network):
    before = run.weights.stat().st_mtime_ns
    assert finetune(listed, run.folder, weights=network, test="3", cache=False) == run
    assert run.weights.stat().st_mtime_ns == before
    with pytest.raises(TrainingError, match=r"other settings .*test 3 there, 2 now"):
        finetune(listed, run.folder, weights=network, test="2", cache=False)
    with pytest.raises(TrainingError, match="other settings"):
        finetune(listed, run.folder, weights=network, layer="pool5", test="3")
    settings = json.loads((run.folder / "result.json").read_text())["settings"]
    assert (settings["head"], settings["training sounds"]) == ("pooled", 12)


def test_settings_of_a_convolution_choose_one_and_exclude_a_pooled_head(listed, network, tmp_path):
    quick = FinetuneConfig(epochs=1, batch=4, seconds=0.5, augmentation=Augmentation())
    result = finetune(listed, tmp_path, weights=network, frozen="pool2", config=quick, device="cpu")
    architecture = sp.load_pretrained(result.weights).architecture
    assert architecture.pooled_head is None
    assert architecture.last_layer == "conv6"
    for settings, reason in (
        ({"layer": "pool5"}, "layer: a pooled head is fitted without training"),
        ({"frozen": "pool2", "validation": "1"}, "frozen, validation: a pooled head"),
        ({"weights": network.architecture}, "start from weights"),
    ):
        with pytest.raises(TrainingError, match=reason):
            finetune(listed, tmp_path / "no", **{"weights": network, "head": "pooled"} | settings)
    with pytest.raises(TrainingError, match="unknown head 'round'"):
        finetune(listed, tmp_path / "no", weights=network, head="round")


def test_a_class_with_one_sound_is_refused(listed, network, tmp_path):
    data = sp.read_labeled(listed)
    kept = [s for s in data.sounds if s.label != "low" or s.path.name == "low0.wav"]
    with pytest.raises(TrainingError, match="fewer than two training sounds of low"):
        finetune(replace(data, sounds=tuple(kept)), tmp_path, weights=network, cache=False)


@pytest.mark.parametrize(
    "classifier",
    [{"layers": []}, {"layers": ["conv4"], "seconds": 0}, {"layers": ["conv9"], "seconds": 1}, {"layers": 3}],
)
def test_weights_with_an_invalid_pooled_head_are_refused(run, tmp_path, classifier, monkeypatch):
    from soundnet_port.network import weights

    model = sp.load_pretrained(run.weights)
    monkeypatch.setattr(weights, "_classifier", lambda architecture: classifier)
    state = {name: model.state_dict()[name] for name in model.architecture.state_shapes()}
    write_weights(tmp_path / "bad.safetensors", model.architecture, state, read_metadata(run.weights))
    with pytest.raises(WeightsError, match="describe no SoundNet"):
        sp.load_pretrained(tmp_path / "bad.safetensors")


def test_the_command_line_fits_tells_and_predicts(listed, network, tmp_path, capsys):
    weights, folder = tmp_path / "trunk.safetensors", tmp_path / "run"
    state = {name: network.state_dict()[name] for name in network.architecture.state_shapes()}
    write_weights(weights, network.architecture, state, {})
    command = ["finetune", str(listed), "-o", str(folder), "-w", str(weights), "--test", "2"]
    assert cli.main([*command, "--cache", str(tmp_path / "cache"), "--epochs", "3"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{folder / 'weights.safetensors'}: ")
    assert "--epochs has no effect without --head convolution" in err
    trained = str(folder / "weights.safetensors")
    assert cli.main(["info", trained]) == 0
    assert "fitted to 12 labeled sounds; from weights with sha256 " in (text := capsys.readouterr().out)
    assert "fold 2 held out for test; pooled head, ridge penalty " in text
    arguments = [str(listed.parent / "low1.wav"), "-w", trained, "--plot", str(tmp_path / "plot.png")]
    assert cli.main(["predict", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[1] for line in lines[2:5]} == set(CLASSES)
    assert cli.main(["predict", *arguments[:3]]) == 0
    assert capsys.readouterr().out.splitlines() == lines  # a plot changes no answer
    assert (tmp_path / "plot.png").exists()
