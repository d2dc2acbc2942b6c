"""Extraction from whole corpora: speed, kill -9 at random moments, peak memory.

Usage: extraction.py [speed] [kill] [memory] [--files N] [--repeat N] [--kills N] [--hours H] [--many N]
                     [--json OUT]

All three by default. The network has the released widths and made-up parameters. Sounds are the clips of
ESC-10 if ../shared/esc10 is there, else noise; all files are made in a temporary folder. Times are wall
clock; take them on a machine that does nothing else.

speed: `extract` with two workers, pool5 and conv7 as npz, against what decoding alone and the network
alone take in two processes on the same cores, and against a loop over the files with soundfile, soxr
and a plain Conv2d/BatchNorm2d port, with torch's own number of threads and with one. "steady" leaves out
the seconds until the first results; "of CPUs" is by the time that processors were busy in one
process, which other programs disturb less; "% of 1 process" are the shares of the stages with one worker.
kill: runs are killed at random moments, sometimes with their workers and sometimes without; whatever
results there are must be those of an undisturbed run, after each kill and in the end, to the byte.
memory: peak resident memory of a long file, pooled, and of many short ones.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import soundfile
import soxr
import torch
from plain_port import plain_port

import soundnet_port as sp
from soundnet_port.audio import decoders, loading
from soundnet_port.audio.loading import read_blocks
from soundnet_port.corpus.extractor import Extractor
from soundnet_port.corpus.run import extract_corpus
from soundnet_port.network.architecture import SOUNDNET8
from soundnet_port.network.engine import BLOCK, StreamState
from soundnet_port.network.engine_cache import get_engine
from soundnet_port.network.weights import write_weights

ESC10 = Path(__file__).resolve().parents[2] / "shared" / "esc10" / "audio"
LAYERS = ["pool5", "conv7"]


def megabytes(field, process="self"):
    """A process's memory: VmRSS is what it has now, VmHWM the most that it had."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1000


# ---- files


def made_up_weights(path):
    """The 8-layer network, every parameter from a generator."""
    generator = torch.Generator().manual_seed(8)
    state = {}
    for name, shape in SOUNDNET8.state_shapes().items():
        values = torch.randn(shape, generator=generator)
        if name.endswith("running_var"):
            values = values.abs() + 0.5
        elif name.endswith("weight") and len(shape) == 3:
            values /= (shape[1] * shape[2]) ** 0.5
        state[name] = values
    write_weights(path, SOUNDNET8, state, {"converter": "made up"})
    return path


def clips():
    """(samples, rate) of real clips of 5 s, or of noise."""
    if ESC10.is_dir():
        return [soundfile.read(path, dtype="float32") for path in sorted(ESC10.glob("*.ogg"))]
    noise = np.random.default_rng(10)
    return [(np.cumsum(noise.normal(0, 0.01, 220_500)).astype(np.float32) % 1, 44_100) for _ in range(40)]


def corpus(folder, suffix, count, sounds):
    """So many files; each sound is encoded once and then has other names, too."""
    folder.mkdir()
    for number in range(count):
        path = folder / f"{number % 10}" / f"{number:05}{suffix}"
        path.parent.mkdir(exist_ok=True)
        if number < len(sounds):
            soundfile.write(path, *sounds[number])
        else:
            first = number % len(sounds)
            os.link(folder / f"{first % 10}" / f"{first:05}{suffix}", path)
    return sorted(folder.rglob(f"*{suffix}"))


# ---- speed


def seconds():
    """By the clock, and of CPUs: of this process and its children that have ended."""
    used = os.times()
    return np.array([time.perf_counter(), sum(used[:4])])


def decoding(paths):
    """What decoding and resampling take, and the sound's seconds."""
    torch.set_num_threads(1)
    begun = seconds()
    samples = sum(sum(map(len, read_blocks(path))) for path in paths)
    return seconds() - begun, samples / sp.SAMPLE_RATE


