"""A microphone that is on for a day: memory by the hour, and whether the frames stay right.

    python benchmarks/soak.py [--hours 24] [WEIGHTS]

Time is compressed: the stream gets its samples as fast as it takes them, at 44,100 Hz, in pieces of
unequal lengths. The sound repeats itself with a period that is a whole number of frames, so that frames
a period apart must be the same up to rounding, on the first day as in the first minute. Needs Linux.
"""

import argparse
import math
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from extraction import made_up_weights, megabytes

import soundnet_port as sp

LAYERS = ["pool5", "conv7"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("weights", nargs="?", help="by default made up, of the released widths")
    parser.add_argument("--hours", type=int, default=24)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        weights = options.weights or made_up_weights(Path(folder, "made-up.safetensors"))
        model = sp.load_pretrained(weights)
    layers = [model.architecture.layer(key) for key in LAYERS]
    stride = math.lcm(*(layer.stride for layer in layers))
    period = 8 * stride  # of samples at 22,050 Hz
    sound = (torch.randn(2 * period) * 20).clamp(-256, 256)
    sound = torch.cat([sound, sound])  # pieces begin anywhere in the first half
    listening = sp.stream(model, LAYERS, sample_rate=2 * sp.SAMPLE_RATE)
    lengths, position, pushed = random.Random(0), 0, 0
    kept = {key: torch.empty(0) for key in LAYERS}
    known, worst = {}, 0.0
    began = time.perf_counter()
    print(f"0 h: {megabytes('VmRSS'):.0f} MB", flush=True)
    for hour in range(1, options.hours + 1):
        while pushed < hour * 3600 * 2 * sp.SAMPLE_RATE:
            count = lengths.choice([441, 1024, 4410, 44_100, lengths.randint(1, 2 * period)])
            for key, frames in listening.push(sound[position : position + count]).items():
                kept[key] = torch.cat([kept[key].reshape(1, frames.shape[1], -1), frames], 2)
            position, pushed = (position + count) % (2 * period), pushed + count
            for key, layer in zip(LAYERS, layers, strict=True):
                each = period // layer.stride
                while kept[key].shape[2] >= each:  # the first period sees the beginning of the sound
                    now, kept[key] = kept[key][:, :, :each], kept[key][:, :, each:].clone()
                    number, before = known.get(key, (0, now))
                    if number >= 6:
                        worst = max(worst, float((now - before).abs().max() / before.abs().max()))
                    known[key] = (number + 1, before if number >= 6 else now)
        if hour in (1, 2, 3, 6, 12, 18) or hour == options.hours:
            print(f"{hour} h: {megabytes('VmRSS'):.0f} MB", flush=True)
    counted = ", ".join(
        f"{number * period // layer.stride:,} frames of {key}"
        for (key, (number, _)), layer in zip(known.items(), layers, strict=True)
    )
    print(f"{counted}; off by at most {worst:.1e} of the largest; {time.perf_counter() - began:.0f} s")
    return int(worst > 1e-5)


if __name__ == "__main__":
    sys.exit(main())
