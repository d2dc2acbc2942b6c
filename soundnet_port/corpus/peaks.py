"""Each unit's largest activations in a corpus, for the search of top sounds.

An npz file with

    count                     sounds in the corpus
    names, samples            of the sounds that are among any unit's largest
    LAYER                     (sounds kept, channels): activations, the largest first
    LAYER_frames              the frames of these activations
    LAYER_sounds              their sounds, as indices into names
    LAYER_sums                (2, channels): sums of positive activations and their squares, of all sounds
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soundnet_port.corpus.array_formats import add_array
from soundnet_port.corpus.features import Features, OutputSpec

MAX_TOP_SOUNDS = 32  # sounds kept for each unit


def write_peaks(path: Path, sounds: Sequence[Features], spec: OutputSpec, part: bool) -> None:
    """Write the largest activations of some sounds."""
    count = len(sounds)
    peaks: dict[str, NDArray[Any]] = {
        "names": _encode_names([features.name for features in sounds]),
        "samples": np.array([features.arrays["samples"] for features in sounds], np.int64),
        "count": np.array(count),
    }
    for layer, width in spec.widths.items():
        values = np.array([features.arrays[layer] for features in sounds], np.float32).reshape(count, width)
        frames = np.array([features.arrays[f"{layer}_frames"] for features in sounds], np.int64)
        positive = np.maximum(values, 0, dtype=np.float64)
        peaks |= {
            layer: values,
            f"{layer}_frames": frames.reshape(count, width),
            f"{layer}_sounds": np.tile(np.arange(count)[:, None], width),
            f"{layer}_sums": np.array([positive.sum(0), np.square(positive).sum(0)]),
        }
    _save_peaks(path, _keep_largest(peaks, spec))


def merge_peaks(path: Path, parts: Sequence[Path], spec: OutputSpec) -> None:
    """Merge part by part: memory depends on the number of units, not on the corpus."""
    merged = read_peaks(parts[0])
    for part in parts[1:]:
        peaks = read_peaks(part)
        offset = len(merged["samples"])
        merged["names"] = _encode_names([*decode_names(merged), *decode_names(peaks)])
        merged["samples"] = np.concatenate([merged["samples"], peaks["samples"]])
        merged["count"] = merged["count"] + peaks["count"]
        for layer in spec.widths:
            peaks[f"{layer}_sounds"] += offset
            for key in (layer, f"{layer}_frames", f"{layer}_sounds"):
                merged[key] = np.concatenate([merged[key], peaks[key]])
            merged[f"{layer}_sums"] = merged[f"{layer}_sums"] + peaks[f"{layer}_sums"]
        merged = _keep_largest(merged, spec)
    _save_peaks(path, merged)


def read_peaks(path: Path) -> dict[str, NDArray[Any]]:
    """Read the arrays of a file of peaks."""
    with np.load(path) as data:
        return dict(data)


def decode_names(peaks: Mapping[str, NDArray[Any]]) -> list[str]:
    """Return the names of the sounds in a file of peaks."""
    names: list[str] = json.loads(peaks["names"].tobytes())
    return names


def _encode_names(names: Sequence[str]) -> NDArray[np.uint8]:
    """Return names as JSON bytes; an array of strings would give each the space of the longest."""
    return np.frombuffer(json.dumps(names).encode(), np.uint8)


def _keep_largest(peaks: dict[str, NDArray[Any]], spec: OutputSpec) -> dict[str, NDArray[Any]]:
    """Keep each unit's largest activations, the first sound's of equal ones, and their sounds."""
    for layer in spec.widths:
        order = np.argsort(-peaks[layer], axis=0, kind="stable")[:MAX_TOP_SOUNDS]
        for key in (layer, f"{layer}_frames", f"{layer}_sounds"):
            peaks[key] = np.take_along_axis(peaks[key], order, 0)
    kept = np.unique(np.concatenate([peaks[f"{layer}_sounds"].ravel() for layer in spec.widths]))
    names = decode_names(peaks)
    peaks["names"], peaks["samples"] = _encode_names([names[i] for i in kept]), peaks["samples"][kept]
    for layer in spec.widths:
        peaks[f"{layer}_sounds"] = np.searchsorted(kept, peaks[f"{layer}_sounds"])
    return peaks


def _save_peaks(path: Path, peaks: Mapping[str, NDArray[Any]]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for key, values in peaks.items():
            add_array(archive, key, values)
