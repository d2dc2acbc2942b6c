"""Whole corpora: every format, the tree, bad files, and the same bytes whatever interrupts a run."""

import csv
import importlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference_weights
from support.budget import budget
from support.networks import DEVICES, NETS, TOLERANCE, model_of

import soundnet_port as sp
from soundnet_port.cli.main import main
from soundnet_port.corpus import run as corpus
from soundnet_port.corpus.extractor import (
    CorpusError,
    Pooling,
    deserialize_model,
    run_in_process,
    serialize_model,
)
from soundnet_port.corpus.formats import METADATA_KEY
from soundnet_port.corpus.run import extract_corpus
from soundnet_port.network.weights import checksum

LAYERS = ["pool5", "conv7"]
POOLED = ["pool5", "conv6"]  # of clips that give conv7 nothing but an edge frame
NAMES = ["a.mp3", "a.wav", "deep/er/c.flac", "ones/b.wav", "ones/é.ogg"]


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """A folder with sounds of several kinds and lengths, and what is no sound."""
    folder = tmp_path_factory.mktemp("corpus") / "sounds"
    for number, name in enumerate(NAMES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, reference_weights.samples(30_000 + 20_000 * number), 22_050)
    (folder / "notes.txt").write_text("not looked at")
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Three groups of short clips, two bad ones among them."""
    folder = tmp_path_factory.mktemp("corpus") / "clips"
    folder.mkdir()
    sound = reference_weights.samples(40_000)
    for number in range(150):
        soundfile.write(folder / f"{number:03}.wav", sound[: 5_000 + 200 * number], 22_050)
    (folder / "070.wav").write_text("text")
    soundfile.write(folder / "140.wav", sound[:4_000], 22_050)
    return folder


@pytest.fixture(scope="module")
def undisturbed(clips, model, tmp_path_factory):
    """What comes of the clips when nothing happens, as a folder and as a file."""
    place = tmp_path_factory.mktemp("undisturbed")
    for output in (place / "out", place / "out.h5"):
        summary = extract_corpus(model, [clips], output, layers=POOLED, pool="mean+std", workers=1)
        assert (summary.files, summary.extracted, len(summary.failures)) == (150, 148, 2)
    return place


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def close(values, expected):
    """Within the engine's tolerance: what is computed together decides the last bits."""
    values, expected = np.asarray(values), np.asarray(expected)
    assert values.shape == expected.shape
    assert np.abs(values - expected).max() <= TOLERANCE * np.abs(expected).max()


# ---- formats


def read(form, place, name, layer, pooled, in_one):
    """A layer of an input, its frames' times, and the metadata, as a user reads them."""
    before = f"{name}/" if in_one else ""
    file = place if in_one else place / f"{name}.{form}"
    if form == "npz":
        with np.load(file) as data:
            times = None if pooled else data[f"{before}{layer}_times"]
            return data[f"{before}{layer}"], times, str(data[METADATA_KEY])
    if form == "npy":
        file = place / f"{name}.{layer}.npy"
        times = None if pooled else np.load(place / f"{name}.{layer}.times.npy")
        return np.load(file), times, None
    if form == "h5":
        import h5py

        with h5py.File(file) as data:
            times = None if pooled else data[f"{before}{layer}_times"][()]
            return data[f"{before}{layer}"][()], times, data.attrs[METADATA_KEY]
    if form == "mat":
        from scipy.io import loadmat

        data = loadmat(file)
        before = before.encode("ascii", "backslashreplace").decode()
        values = data[f"{before}{layer}"]
        if pooled:
            assert values.shape[0] == 1
            return values[0], None, data[METADATA_KEY][0]
        return values, data[f"{before}{layer}_times"], data[METADATA_KEY][0]
    if form == "parquet":
        from pyarrow import parquet

        table = parquet.read_table(file)
        rows = [r for r in table.to_pylist() if r["path"] == name and r[layer] is not None]
        values = np.array([row[layer] for row in rows], np.float32)
        metadata = table.schema.metadata[METADATA_KEY.encode()]
        if pooled:
            return values[0], None, metadata
        assert [row["frame"] for row in rows] == list(range(len(rows)))
        return values, np.array([[row["start"], row["center"], row["end"]] for row in rows]), metadata
    assert form == "csv"
    file = place if in_one else place / f"{name}.{layer}.csv"
    with open(file, encoding="utf-8", newline="") as lines:
        rows = list(csv.reader(lines))
    header, rows = rows[0], [row for row in rows[1:] if not in_one or row[0] == name]
    if in_one:
        assert header[0] == "file"
    numbers = np.array([row[1 if in_one else 0 :] for row in rows], np.float64)
    if pooled:
        assert header[-1].startswith(("unit", "std"))
        return numbers[0].astype(np.float32), None, None
    first = header.index("unit0") - in_one
    return numbers[:, first:].astype(np.float32), numbers[:, :3], None