def network(weights, paths):
    """What the network takes for waveforms that are there, computed as extraction does."""
    torch.set_num_threads(1)
    model = sp.load_pretrained(weights)
    layers = [model.architecture.layer(name) for name in LAYERS]
    engine, waves = get_engine(model), [sp.load_audio(path) for path in paths[:200]]
    together = max(1, BLOCK // max(map(len, waves)))
    StreamState(engine, layers, 1).push(waves[:1], last=True)
    begun = seconds()
    for first in range(0, len(waves), together):
        some = waves[first : first + together]
        StreamState(engine, layers, len(some)).push(some, last=True)
    return (seconds() - begun) * (len(paths) / len(waves))


def stages(weights, inputs, output):
    """Each stage's share of the time, in percent, without other processes."""
    spent = dict.fromkeys(("decode", "resample and scale", "network", "write"), 0.0)
    nested = []  # time of stages inside of others

    def timed(name, work):
        def run(*arguments, **settings):
            nested.append(0.0)
            begun = time.perf_counter()
            try:
                return work(*arguments, **settings)
            finally:
                taken = time.perf_counter() - begun
                spent[name] += taken - nested.pop()
                if nested:
                    nested[-1] += taken

        return run

    def timed_iterator(name, iterate):
        def run(*arguments):
            iterator = iterate(*arguments)
            following = timed(name, lambda: next(iterator, None))
            while (block := following()) is not None:
                yield block

        return run

    with contextlib.ExitStack() as patches:
        for owner, attribute, name in (
            (decoders, "_open_source", "decode"),
            (decoders.mpeg, "find_streams", "decode"),
            (StreamState, "push", "network"),
            (Extractor, "_write_result", "write"),
        ):
            work = timed(name, getattr(owner, attribute))
            patches.enter_context(mock.patch.object(owner, attribute, work))
        for owner, attribute, name in (
            (decoders, "_read_soundfile", "decode"),
            (loading, "_convert", "resample and scale"),
        ):
            work = timed_iterator(name, getattr(owner, attribute))
            patches.enter_context(mock.patch.object(owner, attribute, work))
        torch.set_num_threads(1)
        model = sp.load_pretrained(weights)
        get_engine(model).plan([model.architecture.layer(name) for name in LAYERS])  # folds the weights
        begun = seconds()
        done = extract_corpus(model, [inputs], output, layers=LAYERS, workers=1)
        assert not done.failures, done.failures
        whole, on_cpu = map(float, seconds() - begun)
    spent["the rest"] = whole - sum(spent.values())
    return {name: 100 * used / whole for name, used in spent.items()}, on_cpu


def naive(paths, folder):
    """What the plain loop takes."""
    net = plain_port(sp.SoundNet(SOUNDNET8).eval())
    folder.mkdir()
    begun = seconds()
    with torch.no_grad():
        for number, path in enumerate(paths):
            samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
            wave = soxr.resample(samples[:, 0], rate, sp.SAMPLE_RATE) * 256
            x, kept = torch.from_numpy(wave)[None, None, :, None], []
            for at, module in enumerate(net):
                x = module(x)
                if at in (17, len(net) - 1):
                    kept.append(x[0, :, :, 0].T.numpy())
            np.savez(folder / f"{number}.npz", pool5=kept[0], conv7=kept[1])
    return seconds() - begun


def speed(folder, weights, count, repeat):
    """A row for each kind of file; of several turns the best of each figure."""
    sounds, rows, threads = clips(), [], torch.get_num_threads()
    for suffix in (".mp3", ".wav", ".ogg", ".flac"):
        inputs = folder / suffix[1:]
        paths = corpus(inputs, suffix, count, sounds)
        best = {}
        for turn in range(repeat):
            taken = {}
            with multiprocessing.get_context("spawn").Pool(2) as pool:
                halves = [paths[::2], paths[1::2]]
                pool.map(decoding, [half[:10] for half in halves], chunksize=1)  # imports
                made = pool.map(decoding, halves, chunksize=1)
                computed = pool.starmap(network, [(weights, half) for half in halves], chunksize=1)
            sound = sum(each for _, each in made)
            for name, both in (("decoding", [used for used, _ in made]), ("network", computed)):
                taken[name] = np.array([max(used[0] for used in both), sum(used[1] for used in both)])
            times, begun = [], seconds()
            done = extract_corpus(
                weights,
                [inputs],
                folder / f"out {inputs.name} {turn}",
                layers=LAYERS,
                workers=2,
                progress=lambda p, times=times: times.append((time.perf_counter(), p.done)),
            )
            assert not done.failures, done.failures
            taken["extract"] = np.array([seconds()[0] - begun[0], np.inf])  # its workers are not our children
            first, last = next(each for each in times if each[1]), times[-1]
            taken["steady"] = np.array([(last[0] - first[0]) * count / (last[1] - first[1]), np.inf])
            some = paths[:200]
            for name, number in (("naive", threads), ("naive, 1 thread", 1)):
                torch.set_num_threads(number)
                used = naive(some, folder / f"{name} {inputs.name} {turn}")
                taken[name] = used * (count / len(some))
            torch.set_num_threads(threads)
            best = {name: np.minimum(used, best.get(name, used)) for name, used in taken.items()}
        shares, on_cpu = stages(weights, inputs, folder / f"stages {inputs.name}")
        torch.set_num_threads(threads)
        possible = best["decoding"] + best["network"]
        rows.append(
            {
                "files": f"{count:,} {suffix[1:]}",
                "hours of sound": sound / 3600,
                **{f"{name}, s": float(used[0]) for name, used in best.items()},
                **{f"{name}, CPU s": float(used[1]) for name, used in best.items() if used[1] < np.inf},
                "1 process, CPU s": on_cpu,
                **{
                    f"{name}, % of 1 process": 100 * used / sum(shares.values())
                    for name, used in shares.items()
                },
                "times real time": sound / best["extract"][0],
                "of what is possible": possible[0] / best["extract"][0],
                "the same, steady": possible[0] / best["steady"][0],
                "the same, of CPUs": possible[1] / on_cpu,
                "times naive": best["naive"][0] / best["extract"][0],
                "times naive, of CPUs": best["naive, 1 thread"][1] / on_cpu,
            }
        )
    return rows


# ---- kill -9


def contents(output):
    """The results that are there, with their bytes."""
    if output.is_file():
        return {output.name: output.read_bytes()}
    return {
        str(p.relative_to(output)): p.read_bytes() for p in output.rglob("*.npz") if ".extract" not in p.parts
    }


def kill(folder, weights, kills):
    """Kills runs into a folder and into a file in turn."""
    inputs = folder / "killed"
    corpus(inputs, ".mp3", 400, clips())
    generator = random.Random(2016)
    counts = {"kills": 0, "with workers": 0, "finished trees": 0, "results compared": 0, "different": 0}
    undisturbed = {}
    for name in ("tree", "file.npz"):
        output = folder / "undisturbed" / name
        begun = time.monotonic()
        command = [sys.executable, "-m", "soundnet_port", "extract", inputs, "-w", weights, "-l", "pool5"]
        command += ["-l", "conv7", "-o"]
        subprocess.run([*command, output, "--workers", "1"], check=True, stderr=subprocess.DEVNULL)
        seconds = time.monotonic() - begun
        undisturbed[name] = contents(output)
    tree = 0
    while counts["kills"] < kills:
        tree += 1
        name = ("tree", "file.npz")[tree % 2]
        output = folder / f"kill{tree}" / name
        while True:
            run = subprocess.Popen(
                [*command, output, "--workers", generator.choice("12")],
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            try:
                _, said = run.communicate(timeout=generator.uniform(0, seconds))
                assert run.returncode == 0, said
                finished = True
            except subprocess.TimeoutExpired:
                whole = generator.random() < 0.5
                (os.killpg if whole else os.kill)(run.pid, signal.SIGKILL)
                run.wait()
                run.stderr.close()
                counts["kills"] += 1
                counts["with workers"] += whole
                finished = False
            there = contents(output) if output.exists() else {}
            counts["results compared"] += len(there)
            counts["different"] += sum(undisturbed[name].get(n) != data for n, data in there.items())
            if finished:
                counts["finished trees"] += 1
                counts["different"] += len(set(undisturbed[name]) - set(there))
                left = [p.name for p in output.parent.iterdir()]
                assert sorted(left) == sorted([name] + ([f"{name}.json"] if name != "tree" else [])), left
                break
        shutil.rmtree(output.parent)
    return [counts]


# ---- memory

MEMORY = """
import multiprocessing, json, sys, torch
import soundnet_port as sp
from soundnet_port.corpus.run import extract_corpus

def resident(pid="self", field="VmRSS"):
    with open(f"/proc/{pid}/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def marked(progress):
    if progress.done in marks:
        seen[progress.done] = resident()
        for child in multiprocessing.active_children():
            workers[progress.done] = max(workers.get(progress.done, 0), resident(child.pid))

if __name__ == "__main__":
    inputs, output, weights, pool, workers_wanted, marks = sys.argv[1:]
    marks, seen, workers = json.loads(marks), {}, {}
    model = sp.load_pretrained(weights)
    idle = resident()
    done = extract_corpus(model, [inputs], output, layers=["pool5", "conv7"], pool=pool,
                          workers=int(workers_wanted), progress=marked)
    assert not done.failures, done.failures
    print(json.dumps({"idle": idle, "peak": resident(field="VmHWM"), "seen": seen, "workers": workers,
                      "seconds": done.seconds, "elapsed": done.elapsed}))
"""


def measured(folder, inputs, output, weights, pool, workers, marks):
    script = folder / "memory.py"
    script.write_text(MEMORY)
    command = [sys.executable, script, inputs, output, weights, pool, str(workers), json.dumps(marks)]
    done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def memory(folder, weights, hours, many):
    """Peak memory above the process with the model loaded."""
    rows = []
    long = folder / "long"
    long.mkdir()
    noise = np.random.default_rng(3).integers(-9000, 9000, 44_100 * 60, np.int16)
    with soundfile.SoundFile(long / "long.wav", "w", 44_100, 1, format="RF64") as file:
        for _ in range(round(hours * 60)):
            file.write(noise)
    for pool in ("mean", "mean+std"):
        made = measured(folder, long, folder / f"long {pool}", weights, pool, 1, [])
        rows.append(
            {
                "what": f"{hours:g} hours in a file, {pool}",
                "idle MB": made["idle"] / 1e6,
                "peak above idle MB": (made["peak"] - made["idle"]) / 1e6,
                "times real time": made["seconds"] / made["elapsed"],
            }
        )
    (long / "long.wav").unlink()
    short = folder / "short"
    short.mkdir()
    for number in range(100):
        soundfile.write(short / f"{number:05}.wav", noise[number * 9 :][:22_050], 22_050)
    for number in range(100, many):
        os.link(short / f"{number % 100:05}.wav", short / f"{number:05}.wav")
    marks = [many // 10, many // 2, many * 99 // 100]
    for workers in (1, 2):
        made = measured(folder, short, folder / f"short{workers}", weights, "none", workers, marks)
        row = {"what": f"{many:,} files of 1 s, {workers} worker" + "s" * (workers > 1)}
        for mark in marks:
            row[f"MB at {mark:,}"] = made["seen"][str(mark)] / 1e6
            if workers > 1:
                row[f"a worker's at {mark:,}"] = made["workers"][str(mark)] / 1e6
        rows.append(row)
    return rows


def shown(rows):
    for row in rows:
        print()
        for name, value in row.items():
            print(f"  {name:<36}{value:>12,.2f}" if isinstance(value, float) else f"  {name:<36}{value:>12}")


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("parts", nargs="*", choices=["speed", "kill", "memory", []], default=[])
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--hours", type=float, default=10)
    parser.add_argument("--many", type=int, default=10_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    parts = options.parts or ["speed", "kill", "memory"]
    results = {"cpus": len(os.sched_getaffinity(0)), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = made_up_weights(folder / "weights.safetensors")
        for part, run in (
            ("speed", lambda: speed(folder, weights, options.files, options.repeat)),
            ("kill", lambda: kill(folder, weights, options.kills)),
            ("memory", lambda: memory(folder, weights, options.hours, options.many)),
        ):
            if part in parts:
                results[part] = run()
                print(f"\n== {part}", end="")
                shown(results[part])
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
