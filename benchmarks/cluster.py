"""What an hour of MP3 costs in CPU time: decoding, and the network, each alone in one thread.

Usage: cluster.py [--files N] [--repeat N]

The figures are in benchmarks/README.md. Clips of 15 s are made of ESC-10's if ../shared/esc10 exists, else of
noise, and encoded by soundfile as MP3: 44.1 kHz in stereo, which is resampled, and 22.05 kHz in mono. The
network has the released widths and made-up parameters; it gives pool5 and conv7. Each figure is the least
of the repetitions: CPU time of decoding, wall clock of the network. Take them on a machine that does
nothing else.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from extraction import clips, decoding, made_up_weights, network


def encoded(folder, kind, count, sounds):
    """So many MP3 files of 15 s."""
    paths = []
    for number in range(count):
        three = [sounds[(3 * number + each) % len(sounds)] for each in range(3)]
        samples, rate = np.concatenate([samples for samples, _ in three]), three[0][1]
        if kind == "stereo":
            samples = np.stack([samples, np.roll(samples, 40)], axis=1)
        else:
            samples, rate = soxr.resample(samples, rate, 22_050), 22_050
        paths.append(folder / f"{kind}{number:03}.mp3")
        soundfile.write(paths[-1], samples, rate)
    return paths


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=60)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sounds = clips()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = made_up_weights(folder / "made-up.safetensors")
        for kind in ("stereo", "mono"):
            paths = encoded(folder, kind, options.files, sounds)
            rates = []
            for _ in range(options.repeat):
                before = time.process_time()
                _, seconds = decoding(paths)
                rates.append((time.process_time() - before) / seconds * 3600)
            kbits = sum(path.stat().st_size for path in paths) * 8 / seconds / 1000
            print(f"decoding {kind}, {kbits:.0f} kbit/s: {min(rates):.2f} s per hour", flush=True)
        taken = [network(weights, paths) / seconds * 3600 for _ in range(options.repeat)]
        print(f"network: {min(taken):.2f} s per hour (all: {', '.join(f'{each:.2f}' for each in taken)})")


if __name__ == "__main__":
    main()
