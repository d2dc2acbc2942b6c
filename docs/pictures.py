"""Draw the pictures of these pages, of the released network: docs/static/*.png.

python docs/pictures.py [NAME ...] [--esc10 FOLDER] [--output FOLDER]

Without names all are drawn, without ESC-10 those of the sounds that ship with the package. Pictures of web
pages need Chromium. encoding.png and esc10.png are results of encoding.py and esc10.py in benchmarks/.
"""

from __future__ import annotations

import argparse
import atexit
import csv
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import soundfile
from PIL import Image

import soundnet_port as sp
from soundnet_port.audio.examples import EXAMPLES, medley
from soundnet_port.files import atomic_write
from soundnet_port.viewing.figures import new_figure, write_figure
from soundnet_port.viewing.filter_plots import plot_filters
from soundnet_port.viewing.gallery import write_gallery
from soundnet_port.viewing.spectrograms import LOWEST_FREQUENCY, compute_spectrogram, mel
from soundnet_port.viewing.units import TopSounds, display_label

STATIC = Path(__file__).parent / "static"
COLORS = ("tab:blue", "tab:orange", "tab:green")  # of the example sounds
# the network's answers to the example sounds, and units that the gallery of ESC-10 names after their classes
SCENES = ("beach", "hospital", "sky")
OBJECTS = ("seashore, coast, seacoast, sea-coast", "diaper, nappy, napkin", "warplane, military plane")
UNITS = (251, 365, 120)
UNIT_OF_CONV5 = 43  # that the gallery of ESC-10 shows best


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


def photograph_serve(path: Path) -> None:
    """Photograph the page of `soundnet-port serve`, down to the units, at 23 s of its own example."""
    from playwright.sync_api import sync_playwright

    command = [sys.executable, "-m", "soundnet_port", "serve", "-w", "soundnet8", "--port", "0"]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server,  # noqa: S603
        sync_playwright() as playwright,
    ):
        try:
            assert server.stdout is not None
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox"]
            )
            tab = browser.new_page(viewport={"width": 1120, "height": 1700})
            tab.goto(server.stdout.readline().strip())
            tab.wait_for_selector("#track-scenes", state="attached")
            tab.click("#example")
            tab.wait_for_selector("#downloads:not([hidden])")
            tab.select_option("#layer", "conv7")
            with tab.expect_response(lambda response: "order=similarity" in response.url):
                tab.select_option("#order", "similarity")
            tab.evaluate("document.querySelector('#media').currentTime = 23")
            tab.mouse.move(0, 0)
            tab.wait_for_timeout(500)  # until all is drawn
            bottom = tab.evaluate("document.querySelector('#note').getBoundingClientRect().top")
            clip = {"x": 0, "y": 0, "width": 1120, "height": round(bottom)}
            with atomic_write(path) as temporary:
                tab.screenshot(path=temporary, type="png", clip=clip)
            browser.close()
        finally:
            server.terminate()


@cache
def _build_gallery(esc10: Path) -> tuple[Path, TopSounds]:
    """Return the gallery of conv7's and conv5's units over ESC-10, and its top sounds."""
    folder = Path(mkdtemp(prefix="soundnet-port-"))
    atexit.register(shutil.rmtree, folder)
    result = write_gallery(_load_model(), folder / "units", labels=esc10, table=False)
    return folder / "units", result


def photograph_units(path: Path, esc10: Path) -> None:
    """Photograph the top of the gallery's index."""
    _photograph_gallery(path, esc10, "index.html", "#cards li")


def photograph_unit(path: Path, esc10: Path) -> None:
    """Photograph the top of a unit's page."""
    _photograph_gallery(path, esc10, f"conv5/{UNIT_OF_CONV5}.html", ".sounds > li")


