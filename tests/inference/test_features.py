"""Clip vectors, and the files that the original's scripts wrote."""

import csv
import io
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile
import torch
from support import reference_weights
from support.networks import NETS, SOFTMAX_TOLERANCE, assert_agrees, file, lengths, model_of

import soundnet_port as sp
from soundnet_port import embed
from soundnet_port.cli.main import main
from soundnet_port.conversion.convert import convert
from soundnet_port.inference.activations import features
from soundnet_port.inference.alignment import align
from soundnet_port.network.engine import BLOCK


@pytest.fixture
def weights(tmp_path):
    """The two reference networks by name, and a function that writes a recorded input."""
    convert(file("n8_d16_cudnnA.t7"))
    convert(file("n5_d8_cudnnA.t7"))

    def sound(samples):
        path = tmp_path / f"{samples}.wav"
        soundfile.write(path, reference_weights.samples(samples), 22_050)
        return path

    return sound


def test_embed_pools_a_layer_over_time(tmp_path):
    model = model_of(NETS["n8_d16"])
    wave = torch.from_numpy(reference_weights.waveform(110_250))
    path = tmp_path / "a.wav"
    soundfile.write(path, reference_weights.samples(110_250), 22_050)
    frames_and_edge = model.extract(wave, ["conv7"])["conv7"][0]
    model.requires_grad_(True).train()
    frames = frames_and_edge[:, :-1]  # without the edge frame
    assert torch.equal(embed(model, path, layer="conv7", pool="mean"), frames.double().mean(1).float())
    assert torch.equal(embed(model, wave, layer=24, pool="max"), frames.max(1).values)
    both = embed(model, wave, layer="conv7", pool="mean+std")
    assert both.shape == (128,)
    torch.testing.assert_close(both[64:], torch.from_numpy(frames.numpy().std(1)))
    assert embed(model, wave).shape == (16,)  # pool5
    assert not embed(model, wave).requires_grad
    assert model.training
    with_edge = embed(model, wave, layer="conv7", pool="max", edge_frames=True)
    assert torch.equal(with_edge, frames_and_edge.max(1).values)
    one_frame = embed(model, wave[:5_000], layer="conv7", pool="mean+std", edge_frames=True)
    assert (one_frame[64:] == 0).all()
    with pytest.raises(ValueError, match=r"conv7 edge frames alone.*at least 12,766 samples"):
        embed(model, wave[:12_765], layer="conv7")
    assert embed(model, wave[:12_766], layer="conv7").shape == (64,)
    with pytest.raises(ValueError, match="choose from mean, max"):
        embed(model, wave, pool="median")
    with pytest.raises(ValueError, match="too short"):
        embed(model, wave[:4_000], layer="conv7")
    with pytest.raises(ValueError, match=r"\(1, 110250\)"):
        embed(model, wave[None])


def test_long_files_give_what_their_waveforms_give(tmp_path):
    """They are read in blocks. Relative to the largest value; blocks may add in another order."""
    model, path = model_of(NETS["n8_d16"]), tmp_path / "long.flac"
    soundfile.write(path, reference_weights.samples(2 * BLOCK + 12_345), 22_050)
    wave = sp.load_audio(path)
    for pool in ("mean", "max", "mean+std"):
        ours, expected = (embed(model, sound, layer="pool2", pool=pool) for sound in (path, wave))
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
    ours, expected = (features(model, sound, "conv7") for sound in (path, wave))
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
    ours, expected = (features(model, sound, 22) for sound in (path, wave))  # a module has no blocks
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
    ours, expected = (sp.predict(model, sound) for sound in (path, wave))
    assert ours.seconds == expected.seconds == (2 * BLOCK + 12_345) / 22_050
    assert ours.middle[0].label == expected.middle[0].label
    assert (ours.object_probabilities - expected.object_probabilities).abs().max() <= 2e-5
    assert (ours.decoder, expected.decoder) == ("soundfile", None)


