#!/usr/bin/env python3
"""Makes weights/demo.safetensors: a narrow 8-layer SoundNet, trained on ESC-10's folds 1 to 4.

Usage: make_demo.py ESC10 RUN_FOLDER

ESC10 is the folder of the data set. The teachers' distributions come from demo_table.tsv, which was
written by hand before any training: for each of the ten classes a few objects and scenes. RUN_FOLDER
gets the labels, the manifest, the run of `soundnet-port train`, and figures.json: how the network does
on fold 5, which it has never heard. Interrupted, the same command goes on.
"""

import csv
import json
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from soundnet_port.inference.prediction import predict
from soundnet_port.learning.common import Augmentation
from soundnet_port.learning.datasets import LabeledSounds, read_labeled
from soundnet_port.learning.training import TrainConfig, train
from soundnet_port.network.architecture import SOUNDNET8
from soundnet_port.network.categories import original_categories
from soundnet_port.network.model import SoundNet
from soundnet_port.pretrained import load_pretrained

HERE = Path(__file__).resolve().parent
HELD_OUT = "5"
WIDTHS = (8, 16, 32, 64, 128, 128, 64)
RECIPE = TrainConfig(
    iterations=1500,
    batch=16,
    lr=0.003,
    schedule="cosine",
    augmentation=Augmentation(gain=6, shift=5, stretch=1.12, flip=True, mix=0.5),
)
TOP = 5


def main(esc10: str, folder: str) -> None:
    """Trains, measures, and puts the weights into weights/."""
    sounds, run = read_labeled(esc10), Path(folder)
    table = distributions()
    trained = train(
        manifest(sounds, table, run / "data"),
        run / "run",
        recipe=RECIPE,
        architecture=SOUNDNET8.resized(WIDTHS, SOUNDNET8.head_sizes),
        progress=lambda progress: print(f"{progress.step:>6} {progress.loss}", file=sys.stderr),
    )
    if trained.interrupted:
        sys.exit("interrupted; the same command goes on")
    model = load_pretrained(trained.weights)
    torch.manual_seed(0)
    untrained = SoundNet(model.architecture, model.categories).eval()
    held_out = [sound for sound in sounds.sounds if sound.fold == HELD_OUT]
    figures = {
        "clips": len(held_out),
        "demo": hits(model, held_out, table),
        "untrained": hits(untrained, held_out, table),
        "chance": chance(table),
    }
    (run / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    shutil.copyfile(trained.weights, HERE.parent / "weights" / "demo.safetensors")
    print(json.dumps(figures, indent=2))


def distributions() -> dict[str, dict[str, dict[str, float]]]:
    """For each class and head the categories with their probabilities."""
    table: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    with open(HERE / "demo_table.tsv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            table[row["class"]][row["head"]][row["category"]] = float(row["probability"])
    return table


def manifest(sounds: LabeledSounds, table: dict[str, dict[str, dict[str, float]]], folder: Path) -> Path:
    """Writes what `train` reads: the sounds of all folds but one, each with its class's distributions."""
    names = original_categories(SOUNDNET8.head_sizes)
    folder.mkdir(parents=True, exist_ok=True)
    for head in names:
        (folder / f"{head}.categories.txt").write_text("\n".join(names[head]) + "\n", "utf-8")
        for label in sounds.classes:
            row = np.zeros((1, len(names[head])), np.float32)
            for category, probability in table[label][head].items():
                row[0, names[head].index(category)] = probability
            np.save(folder / f"{label}.{head}.npy", row)
    lines = ["sound\tobjects\tscenes"]
    for sound in sounds.sounds:
        if sound.fold != HELD_OUT:
            place = sound.path.resolve()
            lines.append(f"{place}\t{sound.label}.objects.npy\t{sound.label}.scenes.npy")
    path = folder / "manifest.tsv"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def hits(model: SoundNet, sounds: list, table: dict[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    """Share of the clips with a category of their class among the top 5, and at the top."""
    found: dict[str, list[bool]] = defaultdict(list)
    for sound in sounds:
        prediction = predict(model, sound.path, top=TOP)
        for head in ("objects", "scenes"):
            fitting = [each.original in table[sound.label][head] for each in getattr(prediction, head)]
            found[f"{head} in the top {TOP}"].append(any(fitting))
            found[f"{head} at the top"].append(fitting[0])
    return {name: round(float(np.mean(each)), 3) for name, each in found.items()}


def chance(table: dict[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    """The same of five categories drawn at random."""
    figures = {}
    for head, size in SOUNDNET8.head_sizes.items():
        missed = []
        for label in table:
            few = len(table[label][head])
            missed.append(np.prod([(size - few - i) / (size - i) for i in range(TOP)]))
        figures[f"{head} in the top {TOP}"] = round(1 - float(np.mean(missed)), 4)
    return figures


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
