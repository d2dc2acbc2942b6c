"""Fine-tuning: new classes, on any layer, with as much of the trunk as wanted."""

import csv
import json
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

import soundnet_port as sp
from soundnet_port.cli import main as cli
from soundnet_port.learning import finetune_loop, finetuning
from soundnet_port.learning.augmentation import Augmentation
from soundnet_port.learning.datasets import read_labeled
from soundnet_port.learning.errors import TrainingError
from soundnet_port.learning.finetune_crops import (
    FeatureVariants,
    RandomCrops,
    count_repeats,
    count_variants,
)
from soundnet_port.learning.finetune_run import FinetuneConfig
from soundnet_port.learning.finetuning import cross_validate, finetune
from soundnet_port.network.weights import WeightsError, read_metadata, write_weights

NARROW = sp.SOUNDNET8.resized([8, 8, 8, 8, 16, 16, 16], {})
CLASSES = ("high", "low", "noise")
QUICK = FinetuneConfig(
    epochs=12, batch=8, seconds=0.5, dropout=0.1, lr=0.01, augmentation=Augmentation(shift=1)
)
SETTINGS = {"weights": NARROW, "layer": "pool5", "config": QUICK, "test": "3", "device": "cpu"}
BRIEF = SETTINGS | {"config": replace(QUICK, epochs=3)}
SETTINGS_OF_FOLDS = {"weights": NARROW, "layer": "pool5", "config": replace(QUICK, epochs=1), "device": "cpu"}


def sound(label, number):
    generator = np.random.default_rng([CLASSES.index(label), number])
    seconds = np.arange(22_050) / 22_050
    pitch = {"high": 4000, "low": 150}.get(label, 0) * generator.uniform(0.9, 1.1)
    samples = (
        np.sin(2 * np.pi * pitch * seconds + generator.uniform(0, 6))
        if pitch
        else generator.normal(size=22_050)
    )
    return 0.3 * samples / np.abs(samples).max()


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    """A list of twelve sounds per class, in three folds."""
    folder = tmp_path_factory.mktemp("labeled")
    lines = []
    for label in CLASSES:
        for number in range(12):
            name = f"{label}{number}.wav"
            soundfile.write(folder / name, sound(label, number), 22_050)
            lines.append(f"{name}\t{label}\t{number % 3 + 1}\n")
    path = folder / "list.tsv"
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def tuned(listed, tmp_path_factory):
    return finetune(listed, tmp_path_factory.mktemp("run"), **SETTINGS)


def test_held_out_sounds_are_classified(tuned):
    assert tuned.accuracy == 1  # tones of 150 and 4000 Hz and noise
    assert len(tuned.predictions) == 12
    assert {label for _, label, _ in tuned.predictions} == set(CLASSES)


def test_the_weights_load_and_predict_like_any_others(tuned, listed):
    model = sp.load_pretrained(tuned.weights)
    assert model.architecture.layer("classes").channels == 3
    assert model.categories == {"classes": CLASSES}
    assert model(torch.randn(22_050)).classes.shape == (1, 3, 3)
    for name, label, answer in tuned.predictions:
        prediction = sp.predict(model, name, top=2)
        assert prediction.classes[0].label == answer == label
        assert len(prediction.classes) == 2
        assert prediction.objects == prediction.scenes == []
        assert prediction.class_probabilities.shape == (3, 3)
        assert prediction.class_probabilities.sum(0).tolist() == pytest.approx([1] * 3)
        assert prediction.middle == (prediction.frames[1].classes[0],)
        assert not prediction.repeated  # long enough for a frame, though under 10 s
    assert sp.embed(model, listed.parent / "low1.wav", layer="pool5").shape == (16,)
    training = read_metadata(tuned.weights)["training"]
    assert training["tuning"]["seed"] == 0
    assert training["test"] == "3"


