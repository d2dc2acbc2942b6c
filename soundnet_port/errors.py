"""The base class of this package's errors, and optional packages that are not installed."""

from __future__ import annotations

import importlib
from typing import Any


class SoundNetError(ValueError):
    """Base class of all errors raised on purpose; the message is one line, `object: cause; remedy`."""


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
