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
        len(print_["projections"]) == 16 and len(print_["sha256"]) == 64 for print_ in fingerprints().values()
    )


def test_all_tensors_bit_for_bit(network, state):
    recognition = recognize(network.architecture, state)
    assert (recognition.released, recognition.near, recognition.differing) == ("whole", False, ())
    assert recognition.summary == "the released SoundNet-8: all 46 tensors bit for bit"
    arrays = {name: tensor.numpy().astype(">f4").astype("=f4") for name, tensor in state.items()}
    assert recognize(network.architecture, arrays) == recognition


@pytest.mark.parametrize("name", NAMES)
def test_one_changed_value_anywhere_is_found_and_named(network, state, name):
    values = state[name].view(-1)
    index = len(values) // 2
    values[index] = torch.nextafter(values[index], torch.tensor(torch.inf))
    recognition = recognize(network.architecture, state)
    assert recognition.differing == (name,)
    assert recognition.released != "whole"
    assert recognition.near
    assert recognition.summary.endswith(f"not bit for bit: {name}")
    values[index] = float("nan")
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
    first = NAMES.index(changed)
    for name in NAMES[first:]:
        state[name] *= 1.01
    recognition = recognize(network.architecture, state)
    assert recognition.released == layer
    assert not recognition.is_released
    assert recognition.differing == tuple(NAMES[first:])
    assert (f"up to {layer}, bit for bit" if layer else "not the released SoundNet-8") in recognition.summary


def test_other_heads_leave_the_trunk_recognized(network, state):
    trunk = {name: tensor for name, tensor in state.items() if name.startswith(("conv", "bn"))}
    architecture = network.architecture
    assert recognize(architecture.resized(architecture.widths, {}), trunk).released == "conv7"
    own = architecture.with_classes(3, "pool5", 1)
    own_state = {name: tensor for name, tensor in trunk.items() if name in own.state_shapes()}
    recognition = recognize(
        own, {**own_state, "classes.weight": torch.zeros(3, 16, 1), "classes.bias": torch.zeros(3)}
    )
    assert recognition.released == "pool5"


def test_other_widths_and_architectures_are_rejected_at_once():
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
