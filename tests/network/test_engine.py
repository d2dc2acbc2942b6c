"""The engine's matrix products give the plain network's numbers, for sounds of any length, however cut.

test_kernels.py does the same for compiled kernels.
"""

import copy
import gc
import os
import sys
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference_weights
from support.budget import budget
from support.cli_processes import run_forked
from support.networks import DEVICES, NETS, TOLERANCE, assert_agrees, lengths, model_of

import soundnet_port as sp
from soundnet_port.network import engine, engine_cache, operations
from soundnet_port.network.architecture import SOUNDNET5, SOUNDNET8
from soundnet_port.network.kernels.library import VARIABLE
from soundnet_port.network.precision import true_float32

SMALL = ["n8_d16", "n5_d8"]


@pytest.fixture(autouse=True)
def _no_kernels(monkeypatch):
    monkeypatch.setenv(VARIABLE, "engine")


def noise(samples, seed=0):
    return (torch.rand(samples, generator=torch.Generator().manual_seed(seed)) - 0.5) * 300


def plain(model, waveform, layers):
    """Compute layers with the modules."""
    model.use_engine = False
    try:
        return model.extract(waveform, layers)
    finally:
        model.use_engine = True


def assert_same(ours, theirs, context=""):
    assert ours.shape == theirs.shape, context
    error, largest = float((ours - theirs).abs().max()), float(theirs.abs().max())
    assert error <= TOLERANCE * max(largest, 1e-30), f"{context}: {error / largest:.1e}"


@pytest.fixture
def no_modules(monkeypatch):
    """Break the modules, so that all results are the engine's."""

    def broken(*_):
        raise AssertionError("the modules ran")

    monkeypatch.setattr(sp.SoundNet, "trunk", broken)
    monkeypatch.setattr(sp.SoundNet, "head", broken)


@pytest.mark.parametrize("name", NETS)
def test_every_named_layer_agrees_with_torch7_and_is_the_engines(name, no_modules):
    net = NETS[name]
    reference = np.load(net.reference)
    model, layers = model_of(net), net.architecture.layers
    for samples in lengths(reference):
        wave = torch.from_numpy(reference_weights.waveform(samples))
        fitting = [key for key, layer in layers.items() if samples >= layer.shortest]
        # alone, where pooling is fused into the convolution, and all together, where it is not
        for keys in [[key] for key in fitting] + [fitting]:
            actual = model.extract(wave, keys)
            for key in keys:
                short = {"objects": "obj", "scenes": "scn"}.get(key, f"m{layers[key].module:02d}")
                assert_agrees(reference, samples, short, actual[key])


@settings(max_examples=budget(40), deadline=None)
@given(
    st.sampled_from([SOUNDNET8, SOUNDNET5]),
    st.data(),
    st.integers(0, 2**31),
)
def test_any_widths_lengths_and_layers(template, data, seed):
    torch.manual_seed(seed)
    widths = [data.draw(st.integers(1, 9)) for _ in template.blocks]
    architecture = template.resized(widths, {"objects": 3, "scenes": 2})
    model = random_model(architecture)
    samples = data.draw(st.integers(1, 300_000))
    fitting = [key for key, layer in architecture.layers.items() if samples >= layer.shortest]
    keys = data.draw(st.lists(st.sampled_from(fitting), min_size=1, unique=True))
    wave = noise(samples, seed)
    actual = model.extract(wave, keys)
    exact = plain(copy.deepcopy(model).double(), wave.double(), keys)  # float32 modules are further off
    for key in keys:
        assert_same(actual[key], exact[key], (key, samples))


def random_model(architecture):
    """A network with statistics and gains of all sizes and signs."""
    model = sp.SoundNet(architecture).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.1, 9)
            module.weight.normal_()
            module.bias.normal_()
    return model


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("block", [1, 777, 16_384, 100_000])
def test_the_size_of_blocks_does_not_matter(name, block, monkeypatch):
    model = model_of(NETS[name])
    wave = noise(3_000 if block == 1 else 400_000)
    layers = [key for key, g in model.architecture.layers.items() if len(wave) >= g.shortest]
    reference = plain(model, wave, layers)
    monkeypatch.setattr(engine, "BLOCK", block)
    for key, actual in model.extract(wave, layers).items():
        assert_same(actual, reference[key], key)


@settings(max_examples=budget(12), deadline=None)
@given(st.sampled_from(SMALL), st.integers(209_374, 330_000), st.integers(0, 2**31))
def test_a_stream_gives_the_whole_whatever_the_pieces(name, samples, seed):
    model, wave, rng = model_of(NETS[name]), noise(samples), np.random.default_rng(seed)
    layers = list(model.architecture.layers)
    features = sp.stream(model, layers)
    parts, at = [], 0
    while at < samples:
        step = int(rng.choice([0, 1, 15, 1_000, 30_000, 130_000]))
        parts.append(features.push(wave[at : at + step]))
        at += step
    parts.append(features.finish())
    for key, reference in plain(model, wave, layers).items():
        assert_same(torch.cat([part[key] for part in parts], dim=2), reference, key)


