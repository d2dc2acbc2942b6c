"""Misuse: one line on stderr that says what to do, and exit code 2; interruptions, and exit code 130."""

import pytest
from support.networks import DEMO

from soundnet_port.cli.main import main


@pytest.fixture
def fail(capsys):
    """A function that runs a command line, asserts misuse, and returns the line on stderr."""

    def run(command):
        try:
            code = main([str(word) for word in command] if isinstance(command, list) else command.split())
        except SystemExit as error:  # argparse
            code = error.code
        out, err = capsys.readouterr()
        assert (code, out, err.count("\n")) == (2, "", 1)
        return err[:-1]

    return run


@pytest.mark.parametrize(
    ("program", "arguments", "error"),
    [
        ("soundnet-port", "predit x.wav", "unknown command 'predit'; did you mean 'predict'?"),
        ("soundnet-port", "nonsense", "unknown command 'nonsense'; see 'soundnet-port --help'"),
        ("soundnet-port", "", "the following arguments are required: COMMAND; see 'soundnet-port --help'"),
        ("soundnet-port", "--versoin", "unknown option '--versoin'; did you mean '--version'?"),
        ("soundnet-port predict", "--topp 3", "unknown option '--topp'; did you mean '--top'?"),
        ("soundnet-port predict", "x --wieghts=y", "unknown option '--wieghts'; did you mean '--weights'?"),
        ("soundnet-port info", "--quux", "unknown option '--quux'; see 'soundnet-port info --help'"),
        ("soundnet-port convert", "--jsn", "unknown option '--jsn'; did you mean '--json'?"),
        ("soundnet-port extract", "x --format jsn", "unknown value of --format 'jsn'; did you mean 'json'?"),
        (
            "soundnet-port evaluate",
            "x --pool sum",
            "unknown value of --pool 'sum'; choose from mean, max, mean+std, mean+max+std",
        ),
        ("soundnet-port info", "x y", "unexpected argument 'y'; see 'soundnet-port info --help'"),
        (
            "soundnet-port info",
            "",
            "the following arguments are required: FILE; see 'soundnet-port info --help'",
        ),
        (
            "soundnet-port units",
            "-n many",
            "argument -n/--top: invalid int value: 'many'; see 'soundnet-port units --help'",
        ),
    ],
)
def test_errors_in_arguments_are_one_line_with_the_nearest_choice(program, arguments, error, fail):
    assert fail(f"{program} {arguments}".removeprefix("soundnet-port")) == f"{program}: {error}"


def test_unambiguous_abbreviations_of_options_work(sound, demo_report, capsys):
    assert main(["predict", str(sound), "--weigh", str(demo_report.weights), "--js"]) == 0
    assert capsys.readouterr().out.startswith("{")


def test_predict_refuses_what_cannot_work(fail, sound, demo_report):
    assert "soundnet-port fetch" in fail(["predict", sound])
    assert "soundnet-port convert" in fail(["predict", sound, "-w", DEMO])
    command = ["predict", sound, "-w", demo_report.weights]
    assert fail([*command, "-n", 0]) == "soundnet-port: --top must be at least 1, not 0"
    for device, reason in (
        ("moon", "choose from cpu, cuda"),
        ("meta", "choose from cpu, cuda"),
        ("cuda:99", "cuda devices; choose another"),
        ("mps:1", "mps devices; choose another"),
    ):
        error = fail([*command, "--device", device])
        assert error.startswith(f"soundnet-port: --device {device}: ")
        assert reason in error


def test_extract_refuses_what_needs_files(fail, sound):
    for option in ("--pool mean", "--tr 2", "-l pool5 -l conv7", "-l pool5,conv7", "--workers 2"):
        assert "are for files; name one with -o" in fail(f"extract {sound} {option}")
    assert "--backend ray writes files" in fail(f"extract {sound} --backend ray")
    assert "--format npz writes files" in fail(f"extract {sound} --format npz")
    assert "--align needs --tr" in fail(f"extract {sound} -o x.npz --align end")
    assert "--tr is not for --backend ray" in fail(f"extract {sound} -o x --backend ray --tr 2")


def test_options_without_effect_are_noted(sound, demo_report, tmp_path, capsys):
    command = ["extract", str(sound), "-w", str(demo_report.weights), "-l", "conv7", "--edge-frames"]
    note = "soundnet-port: --edge-frames has no effect without --pool or --tr\n"
    assert main(command) == 0
    assert capsys.readouterr().err == note
    command += ["-o", str(tmp_path / "x.npz"), "--workers", "1"]
    assert main(command) == 0
    assert capsys.readouterr().err.startswith(note)
    assert main([*command, "--pool", "mean", "--force"]) == 0
    assert "no effect" not in capsys.readouterr().err


# ---- interruptions


def test_an_interrupted_command_ends_with_one_line(sound, demo_report, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("soundnet_port.inference.activations.compute_activations", interrupt)
    monkeypatch.setattr("soundnet_port.corpus.run.extract_corpus", interrupt)
    command = ["extract", str(sound), "-w", str(demo_report.weights)]
    assert main(command) == 130
    assert capsys.readouterr().err == "soundnet-port: interrupted\n"
    assert main([*command, "-o", "x.npz"]) == 130
    assert capsys.readouterr().err == "soundnet-port: interrupted; the same command goes on from here\n"
