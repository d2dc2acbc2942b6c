"""Sounds, and responses to them that are mixed from known layers of a network."""

import numpy as np
import soundfile
import torch

from soundnet_port.inference.activations import compute_activations
from soundnet_port.inference.alignment import align
from soundnet_port.network.architecture import SAMPLE_RATE

TR = 1.5
VOLUMES = 80


def write_melody(path, seconds, seed):
    """Write a sound whose pitch, loudness and noise change every 0.7 s."""
    generator = np.random.default_rng(seed)
    pieces = []
    for _ in range(int(seconds / 0.7) + 1):
        time = np.arange(int(0.7 * SAMPLE_RATE)) / SAMPLE_RATE
        pitch, tone, noise = generator.uniform(5, 9), *generator.uniform(0, 0.4, 2)
        pieces.append(
            tone * np.sin(2 * np.pi * np.exp(pitch) * time) + noise * generator.normal(size=len(time)) / 3
        )
    samples = np.concatenate(pieces)[: round(seconds * SAMPLE_RATE)]
    soundfile.write(path, samples.clip(-1, 1), SAMPLE_RATE)


def write_melodies(folder):
    """Write five sounds of `VOLUMES`; return their paths."""
    paths = [folder / f"{number}.wav" for number in range(5)]
    for number, path in enumerate(paths):
        write_melody(path, VOLUMES * TR, number)
    return paths


def write_runs(folder):
    """Write three runs of 20 volumes of 2 s with 5 outputs of noise, and their table; return its path."""
    generator = np.random.default_rng(0)
    lines = ["file\ttargets\n"]
    for number in range(3):
        write_melody(folder / f"{number}.wav", 40, number)
        np.save(folder / f"{number}.npy", generator.normal(size=(20, 5)).astype(np.float32))
        lines.append(f"{number}.wav\t{number}.npy\n")
    path = folder / "runs.tsv"
    path.write_text("".join(lines))
    return path


def z_scored_rows(model, sound, layer):
    """Return a layer's rows, (volumes, channels), by other means than the encoding models use."""
    output = compute_activations(model, sound, [layer])
    rows, _ = align(model, layer, output.activations[layer], output.samples / SAMPLE_RATE, tr=TR)
    rows = torch.nan_to_num(rows, nan=float(torch.nanmean(rows))).double().numpy()
    return (rows - rows.mean(0)) / np.maximum(rows.std(0), 1e-9 + 1e-6 * abs(rows).max(0))


def respond(rows, mixing, kernel, share, generator):
    """Mix channels, convolve with a kernel in volumes, and add noise so that `share` is signal."""
    mixed = rows @ mixing
    signal = np.apply_along_axis(lambda column: np.convolve(column, kernel)[: len(column)], 0, mixed)
    signal /= signal.std(0)
    return np.sqrt(share) * signal + np.sqrt(1 - share) * generator.normal(size=signal.shape)
