"""Matplotlib figures without pyplot, so that no global state changes (extra `[plot]`)."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from soundnet_port.errors import SoundNetError, require
from soundnet_port.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")


class PlotError(SoundNetError):
    """A figure that cannot be drawn or written."""


def check_figure_path(path: str | os.PathLike[str]) -> None:
    """Check that a figure could be written to this path, before anything is computed.

    Raises:
        PlotError: the name does not end in .png or .svg.
        MissingExtraError: the extra `[plot]` is not installed.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise PlotError(f"{os.fspath(path)}: unknown picture format; use {' or '.join(SUFFIXES)}")
    require("matplotlib.figure", "plot")


def write_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG or SVG, depending on the suffix; the file appears whole or not at all.

    Raises:
        PlotError: the name does not end in .png or .svg.
        OSError: the file cannot be written.
    """
    check_figure_path(path)
    with atomic_write(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # letters in a name that no font here has
        figure.savefig(temporary, format=Path(path).suffix.lower()[1:], dpi=120)


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches.

    Raises:
        MissingExtraError: the extra `[plot]` is not installed.
    """
    figure: Figure = require("matplotlib.figure", "plot").Figure(
        figsize=(width, height), layout="constrained"
    )
    return figure
