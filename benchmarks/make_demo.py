#!/usr/bin/env python3
"""Make weights/demo.safetensors: a narrow 8-layer SoundNet, trained on ESC-10's folds 1 to 4.

Usage: make_demo.py ESC10 RUN_FOLDER

ESC10 is the folder of the data set. The teachers' distributions come from demo_table.tsv, which was
written by hand before any training: a few objects and scenes for each of the ten classes. RUN_FOLDER
gets the labels, the manifest, the run of `soundnet-port train`, and figures.json: the network's
accuracy on the held-out fold 5. The same command resumes an interrupted run.
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
from soundnet_port.learning.augmentation import Augmentation
from soundnet_port.learning.datasets import read_labeled
from soundnet_port.learning.distillation import TrainConfig
from soundnet_port.learning.labeled_sounds import LabeledSound, LabeledSounds
from soundnet_port.learning.training import train
from soundnet_port.network.architecture import SOUNDNET8
from soundnet_port.network.categories import original_categories
from soundnet_port.network.gradients import keep_freed_memory
from soundnet_port.network.model import SoundNet
from soundnet_port.pretrained import load_pretrained

HERE = Path(__file__).resolve().parent
HELD_OUT = "5"
WIDTHS = (8, 16, 32, 64, 128, 128, 64)
CONFIG = TrainConfig(
    iterations=1500,
    batch=16,
    lr=0.003,
    schedule="cosine",
    augmentation=Augmentation(gain=6, shift=5, stretch=1.12, flip=True, mix=0.5),
)
TOP = 5


def main(esc10: str, folder: str) -> None:
    """Train, measure accuracy, and copy the weights to weights/."""
    keep_freed_memory()
    sounds, run = read_labeled(esc10), Path(folder)
    table = read_table()
    result = train(
        write_manifest(sounds, table, run / "data"),
        run / "run",
        weights=SOUNDNET8.resized(WIDTHS, SOUNDNET8.head_sizes),
        config=CONFIG,
        progress=lambda progress: print(f"{progress.done:>6} {progress.note}", file=sys.stderr),
    )
    if result.interrupted:
        sys.exit("interrupted; the same command resumes")
    model = load_pretrained(result.weights)
    torch.manual_seed(0)
    untrained = SoundNet(model.architecture, model.categories).eval()
    held_out = [sound for sound in sounds.sounds if sound.fold == HELD_OUT]
    figures = {
        "clips": len(held_out),
        "demo": measure_hits(model, held_out, table),
        "untrained": measure_hits(untrained, held_out, table),
        "chance": compute_chance(table),
    }
    (run / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    shutil.copyfile(result.weights, HERE.parent / "weights" / "demo.safetensors")
    print(json.dumps(figures, indent=2))


Table = dict[str, dict[str, dict[str, float]]]  # by class, head and category: the probability


def read_table() -> Table:
    """Read the categories of each class and head with their probabilities."""
    table: Table = defaultdict(lambda: defaultdict(dict))
    with open(HERE / "demo_table.tsv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            table[row["class"]][row["head"]][row["category"]] = float(row["probability"])
    return table


def write_manifest(sounds: LabeledSounds, table: Table, folder: Path) -> Path:
    """Write the training data: the sounds of all folds but one, each with its class's distributions."""
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
    lines += [
        f"{sound.path.resolve()}\t{sound.label}.objects.npy\t{sound.label}.scenes.npy"
        for sound in sounds.sounds
        if sound.fold != HELD_OUT
    ]
    path = folder / "manifest.tsv"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def measure_hits(model: SoundNet, sounds: list[LabeledSound], table: Table) -> dict[str, float]:
    """Return the share of clips with a category of their class among the top 5, and at the top."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for sound in sounds:
        prediction = predict(model, sound.path, top=TOP)
        for head in ("objects", "scenes"):
            correct = [
                category.original in table[sound.label][head] for category in getattr(prediction, head)
            ]
            hits[f"{head} in the top {TOP}"].append(any(correct))
            hits[f"{head} at the top"].append(correct[0])
    return {name: round(float(np.mean(values)), 3) for name, values in hits.items()}


def compute_chance(table: Table) -> dict[str, float]:
    """Return the same share for five categories drawn at random."""
    figures = {}
    for head, size in SOUNDNET8.head_sizes.items():
        missed = []
        for label in table:
            count = len(table[label][head])
            missed.append(np.prod([(size - count - i) / (size - i) for i in range(TOP)]))
        figures[f"{head} in the top {TOP}"] = round(1 - float(np.mean(missed)), 4)
    return figures


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
