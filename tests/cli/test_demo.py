"""The demonstration network, and the command demo."""

import csv
import shutil
import sys
from pathlib import Path

import pytest
from support.networks import SHARED

import soundnet_port as sp
from soundnet_port.audio.examples import EXAMPLES, medley
from soundnet_port.cli.main import main

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
ESC10 = SHARED.parent / "esc10"


@pytest.fixture(scope="module")
def network():
    return sp.load_pretrained("demo")


def test_it_names_the_example_sounds(network):
    for name, objects, scenes in (
        ("waves", "seashore", "ocean"),
        ("baby", "cradle", "nursery"),
        ("helicopter", "warplane", "heliport"),
    ):
        prediction = sp.predict(network, sp.example(name), top=2)
        assert prediction.objects[0].label.startswith(objects)
        assert prediction.scenes[0].label == scenes


def test_without_the_released_network_the_demo_shows_the_small_one(capsys, network):
    assert main(["demo"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("soundnet-port: no weights named 'soundnet8'")
    assert err.count("\n") == 1
    assert "a small network that comes with the package" in out
    for words in (
        "waves.flac  (5.00 s, too short: played 3 times)",
        "seashore",
        "nursery",
        "heliport",
        "--weights demo",
    ):
        assert words in out


def test_the_demo_mistakes_no_other_network_for_the_released_one(capsys, tmp_path, shipped_weights):
    (tmp_path / "soundnet-weights").mkdir()
    shutil.copy(shipped_weights / "demo.safetensors", tmp_path / "soundnet-weights" / "soundnet8.safetensors")
    assert main(["demo"]) == 0
    out, err = capsys.readouterr()
    assert "not the released SoundNet-8: other widths; replace it with soundnet-port fetch --force" in err
    assert "a small network that comes with the package" in out


@pytest.mark.released
def test_the_demo_shows_the_released_network(capsys, released_weights, monkeypatch):
    monkeypatch.setenv("SOUNDNET_WEIGHTS", str(released_weights.parent))
    assert main(["demo"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for words in (
        "all 46 tensors bit for bit",
        "recordings of real Torch7",
        "beach",
        "hospital room",
        "sky",
    ):
        assert words in out


def test_examples_have_names():
    for name in EXAMPLES:
        assert len(sp.load_audio(sp.example(name))) == 110_272
    with pytest.raises(ValueError, match="choose from waves, baby, helicopter"):
        sp.example("dog")
    assert len(medley()) == 3 * 3 * 110_272


def test_each_class_has_a_few_categories_of_its_own():
    rows = list(
        csv.DictReader((BENCHMARKS / "demo_table.tsv").read_text("utf-8").splitlines(), delimiter="\t")
    )
    names = sp.load_pretrained("demo").categories
    for head in ("objects", "scenes"):
        categories = [row["category"] for row in rows if row["head"] == head]
        assert len(categories) == len(set(categories))
        assert set(categories) <= set(names[head])
        for label in {row["class"] for row in rows}:
            probabilities = [
                float(row["probability"]) for row in rows if (row["head"], row["class"]) == (head, label)
            ]
            assert 1 <= len(probabilities) <= 15
            assert sum(probabilities) == pytest.approx(1)


@pytest.mark.skipif(not ESC10.exists(), reason="ESC-10 is not here")
def test_it_names_held_out_clips(network, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import make_demo

    held_out = [sound for sound in sp.read_labeled(ESC10).sounds if sound.fold == make_demo.HELD_OUT]
    figures = make_demo.measure_hits(network, held_out, make_demo.read_table())
    sys.modules.pop("make_demo")
    # the model card's figures, less two clips that other rounding may change
    assert figures["objects in the top 5"] >= 0.925
    assert figures["scenes in the top 5"] >= 0.95
