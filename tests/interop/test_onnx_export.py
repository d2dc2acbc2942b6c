"""Networks for other programs: whatever is written computes what the network computes, at any length."""

import io
import json
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference_weights
from support.budget import budget
from support.networks import NETS, TOLERANCE, assert_agrees, lengths, model_of

import soundnet_port as sp
from soundnet_port.cli.main import main
from soundnet_port.conversion.golden import sweep
from soundnet_port.interop import onnx_export as exporting
from soundnet_port.interop.onnx_export import ExportError, export
from soundnet_port.network.engine import Engine
from soundnet_port.network.weights import build_model, read_weights, write_weights

onnx = pytest.importorskip("onnx", reason="needs the extra [onnx]")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra [onnx]")

SMALL = ["n8_d16", "n5_d8"]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """onnxruntime's threads take longer to start than these networks to run."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def run(path, waveforms, names=None):
    """What onnxruntime makes of waveforms (batch, samples), by layer."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4  # the errors wanted here are no news
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]
    return dict(zip(names, session.run(names, {"waveform": np.asarray(waveforms)}), strict=True))


@pytest.fixture(scope="module")
def of_one_layer(tmp_path_factory):
    """A path for each network and layer."""
    folder = tmp_path_factory.mktemp("onnx")

    @cache
    def exported(name, layer):
        path = folder / f"{name}-{layer}.onnx"
        export(model_of(NETS[name]), path, [layer])
        return path

    return exported


@pytest.fixture(scope="module")
def plain():
    """The networks' modules."""

    @cache
    def made(name):
        model = model_of(NETS[name])
        model.use_engine = False
        return model

    return made


def assert_same(made, expected, what):
    assert made.shape == tuple(expected.shape), what
    error, largest = np.abs(made - expected.numpy()).max(), float(expected.abs().max())
    assert error <= TOLERANCE * largest, f"{what}: {error / largest:.1e}"


@settings(max_examples=budget(40), deadline=None)
@given(st.sampled_from(SMALL), st.data())
def test_any_length_has_the_frames_that_it_has_in_the_network(of_one_layer, plain, name, data):
    model = plain(name)
    layer = data.draw(st.sampled_from(list(model.architecture.layers.values())))
    # around the steps from one frame to the next, where rounding up and down differ
    near = [layer.shortest + n * layer.stride for n in range(3)]
    steps = st.builds(int.__add__, st.sampled_from(near), st.integers(-9, 9))
    samples = max(1, data.draw(st.one_of(steps, st.integers(1, layer.shortest + 2 * layer.stride))))
    batch = data.draw(st.integers(1, 3))
    waves = np.stack([np.roll(sweep(samples) / np.float32(128), 77 * row) for row in range(batch)])
    if samples < layer.shortest:
        with pytest.raises(Exception, match="cannot be reshaped"):
            run(of_one_layer(name, layer.name), waves)
    else:
        made = run(of_one_layer(name, layer.name), waves)[layer.name]
        expected = model.extract(torch.from_numpy(waves), [layer.name])[layer.name]
        assert_same(made, expected, (layer.name, samples))


@pytest.mark.parametrize("name", ["n8_d16", "n5_d8"])
def test_onnxruntime_gives_what_torch7_recorded(name, tmp_path):
    net = NETS[name]
    layers = net.architecture.layers
    export(model_of(net), tmp_path / "all.onnx", list(layers))
    reference, compared = np.load(net.reference), 0
    for samples in lengths(reference):
        if samples >= max(layer.shortest for layer in layers.values()):
            for key, made in run(tmp_path / "all.onnx", reference_weights.waveform(samples)[None]).items():
                short = {"objects": "obj", "scenes": "scn"}.get(key, f"m{layers[key].module:02d}")
                assert_agrees(reference, samples, short, made)
                compared += 1
    assert compared >= 2 * len(layers)


def test_the_file_says_what_it_is(tmp_path, demo_report):
    architecture, state, metadata = read_weights(demo_report.weights)
    names = {"objects": [f"o{i}" for i in range(10)], "scenes": [f"s{i}" for i in range(6)]}
    model = build_model(architecture, state, names)
    exported = export(model, tmp_path / "a.onnx", license="mit")
    written = onnx.load(tmp_path / "a.onnx")
    said = {each.key: each.value for each in written.metadata_props}
    assert exported.outputs == ("pool5", "conv7", "objects", "scenes")
    assert exported.shortest == int(said["shortest"]) == 209_374
    assert (said["sample_rate"], said["full_scale"], said["license"]) == ("22050", "256.0", "mit")
    assert (said["architecture"], said["weights_sha256"]) == ("soundnet8", metadata["sha256"])
    assert json.loads(said["categories"]) == names
    assert json.loads(said["layers"])["conv7"]["receptive_field"] == 91_166
    assert [each.name for each in written.graph.input] == ["waveform"]
    assert (written.opset_import[0].version, written.ir_version) == (17, 8)  # that runtimes of 2022 take
    assert {node.op_type for node in written.graph.node} == set(
        "Unsqueeze Shape Max Reshape Conv Relu MaxPool Squeeze".split()
    )