@pytest.mark.parametrize("name", SMALL)
def test_a_streams_frames_come_with_the_last_sample_they_see(name):
    model = model_of(NETS[name])
    wave = noise(700_000)
    for key, layer in model.architecture.layers.items():
        features = sp.stream(model, [key])
        sees = layer.start + layer.receptive_field + 2 * layer.stride  # up to here, of the third frame
        assert features.push(wave[: sees - 1])[key].shape[2] == 2, key
        assert features.push(wave[sees - 1 : sees])[key].shape[2] == 1, key


def test_a_streams_sample_rate_is_made_the_networks(tmp_path):
    import soundfile

    model = model_of(NETS["n8_d16"])
    path = tmp_path / "a.wav"
    soundfile.write(path, noise(300_000).numpy() / 256, 44_100)
    features = sp.stream(model, ["conv5"], sample_rate=44_100)
    own = sp.load_audio(path, sample_rate=None)
    actual = [features.push(piece)["conv5"] for piece in own.split(9_999)] + [features.finish()["conv5"]]
    assert_same(torch.cat(actual, 2), model.extract(sp.load_audio(path), ["conv5"])["conv5"])


def test_what_a_stream_refuses():
    model = model_of(NETS["n8_d16"])
    with pytest.raises(ValueError, match="no layer 'conv9'"):
        sp.stream(model, ["conv9"])
    with pytest.raises(ValueError, match="must be a list"):
        sp.stream(model, "conv7")
    with pytest.raises(ValueError, match=r"\[22\] has a module inside a layer"):
        sp.stream(model, [22])
    with pytest.raises(ValueError, match="sample_rate must be"):
        sp.stream(model, ["conv1"], sample_rate=1)
    features = sp.stream(model, ["conv7"])
    with pytest.raises(ValueError, match=r"shape \(samples"):
        features.push(torch.zeros(1, 5))
    with pytest.raises(ValueError, match="NaN"):
        features.push(torch.tensor([0.0, np.nan]))
    features.push(noise(4_573))
    with pytest.raises(ValueError, match=r"4,573 samples .* too short: conv7 needs at least 4,574"):
        features.finish()
    with pytest.raises(ValueError, match="finished"):
        features.push(noise(1))


@pytest.mark.parametrize("name", SMALL)
def test_sounds_of_unequal_lengths_come_out_as_one_by_one(name, monkeypatch):
    model = model_of(NETS[name])
    waves = [noise(n, n) for n in (230_000, 4_574, 110_250, 17_001, 300_123, 209_374)]
    layers = ["pool1", "conv3", "conv4"]
    for limit in (engine.BLOCK, 250_000):
        monkeypatch.setattr(engine, "BLOCK", limit)
        for wave, actual in zip(waves, model.extract_each(waves, layers), strict=True):
            for key, reference in plain(model, wave, layers).items():
                assert_same(actual[key], reference, (key, len(wave)))
    padded = torch.nn.functional.pad(waves[1], (0, 50_000))
    frames = model.architecture.frames("conv4", 4_574)
    naive = plain(model, padded, ["conv4"])["conv4"][:, :, :frames]
    assert (naive - plain(model, waves[1], ["conv4"])["conv4"]).abs().max() > 1e-3  # why not by padding


def test_a_batch_is_its_sounds():
    model = model_of(NETS["n8_d16"])
    batch = torch.stack([noise(230_000, n) for n in range(3)])
    actual = model.extract(batch, ["pool5", "scenes"])
    for key, reference in plain(model, batch, ["pool5", "scenes"]).items():
        assert_same(actual[key], reference, key)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_half_precision_is_as_far_off_as_documented(dtype, error):
    """Measured at conv7 of the full-width network; twice that for other processors' arithmetic."""
    wave = torch.from_numpy(reference_weights.waveform(100_000))
    exact = model_of(NETS["full8"]).extract(wave, ["conv7"])["conv7"]
    actual = model_of(NETS["full8"]).to(dtype).extract(wave, ["conv7"])["conv7"]
    assert actual.dtype == dtype
    assert error / 10 < float((actual.float() - exact).abs().max() / exact.abs().max()) < 2 * error


# ---- when the modules compute


