"""Geometry of the plots of a unit's activation over time, which are SVG in a page."""

from __future__ import annotations

from dataclasses import dataclass

from soundnet_port.network.architecture import SAMPLE_RATE, Layer
from soundnet_port.viewing.excerpts import Excerpt
from soundnet_port.viewing.units import TopSound, Unit

WIDTH, HEIGHT = 320, 96
LEFT, RIGHT, TOP, BOTTOM = 34, WIDTH - 8, 8, HEIGHT - 30  # the plot's edges


@dataclass(frozen=True)
class Curve:
    """A plot of a unit's activation around its peak in a sound, in SVG coordinates.

    Attributes:
        points: (x, y) of each frame.
        peak: (x, y) of the peak.
        field: left edge and width of the receptive field at the peak.
        ticks: (x, text) of three times.
    """

    points: list[tuple[float, float]]
    peak: tuple[float, float]
    field: tuple[float, float]
    ticks: list[tuple[float, str]]


def compute_curve(layer: Layer, unit: Unit, sound: TopSound, excerpt: Excerpt) -> Curve:
    """Compute the plot of a sound; all plots of a unit have the same vertical scale."""
    center = (layer.start + layer.receptive_field / 2) / SAMPLE_RATE
    step = layer.stride / SAMPLE_RATE
    seconds = layer.receptive_field / SAMPLE_RATE
    begin, end = sound.peak - 1.5 * seconds, sound.peak + 1.5 * seconds

    def x(time: float) -> float:
        return LEFT + (RIGHT - LEFT) * (time - begin) / (end - begin)

    def y(activation: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * activation / unit.activation

    frames = [
        (center + step * (excerpt.first_frame + number), activation)
        for number, activation in enumerate(excerpt.curves[unit.number])
    ]
    ticks = (begin + seconds / 2, sound.peak, end - seconds / 2)
    return Curve(
        [(x(time), y(activation)) for time, activation in frames if begin <= time <= end],
        (x(sound.peak), y(sound.activation)),
        (x(sound.peak - seconds / 2), x(seconds) - x(0)),
        [(x(time), _format_time(time, seconds)) for time in ticks],
    )


def _format_time(time: float, receptive_field: float) -> str:
    digits = 1 if receptive_field > 1 else 2 if receptive_field > 0.1 else 4
    return f"{time:.{digits}f}".replace("-", "\N{MINUS SIGN}")