def test_the_log_has_a_row_per_epoch_and_curves(tuned):
    rows = list(csv.DictReader((tuned.folder / "log.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(3, 37, 3))  # 24 sounds, 8 in a step
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert float(rows[-1]["test accuracy"]) == 1
    assert (tuned.folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not (tuned.folder / "checkpoint.pt").exists()


@pytest.fixture(scope="module")
def brief(listed, tmp_path_factory):
    """A run of three epochs, for others to equal."""
    return finetune(listed, tmp_path_factory.mktemp("brief"), **BRIEF)


def weights_of(tuned):
    return {name: tensor.clone() for name, tensor in sp.load_pretrained(tuned.weights).state_dict().items()}


@pytest.mark.parametrize("frozen", [False, True])
def test_a_resumed_run_gives_the_numbers_of_an_uninterrupted_one(brief, listed, tmp_path, frozen):
    settings = BRIEF
    if frozen:  # the third epoch is on the first one's variant, here and in batches of another order
        config = replace(BRIEF["config"], variants=2)
        settings = BRIEF | {"weights": brief.weights, "frozen": "conv3", "config": config}
        brief = finetune(listed, tmp_path / "uninterrupted", **settings)

    def stop(progress):
        if progress.unit == "epoch" and progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(listed, tmp_path / "run", progress=stop, **settings)
    reports = []
    again = finetune(listed, tmp_path / "run", progress=reports.append, **settings)
    assert [report.done for report in reports if report.unit == "epoch"] == [2, 3]
    assert (again.folder / "log.csv").read_text() == (brief.folder / "log.csv").read_text()
    expected = weights_of(brief)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights_of(again).items())


def test_torchs_random_state_stays_as_it_is(tuned, listed, tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    finetune(listed, tmp_path, **SETTINGS | {"config": replace(QUICK, epochs=1), "validation": "2"})
    finetune(listed, tuned.folder, **SETTINGS)
    assert torch.equal(torch.rand(3), expected)


def test_every_epoch_is_reported_with_its_figures(listed, tmp_path):
    reports = []
    config = replace(QUICK, epochs=2)
    finetune(listed, tmp_path, **SETTINGS | {"config": config}, validation="2", progress=reports.append)
    sounds = [report.done for report in reports if report.unit == "sound"]
    assert sounds == list(range(1, 37))  # decoded before the first epoch
    start, *reports = (report for report in reports if report.unit == "epoch")
    assert (start.done, start.total) == (0, 2)
    assert start.message.startswith("training on 12 sounds, ")
    assert [(report.done, report.total) for report in reports] == [(1, 2), (2, 2)]
    assert set(reports[0].figures) == {"validation loss", "validation accuracy"}
    assert set(reports[1].figures) == set(reports[0].figures) | {"test loss", "test accuracy"}
    for report in reports:
        assert report.note.startswith(f"loss {report.loss:.4g}, validation loss ")


def test_a_finished_run_is_only_read(tuned, listed):
    before = tuned.weights.stat().st_mtime_ns
    assert finetune(listed, tuned.folder, **SETTINGS) == tuned
    assert tuned.weights.stat().st_mtime_ns == before


def test_a_folder_with_another_run_is_refused(tuned, listed):
    with pytest.raises(TrainingError, match=r"other settings.*tuning.*'seed': 0"):
        finetune(listed, tuned.folder, **SETTINGS | {"config": replace(QUICK, seed=1)})


def test_a_run_with_other_sounds_is_refused(tuned, listed):
    data = read_labeled(listed)
    fewer = replace(data, sounds=data.sounds[1:])
    with pytest.raises(TrainingError, match=r"other settings.*sounds"):
        finetune(fewer, tuned.folder, **SETTINGS)


def test_the_held_out_fold_does_not_influence_training(brief, listed, tmp_path, monkeypatch):
    load_audio = finetune_loop.load_audio

    def load_silence(path):
        held_out = int("".join(filter(str.isdigit, path.name))) % 3 + 1 == 3
        return torch.zeros(22_050) if held_out else load_audio(path)

    monkeypatch.setattr(finetune_loop, "load_audio", load_silence)
    blind = finetune(listed, tmp_path, **BRIEF)
    expected = weights_of(brief)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights_of(blind).items())
    assert len({answer for _, _, answer in blind.predictions}) == 1  # to silence
    assert len({answer for _, _, answer in brief.predictions}) > 1


@pytest.mark.parametrize(
    ("frozen", "train_batch_norm", "convolutions", "norms"),
    [("pool5", True, 5, 5), ("conv3", True, 3, 3), ("conv3", False, 3, 5)],
)
def test_frozen_layers_and_batch_norms_stay_as_they_are(
    tuned, listed, tmp_path, frozen, train_batch_norm, convolutions, norms
):
    start = sp.load_pretrained(tuned.weights)
    again = finetune(
        listed,
        tmp_path,
        weights=start,
        frozen=frozen,
        device="cpu",
        config=replace(QUICK, epochs=1, seed=5, train_batch_norm=train_batch_norm),
        test="2",
    )
    before, after = start.state_dict(), weights_of(again)
    for number in range(1, 6):
        name = f"conv{number}.weight"
        assert torch.equal(before[name], after[name]) == (number <= convolutions), name
        for name in (f"bn{number}.weight", f"bn{number}.running_mean"):
            assert torch.equal(before[name], after[name]) == (number <= norms), name
    assert not torch.equal(before["classes.weight"], after["classes.weight"])


@pytest.mark.parametrize(("layer", "channels"), [("pool5", 16), ("conv5", 16), ("pool2", 8)])
def test_the_head_goes_on_any_layer_and_later_layers_are_dropped(listed, tmp_path, layer, channels):
    result = finetune(
        listed,
        tmp_path,
        weights=NARROW,
        device="cpu",
        layer=layer,
        kernel=2,
        config=replace(QUICK, epochs=1, seconds=0.6),
    )
    architecture = sp.load_pretrained(result.weights).architecture
    assert architecture.last_layer == layer
    assert architecture.state_shapes()["classes.weight"] == (3, channels, 2)
    assert "conv6.weight" not in architecture.state_shapes()
    assert result.accuracy is None


CONV7 = {
    "weights": NARROW,
    "layer": "conv7",
    "config": replace(QUICK, epochs=1, seconds=1.0),
    "device": "cpu",
}


@pytest.mark.parametrize(
    ("kernel", "seconds", "repeats", "ordinary"),
    # of 2, 3, 2, 4 frames of conv7; of 1.5 s repeated twice 3, of 5 s repeated twice 8
    [(1, 1.0, 1, 1), (1, 3.0, 1, 2), (2, 3.0, 1, 1), (2, 1.5, 2, 1), (4, 5.0, 2, 4)],
)
def test_head_frames_that_see_edge_frames_are_not_in_the_loss(kernel, seconds, repeats, ordinary):
    torch.manual_seed(0)
    model = sp.SoundNet(NARROW.with_classes(3, "conv7", kernel)).train()
    waveform = 50 * torch.randn(2, round(seconds * 22_050))
    target = torch.eye(3)[:2]
    losses = []
    for edge_frames in (False, True):
        config = replace(QUICK, dropout=0, edge_frames=edge_frames)
        run = SimpleNamespace(model=model, config=config)
        losses.append(
            finetune_loop.compute_loss(run, waveform, target, SimpleNamespace(autocast=nullcontext))
        )
    all_frames = model.extract(waveform, ["classes"])["classes"].mean(2)
    ordinary_frames = model.extract(waveform.repeat(1, repeats), ["classes"])["classes"][..., :ordinary].mean(
        2
    )
    expected = [torch.nn.functional.cross_entropy(logits, target) for logits in (ordinary_frames, all_frames)]
    assert torch.allclose(torch.stack(losses), torch.stack(expected), rtol=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-4


@pytest.mark.parametrize("frozen_blocks", [2, 5])
def test_the_engine_gives_frozen_blocks_the_same_loss_and_gradients(frozen_blocks):
    torch.manual_seed(0)
    model = sp.SoundNet(NARROW.with_classes(3, "pool5")).eval()
    run = SimpleNamespace(model=model, config=replace(QUICK, dropout=0), frozen_blocks=frozen_blocks)
    for block in model.architecture.blocks[:frozen_blocks]:
        model.get_submodule(block.name).requires_grad_(False)
        model.get_submodule(block.norm).requires_grad_(False)
    batch = 50 * torch.randn(2, 22_050), torch.eye(3)[:2], SimpleNamespace(autocast=nullcontext)
    results = []
    for frozen_trunk in (None, finetune_loop.build_frozen_trunk(run.model, run.frozen_blocks)):
        model.zero_grad()
        loss = finetune_loop.compute_loss(run, *batch, frozen_trunk)
        loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        results.append(torch.cat([loss.detach()[None], *gradients]))
    assert torch.allclose(*results, rtol=1e-4, atol=1e-4 * float(results[0].abs().max()))  # float32
    assert len(gradients) == 2 + 4 * (5 - frozen_blocks)


@pytest.mark.parametrize(("layer", "seconds"), [("pool5", 1.0), ("conv7", 0.6)])  # the latter repeated
@pytest.mark.parametrize("frozen_blocks", [2, 5])
def test_frozen_features_give_the_loss_of_their_crops(layer, seconds, frozen_blocks):
    torch.manual_seed(0)
    model = sp.SoundNet(NARROW.with_classes(3, layer, 2)).eval()
    config = replace(QUICK, dropout=0, batch=2, seconds=seconds, variants=2)
    run = SimpleNamespace(model=model, config=config, frozen_blocks=frozen_blocks)
    crops = RandomCrops(list(50 * torch.randn(5, 33_075)), [0, 1, 2, 0, 1], 3, config)
    trunk = finetune_loop.build_frozen_trunk(model, frozen_blocks)
    repeats = count_repeats(model.architecture, config, round(seconds * 22_050))
    assert (repeats > 1) == (layer == "conv7")
    features = FeatureVariants(crops, trunk, repeats)
    fabric, passes = SimpleNamespace(autocast=nullcontext), []
    trunk.extract = lambda *arguments: passes.append(1) or sp.SoundNet.extract(trunk, *arguments)
    for epoch in range(5):
        batches = list(zip(crops.batches(epoch), features.batches(epoch), strict=True))
        assert len(batches) == 2  # full ones
        for waveforms, computed in batches:
            expected = finetune_loop.compute_loss(run, *waveforms, fabric).item()
            loss = finetune_loop.compute_loss(run, *computed, fabric, trunk).item()
            assert loss == pytest.approx(expected, rel=1e-4)  # float32
    assert len(passes) == 2 * 3  # variants, and batches that five sounds make
    assert not torch.equal(crops[0, 0][0], crops[1, 0][0])


def test_variants_are_kept_where_layers_are_frozen_and_their_features_fit():
    architecture = sp.SOUNDNET8.with_classes(3, "conv6")
    config = FinetuneConfig(variants=8)

    def count(frozen_blocks, sounds=320, **changes):
        return count_variants(architecture, frozen_blocks, replace(config, **changes), sounds)

    assert count(0) == 0
    assert count(6) == count(1) == 8
    assert count(1, variants=15, epochs=20) == 0  # pool1: 15 * 320 crops * 16 channels * 6,890 frames
    assert count(1, variants=15, epochs=14) == 15  # of which 14 are used
    assert count(6, variants=0) == 0


def test_variants_are_recorded_and_another_number_is_another_run(brief, listed, tmp_path):
    config = replace(BRIEF["config"], epochs=1)
    settings = BRIEF | {"weights": brief.weights, "frozen": "pool5"}
    reports = []
    result = finetune(
        listed, tmp_path, progress=reports.append, **settings | {"config": replace(config, variants=3)}
    )
    assert read_metadata(result.weights)["training"]["variants"] == 3
    start = next(report.message for report in reports if report.message)
    assert start.startswith("training on 24 sounds in 3 variants, ")
    with pytest.raises(TrainingError, match=r"variants 3 there, 4 now"):
        finetune(listed, tmp_path, **settings | {"config": replace(config, variants=4)})
    saved = json.loads((tmp_path / "result.json").read_text())
    del saved["settings"]["variants"]  # runs from before it was a setting had new crops every epoch
    (tmp_path / "result.json").write_text(json.dumps(saved))
    with pytest.raises(TrainingError, match=r"variants 0 there, 3 now"):
        finetune(listed, tmp_path, **settings | {"config": replace(config, variants=3)})
    again = finetune(listed, tmp_path, **settings | {"config": replace(config, variants=0)})
    assert again == result
    assert "variants" not in read_metadata(brief.weights)["training"]  # nothing is frozen


def test_the_trunk_of_weights_learns_at_its_own_rate():
    model = sp.SoundNet(NARROW.with_classes(3, "pool5"))
    model.conv1.requires_grad_(False)
    for pretrained, trunk_lr, rates in (
        (True, 1e-4, {"conv1": None, "conv2": 1e-4, "bn5": 1e-4, "classes": 1e-2}),
        (False, 1e-4, {"conv1": None, "conv2": 1e-2, "bn5": 1e-2, "classes": 1e-2}),
    ):
        config = replace(QUICK, decay=0.05, trunk_lr=trunk_lr)
        run = SimpleNamespace(model=model, config=config, pretrained=pretrained)
        groups = finetune_loop.group_parameters(run, 1e-2)
        for name, rate in rates.items():
            for kind, decay in (("weight", 0 if name == "bn5" else 0.05), ("bias", 0)):
                parameter = model.get_parameter(f"{name}.{kind}")
                found = [group for group in groups if any(p is parameter for p in group["params"])]
                expected = [] if rate is None else [(rate, decay)]
                assert [(group["lr"], group["weight_decay"]) for group in found] == expected


def test_the_trunks_rate_is_a_tenth_by_default(tuned, listed, tmp_path):
    start = sp.load_pretrained(tuned.weights)
    config = replace(QUICK, epochs=1, lr=0.002)
    result = finetune(listed, tmp_path, weights=start, layer="pool5", config=config, device="cpu")
    assert read_metadata(result.weights)["training"]["tuning"]["trunk_lr"] == pytest.approx(0.0002)


def test_predictions_use_the_frames_that_training_used(listed, tmp_path, monkeypatch):
    calls, predict = [], finetune_loop.predict
    data = read_labeled(listed)
    few = replace(data, sounds=[sound for sound in data.sounds if int(sound.path.stem[-1]) < 6])

    def spy(*arguments, **settings):
        prediction = predict(*arguments, **settings)
        calls.append((prediction.edge_frames, prediction.dropped, prediction.repeats, len(prediction.frames)))
        return prediction

    monkeypatch.setattr(finetune_loop, "predict", spy)
    for edge_frames, kernel, expected in (
        (False, 1, (False, 1, 1, 1)),  # clips of 1 s have two frames of conv7
        (True, 1, (True, 0, 1, 2)),
        (False, 2, (False, 1, 3, 1)),  # and of 3 s three
        (True, 2, (True, 0, 1, 1)),
    ):
        calls.clear()
        config = replace(CONV7["config"], edge_frames=edge_frames)
        folder = tmp_path / f"{edge_frames}{kernel}"
        result = finetune(few, folder, **CONV7 | {"config": config}, kernel=kernel, test="3")
        assert set(calls) == {expected}
        assert result.edge_frames == edge_frames
        assert read_metadata(result.weights)["training"]["edge_frames"] == edge_frames
        assert json.loads((folder / "result.json").read_text())["settings"]["edge_frames"] == edge_frames
        model = sp.load_pretrained(result.weights)
        for name, _, label in result.predictions:
            assert sp.predict(model, name, edge_frames=edge_frames).classes[0].label == label


def test_a_run_resumes_with_the_same_edge_frames_only(listed, tmp_path):
    result = finetune(listed, tmp_path, **CONV7)
    with_them = CONV7 | {"config": replace(CONV7["config"], edge_frames=True)}
    with pytest.raises(TrainingError, match=r"other settings \(edge_frames False there, True now\)"):
        finetune(listed, tmp_path, **with_them)
    assert finetune(listed, tmp_path, **CONV7) == result
    # runs from before it was a setting included them
    result = json.loads((tmp_path / "result.json").read_text())
    del result["settings"]["edge_frames"]
    (tmp_path / "result.json").write_text(json.dumps(result))
    with pytest.raises(TrainingError, match=r"other settings \(edge_frames True there, False now\)"):
        finetune(listed, tmp_path, **CONV7)
    assert finetune(listed, tmp_path, **with_them).edge_frames


@pytest.mark.parametrize("edge_frames", [False, True])
def test_info_says_that_edge_frames_are_included(listed, tmp_path, capsys, edge_frames):
    config = replace(CONV7["config"], edge_frames=edge_frames)
    result = finetune(listed, tmp_path, **CONV7 | {"config": config})
    metadata = read_metadata(result.weights)
    assert cli.main(["info", str(result.weights)]) == 0
    text = "with edge frames (predict with --edge-frames); epoch 1 of 1"
    assert (text in capsys.readouterr().out) == edge_frames
    del metadata["training"]["edge_frames"]  # weights from before it was a setting
    model, old = sp.load_pretrained(result.weights), tmp_path / "old.safetensors"
    state = {name: model.state_dict()[name] for name in model.architecture.state_shapes()}
    write_weights(old, model.architecture, state, metadata)
    assert cli.main(["info", str(old)]) == 0
    assert text in capsys.readouterr().out


def test_a_head_on_an_earlier_layer_has_no_edge_frames_setting(brief, listed, tmp_path):
    assert "edge_frames" not in json.dumps(read_metadata(brief.weights)["training"])
    assert not brief.edge_frames
    config = replace(BRIEF["config"], edge_frames=True)
    assert finetune(listed, brief.folder, **BRIEF | {"config": config}) == brief
    again = finetune(listed, tmp_path, **BRIEF | {"config": config})
    expected = weights_of(brief)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights_of(again).items())


def test_the_epoch_with_the_least_loss_on_the_validation_fold_is_kept(listed, tmp_path):
    config = replace(QUICK, epochs=12, lr=0.05, patience=2)
    result = finetune(listed, tmp_path, **SETTINGS | {"config": config}, validation="2")
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    losses = [float(row["validation loss"]) for row in rows]
    assert result.epoch == int(np.argmin(losses)) + 1
    assert len(rows) in (result.epoch + 2, 12)  # stopped after two without improvement
    kept = sp.load_pretrained(result.weights)
    predictions = [
        sp.predict(kept, listed.parent / name).classes
        for name, label, fold in csv.reader(listed.read_text().splitlines(), delimiter="\t")
        if fold == "2"
    ]
    labels = [row[1] for row in csv.reader(listed.read_text().splitlines(), delimiter="\t") if row[2] == "2"]
    probabilities = [
        next(category.probability for category in classes if category.label == label)
        for classes, label in zip(predictions, labels, strict=True)
    ]
    assert -np.log(probabilities).mean() == pytest.approx(min(losses), rel=1e-3)  # batches round otherwise


def test_cross_validation_gives_the_same_in_processes_as_in_one(listed, tmp_path, monkeypatch):
    # the C library's settings stay as they are in the caller's process
    monkeypatch.setattr(finetuning, "keep_freed_memory", lambda: pytest.fail("called"))
    one = cross_validate(listed, tmp_path / "one", **SETTINGS_OF_FOLDS)
    reports = []
    two = cross_validate(listed, tmp_path / "two", workers=2, progress=reports.append, **SETTINGS_OF_FOLDS)
    assert [result.fold for result in one] == [result.fold for result in two] == ["1", "2", "3"]
    assert [(report.done, report.total, report.unit) for report in reports] == [
        (done, 3, "fold") for done in (0, 1, 2, 3)
    ]
    assert sorted(report.message for report in reports[1:]) == [
        f"fold {result.fold}: {result.accuracy:.1%} of 12 sounds, epoch 1, {result.seconds:.0f} s"
        for result in two
    ]
    for left, right in zip(one, two, strict=True):
        assert left.accuracy == right.accuracy
        expected, result = weights_of(left), weights_of(right)
        for name, tensor in expected.items():  # with other numbers of threads sums round otherwise
            assert torch.allclose(tensor.float(), result[name].float(), rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"test": "9"}, "no fold '9'; choose from 1, 2, 3"),
        ({"test": "1", "validation": "1"}, "cannot be both test and validation set"),
        ({"layer": "conv9"}, "no head goes on 'conv9'; choose from conv1"),
        ({"frozen": "conv2"}, "random values cannot be frozen"),
        ({"frozen": "conv9"}, "frozen: no layer 'conv9'"),
        (
            {"config": FinetuneConfig(seconds=0.2)},
            "crops of 0.2 s are too short: classes needs at least 4,574",
        ),
        ({"config": FinetuneConfig(batch=64, seconds=0.5)}, "36 sounds are too few for a batch of 64"),
        ({"device": "tpu9"}, "device tpu9"),
        ({"device": "cuda:x"}, "device cuda:x: names one device"),
        ({"precision": "8-bit"}, "unknown precision"),
    ],
)
def test_invalid_settings_are_refused(listed, tmp_path, settings, reason):
    with pytest.raises(TrainingError, match=reason):
        finetune(listed, tmp_path / "run", **SETTINGS | {"test": None} | settings)
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"dropout": 1}, {"lr": -1}, {"batch": 1}, {"seed": -1}])
def test_invalid_hyperparameters_are_refused(wrong):
    with pytest.raises(TrainingError, match=next(iter(wrong))):
        FinetuneConfig(**wrong)