def changed(model, how):
    if how == "training":
        model.bn7.bias.requires_grad_(True)  # with all parameters frozen there is a warning
        model.train()
    elif how == "a module training":
        model.bn3.train()
    elif how == "gradients":
        model.requires_grad_(True)
    elif how == "hook":
        model.conv5.register_forward_hook(lambda *_: None)
    elif how == "no statistics":
        model.bn4.running_mean = model.bn4.running_var = None
        model.bn4.track_running_stats = False
    elif how == "stride":
        model.conv7.stride = (1,)
    elif how == "module":
        model.bn7 = torch.nn.Identity()
    elif how == "switched off":
        model.use_engine = False
    return model


@pytest.mark.parametrize(
    "how",
    [
        "training",
        "a module training",
        "gradients",
        "hook",
        "no statistics",
        "stride",
        "module",
        "switched off",
    ],
)
def test_the_modules_compute_where_the_engine_would_not_give_the_same(how, monkeypatch):
    model = changed(model_of(NETS["n8_d16"]), how)
    monkeypatch.setattr(engine, "extract", None)
    assert model.extract(noise(230_000), ["conv7"])["conv7"].shape[1] == 64
    assert len(model.extract_each([noise(50_000)], ["conv7"])) == 1


def test_module_numbers_inside_a_layer_are_the_modules_own(monkeypatch):
    monkeypatch.setattr(engine, "extract", None)
    assert model_of(NETS["n8_d16"]).extract(noise(50_000), [22, "conv7"])[22].min() < 0


@pytest.mark.parametrize("name", ["conv1.weight", "bn4.running_var", "bn2.bias", "scenes.bias"])
def test_changed_parameters_are_noticed(name):
    model = model_of(NETS["n8_d16"])
    wave = noise(230_000)
    model(wave)
    with torch.no_grad():
        model.state_dict()[name].mul_(1.5)
    assert_same(model(wave).scenes, plain(model, wave, ["scenes"])["scenes"])


def through_data(model):
    model.conv5.weight.data.mul_(1.5)


def through_numpy(model):
    model.conv3.weight.detach().numpy()[...] *= 1.5


def a_variance(model):
    model.bn2.running_var.data[:] = model.bn2.running_var.data * 2


def eps(model):
    model.bn6.eps = 0.5


def a_swap(model):
    model.conv4.weight.data = model.conv4.weight.data * 2


@pytest.mark.parametrize("change", [through_data, through_numpy, a_variance, eps, a_swap])
def test_changes_behind_pytorchs_back_are_noticed(change):
    model = model_of(NETS["n8_d16"])
    wave = noise(230_000)
    before = model(wave).scenes
    change(model)
    after = model(wave).scenes
    assert not torch.equal(before, after)
    assert_same(after, plain(model, wave, ["scenes"])["scenes"])


def test_a_single_value_changed_behind_pytorchs_back_needs_a_refresh():
    model = model_of(NETS["n8_d16"])
    wave = noise(230_000)
    model(wave)
    model.conv7.weight.detach().numpy()[3, 5, 1] += 1.0
    model.refresh()
    assert_same(model(wave).scenes, plain(model, wave, ["scenes"])["scenes"])


def test_nan_among_the_parameters_makes_no_new_engine_each_time():
    model = model_of(NETS["n8_d16"])
    with torch.no_grad():
        model.conv7.bias[0] = float("nan")
    assert engine_cache.get_engine(model) is engine_cache.get_engine(model)


def test_gradients_reach_the_waveform_and_the_parameters():
    model = model_of(NETS["n8_d16"])
    wave = noise(50_000).requires_grad_(True)
    model.extract(wave, ["conv7"])["conv7"].sum().backward()
    assert wave.grad.abs().max() > 0


def test_results_can_be_learned_from():
    """No inference tensors: a head on top of the features has gradients."""
    model = model_of(NETS["n8_d16"])
    frames = model.extract(noise(50_000), ["conv7"])["conv7"]
    assert frames.is_contiguous()
    head = torch.nn.Linear(64, 2)
    head(frames.mean(2)).sum().backward()
    assert head.weight.grad.abs().max() > 0


def test_the_engine_goes_with_its_model():
    model = model_of(NETS["n8_d16"])
    model.extract(noise(5_000), ["conv7"])
    gone = weakref.ref(engine_cache.get_engine(model))
    del model
    gc.collect()
    assert gone() is None


# ---- threads


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_number_of_threads_does_not_matter_and_stays(threads, count):
    model, wave = model_of(NETS["n8_d16"]), noise(400_000)
    layers = ["pool1", "conv3", "conv7", "scenes"]
    expected = plain(model, wave, layers)
    threads(count)
    for key, actual in model.extract(wave, layers).items():
        assert_same(actual, expected[key], key)
    assert torch.get_num_threads() == count


