"""Paths, networks and checks that several tests use."""

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import formula
import numpy as np
import pytest
import torch
from browser import chromium, page  # noqa: F401  (fixtures)

from soundnet_port import weights
from soundnet_port.architecture import SOUNDNET5, SOUNDNET8
from soundnet_port.conversion import recognition, released_parity
from soundnet_port.conversion.convert import Report, convert
from soundnet_port.golden import spread
from soundnet_port.pretrained import load_pretrained
from soundnet_port.weights import build, checksum, read_metadata, tensors_of

HERE = Path(__file__).parent
weights_folders = weights.weights_folders  # the user's; tests have their own
CHECKOUT = HERE.parent
SHARED = CHECKOUT.parent / "shared" / "reference"
DEMO = CHECKOUT / "conversion" / "demo.t7"

VARIANTS8 = "clear grads state ascii double flat mm2d oldconv2d oldbn cudnnA cudnnB cudnnS".split()
VARIANTS5 = "clear ascii cudnnA".split()

# design: relative to the layer's largest absolute value. Torch7 itself moves by about 1e-6 of it
# between one and two threads; float32 against float64 differs by up to 4e-6.
TOLERANCE = 1e-5
SOFTMAX_TOLERANCE = 2e-5  # absolute


@dataclass(frozen=True)
class Net:
    """A reference network."""

    name: str
    template: object
    divisor: int
    heads: dict
    seed: int

    @property
    def architecture(self):
        return self.template.resized([w // self.divisor for w in self.template.widths], self.heads)

    @property
    def reference(self):
        return file(f"{self.name}_ref.npz")


NETS = {
    net.name: net
    for net in (
        Net("n8_d16", SOUNDNET8, 16, {"objects": 10, "scenes": 6}, 8102),
        Net("n8_d8", SOUNDNET8, 8, {"objects": 12, "scenes": 7}, 8101),
        Net("n5_d8", SOUNDNET5, 8, {"objects": 12, "scenes": 7}, 5101),
        Net("full8", SOUNDNET8, 1, {"objects": 1000, "scenes": 401}, 20161027),
        Net("full5", SOUNDNET5, 1, {"objects": 1000, "scenes": 401}, 20161028),
    )
}


DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    ),
    pytest.param(
        "mps", marks=pytest.mark.skipif(not torch.backends.mps.is_available(), reason="needs an Apple GPU")
    ),
]


def file(name):
    """A reference file, wherever it is; the test is skipped where it is not at hand."""
    places = [HERE / "reference" / name, SHARED / "narrow" / name, SHARED / "full" / name]
    if name == "n8_d16_cudnnA.t7":
        places.insert(0, DEMO)
    for place in places:
        if place.is_file():
            return place
    pytest.skip(f"{name} is not part of the project (too large) and ../shared is not there")


def model_of(net):
    """The reference network from its formula."""
    state = formula.state_dict(net.architecture, net.seed)
    return build(net.architecture, {name: torch.from_numpy(array) for name, array in state.items()})


def lengths(reference):
    return sorted({int(key[1:].split("/")[0]) for key in reference.files if key.startswith("L")})


def assert_agrees(reference, recording, what, values, tolerance=TOLERANCE, mean=1 / 5):
    """`values` (any shape, C order) against what Torch7 recorded; bounds maximum and mean error.

    A recording is named, or of an input of so many samples. Errors are relative to the largest value, of
    probabilities absolute.
    """
    prefix = f"L{recording}/{what}" if isinstance(recording, int) else f"{recording}/{what}"
    stats = reference[f"{prefix}/stats"]
    flat = np.asarray(values, np.float64).ravel()
    assert len(flat) == stats[0], f"{prefix}: {len(flat)} values, Torch7 has {stats[0]:.0f}"
    if f"{prefix}/full" in reference.files:
        theirs, ours = reference[f"{prefix}/full"].ravel(), flat
    else:
        theirs = reference[f"{prefix}/sub"]
        if f"{prefix}/subidx" in reference.files:
            ours = flat[reference[f"{prefix}/subidx"].astype(int)]
        else:
            ours = flat[np.arange(len(theirs)) * len(flat) // len(theirs)]
    largest = 1 if what.endswith("softmax") else max(abs(stats[5]), abs(stats[6]))
    error = np.abs(ours - theirs)
    assert error.max() <= tolerance * largest, f"{prefix}: {error.max() / largest:.1e}"
    assert error.mean() <= mean * tolerance * largest, f"{prefix}: mean {error.mean() / largest:.1e}"
    # the statistics cover the values that were not recorded one by one
    assert abs(flat.min() - stats[5]) <= tolerance * largest
    assert abs(flat.max() - stats[6]) <= tolerance * largest
    assert abs(np.abs(flat).sum() - stats[4]) <= tolerance * largest * len(flat)


@pytest.fixture(scope="module")
def model():
    """The smallest reference network."""
    return model_of(NETS["n8_d16"])


@pytest.fixture(scope="session")
def demo_report(tmp_path_factory):
    """The conversion of the small Torch7 file that comes along."""
    (report,) = convert(DEMO, tmp_path_factory.mktemp("weights") / "demo.safetensors")
    assert isinstance(report, Report)
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
    prints = {name: recognition.fingerprint(tensor) for name, tensor in tensors_of(network).items()}
    monkeypatch.setattr(recognition, "SOUNDNET8", network.architecture)
    monkeypatch.setattr(recognition, "fingerprints", lambda: prints)
    for module in ("recognition", "ports"):
        monkeypatch.setattr(
            f"soundnet_port.conversion.{module}.released_checksum", lambda: checksum(tensors_of(network))
        )
    inputs = json.loads(str(released_parity.load_recordings()["about"]))["inputs"]
    made = {"about": json.dumps({"inputs": inputs})}
    for number, settings in enumerate(inputs):
        for output, values in released_parity._outputs(network, released_parity._input(settings), bare=True):
            made[f"{number}/{output}/shape"] = np.array(values.shape)
            made[f"{number}/{output}/values"] = spread(values, released_parity.VALUES)
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