@pytest.mark.parametrize("pool", ["none", "mean+std"])
@pytest.mark.parametrize("in_one", [False, True], ids=["folder", "file"])
@pytest.mark.parametrize("form", ["npz", "npy", "h5", "mat", "parquet", "csv"])
def test_every_format_holds_what_extract_and_embed_give(
    sounds, model, tmp_path, monkeypatch, form, in_one, pool
):
    if form == "npy" and in_one:
        pytest.skip("npy holds one array")
    layers = ["conv7"] if form == "csv" and in_one else LAYERS
    output = tmp_path / (f"out.{form}" if in_one else "out")
    summary = extract_corpus(
        model, [sounds], output, layers=layers, pool=pool, workers=1, format=None if in_one else form
    )
    assert (summary.extracted, summary.failures) == (len(NAMES), ())
    for name in NAMES:
        for layer in layers:
            values, times, metadata = read(form, output, name, layer, pool != "none", in_one)
            assert values.dtype == np.float32
            if pool == "none":
                expected = model.extract(sp.load_audio(sounds / name), [layer])[layer][0].T
                np.testing.assert_array_equal(times, model.frame_times(layer, len(expected)))
            else:
                expected = sp.embed(model, sounds / name, layer=layer, pool=pool)
            close(values, expected)
            if metadata is not None:
                said = json.loads(metadata)
                assert said["layers"] == layers
                assert said["pool"] == pool
                assert said["weights"] == checksum(model_state(model))
                assert (said["sample_rate"], said["decoder"]) == (22_050, "auto")
                assert said["version"] == sp.__version__
    left = {p.name for p in tmp_path.iterdir()}
    assert left == ({output.name, f"{output.name}.json"} if in_one else {"out"})
    before = tree(tmp_path)
    again = tmp_path / "again" / output.name
    again.parent.mkdir()
    monkeypatch.setattr(time, "asctime", lambda: "Sun Jan  1 00:00:00 2040")  # scipy's header has it
    extract_corpus(model, [sounds], again, layers=layers, pool=pool, workers=1, format=form)
    assert tree(again.parent) == before


@pytest.mark.parametrize("form", ["npz", "h5", "mat", "parquet", "csv"])
def test_files_with_all_frames_say_which_are_edge_frames(sounds, model, tmp_path, form):
    """Those of layers that cannot have any are as they always were."""
    if form in ("h5", "mat", "parquet"):
        pytest.importorskip({"h5": "h5py", "mat": "scipy", "parquet": "pyarrow"}[form])
    extract_corpus(model, [sounds / "a.wav"], tmp_path, layers=["conv7", "pool5"], format=form, workers=1)
    frames = model.architecture.frames("conv7", 50_000)
    if form == "csv":
        rows = list(csv.DictReader((tmp_path / "a.wav.conv7.csv").read_text().splitlines()))
        assert [row["edge"] for row in rows] == ["0"] * (frames - 1) + ["1"]
        assert "edge" not in (tmp_path / "a.wav.pool5.csv").read_text().splitlines()[0]
    elif form == "parquet":
        parquet = importlib.import_module("pyarrow.parquet")
        table = parquet.read_table(tmp_path / "a.wav.parquet").to_pylist()
        assert [row["frame"] for row in table if row["edge"]] == [frames - 1]
        assert {row["layer"] for row in table if row["edge"]} == {"conv7"}
    else:
        modules = {"npz": ("numpy", "load"), "h5": ("h5py", "File"), "mat": ("scipy.io", "loadmat")}
        module, function = modules[form]
        loaded = getattr(importlib.import_module(module), function)(tmp_path / f"a.wav.{form}")
        assert int(np.asarray(loaded["conv7_edge_frames"]).item()) == 1
        assert "pool5_edge_frames" not in loaded


@pytest.mark.parametrize("batch_seconds", [None, 1], ids=["at once", "in blocks"])
def test_what_is_pooled_or_on_a_clock_leaves_edge_frames_out(sounds, model, tmp_path, batch_seconds):
    common = {"layers": ["conv7", "pool5"], "workers": 1, "batch_seconds": batch_seconds}
    everything = model.extract(sp.load_audio(sounds / "ones" / "b.wav"), ["conv7"])["conv7"][0].numpy()
    for edge_frames in (False, True):
        out = tmp_path / f"{edge_frames}.npz"
        extract_corpus(model, [sounds], out, pool="max", edge_frames=edge_frames, **common)
        with np.load(out) as data:
            close(data["ones/b.wav/conv7"], everything[:, : None if edge_frames else -1].max(1))
            assert json.loads(str(data[METADATA_KEY]))["edge_frames"] is edge_frames
    with pytest.raises(CorpusError, match="edge frames: False there, True now"):
        extract_corpus(model, [sounds], tmp_path / "False.npz", pool="max", edge_frames=True, **common)
    extract_corpus(model, [sounds / "a.wav"], tmp_path / "tr.npz", tr=0.25, **common)
    with np.load(tmp_path / "tr.npz") as data:
        unknown = np.isnan(data["a.wav/conv7"][:, 0])
        assert unknown[-1]
        assert not unknown[0]
        assert not np.isnan(data["a.wav/pool5"]).any()