def test_several_callers_at_once(threads):
    threads(2)
    model, waves = model_of(NETS["n8_d16"]), [noise(80_000 + 999 * i, i) for i in range(8)]
    with ThreadPoolExecutor(8) as callers:
        actual = list(callers.map(lambda wave: model.extract(wave, ["conv7"])["conv7"], waves))
    for wave, frames in zip(waves, actual, strict=True):
        assert_same(frames, plain(model, wave, ["conv7"])["conv7"])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_threads_of_its_own():
    """As in a DataLoader: the parent's threads do not exist there, and must not be waited for."""
    assert run_forked(_compute_before_and_after_a_fork) == 7


def _compute_before_and_after_a_fork():
    torch.set_num_threads(2)
    model, wave = model_of(NETS["n8_d16"]), noise(300_000)
    model.extract(wave, ["conv7"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads at a fork
        child = os.fork()
    if not child:
        model.extract(wave, ["conv7"])
        os._exit(7)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def test_float32_stays_float32_whatever_pytorch_is_set_to(threads):
    """One inside of the other, and the outer one ends first, as in two threads."""
    threads(2)
    products = torch.backends.mkldnn.matmul
    if not hasattr(products, "fp32_precision"):
        pytest.skip("a PyTorch before 2.9")
    before = products.fp32_precision
    products.fp32_precision = "bf16"
    try:
        cpu = torch.device("cpu")
        first = true_float32(cpu)
        first.__enter__()
        with true_float32(cpu):
            first.__exit__()
            assert products.fp32_precision == "ieee"
        assert products.fp32_precision == "bf16"
        model, wave = model_of(NETS["n8_d16"]), noise(400_000)
        actual = model.extract(wave, ["conv7"])["conv7"]
    finally:
        products.fp32_precision = before
    assert_same(actual, plain(model, wave, ["conv7"])["conv7"])


@pytest.mark.parametrize("name", SMALL)
def test_what_gpus_compute_is_what_the_modules_do(name):
    model, wave = model_of(NETS[name]), noise(400_000)
    names = list(model.architecture.layers)
    for layers in (
        names,
        [name for name in names if name.startswith("pool")],
        ["conv2", "scenes"],
        ["conv1"],
    ):
        expected = plain(model, wave, layers)
        actual = engine.extract_by_convolution(
            engine_cache.get_engine(model),
            model,
            wave[None, None],
            [model.architecture.layer(key) for key in layers],
        )
        assert actual.keys() == set(layers)
        for key, reference in expected.items():
            assert_same(actual[key], reference, key)


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("setting", ["highest", "high"])
def test_the_engine_on_a_gpu_computes_what_the_modules_do(name, device, setting):
    """Long sounds, streams and corpora go through it there."""
    model, wave = model_of(NETS[name]), noise(400_000)
    layers = list(model.architecture.layers)
    expected = plain(model, wave, layers)
    moved, before = model_of(NETS[name]).to(device), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        features = sp.stream(moved, layers)
        parts = [features.push(piece) for piece in wave.split(130_000)] + [features.finish()]
        (at_once,) = engine.extract(
            engine_cache.get_engine(moved),
            [wave.to(device)],
            [moved.architecture.layer(key) for key in layers],
        )
        convolved = moved.extract(wave.to(device), layers)
        moved.use_engine = False
        modules = moved.extract(wave.to(device), layers)
    finally:
        torch.set_float32_matmul_precision(before)
    for key, reference in expected.items():
        assert_same(torch.cat([part[key] for part in parts], dim=2).cpu(), reference, key)
        assert_same(at_once[key][None].cpu(), reference, key)
        assert_same(convolved[key].cpu(), reference, key)
        assert_same(modules[key].cpu(), reference, key)


def test_errors_in_a_thread_come_out(threads, monkeypatch):
    threads(2)
    model = model_of(NETS["n8_d16"])

    def broken(*_):
        raise MemoryError("no more")

    monkeypatch.setattr(operations.ConvPoolOp, "compute_part", broken)
    with pytest.raises(MemoryError, match="no more"):
        model.extract(noise(400_000), ["conv7"])
    assert torch.get_num_threads() == 2


def test_folded_weights_may_be_cleared_by_another_thread():
    class Forgetful(dict):
        def __setitem__(self, key, value):
            super().__setitem__(key, value)
            self.clear()

    torch.manual_seed(0)
    model = sp.SoundNet(SOUNDNET8.resized([4] * 7, {"objects": 5, "scenes": 3})).eval()
    built = engine.Engine(model)
    built._folded = Forgetful()
    layers = list(model.architecture.layers.values())
    assert len(built.plan(layers)) >= len(model.architecture.blocks)
    assert built.filters(model.architecture.blocks[0])[0].shape == (4, 1, 64)
