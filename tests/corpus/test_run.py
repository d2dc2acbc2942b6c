"""Runs over a corpus: failed inputs, settings of earlier results, outputs that cannot be written."""

import os
import shutil
from pathlib import Path

import pytest
import soundfile
import torch
from support import reference_weights
from support.cli_processes import run_at_once
from support.corpus_files import NAMES, list_npz, read_tree
from support.networks import NETS, model_of

from soundnet_port.corpus.errors import CorpusError
from soundnet_port.corpus.run import extract_corpus


def test_failed_inputs_are_reported_and_the_others_computed(run, sounds, tmp_path):
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
        assert (
            sum(" ".join(line.split("\t")[1:]) in message for message in lines) == 2
        )  # at once, and at the end
    assert lines[-1].startswith(f"soundnet-port: {out}: 5 files, 0.00 hours of sound in ")
    assert list_npz(out) == sorted(f"{name}.npz" for name in NAMES)
    # the next run tries failed inputs again; without failures there is no report
    code, err = run(*command)
    assert code == 1
    assert "5 of 8 files already done; nothing to do" in err
    for name in ("bad.wav", "short.wav"):
        shutil.copy(sounds / "a.wav", inputs / name)
    shutil.copy(sounds / "a.wav", tmp_path / "gone.wav")
    code, err = run(*command)
    assert code == 0
    assert ": 3 files" in err
    assert not (out / "errors.tsv").exists()
    code, err = run(*command)
    assert code == 0
    assert err == f"soundnet-port: {out}: 8 of 8 files already done; nothing to do\n"


def test_a_single_file_keeps_its_failed_inputs(run, sounds, tmp_path):
    (tmp_path / "bad.wav").write_text("text")
    command = [sounds, tmp_path / "bad.wav", "-o", tmp_path / "out.csv", "--workers", 1]
    code, _ = run(*command)
    assert code == 1
    files = read_tree(tmp_path)
    assert set(files) == {"bad.wav", "out.csv", "out.csv.errors.tsv", "out.csv.json"}
    code, err = run(*command)
    assert code == 1
    assert "5 of 6 files already done; nothing to do" in err
    assert read_tree(tmp_path) == files
    (tmp_path / "more.wav").write_bytes((sounds / "a.wav").read_bytes())
    code, err = run(tmp_path / "more.wav", *command)
    assert code == 2
    assert "inputs: 6 before, 7 now" in err
    code, err = run(tmp_path / "bad.wav", "-o", tmp_path / "none.npz", "--workers", 1)
    assert code == 1
    assert not (tmp_path / "none.npz").exists()


def test_other_settings_are_refused(run, sounds, tmp_path):
    for out in (tmp_path / "out", tmp_path / "out.npz"):
        assert run(sounds, "-o", out, "--workers", 1)[0] == 0
        files = read_tree(tmp_path)
        for options, message in (
            (["-l", "conv7"], "layers: pool5 before, conv7 now"),
            (["--pool", "mean"], "pool: none before, mean now"),
            (["--decoder", "av"], "decoder: auto before, av now"),
            (["--batch-seconds", 10], "batch seconds: 95.109 before, 10.0 now"),
        ):
            code, err = run(sounds, "-o", out, "--workers", 1, *options)
            assert (code, err.count("\n")) == (2, 1)
            assert message in err
            assert "--force" in err
        assert read_tree(tmp_path) == files
        assert run(sounds, "-o", out, "--workers", 1, "-l", "conv7", "--force")[0] == 0
        assert run(sounds, "-o", out, "--workers", 1, "-l", "conv7")[0] == 0
        assert run(sounds, "-o", out, "--workers", 1)[0] == 2
    code, err = run(sounds, "-o", tmp_path / "out", "--format", "npy", "-l", "conv7")
    assert code == 2
    assert "format: npz before, npy now" in err
    # results of inputs that are not named would stay, with other settings than the new record's
    code, err = run(sounds / "a.wav", "-o", tmp_path / "out", "--format", "npy", "--force")
    assert code == 2
    assert "of another input" in err
    (tmp_path / "out" / "extract.json").unlink()
    code, err = run(sounds, "-o", tmp_path / "out", "--workers", 1)
    assert code == 2
    assert "without the record of its settings" in err


def test_other_weights_are_refused(run, sounds, tmp_path, model):
    assert run(sounds, "-o", tmp_path / "out", "--workers", 1)[0] == 0
    network = model_of(NETS["n8_d16"])
    with torch.no_grad():
        network.conv1.weight[0, 0, 0] += 1
    with pytest.raises(CorpusError, match="weights: "):
        extract_corpus(network, [sounds], tmp_path / "out", workers=1)


def test_misuse(run, sounds, tmp_path):
    for arguments, message in (
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
        assert message in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="needs file size limits")
def test_a_full_disk_is_one_line_and_the_run_can_resume(clips, demo_report, tmp_path):
    results = tmp_path / "results"
    command = ["extract", clips, "-w", demo_report.weights, "-o", results / "out.h5", "-l", "conv3"]
    command = [*map(str, command), "--workers", "1"]
    assert run_at_once([command], [tmp_path / "output"], limit=4096) == [2]
    output = (tmp_path / "output").read_text()
    assert len(output.splitlines()) == 1, output
    assert "cannot be written (File too large)" in output
    assert sorted(read_tree(results)) == ["out.h5.parts/extract.json"]


def test_impossible_outputs_are_one_line(run, sounds, tmp_path):
    code, err = run(sounds, "-o", tmp_path / "out.foo", "--workers", 1)
    assert code == 2
    assert "out.foo: no format has this suffix; use .npz, .h5, .csv, .mat, .parquet, or name a folder" in err
    assert not (tmp_path / "out.foo").exists()
    assert run(sounds, "-o", f"{tmp_path}/out.foo/", "--workers", 1)[0] == 0
    if Path("/proc").is_dir():
        code, err = run(sounds, "-o", "/proc/x.npz", "--workers", 1)
        assert code == 2
        assert "/proc/x.npz: no folder can be made there" in err


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_that_cannot_be_written_is_one_line(run, sounds, tmp_path):
    (tmp_path / "out").mkdir(mode=0o500)
    code, err = run(sounds, "-o", tmp_path / "out", "--workers", 1)
    assert (code, err.count("\n")) == (2, 1)


def test_a_result_with_an_impossible_name_is_one_failure(run, sounds, tmp_path):
    (tmp_path / "out" / "a.wav.npz").mkdir(parents=True)
    (tmp_path / "out" / "ones").write_text("in the way")
    code, err = run(sounds / "a.wav", sounds, "-o", tmp_path / "out", "--workers", 1)
    assert code == 2  # the folder counts as a result without a record
    (tmp_path / "out" / "a.wav.npz").rmdir()
    code, err = run(sounds, "-o", tmp_path / "out", "--workers", 1)
    assert code == 1
    assert err.count("cannot be written") == 4
    assert len(list_npz(tmp_path / "out")) == 3
