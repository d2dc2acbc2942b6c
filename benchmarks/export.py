"""Exported networks against the network: differences for each output, and time on one thread.

    python benchmarks/export.py

The released 8-layer network, the full-width 5-layer reference network (parameters of tests/formula.py) and
the demonstration network, on the example sounds one after the other. Time is CPU time of 60 s of sound up to
the end of the trunk, the best of five rounds in which all take their turns.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from support.networks import NETS, model_of

import soundnet_port as sp
from soundnet_port.audio.examples import medley
from soundnet_port.interop.onnx_export import export

SECONDS = 5, 9.6, 20, 60
ROUNDS = 5


def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def sound(seconds):
    """(1, samples) of the example sounds, one after the other and again."""
    return medley().repeat(2)[None, : int(seconds * sp.SAMPLE_RATE)]


def differences(model, folder):
    """Prints for each layer the largest difference, of the layer's largest value, at each length."""
    model.use_engine = False
    layers = model.architecture.layers
    trunk = [name for name, layer in layers.items() if layer.kind != "head"]
    heads = [name for name, layer in layers.items() if layer.kind == "head"]
    found = {name: [] for name in layers}
    for names in (trunk, heads):
        export(model, folder / "a.onnx", names)
        run = session(folder / "a.onnx").run
        for seconds in SECONDS:
            wave = sound(seconds).numpy()
            there = [name for name in names if wave.shape[1] >= layers[name].shortest]
            if not there:
                continue
            made = run(there, {"waveform": wave})
            expected = model.extract(torch.from_numpy(wave), there)
            for name, each in zip(there, made, strict=True):
                theirs = expected[name].numpy()
                found[name].append(f"{np.abs(each - theirs).max() / np.abs(theirs).max():.1e}")
    for name, each in found.items():
        print("|", name, "|", " | ".join(["-"] * (len(SECONDS) - len(each)) + each), "|", flush=True)
    model.use_engine = True


def speed(model, folder):
    """Prints CPU milliseconds of the engine, the modules and onnxruntime."""
    end = model.architecture.last_layer
    wave = sound(60)
    export(model, folder / "a.onnx", [end])
    run = session(folder / "a.onnx").run

    def modules():
        model.use_engine = False
        model.extract(wave, [end])
        model.use_engine = True

    ways = {
        "engine": lambda: model.extract(wave, [end]),
        "onnxruntime": lambda: run([end], {"waveform": wave.numpy()}),
        "modules": modules,
    }
    best = dict.fromkeys(ways, float("inf"))
    for number in range(ROUNDS + 1):
        for name, way in ways.items():
            began = time.process_time()
            way()
            if number:  # the first one is for warming up
                best[name] = min(best[name], time.process_time() - began)
    print({name: f"{1000 * seconds:.0f} ms" for name, seconds in best.items()}, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}")
    for name in ("soundnet8", "full5", "demo"):
        model = model_of(NETS[name]) if name in NETS else sp.load_pretrained(name)
        print(name, SECONDS)
        with tempfile.TemporaryDirectory() as folder:
            speed(model, Path(folder))
            differences(model, Path(folder))
