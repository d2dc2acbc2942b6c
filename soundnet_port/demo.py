"""The whole way on any machine: a Torch7 file in, a proof, weights; and a sound named by a network."""

from __future__ import annotations

import importlib.resources
import tempfile
from pathlib import Path

import numpy as np
import soundfile

from soundnet_port import cli
from soundnet_port.architecture import SAMPLE_RATE


def demo() -> None:
    """Converts the small Torch7 file that comes along, and names a sound made here."""
    reference = importlib.resources.files("soundnet_port.conversion").joinpath("demo.t7")
    with tempfile.TemporaryDirectory() as folder, importlib.resources.as_file(reference) as source:
        weights, sound = Path(folder, "reference.safetensors"), Path(folder, "demo.wav")
        _say("1. A small SoundNet, written by Torch7 itself, becomes weights; the proof:")
        code = cli.main(["convert", str(source), "-o", str(weights)])
        _say(
            "2. A sound of 25 seconds: something crows three times, then waves roll in. What is it?\n"
            "   (A small network that comes along answers; it was trained on 320 clips of ten classes.)"
        )
        soundfile.write(sound, crowing_and_waves(), SAMPLE_RATE)
        command = ["predict", str(sound), "--weights", "demo", "--over-time", "--top", "4"]
        code = code or cli.main(command)
    if code:
        raise cli.Misuse("the demo failed; the message above says why")
    _say(
        "The first network's parameters are made up: it shows that this installation reads Torch7's\n"
        "files and computes as Torch7 does. The second one is real, but small: try it on a dog, rain,\n"
        "a rooster, the sea, a baby, a clock, a sneeze, a helicopter, a chain saw, or a fire:\n"
        "  soundnet-port predict your_sound.wav --weights demo\n"
        "\n"
        "For all 1000 objects and 401 scenes, MIT's released networks (101 MB):\n"
        "  soundnet-port fetch\n"
        "  soundnet-port predict your_sound.wav"
    )


def crowing_and_waves() -> np.ndarray:
    """25 seconds, within +-1.

    Crowing, a tone with overtones that rises and falls; and noise that swells, as waves do.
    """
    seconds = np.arange(25 * SAMPLE_RATE) / SAMPLE_RATE
    noise = np.random.default_rng(3).normal(size=len(seconds))
    deep = np.convolve(noise, 0.9 ** np.arange(60) * 0.1, "same")
    swell = 0.3 + 0.7 * np.clip(np.sin(2 * np.pi * seconds / 6), 0, 1) ** 2
    made = np.where(seconds < 12, 0.001 * noise, 0.4 * swell * (0.7 * deep + 0.15 * noise))
    crow = np.arange(int(1.4 * SAMPLE_RATE)) / SAMPLE_RATE
    phase = 2 * np.pi * np.cumsum(500 + 400 * np.sin(np.pi * crow / 1.4)) / SAMPLE_RATE
    tone = sum((np.sin(k * phase) / k for k in range(1, 8)), start=np.zeros(len(crow)))
    for begin in (1, 5, 9):
        made[begin * SAMPLE_RATE :][: len(crow)] += 0.2 * tone * np.sqrt(np.sin(np.pi * crow / 1.4))
    return np.asarray(made, np.float32)


def _say(text: str) -> None:
    print(f"\n{text}\n", flush=True)
