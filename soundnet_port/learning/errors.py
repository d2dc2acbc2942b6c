"""The errors of this package; each message is one line, `object: cause; remedy`."""

from __future__ import annotations

from soundnet_port.errors import SoundNetError


class LabeledSoundsError(SoundNetError):
    """Labeled sounds cannot be used."""


class EvaluationError(SoundNetError):
    """An evaluation cannot be done."""


class TrainingError(SoundNetError):
    """A training run cannot start or resume."""


class VideoError(SoundNetError):
    """A video cannot be used."""


class EncodingError(SoundNetError):
    """Encoding models cannot be fitted."""
