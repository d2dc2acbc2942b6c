"""Networks, folders and file systems that several tests use."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from support.browser import chromium, page  # noqa: F401  (fixtures)
from support.cli_processes import fork_the_server, replace_spawn
from support.networks import CHECKOUT, DEMO, NETS, model_of, weights_folders

from soundnet_port.conversion import recognition, released_parity
from soundnet_port.conversion.convert import ConversionResult, convert
from soundnet_port.conversion.golden import sample_evenly
from soundnet_port.network import weights
from soundnet_port.network.weights import checksum, cpu_state_dict, read_metadata
from soundnet_port.pretrained import load_pretrained


@pytest.fixture(scope="module")
def model():
    """The smallest reference network."""
    return model_of(NETS["n8_d16"])


@pytest.fixture(scope="session")
def demo_report(tmp_path_factory):
    """The conversion of the small Torch7 file that comes along."""
    (report,) = convert(DEMO, tmp_path_factory.mktemp("weights") / "demo.safetensors")
    assert isinstance(report, ConversionResult)
    return report


@pytest.fixture
def demo_model(demo_report):
    return load_pretrained(demo_report.weights)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def pretend_released(monkeypatch):
    """The small reference network counts as the released one: its fingerprints, and recordings of itself."""
    network = model_of(NETS["n8_d16"])
    prints = {name: recognition.fingerprint(tensor) for name, tensor in cpu_state_dict(network).items()}
    monkeypatch.setattr(recognition, "SOUNDNET8", network.architecture)
    monkeypatch.setattr(recognition, "fingerprints", lambda: prints)
    for module in ("recognition", "port_comparison"):
        monkeypatch.setattr(
            f"soundnet_port.conversion.{module}.released_checksum", lambda: checksum(cpu_state_dict(network))
        )
    inputs = json.loads(str(released_parity.load_recordings()["about"]))["inputs"]
    made = {"about": json.dumps({"inputs": inputs})}
    for number, settings in enumerate(inputs):
        for output, values in released_parity._outputs(
            network, released_parity._input(settings), all_modules=True
        ):
            made[f"{number}/{output}/shape"] = np.array(values.shape)
            made[f"{number}/{output}/values"] = sample_evenly(values, released_parity.VALUES)
            made[f"{number}/{output}/largest"] = np.abs(values).max()
    monkeypatch.setattr(released_parity, "load_recordings", lambda: made)
    return network


@pytest.fixture
def disk(tmp_path):
    """Makes a file system of so many bytes, or one that cannot be written, and says where it is."""
    mounted = []

    def made(size):
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        option = f"size={-(-size // 4096) * 4}k" if size else "ro"
        command = ["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True)
        if done.returncode:
            pytest.skip("needs to mount a small file system, which root may")
        mounted.append(place)
        return place

    try:
        if not shutil.which("mount"):
            pytest.skip("needs mount")
        yield made
    finally:
        for place in mounted:
            subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture(scope="session")
def shipped_weights(tmp_path_factory):
    """A folder with the demonstration network alone; in a checkout others may lie beside it."""
    folder = tmp_path_factory.mktemp("shipped")
    shutil.copy(CHECKOUT / "weights" / "demo.safetensors", folder)
    return folder


@pytest.fixture(autouse=True)
def _own_weights_folder(tmp_path, monkeypatch, shipped_weights):
    """No test finds or leaves weights in the user's folders, or downloads any without saying so."""
    own = str(tmp_path / "soundnet-weights")
    monkeypatch.setenv("SOUNDNET_WEIGHTS", own)  # of processes that are started, too
    monkeypatch.setattr(weights, "weights_folders", lambda: [Path(os.environ.get("SOUNDNET_WEIGHTS") or own)])
    monkeypatch.setattr(weights, "SHIPPED", shipped_weights)
    monkeypatch.setenv("SOUNDNET_OFFLINE", "1")


@pytest.fixture(scope="session", autouse=True)
def _quick_processes():
    """Spawned processes come from a fork server, which takes milliseconds instead of seconds."""
    fork_the_server()
    undo = replace_spawn()
    yield
    undo()


@pytest.fixture(scope="session")
def released_weights():
    """The released SoundNet-8 in a weights folder of this user; for tests marked `released`."""
    for folder in weights_folders():  # before the fixture above hides them
        path = folder / "soundnet8.safetensors"
        if path.is_file() and read_metadata(path)["sha256"] == recognition.released_checksum():
            return path
    pytest.skip("the released network is in no weights folder (soundnet-port fetch)")


@pytest.fixture(scope="session")
def released_model(released_weights):
    return load_pretrained(released_weights)
