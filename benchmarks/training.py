"""Measure how fast training memorizes 32 clips, and what a step costs: training.py [ITERATIONS].

The clips are synthetic tones, chirps and noise, 20 s each with four label steps, and random distributions:
there is nothing to generalize, so the divergence can only fall by memorizing each clip. One thread.
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

from soundnet_port.learning.distillation import TrainConfig
from soundnet_port.learning.training import train
from soundnet_port.network.architecture import SAMPLE_RATE, SOUNDNET8
from soundnet_port.network.gradients import keep_freed_memory

CLIPS, BATCH = 32, 16
HEADS = {"objects": 20, "scenes": 10}
WIDTHS = (4, 8, 8, 16, 32, 64, 128)


def write_clips(folder: Path) -> Path:
    """Write sounds and labels, both different in every 5 s, and return their manifest."""
    random = np.random.default_rng(0)
    seconds = np.arange(5 * SAMPLE_RATE) / SAMPLE_RATE
    lines = ["\t".join(["sound", *HEADS])]
    for number in range(CLIPS):
        parts = []
        for _ in range(4):
            start, end, noise = random.uniform(100, 3000), random.uniform(100, 3000), random.uniform(0, 0.2)
            chirp = np.sin(2 * np.pi * (start + (end - start) * seconds / 10) * seconds)
            parts.append(0.4 * chirp + noise * random.standard_normal(len(seconds)))
        soundfile.write(folder / f"{number}.wav", np.clip(np.concatenate(parts), -1, 1), SAMPLE_RATE)
        for head, categories in HEADS.items():
            rows = random.dirichlet(np.full(categories, 0.2), 4).astype(np.float32)
            np.save(folder / f"{number}.{head}.npy", rows)
        lines.append(f"{number}.wav\t{number}.objects.npy\t{number}.scenes.npy")
    (folder / "clips.tsv").write_text("\n".join(lines) + "\n")
    return folder / "clips.tsv"


def main() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    iterations = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_clips(folder)
        start, cpu_start = time.monotonic(), time.process_time()
        train(
            data,
            folder / "run",
            weights=SOUNDNET8.resized(WIDTHS, SOUNDNET8.head_sizes),
            config=TrainConfig(iterations=iterations, batch=BATCH, lr=0.003, schedule="cosine"),
            device="cpu",
        )
        cpu = time.process_time() - cpu_start
        print(
            f"{CLIPS} clips of 20 s, batch {BATCH}, widths {WIDTHS}: {cpu / iterations:.3f} s of CPU per step"
        )
        print(f"{time.monotonic() - start:.0f} s in total, {cpu:.0f} s of CPU")
        with open(folder / "run" / "log.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        for row in [*rows[:: max(1, len(rows) // 10)], rows[-1]]:
            figures = ", ".join(f"{head} {float(row[head]):.4f}" for head in HEADS)
            print(f"step {row['step']:>6}: divergence in nats: {figures}")


if __name__ == "__main__":
    main()
