"""The base classes of this package's errors and warnings, and optional packages that are not installed."""

from __future__ import annotations

import importlib
import sys
import warnings
from types import FrameType
from typing import Any


class SoundNetError(ValueError):
    """Base class of all errors raised on purpose; the message is one line, `object: cause; remedy`."""


class SoundNetWarning(UserWarning):
    """Base class of the warnings about use that gives other numbers than intended."""


class WaveformScaleWarning(SoundNetWarning):
    """A waveform looks as if its full scale were not 256."""


class TrainingModeWarning(SoundNetWarning):
    """A network whose parameters are all frozen was set to training mode."""


class MissingExtraError(SoundNetError, ImportError):
    """A package is not installed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed: pip install 'soundnet-port[{extra}]'")


def require(package: str, extra: str) -> Any:
    """Import an optional package.

    Args:
        package: the module to import, such as `"h5py"` or `"matplotlib.figure"`.
        extra: the extra of soundnet-port that installs it.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        raise MissingExtraError(package.partition(".")[0], extra) from None


def warn_caller(message: str, category: type[Warning]) -> None:
    """Warn, with the location of the code that called this package, past frames of PyTorch and scikit-learn.

    So Python's default filter shows the warning once for each of the caller's lines.
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_inside(frame):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def _is_inside(frame: FrameType) -> bool:
    package = str(frame.f_globals.get("__name__")).partition(".")[0]
    return package in ("soundnet_port", "torch", "sklearn")