@pytest.mark.parametrize(("net", "name"), [("n8_d16", "soundnet8"), ("n5_d8", "soundnet5")])
def test_the_originals_category_files_equal_torch7s_softmax(weights, net, name, capsys):
    h5py = pytest.importorskip("h5py", reason="needs the extra [hdf5]")
    reference = np.load(NETS[net].reference)
    for samples in (n for n in lengths(reference) if n >= 220_500):
        path = weights(samples)
        assert main(["predict", str(path), "-w", name, "--format", "torch7"]) == 0
        result = f"{path}.soundnet_categories.h5"
        assert capsys.readouterr().out == f"{result}\n"
        with h5py.File(result) as h5:
            assert set(h5) == {"object", "scene"}
            for key, head in (("object", "obj"), ("scene", "scn")):
                values = h5[key][()]
                assert values.dtype == np.float32
                assert values.shape == reference[f"L{samples}/{head}_softmax/full"].shape
                assert_agrees(reference, samples, f"{head}_softmax", values, SOFTMAX_TOLERANCE)


@pytest.mark.parametrize("layer", ["18", "pool5", "22", "24"])
def test_the_originals_feature_files_equal_torch7s_outputs(weights, layer, capsys):
    h5py = pytest.importorskip("h5py", reason="needs the extra [hdf5]")
    reference = np.load(NETS["n8_d16"].reference)
    number = {"pool5": 18}.get(layer) or int(layer)
    for samples in (4_574, 110_250):
        path = weights(samples)
        assert main(["extract", str(path), "--layer", layer, "--format", "torch7"]) == 0
        assert capsys.readouterr().out == f"{path}.soundnet.h5\n"
        with h5py.File(f"{path}.soundnet.h5") as h5:
            assert list(h5) == [f"layer{number}"]
            values = h5[f"layer{number}"][()]
        frames = reference[f"L{samples}/m{number}/full"].shape[2]
        channels = 16 if number == 18 else 64
        assert values.shape == ((channels,) if frames == 1 else (channels, frames))  # squeezed
        assert_agrees(reference, samples, f"m{number}", values)


def test_results_that_are_there_stay_unless_forced(weights, capsys):
    pytest.importorskip("h5py", reason="needs the extra [hdf5]")
    path = weights(110_250)
    result = path.with_name(path.name + ".soundnet.h5")
    result.write_text("mine")
    command = ["extract", str(path), "--format", "torch7"]
    assert main(command) == 0
    assert result.read_text() == "mine"
    assert "--force" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0
    assert result.read_bytes()[:4] == b"\x89HDF"
    assert sorted(p.name for p in path.parent.glob("*.part")) == []


def test_a_result_that_cannot_be_written_does_not_stop_the_batch(weights, capsys):
    pytest.importorskip("h5py", reason="needs the extra [hdf5]")
    first, second = weights(110_250), weights(120_000)
    first.with_name(first.name + ".soundnet.h5").mkdir()  # a folder in the way
    assert main(["extract", str(first), str(second), "--format", "torch7", "--force"]) == 1
    captured = capsys.readouterr()
    assert captured.out == f"{second}.soundnet.h5\n"
    assert f"soundnet-port: {first}.soundnet.h5: cannot be written" in captured.err
    assert captured.err.count("\n") == 2  # the first: the weights of the released name are not those


