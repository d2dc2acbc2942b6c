"""Draw the pictures of these pages, of the released network: docs/static/*.png.

python docs/pictures.py [NAME ...] [--esc10 FOLDER] [--output FOLDER]

Without names all are drawn, without ESC-10 those of the sounds that ship with the package. Pictures of web
pages need Chromium. encoding.png and esc10.png are results of encoding.py and esc10.py in benchmarks/.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

import soundnet_port as sp
from soundnet_port.audio.examples import EXAMPLES, medley
from soundnet_port.files import atomic_write
from soundnet_port.viewing.figures import new_figure, write_figure
from soundnet_port.viewing.spectrograms import LOWEST_FREQUENCY, compute_spectrogram, mel

STATIC = Path(__file__).parent / "static"
COLORS = ("tab:blue", "tab:orange", "tab:green")  # of the example sounds
# the network's answers to the example sounds, and units that the gallery of ESC-10 names after their classes
SCENES = ("beach", "hospital", "sky")
OBJECTS = ("seashore, coast, seacoast, sea-coast", "diaper, nappy, napkin", "warplane, military plane")
UNITS = (251, 365, 120)


@cache
def _load_model() -> sp.SoundNet:
    return sp.load_pretrained("soundnet8")


def write_medley(path: Path) -> None:
    """Write the sound that the first page plays."""
    with atomic_write(path) as temporary:
        soundfile.write(
            temporary,
            medley().numpy() / 256,
            sp.SAMPLE_RATE,
            format="OGG",
            subtype="VORBIS",
            compression_level=0.8,
        )


def draw_medley(path: Path) -> None:
    """Draw the sound of the first page, its answers over time, and three units of conv7."""
    model, wave = _load_model(), medley()
    seconds = len(wave) / sp.SAMPLE_RATE
    prediction = sp.predict(model, wave, top=1000)
    figure = new_figure(8, 6)
    sound, *panels = figure.subplots(4, 1, sharex=True, height_ratios=(1.5, 1, 1, 1))
    extent = (0, seconds, mel(LOWEST_FREQUENCY), mel(sp.SAMPLE_RATE / 2))
    sound.imshow(compute_spectrogram(wave, len(wave)), aspect="auto", extent=extent, cmap="magma")
    marks = {"100 Hz": 100, "1 kHz": 1000, "5 kHz": 5000}
    sound.set_yticks([mel(hertz) for hertz in marks.values()], list(marks))
    sound.set_title("sound", loc="left", fontsize="medium")
    for number, (name, color) in enumerate(zip(EXAMPLES, COLORS, strict=True)):
        center = (number + 0.5) / len(EXAMPLES)
        sound.text(center, 1.03, name, color=color, ha="center", transform=sound.transAxes)
    centers = np.array([frame.center for frame in prediction.frames])
    for axes, head, labels in zip(panels, ("scenes", "objects"), (SCENES, OBJECTS), strict=False):
        index = {category.label: category.index for category in getattr(prediction, head)}
        percentages = 100 * prediction.heads[head].probabilities.numpy()
        tracks = {label.split(",")[0]: percentages[index[label]] for label in labels}
        _draw_tracks(axes, centers, tracks)
        axes.set(ylim=(0, 33), yticks=(0, 10, 20, 30))
        axes.set_title(f"{head} (probability, %)", loc="left", fontsize="medium")
    frames = model.extract(wave, ["conv7"])["conv7"][0]
    frames = frames[:, : frames.shape[1] - model.edge_frames("conv7", len(wave))]
    times = model.frame_times("conv7", frames.shape[1])[:, 1].numpy()
    _draw_tracks(panels[-1], times, {f"unit {unit}": frames[unit].numpy() for unit in UNITS})
    panels[-1].set(ylim=(0, 0.55), xlim=(0, seconds), xlabel="seconds")
    title = f"three of conv7's {len(frames):,} units (activation)"
    panels[-1].set_title(title, loc="left", fontsize="medium")
    write_figure(figure, path)


def _draw_tracks(axes, times: np.ndarray, tracks: dict[str, np.ndarray]) -> None:
    """Draw a curve for each example sound, labeled at its maximum."""
    for (label, values), color in zip(tracks.items(), COLORS, strict=True):
        axes.plot(times, values, "o-", markersize=3, color=color)
        best = int(values.argmax())
        at = (max(times[best], 2), values[best])
        axes.annotate(label, at, (0, 4), textcoords="offset points", ha="center", color=color)
    axes.spines[["top", "right"]].set_visible(False)


def draw_edge_frames(path: Path) -> None:
    """Draw conv7's norm over time for the example sounds, 20 s of each as in training."""
    model, seconds = _load_model(), 20
    figure = new_figure(8, 3.2)
    axes = figure.subplots()
    for name, color in zip(EXAMPLES, COLORS, strict=True):
        wave = sp.load_audio(sp.example(name)).repeat(4)[: seconds * sp.SAMPLE_RATE]
        norms = model.extract(wave, ["conv7"])["conv7"][0].norm(dim=0).numpy()
        centers = model.frame_times("conv7", len(norms))[:, 1].numpy()
        edge = model.edge_frames("conv7", len(wave))
        times = norms[-1] / np.median(norms[:-edge])
        print(f"{name}: norm of the edge frame {norms[-1]:.1f}, {times:.0f} times the median of the others")
        axes.plot(centers[:-edge], norms[:-edge], "o-", color=color, label=name)
        axes.plot(centers[-edge:], norms[-edge:], "X", color=color, markersize=10, markeredgecolor="black")
    axes.axvline(seconds, color="gray", linestyle=":")
    axes.text(seconds + 0.1, 0.35, "end of the sound", rotation=90, color="gray", fontsize=8)
    axes.annotate(
        "edge frames",
        (centers[-1], norms[-1]),
        (-110, -6),
        textcoords="offset points",
        arrowprops={"arrowstyle": "->"},
    )
    axes.set_yscale("log")
    axes.set_xlim(-1.5, seconds + 2)
    axes.set_xlabel("center of what the frame hears (s)")
    axes.set_ylabel("norm of conv7")
    axes.legend(loc="center left")
    write_figure(figure, path)


