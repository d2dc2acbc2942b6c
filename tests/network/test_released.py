"""The released SoundNet-8 itself: recognized from every form, and equal to real Torch7 at every module.

These tests run where the network is in a weights folder of the user (soundnet-port fetch).
"""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from support.networks import DEVICES, SHARED, SOFTMAX_TOLERANCE, TOLERANCE, assert_agrees
from support.port_writer import python2_npy, tensorflow_layers
from support.t7_writer import graph, serialize

import soundnet_port as sp
from soundnet_port.cli.main import main
from soundnet_port.conversion.convert import convert
from soundnet_port.conversion.released_parity import (
    ORDINARY_TOLERANCE,
    compare_with_torch7,
    load_recordings,
)
from soundnet_port.network.weights import cpu_state_dict, read_metadata, read_weights

pytestmark = pytest.mark.released
HEADS = {"objects": "obj", "scenes": "scn"}
WHOLE = "the released SoundNet-8: all 46 tensors bit for bit"
RECORDINGS = {
    "examples": (SHARED / "real" / "examples", "torch7"),
    "ESC-10": (SHARED / "real", "real8_ref"),
}


def recorded_inputs(folder, name):
    """(recording, its description, waveform) of each input of a set, if its samples are the recorded ones."""
    if not (folder / f"{name}.npz").exists():
        pytest.skip("the full recordings are not part of the project (too large) and ../shared is not there")
    reference = np.load(folder / f"{name}.npz")
    for key, described in json.loads((folder / f"{name}.json").read_text())["inputs"].items():
        path = folder / described["file"]
        if not path.exists():
            path = SHARED.parent / "esc10" / "audio" / described["file"]
        yield reference, key, described, sp.load_audio(path).repeat(described["repetitions"])


