"""Damage real files at random and feed them to everything that reads untrusted files.

    python benchmarks/fuzz.py t7=50000 ports=10000 weights=20000 sound=15000 uploads=5000 [--seed 1]

Each target runs in a separate process with limited memory. Only our own exceptions may be raised, within a
time limit, and accepted files must be valid; if a process dies, hangs or raises another exception, its input
is kept and the campaign fails. Prints for each target how many inputs were accepted and refused, the slowest,
and the share of the reading modules' lines that was executed (by the package coverage).
"""

import argparse
import faulthandler
import io
import multiprocessing
import queue
import random
import resource
import signal
import struct
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import numpy as np

CHECKOUT = Path(__file__).resolve().parent.parent
TIME_LIMIT = 10  # seconds for one input
MEMORY = 8 << 30  # of address space; torch alone takes about 2 GiB
INTEGERS = [-1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 64, 255, 2**16, 2**31 - 1, -(2**31)]
LONGS = [-1, 0, 1, 2**31, 2**40, 2**62, -(2**63)]
EDGE = 6_000  # bytes at either end, where the structure of most formats is


def damage(data: bytes, rng: random.Random) -> bytes:
    """Overwrite, cut out, insert or swap bytes in a few positions, or cut the file short."""
    out = bytearray(data)
    near = rng.choice(("start", "start", "start", "end", "anywhere"))  # numbers are less worth damaging

    def position() -> int:
        if near == "start":
            return rng.randrange(min(EDGE, len(out)))
        return rng.randrange(max(0, len(out) - EDGE) if near == "end" else 0, len(out))

    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at, kind = position(), rng.randrange(8)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at : at + 4] = struct.pack(rng.choice("<>") + "i", rng.choice(INTEGERS))
        elif kind == 2:
            out[at : at + 8] = struct.pack(rng.choice("<>") + "q", rng.choice(LONGS))
        elif kind == 3:
            del out[at : at + rng.choice((1, 4, 8, 100))]
        elif kind == 4:
            out[at:at] = rng.randbytes(rng.choice((1, 4, 8)))
        elif kind == 5:
            other = position()
            out[at : at + 16], out[other : other + 16] = out[other : other + 16], out[at : at + 16]
        elif kind == 6:
            out[at] = rng.randrange(256)
        else:
            del out[rng.randrange(len(out)) :]
        if not out:
            return b""
    return bytes(out)


# ---- targets: files to damage, and a reader that returns whether it accepts one


def t7():
    """The reader of Torch7's files, and every 500th time a conversion with its parity check."""
    from soundnet_port.conversion import t7_objects
    from soundnet_port.conversion.convert import ConversionError, convert, verify
    from soundnet_port.conversion.t7 import members, parse_t7

    paths = [CHECKOUT / "conversion" / "demo.t7", *sorted((CHECKOUT / "tests" / "reference").glob("*.t7"))]
    count = 0

    def read(path, data):
        nonlocal count
        count += 1
        try:
            root = parse_t7("fuzz", io.BytesIO(data), len(data)).root
            stack, seen = [root], set()
            while stack:
                value = stack.pop()
                if id(value) in seen:
                    continue
                seen.add(id(value))
                if isinstance(value, t7_objects.Tensor):
                    value.array()
                elif isinstance(value, t7_objects.LuaObject):
                    stack.append(value.fields)
                elif isinstance(value, dict):
                    stack += [*value, *value.values()]
            if count % 500 == 0 and members(path) == [None]:
                weights = path.with_suffix(".safetensors")
                (result,) = convert(path, weights, force=True)
                if not isinstance(result, ConversionError):
                    verify(weights, path)
        except (t7_objects.T7Error, ConversionError):
            return False
        return True

    return [(path.read_bytes(), ".t7") for path in paths], read


def network():
    """Return a narrow SoundNet's architecture and state dict."""
    import torch

    import soundnet_port as sp

    torch.manual_seed(0)
    architecture = sp.SOUNDNET8.resized([2, 2, 2, 4, 4, 4, 4], {"objects": 5, "scenes": 3})
    state = sp.SoundNet(architecture).state_dict()
    return architecture, {name: tensor for name, tensor in state.items() if "batches" not in name}


def ports():
    """The readers of sound8.npy and of PyTorch's state dicts."""
    import torch

    from soundnet_port.conversion.convert import ConversionError
    from soundnet_port.conversion.ports import read_port

    sys.path.insert(0, str(CHECKOUT / "tests"))
    from support.port_writer import modern_npy, port_state_dict, python2_npy, tensorflow_layers

    _, state = network()
    files = [(python2_npy(tensorflow_layers(state)), ".npy"), (modern_npy(tensorflow_layers(state)), ".npy")]
    for zipped in (True, False):
        buffer = io.BytesIO()
        torch.save(port_state_dict(state, str), buffer, _use_new_zipfile_serialization=zipped)
        files.append((buffer.getvalue(), ".pth"))

    def read(path, data):
        try:
            read_port(path)
        except ConversionError:
            return False
        return True

    return files, read


def weights():
    """The loader of our weights; all that it accepts must be loadable networks."""
    from soundnet_port.network.weights import WeightsError, write_weights
    from soundnet_port.pretrained import load_pretrained

    architecture, state = network()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "small.safetensors")
        write_weights(path, architecture, state, {"converter": "fuzz"})
        content = path.read_bytes()

    def read(path, data):
        try:
            load_pretrained(path)
        except WeightsError:
            return False
        return True

    return [(content, ".safetensors")], read


