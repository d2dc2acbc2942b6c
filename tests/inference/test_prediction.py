"""End to end: a sound file goes in, Torch7's probabilities and answer come out."""

import copy
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from support import reference_weights
from support.networks import NETS, SOFTMAX_TOLERANCE, assert_agrees, lengths, model_of

from soundnet_port import AudioError, SoundNet, embed, predict
from soundnet_port.inference.prediction import Category
from soundnet_port.network.categories import original_categories, read_category_table
from soundnet_port.network.weights import build_model


@pytest.mark.parametrize("name", NETS)
def test_a_wav_file_gives_torch7s_softmax_and_middle_frame(tmp_path, name):
    """The recorded inputs are 16-bit samples / 128, so a WAV file holds them exactly."""
    net = NETS[name]
    reference = np.load(net.reference)
    model = model_of(net)
    for samples in (n for n in lengths(reference) if n >= 220_500):
        path = tmp_path / f"{samples}.wav"
        soundfile.write(path, reference_weights.samples(samples), 22_050, subtype="PCM_16")
        prediction = predict(model, path, edge_frames=True)
        assert not prediction.repeated
        assert prediction.edge_frames
        for head, probabilities in (
            ("obj", prediction.object_probabilities),
            ("scn", prediction.scene_probabilities),
        ):
            assert_agrees(reference, samples, f"{head}_softmax", probabilities, SOFTMAX_TOLERANCE)
        frames = len(prediction.frames)
        middle = math.ceil(frames / 2)  # counted from 1, as extract_predictions.lua does
        for head, answer in zip(("obj", "scn"), prediction.middle, strict=True):
            key = f"L{samples}/{head}_softmax/full"
            if key in reference.files:
                column = reference[key].reshape(-1, frames)[:, middle - 1]
                assert answer.index == int(column.argmax())
                assert answer.probability == pytest.approx(column.max(), abs=2e-5)


def test_the_list_is_the_mean_over_frames():
    model = model_of(NETS["n8_d16"])
    prediction = predict(model, torch.from_numpy(reference_weights.waveform(441_000)), top=3)
    assert prediction.object_probabilities.shape == (10, 4)
    assert prediction.scene_probabilities.shape == (6, 4)
    mean = prediction.object_probabilities.mean(1)
    assert [c.index for c in prediction.objects] == mean.topk(3).indices.tolist()
    assert [c.probability for c in prediction.objects] == mean.topk(3).values.tolist()
    torch.testing.assert_close(prediction.object_probabilities.sum(0), torch.ones(4))
    third = prediction.frames[2]
    assert third.scenes[0].index == int(prediction.scene_probabilities[:, 2].argmax())
    assert [third.start, third.center, third.end] == model.frame_times("scenes", 3)[2].tolist()


@pytest.mark.parametrize(
    ("samples", "repeats"),
    [(1, 220_500), (100, 2_205), (110_250, 2), (110_249, 3), (220_499, 2), (220_500, 1)],
)
def test_with_edge_frames_short_clips_are_repeated_whole_as_the_original_does(samples, repeats):
    model = model_of(NETS["n8_d16"])
    wave = torch.from_numpy(reference_weights.waveform(220_500))[:samples]
    prediction = predict(model, wave, edge_frames=True)
    assert prediction.repeats == repeats
    assert prediction.repeated == (repeats > 1)
    assert prediction.seconds == samples / 22_050
    with torch.no_grad():
        expected = torch.softmax(model(wave.repeat(repeats)).objects[0], 0)
    assert torch.equal(prediction.object_probabilities, expected)


def test_networks_without_names_never_get_imagenets():
    wave = torch.from_numpy(reference_weights.waveform(220_500))
    assert predict(model_of(NETS["n8_d16"]), wave).objects[0].label.startswith("object ")
    net = NETS["n8_d16"].architecture.resized([1] * 7, {"objects": 1000, "scenes": 365})
    assert original_categories(net.head_sizes) is None
    full = NETS["full8"].architecture.resized([1] * 7, {"objects": 1000, "scenes": 401})
    state = SoundNet(full).state_dict()
    shapes = full.state_shapes()
    named = build_model(full, {n: state[n] for n in shapes}, original_categories(full.head_sizes))
    answer = predict(named, wave)
    assert answer.objects[0].label == read_category_table("objects")[answer.objects[0].index]["label"]
    best = answer.scenes[0]
    assert best.original == read_category_table("scenes")[best.index]["category"]
    assert best.label == best.original[3:].replace("/", ", ").replace("_", " ")


@pytest.mark.parametrize(
    ("samples", "repeats"),
    [(1, 242_142), (110_250, 3), (121_070, 3), (121_071, 2), (242_141, 2), (242_142, 1)],
)
def test_short_clips_are_repeated_until_there_is_a_frame_that_is_no_edge_frame(samples, repeats):
    model = model_of(NETS["n8_d16"])
    wave = torch.from_numpy(reference_weights.waveform(330_750))[:samples]
    prediction = predict(model, wave)
    assert (prediction.repeats, prediction.edge_frames) == (repeats, False)
    with torch.no_grad():
        probabilities = torch.softmax(model(wave.repeat(repeats)).objects[0], 0)
    edge = model.edge_frames("objects", samples * repeats)
    assert prediction.dropped == edge
    assert torch.equal(prediction.object_probabilities, probabilities[:, : probabilities.shape[1] - edge])
    assert len(prediction.frames) == probabilities.shape[1] - edge >= 1


