"""Resampling of sound that comes in blocks."""

from __future__ import annotations

from typing import Any

from soundnet_port.network.architecture import SAMPLE_RATE


def create_resampler(rate: int, to: int = SAMPLE_RATE) -> Any:
    """Return soxr's stream from one sample rate to another, in Hz; None if they are the same."""
    if rate == to:
        return None
    import soxr

    return soxr.ResampleStream(rate, to, 1, dtype="float32", quality="HQ")
