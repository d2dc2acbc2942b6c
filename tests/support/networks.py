"""The reference networks, their files, and comparisons with Torch7's recordings."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from soundnet_port.network import weights
from soundnet_port.network.architecture import SOUNDNET5, SOUNDNET8
from soundnet_port.network.weights import build_model
from support import reference_weights

TESTS = Path(__file__).parent.parent
weights_folders = weights.weights_folders  # the user's; tests have their own
CHECKOUT = TESTS.parent
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
    """Return the path of a reference file; skip the test where there is none."""
    paths = [TESTS / "reference" / name, SHARED / "narrow" / name, SHARED / "full" / name]
    if name == "n8_d16_cudnnA.t7":
        paths.insert(0, DEMO)
    for path in paths:
        if path.is_file():
            return path
    pytest.skip(f"{name} is not part of the project (too large) and ../shared is not there")


def model_of(net):
    """Build a reference network from its formula."""
    state = reference_weights.state_dict(net.architecture, net.seed)
    return build_model(net.architecture, {name: torch.from_numpy(array) for name, array in state.items()})


def lengths(reference):
    return sorted({int(key[1:].split("/")[0]) for key in reference.files if key.startswith("L")})


def assert_agrees(reference, recording, output, values, tolerance=TOLERANCE, mean=1 / 5):
    """Compare `values` (any shape, C order) with Torch7's recording; bound maximum and mean error.

    A recording has a name, or the number of its input's samples. Errors are relative to the largest value,
    those of probabilities absolute.
    """
    prefix = f"L{recording}/{output}" if isinstance(recording, int) else f"{recording}/{output}"
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
    largest = 1 if output.endswith("softmax") else max(abs(stats[5]), abs(stats[6]))
    error = np.abs(ours - theirs)
    assert error.max() <= tolerance * largest, f"{prefix}: {error.max() / largest:.1e}"
    assert error.mean() <= mean * tolerance * largest, f"{prefix}: mean {error.mean() / largest:.1e}"
    # the statistics cover the values that were not recorded one by one
    assert abs(flat.min() - stats[5]) <= tolerance * largest
    assert abs(flat.max() - stats[6]) <= tolerance * largest
    assert abs(np.abs(flat).sum() - stats[4]) <= tolerance * largest * len(flat)