def test_the_same_network_gives_the_same_bytes_whatever_state_it_is_in(tmp_path, model):
    export(model, tmp_path / "a.onnx", ["pool5"], opset=18)
    again = model_of(NETS["n8_d16"]).train()
    again.conv1.register_forward_hook(lambda *_: 1 / 0)
    export(again, tmp_path / "b.onnx", ["pool5"], opset=18)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert onnx.load(tmp_path / "a.onnx").opset_import[0].version == 18
    assert again.training


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_what_differs_is_not_written(tmp_path, model, monkeypatch, suffix):
    right = exporting._differences

    def wrong(plain, layers, run):
        return right(plain, layers, lambda x: {name: each * 1.0001 for name, each in run(x).items()})

    monkeypatch.setattr(exporting, "_differences", wrong)
    path = tmp_path / f"a{suffix}"
    path.write_text("before")
    with pytest.raises(ExportError, match=r"not written, for pool1 differs from the network by 1\.0e-04"):
        export(model, path, ["pool1"])
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "before"


def test_the_check_would_notice_a_wrong_bias(tmp_path, model, monkeypatch):
    def wrong(engine, block):
        filters, bias = right(engine, block)
        return filters, 1.01 * bias

    right = Engine.filters
    monkeypatch.setattr(Engine, "filters", wrong)
    with pytest.raises(ExportError, match="differs from the network"):
        export(model, tmp_path / "a.onnx", ["conv3"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("a.txt", {}, "ends in .onnx or .pt2"),
        ("a.onnx", {"layers": ["conv9"]}, "choose from conv1, pool1"),
        ("a.onnx", {"layers": []}, "no layers"),
        ("a.onnx", {"layers": [22]}, "no layer 22"),
        ("a.onnx", {"opset": 14}, "choose from 15 to"),
        ("a.onnx", {"opset": 999}, "choose from 15 to"),
    ],
)
def test_what_cannot_be_exported_is_explained(tmp_path, model, name, settings, message):
    with pytest.raises(ExportError, match=message):
        export(model, tmp_path / name, **settings)
    assert list(tmp_path.iterdir()) == []


def test_networks_with_classes_and_without_heads(tmp_path):
    torch.manual_seed(0)
    narrow = sp.SOUNDNET8.resized((2,) * 7, {})
    for architecture, outputs in (
        (narrow.with_classes(3, "pool5", 2), ("pool5", "classes")),
        (narrow.with_classes(3, "conv1"), ("conv1", "classes")),
        (narrow, ("pool5", "conv7")),
    ):
        assert export(sp.SoundNet(architecture), tmp_path / "a.onnx").outputs == outputs


# ---- torch.export


def test_a_program_takes_any_length_and_batch(tmp_path, plain):
    # 5 layers: their heads have the frame that hangs over the end
    model = plain("n5_d8")
    exported = export(model, tmp_path / "a.pt2", ["objects"], license="mit")
    about = {"soundnet.json": ""}
    program = torch.export.load(io.BytesIO((tmp_path / "a.pt2").read_bytes()), extra_files=about).module()
    assert json.loads(about["soundnet.json"])["license"] == "mit"
    for samples in (3_550, 56_797, 56_798, 160_000):
        for batch in (1, 3):
            waves = torch.from_numpy(np.stack([sweep(samples) / np.float32(128)] * batch))
            made = program(waves)
            assert tuple(made) == exported.outputs
            for name, expected in model.extract(waves, list(made)).items():
                assert_same(made[name].numpy(), expected, (name, samples))
    with pytest.raises(AssertionError, match="3550"):
        program(torch.zeros(1, 3_549))


def test_the_network_itself_goes_through_torch_export():
    torch.manual_seed(0)
    model = sp.SoundNet(sp.SOUNDNET8.resized((2,) * 7, {}).with_classes(3, "pool2")).eval()
    dynamic = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    with torch.no_grad():
        program = torch.export.export(model, (torch.zeros(2, 9_000),), dynamic_shapes=(dynamic,)).module()
        for samples in (2_000, 9_000, 30_001):
            wave = torch.from_numpy(sweep(samples) / np.float32(128))[None].repeat(3, 1)
            assert_same(program(wave).classes.numpy(), model(wave).classes, samples)


# ---- the command


def test_the_command_writes_and_says_what(tmp_path, demo_report, capsys):
    architecture, state, metadata = read_weights(demo_report.weights)
    weights, path = tmp_path / "w.safetensors", tmp_path / "folder" / "a.onnx"
    write_weights(weights, architecture, state, metadata | {"license": "cc-by-4.0"})
    assert main(["export", "-w", str(weights), "-o", str(path), "--no-heads", "--layers", "conv5,conv7"]) == 0
    said = capsys.readouterr().out
    assert f"wrote {path}" in said
    assert "at least 4,574 samples, 0.207 s" in said
    assert "output  conv7: batch x 64 x frames" in said
    props = {each.key: each.value for each in onnx.load(path).metadata_props}
    assert props["license"] == "cc-by-4.0"

    assert main(["export", "-w", str(weights), "-o", str(path)]) == 2
    assert capsys.readouterr().err == f"soundnet-port: {path}: is there already; --force replaces it\n"
    assert main(["export", "-w", str(weights), "-o", str(path), "--force", "--json", "--license", "mit"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["outputs"] == ["pool5", "conv7", "objects", "scenes"]
    assert max(each["relative"] for each in said["differences"]) < TOLERANCE
    props = {each.key: each.value for each in onnx.load(path).metadata_props}
    assert props["license"] == "mit"


def test_the_commands_refusals_are_a_line(tmp_path, demo_report, capsys):
    for words in ("-o a.onnx --layers conv9", "-o a.mp3", "-o a.onnx --opset 3", "-o a.pt2 --layers 22"):
        words = ["export", "-w", str(demo_report.weights), *words.replace("-o ", f"-o {tmp_path}/").split()]
        assert main(words) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
