"""Inputs: names of results, duplicates, unusable sounds."""

import os
import shutil

import numpy as np
import pytest
import soundfile
from support.corpus_files import NAMES, list_npz

from soundnet_port.corpus.errors import CorpusError
from soundnet_port.corpus.run import extract_corpus


def test_folders_are_mirrored(sounds, model, tmp_path, monkeypatch):
    extract_corpus(model, [sounds], tmp_path / "tree", workers=1)
    assert list_npz(tmp_path / "tree") == sorted(f"{name}.npz" for name in NAMES)
    # files outside of any folder have their names alone; a file inside of one is the same input
    (tmp_path / "list.txt").write_text(f"{sounds}/a.mp3\n{sounds}/ones/b.wav\n")
    inputs = [sounds / "ones", f"@{tmp_path}/list.txt", sounds / "deep" / "er" / "c.flac"]
    extract_corpus(model, inputs, tmp_path / "listed", workers=1)
    assert list_npz(tmp_path / "listed") == ["a.mp3.npz", "b.wav.npz", "c.flac.npz", "é.ogg.npz"]
    monkeypatch.chdir(sounds)
    extract_corpus(model, ["ones/../a.wav", "deep/er/c.flac"], tmp_path / "root", root="deep/..", workers=1)
    assert list_npz(tmp_path / "root") == ["a.wav.npz", "deep/er/c.flac.npz"]
    with pytest.raises(CorpusError, match="not inside"):
        extract_corpus(model, ["a.wav"], tmp_path / "no", root="deep")


def test_inputs_of_the_same_name_are_refused(sounds, model, tmp_path):
    (tmp_path / "other").mkdir()
    shutil.copy(sounds / "a.wav", tmp_path / "other" / "a.wav")
    for output in (tmp_path / "out", tmp_path / "out.npz"):
        with pytest.raises(CorpusError, match="would both become"):
            extract_corpus(model, [sounds / "a.wav", tmp_path / "other"], output)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_standard_input_is_a_new_sound_each_time(sounds, model, tmp_path, monkeypatch):
    louder = soundfile.read(sounds / "a.wav")[0] / 2
    soundfile.write(tmp_path / "b.wav", louder, 22_050)  # of the same size

    def extract(sound, output, **options):
        with open(sound) as stream:
            monkeypatch.setattr("sys.stdin", stream)
            return extract_corpus(model, ["-"], tmp_path / output, workers=1, **options)

    assert extract(sounds / "a.wav", "out").extracted == 1
    assert list_npz(tmp_path / "out") == ["stdin.npz"]
    with pytest.raises(CorpusError, match="perhaps of another sound"):
        extract(tmp_path / "b.wav", "out")
    assert extract(tmp_path / "b.wav", "out", force=True).extracted == 1
    assert extract(sounds / "a.wav", "out.npz").extracted == 1
    assert extract(sounds / "a.wav", "out.npz").already_done == 1
    with pytest.raises(CorpusError, match="inputs sha256"):
        extract(tmp_path / "b.wav", "out.npz")


def test_names_that_coincide_in_the_output_are_refused(sounds, model, tmp_path):
    for folder, name in (("a", "x_b.wav"), ("b", "_b.wav"), ("c", "X_B.wav")):
        (tmp_path / folder).mkdir()
        shutil.copy(sounds / "a.wav", tmp_path / folder / name)
    with pytest.raises(CorpusError, match=r"would both become x_b\.wav"):  # MATLAB's names
        extract_corpus(model, [tmp_path / "a", tmp_path / "b"], tmp_path / "out.mat", workers=1)
    (tmp_path / "out" / ".EXTRACT").mkdir(parents=True)  # as on a file system that ignores case
    with pytest.raises(CorpusError, match="would both become"):
        extract_corpus(model, [tmp_path / "a", tmp_path / "c"], tmp_path / "out", workers=1)


@pytest.mark.skipif(os.name == "nt", reason="needs odd names")
def test_odd_names_are_kept(run, sounds, tmp_path):
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
    assert list_npz(tmp_path / "in" / "out") == sorted(f"{name}.npz" for name in odd[:-1])
    report = (tmp_path / "in" / "out" / "errors.tsv").read_bytes().splitlines()
    assert len(report) == 2
    for format_name in ("npz", "h5", "csv", "mat", "parquet"):
        assert run(tmp_path / "in", "-o", tmp_path / f"out.{format_name}", "--workers", 1)[0] == 1
        assert len((tmp_path / f"out.{format_name}.errors.tsv").read_bytes().splitlines()) == 1


@pytest.mark.parametrize("bad", ["empty", "no samples", "one sample", "NaN", "shortest less one", "slow"])
def test_unusable_sounds_are_reported(run, tmp_path, bad):
    path = tmp_path / "x.wav"
    samples, reason, rate = {
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
    assert reason in err
    assert list_npz(tmp_path) == []
