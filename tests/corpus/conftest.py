"""Sounds, and results of uninterrupted runs."""

import pytest
import soundfile
from support import reference_weights
from support.corpus_files import NAMES, POOLED_LAYERS

from soundnet_port.cli.main import main
from soundnet_port.corpus.run import extract_corpus


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """A folder with sounds of several kinds and lengths, and a file that is not a sound."""
    folder = tmp_path_factory.mktemp("corpus") / "sounds"
    for number, name in enumerate(NAMES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, reference_weights.samples(30_000 + 20_000 * number), 22_050)
    (folder / "notes.txt").write_text("not a sound")
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Three groups of short clips, two of them unusable."""
    folder = tmp_path_factory.mktemp("corpus") / "clips"
    folder.mkdir()
    sound = reference_weights.samples(40_000)
    for number in range(150):
        soundfile.write(folder / f"{number:03}.wav", sound[: 5_000 + 200 * number], 22_050)
    (folder / "070.wav").write_text("text")
    soundfile.write(folder / "140.wav", sound[:4_000], 22_050)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(clips, model, tmp_path_factory):
    """Features of the clips, as a folder and as a single file."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    for output in (folder / "out", folder / "out.h5"):
        result = extract_corpus(model, [clips], output, layers=POOLED_LAYERS, pool="mean+std", workers=1)
        assert (result.total, result.extracted, len(result.failures)) == (150, 148, 2)
    return folder


@pytest.fixture
def run(capsys, demo_report):
    """Run `soundnet-port extract`; returns the exit code and stderr."""

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