def test_results_say_whether_edge_frames_are_in_them():
    """10 s have one head frame, and that is an edge frame; 13 s have two, of which the last is one."""
    model = model_of(NETS["n8_d16"])
    wave = torch.from_numpy(reference_weights.waveform(330_750))[: 13 * 22_050]
    without, original = predict(model, wave), predict(model, wave, edge_frames=True)
    assert (len(without.frames), len(original.frames)) == (1, 2)
    assert (without.dropped, original.dropped) == (1, 0)
    assert without.to_dict()["edge_frames"] is False
    assert original.to_dict()["edge_frames"] is True
    assert without.middle[0].index == without.frames[0].objects[0].index
    assert len(without.to_rows()) == 2 * 2 * 5  # the clip and one frame, two heads, five ranks


def test_heads_are_a_mapping_with_the_lists_and_probabilities():
    model = model_of(NETS["n8_d16"])
    prediction = predict(model, torch.from_numpy(reference_weights.waveform(441_000)), top=3)
    assert list(prediction.heads) == ["objects", "scenes"]
    objects = prediction.heads["objects"]
    assert prediction.objects is objects.top
    assert prediction.object_probabilities is objects.probabilities
    assert len(prediction.scenes) == len(prediction.frames[0].scenes) == 3
    assert prediction.frames[1].top["scenes"] is prediction.frames[1].scenes
    assert prediction.classes == prediction.frames[0].classes == []
    assert prediction.class_probabilities.shape == (0, 4)
    assert replace(prediction, decoder="av").decoder == "av"
    assert [row[2] for row in prediction.to_rows(frames=False)] == ["object"] * 3 + ["scene"] * 3


def test_a_category_is_a_triple_that_knows_its_original_spelling():
    category = Category(362, "train station, platform", 0.5, "/t/train_station/platform")
    index, label, probability = category
    assert (index, label, probability) == category == (362, "train station, platform", 0.5)
    for copied in (pickle.loads(pickle.dumps(category)), copy.copy(category)):
        assert copied == category
        assert copied.original == "/t/train_station/platform"
    assert category._replace(probability=0.1).original == "/t/train_station/platform"
    assert Category._make((3, "robin", 0.1)).original == "robin"
    assert Category(3, "robin", 0.1).original == "robin"
    assert category.to_dict()["original"] == "/t/train_station/platform"


def test_the_category_tables():
    objects, scenes = read_category_table("objects"), read_category_table("scenes")
    assert [int(row["index"]) for row in objects] == list(range(1000))
    assert [int(row["index"]) for row in scenes] == list(range(401))
    assert objects[281] == {"index": "281", "synset": "n02123045", "label": "tabby, tabby cat"}
    assert scenes[0]["category"] == "/a/abbey"
    assert len({row["synset"] for row in objects}) == 1000


def test_a_model_in_training_mode_is_used_in_evaluation_mode_and_left_as_it_was():
    model = model_of(NETS["n8_d16"])
    wave = torch.from_numpy(reference_weights.waveform(220_500))
    expected = predict(model, wave)
    before = model.bn1.running_mean.clone()
    again = predict(model.requires_grad_(True).train(), wave)
    assert torch.equal(again.object_probabilities, expected.object_probabilities)
    assert model.training
    model.bn3.eval()  # deliberately frozen
    predict(model, wave)
    assert not model.bn3.training
    assert torch.equal(model.bn1.running_mean, before)


def test_silence_has_an_answer():
    prediction = predict(model_of(NETS["n8_d16"]), torch.zeros(220_500))
    assert torch.isfinite(prediction.object_probabilities).all()


def test_bad_input_is_explained(tmp_path):
    model = model_of(NETS["n8_d16"])
    with pytest.raises(ValueError, match="not empty"):
        predict(model, torch.zeros(0))
    with pytest.raises(ValueError, match=r"\(2, 5\)"):
        predict(model, torch.zeros(2, 5))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="NaN or infinite"):
            predict(model, torch.full((300_000,), bad))
    with pytest.raises(ValueError, match="a path or a tensor, not ndarray"):
        predict(model, np.zeros(300_000, "f4"))
    with pytest.raises(ValueError, match="top must be"):
        predict(model, torch.zeros(9), top=0)
    with pytest.raises(AudioError, match="No such file"):
        predict(model, tmp_path / "no.wav")
    for ask in (predict, embed):
        with pytest.raises(ValueError, match=r"must be a network.* not 'soundnet8'"):
            ask("soundnet8", tmp_path / "no.wav")
    trunk = SoundNet(NETS["n8_d16"].architecture.resized([1] * 7, {}))
    with pytest.raises(ValueError, match="no heads"):
        predict(trunk, torch.zeros(220_500))
