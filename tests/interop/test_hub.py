"""The Hugging Face Hub, with huggingface_hub and without, and torch.hub."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
from support.fake_hub import COMMIT, fake_hub
from support.networks import CHECKOUT

import soundnet_port as sp
from soundnet_port.network.weights import WeightsError, read_metadata, read_weights, write_weights

pytest.importorskip("huggingface_hub", reason="needs the extra [hub]")
from soundnet_port.interop.hub import HubSoundNet

NAMES = {"objects": [f"o{i}" for i in range(10)], "scenes": ["a | b", *(f"s{i}" for i in range(5))]}


@pytest.fixture
def weights(tmp_path, demo_report):
    """Converted weights with a license and category names."""
    architecture, state, metadata = read_weights(demo_report.weights)
    path = tmp_path / "mine.safetensors"
    write_weights(path, architecture, state, metadata | {"license": "cc-by-4.0", "categories": NAMES})
    return path


def test_a_saved_folder_can_be_loaded_with_and_without_the_mixin(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    HubSoundNet.from_weights(weights).save_pretrained("folder")
    assert sorted(file.name for file in (tmp_path / "folder").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert (tmp_path / "folder" / "model.safetensors").read_bytes() == weights.read_bytes()
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert (config["model_type"], config["sample_rate"], config["heads"]["scenes"]) == (
        "soundnet8",
        22_050,
        6,
    )

    wave = torch.randn(1, 210_000) * 50
    expected = sp.load_pretrained(weights)(wave)
    for model in (HubSoundNet.from_pretrained("folder"), sp.load_pretrained("./folder")):
        assert torch.equal(model(wave).scenes, expected.scenes)
        assert model.categories["objects"] == tuple(NAMES["objects"])
        assert not model.training
        assert model._modules_unchanged([wave], list(model.modules()))  # as fast as any
    assert HubSoundNet.from_pretrained("folder").metadata == read_metadata(weights)


def test_the_model_card(weights):
    metadata = read_metadata(weights)
    card = str(HubSoundNet.from_weights(weights).generate_model_card())
    front_matter = card.split("---")[1]
    assert "license: cc-by-4.0\n" in front_matter
    assert "pipeline_tag: audio-classification\n" in front_matter
    assert f"sha256 {metadata['source']['sha256']}; compared with its own graph" in card
    assert "| scenes | 6: a / b; s0; s1; s2; s3; s4 |" in card
    assert 'model.extract(sp.load_audio("sound.wav"), ["conv7"])' in card
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")


def test_metadata_of_other_tensors_is_dropped(weights, tmp_path):
    model = HubSoundNet.from_weights(weights)
    model.conv1.bias[0] += 1
    model.save_pretrained(tmp_path / "folder")
    metadata = read_metadata(tmp_path / "folder" / "model.safetensors")
    assert (metadata["source"], metadata["parity"], metadata["license"]) == ({}, {}, "cc-by-4.0")
    assert metadata["categories"] == NAMES
    assert "| source | not recorded |" in (tmp_path / "folder" / "README.md").read_text()
    assert torch.equal(sp.load_pretrained(tmp_path / "folder").conv1.bias, model.conv1.bias)


def test_a_custom_network_in_half_precision(tmp_path):
    model = HubSoundNet(sp.SOUNDNET5.resized((2, 2, 2, 2), {})).bfloat16()
    model.save_pretrained(tmp_path / "folder")
    loaded = sp.load_pretrained(tmp_path / "folder")
    assert torch.equal(loaded.conv4.weight, model.conv4.weight.float())
    assert "feature-extraction" in (tmp_path / "folder" / "README.md").read_text()


def test_pickles_are_never_read(tmp_path):
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    for load in (HubSoundNet.from_pretrained, sp.load_pretrained):
        with pytest.raises(WeightsError, match=r"model\.safetensors: no such|is a directory"):
            load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "pytorch_model.bin").read_bytes())
    with pytest.raises(WeightsError, match="not a safetensors file"):
        HubSoundNet.from_pretrained(tmp_path)


def test_push_pull_and_offline_cache(weights, tmp_path):
    """In a new interpreter, as huggingface_hub reads the environment only once."""
    load = (
        "print(HubSoundNet.from_pretrained('me/net').metadata['license'])\n"
        "try: HubSoundNet.from_pretrained('me/other')\n"
        "except Exception as error: print(type(error).__name__)\n"
    )
    code = (
        "from huggingface_hub import constants\n"
        "from soundnet_port.interop.hub import HubSoundNet\n"
        f"print(HubSoundNet.from_weights({str(weights)!r}).push_to_hub('me/net'))\n"
        f"{load}print(flush=True)\ninput()\nconstants.HF_HUB_OFFLINE = True\n{load}"
    )
    with fake_hub() as hub:
        hub.files["me/other"] = {"config.json": b"{}", "pytorch_model.bin": b"\x80\2}q."}
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_nothing"}
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        online = list(iter(process.stdout.readline, "\n"))
    # the server has ended
    offline, _ = process.communicate("\n")
    # without safetensors, no pickle is requested
    assert "".join(online).split() == [f"{hub.url}/me/net", "cc-by-4.0", "RemoteEntryNotFoundError"]
    assert sorted(hub.files["me/net"]) == ["README.md", "config.json", "model.safetensors"]
    assert hub.files["me/net"]["model.safetensors"] == weights.read_bytes()
    assert offline.split() == ["cc-by-4.0", "LocalEntryNotFoundError"]
    cached = tmp_path / "home" / "hub" / "models--me--net" / "snapshots" / COMMIT
    assert sp.load_pretrained(cached).architecture.widths[-1] == 64


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.delitem(sys.modules, "soundnet_port.interop.hub")
    with pytest.raises(ImportError, match=r"pip install 'soundnet-port\[hub\]'"):
        importlib.import_module("soundnet_port.interop.hub")


# ---- torch.hub


def test_torch_hub_loads_from_a_clone(tmp_path, monkeypatch, demo_report):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    clone = {"repo_or_dir": str(CHECKOUT), "source": "local"}
    model = torch.hub.load(model="demo", **clone)
    assert isinstance(model, sp.SoundNet)
    assert len(model.categories["objects"]) == 1000
    assert torch.hub.load(model="soundnet5", pretrained=False, **clone).architecture == sp.SOUNDNET5
    with pytest.raises(WeightsError, match="no weights named 'soundnet8'"):
        torch.hub.load(model="soundnet8", **clone)
    (tmp_path / "soundnet-weights").mkdir()  # $SOUNDNET_WEIGHTS in these tests
    (tmp_path / "soundnet-weights" / "soundnet8.safetensors").write_bytes(demo_report.weights.read_bytes())
    assert torch.hub.load(model="soundnet8", **clone).architecture.widths[0] == 1


def test_torch_hub_lists_only_the_networks(monkeypatch):
    monkeypatch.syspath_prepend(str(CHECKOUT))
    import hubconf

    names = [name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")]
    assert names == ["soundnet8", "soundnet5", "demo"]