@pytest.mark.parametrize("engine", [True, False], ids=["engine", "modules"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recordings", RECORDINGS)
def test_every_module_agrees_with_real_torch7(released_weights, recordings, device, engine):
    model = sp.load_pretrained(released_weights, device)
    layers = model.architecture
    for reference, key, described, waveform in recorded_inputs(*RECORDINGS[recordings]):
        keys = [m.name if engine else m.module for m in layers.modules if m.is_layer or not engine]
        with torch.inference_mode():
            out = model.extract(waveform.to(device), [*keys, *HEADS])
        for layer, values in out.items():
            recorded = HEADS.get(layer) or f"m{layers.layer(layer).module:02d}"
            # at the heads most of the error is Torch7's own: up to 5.2e-6 from float64
            assert_agrees(reference, key, recorded, values.cpu(), mean=1 / 2)
            if recorded == "m24":  # its last frame is up to a hundred times as large as all others
                theirs = reference[f"{key}/m24/full"][0, :, :-1, 0]
                error = np.abs(values.cpu().numpy()[0, :, :-1] - theirs).max()
                assert error <= ORDINARY_TOLERANCE * np.abs(theirs).max()
            if layer in HEADS:
                probabilities = torch.softmax(values, 1).cpu()
                # float32 rounds the logits of an edge frame, which are up to 410, to 3e-5
                edge = described["last_head_frame_has_last_conv7_frame"]
                tolerance = 1e-4 if edge else SOFTMAX_TOLERANCE
                assert_agrees(reference, key, f"{recorded}_softmax", probabilities, tolerance)
                top = values[0].topk(5, dim=0).indices.T.tolist()
                assert top == described[f"top5_{layer}"]
        prediction = sp.predict(model, waveform.cpu(), edge_frames=True) if device == "cpu" else None
        if prediction:
            middle = [described["middle_object"], described["middle_scene"]]
            assert [category.index for category in prediction.middle] == middle


def test_the_golden_file_that_comes_along_agrees(released_model):
    parity = compare_with_torch7(released_model)
    assert parity.passed
    assert len(parity.layers) == (24 + 1 + 4) + (10 + 1 + 4)
    assert all(row.relative > 0 for row in parity.layers)  # nothing is compared with itself
    assert parity.worst.relative <= TOLERANCE


@pytest.mark.parametrize("tensor", ["conv1.bias", "bn4.running_mean", "bn7.weight", "scenes.bias"])
def test_the_golden_file_catches_a_value_that_moves(released_weights, tensor):
    model = sp.load_pretrained(released_weights)
    with torch.no_grad():
        values = model.state_dict()[tensor]
        values[values.abs().argmax()] *= 1.01
    parity = compare_with_torch7(model)
    assert not parity.passed
    assert "<- differs" in parity.table()


@pytest.fixture
def state(released_model):
    return cpu_state_dict(released_model)


def test_from_a_t7_in_the_released_layout(released_model, state, tmp_path, capsys):
    """Converted, recognized, its own graph run, compared with Torch7's recordings; then one value changed."""
    path = tmp_path / "soundnet8_final.t7"
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    path.write_bytes(serialize(graph(released_model.architecture, arrays, released=True)))
    (report,) = convert(path)
    assert report.recognition.released == "whole"
    assert report.weights.name == "soundnet8.safetensors"
    assert report.released_parity.passed
    assert max(row.relative for row in report.parity) <= TOLERANCE
    _, converted, metadata = read_weights(report.weights)
    assert all(torch.equal(converted[name], tensor) for name, tensor in state.items())
    assert metadata["recognition"] == WHOLE
    assert metadata["torch7_parity"]["worst"] <= TOLERANCE
    assert main(["info", str(path)]) == 0
    assert WHOLE in capsys.readouterr().out
    arrays["bn6.bias"] = arrays["bn6.bias"].copy()
    arrays["bn6.bias"][100] += 1e-3
    path.write_bytes(serialize(graph(released_model.architecture, arrays, released=True)))
    assert main(["info", str(path)]) == 0
    assert "the released SoundNet-8 up to pool5, bit for bit" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["sound8.npy", "sound8.pth"])
def test_from_the_forms_of_other_ports(released_model, state, tmp_path, capsys, name):
    path = tmp_path / name
    if name.endswith("npy"):
        path.write_bytes(python2_npy(tensorflow_layers(state)))
    else:
        torch.save(state, path)
    assert main(["convert", str(path)]) == 0
    out = capsys.readouterr().out
    assert WHOLE in out
    assert "soundnet8.safetensors" in out
    assert "no parity check" not in out
    assert main(["info", str(path)]) == 0
    assert WHOLE in capsys.readouterr().out


def test_info_verify_and_a_head_of_ones_own(released_weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SOUNDNET_WEIGHTS", str(released_weights.parent))
    assert main(["info", "soundnet8"]) == 0
    assert WHOLE in capsys.readouterr().out
    assert main(["verify", "soundnet8"]) == 0
    assert "compared with 4 recordings of real Torch7: layers within" in capsys.readouterr().out
    assert main(["predict", str(sp.example("waves"))]) == 0
    assert capsys.readouterr().err == ""


def test_the_three_examples_are_named_as_a_listener_would(released_model):
    expected = {
        "waves": ({"seashore, coast, seacoast, sea-coast", "sandbar, sand bar"}, {"beach", "ocean"}),
        "baby": ({"diaper, nappy, napkin", "bassinet", "cradle"}, {"hospital room", "nursery"}),
        "helicopter": ({"warplane, military plane", "parachute, chute"}, {"sky", "airfield"}),
    }
    for name, (objects, scenes) in expected.items():
        prediction = sp.predict(released_model, sp.example(name), top=4)
        assert len(objects & {category.label for category in prediction.objects}) >= 2
        assert len(scenes & {category.label for category in prediction.scenes}) >= 2


def test_metadata_say_what_was_found(released_weights):
    metadata = read_metadata(released_weights)
    assert metadata["released"] == "whole"
    assert metadata["torch7_parity"]["worst"] <= TOLERANCE


def test_edge_frames_and_torch7s_files_are_the_originals_answers(
    released_weights, tmp_path, capsys, monkeypatch
):
    """A clip of 5 s is repeated to 10 s there, and its one head frame is an edge frame: a Norfolk terrier."""
    h5py = pytest.importorskip("h5py", reason="needs the extra [hdf5]")
    monkeypatch.setenv("SOUNDNET_WEIGHTS", str(released_weights.parent))
    recordings = load_recordings()  # input 0: waves, played twice
    sound = shutil.copy(sp.example("waves"), tmp_path)
    assert main(["predict", sound, "--format", "torch7"]) == 0
    with h5py.File(f"{sound}.soundnet_categories.h5") as file:
        for head, dataset in (("objects", "object"), ("scenes", "scene")):
            recorded = recordings[f"0/{head} softmax/values"]
            assert np.abs(file[dataset][0, :, 0, 0] - recorded).max() <= SOFTMAX_TOLERANCE
    assert main(["predict", sound, "--edge-frames", "--top", "1"]) == 0
    out = capsys.readouterr().out
    assert "(5.00 s, too short: played 2 times)" in out
    assert re.search(r"0\.98\d\d  Norfolk terrier +1\.0000  parking garage, outdoor", out)
    assert main(["predict", sound, "--top", "1"]) == 0
    assert "Norfolk" not in capsys.readouterr().out


def test_few_clips_of_esc10_get_the_answers_of_edge_frames(released_model):
    """One of each class here; benchmarks/answers.py has all 400."""
    if not (SHARED.parent / "esc10").exists():
        pytest.skip("ESC-10 is not here")
    sounds = {sound.label: sound for sound in sp.read_labeled(SHARED.parent / "esc10").sounds}
    assert len(sounds) == 10
    for sound in sounds.values():
        prediction = sp.predict(released_model, sound.path)
        assert prediction.objects[0].label not in ("Norfolk terrier", "pole")
        assert not prediction.scenes[0].label.startswith("parking garage")
