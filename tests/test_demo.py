"""The demonstration network, and the command that shows it."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED

import soundnet_port as sp
from soundnet_port import cli, demo

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
ESC10 = SHARED.parent / "esc10"


@pytest.fixture(scope="module")
def network():
    return sp.load_pretrained("demo")


def test_it_names_sounds_that_are_made_here(network):
    made = sp.SAMPLE_RATE * 12
    wave = np.asarray(demo.crowing_and_waves() * 256)
    assert np.abs(wave).max() <= 256
    crowing, waves = (
        sp.predict(network, torch.from_numpy(part), top=2) for part in (wave[:made], wave[made:])
    )
    assert crowing.objects[0].label == "cock"
    assert crowing.scenes[0].label == "/f/farm"
    assert waves.objects[0].label.startswith("seashore")
    assert waves.scenes[0].label == "/o/ocean"


def test_the_demo_says_what_it_hears(capsys, network):
    assert cli.main(["demo"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "proven: worst" in out
    assert "parameters are made up" in out
    assert "cock" in out
    assert "seashore" in out


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
            some = [float(row["probability"]) for row in rows if (row["head"], row["class"]) == (head, label)]
            assert 1 <= len(some) <= 15
            assert sum(some) == pytest.approx(1)


@pytest.mark.skipif(not ESC10.exists(), reason="ESC-10 is not here")
def test_it_names_clips_that_it_has_never_heard(network, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import make_demo

    held_out = [each for each in sp.read_labelled(ESC10).sounds if each.fold == make_demo.HELD_OUT]
    figures = make_demo.hits(network, held_out, make_demo.distributions())
    sys.modules.pop("make_demo")
    # the model card's figures, less two clips that another machine's rounding may turn
    assert figures["objects in the top 5"] >= 0.925
    assert figures["scenes in the top 5"] >= 0.95
