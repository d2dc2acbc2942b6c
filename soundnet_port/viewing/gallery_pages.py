"""The gallery's pages: what the templates in pages/gallery/ show."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from soundnet_port.network.architecture import SAMPLE_RATE, Layer
from soundnet_port.viewing import curves, spectrograms
from soundnet_port.viewing.curves import Curve, compute_curve
from soundnet_port.viewing.excerpts import Excerpt, Excerpts
from soundnet_port.viewing.spectrograms import mel
from soundnet_port.viewing.units import TopSound, TopSounds, Unit, frame_window

_TEMPLATES = Path(__file__).parent / "pages" / "gallery"
_PITCH_MARKS = {100: "100 Hz", 1000: "1 kHz", 5000: "5 kHz"}


@dataclass(frozen=True)
class Card:
    """A unit in the index.

    Attributes:
        words: that the search looks at, in lower case.
        pictures: of the strongest sounds.
        facts: a few words each.
    """

    unit: Unit
    words: str
    pictures: Sequence[str]
    facts: Sequence[str]


@dataclass(frozen=True)
class Section:
    """A layer in the index."""

    layer: Layer
    cards: Sequence[Card]
    dead: Sequence[int]


@dataclass(frozen=True)
class Figure:
    """A sound on a unit's page; `left` and `width` of its excerpt are percentages of the receptive field."""

    sound: TopSound
    excerpt: Excerpt
    curve: Curve
    left: float
    width: float


def write_pages(folder: Path, result: TopSounds, excerpts: Excerpts) -> None:
    """Write index.html and a page for each unit that is not dead."""
    for name in ("gallery.css", "gallery.js"):
        shutil.copyfile(_TEMPLATES / name, folder / name)
    environment = _create_environment()
    sections = [
        _build_section(result.layers[layer], list(units), excerpts)
        for layer, units in groupby(result.units, lambda unit: unit.layer)
    ]
    index = environment.get_template("index.html")
    (folder / "index.html").write_text(index.render(result=result, sections=sections), "utf-8")
    for name in result.layers:
        (folder / name).mkdir()
    template = environment.get_template("unit.html")
    units = [unit for unit in result.units if not unit.dead]
    for previous, unit, following in zip([None, *units], units, [*units[1:], None], strict=False):
        layer = result.layers[unit.layer]
        page = template.render(
            result=result,
            layer=layer,
            unit=unit,
            previous=previous,
            following=following,
            facts=_list_facts(unit),
            figures=[_build_figure(layer, unit, sound, excerpts) for sound in unit.sounds],
        )
        (folder / unit.layer / f"{unit.number}.html").write_text(page, "utf-8")


def _create_environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"duration": _format_duration, "label": _format_label, "digits": _format_digits}
    low, high = mel(spectrograms.LOWEST_FREQUENCY), mel(SAMPLE_RATE / 2)
    environment.globals |= {
        "spectrogram": spectrograms,
        "plot": curves,
        "pitch_marks": {
            text: 100 * (mel(hertz) - low) / (high - low) for hertz, text in _PITCH_MARKS.items()
        },
        "highest_frequency": SAMPLE_RATE // 2,
    }
    return environment


def _build_section(layer: Layer, units: Sequence[Unit], excerpts: Excerpts) -> Section:
    return Section(
        layer,
        [_build_card(unit, excerpts) for unit in units if not unit.dead],
        [unit.number for unit in units if unit.dead],
    )


def _build_card(unit: Unit, excerpts: Excerpts) -> Card:
    words = {str(unit.number), *(sound.name for sound in unit.sounds)}
    words |= {_format_label(sound.label) for sound in unit.sounds if sound.label}
    facts = []
    if unit.purity is not None:
        purity = _format_purity(unit)
        facts.append(purity if unit.name else f"{purity} {_format_label(unit.label)}")
    if unit.selectivity is not None:
        facts.append(f"selectivity {unit.selectivity:.2f}")
    pictures = [excerpts[sound.path, unit.layer, sound.frame].picture for sound in unit.sounds[:3]]
    return Card(unit, "\n".join(sorted(words)).lower(), pictures, facts)


def _build_figure(layer: Layer, unit: Unit, sound: TopSound, excerpts: Excerpts) -> Figure:
    excerpt = excerpts[sound.path, unit.layer, sound.frame]
    start, _ = frame_window(layer, sound.frame)
    left = 100 * (sound.start - start / SAMPLE_RATE) * SAMPLE_RATE / layer.receptive_field
    width = 100 * (sound.end - sound.start) * SAMPLE_RATE / layer.receptive_field
    return Figure(sound, excerpt, compute_curve(layer, unit, sound, excerpt), left, width)


def _list_facts(unit: Unit) -> Mapping[str, Any]:
    facts: dict[str, Any] = {"largest activation": f"{unit.activation:.3g}"}
    if unit.selectivity is not None:
        facts["selectivity"] = f"{unit.selectivity:.2f}"
    if unit.purity is not None and unit.enrichment is not None and unit.p is not None:
        facts["purity"] = f"{_format_purity(unit)} {_format_label(unit.label)}"
        facts["enrichment"] = Markup("{:.1f} times, p = {}").format(
            unit.enrichment, _format_probability(unit.p)
        )
    return facts


def _format_purity(unit: Unit) -> str:
    count = len(unit.sounds)
    return f"{round((unit.purity or 0) * count)} of {count}"


def _format_probability(value: float) -> str:
    if value >= 0.01:
        return f"{value:.2f}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return Markup("{} &times; 10<sup>\N{MINUS SIGN}{}</sup>").format(mantissa, -int(exponent))


def _format_label(label: str | None) -> str:
    return (label or "").replace("_", " ")


def _format_digits(value: float | None) -> str:
    """Format with six significant digits, for sorting; nothing for None."""
    return "" if value is None else f"{value:.6g}"


def _format_duration(samples: int) -> str:
    seconds = samples / SAMPLE_RATE
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.3g} ms"