# each draws one file, which is created whole or not at all
PICTURES: dict[str, Callable[[Path], None]] = {
    "medley.ogg": write_medley,
    "medley.png": draw_medley,
    "edge-frames.png": draw_edge_frames,
}
# these show ESC-10, whose folder is the second argument
ESC10_PICTURES: dict[str, Callable[[Path, Path], None]] = {}


def main() -> None:
    """Draw pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join([*PICTURES, *ESC10_PICTURES])
    parser.add_argument("names", nargs="*", metavar="NAME", help=names)
    parser.add_argument("--esc10", type=Path, metavar="FOLDER", help="of the data set")
    parser.add_argument("--output", type=Path, metavar="FOLDER", default=STATIC, help="default: docs/static")
    options = parser.parse_args()
    if unknown := set(options.names) - {*PICTURES, *ESC10_PICTURES}:
        parser.error(f"no picture is called {', '.join(sorted(unknown))}")
    if not options.esc10 and (missing := set(options.names) & {*ESC10_PICTURES}):
        parser.error(f"{', '.join(sorted(missing))}: of ESC-10; name its folder with --esc10")
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.names or [*PICTURES, *(ESC10_PICTURES if options.esc10 else ())]:
        path = options.output / name
        if name in PICTURES:
            PICTURES[name](path)
        else:
            ESC10_PICTURES[name](path, options.esc10)
        if path.suffix == ".png":
            _shrink(path)
        print(f"wrote {path}, {path.stat().st_size / 1000:.0f} KB")


def _shrink(path: Path) -> None:
    """Reduce a picture to 256 colors, a third of the bytes."""
    with Image.open(path) as image:
        reduced = image.convert("RGB").quantize(256)
    with atomic_write(path) as temporary:
        reduced.save(temporary, format="PNG", optimize=True)


if __name__ == "__main__":
    main()
