"""The command finetune with --targets."""

import json

import pytest
from support.synthetic_brain import write_runs

import soundnet_port as sp
from soundnet_port.cli.main import main


@pytest.fixture
def arguments(demo_report, tmp_path):
    table = write_runs(tmp_path)
    weights = ["-w", str(demo_report.weights), "-o", str(tmp_path / "run"), "--device", "cpu"]
    return ["finetune", str(table), "--targets", *weights]


def test_the_held_out_run_is_printed_before_and_after(arguments, tmp_path, capsys):
    command = [*arguments, "--tr", "2", "--test", "3", "--epochs", "2", "--hrf", "glover", "-l", "conv4"]
    assert main([*command, "--seconds", "20", "--frozen", "conv3", "--seed", "1"]) == 0
    printed, reported = capsys.readouterr()
    rows = printed.splitlines()
    names = [row[: len("test run 3")].strip() for row in rows[:3]]
    assert names[:2] == ["test run 3", "ridge"]
    assert names[2].startswith("epoch ")
    assert len({len(row) for row in rows[:3]}) == 1
    assert rows[3:] == [str(tmp_path / "run" / "weights.safetensors")]
    lines = [line.removeprefix("soundnet-port: ") for line in reported.splitlines()]
    assert lines[0] == "all 60 volumes are used"  # once
    assert lines[1].startswith("conv4, ")
    assert lines[1].endswith(
        "5 outputs; runs: training 1 (20 volumes), validation 2 (20 volumes), test 3 (20 volumes)"
    )
    assert lines[2].startswith("0 of 2 epochs, ridge solution: loss ")
    assert lines[3].startswith("1 of 2 epochs, loss ")
    assert lines[3].endswith(" left")
    assert len(lines) == 5
    about = json.loads((tmp_path / "run" / "result.json").read_text())["settings"]
    assert (about["hrf"], about["frozen"], about["tuning"]["seconds"]) == ("glover", "conv3", 20)
    assert sp.load_pretrained(tmp_path / "run" / "weights.safetensors").architecture.heads == ()


def test_json_holds_the_summary_and_zero_epochs_are_ridge_alone(arguments, capsys):
    assert main([*arguments, "--tr", "2", "--epochs", "0", "--json", "--delays", "1,2"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["ridge"] == printed["finetuned"]
    assert (printed["held_out"], printed["layer"], printed["epoch"]) == ("3", "pool5", 0)
    assert printed["part"] == "validation"
    assert main([*arguments, "--tr", "2", "--epochs", "0", "--delays", "1,2"]) == 0  # only read
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].startswith("validation run 3 (chose the epoch)  median r")
    assert len({len(row) for row in rows[:3]}) == 1


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ([], "--targets: needs --tr"),
        (["--tr", "2", "--scratch", "soundnet8"], "--scratch: is for classes"),
        (["--tr", "2", "--test", "all"], "--test all: is for classes; with --targets name a run"),
        (["--tr", "2", "--hrf", "spm", "--delays", "1"], "--hrf and --delays exclude each other"),
        (["--tr", "2", "--test", "4"], "test: no run '4'; choose from 1, 2, 3"),
        (["--tr", "2", "--epochs", "-1"], "epochs must be from 0"),
    ],
)
def test_misuse_is_one_line(arguments, options, error, capsys):
    assert main([*arguments, *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert error in err


def test_options_of_the_other_kind_of_training_are_noted(arguments, tmp_path, capsys):
    assert main([*arguments, "--tr", "2", "--epochs", "0", "--mix", "0.1", "--kernel", "2"]) == 0
    reported = capsys.readouterr().err
    assert "--mix has no effect with --targets" in reported
    assert "--kernel has no effect with --targets" in reported
    (tmp_path / "classes").mkdir()
    classes = ["finetune", str(tmp_path / "classes"), "-w", "demo", "-o", str(tmp_path / "other")]
    assert main([*classes, "--tr", "2"]) == 2
    assert "--tr has no effect without --targets" in capsys.readouterr().err
