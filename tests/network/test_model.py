"""The network beside Torch7's numbers: shapes, layers, times, errors."""

import re

import numpy as np
import pytest
import torch
from support.networks import DEVICES, NETS, model_of

from soundnet_port import SOUNDNET5, SOUNDNET8, SoundNet
from soundnet_port.network import plain
from soundnet_port.network.plain import PlainSoundNet

NARROW8 = NETS["n8_d16"]
NARROW5 = NETS["n5_d8"]


@pytest.fixture(scope="module")
def model8():
    return model_of(NARROW8)


@pytest.fixture(scope="module")
def model5():
    return model_of(NARROW5)


def sound(samples, batch=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (samples,) if batch is None else (batch, samples)
    return torch.rand(shape, generator=generator) * 400 - 200


def test_the_published_parameter_counts():
    for architecture, count in ((SOUNDNET8, 14_352_713), (SOUNDNET5, 6_202_137)):
        with torch.device("meta"):
            model = SoundNet(architecture)
        assert sum(p.numel() for p in model.parameters()) == count
        shapes = {
            name: tuple(tensor.shape)
            for name, tensor in model.state_dict().items()
            if "num_batches" not in name
        }
        assert shapes == architecture.state_shapes()


def test_the_documented_table_is_the_architecture():
    rows = [line.split() for line in plain.__doc__.splitlines() if re.match(r"    \w+ +\d", line)]
    expected = []
    for block in SOUNDNET8.blocks:
        expected.append([block.name, block.channels, block.kernel, block.stride, block.padding])
        expected += [[block.pool_layer, block.pool, block.pool]] if block.pool else []
    for head in SOUNDNET8.heads:
        expected.append([head.name, head.categories, head.kernel, head.stride, head.padding])
    assert rows == [[str(cell) for cell in row] for row in expected]


@pytest.mark.parametrize("net", [NARROW8, NARROW5])
def test_the_plain_network_gives_the_same_logits(net):
    model = model_of(net)
    reference = PlainSoundNet(net.architecture).eval()
    reference.load_state_dict(model.state_dict())
    waveform = sound(230_000, batch=2)
    with torch.no_grad():
        expected = reference(waveform[:, None])
    for name, logits in model(waveform)._asdict().items():
        torch.testing.assert_close(
            logits, getattr(expected, name), rtol=0, atol=1e-5 * float(logits.abs().max())
        )


def test_without_a_layer_it_is_the_default_layer(model8, model5):
    for model, name in ((model8, "pool5"), (model5, "conv4")):
        architecture = model.architecture
        assert architecture.default_layer == name
        assert architecture.layer(None) == architecture.layer(name)
        assert architecture.frames(None, 50_000) == architecture.frames(name, 50_000)
        assert model.edge_frames(None, 50_000) == model.edge_frames(name, 50_000)
        assert torch.equal(model.frame_times(None, 3), model.frame_times(name, 3))


def test_any_of_the_three_input_shapes_gives_a_batch(model8):
    x = sound(6_000)
    for shape in ((6_000,), (1, 6_000), (1, 1, 6_000)):
        assert model8.extract(x.reshape(shape), ["conv7"])["conv7"].shape == (1, 64, 1)
    batch = sound(230_000, batch=3)
    out = model8(batch[:, None])
    assert out.objects.shape == (3, 10, 1)
    assert out.scenes.shape == (3, 6, 1)
    for i in range(3):  # a sound's answer does not hang on its neighbours
        torch.testing.assert_close(model8(batch[i]).objects, out.objects[i : i + 1], rtol=0, atol=1e-4)


def test_named_layers_are_module_outputs_after_relu_and_pooling(model8, model5):
    x = sound(20_000)
    for model in (model8, model5):
        layers = model.architecture.layers
        names = [n for n, layer in layers.items() if layer.kind != "head"]
        out = model.extract(x, [*names, *[layers[n].module for n in names]])
        for name in names:
            assert torch.equal(out[name], out[layers[name].module])
            assert (out[name] >= 0).all()
    assert model8.architecture.layer("conv7").module == 24
    assert model8.architecture.layer("pool5").module == 18


def test_module_numbers_are_the_bare_modules(model8):
    out = model8.extract(sound(20_000), [22, 23, 24, "conv7"])
    assert list(out) == [22, 23, 24, "conv7"]
    assert (out[22] < 0).any()
    assert (out[23] < 0).any()
    assert torch.equal(out[24], out[23].clamp(min=0))
    norm = model8.bn7
    by_hand = (out[22] - norm.running_mean[:, None]) / (norm.running_var[:, None] + 1e-5).sqrt()
    by_hand = by_hand * norm.weight[:, None] + norm.bias[:, None]
    torch.testing.assert_close(out[23], by_hand)


def test_extract_goes_no_deeper_than_asked(model8):
    ran = []
    hooks = [
        getattr(model8, name).register_forward_hook(lambda *_, n=name: ran.append(n))
        for name in ("conv1", "conv2", "conv3", "objects")
    ]
    model8.extract(sound(500), ["pool2"])
    for hook in hooks:
        hook.remove()
    assert ran == ["conv1", "conv2"]
    assert model8.extract(sound(500), []) == {}


@pytest.mark.parametrize("net", [NARROW8, NARROW5])
def test_frames_and_shortest_inputs_are_what_the_network_does(net):
    model = model_of(net)
    rng = np.random.default_rng(5)
    for layer in model.architecture.layers.values():
        shortest = layer.shortest
        for samples in (shortest, shortest + 1, *rng.integers(shortest, shortest + 150_000, 4)):
            frames = model.extract(sound(int(samples)), [layer.name])[layer.name].shape[-1]
            assert frames == model.architecture.frames(layer.name, int(samples)) >= 1
        assert model.architecture.frames(layer.name, shortest) == 1
        assert model.architecture.frames(layer.name, shortest - 1) == 0
        if shortest > 1:
            expected = re.escape(f"at least {shortest:,} samples ({shortest / 22050:.3f} s)")
            with pytest.raises(ValueError, match=expected):
                model.extract(sound(shortest - 1), [layer.name])


def test_published_shortest_inputs_strides_and_receptive_fields():
    eight, five = SOUNDNET8, SOUNDNET5
    assert eight.layer("conv7").shortest == 4_574
    assert eight.layer("objects").shortest == 209_374
    assert five.layer("conv4").shortest == five.layer("scenes").shortest == 3_550
    strides = [eight.layer(name).stride for name in ("pool5", "conv7", "objects")]
    fields = [eight.layer(name).receptive_field for name in ("pool5", "conv7", "objects")]
    assert strides == [8_192, 32_768, 65_536]
    assert fields == [17_438, 91_166, 320_542]
    seconds = {5: (4, 0), 10: (8, 1), 20: (15, 4)}
    for s, frames in seconds.items():
        assert (eight.frames("conv7", s * 22_050), eight.frames("objects", s * 22_050)) == frames
    assert [eight.frames("scenes", s * 22_050) for s in (30, 60, 300)] == [7, 17, 98]


@pytest.mark.parametrize("samples", [4_574, 176_606, 209_373])
def test_the_undefined_range_of_the_8_layer_heads_is_refused(model8, samples):
    """Torch7 reads outside its buffers there."""
    with pytest.raises(ValueError, match="209,374 samples"):
        model8(sound(samples))


def test_the_5_layer_heads_overhang_acts_as_zeros(model5):
    """From 1 to 7 frames of conv4 the kernel hangs over; Torch7's bounds check makes that zeros."""
    for samples in (3_550, 12_345, 56_797):
        conv4 = model5.extract(sound(samples), ["conv4"])["conv4"]
        assert conv4.shape[-1] < 8
        padded = torch.nn.functional.pad(conv4, (4, 12 - conv4.shape[-1]))
        by_hand = torch.einsum("ock,bck->bo", model5.objects.weight, padded) + model5.objects.bias
        torch.testing.assert_close(model5(sound(samples)).objects[..., 0], by_hand, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("net", [NARROW8, NARROW5])
def test_frame_times_are_what_a_frame_sees(net):
    """Changing a sample outside a frame's window leaves it alone; at its edges it does not."""
    model = model_of(net)
    for name, layer in model.architecture.layers.items():
        samples = layer.shortest + 3 * layer.stride
        x = sound(samples, seed=1)
        before = model.extract(x, [name])[name]
        frames = before.shape[-1]
        times = model.frame_times(name, frames)
        assert times.shape == (frames, 3)
        edges = (times[:, [0, 2]] * 22_050).round().long()
        np.testing.assert_allclose(times[:, 1], times[:, [0, 2]].mean(1))
        for frame in (0, frames - 1):
            first, end = edges[frame].tolist()
            outside = x.clone()
            outside[: max(first, 0)] = 90
            outside[min(end, samples) :] = -90
            after = model.extract(outside, [name])[name]
            torch.testing.assert_close(after[..., frame], before[..., frame], rtol=0, atol=1e-4)
    assert model.frame_times("conv7" if net is NARROW8 else "conv4", 1)[0, 0] < 0


def test_frame_windows_are_tight():
    """All-positive weights: every sample inside the window matters, to the very edges."""
    architecture = SOUNDNET8.resized([1] * 7, {"objects": 1, "scenes": 1})
    model = SoundNet(architecture).eval()
    model.check_scale = False  # for impulses of 1e6
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.startswith("conv") and name.endswith("weight"):
                tensor.fill_(1.0 / tensor.numel())
            elif "weight" in name or "running_var" in name:
                tensor.fill_(1.0)
            elif tensor.is_floating_point():
                tensor.zero_()
        model.double()
        for name in ("conv1", "pool2", "pool5", "conv7"):
            layer = architecture.layer(name)
            frame = 2 + (-layer.start // layer.stride)
            samples = layer.start + frame * layer.stride + layer.receptive_field + layer.stride
            base = torch.zeros(samples, dtype=torch.float64)
            first = layer.start + frame * layer.stride
            for at, seen in (
                (first - 1, False),
                (first, True),
                (first + layer.receptive_field - 1, True),
                (first + layer.receptive_field, False),
            ):
                x = base.clone()
                x[at] = 1e6
                value = model.extract(x, [name])[name][0, 0, frame]
                assert bool(value > 0) is seen, (name, at)


def test_bad_input_says_what_is_expected(model8):
    with pytest.raises(ValueError, match="choose from conv1, pool1"):
        model8.extract(sound(9_000), ["conv9"])
    for wrong in (0, 25, -1, True):
        with pytest.raises(ValueError, match="module numbers 1 to 24"):
            model8.extract(sound(9_000), [wrong])
    with pytest.raises(ValueError, match=r"one channel"):
        model8.extract(torch.zeros(2, 2, 9_000), ["conv1"])
    with pytest.raises(ValueError, match="float tensor"):
        model8.extract(torch.zeros(9_000, dtype=torch.int16), ["conv1"])
    with pytest.raises(ValueError, match="float tensor"):
        model8.extract(np.zeros(9_000, "f4"), ["conv1"])
    with pytest.raises(ValueError, match="0 samples"):
        model8.extract(torch.zeros(0), ["conv1"])


def test_double_input_is_taken_in_the_models_precision(model8):
    x = sound(9_000)
    assert torch.equal(model8.extract(x.double(), [24])[24], model8.extract(x, [24])[24])


def test_gradients_reach_the_waveform_and_training_updates_statistics():
    model = SoundNet(NARROW5.architecture)
    x = sound(30_000, batch=2).requires_grad_()
    before = model.bn1.running_mean.clone()
    model(x).objects.sum().backward()
    assert x.grad is not None
    assert model.conv1.weight.grad is not None
    assert not torch.equal(model.bn1.running_mean, before)


@pytest.mark.parametrize("device", [device for device in DEVICES if "mps" not in str(device)])
def test_float32_is_float32_in_evaluation_and_the_setting_is_left_as_it_was(device):
    """GPUs round convolutions to 10 bits by default, some CPUs products if asked; seen inside a forward."""
    switch = torch.backends.cudnn.conv if device == "cuda" else torch.backends.mkldnn.matmul
    model = model_of(NARROW8).to(device)
    seen = []
    model.conv2.register_forward_hook(lambda *_: seen.append(switch.fp32_precision))
    before = switch.fp32_precision
    try:
        loose = switch.fp32_precision = "tf32" if device == "cuda" else "bf16"
        model.extract(sound(9_000).to(device), ["conv4"])
        assert seen == ["ieee"]
        assert switch.fp32_precision == loose
        with pytest.raises(ValueError, match="no layer"):
            model.extract(sound(9_000).to(device), ["conv99"])
        model.requires_grad_(True).train().extract(sound(9_000, batch=2).to(device), ["conv2"])
        assert seen == ["ieee", loose]
        assert torch.backends.cudnn.allow_tf32 in (True, False)  # the older switch still answers
    finally:
        switch.fp32_precision = before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_numbers(model8):
    x = sound(441_000)
    layers = ["conv1", "pool5", "conv7", "objects", "scenes"]
    expected = model8.extract(x, layers)
    out = model_of(NARROW8).cuda().extract(x.cuda(), layers)
    for name, values in expected.items():
        error = float((out[name].cpu() - values).abs().max())
        assert error <= 1e-5 * float(values.abs().max()), name  # TF32 would give 1e-3
