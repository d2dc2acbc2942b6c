"""Results name the kernels that computed them, and runs never mix those of several kinds."""

import json

import numpy as np
import pytest
import soundfile
from support.networks import NETS, model_of

from soundnet_port import extract_corpus
from soundnet_port.corpus.errors import CorpusError
from soundnet_port.network.kernels.library import VARIABLE, load_library

pytestmark = pytest.mark.skipif(load_library() is None, reason="the kernels are not compiled here")
RATE = 22_050


@pytest.fixture
def sounds(tmp_path):
    folder = tmp_path / "sounds"
    folder.mkdir()
    for name in "abc":
        soundfile.write(
            folder / f"{name}.wav", np.random.default_rng(ord(name)).uniform(-1, 1, 2 * RATE), RATE
        )
    return folder


def test_a_run_is_resumed_by_the_same_kernels_only(sounds, tmp_path, monkeypatch):
    model, out = model_of(NETS["n8_d16"]), tmp_path / "out"
    monkeypatch.setenv(VARIABLE, "engine")
    extract_corpus(model, [sounds], out, workers=1)
    assert json.loads((out / "extract.json").read_text())["kernel"] == "engine"
    expected = (out / "a.wav.npz").read_bytes()
    (out / "a.wav.npz").unlink()
    monkeypatch.delenv(VARIABLE)
    message = rf"kernel: engine before, \w+ now\); .*, or set {VARIABLE}=engine to continue$"
    with pytest.raises(CorpusError, match=message):
        extract_corpus(model, [sounds], out, workers=1)
    monkeypatch.setenv(VARIABLE, "engine")
    extract_corpus(model, [sounds], out, workers=1)
    assert (out / "a.wav.npz").read_bytes() == expected


def test_records_of_versions_without_kernels_are_the_engines(sounds, tmp_path, monkeypatch):
    model, out = model_of(NETS["n8_d16"]), tmp_path / "out"
    monkeypatch.setenv(VARIABLE, "engine")
    extract_corpus(model, [sounds], out, workers=1)
    record = json.loads((out / "extract.json").read_text())
    del record["kernel"]
    (out / "extract.json").write_text(json.dumps(record))
    (out / "b.wav.npz").unlink()
    assert extract_corpus(model, [sounds], out, workers=1).extracted == 1


def test_workers_use_the_kernels_of_the_run(sounds, tmp_path, monkeypatch):
    from soundnet_port.corpus.workers import serialize_model

    model = model_of(NETS["n8_d16"])
    monkeypatch.setenv(VARIABLE, "engine")
    assert serialize_model(model).kernel == "engine"
    monkeypatch.delenv(VARIABLE)
    assert serialize_model(model).kernel == extract_and_read(model, sounds, tmp_path / "out")


def extract_and_read(model, sounds, out):
    extract_corpus(model, [sounds], out, workers=2)
    return json.loads((out / "extract.json").read_text())["kernel"]