def test_a_sound_that_leaves_nothing_is_a_bad_file(model, tmp_path):
    soundfile.write(tmp_path / "short.wav", reference_weights.samples(9_000), 22_050)
    summary = extract_corpus(
        model, [tmp_path / "short.wav"], tmp_path / "out", layers=["conv7"], pool="mean", workers=1
    )
    assert "conv7 edge frames alone" in summary.failures[0].reason
    assert "at least 12,766 samples" in summary.failures[0].reason


def model_state(model):
    return {name: model.state_dict()[name] for name in model.architecture.state_shapes()}


def test_torch7_files_hold_the_originals_dataset(sounds, model, tmp_path):
    h5py = pytest.importorskip("h5py", reason="needs the extra [hdf5]")
    extract_corpus(model, [sounds / "a.wav"], tmp_path, layers=["conv7"], format="torch7", workers=1)
    with h5py.File(tmp_path / "a.wav.soundnet.h5") as file:
        assert list(file) == ["layer24"]
        close(file["layer24"][()], model.extract(sp.load_audio(sounds / "a.wav"), [24])[24][0])
    with pytest.raises(CorpusError, match="for the heads"):
        extract_corpus(model, [sounds], tmp_path, layers=["objects"], format="torch7")


def test_modules_inside_layers_and_numbers_of_layers(sounds, model, tmp_path):
    extract_corpus(model, [sounds / "a.wav"], tmp_path, layers=["conv7", 22, 24], workers=1)
    wave = sp.load_audio(sounds / "a.wav")
    with np.load(tmp_path / "a.wav.npz") as data:
        close(data["layer22"], model.extract(wave, [22])[22][0].T)
        np.testing.assert_array_equal(data["layer24"], data["conv7"])
        np.testing.assert_array_equal(data["layer22_times"], data["conv7_times"])


