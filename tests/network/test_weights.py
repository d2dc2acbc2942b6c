"""Weights files: found by name, verified at every load, written all or not at all."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.networks import weights_folders

import soundnet_port.network.weights as weights_module
from soundnet_port import WeightsError, load_pretrained
from soundnet_port.files import atomic_write
from soundnet_port.network.weights import METADATA_KEY, read_metadata, read_weights, write_weights


def test_loaded_networks_are_ready_for_use(demo_report):
    model = load_pretrained(demo_report.weights)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert all(t.device.type == "cpu" for t in model.state_dict().values())
    model.requires_grad_(True).train()
    model(torch.randn(1, 300_000)).objects.sum().backward()


def test_the_file_holds_the_state_dict_as_documented(demo_report):
    state = load_file(demo_report.weights)
    architecture, again, metadata = read_weights(demo_report.weights)
    assert {n: tuple(t.shape) for n, t in state.items()} == architecture.state_shapes()
    assert all(torch.equal(again[n], state[n]) for n in state)
    assert metadata["architecture"] == "soundnet8"
    assert metadata["categories"] is None
    assert metadata["released"] is None
    assert metadata["parity"]["worst"] < 5e-6
    assert len(metadata["source"]["sha256"]) == 64
    assert json.loads(json.dumps(read_metadata(demo_report.weights))) == metadata


def test_names_are_looked_up_in_the_weights_folders(tmp_path, monkeypatch, demo_report):
    data = demo_report.weights.read_bytes()
    first, second = tmp_path / "soundnet-weights", tmp_path / "data"
    monkeypatch.setattr(weights_module, "weights_folders", lambda: [first, second])
    with pytest.raises(WeightsError) as error:
        load_pretrained("soundnet8")
    for part in (first, second, "soundnet-port fetch", "soundnet-port convert", "soundnet-port demo"):
        assert str(part) in str(error.value)
    second.mkdir()
    (second / "soundnet8.safetensors").write_bytes(data)
    (second / "mine.safetensors").write_bytes(data)
    assert load_pretrained("soundnet8").architecture.widths[0] == 1
    with pytest.raises(WeightsError, match="mine, soundnet5, soundnet8"):
        load_pretrained("other")
    first.mkdir()
    (first / "soundnet8.safetensors").write_bytes(b"nonsense")
    with pytest.raises(WeightsError, match="not a safetensors file"):
        load_pretrained("soundnet8")


def test_the_environment_comes_first_then_the_checkout_then_the_user(tmp_path):
    folders = weights_folders()
    assert folders[0] == tmp_path / "soundnet-weights"
    assert folders[-1].name == "weights"
    assert "soundnet-port" in str(folders[-1])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("soundnet8_final.t7", "soundnet-port convert soundnet8_final.t7"),
        ("models.zip", "soundnet-port convert models.zip"),
        ("no/such.safetensors", "no such weights file"),
        ("./nothing", "no such weights file"),
        ("~nobody-of-that-name/x.safetensors", "home directory"),
        ("soundnet9", "known names: demo, soundnet5, soundnet8"),
    ],
)
def test_what_is_not_there_is_explained(name, message):
    with pytest.raises(WeightsError, match=message):
        load_pretrained(name)


def changed(path, report, change):
    state, metadata = load_file(report.weights), dict(read_metadata(report.weights))
    change(state, metadata)
    save_file(state, path, {METADATA_KEY: json.dumps(metadata)})
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, _: s["conv3.weight"].view(-1)[5].add_(1e-6), "checksum"),
        (lambda s, _: s.pop("bn4.running_mean"), r"bn4\.running_mean is missing"),
        (lambda s, _: s.update(extra=torch.zeros(2)), "extra is"),
        (lambda s, _: s.update({"conv1.bias": torch.zeros(9)}), r"conv1\.bias is \(9,\), expected \(1,\)"),
        (lambda s, _: s.update({"conv1.bias": torch.zeros(1).double()}), "float32"),
        (lambda _, m: m.update(architecture="soundnet9"), "no SoundNet"),
        (lambda _, m: m.update(widths=[1, 2]), "no SoundNet"),
        (lambda _, m: m.update(widths=None), "widths is a NoneType"),
        (lambda _, m: m.update(heads=[]), "heads is a list"),
        (lambda _, m: m.update(heads={"objects": 3}), "no SoundNet"),
        (lambda _, m: m.update(categories={"objects": ["a"], "scenes": ["b"]}), "do not fit"),
        (lambda _, m: m.update(categories=7), "categories is a int"),
        (lambda _, m: m.update(categories={"objects": 3, "scenes": [1]}), "names that are no text"),
        (lambda _, m: m.update(source="x"), "source is a str"),
        (lambda _, m: m.update(parity=[1]), "parity is a list"),
        (lambda _, m: m.update(ignored=[5]), "names that are no text"),
        (lambda _, m: m.update(widths=[1.0, 2, 4, 8, 16, 32, 64]), "no whole numbers"),
        (lambda _, m: m.pop("sha256"), "checksum"),
    ],
)
def test_changed_weights_are_refused(tmp_path, demo_report, change, message):
    path = changed(tmp_path / "w.safetensors", demo_report, change)
    with pytest.raises(WeightsError, match=message) as error:
        load_pretrained(path)
    assert str(path) in str(error.value)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="without SoundNet's metadata"):
        load_pretrained(path)
    save_file({"a": torch.zeros(1)}, path, {METADATA_KEY: "[" * 100_000})
    with pytest.raises(WeightsError, match="without SoundNet's metadata"):
        load_pretrained(path)
    for content in (b"", b"\x80\2}q.", struct.pack("<Q", 2**62) + b"{}"):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match="not a safetensors file"):
            load_pretrained(path)
    with pytest.raises(WeightsError, match="is a directory"):
        load_pretrained(tmp_path / "")


def test_truncated_weights_are_refused(tmp_path, demo_report):
    data = demo_report.weights.read_bytes()
    path = tmp_path / "w.safetensors"
    for end in (7, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:end])
        with pytest.raises(WeightsError, match="not a safetensors file"):
            load_pretrained(path)


def test_writing_fails_whole(tmp_path, demo_report):
    architecture, state, metadata = read_weights(demo_report.weights)
    path = tmp_path / "deep" / "er" / "w.safetensors"
    with pytest.raises(KeyError), atomic_write(path) as temporary:
        temporary.write_bytes(b"half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    before = os.umask(0o027)
    write_weights(path, architecture, state, metadata)
    os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
    assert [p.name for p in path.parent.iterdir()] == ["w.safetensors"]
    assert path.read_bytes() == demo_report.weights.read_bytes()
