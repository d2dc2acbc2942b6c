"""Features of one sound, and the specification of the files that a run writes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

METADATA_KEY = "soundnet_port"


@dataclass(frozen=True)
class OutputSpec:
    """What the files of a run contain.

    Attributes:
        widths: numbers in a row, by the layer's name in results.
        pool: "none", or how frames are pooled.
        metadata: network and settings.
        clock: period in seconds and alignment of rows on a clock; None for the network's frames.
        edge_layers: those of the layers that can have edge frames (see `SoundNet.edge_frames`).
        edge_frames: whether edge frames are pooled, or averaged on a clock. Files with all frames always
            contain them, and store their number.
        layers: the layers as requested, by name or module number, in the order of `widths`.
    """

    widths: Mapping[str, int]
    pool: str
    metadata: Mapping[str, Any]
    clock: tuple[float, str] | None = None
    edge_layers: tuple[str, ...] = ()
    edge_frames: bool = True
    layers: tuple[str | int, ...] = ()

    @property
    def all_frames(self) -> bool:
        """Whether rows are the network's frames, all of them."""
        return self.pool == "none" and self.clock is None

    @property
    def timed(self) -> bool:
        """Whether rows have times."""
        return self.pool == "none"

    def metadata_json(self) -> str:
        """Return the metadata as text, for files."""
        return json.dumps(dict(self.metadata), sort_keys=True)


@dataclass(frozen=True)
class Features:
    """Features of one sound.

    Attributes:
        name: of the input, printable.
        arrays: by layer, (frames, width), or (width,) if pooled; float32.
        times: by layer, float64, (frames, 3): start, center and end in seconds; empty if pooled.
        edge_frames: by layer that can have edge frames, how many of the last frames are; empty if pooled.
    """

    name: str
    arrays: Mapping[str, NDArray[Any]]
    times: Mapping[str, NDArray[np.float64]]
    edge_frames: Mapping[str, int] = field(default_factory=dict)

    def named_arrays(self, *, part: bool) -> Iterator[tuple[str, NDArray[Any]]]:
        """Yield all arrays under their names in files; those of a corpus begin with the input's name."""
        prefix = f"{self.name}/" if part else ""
        for layer, values in self.arrays.items():
            yield f"{prefix}{layer}", values
            if layer in self.times:
                yield f"{prefix}{layer}_times", self.times[layer]
            if layer in self.edge_frames:
                yield f"{prefix}{layer}_edge_frames", np.array(self.edge_frames[layer])


def result_key(layer: str | int) -> str:
    """Return a layer's name in results; modules are named as in the original's files."""
    return layer if isinstance(layer, str) else f"layer{layer}"


def printable_name(path: str) -> str:
    """Return a file's name as valid text; undecodable bytes become escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
