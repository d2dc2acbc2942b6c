"""How fast a training learns 32 clips by heart, and what a step costs: training.py [ITERATIONS].

The clips are tones, chirps and noise made here, 20 s each with four label steps, and distributions drawn at
random: there is nothing to understand, so the divergence can only fall by learning each clip. One thread.
"""

from __future__ import annotations

import csv
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
import numpy as np
import soundfile
import torch

from soundnet_port.learning.training import TrainConfig, train
from soundnet_port.network.architecture import SAMPLE_RATE, SOUNDNET8

CLIPS, BATCH = 32, 16
HEADS = {"objects": 20, "scenes": 10}
WIDTHS = (4, 8, 8, 16, 32, 64, 128)


def clips(folder: Path) -> Path:
    """A manifest of sounds with labels, each of them different in every 5 s."""
    random = np.random.default_rng(0)
    seconds = np.arange(5 * SAMPLE_RATE) / SAMPLE_RATE
    lines = ["\t".join(["sound", *HEADS])]
    for number in range(CLIPS):
        parts = []
        for _ in range(4):
            start, end, noise = random.uniform(100, 3000), random.uniform(100, 3000), random.uniform(0, 0.2)
            swept = np.sin(2 * np.pi * (start + (end - start) * seconds / 10) * seconds)
            parts.append(0.4 * swept + noise * random.standard_normal(len(seconds)))
        soundfile.write(folder / f"{number}.wav", np.clip(np.concatenate(parts), -1, 1), SAMPLE_RATE)
        for head, categories in HEADS.items():
            rows = random.dirichlet(np.full(categories, 0.2), 4).astype(np.float32)
            np.save(folder / f"{number}.{head}.npy", rows)
        lines.append(f"{number}.wav\t{number}.objects.npy\t{number}.scenes.npy")
    (folder / "clips.tsv").write_text("\n".join(lines) + "\n")
    return folder / "clips.tsv"


def main() -> None:
    torch.set_num_threads(1)
    iterations = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = clips(folder)
        began, used = time.monotonic(), time.process_time()
        train(
            data,
            folder / "run",
            recipe=TrainConfig(iterations=iterations, batch=BATCH, lr=0.003, schedule="cosine"),
            architecture=SOUNDNET8.resized(WIDTHS, SOUNDNET8.head_sizes),
            accelerator="cpu",
        )
        used = time.process_time() - used
        print(
            f"{CLIPS} clips of 20 s, batch {BATCH}, widths {WIDTHS}: {used / iterations:.3f} s of CPU a step"
        )
        print(f"{time.monotonic() - began:.0f} s altogether, {used:.0f} s of CPU")
        with open(folder / "run" / "log.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        for row in [*rows[:: max(1, len(rows) // 10)], rows[-1]]:
            figures = ", ".join(f"{head} {float(row[head]):.4f}" for head in HEADS)
            print(f"step {row['step']:>6}: divergence in nats: {figures}")


if __name__ == "__main__":
    main()
