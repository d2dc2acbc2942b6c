"""Commands as users run them: output, one-line errors, exit codes."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import soundfile
import torch
from support import reference_weights
from support.cli_processes import run_at_once
from support.networks import DEMO, file
from support.t7_writer import load_mutable, modules_of, serialize

from soundnet_port import SOUNDNET8, __version__
from soundnet_port.cli.main import main
from soundnet_port.network.weights import write_weights


@pytest.fixture
def run(capsys):
    """A function that runs a command line and returns (exit code, stdout, stderr)."""

    def command(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as error:  # argparse
            code = error.code
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return command


def test_help(run):
    out = run("--help")[1]
    assert "soundnet-port demo" in out
    names = """convert verify info fetch predict extract demo units filters evaluate finetune train
    label-videos label-sounds serve export""".split()
    for name in names:
        assert re.search(rf"\n    {name}\s", out)
        code, help_text, _ = run(name, "--help")
        assert code == 0
        assert help_text.startswith(f"usage: soundnet-port {name} ")
    assert "soundnet-port convert soundnet_models_public.zip" in run("convert", "--help")[1]
    assert run("--version")[1] == f"soundnet-port {__version__}\n"


def test_convert_shows_the_parity_check_and_where_the_weights_are(run, tmp_path):
    code, out, err = run("convert", DEMO, "-o", tmp_path / "w.safetensors")
    assert (code, err) == (0, "")
    assert "25.2  scenes" in out
    assert "parity check passed: worst" in out
    assert f"wrote {tmp_path / 'w.safetensors'}" in out
    code, out, _ = run("convert", DEMO, "-o", tmp_path / "w.safetensors")
    assert code == 0
    assert "unchanged" in out
    code, _, err = run("convert", file("n5_d8_cudnnA.t7"), "-o", tmp_path / "w.safetensors")
    assert code == 2
    assert "--force" in err


def test_convert_prints_json(run, tmp_path):
    code, out, _ = run("convert", DEMO, "-o", tmp_path, "--json")
    (line,) = out.splitlines()
    report = json.loads(line)
    assert code == 0
    assert report["result"] == "wrote"
    assert len(report["parity"]) == 26
    assert Path(report["weights"]).name == "soundnet8.safetensors"
    assert report["metadata"]["released"] is None
    assert report["metadata"]["recognition"] == "not the released SoundNet-8: other widths"


def test_a_refused_file_is_one_line_and_exit_2(run, tmp_path):
    root = load_mutable(DEMO)
    modules_of(root)[5].fields["kH"] = 31
    bad = tmp_path / "bad.t7"
    bad.write_bytes(serialize(root))
    code, out, err = run("convert", bad, "-o", tmp_path / "out" / "w.safetensors")
    assert (code, out) == (2, "")
    assert err == (
        f"soundnet-port: {bad}: module 5 (cudnn.SpatialConvolution, conv2): kH is 31, expected 32\n"
    )
    assert list(tmp_path.iterdir()) == [bad]


def test_a_zip_with_a_refused_network_is_exit_1(run, tmp_path):
    path = tmp_path / "models.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("soundnet8_final.t7", DEMO.read_bytes()[:-1])
        archive.write(file("n5_d8_cudnnA.t7"), "soundnet5_final.t7")
    code, out, err = run("convert", path)
    assert code == 1
    assert "soundnet5_final.t7 (binary)" in out
    assert err.count("\n") == 1
    assert "models.zip/soundnet8_final.t7: byte" in err


def test_verify(run, tmp_path, demo_report):
    code, out, _ = run("verify", demo_report.weights, DEMO)
    assert code == 0
    assert "verified" in out
    code, out, err = run("verify", demo_report.weights, file("n5_d8_cudnnA.t7"))
    assert (code, out) == (1, "")
    assert "soundnet5" in err
    with zipfile.ZipFile(tmp_path / "models.zip", "w") as archive:
        archive.writestr("soundnet5_final.t7", b"junk")
        archive.write(DEMO, "soundnet8_final.t7")
    assert run("verify", demo_report.weights, tmp_path / "models.zip")[0] == 0
    assert run("verify", "nowhere", DEMO)[0] == 2
    assert run("verify", demo_report.weights, tmp_path / "no.t7")[0] == 2


def test_info(run, tmp_path, demo_report):
    code, out, _ = run("info", DEMO)
    assert code == 0
    assert "5 cudnn.SpatialConvolution  nInputPlane=1 nOutputPlane=2 kW=1 kH=32 dW=1 dH=2" in out
    assert "soundnet8: widths 1 2 4 8 16 32 64; 10 objects, 6 scenes; 19,853 parameters" in out
    code, out, _ = run("info", demo_report.weights)
    assert code == 0
    assert "not the released SoundNet-8: other widths" in out
    assert "conv7" in out
    assert json.loads(run("info", demo_report.weights, "--json")[1])["architecture"] == "soundnet8"
    path = tmp_path / "models.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(DEMO, "a/soundnet8_final.t7")
        archive.write(file("n5_d8_cudnnA.t7"), "a/soundnet5_final.t7")
    code, out, _ = run("info", path)
    assert code == 0
    assert "soundnet5: widths 4 8 16 32" in out
    for content in (b"", b"text", DEMO.read_bytes()[:5_000]):
        bad = tmp_path / "bad.t7"
        bad.write_bytes(content)
        code, out, err = run("info", bad)
        assert (code, out) == (2, "")
        assert err.startswith(f"soundnet-port: {bad}: ")
    assert run("info", "nothing-there")[0] == 2
    assert "No such file" in run("info", "nothing-there.t7")[2]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("soundnet8_final.t7", b"junk")
        archive.write(file("n5_d8_cudnnA.t7"), "soundnet5_final.t7")
    code, out, err = run("info", path)
    assert code == 1
    assert "soundnet5: widths" in out
    assert "models.zip/soundnet8_final.t7: byte 0" in err


def test_info_lists_classes_and_reports_damaged_settings(run, tmp_path):
    architecture = SOUNDNET8.resized([2] * 7, {}).with_classes(25, "pool5")
    state = {name: torch.ones(shape) for name, shape in architecture.state_shapes().items()}
    names = [f"bird {number}" for number in range(25)]
    path = tmp_path / "birds.safetensors"
    write_weights(path, architecture, state, {"categories": {"classes": names}})
    code, out, _ = run("info", path)
    assert code == 0
    assert "  25 classes: bird 0, bird 1, " in out
    assert "bird 19, ... and 5 more\n  source: not recorded\n" in out
    write_weights(path, architecture, state, {"training": {"start": "random values", "tuning": 3}})
    assert run("info", path)[0] == 2
    assert "damaged metadata (training settings)" in run("info", path)[2]


def test_info_lists_any_torch7_file(run, tmp_path):
    from support.t7_writer import Table, module, serialize, tensor

    path = tmp_path / "any.t7"
    loop = module(
        "nn.Sequential", module("nn.Linear", weight=tensor(reference_weights.waveform(6).reshape(2, 3)))
    )
    loop.fields["modules"][2] = loop
    path.write_bytes(serialize(Table({"net": loop, "epoch": 3, "nothing": Table()})))
    code, out, _ = run("info", path)
    assert code == 0
    assert "1 nn.Linear  weight FloatTensor 2x3" in out
    assert "(itself)" in out
    assert "not convertible: module 1 is nn.Linear" in out


def test_predict_as_text(run, sound, demo_report):
    code, out, err = run("predict", sound, "-w", demo_report.weights, "--over-time", "-n", 2)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"{sound}  (20.00 s)"
    assert sum(line.startswith("  ") and " to " in line for line in lines) == 4  # head frames
    assert len(lines) == 1 + 1 + 2 + 1 + 4 + 1
    assert lines[-1].startswith("  middle frame: ")


def test_predict_as_json(run, sound, tmp_path, demo_report):
    short = tmp_path / "short.wav"
    soundfile.write(short, reference_weights.samples(50_000), 22_050)
    code, out, _ = run("predict", sound, short, "-w", demo_report.weights, "--json", "--over-time")
    long_, brief = map(json.loads, out.splitlines())
    assert code == 0
    assert long_["file"] == str(sound)
    assert len(long_["frames"]) == 4
    assert not long_["repeated"]
    assert brief["repeated"]
    assert (brief["repeats"], brief["edge_frames"]) == (5, False)
    assert long_["objects"][0].keys() == {"index", "label", "original", "probability"}
    assert sum(c["probability"] for c in brief["scenes"]) <= 1.000_001
    assert "frames" not in json.loads(run("predict", sound, "-w", demo_report.weights, "--json")[1])


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        (
            "https://example.org/a%20b.mp3?x=1&y",
            "an address, not a file; get it with curl -L -o 'a b.mp3' 'https://example.org/a%20b.mp3?x=1&y', "
            "then run this command on a b.mp3",
        ),
        (
            "https://example.org/play",
            "an address, not a file; get it with curl -L -o sound https://example.org/play, then run this "
            "command on sound (from a page with a player: yt-dlp -x https://example.org/play)",
        ),
        (
            "https://www.youtube.com/watch?v=x",
            "a page, not a file; get its sound with yt-dlp -x 'https://www.youtube.com/watch?v=x', then run "
            "this command on that",
        ),
        (
            "s3://bucket/c.wav",
            "an address, not a file; copy it with aws s3 cp s3://bucket/c.wav . "
            "(extract --backend ray reads such addresses)",
        ),
        ("file:///home/a%20b.wav", "an address; name the file by its path, /home/a b.wav"),
        ("http://[x", "an address, not a file (Invalid IPv6 URL)"),
    ],
)
def test_addresses_are_refused_with_the_commands_that_help(run, demo_report, tmp_path, url, reason):
    (tmp_path / "list.txt").write_text(f"{url}\n")
    for arguments in ([url], [f"@{tmp_path}/list.txt"]):
        code, out, err = run("predict", *arguments, "-w", demo_report.weights)
        assert (code, out, err) == (1, "", f"soundnet-port: {url}: {reason}\n")
    assert f"{url}: {reason}\n" in run("extract", url, "-w", demo_report.weights, "-o", tmp_path / "x")[2]


def test_predict_continues_after_bad_files(run, sound, tmp_path, demo_report):
    folder = tmp_path / "many" / "deep"
    folder.mkdir(parents=True)
    shutil.copy(sound, folder / "b.wav")
    (folder / "a.wav").write_text("text")
    (folder / "notes.txt").write_text("not audio, not looked at")
    (tmp_path / "empty").mkdir()
    listed = tmp_path / "list.txt"
    listed.write_text(f"{sound}\n\n{tmp_path / 'gone.wav'}\n")
    code, out, err = run(
        "predict",
        *(tmp_path / "many", f"@{listed}", tmp_path / "empty", "@nolist", sound),
        *("-w", demo_report.weights, "--json"),
    )
    assert code == 1
    files = [json.loads(line)["file"] for line in out.splitlines()]
    assert files == [str(folder / "b.wav"), str(sound), str(sound)]
    errors = err.splitlines()
    assert len(errors) == 4
    for error, part in zip(
        errors,
        ("a.wav: cannot be decoded", "gone.wav: No such file", "empty: no sound files", "nolist: No such"),
        strict=True,
    ):
        assert error.startswith("soundnet-port: ")
        assert part in error


def test_predict_reads_a_list_from_stdin(run, sound, demo_report, monkeypatch):
    import io

    listed = b"\xef\xbb\xbf" + os.fsencode(sound) + b"\r\n\n"  # as some editors save it
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(listed)))
    assert run("predict", "@-", "-w", demo_report.weights)[0] == 0


def test_predict_continues_after_unusable_arguments(run, sound, tmp_path, demo_report):
    raw = tmp_path / "a.raw"
    raw.write_bytes(sound.read_bytes())
    arguments = [raw, "x" * 300, tmp_path / "gone\nline.wav", "nul\0.wav", sound]
    code, out, err = run("predict", *arguments, "-w", demo_report.weights, "--json")
    assert code == 1
    assert [json.loads(line)["file"] for line in out.splitlines()] == [str(sound)]
    errors = err.splitlines()
    assert len(errors) == 4
    for error, part in zip(errors, ("raw file", "too long", "No such file", "null"), strict=True):
        assert part in error


def test_folders_that_cannot_be_searched_are_reported(run, sound, demo_report, monkeypatch):
    def walk(top, onerror):
        onerror(PermissionError(13, "Permission denied", f"{top}/no"))
        yield str(top), [], [sound.name]

    monkeypatch.setattr(os, "walk", walk)
    code, out, err = run("predict", sound.parent, "-w", demo_report.weights)
    assert code == 1
    assert "(20.00 s)" in out
    assert err == f"soundnet-port: {sound.parent}/no: Permission denied\n"


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_half_precision_changes_probabilities_slightly(run, sound, demo_report, name):
    """By about as much as measured for the full-width network (docs/engine.md)."""
    exact, half = (
        json.loads(run("predict", sound, "-w", demo_report.weights, "--json", *more)[1])
        for more in ([], ["--dtype", name])
    )
    for head in ("objects", "scenes"):
        full, reduced = (
            {category["index"]: category["probability"] for category in prediction[head]}
            for prediction in (exact, half)
        )
        differences = [abs(reduced[index] - full[index]) for index in full.keys() & reduced.keys()]
        assert 0 < max(differences) < 0.05
    code, out, _ = run("extract", sound, "-w", demo_report.weights, "-l", "conv7", "--csv", "--dtype", name)
    assert code == 0
    assert "nan" not in out


def test_the_installed_command_works_anywhere(tmp_path, demo_report, sound):
    """Outside the checkout, without a home, and with a file name that no encoding holds."""
    path = tmp_path / os.fsdecode(b"s\xf6und.wav")
    shutil.copy(sound, path)
    process = subprocess.run(
        [sys.executable, "-m", "soundnet_port", "predict", path, "-w", demo_report.weights],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
    )
    assert process.returncode == 0, process.stderr
    assert "und.wav  (20.00 s)" in process.stdout


def run_in_bash(command, folder):
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=folder)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_output_is_one_line(tmp_path, demo_report):
    command = f'"{sys.executable}" -m soundnet_port info "{demo_report.weights}" > /dev/full'
    process = run_in_bash(command, tmp_path)
    assert process.returncode == 2
    assert process.stderr == "soundnet-port: standard output: No space left on device\n"


@pytest.mark.parametrize("name", ["stdin", "stdout", "stderr"])
def test_a_closed_stream_is_no_error(name, demo_report, monkeypatch, capsys):
    monkeypatch.setattr(sys, name, None)  # as Python does at startup
    code = main(["info", str(demo_report.weights)])
    getattr(sys, name).close()
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert bool(out) == (name != "stdout")


@pytest.mark.skipif(os.name == "nt", reason="needs file size limits")
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "disk").mkdir()
    command = ["convert", str(DEMO), "-o", f"{tmp_path}/disk/x/"]
    assert run_at_once([command], [tmp_path / "output"], limit=40 << 10) == [2]
    output = (tmp_path / "output").read_text()
    assert len(output.splitlines()) == 1, output
    assert "cannot be written there" in output
    assert list((tmp_path / "disk").iterdir()) == []


def test_a_closed_pipe_is_no_error(tmp_path):
    process = run_in_bash(
        f'"{sys.executable}" -m soundnet_port info "{DEMO}" | head -1; exit ${{PIPESTATUS[0]}}', tmp_path
    )
    assert process.returncode == 0
    assert process.stderr == ""