def test_a_missing_extra_is_said_before_any_work(sounds, model, tmp_path, monkeypatch):
    for form, package, extra in (
        ("h5", "h5py", "hdf5"),
        ("mat", "scipy.io", "mat"),
        ("parquet", "pyarrow.parquet", "parquet"),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(CorpusError, match=rf"pip install 'soundnet-port\[{extra}\]'"):
            extract_corpus(model, [sounds], tmp_path / f"out.{form}")
    assert list(tmp_path.iterdir()) == []


# ---- pooling, and sounds longer than a block


@given(
    st.sampled_from(["none", "mean", "max", "mean+std"]),
    st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any),
    st.floats(-3, 3),
    st.integers(0, 2**31),
)
@settings(max_examples=budget(60), deadline=None)
def test_pooling_bit_by_bit_is_pooling_at_once(kind, counts, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    pieces = [torch.randn(n, 5, generator=generator) * 10**exponent + 10**exponent for n in counts]
    pooling = Pooling(kind)
    for piece in pieces:
        pooling.add(piece)
    whole = torch.cat(pieces).double()
    made = pooling.result()
    assert made.dtype == torch.float32
    expected = {
        "none": lambda: whole,
        "mean": lambda: whole.mean(0),
        "max": lambda: whole.amax(0),
        "mean+std": lambda: torch.cat([whole.mean(0), whole.std(0, correction=0)]),
    }[kind]()
    # both in float64, so only the rounding of the result to float32 differs: 6e-8, and cancellation
    # in the mean of some values of both signs
    torch.testing.assert_close(made.double(), expected, rtol=1e-6, atol=1e-9 * 10**exponent)


@pytest.mark.parametrize("device", DEVICES)
def test_a_sound_longer_than_a_block_is_as_in_one_piece(model, tmp_path, device):
    soundfile.write(tmp_path / "long.wav", reference_weights.samples(300_000), 22_050)
    wave = sp.load_audio(tmp_path / "long.wav")
    moved = model_of(NETS["n8_d16"]).to(device)
    for pool in ("none", "mean", "max", "mean+std"):
        out = tmp_path / pool
        layers = ["pool2", "objects", "conv7", 22]
        extract_corpus(
            moved, [tmp_path / "long.wav"], out, layers=layers, pool=pool, batch_seconds=1, workers=1
        )
        with np.load(out / "long.wav.npz") as data:
            for layer in layers:
                key = layer if isinstance(layer, str) else f"layer{layer}"
                if pool == "none":
                    expected = model.extract(wave, [layer])[layer][0].T
                else:
                    expected = sp.embed(model, wave, layer=layer, pool=pool)
                close(data[key], expected)


def test_a_long_sound_moves_on_by_its_seconds(model, tmp_path):
    soundfile.write(tmp_path / "long.wav", reference_weights.samples(22_050 * 5), 22_050)
    seen = []
    extract_corpus(
        model, [tmp_path / "long.wav"], tmp_path / "out", batch_seconds=1, workers=1, progress=seen.append
    )
    assert [(each.files, each.seconds) for each in seen] == [(0, n) for n in range(6)] + [(1, 5)]


# ---- half precision


@pytest.mark.parametrize(("name", "error"), [("bfloat16", 3e-2), ("float16", 4e-3)])
def test_a_half_precision_network_writes_float32_and_says_what_it_is(
    run, sounds, model, tmp_path, name, error
):
    """Errors as documented for conv7, twice that for other networks and processors."""
    command = [sounds, "-o", tmp_path / "out", "-l", "conv7", "--workers", 1]
    assert run(*command, "--dtype", name, "--batch-seconds", 2)[0] == 0  # some are longer than a block
    for sound in NAMES:
        with np.load(tmp_path / "out" / f"{sound}.npz") as data:
            made = data["conv7"]
            assert json.loads(str(data[METADATA_KEY]))["dtype"] == name
        exact = model.extract(sp.load_audio(sounds / sound), ["conv7"])["conv7"][0].T.numpy()
        assert made.dtype == np.float32
        assert 0 < np.abs(made - exact).max() < 2 * error * np.abs(exact).max()
    code, err = run(*command, "--batch-seconds", 2)
    assert code == 2
    assert f"dtype: {name} there, float32 now" in err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_network_reaches_other_processes_bit_for_bit(model, dtype):
    sent = model_of(NETS["n8_d16"]).to(dtype)
    got = deserialize_model(pickle.loads(pickle.dumps(serialize_model(sent))))
    assert got.architecture == sent.architecture
    assert checksum(model_state(got)) == checksum(model_state(sent))
    assert all(torch.equal(each, model_state(sent)[name]) for name, each in model_state(got).items())


@pytest.mark.parametrize("batch_seconds", [1, None])
def test_what_is_too_large_for_float16_is_a_bad_file_and_not_infinite(sounds, tmp_path, batch_seconds):
    loud = model_of(NETS["n8_d16"])
    loud.conv7.weight.mul_(1e6)
    summary = extract_corpus(
        loud.half(), [sounds / "a.wav"], tmp_path, layers=[22], batch_seconds=batch_seconds, workers=1
    )
    assert "too large for the network's number type" in summary.failures[0].reason
    assert names(tmp_path) == []


# ---- inputs and names


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.npz"))


def test_the_tree_is_mirrored(sounds, model, tmp_path, monkeypatch):
    extract_corpus(model, [sounds], tmp_path / "tree", workers=1)
    assert names(tmp_path / "tree") == sorted(f"{name}.npz" for name in NAMES)
    # files outside of any folder go by their names; one inside of a folder is the same input
    (tmp_path / "list.txt").write_text(f"{sounds}/a.mp3\n{sounds}/ones/b.wav\n")
    inputs = [sounds / "ones", f"@{tmp_path}/list.txt", sounds / "deep" / "er" / "c.flac"]
    extract_corpus(model, inputs, tmp_path / "listed", workers=1)
    assert names(tmp_path / "listed") == ["a.mp3.npz", "b.wav.npz", "c.flac.npz", "é.ogg.npz"]
    monkeypatch.chdir(sounds)
    extract_corpus(model, ["ones/../a.wav", "deep/er/c.flac"], tmp_path / "root", root="deep/..", workers=1)
    assert names(tmp_path / "root") == ["a.wav.npz", "deep/er/c.flac.npz"]
    with pytest.raises(CorpusError, match="not inside"):
        extract_corpus(model, ["a.wav"], tmp_path / "no", root="deep")


def test_two_inputs_of_one_name_are_refused(sounds, model, tmp_path):
    (tmp_path / "other").mkdir()
    shutil.copy(sounds / "a.wav", tmp_path / "other" / "a.wav")
    for output in (tmp_path / "out", tmp_path / "out.npz"):
        with pytest.raises(CorpusError, match="would both become"):
            extract_corpus(model, [sounds / "a.wav", tmp_path / "other"], output)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_sound_on_standard_input_is_another_each_time(sounds, model, tmp_path, monkeypatch):
    louder = soundfile.read(sounds / "a.wav")[0] / 2
    soundfile.write(tmp_path / "b.wav", louder, 22_050)  # of the same size

    def extract(sound, output, **how):
        with open(sound) as stream:
            monkeypatch.setattr("sys.stdin", stream)
            return extract_corpus(model, ["-"], tmp_path / output, workers=1, **how)

    assert extract(sounds / "a.wav", "out").extracted == 1
    assert names(tmp_path / "out") == ["stdin.npz"]
    with pytest.raises(CorpusError, match="perhaps of another sound"):
        extract(tmp_path / "b.wav", "out")
    assert extract(tmp_path / "b.wav", "out", force=True).extracted == 1
    assert extract(sounds / "a.wav", "out.npz").extracted == 1
    assert extract(sounds / "a.wav", "out.npz").there == 1
    with pytest.raises(CorpusError, match="inputs sha256"):
        extract(tmp_path / "b.wav", "out.npz")


def test_names_that_are_one_where_they_go_are_refused(sounds, model, tmp_path):
    for folder, name in (("a", "x_b.wav"), ("b", "_b.wav"), ("c", "X_B.wav")):
        (tmp_path / folder).mkdir()
        shutil.copy(sounds / "a.wav", tmp_path / folder / name)
    with pytest.raises(CorpusError, match=r"would both become x_b\.wav"):  # as MATLAB has them
        extract_corpus(model, [tmp_path / "a", tmp_path / "b"], tmp_path / "out.mat", workers=1)
    (tmp_path / "out" / ".EXTRACT").mkdir(parents=True)  # what a disk shows that knows one case only
    with pytest.raises(CorpusError, match="would both become"):
        extract_corpus(model, [tmp_path / "a", tmp_path / "c"], tmp_path / "out", workers=1)


@pytest.mark.skipif(os.name == "nt", reason="needs odd names")
def test_odd_names_come_out_as_they_are(run, sounds, tmp_path):
    odd = ["a\nb.wav", "\udcff.wav", "-n.wav", " .wav", "a\tb\\.wav", "con.wav", "l" * 249 + ".wav"]
    (tmp_path / "in").mkdir()
    for name in odd:
        shutil.copy(sounds / "a.wav", tmp_path / "in" / name)
    (tmp_path / "in" / "loop.wav").symlink_to("loop.wav")
    (tmp_path / "in" / "again").symlink_to(".")
    code, err = run(tmp_path / "in", "-o", tmp_path / "in" / "out", "--workers", 1)
    assert code == 1
    assert "loop.wav: Too many levels of symbolic links" in err
    assert "cannot be written: File name too long" in err
    assert names(tmp_path / "in" / "out") == sorted(f"{name}.npz" for name in odd[:-1])
    report = (tmp_path / "in" / "out" / "errors.tsv").read_bytes().splitlines()
    assert len(report) == 2
    for form in ("npz", "h5", "csv", "mat", "parquet"):
        assert run(tmp_path / "in", "-o", tmp_path / f"out.{form}", "--workers", 1)[0] == 1
        assert len((tmp_path / f"out.{form}.errors.tsv").read_bytes().splitlines()) == 1


@pytest.mark.parametrize("bad", ["empty", "no samples", "one sample", "NaN", "shortest less one", "slow"])
def test_a_sound_that_gives_nothing_is_said_to(run, tmp_path, bad):
    path = tmp_path / "x.wav"
    samples, said, rate = {
        "empty": (None, "an empty file", 22_050),
        "no samples": (np.zeros(0), "holds no samples", 22_050),
        "one sample": (np.zeros(1), "too short", 22_050),
        "NaN": (np.full(300_000, np.nan), "sample 0 is NaN or infinite", 22_050),
        "shortest less one": (np.zeros(1_085), "too short", 22_050),
        "slow": (np.zeros(90), "sample rate of 3 Hz", 3),
    }[bad]
    if samples is None:
        path.write_bytes(b"")
    else:
        soundfile.write(path, samples, rate, subtype="FLOAT")
    code, err = run(path, "-o", tmp_path / "out", "--workers", 1)
    assert (code, err.count(f"{path}: ")) == (1, 2)
    assert said in err
    assert names(tmp_path) == []


# ---- the command line


@pytest.fixture
def run(capsys, demo_report):
    def command(*arguments, weights=demo_report.weights):
        try:
            code = main(["extract", *map(str, arguments), "-w", str(weights)])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        assert captured.out == ""
        return code, captured.err

    return command


def test_bad_files_are_reported_and_the_rest_goes_on(run, sounds, tmp_path):
    inputs, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(sounds, inputs)
    (inputs / "bad.wav").write_text("text")
    soundfile.write(inputs / "short.wav", reference_weights.samples(4_573), 22_050)
    command = [inputs, tmp_path / "gone.wav", "-o", out, "--workers", 1, "-l", "conv7"]
    code, err = run(*command)
    assert code == 1
    lines = err.splitlines()
    assert len(lines) == 3 + 1 + 3 + 1
    report = (out / "errors.tsv").read_text("utf-8").splitlines()
    assert [line.split("\t")[0] for line in report] == [
        str(tmp_path / "gone.wav"),
        str(inputs / "bad.wav"),
        str(inputs / "short.wav"),
    ]
    assert "No such file" in report[0]
    assert "cannot be decoded" in report[1]
    assert "4,573 samples (0.207 s) are too short: conv7 needs at least 4,574" in report[2]
    for line in report:
        assert sum(" ".join(line.split("\t")[1:]) in said for said in lines) == 2  # at once, and at the end
    assert lines[-1].startswith(f"soundnet-port: {out}: 5 files, 0.00 hours of sound in ")
    assert names(out) == sorted(f"{name}.npz" for name in NAMES)
    # again: the good ones stay, the bad ones are tried again; repaired, there is no report any more
    code, err = run(*command)
    assert code == 1
    assert "5 of 8 files are there already; nothing to do" in err
    for name in ("bad.wav", "short.wav"):
        shutil.copy(sounds / "a.wav", inputs / name)
    shutil.copy(sounds / "a.wav", tmp_path / "gone.wav")
    code, err = run(*command)
    assert code == 0
    assert ": 3 files" in err
    assert not (out / "errors.tsv").exists()
    code, err = run(*command)
    assert code == 0
    assert err == f"soundnet-port: {out}: 8 of 8 files are there already; nothing to do\n"


def test_a_file_of_all_remembers_its_bad_inputs(run, sounds, tmp_path):
    (tmp_path / "bad.wav").write_text("text")
    command = [sounds, tmp_path / "bad.wav", "-o", tmp_path / "out.csv", "--workers", 1]
    code, _ = run(*command)
    assert code == 1
    made = tree(tmp_path)
    assert set(made) == {"bad.wav", "out.csv", "out.csv.errors.tsv", "out.csv.json"}
    code, err = run(*command)
    assert code == 1
    assert "5 of 6 files are there already; nothing to do" in err
    assert tree(tmp_path) == made
    (tmp_path / "more.wav").write_bytes((sounds / "a.wav").read_bytes())
    code, err = run(tmp_path / "more.wav", *command)
    assert code == 2
    assert "inputs: 6 there, 7 now" in err
    code, err = run(tmp_path / "bad.wav", "-o", tmp_path / "none.npz", "--workers", 1)
    assert code == 1
    assert not (tmp_path / "none.npz").exists()


def test_other_settings_are_noticed(run, sounds, tmp_path):
    for out in (tmp_path / "out", tmp_path / "out.npz"):
        assert run(sounds, "-o", out, "--workers", 1)[0] == 0
        made = tree(tmp_path)
        for other, said in (
            (["-l", "conv7"], "layers: pool5 there, conv7 now"),
            (["--pool", "mean"], "pool: none there, mean now"),
            (["--decoder", "av"], "decoder: auto there, av now"),
            (["--batch-seconds", 10], "batch seconds: 95.109 there, 10.0 now"),
        ):
            code, err = run(sounds, "-o", out, "--workers", 1, *other)
            assert (code, err.count("\n")) == (2, 1)
            assert said in err
            assert "--force" in err
        assert tree(tmp_path) == made
        assert run(sounds, "-o", out, "--workers", 1, "-l", "conv7", "--force")[0] == 0
        assert run(sounds, "-o", out, "--workers", 1, "-l", "conv7")[0] == 0
        assert run(sounds, "-o", out, "--workers", 1)[0] == 2
    code, err = run(sounds, "-o", tmp_path / "out", "--format", "npy", "-l", "conv7")
    assert code == 2
    assert "format: npz there, npy now" in err
    # of inputs that are not named, results with other settings would stay under the new record
    code, err = run(sounds / "a.wav", "-o", tmp_path / "out", "--format", "npy", "--force")
    assert code == 2
    assert "of another input" in err
    (tmp_path / "out" / "extract.json").unlink()
    code, err = run(sounds, "-o", tmp_path / "out", "--workers", 1)
    assert code == 2
    assert "how it was made" in err


def test_other_weights_are_noticed(run, sounds, tmp_path, model):
    assert run(sounds, "-o", tmp_path / "out", "--workers", 1)[0] == 0
    other = model_of(NETS["n8_d16"])
    with torch.no_grad():
        other.conv1.weight[0, 0, 0] += 1
    with pytest.raises(CorpusError, match="weights: "):
        extract_corpus(other, [sounds], tmp_path / "out", workers=1)


def test_misuse(run, sounds, tmp_path):
    for arguments, said in (
        (["-o", tmp_path / "out.npy"], "cannot hold a corpus as npy"),
        (["-o", tmp_path / "out.npz", "--format", "h5"], "cannot hold a corpus as h5"),
        (["-o", tmp_path / "out.csv", "-l", "pool5", "-l", "conv7"], "csv holds one layer"),
        (["-o", tmp_path / "out", "--json"], "is printed"),
        (["-o", tmp_path / "out", "-l", "conv9"], "choose from conv1"),
        (["-o", tmp_path / "out", "-l", "9" * 5000], "choose from conv1"),
        (["-o", sounds / "notes.txt" / "out"], "Not a directory"),
        (["-o", tmp_path / "out", "--workers", 0], "at least 1"),
        (["-o", tmp_path / "out", "--batch-seconds", 0], "1 to 3600"),
        (["-o", tmp_path / "out", "--batch-seconds", "nan"], "1 to 3600"),
        (["-o", tmp_path / "out", "--batch-seconds", "inf"], "1 to 3600"),
        (["-l", "pool5", "-l", "conv7"], "with -o"),
        (["--format", "npz"], "with -o"),
        (["-o", sounds / "notes.txt"], "neither a folder nor"),
    ):
        code, err = run(sounds, *arguments)
        assert (code, err.count("\n")) == (2, 1), err
        assert said in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="needs file size limits")