@pytest.mark.parametrize(
    "classifier", [{"layer": "pool5"}, {"layer": "conv9", "kernel": 1}, {"layer": "pool5", "kernel": "1"}, {}]
)
def test_weights_with_an_invalid_head_are_refused(tuned, tmp_path, classifier, monkeypatch):
    from soundnet_port.network import weights

    model = sp.load_pretrained(tuned.weights)
    metadata = read_metadata(tuned.weights)
    monkeypatch.setattr(weights, "_classifier", lambda architecture: classifier)
    write_weights(tmp_path / "bad.safetensors", model.architecture, model.state_dict(), metadata)
    with pytest.raises(WeightsError, match="describe no SoundNet"):
        sp.load_pretrained(tmp_path / "bad.safetensors")


def test_the_command_line_from_a_folder_per_class_to_a_prediction(listed, tmp_path, capsys):
    for label in CLASSES:
        (tmp_path / "sounds" / label).mkdir(parents=True)
        for number in range(4):
            soundfile.write(tmp_path / "sounds" / label / f"{number}.wav", sound(label, number), 22_050)
    (tmp_path / "sounds" / "low" / "broken.wav").write_bytes(b"RIFF")
    weights, run = tmp_path / "trunk.safetensors", tmp_path / "run"
    trunk = sp.SoundNet(NARROW)
    write_weights(weights, NARROW, {k: trunk.state_dict()[k] for k in NARROW.state_shapes()}, {})
    command = ["finetune", str(tmp_path / "sounds"), "-o", str(run), "-w", str(weights)]
    options = ["--epochs", "2", "--batch", "4", "--seconds", "0.5", "--mix", "0", "--layer", "pool5"]
    assert cli.main([*command, *options]) == 1  # one sound cannot be read
    out, err = capsys.readouterr()
    assert out == f"{run / 'weights.safetensors'}\n"
    assert "broken.wav" in err
    assert cli.main(["predict", str(listed.parent / "low1.wav"), "-w", str(run / "weights.safetensors")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["classes"]
    assert {line.split()[1] for line in lines[2:5]} == set(CLASSES)
    trained = ["-w", str(run / "weights.safetensors")]
    assert cli.main(["predict", str(listed.parent / "low1.wav"), *trained, "--json"]) == 0
    prediction = json.loads(capsys.readouterr().out)
    assert [category["label"] for category in prediction["classes"]] == [
        line.split()[1] for line in lines[2:5]
    ]
    assert set(prediction["middle"]) == {"class"}
    assert cli.main(["predict", str(listed.parent / "low1.wav"), *trained, "--csv", "-t"]) == 0
    assert {row["head"] for row in csv.DictReader(capsys.readouterr().out.splitlines())} == {"class"}
    assert cli.main(["predict", str(listed.parent / "low1.wav"), *trained, "--format", "torch7"]) == 2
    assert "has other classes" in capsys.readouterr().err


def test_info_says_how_the_weights_were_trained(tuned, capsys):
    assert cli.main(["info", str(tuned.weights)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "\n  3 classes: high, low, noise\n" in out
    assert "source: fine-tuned on 24 labeled sounds; from random values; " in out
    assert "fold 3 held out for test; epoch 12 of 12; batch 8, lr 0.01, seed 0" in out
    assert "None" not in out
    assert "released_front" not in out  # not compared


def test_the_command_line_reports_each_fold(listed, tmp_path, capsys):
    command = ["finetune", str(listed), "-o", str(tmp_path), "--scratch", "soundnet8", "--layer", "pool2"]
    options = ["--epochs", "1", "--batch", "8", "--seconds", "0.3", "--test", "all"]
    assert cli.main([*command, *options]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].startswith("mean ")
    assert "fold 3: " in err
    assert len(json.loads((tmp_path / "fold-1" / "result.json").read_text())["predictions"]) == 12
