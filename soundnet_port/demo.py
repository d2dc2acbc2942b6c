"""The whole way on any machine: a Torch7 file in, a proof, weights, a sound, its names."""

from __future__ import annotations

import importlib.resources
import tempfile
from pathlib import Path

import numpy as np
import soundfile

from soundnet_port import cli
from soundnet_port.architecture import SAMPLE_RATE


def demo() -> None:
    """Converts the small Torch7 file that comes along, and predicts a sound made here."""
    reference = importlib.resources.files("soundnet_port.conversion").joinpath("demo.t7")
    with tempfile.TemporaryDirectory() as folder, importlib.resources.as_file(reference) as source:
        weights, sound = Path(folder, "demo.safetensors"), Path(folder, "demo.wav")
        _say("1. A small SoundNet, written by Torch7 itself, becomes weights; the proof:")
        code = cli.main(["convert", str(source), "-o", str(weights)])
        _say("2. A sound of 12 seconds: a rising tone, then noise in bursts. What is it?")
        soundfile.write(sound, _sound(), SAMPLE_RATE)
        code = code or cli.main(["predict", str(sound), "--weights", str(weights), "--over-time"])
    if code:
        raise cli.Misuse("the demo failed; the message above says why")
    _say(
        "These are reference weights: the layout is the released one with fewer channels, the\n"
        "parameters are made up, so the categories have no names and the answer no meaning.\n"
        "What it shows is that this installation reads Torch7's files and computes as Torch7 does.\n"
        "\n"
        "For the real thing, MIT's released networks (101 MB, soundnet_models_public.zip):\n"
        "  soundnet-port fetch\n"
        "  soundnet-port predict your_sound.wav"
    )


def _sound() -> np.ndarray:
    seconds = np.arange(12 * SAMPLE_RATE) / SAMPLE_RATE
    tone = np.sin(2 * np.pi * (200 + 150 * seconds) * seconds) * (seconds < 6)
    noise = np.random.default_rng(8).uniform(-1, 1, len(seconds)) * (seconds >= 6) * (seconds % 1 < 0.4)
    return np.asarray(0.5 * (tone + noise), np.float32)


def _say(text: str) -> None:
    print(f"\n{text}\n", flush=True)
