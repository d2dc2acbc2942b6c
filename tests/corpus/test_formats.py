"""Formats of results: every format holds the same numbers."""

import csv
import importlib
import json
import sys
import time

import numpy as np
import pytest
from support.corpus_files import LAYERS, NAMES, assert_close, model_state, read_tree

import soundnet_port as sp
from soundnet_port.corpus.errors import CorpusError
from soundnet_port.corpus.features import METADATA_KEY
from soundnet_port.corpus.run import extract_corpus
from soundnet_port.errors import MissingExtraError
from soundnet_port.network.weights import checksum


def read(format_name, output, name, layer, pooled, single_file):
    """Return a layer of an input, its frames' times, and the metadata, as users read them."""
    prefix = f"{name}/" if single_file else ""
    file = output if single_file else output / f"{name}.{format_name}"
    if format_name == "npz":
        with np.load(file) as data:
            times = None if pooled else data[f"{prefix}{layer}_times"]
            return data[f"{prefix}{layer}"], times, str(data[METADATA_KEY])
    if format_name == "npy":
        file = output / f"{name}.{layer}.npy"
        times = None if pooled else np.load(output / f"{name}.{layer}.times.npy")
        return np.load(file), times, None
    if format_name == "h5":
        import h5py

        with h5py.File(file) as data:
            times = None if pooled else data[f"{prefix}{layer}_times"][()]
            return data[f"{prefix}{layer}"][()], times, data.attrs[METADATA_KEY]
    if format_name == "mat":
        from scipy.io import loadmat

        data = loadmat(file)
        prefix = prefix.encode("ascii", "backslashreplace").decode()
        values = data[f"{prefix}{layer}"]
        if pooled:
            assert values.shape[0] == 1
            return values[0], None, data[METADATA_KEY][0]
        return values, data[f"{prefix}{layer}_times"], data[METADATA_KEY][0]
    if format_name == "parquet":
        from pyarrow import parquet

        table = parquet.read_table(file)
        rows = [r for r in table.to_pylist() if r["path"] == name and r[layer] is not None]
        values = np.array([row[layer] for row in rows], np.float32)
        metadata = table.schema.metadata[METADATA_KEY.encode()]
        if pooled:
            return values[0], None, metadata
        assert [row["frame"] for row in rows] == list(range(len(rows)))
        return values, np.array([[row["start"], row["center"], row["end"]] for row in rows]), metadata
    assert format_name == "csv"
    file = output if single_file else output / f"{name}.{layer}.csv"
    with open(file, encoding="utf-8", newline="") as lines:
        rows = list(csv.reader(lines))
    header, rows = rows[0], [row for row in rows[1:] if not single_file or row[0] == name]
    if single_file:
        assert header[0] == "file"
    numbers = np.array([row[1 if single_file else 0 :] for row in rows], np.float64)
    if pooled:
        assert header[-1].startswith(("unit", "std"))
        return numbers[0].astype(np.float32), None, None
    first = header.index("unit0") - single_file
    return numbers[:, first:].astype(np.float32), numbers[:, :3], None


@pytest.mark.parametrize("pool", ["none", "mean+std"])
@pytest.mark.parametrize("single_file", [False, True], ids=["folder", "file"])
@pytest.mark.parametrize("format_name", ["npz", "npy", "h5", "mat", "parquet", "csv"])
def test_every_format_equals_extract_and_embed(
    sounds, model, tmp_path, monkeypatch, format_name, single_file, pool
):
    if format_name == "npy" and single_file:
        pytest.skip("npy holds one array")
    layers = ["conv7"] if format_name == "csv" and single_file else LAYERS
    output = tmp_path / (f"out.{format_name}" if single_file else "out")
    result = extract_corpus(
        model,
        [sounds],
        output,
        layers=layers,
        pool=pool,
        workers=1,
        format=None if single_file else format_name,
    )
    assert (result.extracted, result.failures) == (len(NAMES), ())
    for name in NAMES:
        for layer in layers:
            values, times, metadata = read(format_name, output, name, layer, pool != "none", single_file)
            assert values.dtype == np.float32
            if pool == "none":
                expected = model.extract(sp.load_audio(sounds / name), [layer])[layer][0].T
                np.testing.assert_array_equal(times, model.frame_times(layer, len(expected)))
            else:
                expected = sp.embed(model, sounds / name, layer=layer, pool=pool)
            assert_close(values, expected)
            if metadata is not None:
                settings = json.loads(metadata)
                assert settings["layers"] == layers
                assert settings["pool"] == pool
                assert settings["weights"] == checksum(model_state(model))
                assert (settings["sample_rate"], settings["decoder"]) == (22_050, "auto")
                assert settings["version"] == sp.__version__
    files = {p.name for p in tmp_path.iterdir()}
    assert files == ({output.name, f"{output.name}.json"} if single_file else {"out"})
    before = read_tree(tmp_path)
    repeated = tmp_path / "again" / output.name
    repeated.parent.mkdir()
    monkeypatch.setattr(time, "asctime", lambda: "Sun Jan  1 00:00:00 2040")  # in scipy's header
    extract_corpus(model, [sounds], repeated, layers=layers, pool=pool, workers=1, format=format_name)
    assert read_tree(repeated.parent) == before


