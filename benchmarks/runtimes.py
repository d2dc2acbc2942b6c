"""Speed and accuracy beside other runtimes: python benchmarks/runtimes.py [--quick] [--json FILE].

One process, one input after the other, all contestants in turn. The figure is the median of processor time
(with several threads, of elapsed time); beside it stands the largest difference from float64, relative to
the layer's largest value. The released weights are used where they are in a weights folder, else random
ones. Contestants that aren't installed (onnxruntime, openvino, a compiler for torch.compile) are left out.
"""

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from plain_port import plain_port

import soundnet_port as sp
from soundnet_port.interop.onnx_export import export
from soundnet_port.network.kernels.library import CHOICES, VARIABLE, load_library

RATE = sp.SAMPLE_RATE


def contestants(model, layer, threads, folder, quick):
    """Yield (name, function from a (samples,) or (batch, samples) tensor to the layer's output)."""
    port = plain_port(model)
    yield "plain Conv2d port", lambda x: port(x.reshape(-1, 1, x.shape[-1], 1))[..., 0]
    last = plain_port(model).to(memory_format=torch.channels_last)

    def channels_last(x):
        images = x.reshape(-1, 1, x.shape[-1], 1).contiguous(memory_format=torch.channels_last)
        return last(images)[..., 0]

    yield "oneDNN, channels last", channels_last
    if not quick:
        compiled = torch.compile(plain_port(model), dynamic=False)
        yield "torch.compile", lambda x: compiled(x.reshape(-1, 1, x.shape[-1], 1))[..., 0]
    path = Path(folder, f"{model.architecture.name}.onnx")
    try:
        import onnxruntime

        export(model, path, [layer])
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        given = session.get_inputs()[0].name
        yield (
            "onnxruntime",
            lambda x: torch.from_numpy(session.run(None, {given: x.reshape(-1, x.shape[-1]).numpy()})[0]),
        )
        import openvino

        core = openvino.Core()
        network = core.compile_model(
            core.read_model(path),
            "CPU",
            {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"},
        )
        yield "OpenVINO", lambda x: torch.from_numpy(network(x.reshape(-1, x.shape[-1]).numpy())[0])
    except ImportError:
        pass
    library = load_library()
    kernels = [name for name in CHOICES[1:-1] if library and library.soundnet_kernels(name.encode())]
    for name in ["engine", *reversed(kernels)]:

        def compute(x, name=name, own=copy.deepcopy(model)):  # noqa: B008  (each has an engine of its own)
            os.environ[VARIABLE] = name
            return own.extract(x, [layer])[layer]

        yield ("engine, matrix products" if name == "engine" else f"kernels, {name}"), compute


def measure(model, waveform, threads, folder, quick):
    """Return rows of (contestant, milliseconds, error)."""
    layer = model.architecture.last_layer
    exact = sp.SoundNet(model.architecture).double().eval()
    exact.load_state_dict(model.state_dict())
    exact.use_engine = False
    works = dict(contestants(model, layer, threads, folder, quick))
    clock = time.process_time if threads == 1 else time.perf_counter
    spent = {name: [] for name in works}
    rounds = 5 if quick else max(5, min(25, int(600 * RATE / waveform.numel()) + 5))
    for number in range(rounds + 1):
        for name, work in works.items():
            start = clock()
            work(waveform)
            if number:  # the first round warms up
                spent[name].append(clock() - start)
    first = waveform.reshape(-1, waveform.shape[-1])[:1]
    errors = dict.fromkeys(works, float("nan"))
    if waveform.shape[-1] <= 60 * RATE:  # more takes gigabytes in float64
        expected = exact.extract(first.double(), [layer])[layer]
        for name, work in works.items():
            errors[name] = float((work(waveform)[:1] - expected).abs().max() / expected.abs().max())
    return [(name, 1e3 * statistics.median(spent[name]), errors[name]) for name in works]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer inputs and rounds, no torch.compile")
    parser.add_argument("--json", metavar="FILE", help="write the figures")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    rows = []
    for name in ("soundnet8", "soundnet5"):
        try:
            model = sp.load_pretrained(name, download=False)
        except sp.WeightsError:
            torch.manual_seed(0)
            model = sp.SoundNet(getattr(sp, name.upper())).eval().requires_grad_(False)
        for threads in sorted({1, len(os.sched_getaffinity(0))}):
            torch.set_num_threads(threads)
            for seconds, clips in [(60, 1), (5, 32), (5, 1)] + ([] if options.quick else [(20, 1), (600, 1)]):
                torch.manual_seed(1)
                waveform = torch.randn(clips, seconds * RATE) * 30
                with tempfile.TemporaryDirectory() as folder:
                    results = measure(
                        model, waveform if clips > 1 else waveform[0], threads, folder, options.quick
                    )
                print(f"\n{name}, {clips} x {seconds} s, {threads} thread{'s' * (threads > 1)}")
                port = results[0][1]
                for contestant, milliseconds, error in results:
                    real_time = 1e3 * clips * seconds / milliseconds
                    print(
                        f"  {contestant:<24}{milliseconds:9.2f} ms{port / milliseconds:7.1f} x port"
                        f"{real_time:9,.0f} x real time   error {error:.1e}",
                        flush=True,
                    )
                    rows.append((name, threads, clips, seconds, contestant, milliseconds, error))
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