def test_a_full_disk_is_one_line_and_the_next_run_goes_on(clips, demo_report, tmp_path):
    command = f'"{sys.executable}" -m soundnet_port extract "{clips}" -w "{demo_report.weights}"'
    command += f' -o "{tmp_path}/out.h5" -l conv3 --workers 1'
    done = subprocess.run(["bash", "-c", f"ulimit -f 4; {command}"], capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "cannot be written (File too large)" in done.stderr
    assert sorted(tree(tmp_path)) == ["out.h5.parts/extract.json"]


def test_places_where_nothing_can_be_are_one_line(run, sounds, tmp_path):
    code, err = run(sounds, "-o", tmp_path / "out.foo", "--workers", 1)
    assert code == 2
    assert "out.foo: no format has this suffix; take .npz, .h5, .csv, .mat, .parquet, or name a folder" in err
    assert not (tmp_path / "out.foo").exists()
    assert run(sounds, "-o", f"{tmp_path}/out.foo/", "--workers", 1)[0] == 0
    if Path("/proc").is_dir():
        code, err = run(sounds, "-o", "/proc/x.npz", "--workers", 1)
        assert code == 2
        assert "/proc/x.npz: no folder can be made there" in err


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_cannot_be_written_is_one_line(run, sounds, tmp_path):
    (tmp_path / "out").mkdir(mode=0o500)
    code, err = run(sounds, "-o", tmp_path / "out", "--workers", 1)
    assert (code, err.count("\n")) == (2, 1)


def test_a_result_whose_name_cannot_be_is_one_bad_file(run, sounds, tmp_path):
    (tmp_path / "out" / "a.wav.npz").mkdir(parents=True)
    (tmp_path / "out" / "ones").write_text("in the way")
    code, err = run(sounds / "a.wav", sounds, "-o", tmp_path / "out", "--workers", 1)
    assert code == 2  # the folder counts as a result that is there without a record
    (tmp_path / "out" / "a.wav.npz").rmdir()
    code, err = run(sounds, "-o", tmp_path / "out", "--workers", 1)
    assert code == 1
    assert err.count("cannot be written") == 4
    assert len(names(tmp_path / "out")) == 3


# ---- interruptions: the same bytes whatever happens


def script(*arguments, **how):
    command = [sys.executable, "-m", "soundnet_port", "extract", *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, **how)


@pytest.mark.parametrize("output", ["out", "out.h5"])
def test_interrupted_anywhere_the_bytes_are_the_same(clips, model, undisturbed, tmp_path, output):
    generator = random.Random(output)
    common = {"layers": POOLED, "pool": "mean+std", "workers": 1}
    interrupted = 0
    for _ in range(6):
        left = generator.randrange(1, 70)

        def stop(progress, left=left, before=[]):  # noqa: B006
            before.append(progress.files)
            if progress.files - before[0] >= left:
                raise KeyboardInterrupt

        try:
            extract_corpus(model, [clips], tmp_path / output, progress=stop, **common)
        except KeyboardInterrupt:
            interrupted += 1
    extract_corpus(model, [clips], tmp_path / output, **common)
    assert interrupted >= 3
    expected = {name: data for name, data in tree(undisturbed).items() if name.startswith(output)}
    expected = {n: d for n, d in expected.items() if output == "out.h5" or n.startswith("out/")}
    assert tree(tmp_path) == expected


def test_threads_that_decode_ahead_change_nothing(clips, model, undisturbed, tmp_path, monkeypatch):
    """As on a GPU, whose results differ in the last bits from these."""
    monkeypatch.setattr(
        corpus, "run_in_process", lambda extractor, groups, threads: run_in_process(extractor, groups, 3)
    )
    extract_corpus(model, [clips], tmp_path / "out", layers=POOLED, pool="mean+std", workers=1)
    assert tree(tmp_path / "out") == {n[4:]: d for n, d in tree(undisturbed).items() if n.startswith("out/")}


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_killed_and_with_two_workers_the_bytes_are_the_same(clips, demo_report, undisturbed, tmp_path, run):
    """kill -9 of the run alone, whose workers have to end by themselves; and SIGTERM."""
    command = [clips, "-o", tmp_path / "out", "-w", demo_report.weights, "--pool", "mean+std"]
    command += [word for layer in POOLED for word in ("-l", layer)]
    for number, files in ((signal.SIGKILL, 3), (signal.SIGTERM, 90)):
        process = script(*command, "--workers", 2)
        until = time.monotonic() + 300  # where others keep the machine busy
        while len(list((tmp_path / "out").glob("*.npz"))) < files:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate()
        assert "Traceback" not in err
        assert process.returncode == (143 if number == signal.SIGTERM else -number)
    assert not (tmp_path / "out" / ".extract").exists()  # SIGTERM left nothing, nor what was there
    code, err = run(*command, "--workers", 1)
    assert code == 1, err  # two bad files
    assert "there already" in err
    assert tree(tmp_path / "out") == {n[4:]: d for n, d in tree(undisturbed).items() if n.startswith("out/")}


@pytest.mark.skipif(os.name == "nt", reason="needs file locks")
def test_two_runs_at_once_do_each_other_no_harm(clips, model, undisturbed, tmp_path, monkeypatch):
    """One inside of the other, at its tenth file."""
    monkeypatch.setattr("soundnet_port.files._SHORT_PATIENCE", 0.1)
    common = {"layers": POOLED, "pool": "mean+std", "workers": 1}
    refused = []

    def meanwhile(progress):
        if progress.files == 10 and not refused:
            refused.append(None)
            summary = extract_corpus(model, [clips], tmp_path / "out", **common)
            assert summary.extracted > 130
            with pytest.raises(CorpusError, match="another run is at work there"):
                extract_corpus(model, [clips], tmp_path / "out", force=True, **common)

    extract_corpus(model, [clips], tmp_path / "out", progress=meanwhile, **common)
    assert tree(tmp_path / "out") == {n[4:]: d for n, d in tree(undisturbed).items() if n.startswith("out/")}

    def again(progress):
        if progress.files == 10 and len(refused) == 1:
            refused.append(None)
            with pytest.raises(CorpusError, match="another run is at work there"):
                extract_corpus(model, [clips], tmp_path / "out.h5", **common)

    extract_corpus(model, [clips], tmp_path / "out.h5", progress=again, **common)
    assert (tmp_path / "out.h5").read_bytes() == (undisturbed / "out.h5").read_bytes()
    assert len(refused) == 2


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_a_file_that_kills_its_worker_is_a_bad_file(clips, model, undisturbed, tmp_path, monkeypatch):
    """The rest of its group is as if it could not be read. Python runs sitecustomize in each worker."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, soundfile\n"
        "opened = soundfile.SoundFile.__init__\n"
        "def crash(self, file, *rest, **more):\n"
        "    if b'070.wav' in os.fsencode(file):\n"
        "        os.kill(os.getpid(), 9)\n"
        "    opened(self, file, *rest, **more)\n"
        "soundfile.SoundFile.__init__ = crash\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    heard = []
    summary = extract_corpus(
        model,
        [clips],
        tmp_path / "out",
        layers=POOLED,
        pool="mean+std",
        workers=2,
        progress=lambda progress: heard.append(progress.files),
    )
    assert (summary.files, summary.extracted) == (150, 148)
    assert heard == list(range(151))
    reasons = {Path(f.path).name: f.reason for f in summary.failures}
    assert set(reasons) == {"070.wav", "140.wav"}
    assert "SIGKILL" in reasons["070.wav"]
    expected = {n[4:]: d for n, d in tree(undisturbed).items() if n.startswith("out/")}
    made = tree(tmp_path / "out")
    assert made.pop("errors.tsv") != expected.pop("errors.tsv")
    assert made == expected
