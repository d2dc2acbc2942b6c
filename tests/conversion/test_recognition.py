"""The released network is recognized by its tensors; a single changed value is found and named."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.budget import budget
from support.networks import NETS, model_of

from soundnet_port.conversion.recognition import NEAR, fingerprint, fingerprints, is_near, recognize
from soundnet_port.network.architecture import SOUNDNET5, SOUNDNET8
from soundnet_port.network.weights import cpu_state_dict

NAMES = list(SOUNDNET8.state_shapes())


@pytest.fixture
def network(pretend_released):
    return pretend_released


@pytest.fixture
def state(network):
    return {name: tensor.clone() for name, tensor in cpu_state_dict(network).items()}


def test_there_is_a_fingerprint_of_every_tensor():
    assert list(fingerprints()) == NAMES
    assert all(
        len(each["projections"]) == 16 and len(each["sha256"]) == 64 for each in fingerprints().values()
    )


def test_all_tensors_bit_for_bit(network, state):
    found = recognize(network.architecture, state)
    assert (found.released, found.near, found.differing) == ("whole", False, ())
    assert found.summary == "the released SoundNet-8: all 46 tensors bit for bit"
    arrays = {name: tensor.numpy().astype(">f4").astype("=f4") for name, tensor in state.items()}
    assert recognize(network.architecture, arrays) == found


@pytest.mark.parametrize("name", NAMES)
def test_one_changed_value_anywhere_is_found_and_named(network, state, name):
    values = state[name].view(-1)
    at = len(values) // 2
    values[at] = torch.nextafter(values[at], torch.tensor(torch.inf))
    found = recognize(network.architecture, state)
    assert found.differing == (name,)
    assert found.released != "whole"
    assert found.near
    assert found.summary.endswith(f"not bit for bit: {name}")
    values[at] = float("nan")
    assert not recognize(network.architecture, state).near


@pytest.mark.parametrize(
    ("changed", "layer"),
    [
        ("objects.bias", "conv7"),
        ("bn7.running_var", "conv6"),
        ("conv6.weight", "pool5"),
        ("bn5.weight", "conv4"),
        ("conv2.bias", "pool1"),
        ("bn1.bias", None),
    ],
)
def test_a_network_tuned_behind_a_frozen_front_is_recognized_up_to_there(network, state, changed, layer):
    begun = NAMES.index(changed)
    for name in NAMES[begun:]:
        state[name] *= 1.01
    found = recognize(network.architecture, state)
    assert found.released == layer
    assert not found.is_released
    assert found.differing == tuple(NAMES[begun:])
    assert (f"up to {layer}, bit for bit" if layer else "not the released SoundNet-8") in found.summary


def test_other_heads_leave_the_trunk_recognized(network, state):
    trunk = {name: tensor for name, tensor in state.items() if name.startswith(("conv", "bn"))}
    architecture = network.architecture
    assert recognize(architecture.resized(architecture.widths, {}), trunk).released == "conv7"
    own = architecture.with_classes(3, "pool5", 1)
    kept = {name: tensor for name, tensor in trunk.items() if name in own.state_shapes()}
    found = recognize(own, {**kept, "classes.weight": torch.zeros(3, 16, 1), "classes.bias": torch.zeros(3)})
    assert found.released == "pool5"


def test_what_cannot_be_the_released_network_is_told_apart_at_once():
    model = model_of(NETS["n8_d16"])
    assert recognize(model.architecture, cpu_state_dict(model)).summary.endswith("other widths")
    assert "no fingerprints" in recognize(SOUNDNET5, {}).summary


@settings(max_examples=budget(50), deadline=None)
@given(scale=st.floats(-9, -4), size=st.sampled_from([16, 512, 5000]), seed=st.integers(0, 1000))
def test_sketches_tell_how_far_off_a_tensor_is(scale, size, seed):
    """Sixteen projections estimate a distance to some 20 %; a factor of two and more is sure."""
    original = np.random.default_rng(seed).normal(size=size)
    noise = np.random.default_rng(seed + 1).normal(size=size)
    distance = 10.0**scale
    moved = original + noise * (distance * np.linalg.norm(original) / np.linalg.norm(noise))
    near = is_near(moved, fingerprint(original))
    if distance < NEAR / 2:
        assert near
    if distance > 2.5 * NEAR:
        assert not near
