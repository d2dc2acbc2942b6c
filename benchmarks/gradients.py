"""A training step of the full-width trunks: PyTorch's modules against gradients.py, in one run.

python benchmarks/gradients.py [THREADS]
"""

import sys
import time
from multiprocessing import get_context

import torch

from soundnet_port import SAMPLE_RATE, SOUNDNET5, SOUNDNET8, Architecture, SoundNet
from soundnet_port.network.gradients import keep_freed_memory

BATCH, SECONDS, ROUNDS = 16, 5, 3


def milliseconds(model: SoundNet, waveform: torch.Tensor) -> float:
    """For a clip: forward and backward, best of several, after one to warm up."""
    layer, best = model.architecture.last_layer, float("inf")
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        model.extract(waveform, [layer])[layer].square().mean().backward()
        model.zero_grad()
        best = min(best, time.perf_counter() - began)
    return best / len(waveform) * 1000


def measure(architecture: Architecture, threads: int) -> None:
    """Prints a network's line."""
    torch.set_num_threads(threads)
    waveform = torch.randn(BATCH, SECONDS * SAMPLE_RATE)
    model = SoundNet(architecture.resized(architecture.widths, {})).train()
    taken = {}
    for kept in (False, True):
        if kept:  # from then on, so last
            keep_freed_memory()
        for fast in (False, True):
            model.fast_gradients = fast
            taken[kept, fast] = milliseconds(model, waveform)
    print(
        f"{architecture.name}, {threads} thread(s), {BATCH} clips of {SECONDS} s, ms a clip: modules "
        f"{taken[False, False]:.0f}, with memory kept {taken[True, False]:.0f}; gradients.py "
        f"{taken[False, True]:.0f}, with memory kept {taken[True, True]:.0f}: "
        f"{taken[False, False] / taken[True, True]:.1f} times as fast"
    )


if __name__ == "__main__":
    for each in (SOUNDNET8, SOUNDNET5):
        process = get_context("spawn").Process(target=measure, args=(each, int((sys.argv[1:] or [1])[0])))
        process.start()
        process.join()
