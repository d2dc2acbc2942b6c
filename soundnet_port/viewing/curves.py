"""Geometry of a unit's pictures and curves, which share the axis of time; curves are SVG in a page."""

from __future__ import annotations

import math
from dataclasses import dataclass

from soundnet_port.network.architecture import SAMPLE_RATE, Layer
from soundnet_port.viewing.excerpts import Excerpt
from soundnet_port.viewing.units import TopSound, Unit, frame_window

WIDTH, HEIGHT = 320, 96
LEFT, RIGHT, TOP, BOTTOM = 34, WIDTH - 8, 8, HEIGHT - 30  # the plot's edges
_MAX_DOTS = 60  # more would touch


@dataclass(frozen=True)
class Curve:
    """A plot of a unit's activation around its peak in a sound, in SVG coordinates.

    Attributes:
        points: (x, y) of each frame, or of the maximum of some.
        dotted: whether frames are far enough apart for dots.
        peak: (x, y) of the peak.
        field: left edge and width of the receptive field at the peak.
        ticks: (x, text) of round times.
    """

    points: list[tuple[float, float]]
    dotted: bool
    peak: tuple[float, float]
    field: tuple[float, float]
    ticks: list[tuple[float, str]]


def compute_curve(layer: Layer, unit: Unit, sound: TopSound, excerpt: Excerpt) -> Curve:
    """Compute the plot of a sound; all plots of a unit have the same vertical scale."""
    center, step = layer.center / SAMPLE_RATE, layer.stride / SAMPLE_RATE
    begin, end = excerpt.window.start / SAMPLE_RATE, excerpt.window.end / SAMPLE_RATE

    def x(time: float) -> float:
        return LEFT + (RIGHT - LEFT) * (time - begin) / (end - begin)

    def y(activation: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * min(1.0, activation / unit.activation)

    points = []
    for number, activation in enumerate(excerpt.curves[unit.number]):
        frame = excerpt.first_frame + excerpt.frame_step * number + (excerpt.frame_step - 1) / 2
        time = center + step * frame
        if begin <= time <= end:
            points.append((x(time), y(activation)))
    left, width = locate_field(layer, sound, excerpt)
    return Curve(
        points,
        len(points) <= _MAX_DOTS,
        (x(sound.peak), y(sound.activation)),
        (LEFT + (RIGHT - LEFT) * left, (RIGHT - LEFT) * width),
        [(x(time), text) for time, text in _place_ticks(begin, end)],
    )


def locate_field(layer: Layer, sound: TopSound, excerpt: Excerpt) -> tuple[float, float]:
    """Return left edge and width of the receptive field at the peak, as shares of the excerpt's window."""
    start, end = frame_window(layer, sound.frame)
    window = excerpt.window
    start, end = max(start, window.start), min(end, window.end)
    length = window.end - window.start
    return (start - window.start) / length, (end - start) / length


def _place_ticks(begin: float, end: float) -> list[tuple[float, str]]:
    step = 1.0 if end - begin > 2 else 0.5
    while (end - begin) / step > 7:
        step *= 2
    first = math.ceil(max(0.0, begin + 0.02 * (end - begin)) / step)
    last = math.floor((end - 0.02 * (end - begin)) / step)
    return [(number * step, f"{number * step:g}") for number in range(first, last + 1)]
