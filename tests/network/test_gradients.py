"""A training step as matrix products is that of the modules."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.budget import budget

from soundnet_port import SOUNDNET5, SOUNDNET8, SoundNet
from soundnet_port.network import gradients

ENDS = {
    architecture.name: [block.output for block in architecture.blocks]
    for architecture in (SOUNDNET8, SOUNDNET5)
}
# Batch norm in training divides by the batch's own spread, which multiplies the rounding of all that
# came before. The modules in float32 are as far from float64 as this, or further.
TOLERANCE = 5e-5


def narrow(architecture, divisor=8, heads=None):
    torch.manual_seed(0)
    widths = [max(2, width // divisor) for width in architecture.widths]
    model = SoundNet(architecture.resized(widths, heads or {}))
    for name, parameter in model.named_parameters():
        if name.startswith("bn"):  # gains of both signs
            parameter.data.normal_(0.3 if name.endswith("weight") else 0, 1)
    model.fast_gradients = True
    return model


def step(model, waveform, layers):
    """Outputs, gradients of parameters and input, and running statistics, after one step."""
    waveform = waveform.clone().requires_grad_()
    outputs = model.extract(waveform, layers)
    loss = sum(
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).mean() for output in outputs.values()
    )
    loss.backward()
    return {
        **{f"output of {name}": output.detach() for name, output in outputs.items()},
        **{f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()},
        **{f"{name} after": buffer for name, buffer in model.named_buffers()},
        "gradient of the waveform": waveform.grad,
    }


def assert_same(actual, expected, tolerance=TOLERANCE):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor is None:
            assert actual[name] is None
            continue
        largest = tensor.abs().max()
        # what the batch's mean removes has no gradient; the modules leave rounding errors
        floor = 1e-3 if name.startswith("gradient of conv") and name.endswith("bias") else 1e-12
        error = (actual[name].double() - tensor.double()).abs().max()
        assert error <= tolerance * max(float(largest), floor), (name, float(error), float(largest))


@pytest.mark.parametrize("mode", ["training", "evaluation", "some blocks in evaluation"])
@pytest.mark.parametrize("architecture", [SOUNDNET8, SOUNDNET5], ids=lambda architecture: architecture.name)
def test_outputs_gradients_and_statistics_are_those_of_the_modules(architecture, mode):
    model = narrow(architecture, heads={"objects": 5, "scenes": 3})
    model.train(mode != "evaluation")
    if mode == "some blocks in evaluation":
        model.bn1.eval()
        model.bn3.eval()
    exact = copy.deepcopy(model).double()
    exact.fast_gradients = False
    # enough frames in the last block for its statistics to be well conditioned
    waveform = 20 * torch.randn(3, 330_000)
    layers = [*ENDS[architecture.name], "objects", "scenes"]
    assert model._gradients_fit(waveform[:, None], [architecture.layer(key) for key in layers])
    assert_same(step(model, waveform, layers), step(exact, waveform.double(), layers))


@settings(max_examples=budget(25), deadline=None)
@given(
    clips=st.integers(2, 5),
    samples=st.integers(4_574, 30_000),
    chunk=st.sampled_from([1, 20_000, 1 << 20]),
    few=st.sampled_from([1, 256]),
    last=st.integers(2, 7),
)
def test_whatever_the_lengths_and_however_they_are_parted(clips, samples, chunk, few, last):
    model = narrow(SOUNDNET8)
    exact = copy.deepcopy(model).double()
    model.eval()  # two frames make no statistics worth comparing
    exact.eval()
    exact.fast_gradients = False
    waveform = 20 * torch.randn(clips, samples)
    layers = ENDS["soundnet8"][:last]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradients, "_CHUNK", chunk)
        patch.setattr(gradients, "_FEW_ROWS", few)
        assert_same(step(model, waveform, layers), step(exact, waveform.double(), layers))


def test_in_silence_all_frames_are_as_large_and_one_of_each_window_counts():
    model = narrow(SOUNDNET8)
    exact = copy.deepcopy(model).double()
    exact.fast_gradients = False
    waveform = torch.zeros(2, 60_000)
    waveform[:, 30_000:] = 20 * torch.randn(2, 30_000)
    layers = ["conv7"]
    assert_same(step(model, waveform, layers), step(exact, waveform.double(), layers), 1e-3)


def test_parameters_that_are_frozen_get_no_gradient():
    model = narrow(SOUNDNET8).train()
    for name in ("conv1", "bn1", "conv2", "bn2"):
        model.get_submodule(name).requires_grad_(False).eval()
    before = copy.deepcopy(model.state_dict())
    model.extract(20 * torch.randn(2, 30_000), ["conv7"])["conv7"].mean().backward()
    assert model.conv2.weight.grad is None
    assert model.conv3.weight.grad is not None
    assert torch.equal(model.bn1.running_mean, before["bn1.running_mean"])
    assert not torch.equal(model.bn3.running_mean, before["bn3.running_mean"])


def test_the_modules_compute_what_does_not_fit_and_what_is_switched_off(monkeypatch):
    model = narrow(SOUNDNET8).train()
    waveform = 20 * torch.randn(2, 30_000)
    calls = []
    monkeypatch.setattr(gradients, "extract", lambda *arguments: calls.append(arguments))
    model.extract(waveform, ["conv1"])  # in the middle of a block
    model.extract(waveform, [5])  # a bare convolution
    model.use_engine = False
    model.extract(waveform, ["conv7"])
    del model.use_engine
    model.fast_gradients = False
    model.extract(waveform, ["conv7"])
    model.fast_gradients = True
    hook = model.conv1.register_forward_hook(lambda *arguments: None)
    model.extract(waveform, ["conv7"])
    hook.remove()
    model.conv1.register_full_backward_hook(lambda *arguments: None)
    model.extract(waveform, ["conv7"])
    assert not calls


def test_whoever_does_not_opt_in_gets_all_that_pytorch_can():
    """Second derivatives, backward hooks and torch.func, with the modules' numbers."""
    model = narrow(SOUNDNET8).eval()
    del model.fast_gradients
    waveform = (20 * torch.randn(1, 6_000)).requires_grad_()
    seen = []
    hook = model.conv3.register_full_backward_hook(lambda *arguments: seen.append("conv3"))
    output = model.extract(waveform, ["conv5"])["conv5"].square().sum()
    (gradient,) = torch.autograd.grad(output, waveform, create_graph=True)
    penalty = gradient.square().sum()
    penalty.backward()
    assert seen
    assert model.conv1.weight.grad.abs().max() > 0  # through the penalty
    hook.remove()  # PyTorch itself has none under torch.func

    def pooled(samples):
        return model.extract(samples, ["pool5"])["pool5"].sum()

    jacobian = torch.func.grad(pooled)(waveform.detach())
    assert jacobian.shape == waveform.shape
    several = torch.func.vmap(lambda samples: model.extract(samples, ["pool5"])["pool5"])(
        20 * torch.randn(3, 6_000)
    )
    assert several.shape[:2] == (3, 1)
