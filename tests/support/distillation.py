"""Small sounds with teachers' probabilities, and a narrow network that learns from them."""

import csv

import numpy as np
import soundfile

from soundnet_port.network.architecture import SAMPLE_RATE, SOUNDNET8

WIDTHS = (2, 2, 3, 3, 4, 4, 5)
NARROW = SOUNDNET8.resized(WIDTHS, SOUNDNET8.head_sizes)
HEADS = {"objects": 5, "scenes": 3}
LABELS = ("objects", "scenes")


def draw_distributions(generator, steps, categories):
    return generator.dirichlet(np.full(categories, 0.3), steps).astype(np.float32)


def write_sound(path, seconds, hertz):
    t = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    samples = 0.4 * np.sin(2 * np.pi * hertz * t) + 0.05 * np.random.default_rng(hertz).standard_normal(
        len(t)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {"format": "MP3"} if path.suffix == ".mp3" else {"subtype": "PCM_16"}
    soundfile.write(path, samples.astype(np.float32), SAMPLE_RATE, **kind)


def write_manifest(folder, steps=(1, 2, 4, 1, 3), heads=None, short=1.0):
    """Write small sounds, each `short` seconds shorter than its label steps, and return their manifest."""
    heads = heads or HEADS
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(["sound", *heads])]
    for i, count in enumerate(steps):
        write_sound(folder / f"{i}.wav", 5 * count - short, 200 * (i + 1))
        cells = [f"{i}.wav"]
        for column, categories in heads.items():
            cells.append(f"{i}.{column.replace(':', '-')}.npy")
            np.save(folder / cells[-1], draw_distributions(generator, count, categories))
        lines.append("\t".join(cells))
    (folder / "clips.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "clips.tsv"


def read_log(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))