def sound():
    """The audio front end, with the formats of soundfile and PyAV."""
    import av
    import soundfile

    from soundnet_port.audio.loading import AudioError, load_audio

    wave = (np.random.default_rng(0).normal(0, 0.1, (4410, 2))).clip(-1, 1)
    kinds = "wav WAV PCM_16,wav WAV FLOAT,wav WAVEX PCM_24,wav RF64 PCM_16,w64 W64 PCM_16,flac FLAC PCM_16"
    kinds += (
        ",ogg OGG VORBIS,opus OGG OPUS,mp3 MP3 MPEG_LAYER_III,aiff AIFF PCM_16,au AU PCM_16,caf CAF PCM_16"
    )
    files = []
    for kind in kinds.split(","):
        suffix, form, coding = kind.split()
        buffer = io.BytesIO()
        soundfile.write(buffer, wave, 48_000 if suffix == "opus" else 44_100, format=form, subtype=coding)
        files.append((buffer.getvalue(), f".{suffix}"))
    for form, codec, rate in (
        ("mp4", "aac", 44_100),
        ("webm", "libopus", 48_000),
        ("matroska", "flac", 44_100),
    ):
        buffer = io.BytesIO()
        with av.open(buffer, "w", format=form) as out:
            stream = out.add_stream(codec, rate=rate, layout="mono")
            samples = np.ascontiguousarray((wave[:, :1].T * 32767).astype("int16"))
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            frame.sample_rate = rate
            out.mux(stream.encode(frame))
            out.mux(stream.encode())
        files.append((buffer.getvalue(), f".{form}"))

    def read(path, data):
        try:
            waveform = load_audio(path)
        except AudioError:
            return False
        assert waveform.ndim == 1
        assert len(waveform) > 0
        assert float(waveform.abs().max()) < 1024, "more than resampling overshoots"
        return True

    return files, read


def uploads():
    """The page of `serve`, over HTTP, with the server in the same process."""
    from serve import Site

    from soundnet_port.pretrained import load_pretrained
    from soundnet_port.viewing.web_server import serve

    addresses: queue.SimpleQueue[str] = queue.SimpleQueue()
    settings = {"port": 0, "on_ready": addresses.put}
    threading.Thread(target=serve, args=(load_pretrained("demo"),), kwargs=settings, daemon=True).start()
    ask = Site(addresses.get(timeout=60), None).ask

    def read(path, data):
        url = f"/sounds/{ask('POST', f'/sounds?name={path.name}', data)['id']}"
        while (view := ask("GET", url))["state"] not in ("done", "failed"):
            time.sleep(0.005)
        if view["state"] == "failed":
            assert view["error"].startswith(f"{path.name}: "), view["error"]
            assert "could not be computed" not in view["error"], view["error"]
        else:
            for page in ("results.json", "activations?layer=conv7"):
                ask("GET", f"{url}/{page}")
        ask("DELETE", url)
        return view["state"] == "done"

    return sound()[0], read


TARGETS = {target.__name__: target for target in (t7, ports, weights, sound, uploads)}
MODULES = {
    "t7": ["conversion/t7.py", "conversion/t7_binary.py", "conversion/t7_ascii.py"],
    "ports": [f"conversion/{name}.py" for name in ("port_files", "port_networks", "unpickling")],
    "weights": ["soundnet_port/network/weights.py"],
    "sound": ["soundnet_port/audio/loading.py"],
    "uploads": [f"soundnet_port/viewing/{name}.py" for name in ("web_app", "session", "session_store")],
}


# ---- campaign


def run_campaign(name, count, seed, folder, results):
    """Run a target and send its result; an input that ends the process stays in the folder."""
    import coverage

    faulthandler.enable(open(Path(folder, "crash.txt"), "w"))  # noqa: SIM115
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    modules = MODULES[name]
    tracer = coverage.Coverage(data_file=None, include=[str(CHECKOUT / module) for module in modules])
    tracer.start()
    files, read = TARGETS[name]()
    for data, suffix in files:
        path = Path(folder, f"undamaged{suffix}")
        path.write_bytes(data)
        assert read(path, data), f"{path}: refused undamaged"
    rng = random.Random(f"{name} {seed}")
    accepted, slowest = 0, 0.0
    for number in range(count):
        undamaged, suffix = rng.choice(files)
        data = damage(undamaged, rng)
        path = Path(folder, f"{name}-{seed}{suffix}")
        path.write_bytes(data)
        if number == 200:  # little is new by now, and tracing is slow
            tracer.stop()
        signal.alarm(TIME_LIMIT)
        start = time.monotonic()
        accepted += read(path, data)
        slowest = max(slowest, time.monotonic() - start)
        signal.alarm(0)
        path.unlink()
    tracer.stop()
    lines = {Path(module).name: tracer.analysis2(str(CHECKOUT / module)) for module in modules}
    reached = ", ".join(
        f"{module} {1 - len(missing) / len(statements):.0%}"
        for module, (_, statements, _, missing, _) in lines.items()
    )
    results.send(
        f"{name}: {count:,} inputs (seed {seed}): {accepted:,} accepted, {count - accepted:,} refused; "
        f"slowest {slowest:.2f} s; lines reached: {reached}"
    )


def main() -> int:
    """Run the targets in turn; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="+", metavar="TARGET=COUNT", help=", ".join(TARGETS))
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    failed = 0
    for target in options.targets:
        name, _, count = target.partition("=")
        folder = tempfile.mkdtemp(prefix=f"fuzz-{name}-")
        receiver, sender = multiprocessing.Pipe()
        arguments = (name, int(count), options.seed, folder, sender)
        process = multiprocessing.get_context("spawn").Process(target=run_campaign, args=arguments)
        process.start()
        process.join()
        if process.exitcode == 0:
            print(receiver.recv(), flush=True)
        else:
            failed += 1
            print(f"{name}: ended with {process.exitcode}; its input is in {folder}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
