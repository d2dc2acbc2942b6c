"""Compiled kernels: which run, and that they compute what the modules compute, on every kind of processor."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference_weights
from support.budget import budget
from support.networks import NETS, assert_agrees, lengths, model_of

import soundnet_port as sp
from soundnet_port import SOUNDNET5, SOUNDNET8
from soundnet_port.network import engine_cache, kernel_operations, operations
from soundnet_port.network.kernels import library
from soundnet_port.network.kernels.library import CHOICES, VARIABLE, KernelError, find_kernels, load_library

WIDE8 = SOUNDNET8.resized([16, 32, 64, 32, 32, 48, 40], {"objects": 37, "scenes": 11})
WIDE5 = SOUNDNET5.resized([32, 64, 32, 40], {"objects": 37, "scenes": 11})


def available():
    """Names of the kernels that this processor runs."""
    compiled_library = load_library()
    names = CHOICES[1:-1] if compiled_library else ()
    return [name for name in names if compiled_library.soundnet_kernels(name.encode())]


compiled = pytest.mark.skipif(not available(), reason="no kernels are compiled for this processor")


@pytest.fixture(params=available())
def kernels(request, monkeypatch):
    monkeypatch.setenv(VARIABLE, request.param)
    return request.param


def random_model(architecture, seed=0):
    torch.manual_seed(seed)
    model = sp.SoundNet(architecture).eval().requires_grad_(False)
    for name, values in model.state_dict().items():
        if name.endswith("running_var"):
            values.uniform_(0.5, 2)
        elif values.is_floating_point() and values.ndim == 1:
            values.normal_(0, 0.3)
    return model


def noise(samples, seed=0):
    return torch.randn(samples, generator=torch.Generator().manual_seed(seed)) * 40


def in_float64(model, waveform, layers):
    double = sp.SoundNet(model.architecture).double().eval()
    double.load_state_dict(model.state_dict())
    double.use_engine = False
    with torch.no_grad():
        return double.extract(waveform.double(), layers)


@compiled
@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        (SOUNDNET8, "First Spectral Spectral Product Product Product Product Product"),
        (SOUNDNET5, "First Spectral Spectral Product Product"),
    ],
    ids=["soundnet8", "soundnet5"],
)
def test_compiled_kernels_are_taken(architecture, expected, kernels):
    with torch.device("meta"):
        model = sp.SoundNet(architecture)
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    for values in model.state_dict().values():
        values.fill_(1)
    layers = [architecture.layer(name) for name in (architecture.last_layer, "objects", "scenes")]
    classes = {
        "First": kernel_operations.FirstKernelOp,
        "Spectral": kernel_operations.SpectralOp,
        "Product": kernel_operations.ProductOp,
    }
    plan = engine_cache.get_engine(model).plan(layers)
    assert [type(operation) for operation in plan] == [classes[name] for name in expected.split()]
    assert f"computed by {kernels} kernels" in repr(model)


@compiled
@pytest.mark.parametrize("architecture", [WIDE8, WIDE5], ids=["soundnet8", "soundnet5"])
def test_every_layer_is_closer_to_float64_than_the_gate(architecture, kernels):
    model = random_model(architecture)
    waveform = noise(SOUNDNET8.layer("objects").shortest + 120_001)
    layers = list(architecture.layers)
    expected = in_float64(model, waveform, layers)
    for names in (layers, [architecture.last_layer, "objects"], [layers[1]], [layers[0]]):
        for name, values in model.extract(waveform, names).items():
            error = (values - expected[name]).abs().max() / expected[name].abs().max()
            # the trunk's aim, and that of heads, whose inputs have its error
            assert error <= (5e-6 if name in ("objects", "scenes") else 2e-6), name


@compiled
@pytest.mark.parametrize("name", ["n8_d16", "n8_d8", "n5_d8"])
def test_torch7s_recordings_agree(name, kernels):
    net = NETS[name]
    reference, model = np.load(net.reference), model_of(net)
    for samples in lengths(reference):
        waveform = torch.from_numpy(reference_weights.waveform(samples))
        for layer in model.architecture.modules:
            if layer.is_layer and layer.shortest <= samples:
                values = model.extract(waveform, [layer.name])[layer.name]
                assert_agrees(reference, samples, f"m{layer.module:02}", values)


@compiled
@settings(max_examples=budget(60), deadline=None)
@given(data=st.data())
def test_any_widths_lengths_and_kernels(data):
    template = data.draw(st.sampled_from([SOUNDNET8, SOUNDNET5]))
    widths = [data.draw(st.sampled_from([1, 3, 8, 16, 17, 32])) for _ in template.blocks]
    model = random_model(template.resized(widths, {}), data.draw(st.integers(0, 9)))
    last = model.architecture.last_layer
    names = data.draw(st.lists(st.sampled_from(list(model.architecture.layers)), max_size=2))
    shortest = max(model.architecture.layer(name).shortest for name in [last, *names])
    sounds = [noise(shortest + data.draw(st.integers(0, 90_000)), seed) for seed in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, data.draw(st.sampled_from(available())))
        computed = model.extract_each(sounds, [last, *names])
    for sound, layers in zip(sounds, computed, strict=True):
        expected = in_float64(model, sound, [last, *names])
        for name, values in layers.items():
            # absolute where a layer is all but silent
            limit = 1e-5 * float(expected[name].abs().max()) + 1e-6
            torch.testing.assert_close(values.double(), expected[name], rtol=0, atol=limit)


@compiled
def test_results_depend_neither_on_threads_nor_on_other_sounds(kernels, threads):
    model = random_model(WIDE8)
    sounds = [noise(220_500, 1), noise(400_000, 2), noise(150_000, 3)]
    threads(1)
    alone = [model.extract(sound, ["pool5"])["pool5"] for sound in sounds]
    threads(2)
    for one, several in zip(alone, model.extract_each(sounds, ["pool5"]), strict=True):
        assert torch.equal(one, several["pool5"])


@compiled
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_reach_only_the_frames_that_see_them(kernels, value):
    model = random_model(WIDE8)
    waveform = noise(300_000)
    waveform[150_000] = value
    layers = ["pool1", "pool2", "conv3", "pool5"]
    computed = model.extract(waveform, layers)
    model.use_engine = False
    expected = model.extract(waveform, layers)
    for name, values in computed.items():
        assert torch.equal(values.isfinite(), expected[name].isfinite()), name
        finite = expected[name][expected[name].isfinite()]
        limit = 1e-5 * float(finite.abs().max())
        torch.testing.assert_close(values[values.isfinite()], finite, rtol=0, atol=limit)


@compiled
def test_frames_around_a_nan_do_not_depend_on_threads(kernels, threads):
    model, waveform = random_model(WIDE8), noise(700_000)
    waveform[[0, 333_333, 699_999]] = float("nan")
    threads(1)
    layers = ["pool1", "pool2", "conv3"]
    alone = {layer: model.extract(waveform, [layer])[layer] for layer in layers}
    threads(2)
    for layer in layers:
        together = model.extract(waveform, [layer])[layer]
        assert together.isfinite().any()
        torch.testing.assert_close(together, alone[layer], rtol=0, atol=0, equal_nan=True)


@compiled
def test_quiet_frames_carry_the_rounding_of_a_loud_one_only_in_its_block(kernels):
    model = random_model(WIDE8)
    waveform = noise(300_000) * 1e-3
    waveform[150_000:150_100] = 256
    layers = ["pool1", "pool2", "conv3"]
    computed, expected = model.extract(waveform, layers), in_float64(model, waveform, layers)
    for name in layers:
        error = (computed[name] - expected[name]).abs().amax(1)[0]
        assert error.max() <= 2e-6 * expected[name].abs().max()
        far = torch.arange(len(error)) < len(error) // 4
        own_level = expected[name].abs().amax(1)[0]
        limit = 5e-6 * own_level[far].clamp(min=float(own_level.median()))
        assert (error[far] <= limit).all(), name


@compiled
def test_streams_give_what_one_piece_gives(kernels):
    model = random_model(WIDE8)
    waveform = noise(500_000)
    expected = model.extract(waveform, ["pool1", "pool5", "conv7"])
    stream = sp.stream(model, list(expected))
    parts = [stream.push(piece) for piece in waveform.split(70_001)] + [stream.finish()]
    for name, values in expected.items():
        streamed = torch.cat([part[name] for part in parts], -1)
        torch.testing.assert_close(streamed, values, rtol=0, atol=2e-6 * float(values.abs().max()))


@compiled
def test_changed_weights_and_another_choice_are_noticed(monkeypatch):
    model, waveform = random_model(WIDE8), noise(200_000)
    before = model.extract(waveform, ["pool2"])["pool2"]
    monkeypatch.setenv(VARIABLE, "engine")
    assert engine_cache.get_engine(model).kernels is None
    assert "computed by matrix products" in repr(model)
    torch.testing.assert_close(model.extract(waveform, ["pool2"])["pool2"], before, rtol=1e-4, atol=1e-4)
    monkeypatch.delenv(VARIABLE)
    with torch.no_grad():
        model.conv1.weight.mul_(2)
    assert not torch.allclose(model.extract(waveform, ["pool2"])["pool2"], before)


def test_weights_that_are_not_finite_take_no_spectra():
    model = random_model(WIDE8)
    model.conv2.weight.data[0, 0, 0] = float("nan")
    plan = engine_cache.get_engine(model).plan([model.architecture.layer("pool2")])
    assert not isinstance(plan[1], kernel_operations.SpectralOp)
    assert model.extract(noise(30_000), ["pool2"])["pool2"][0, 0].isnan().all()


@pytest.mark.parametrize("name", ["avx1024", "AVX2"])
def test_unknown_kernels_are_refused(name, monkeypatch):
    monkeypatch.setenv(VARIABLE, name)
    with pytest.raises(KernelError, match=f"^{VARIABLE}={name}: unknown kernels; choose from auto, avx512"):
        find_kernels()


@compiled
def test_kernels_of_another_processor_are_refused(monkeypatch):
    monkeypatch.setenv(VARIABLE, next(name for name in CHOICES[1:-1] if name not in available()))
    with pytest.raises(
        KernelError, match="this processor can't run them; unset it, or set it to engine where the run starts"
    ):
        find_kernels()


@pytest.mark.parametrize("value", ["avx1024", "neon"])
def test_repr_never_raises(monkeypatch, value):
    monkeypatch.setenv(VARIABLE, value)
    assert f"{VARIABLE}={value}" in repr(random_model(WIDE8)) or value in available()


@compiled
def test_products_keep_no_second_copy_of_the_weights():
    model = random_model(WIDE8)
    plan = engine_cache.get_engine(model).plan([model.architecture.layer("conv7")])
    assert isinstance(plan[-1], kernel_operations.ProductOp)
    assert plan[-1].weight.untyped_storage().nbytes() == 0


def test_without_a_library_the_engine_multiplies(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(library, "load_library", lambda: None)
    monkeypatch.setattr(library, "_find_kernels", library._find_kernels.__wrapped__)  # without its cache
    model = random_model(WIDE8)
    plan = engine_cache.get_engine(model).plan([model.architecture.layer("pool2")])
    assert [type(operation) for operation in plan] == [operations.FirstConvPoolOp, operations.ConvPoolOp]
    monkeypatch.setenv(VARIABLE, "avx2")
    with pytest.raises(KernelError, match="they weren't compiled in this installation"):
        find_kernels()


@compiled
def test_a_library_of_another_version_is_not_called(monkeypatch):
    """It may stay behind in a checkout that has moved on."""
    monkeypatch.setattr(library, "_SYMBOL", "soundnet_kernels_0")
    load = library.load_library.__wrapped__
    with pytest.warns(UserWarning, match="from another version of soundnet-port"):
        assert load() is None
