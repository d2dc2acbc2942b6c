"""Where predict's results go: files per sound in a folder, one file, or standard output; and its progress."""

import csv
import errno
import io
import json
import os
import shutil
import sys

import pytest

from soundnet_port.cli import results
from soundnet_port.cli.main import main
from soundnet_port.cli.sounds import mirror_sounds, process_sounds


@pytest.fixture
def predict(demo_report, tmp_path, monkeypatch, capsys):
    """A function that runs predict in the folder of the test, and returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = main(["predict", "-w", str(demo_report.weights), *map(str, arguments)])
        return (code, *capsys.readouterr())

    return run


@pytest.fixture
def recordings(tmp_path, sound):
    """A folder with two sounds of the same stem, and another of the same name in a subfolder."""
    folder = tmp_path / "recordings"
    (folder / "monday").mkdir(parents=True)
    for name in ("dog.wav", "dog.mp3", "monday/dog.wav"):  # decoders go by the content
        shutil.copy(sound, folder / name)
    return folder


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("file_format", "suffix"),
    [
        ("text", ".txt"),
        ("json", ".json"),
        ("csv", ".csv"),
        ("srt", ".srt"),
        ("vtt", ".vtt"),
        ("audacity", ".labels.txt"),
        ("raven", ".selections.txt"),
    ],
)
def test_a_folder_gets_for_each_sound_what_is_printed_for_it(
    predict, recordings, tmp_path, file_format, suffix
):
    code, out, err = predict("recordings", "-o", "out", "--format", file_format)
    assert (code, out, err) == (0, "", "soundnet-port: out: 3 files written\n")
    names = [f"{name}{suffix}" for name in ("dog.mp3", "dog.wav", "monday/dog.wav")]
    assert files(tmp_path / "out") == names
    for name in names:
        sound = f"recordings/{name.removesuffix(suffix)}"
        printed = predict(sound, "--format", file_format)[1]
        assert (tmp_path / "out" / name).read_text() == printed
        assert printed.count("\n") > 0


def test_torch7s_files_go_to_a_folder_too(predict, recordings, tmp_path):
    h5py = pytest.importorskip("h5py", reason="needs the extra [hdf5]")
    call = ["recordings/dog.wav", "--format", "torch7", "-o", "out"]
    assert predict(*call) == (0, "", "soundnet-port: out: 1 file written\n")
    (path,) = (tmp_path / "out").iterdir()
    assert path.name == "dog.wav.soundnet_categories.h5"
    with h5py.File(path) as file:
        assert set(file) == {"object", "scene"}
    assert "1 of 1 already there" in predict(*call)[2]
    assert predict(*call[:3])[:2] == (0, "recordings/dog.wav.soundnet_categories.h5\n")
    assert "already exists; use --force" in predict(*call[:3])[2]


def test_a_folder_is_resumed(predict, recordings, tmp_path):
    call = ["recordings", "-o", "out", "--format", "srt"]
    (recordings / "bad.wav").write_text("no sound")
    code, _, err = predict(*call)
    assert code == 1
    assert err.splitlines()[1:] == ["soundnet-port: out: 3 files written"]
    assert "bad.wav: cannot be decoded" in err
    (tmp_path / "out" / "dog.wav.srt").write_text("mine")
    (tmp_path / "out" / "dog.mp3.srt").unlink()
    (recordings / "bad.wav").unlink()
    assert predict(*call)[2] == (
        "soundnet-port: out: 1 file written, 2 of 3 already there (--force replaces them)\n"
    )
    assert (tmp_path / "out" / "dog.wav.srt").read_text() == "mine"
    assert predict(*call)[2] == "soundnet-port: out: 3 of 3 already there (--force replaces them)\n"
    assert predict(*call, "--force")[2] == "soundnet-port: out: 3 files written\n"
    assert (tmp_path / "out" / "dog.wav.srt").read_text() != "mine"


def test_what_was_found_is_not_computed_again(predict, recordings, monkeypatch):
    call = ["recordings", "-o", "out", "--format", "raven"]
    assert predict(*call)[0] == 0

    def fail(*_, **__):
        raise AssertionError("computed")

    monkeypatch.setattr("soundnet_port.cli.predict._predict_sound", fail)
    assert predict(*call)[0] == 0


def test_a_sound_that_is_named_twice_has_one_file(predict, recordings):
    call = ["recordings/dog.wav", "recordings/../recordings/dog.wav", "recordings/dog.wav", "-o", "out"]
    assert predict(*call)[2] == "soundnet-port: out: 1 file written\n"


def test_an_interrupted_folder_can_be_resumed_but_a_single_file_begins_anew(
    predict, recordings, monkeypatch, tmp_path
):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("soundnet_port.cli.predict._predict_sound", interrupt)
    folder, table = predict("recordings", "-o", "out"), predict("recordings", "-o", "out.csv")
    assert folder == (130, "", "soundnet-port: interrupted; the same command goes on from here\n")
    assert table == (130, "", "soundnet-port: interrupted\n")
    assert files(tmp_path) == [
        "recordings/dog.mp3",
        "recordings/dog.wav",
        "recordings/monday/dog.wav",
        "sound.wav",
    ]


def test_pictures_and_labels_are_completed_one_without_the_other(predict, recordings, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra [plot]")
    call = ["recordings/dog.wav", "--format", "vtt", "-o", "out", "--plot", "pictures"]
    assert predict(*call)[0] == 0
    label, picture = tmp_path / "out" / "dog.wav.vtt", tmp_path / "pictures" / "dog.wav.png"
    times = label.stat().st_mtime_ns, picture.stat().st_mtime_ns
    label.unlink()
    assert "1 file written" in predict(*call)[2]
    picture.unlink()
    assert "1 of 1 already there" in predict(*call)[2]
    assert label.stat().st_mtime_ns > times[0]
    assert picture.stat().st_mtime_ns > times[1]


def test_a_name_that_gets_too_long_costs_that_sound_alone(predict, recordings):
    shutil.copy(recordings / "dog.wav", recordings / f"{'x' * 250}.wav")
    code, _, err = predict("recordings", "-o", "out", "--format", "raven")
    assert code == 1
    assert "x.wav.selections.txt: cannot be written (File name too long)\n" in err
    assert "out: 3 files written" in err


def test_a_full_disk_ends_the_command(predict, recordings, monkeypatch):
    def fail(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(results, "_open", fail)
    code, _, err = predict("recordings", "-o", "out")
    assert (code, err) == (2, "soundnet-port: out/dog.mp3.txt: No space left on device\n")


# ---- one file


def test_a_file_gets_what_is_printed_and_its_suffix_names_the_format(predict, recordings, tmp_path):
    for name, file_format in (("all.csv", "csv"), ("all.jsonl", "json"), ("all.TXT", "text")):
        assert predict("recordings", "-o", name) == (0, "", "")
        assert (tmp_path / name).read_text() == predict("recordings", "--format", file_format)[1]
    assert predict("recordings/dog.wav", "-o", "dog.srt") == (0, "", "")
    assert (tmp_path / "dog.srt").read_text() == predict("recordings/dog.wav", "--format", "srt")[1]
    code, _, err = predict("recordings/dog.wav", "-o", "dog.srt")
    assert (code, err) == (2, "soundnet-port: dog.srt: already exists; use --force to replace it\n")
    assert predict("recordings/dog.wav", "-o", "dog.srt", "-f")[0] == 0


def test_a_file_appears_only_if_a_sound_could_be_read(predict, recordings, tmp_path):
    (tmp_path / "bad.wav").write_text("no sound")
    assert predict("bad.wav", "-o", "x.srt")[0] == 1
    assert not (tmp_path / "x.srt").exists()
    assert predict("bad.wav", "recordings/dog.wav", "-o", "x.csv")[0] == 1
    rows = list(csv.DictReader((tmp_path / "x.csv").read_text().splitlines()))
    assert [row["file"] for row in rows] == ["recordings/dog.wav"] * 10


def test_a_wide_table_has_a_row_per_clip(predict, recordings, tmp_path):
    code, out, _ = predict("recordings", "--format", "wide-csv")
    assert code == 0
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["file"] for row in rows] == [
        f"recordings/{name}" for name in ("dog.mp3", "dog.wav", "monday/dog.wav")
    ]
    probabilities = {name: float(value) for name, value in rows[0].items() if ":" in name}
    assert len(probabilities) == 16  # 10 objects and 6 scenes
    assert sum(probabilities.values()) == pytest.approx(2, abs=1e-4)  # of 16 values to six digits
    for category in json.loads(predict("recordings/dog.wav", "--json")[1])["objects"]:
        value = probabilities[f"object:{category['original']}"]
        assert value == pytest.approx(category["probability"], rel=1e-5)
    assert predict("recordings", "--format", "wide-csv", "-o", "clips.csv")[0] == 0
    assert (tmp_path / "clips.csv").read_text() == out


# ---- options


def test_a_threshold_applies_to_every_format(predict, sound):
    def probabilities(*arguments):
        out = predict(sound, "-n", 9, *arguments)[1]
        return {float(row["probability"]) for row in csv.DictReader(io.StringIO(out))}

    everything = probabilities("--csv", "-t")
    limit = sorted(everything)[len(everything) // 2]
    kept = probabilities("--csv", "-t", "--threshold", limit)
    assert kept == {value for value in everything if value >= limit}
    assert 0 < len(kept) < len(everything)
    assert predict(sound, "--format", "audacity", "--threshold", 1)[:2] == (0, "")
    assert predict(sound, "--format", "vtt", "--threshold", 1)[:2] == (0, "WEBVTT\n")
    assert json.loads(predict(sound, "--json", "--threshold", 1)[1])["scenes"] == []


def test_labels_over_time_have_one_category_of_each_head_by_default(predict, sound):
    one, three = (
        [
            line
            for line in predict(sound, "--format", "raven", *more)[1].splitlines()[1:]
            if "\tscene\t" in line
        ]
        for more in ([], ["-n", 3])
    )
    assert len(three) > len(one) >= 1
    starts = [float(line.split("\t")[3]) for line in one]
    assert len(starts) == len(set(starts))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("recordings --format srt", "--format srt: each of the 3 sounds gets a file; name a folder with -o"),
        ("recordings -o all.vtt", "--format vtt: each of the 3 sounds gets a file; name a folder with -o"),
        ("recordings --threshold 1.5", "--threshold must be a probability from 0 to 1, not 1.5"),
        ("recordings --threshold nan", "--threshold must be a probability from 0 to 1, not nan"),
        (
            "recordings --format wide-csv -o out",
            "--format wide-csv is one table for all sounds; name a file such as clips.csv",
        ),
        (
            "recordings --format torch7 -o x.txt",
            "--format torch7: a file per sound; name a folder, or leave out -o",
        ),
        (
            "recordings -o recordings/dog.wav",
            "recordings/dog.wav: not a folder; files end in .txt, .json, .jsonl, .csv, .srt, .vtt",
        ),
        ("recordings -o -", "-o -: leave out -o to print"),
        (
            "recordings --format srt -o all.csv",
            "all.csv: another suffix than that of --format srt; rename it",
        ),
        (
            "recordings -o out.tsv",
            "out.tsv: neither a folder nor a file in .txt, .json, .jsonl, .csv, .srt, .vtt",
        ),
        ("recordings -o s3://bucket/x", "s3://bucket/x: an address; name a folder or file on this machine"),
    ],
)
def test_what_cannot_work_is_refused(predict, recordings, arguments, reason):
    assert predict(*arguments.split()) == (2, "", f"soundnet-port: {reason}\n")


def test_options_without_effect_are_noted(predict, sound):
    err = predict(sound, "--format", "srt", "-t", "-f")[2]
    assert err.splitlines() == [
        "soundnet-port: --over-time has no effect with --format srt",
        "soundnet-port: --force has no effect without -o, --plot or --format torch7",
    ]
    err = predict(sound, "--format", "wide-csv", "--threshold", 0.5)[2]
    assert err == "soundnet-port: --threshold has no effect with --format wide-csv\n"


def test_folders_are_mirrored_below_the_one_that_holds_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)

    def names(arguments, *sounds):
        mirrored = mirror_sounds([tmp_path.__class__(sound) for sound in sounds], arguments, "out")
        return [path.as_posix() for path in mirrored.values()]

    # the folder that is searched, though all of its sounds may lie deeper
    assert names(["a"], "a/b/x.wav") == ["out/b/x.wav"]
    assert names(["a/b/x.wav"], "a/b/x.wav") == ["out/x.wav"]
    assert names(["a/b/x.wav", "a/x.wav"], "a/b/x.wav", "a/x.wav") == ["out/b/x.wav", "out/x.wav"]
    assert names(["-"], "-") == ["out/stdin"]
    # no result leaves the folder
    assert names(["a/../x.wav", "a/y.wav"], "a/../x.wav", "a/y.wav") == ["out/x.wav", "out/a/y.wav"]
    assert names([]) == []


# ---- progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def process_slowly(clock, count, **settings):
    def process(path):
        clock.now += 20
        return "b.wav: quiet" if path == "b.wav" else None

    return process_sounds([*"a", "b.wav", *"c" * (count - 2)], process, **settings)


def test_a_log_gets_lines_now_and_then(clock, capsys):
    assert process_slowly(clock, 5) == 0
    assert capsys.readouterr().err.splitlines() == [
        "soundnet-port: b.wav: quiet",
        "soundnet-port: 2 of 5 files, about 60 s left",
        "soundnet-port: 4 of 5 files, about 20 s left",
    ]


def test_quick_sounds_leave_no_line_in_a_log(predict, recordings):
    assert predict("recordings")[2] == ""


def test_a_bar_on_a_terminal_keeps_away_from_results_and_notes(clock, monkeypatch):
    """There is none where the results are shown; notes have lines of their own."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    process_slowly(clock, 12, prints=True)
    bar = sys.stderr.getvalue()
    assert "12/12" in bar
    assert "\rsoundnet-port: b.wav: quiet\n" in bar
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(sys, "stdout", Terminal())
    process_slowly(clock, 12, prints=True)
    assert sys.stderr.getvalue() == "soundnet-port: b.wav: quiet\n"
    process_slowly(clock, 3, prints=False)  # results go to files
    assert "3/3" in sys.stderr.getvalue()
