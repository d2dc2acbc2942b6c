"""Sounds that ship with the package, for first tries, documentation and checks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# In the public domain (CC0); sounds/CREDITS.md names their authors
EXAMPLES = ("waves", "baby", "helicopter")
_REPETITIONS = 3  # of 5 s each, for an 8-layer head frame hears 14.5 s


def example(name: str) -> Path:
    """Return the path of a sound that ships with the package.

    Args:
        name: "waves", "baby" or "helicopter": real recordings of 5.0 s, mono, 22,050 Hz, FLAC.

    Raises:
        ValueError: there is no such example.
    """
    if name not in EXAMPLES:
        raise ValueError(f"no example named {name!r}; choose from {', '.join(EXAMPLES)}")
    return Path(__file__).parent / "sounds" / f"{name}.flac"


def medley() -> Tensor:
    """Load all examples one after the other, each played three times, so that answers change over time.

    Shape:
        returns `(992_448,)`: 45.0 s at 22,050 Hz, within +-256.
    """
    import torch

    from soundnet_port.audio.loading import load_audio

    return torch.cat([load_audio(example(name)).repeat(_REPETITIONS) for name in EXAMPLES])