@pytest.mark.parametrize("format_name", ["npz", "h5", "mat", "parquet", "csv"])
def test_files_with_all_frames_mark_edge_frames(sounds, model, tmp_path, format_name):
    """Layers that cannot have any have no mark."""
    if format_name in ("h5", "mat", "parquet"):
        pytest.importorskip({"h5": "h5py", "mat": "scipy", "parquet": "pyarrow"}[format_name])
    extract_corpus(
        model, [sounds / "a.wav"], tmp_path, layers=["conv7", "pool5"], format=format_name, workers=1
    )
    frames = model.architecture.frames("conv7", 50_000)
    if format_name == "csv":
        rows = list(csv.DictReader((tmp_path / "a.wav.conv7.csv").read_text().splitlines()))
        assert [row["edge"] for row in rows] == ["0"] * (frames - 1) + ["1"]
        assert "edge" not in (tmp_path / "a.wav.pool5.csv").read_text().splitlines()[0]
    elif format_name == "parquet":
        parquet = importlib.import_module("pyarrow.parquet")
        table = parquet.read_table(tmp_path / "a.wav.parquet").to_pylist()
        assert [row["frame"] for row in table if row["edge"]] == [frames - 1]
        assert {row["layer"] for row in table if row["edge"]} == {"conv7"}
    else:
        modules = {"npz": ("numpy", "load"), "h5": ("h5py", "File"), "mat": ("scipy.io", "loadmat")}
        module, function = modules[format_name]
        loaded = getattr(importlib.import_module(module), function)(tmp_path / f"a.wav.{format_name}")
        assert int(np.asarray(loaded["conv7_edge_frames"]).item()) == 1
        assert "pool5_edge_frames" not in loaded


def test_torch7_files_hold_the_original_dataset(sounds, model, tmp_path):
    h5py = pytest.importorskip("h5py", reason="needs the extra [hdf5]")
    extract_corpus(model, [sounds / "a.wav"], tmp_path, layers=["conv7"], format="torch7", workers=1)
    with h5py.File(tmp_path / "a.wav.soundnet.h5") as file:
        assert list(file) == ["layer24"]
        assert_close(file["layer24"][()], model.extract(sp.load_audio(sounds / "a.wav"), [24])[24][0])
    with pytest.raises(CorpusError, match="for the heads"):
        extract_corpus(model, [sounds], tmp_path, layers=["objects"], format="torch7")


def test_layers_by_module_number(sounds, model, tmp_path):
    extract_corpus(model, [sounds / "a.wav"], tmp_path, layers=["conv7", 22, 24], workers=1)
    wave = sp.load_audio(sounds / "a.wav")
    with np.load(tmp_path / "a.wav.npz") as data:
        assert_close(data["layer22"], model.extract(wave, [22])[22][0].T)
        np.testing.assert_array_equal(data["layer24"], data["conv7"])
        np.testing.assert_array_equal(data["layer22_times"], data["conv7_times"])


def test_a_missing_extra_is_reported_before_any_work(sounds, model, tmp_path, monkeypatch):
    for format_name, package, extra in (
        ("h5", "h5py", "hdf5"),
        ("mat", "scipy.io", "mat"),
        ("parquet", "pyarrow.parquet", "parquet"),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(MissingExtraError, match=rf"pip install 'soundnet-port\[{extra}\]'"):
            extract_corpus(model, [sounds], tmp_path / f"out.{format_name}")
    assert list(tmp_path.iterdir()) == []
