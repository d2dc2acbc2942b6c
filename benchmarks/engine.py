"""Speed and memory of the engine: python benchmarks/engine.py [--quick] [--json FILE].

Everything is a ratio within one run: the engine against a plain PyTorch port of the network (Conv2d,
BatchNorm2d, ReLU, MaxPool2d), against the plain SoundNet of this package, and against the speed of a
large matrix product, the most that the machine gives. What counts as work are the network's own
multiplications; those that the engine does on top earn it nothing. Times are the best of several
runs, and the runs of all that is compared take turns.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from plain_port import plain_port

import soundnet_port as sp

RATE = sp.SAMPLE_RATE
SIZE = 2048  # of the large matrix product


def flops(architecture, samples):
    """The network's own multiplications and additions, up to the trunk's end."""
    total, channels = 0, 1
    for block in architecture.blocks:
        total += 2 * architecture.frames(block.name, samples) * block.channels * block.kernel * channels
        channels = block.channels
    return total


def best(times, **works):
    """Seconds of each work: the best of `times` rounds in which all take their turn."""
    seconds = dict.fromkeys(works, float("inf"))
    for _ in range(times + 1):  # one to warm up
        for name, work in works.items():
            start = time.perf_counter()
            work()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def speed(quick):
    square = torch.randn(SIZE, SIZE)
    product = torch.empty_like(square)
    rows = []
    for threads in sorted({1, len(os.sched_getaffinity(0))}):
        torch.set_num_threads(threads)
        for architecture in (sp.SOUNDNET8, sp.SOUNDNET5):
            model = sp.SoundNet(architecture).eval().requires_grad_(False)
            slow = sp.SoundNet(architecture).eval().requires_grad_(False)
            slow.use_engine = False
            port = plain_port(model)
            last = [architecture.blocks[-1].name]
            cases = [(5, 1), (20, 1), (60, 1), (5, 32)] + ([] if quick else [(600, 1)])
            for seconds, clips in cases:
                waves = [torch.randn(seconds * RATE) * 50 for _ in range(clips)]
                works = {
                    "engine": lambda: model.extract_each(waves, last),  # noqa: B023
                    "matrix": lambda: torch.mm(square, square, out=product),
                    "port": lambda: [port(wave[None, None, :, None]) for wave in waves],  # noqa: B023
                    "plain": lambda: [slow.extract(wave, last) for wave in waves],  # noqa: B023
                }
                times = max(2, min(30, 300 // (seconds * clips)))
                if seconds == 600:
                    del works["port"], works["plain"]  # gigabytes, and minutes
                took = best(times if not quick else 3, **works)
                work = clips * flops(architecture, seconds * RATE)
                limit = 2 * SIZE**3 / took["matrix"]
                rows.append(
                    {
                        "network": architecture.name,
                        "threads": threads,
                        "clips": clips,
                        "seconds": seconds,
                        "engine_ms": 1e3 * took["engine"],
                        "times_port": took.get("port", float("nan")) / took["engine"],
                        "times_plain": took.get("plain", float("nan")) / took["engine"],
                        "times_real_time": clips * seconds / took["engine"],
                        "gflops": work / took["engine"] / 1e9,
                        "matrix_gflops": limit / 1e9,
                        "of_matrix": work / took["engine"] / limit,
                    }
                )
                show(rows[-1])
    return rows


def show(row):
    clips = f"{row['clips']} x {row['seconds']} s"
    print(
        f"{row['network']}  {row['threads']} thread(s)  {clips:>9}  {row['engine_ms']:8.1f} ms"
        f"  {row['times_port']:5.1f} x port  {row['times_plain']:5.1f} x plain"
        f"  {row['times_real_time']:7,.0f} x real time"
        f"  {row['gflops']:4.0f} of {row['matrix_gflops']:4.0f} GFLOP/s = {row['of_matrix']:.0%}",
        flush=True,
    )


# ---- memory, in processes of their own

MEMORY = """
import re, sys, torch, soundnet_port as sp
def peak():  # since this process began; getrusage's figure begins with the parent's
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 1024
torch.set_num_threads(1)
model = sp.load_pretrained(sys.argv[1])
idle = peak()
minutes, layer = float(sys.argv[2]), sys.argv[3]
listening, total, frames = sp.stream(model, [layer]), 0.0, 0
piece = torch.randn(sp.SAMPLE_RATE * 30) * 50
for _ in range(int(minutes * 2)):
    new = listening.push(piece)[layer]
    total, frames = total + new.double().sum(2), frames + new.shape[2]
new = listening.finish()[layer]
print(idle, peak(), frames + new.shape[2])
"""

START = "import time; t = time.perf_counter(); import {0}; print(time.perf_counter() - t)"
LOAD = """
import time, sys, soundnet_port as sp
sp.load_pretrained(sys.argv[1])
t = time.perf_counter(); sp.load_pretrained(sys.argv[1]); print(time.perf_counter() - t)
"""


def run(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return [float(word) for word in subprocess.check_output(command, text=True).split()]


def memory(weights, quick):
    rows = []
    for layer in ("conv7", "scenes") if quick else ("pool1", "pool5", "conv7", "scenes"):
        for minutes in (1, 10) if quick else (1, 60, 600):
            idle, peak, _ = run(MEMORY, weights, minutes, layer)
            rows.append({"layer": layer, "minutes": minutes, "idle_mb": idle, "above_mb": peak - idle})
            print(f"{layer}, {minutes} min: {peak - idle:.0f} MB above {idle:.0f} MB", flush=True)
    return rows


def start(weights, quick):
    times = 3 if quick else 7
    torch_s = min(run(START.format("torch"))[0] for _ in range(times))
    both = min(run(START.format("torch, soundnet_port"))[0] for _ in range(times))
    light = min(run(START.format("soundnet_port"))[0] for _ in range(times))
    load = min(run(LOAD, weights)[0] for _ in range(times))
    row = {"import_torch": torch_s, "import_added": both - torch_s, "import_alone": light, "load_warm": load}
    print(
        f"import torch {torch_s:.2f} s, soundnet_port {both - torch_s:+.3f} s (alone {light:.3f} s); "
        f"load_pretrained, warm: {load:.3f} s"
    )
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer runs and lengths")
    parser.add_argument("--json", metavar="FILE", help="write the figures")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, "random.safetensors")
        model = sp.SoundNet()
        from soundnet_port.network.weights import write_weights

        state = {name: t for name, t in model.state_dict().items() if "num_batches" not in name}
        write_weights(weights, model.architecture, state, {})
        figures = {
            "machine": {"cpus": os.cpu_count(), "torch": torch.__version__},
            "speed": speed(options.quick),
            "memory": memory(weights, options.quick),
            "start": start(weights, options.quick),
        }
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
