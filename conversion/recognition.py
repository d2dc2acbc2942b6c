"""Recognize the released SoundNet-8 by its tensors, whatever file they came from.

`soundnet8_fingerprints.json` holds for each of the 46 tensors its sha256 (of the little-endian
float32 bytes, in the layout of our state dict) and, for near misses, its norm, its sum, and its
projections onto sixteen fixed noise vectors. By the Johnson-Lindenstrauss lemma these estimate the
distance to the released tensor without the tensor. `benchmarks/make_released.py` made the file.
There are no fingerprints of the released SoundNet-5.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from soundnet_port.conversion.parity import noise
from soundnet_port.network.architecture import SOUNDNET8, Architecture

NEAR = 1e-6  # relative to a tensor's norm; float32 stores values to 6e-8, float16 to 5e-4
PROJECTIONS = 16
WHOLE = "whole"
_MAX_NAMES = 4  # of differing tensors in the summary


@dataclass(frozen=True)
class Recognition:
    """How a network relates to the released one.

    Attributes:
        released: `"whole"` if all tensors are the released ones bit for bit; else the last layer up to
            which they are, such as `"pool5"` in a network fine-tuned behind a frozen front; else None.
        near: all tensors are within `NEAR` of the released ones, some not bit for bit.
        differing: the tensors that are not bit for bit, in the order of the network.
        summary: all of this in one line.
    """

    released: str | None
    near: bool
    differing: tuple[str, ...]
    summary: str

    @property
    def is_released(self) -> bool:
        """Whether this is the released network, bit for bit or but for rounding."""
        return self.released == WHOLE or self.near


def recognize(
    architecture: Architecture, state: Mapping[str, NDArray[np.float32] | torch.Tensor]
) -> Recognition:
    """Compare a network's tensors with the fingerprints of the released SoundNet-8.

    Args:
        architecture: of the network, with its widths and heads.
        state: its state dict, float32.
    """
    if architecture.name != SOUNDNET8.name:
        summary = "not recognizable: there are no fingerprints of the released SoundNet-5"
        return Recognition(None, False, (), summary)
    if architecture.widths != SOUNDNET8.widths[: len(architecture.widths)]:  # a trunk may end early
        return Recognition(None, False, tuple(state), "not the released SoundNet-8: other widths")
    prints = fingerprints()
    differing = tuple(name for name in prints if _digest(state.get(name)) != prints[name]["sha256"])
    if not differing:
        summary = f"the released SoundNet-8: all {len(prints)} tensors bit for bit"
        return Recognition(WHOLE, False, (), summary)
    layer = _last_intact_layer(differing)
    names = ", ".join(differing[:_MAX_NAMES])
    if len(differing) > _MAX_NAMES:
        names += f" and {len(differing) - _MAX_NAMES} more"
    if all(is_near(state.get(name), prints[name]) for name in differing):
        summary = f"the released SoundNet-8 within {NEAR:.0e} relative, but not bit for bit: {names}"
        return Recognition(layer, True, differing, summary)
    if layer:
        summary = (
            f"the released SoundNet-8 up to {layer}, bit for bit (as when fine-tuned behind a frozen "
            f"front); missing or different: {names}"
        )
    else:
        summary = f"not the released SoundNet-8: {len(differing)} of {len(prints)} tensors differ ({names})"
    return Recognition(layer, False, differing, summary)


def fingerprints() -> dict[str, dict[str, Any]]:
    """Load the fingerprints: name of a tensor -> its sha256, norm, sum and projections."""
    tensors: dict[str, dict[str, Any]] = _released()["tensors"]
    return tensors


def released_checksum() -> str:
    """Load the checksum of the released SoundNet-8's weights (see `weights.checksum`)."""
    return str(_released()["checksum"])


@functools.cache
def _released() -> dict[str, Any]:
    text = importlib.resources.files(__package__).joinpath("soundnet8_fingerprints.json").read_text("utf-8")
    released: dict[str, Any] = json.loads(text)
    return released


def fingerprint(tensor: NDArray[np.float32] | torch.Tensor) -> dict[str, Any]:
    """Compute a tensor's sha256, norm, sum and projections, the sums in float64."""
    values = np.asarray(_float32(tensor), np.float64).ravel()
    return {
        "sha256": _digest(tensor),
        "norm": float(np.linalg.norm(values)),
        "sum": float(values.sum()),
        "projections": [float(values @ noise(len(values), seed)) for seed in range(PROJECTIONS)],
    }


def _digest(tensor: NDArray[np.float32] | torch.Tensor | None) -> str | None:
    if tensor is None:
        return None
    return hashlib.sha256(np.ascontiguousarray(_float32(tensor), "<f4").data).hexdigest()


def is_near(tensor: NDArray[np.float32] | torch.Tensor | None, expected: Mapping[str, Any]) -> bool:
    """Whether the distance to the released tensor is within NEAR of its norm, as far as sketches tell."""
    if tensor is None:
        return False
    values = np.asarray(_float32(tensor), np.float64).ravel()
    allowed = NEAR * expected["norm"]
    # Norm and sum tell most tensors apart, far faster than projections. The sum of a difference
    # is at most its norm times the square root of the count. NaN fails each comparison.
    if not abs(np.linalg.norm(values) - expected["norm"]) <= allowed:
        return False
    if not abs(values.sum() - expected["sum"]) <= allowed * math.sqrt(len(values)):
        return False
    offsets = np.array(fingerprint(tensor)["projections"]) - expected["projections"]
    # the noise is uniform over [-1, 1): a projection's variance is a third of the squared distance
    return bool(math.sqrt(3 * np.mean(offsets**2)) <= allowed)


def _float32(tensor: NDArray[np.float32] | torch.Tensor) -> NDArray[np.float32]:
    if isinstance(tensor, torch.Tensor):
        values: NDArray[np.float32] = tensor.detach().float().cpu().numpy()
        return values
    return tensor


def _last_intact_layer(differing: tuple[str, ...]) -> str | None:
    layer = None
    for block in SOUNDNET8.blocks:
        if any(name.split(".")[0] in (block.name, block.norm) for name in differing):
            break
        layer = block.output
    return layer