def test_features_as_csv_and_json(weights, capsys):
    path = weights(110_250)
    expected = model_of(NETS["n8_d16"]).extract(torch.from_numpy(reference_weights.waveform(110_250)), [24])[
        24
    ][0]
    assert main(["extract", str(path), "--layer", "conv7", "--csv"]) == 0
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert rows[0][:6] == ["file", "start", "center", "end", "edge", "unit0"]
    assert len(rows) == 1 + 4
    assert [row[4] for row in rows[1:]] == ["0", "0", "0", "1"]
    np.testing.assert_array_equal(np.array([row[5:] for row in rows[1:]], float).T, expected)
    assert main(["extract", str(path), "--layer", "24", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    np.testing.assert_array_equal(np.array(record["features"]).T, expected)
    assert (record["layer"], record["edge_frames"]) == (24, 1)
    assert float(rows[1][1]) == record["times"][0][0] < 0


def test_predictions_as_csv(weights, capsys):
    path = weights(441_000)
    assert main(["predict", str(path), "--csv", "-n", "2", "--over-time"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 2 * 2 * (1 + 4)  # heads, ranks, the clip and its frames
    assert {row["head"] for row in rows} == {"object", "scene"}
    assert rows[0]["end"] == "20.0"
    assert rows[0]["label"] == f"object {rows[0]['index']}"


def test_misuse_of_extract(weights, capsys, monkeypatch):
    path = str(weights(110_250))
    assert main(["extract", path, "--layer", "conv9"]) == 2
    assert "choose from conv1" in capsys.readouterr().err
    assert main(["extract", path, "--layer", "objects", "--format", "torch7"]) == 2
    assert main(["extract", path, "--layer", "objects", "--csv"]) == 1  # 5 s are too short for the heads
    assert "209,374 samples" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    assert main(["extract", path, "--format", "torch7"]) == 1
    assert "[hdf5]" in capsys.readouterr().err


def test_predict_gives_the_originals_answer_with_edge_frames_and_in_its_files(weights, tmp_path, capsys):
    """10 s have one head frame, which is an edge frame."""
    h5py = pytest.importorskip("h5py", reason="needs the extra [hdf5]")
    path = weights(220_500)
    original = sp.predict(sp.load_pretrained("soundnet8"), path, edge_frames=True)
    assert main(["predict", str(path), "--json", "--over-time", "--edge-frames"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["edge_frames"], record["repeats"], len(record["frames"])) == (True, 1, 1)
    assert record["middle"]["object"]["index"] == original.middle[0].index
    assert main(["predict", str(path), "--format", "torch7"]) == 0
    with h5py.File(f"{path}.soundnet_categories.h5") as file:
        np.testing.assert_array_equal(file["object"][0, :, :, 0], original.object_probabilities)
    capsys.readouterr()
    assert main(["predict", str(path)]) == 0
    assert "(10.00 s, too short: played 2 times)" in capsys.readouterr().out
    assert main(["predict", str(weights(286_650))]) == 0
    assert "(13.00 s, edge frame left out)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["n8_d16", "n5_d8"])
def test_without_a_layer_it_is_the_papers_or_the_one_of_its_size(name, tmp_path):
    model = model_of(NETS[name])
    wave = torch.from_numpy(reference_weights.waveform(110_250))
    usual = {"n8_d16": "pool5", "n5_d8": "conv4"}[name]
    assert torch.equal(embed(model, wave), embed(model, wave, layer=usual))
    frames = features(model, wave)
    assert torch.equal(frames, features(model, wave, usual))
    for rows, expected in zip(
        align(model, None, frames.T, 5.0, tr=1.0), align(model, usual, frames.T, 5.0, tr=1.0), strict=True
    ):
        assert torch.equal(rows, expected)
    path = tmp_path / "a.wav"
    soundfile.write(path, reference_weights.samples(110_250), 22_050)
    sp.extract_corpus(model, [path], tmp_path / "out", workers=1)
    with np.load(tmp_path / "out" / "a.wav.npz") as data:
        assert usual in data


def test_threads_that_embed_at_once_leave_a_model_in_the_mode_it_had():
    model = model_of(NETS["n8_d16"]).requires_grad_(True).train()
    wave = torch.from_numpy(reference_weights.waveform(110_250))
    expected = embed(model, wave)
    with ThreadPoolExecutor(4) as pool:
        vectors = list(pool.map(lambda _: embed(model, wave), range(24)))
    assert all(torch.equal(vector, expected) for vector in vectors)
    assert all(module.training for module in model.modules())
