"""The command encode."""

import json
import sys

import numpy as np
import pytest
from support.synthetic_brain import write_runs

from soundnet_port.cli.main import main


@pytest.fixture
def table(tmp_path):
    return write_runs(tmp_path)


@pytest.fixture
def arguments(table, demo_report, tmp_path):
    return ["encode", str(table), "--tr", "2", "-w", str(demo_report.weights), "--cache", str(tmp_path / "c")]


def test_results_are_printed_and_written(arguments, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*arguments, "-o", str(out), "-l", "pool1,conv7", "--predictions"]) == 0
    printed, reported = capsys.readouterr()
    assert [line.split()[0] for line in printed.splitlines()] == ["layer", "pool1", "conv7"]
    assert "soundnet-port: all 60 volumes are used\n" in reported
    assert np.load(out / "correlation.npy").shape == (2, 5)
    assert np.load(out / "predictions" / "conv7.npy").shape == (60, 5)
    assert main([*arguments, "-o", str(out)]) == 2
    assert "already has encoding results; use --force" in capsys.readouterr().err
    assert (
        main([*arguments, "-o", str(out), "-f", "--hrf", "glover", "-l", "pool1", "--alphas", "1,100"]) == 0
    )
    about = json.loads((out / "encoding.json").read_text())
    assert (about["hrf"], about["alphas"], about["delays"]) == ("glover", [1, 100], None)


def test_json_holds_the_summary(arguments, capsys):
    assert main([*arguments, "--json", "--delays", "1,2", "--align", "end", "-l", "conv3"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["delays"], printed["align"], printed["layers"][0]["layer"]) == ([1, 2], "end", "conv3")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--delays", "1,x"], "--delays 1,x: expected numbers separated by commas"),
        (["--delays", "1", "--hrf", "spm"], "--hrf and --delays exclude each other"),
        (["--no-cache"], "--cache and --no-cache exclude each other"),
        (["--tr", "0"], "tr: must be 0.001 to 3600 seconds"),
    ],
)
def test_misuse_is_one_line(arguments, options, error, capsys):
    assert main([*arguments, *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert error in err


def test_only_the_figure_needs_an_extra(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*arguments, "-o", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.endswith("pip install 'soundnet-port[plot]'\n")
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "-l", "pool1"]) == 0
