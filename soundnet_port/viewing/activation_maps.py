"""A sound's layers as maps of units over time: maxima while it is analyzed, orders, and scales of color."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from soundnet_port.inference.alignment import first_edge
from soundnet_port.network.architecture import SAMPLE_RATE, Architecture, Layer
from soundnet_port.viewing.summaries import MaxEnvelope, encode_levels

MAX_COLUMNS = 1500
_SCALE_PERCENTILE = 99.5  # of the values above 0: a few units of conv7 are ten times as active as the others


class ActivationMaps:
    """The maps of all layers but the heads.

    Args:
        architecture: of the network.
        min_samples: the least that is analyzed; shorter sounds are repeated.
        edge_frames: keep edge frames.
    """

    def __init__(self, architecture: Architecture, min_samples: int, edge_frames: bool) -> None:
        self._edge_frames = edge_frames
        self._sources = select_sources(architecture, 2 * min_samples / (MAX_COLUMNS + 1))
        self._growing = {layer.name: _GrowingMap(layer) for layer in self._sources.values()}
        self._final: dict[str, dict[str, Any]] = {}

    @property
    def layers(self) -> list[str]:
        """The layers whose frames are wanted."""
        return list({layer.name: None for layer in self._sources.values()})

    def add(self, layer: str, frames: Tensor, edge_frames: int) -> None:
        """Add a layer's next frames, `(channels, frames)`, of which the last ones may be edge frames."""
        self._growing[layer].add(frames.numpy(), edge_frames, self._edge_frames)

    def limit(self, samples: int) -> None:
        """Keep only frames that begin in the first samples, for a sound that is repeated."""
        for growing in self._growing.values():
            growing.limit = max(1, math.ceil((samples - growing.start) / growing.layer.stride))

    def finish(self) -> None:
        """Build the maps in a form that takes a quarter of the memory; others may read them meanwhile."""
        self._final = {name: growing.build() for name, growing in self._growing.items()}
        self._growing = {}

    def get(self, layer: str) -> dict[str, Any]:
        """Return a layer's map as plain types, with the levels as base64.

        `levels`, `(units, columns)`, are square roots of values: 255 is `largest`, the largest of ordinary
        frames, to which edge frames are clipped. `scale` is the value where the colors should end. Columns
        of `step` seconds begin at `start`, edge frames at `edge_start` (None if the layer has none), whether
        they are kept or not. `inactive` counts the units that are never above 0.
        """
        activation_map = self._build(layer)
        levels: np.ndarray = activation_map.pop("levels")
        return activation_map | {"levels": encode_levels(levels)}

    def order(self, layer: str, criterion: str) -> list[int]:
        """Return the units that are ever above 0, in the order of a criterion, one of `ORDERS`."""
        levels: np.ndarray = self._build(layer)["levels"]
        active = np.flatnonzero(levels.any(1))
        if len(active) > 1:
            active = active[ORDERS[criterion](levels[active].astype(np.float32) / 255)]
        units: list[int] = active.tolist()
        return units

    def _build(self, layer: str) -> dict[str, Any]:
        growing, source = self._growing, self._sources[layer].name  # before `final`, which is set first
        final = self._final
        return dict(final[source]) if final else growing[source].build()


class _GrowingMap:
    """Maxima of a layer over time, and how many frames they are of."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.maxima = MaxEnvelope(layer.channels, MAX_COLUMNS)
        # of the first column, in samples: frames are drawn around their centers
        self.start = first_edge(layer)
        self.limit: int | None = None  # frames that are kept; edge frames come later
        self.ordinary_frames = self.edge_frames = 0
        self.largest = 0.0  # without edge frames, which would hide all others

    def add(self, frames: np.ndarray, edge_frames: int, keep_edge_frames: bool) -> None:
        if self.limit is not None:
            frames, edge_frames = frames[:, : self.limit - self.ordinary_frames], 0
        ordinary = frames[:, : frames.shape[1] - edge_frames]
        self.maxima.add(frames if keep_edge_frames else ordinary)
        self.ordinary_frames += ordinary.shape[1]
        self.edge_frames = edge_frames
        if ordinary.size:
            self.largest = max(self.largest, float(ordinary.max()))

    def build(self) -> dict[str, Any]:
        layer, width, values = self.layer, self.maxima.width, self.maxima.values
        # a column that begins with an ordinary frame is one, but for its maximum if it has an edge frame too
        ordinary = values[:, : self.ordinary_frames // width]
        positive = ordinary[ordinary > 0]
        scale = float(np.percentile(positive, _SCALE_PERCENTILE)) if positive.size else self.largest
        levels = np.round(255 * np.sqrt(np.clip(values / (self.largest or 1), 0, 1))).astype(np.uint8)
        start = self.start / SAMPLE_RATE
        edge_start = start + self.ordinary_frames * layer.stride / SAMPLE_RATE
        return {
            "units": layer.channels,
            "columns": values.shape[1],
            "start": start,
            "step": width * layer.stride / SAMPLE_RATE,
            "largest": self.largest,
            "scale": min(scale, self.largest),
            "inactive": int((~(values > 0).any(1)).sum()),
            "edge_frames": self.edge_frames,
            "edge_start": edge_start if self.edge_frames else None,
            "levels": levels,
        }


def _sort_by_mean(values: np.ndarray) -> np.ndarray:
    """Sort units, `(units, columns)` of square roots, the most active on average first."""
    return np.argsort(-np.square(values).mean(1), kind="stable")


def _sort_by_peak(values: np.ndarray) -> np.ndarray:
    """Sort units by the time of their largest value."""
    return np.argsort(values.argmax(1), kind="stable")


def _sort_by_similarity(values: np.ndarray) -> np.ndarray:
    """Let each unit be followed by the one that correlates best with it, of those that are left.

    This greedy chain begins with the most active unit. It shows clusters more clearly than a sort by
    principal components or by the Fiedler vector, whose neighbors correlate half as well (conv7: 0.72, 0.39
    and 0.35 on the example).
    """
    centered = values - values.mean(1, keepdims=True)
    centered /= np.linalg.norm(centered, axis=1, keepdims=True) + 1e-6
    similarity = centered @ centered.T
    unit = int(_sort_by_mean(values)[0])
    chain = [unit]
    for _ in range(len(values) - 1):
        similarity[:, unit] = -2  # never again
        unit = int(similarity[unit].argmax())
        chain.append(unit)
    return np.array(chain)


ORDERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": _sort_by_mean,
    "peak": _sort_by_peak,
    "similarity": _sort_by_similarity,
}


def select_sources(architecture: Architecture, limit: float) -> dict[str, Layer]:
    """Return the layer whose maxima to keep for each layer but heads: its pooling, if that is fine enough.

    The maxima are the same, and frames before pooling, most of the engine's work for all layers, are not
    needed.

    Args:
        architecture: of the network.
        limit: samples that frames of a pooling must be closer than.
    """
    sources = {name: layer for name, layer in architecture.layers.items() if layer.kind != "head"}
    for block in architecture.blocks:
        if block.pool and architecture.layers[block.pool_layer].stride < limit:
            sources[block.name] = architecture.layers[block.pool_layer]
    return sources