def _photograph_gallery(path: Path, esc10: Path, page: str, items: str) -> None:
    """Photograph a page of the gallery; print the authors to name, if meta.tsv lists the sounds' licenses."""
    from playwright.sync_api import sync_playwright

    folder, result = _build_gallery(esc10)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.goto(f"{folder.as_uri()}/{page}", wait_until="networkidle")
        visible = tab.eval_on_selector_all(
            items,
            "items => items.filter((item) => item.getBoundingClientRect().top < innerHeight)"
            ".map((item, place) => Number(item.dataset.number ?? place))",
        )
        with atomic_write(path) as temporary:
            tab.screenshot(path=temporary, type="png")
        browser.close()
    units = {(unit.layer, unit.number): unit for unit in result.units}
    if page == "index.html":
        sounds = [sound for number in visible for sound in units["conv7", number].sounds[:3]]
    else:
        sounds = [units["conv5", UNIT_OF_CONV5].sounds[place] for place in visible]
    shown = {Path(sound.path).name for sound in sounds}
    if (esc10 / "meta.tsv").is_file():
        with open(esc10 / "meta.tsv", encoding="utf-8") as table:
            rows = [row for row in csv.DictReader(table, delimiter="\t") if row["file"] in shown]
        authors = {f"{row['author']} ({row['freesound_id']})" for row in rows if row["license"] != "CC0"}
        print(f"{path.name}, CC BY: {', '.join(sorted(authors, key=str.lower))}")


def draw_purity(path: Path, esc10: Path) -> None:
    """Draw how many units are named after each class, and how pure units are, beside chance."""
    _, result = _build_gallery(esc10)
    figure = new_figure(9, 3.6)
    bars, *histograms = figure.subplots(1, 3, width_ratios=(1.4, 1, 1))
    classes, random = sorted(result.classes), np.random.default_rng(0)
    label_of = {str(sound.path): sound.label for sound in sp.read_labeled(esc10).sounds}
    for offset, layer, color, axes in zip((-0.2, 0.2), ("conv7", "conv5"), COLORS, histograms, strict=False):
        units = [unit for unit in result.units if unit.layer == layer]
        named = [sum(unit.name is not None and unit.label == label for unit in units) for label in classes]
        print(f"{layer}: named units {dict(zip(classes, named, strict=True))}")
        bars.barh(np.arange(len(classes)) + offset, named, 0.38, color=color, label=layer)
        full = [[sound.path for sound in unit.sounds] for unit in units if len(unit.sounds) == result.top]
        hits = [_count_most(label_of[path] for path in paths) for paths in full]
        chance = []
        for _ in range(100):
            permuted = dict(zip(label_of, random.permutation(list(label_of.values())), strict=True))
            chance += [_count_most(permuted[path] for path in paths) for paths in full]
        edges = np.arange(0.5, result.top + 1)
        axes.hist(hits, edges, color=color, rwidth=0.85)
        weights = np.full(len(chance), len(full) / len(chance))
        axes.hist(chance, edges, weights=weights, histtype="step", color="gray", label="by chance")
        axes.set(xlabel=f"of {result.top} sounds, of one class", xticks=range(1, result.top + 1))
        axes.set_title(f"{layer}: {len(full)} units", loc="left", fontsize="medium")
        axes.legend(frameon=False)
    names = [display_label(label) for label in classes]
    bars.set_yticks(range(len(classes)), names)
    bars.invert_yaxis()
    bars.legend(frameon=False, loc=(0.62, 0.17))
    bars.set_title("units named after a class", loc="left", fontsize="medium")
    for axes in (bars, *histograms):
        axes.spines[["top", "right"]].set_visible(False)
    write_figure(figure, path)


def _count_most(labels: Iterable[str | None]) -> int:
    return Counter(labels).most_common(1)[0][1]


def draw_filters(path: Path) -> None:
    """Draw the first layer's filters, as the command `filters` does."""
    write_figure(plot_filters(_load_model()), path)


# each draws one file, which is created whole or not at all
PICTURES: dict[str, Callable[[Path], None]] = {
    "medley.ogg": write_medley,
    "medley.png": draw_medley,
    "edge-frames.png": draw_edge_frames,
    "filters.png": draw_filters,
    "serve.png": photograph_serve,
}
# these show ESC-10, whose folder is the second argument
ESC10_PICTURES: dict[str, Callable[[Path, Path], None]] = {
    "units-index.png": photograph_units,
    "units-unit.png": photograph_unit,
    "units-purity.png": draw_purity,
}


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
        reduced = image.convert("RGB").quantize(256, kmeans=2)  # without it rare colors change their hue
    with atomic_write(path) as temporary:
        reduced.save(temporary, format="PNG", optimize=True)


if __name__ == "__main__":
    main()
