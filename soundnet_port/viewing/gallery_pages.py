"""The gallery's pages: what the templates in pages/gallery/ show."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from soundnet_port.network.architecture import SAMPLE_RATE, Layer
from soundnet_port.viewing import curves, spectrograms
from soundnet_port.viewing.curves import Curve, compute_curve, locate_field
from soundnet_port.viewing.excerpts import MIN_SECONDS, Excerpt, Excerpts
from soundnet_port.viewing.gallery_index import write_index_data
from soundnet_port.viewing.spectrograms import mel
from soundnet_port.viewing.units import MAX_P, MIN_SOUNDS, TopSound, TopSounds, Unit, display_label

_TEMPLATES = Path(__file__).parent / "pages" / "gallery"
_PITCH_MARKS = {100: "100 Hz", 1000: "1 kHz", 5000: "5 kHz"}


@dataclass(frozen=True)
class Section:
    """A layer in the index; `named` counts units that are named after a class."""

    layer: Layer
    units: Sequence[Unit]
    active: int
    named: int


@dataclass(frozen=True)
class Figure:
    """A sound on a unit's page.

    Attributes:
        curve: below its picture.
        picture: left edge and width of the excerpt in percent of the window.
        field: left edge and width of what the unit sees at its peak, also.
    """

    sound: TopSound
    excerpt: Excerpt
    curve: Curve
    picture: tuple[float, float]
    field: tuple[float, float]


def write_pages(folder: Path, result: TopSounds, excerpts: Excerpts) -> None:
    """Write the index with its data, and a page for each unit that is not dead."""
    for name in ("gallery.css", "index.js", "unit.js"):
        shutil.copyfile(_TEMPLATES / name, folder / name)
    environment = _create_environment()
    write_index_data(folder, result, excerpts)
    sections = [_build_section(layer, result) for layer in result.layers.values()]
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
    environment.filters |= {"duration": _format_duration, "label": display_label}
    low, high = mel(spectrograms.LOWEST_FREQUENCY), mel(SAMPLE_RATE / 2)
    environment.globals |= {
        "spectrogram": spectrograms,
        "plot": curves,
        "pitch_marks": {
            text: 100 * (mel(hertz) - low) / (high - low) for hertz, text in _PITCH_MARKS.items()
        },
        "highest_frequency": SAMPLE_RATE // 2,
        "min_sounds": MIN_SOUNDS,
        "max_p": MAX_P,
        "min_seconds": MIN_SECONDS,
    }
    return environment


def _build_section(layer: Layer, result: TopSounds) -> Section:
    units = [unit for unit in result.units if unit.layer == layer.name]
    active = sum(not unit.dead for unit in units)
    return Section(layer, units, active, sum(unit.name is not None for unit in units))


def _build_figure(layer: Layer, unit: Unit, sound: TopSound, excerpts: Excerpts) -> Figure:
    excerpt = excerpts[sound.path, unit.layer, sound.frame]
    length = excerpt.window.end - excerpt.window.start
    left, width = locate_field(layer, sound, excerpt)
    return Figure(
        sound,
        excerpt,
        compute_curve(layer, unit, sound, excerpt),
        (
            100 * (excerpt.start - excerpt.window.start) / length,
            100 * (excerpt.end - excerpt.start) / length,
        ),
        (100 * left, 100 * width),
    )


def _list_facts(unit: Unit) -> Mapping[str, Any]:
    facts: dict[str, Any] = {"largest activation": f"{unit.activation:.3g}"}
    if unit.selectivity is not None:
        facts["selectivity"] = f"{unit.selectivity:.2f}"
    if unit.label is not None and unit.enrichment is not None and unit.p is not None:
        facts["purity"] = f"{_format_purity(unit)} {display_label(unit.label)}"
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


def _format_duration(samples: int) -> str:
    seconds = samples / SAMPLE_RATE
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.3g} ms"
