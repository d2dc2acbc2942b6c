"""The gallery's index: its units as compact data for index.js, and small pictures of them in sheets.

A card has small pictures of its unit's three strongest sounds: a strip. The strips of 60 units are one file,
since a browser opens a few large files faster than hundreds of small ones.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from soundnet_port.errors import require
from soundnet_port.network.architecture import SAMPLE_RATE, Layer
from soundnet_port.viewing.excerpts import Excerpt, Excerpts
from soundnet_port.viewing.units import TopSound, TopSounds, Unit, display_label, frame_window

STRIPS = 60  # of a sheet; also the units of a page of the index
_PICTURES = 3  # of a strip
_WIDTH, _HEIGHT = 112, 56  # pixels of one of them
_MIN_SAMPLES = SAMPLE_RATE  # that one shows, around a shorter receptive field
_QUALITY = 80  # of JPEG


def write_index_data(folder: Path, result: TopSounds, excerpts: Excerpts) -> None:
    """Write units.js, which index.html loads, and sheets/.

    It is a script, since pages opened as files may not read other files. Names are JSON strings in it, and
    index.js shows them as text.
    """
    (folder / "sheets").mkdir()
    classes = sorted({display_label(label) for label in result.classes})
    names = sorted({(sound.name, sound.label) for unit in result.units for sound in unit.sounds})
    positions = {sound: position for position, sound in enumerate(names)}
    layers = []
    for name, layer in result.layers.items():
        units = [unit for unit in result.units if unit.layer == name]
        active = [unit for unit in units if not unit.dead]
        for start in range(0, len(active), STRIPS):
            path = folder / "sheets" / f"{name}-{start // STRIPS}.jpg"
            _write_sheet(path, folder, layer, active[start : start + STRIPS], excerpts)
        cards = []
        for unit in active:
            sounds = [positions[sound.name, sound.label] for sound in unit.sounds]
            cards.append([*_describe_unit(unit, classes), sounds])
        layers.append({"name": name, "units": cards, "dead": [unit.number for unit in units if unit.dead]})
    data = {
        "sounds": result.sound_count,
        "top": result.top,
        "strips": STRIPS,
        "classes": classes,
        "files": [name for name, _ in names],
        "file_classes": [classes.index(display_label(label)) if label else -1 for _, label in names],
        "layers": layers,
    }
    content = json.dumps(data, separators=(",", ":"))
    (folder / "units.js").write_text(f"globalThis.unitGallery = {content};\n", "utf-8")


def _describe_unit(unit: Unit, classes: Sequence[str]) -> list[Any]:
    """Return number, activation, selectivity, class, sounds of that class, p, and whether it has a name."""
    digits = [None if value is None else float(f"{value:.6g}") for value in (unit.selectivity, unit.p)]
    return [
        unit.number,
        float(f"{unit.activation:.6g}"),
        digits[0],
        -1 if unit.label is None else classes.index(display_label(unit.label)),
        round((unit.purity or 0) * len(unit.sounds)),
        digits[1],
        int(unit.name is not None),
    ]


def _write_sheet(path: Path, folder: Path, layer: Layer, units: Sequence[Unit], excerpts: Excerpts) -> None:
    """Write the strips of units, one below the other."""
    image = require("PIL.Image", "plot")
    sheet = image.new("RGB", (_PICTURES * _WIDTH, len(units) * _HEIGHT))
    for row, unit in enumerate(units):
        for column, sound in enumerate(unit.sounds[:_PICTURES]):
            excerpt = excerpts[sound.path, layer.name, sound.frame]
            with image.open(folder / excerpt.picture) as picture:
                left, right = _crop(layer, sound, excerpt)
                box = (left * picture.width, 0, right * picture.width, picture.height)
                small = picture.convert("RGB").resize((_WIDTH, _HEIGHT), image.Resampling.BILINEAR, box)
            sheet.paste(small, (column * _WIDTH, row * _HEIGHT))
    sheet.save(path, quality=_QUALITY)


def _crop(layer: Layer, sound: TopSound, excerpt: Excerpt) -> tuple[float, float]:
    """Return the edges of what a small picture shows, as shares of the excerpt's picture."""
    start, end = frame_window(layer, sound.frame)
    extra = max(0, _MIN_SAMPLES - layer.receptive_field) // 2
    samples = excerpt.end - excerpt.start
    left = max(0.0, (start - extra - excerpt.start) / samples)
    right = min(1.0, (end + extra - excerpt.start) / samples)
    return left, max(right, left + 0.01)
