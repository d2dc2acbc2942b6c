"""Export to ONNX and torch.export: parity with the network at any length, metadata, refusals."""

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
from soundnet_port.interop import onnx_export
from soundnet_port.interop.onnx_export import ExportError, export
from soundnet_port.network.engine import Engine
from soundnet_port.network.weights import build_model, read_weights, write_weights

onnx = pytest.importorskip("onnx", reason="needs the extra [onnx]")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra [onnx]")

SMALL = ["n8_d16", "n5_d8"]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Starting onnxruntime's threads takes longer than running these networks."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def run_onnx(path, waveforms):
    """Return onnxruntime's outputs for waveforms `(batch, samples)`, by layer."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4  # errors are expected here
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"waveform": np.asarray(waveforms)}), strict=True))


@pytest.fixture(scope="module")
def export_layer(tmp_path_factory):
    """Export a layer of a network once, and return the path."""
    folder = tmp_path_factory.mktemp("onnx")

    @cache
    def export_once(name, layer):
        path = folder / f"{name}-{layer}.onnx"
        export(model_of(NETS[name]), path, [layer])
        return path

    return export_once


@pytest.fixture(scope="module")
def load_plain():
    """Load a network whose modules compute all layers."""

    @cache
    def load_once(name):
        model = model_of(NETS[name])
        model.use_engine = False
        return model

    return load_once


def assert_parity(values, expected, description):
    assert values.shape == tuple(expected.shape), description
    error, largest = np.abs(values - expected.numpy()).max(), float(expected.abs().max())
    assert error <= TOLERANCE * largest, f"{description}: {error / largest:.1e}"


@settings(max_examples=budget(40), deadline=None)
@given(st.sampled_from(SMALL), st.data())
def test_onnx_parity_at_any_length(export_layer, load_plain, name, data):
    model = load_plain(name)
    layer = data.draw(st.sampled_from(list(model.architecture.layers.values())))
    # around lengths that add a frame, where rounding up and down differ
    thresholds = [layer.shortest + n * layer.stride for n in range(3)]
    steps = st.builds(int.__add__, st.sampled_from(thresholds), st.integers(-9, 9))
    samples = max(1, data.draw(st.one_of(steps, st.integers(1, layer.shortest + 2 * layer.stride))))
    batch = data.draw(st.integers(1, 3))
    waves = np.stack([np.roll(sweep(samples) / np.float32(128), 77 * row) for row in range(batch)])
    if samples < layer.shortest:
        with pytest.raises(Exception, match="cannot be reshaped"):
            run_onnx(export_layer(name, layer.name), waves)
    else:
        values = run_onnx(export_layer(name, layer.name), waves)[layer.name]
        expected = model.extract(torch.from_numpy(waves), [layer.name])[layer.name]
        assert_parity(values, expected, (layer.name, samples))


@pytest.mark.parametrize("name", ["n8_d16", "n5_d8"])
def test_onnx_parity_with_torch7(name, tmp_path):
    net = NETS[name]
    layers = net.architecture.layers
    export(model_of(net), tmp_path / "all.onnx", list(layers))
    reference, compared = np.load(net.reference), 0
    for samples in lengths(reference):
        if samples >= max(layer.shortest for layer in layers.values()):
            for key, values in run_onnx(
                tmp_path / "all.onnx", reference_weights.waveform(samples)[None]
            ).items():
                short = {"objects": "obj", "scenes": "scn"}.get(key, f"m{layers[key].module:02d}")
                assert_agrees(reference, samples, short, values)
                compared += 1
    assert compared >= 2 * len(layers)


def test_onnx_metadata(tmp_path, demo_report):
    architecture, state, metadata = read_weights(demo_report.weights)
    names = {"objects": [f"o{i}" for i in range(10)], "scenes": [f"s{i}" for i in range(6)]}
    model = build_model(architecture, state, names)
    exported = export(model, tmp_path / "a.onnx", license="mit")
    onnx_model = onnx.load(tmp_path / "a.onnx")
    properties = {entry.key: entry.value for entry in onnx_model.metadata_props}
    assert exported.outputs == ("pool5", "conv7", "objects", "scenes")
    assert exported.shortest == int(properties["shortest"]) == 209_374
    assert (properties["sample_rate"], properties["full_scale"], properties["license"]) == (
        "22050",
        "256.0",
        "mit",
    )
    assert (properties["architecture"], properties["weights_sha256"]) == ("soundnet8", metadata["sha256"])
    assert json.loads(properties["categories"]) == names
    assert json.loads(properties["layers"])["conv7"]["receptive_field"] == 91_166
    assert [value.name for value in onnx_model.graph.input] == ["waveform"]
    assert (onnx_model.opset_import[0].version, onnx_model.ir_version) == (17, 8)  # for runtimes of 2022
    assert {node.op_type for node in onnx_model.graph.node} == set(
        "Unsqueeze Shape Max Reshape Conv Relu MaxPool Squeeze".split()
    )


def test_exports_are_reproducible_and_independent_of_the_models_state(tmp_path, model):
    export(model, tmp_path / "a.onnx", ["pool5"], opset=18)
    same_network = model_of(NETS["n8_d16"]).requires_grad_(True).train()
    same_network.conv1.register_forward_hook(lambda *_: 1 / 0)
    export(same_network, tmp_path / "b.onnx", ["pool5"], opset=18)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert onnx.load(tmp_path / "a.onnx").opset_import[0].version == 18
    assert same_network.training


def test_a_failed_parity_check_leaves_no_file(tmp_path, model, monkeypatch):
    """In code that both formats share."""
    compare = onnx_export._compare

    def compare_wrong_values(plain, layers, run):
        return compare(plain, layers, lambda x: {name: 1.0001 * values for name, values in run(x).items()})

    monkeypatch.setattr(onnx_export, "_compare", compare_wrong_values)
    path = tmp_path / "a.onnx"
    path.write_text("before")
    with pytest.raises(ExportError, match=r"not written: pool1 differs from the network by 1\.0e-04"):
        export(model, path, ["pool1"])
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "before"


def test_the_parity_check_detects_a_wrong_bias(tmp_path, model, monkeypatch):
    def wrong_filters(engine, block):
        filters, bias = original(engine, block)
        return filters, 1.01 * bias

    original = Engine.filters
    monkeypatch.setattr(Engine, "filters", wrong_filters)
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
def test_invalid_exports_raise_an_error(tmp_path, model, name, settings, message):
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


def test_torch_export_parity_at_any_length_and_batch_size(tmp_path, load_plain):
    # 5 layers, whose heads are padded
    model = load_plain("n5_d8")
    exported = export(model, tmp_path / "a.pt2", ["objects"], license="mit")
    files = {"soundnet.json": ""}
    program = torch.export.load(io.BytesIO((tmp_path / "a.pt2").read_bytes()), extra_files=files).module()
    assert json.loads(files["soundnet.json"])["license"] == "mit"
    for samples in (3_550, 56_797, 56_798, 160_000):
        for batch in (1, 3):
            waves = torch.from_numpy(np.stack([sweep(samples) / np.float32(128)] * batch))
            outputs = program(waves)
            assert tuple(outputs) == exported.outputs
            for name, expected in model.extract(waves, list(outputs)).items():
                assert_parity(outputs[name].numpy(), expected, (name, samples))
    with pytest.raises(AssertionError, match="3550"):
        program(torch.zeros(1, 3_549))


def test_the_model_itself_works_with_torch_export():
    torch.manual_seed(0)
    model = sp.SoundNet(sp.SOUNDNET8.resized((2,) * 7, {}).with_classes(3, "pool2")).eval()
    dynamic = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    with torch.no_grad():
        program = torch.export.export(model, (torch.zeros(2, 9_000),), dynamic_shapes=(dynamic,)).module()
        for samples in (2_000, 9_000, 30_001):
            wave = torch.from_numpy(sweep(samples) / np.float32(128))[None].repeat(3, 1)
            assert_parity(program(wave).classes.numpy(), model(wave).classes, samples)


# ---- the command


def test_the_command_writes_and_reports_the_file(tmp_path, demo_report, capsys):
    architecture, state, metadata = read_weights(demo_report.weights)
    weights, path = tmp_path / "w.safetensors", tmp_path / "folder" / "a.onnx"
    write_weights(weights, architecture, state, metadata | {"license": "cc-by-4.0"})
    assert main(["export", "-w", str(weights), "-o", str(path), "--no-heads", "--layers", "conv5,conv7"]) == 0
    report = capsys.readouterr().out
    assert f"wrote {path}" in report
    assert "at least 4,574 samples, 0.207 s" in report
    assert "output  conv7: batch x 64 x frames" in report
    properties = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert properties["license"] == "cc-by-4.0"

    assert main(["export", "-w", str(weights), "-o", str(path)]) == 2
    assert capsys.readouterr().err == f"soundnet-port: {path}: already exists; use --force to replace it\n"
    assert main(["export", "-w", str(weights), "-o", str(path), "--force", "--json", "--license", "mit"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["outputs"] == ["pool5", "conv7", "objects", "scenes"]
    assert max(row["relative"] for row in report["differences"]) < TOLERANCE
    properties = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert properties["license"] == "mit"


def test_errors_of_the_command_are_one_line(tmp_path, demo_report, capsys):
    for words in ("-o a.onnx --layers conv9", "-o a.mp3", "-o a.onnx --opset 3", "-o a.pt2 --layers 22"):
        words = ["export", "-w", str(demo_report.weights), *words.replace("-o ", f"-o {tmp_path}/").split()]
        assert main(words) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
