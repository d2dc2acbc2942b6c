"""The base of all errors that this package raises by intention, and packages that are not installed."""

from __future__ import annotations


class SoundNetError(ValueError):
    """Something that cannot be used or done, with the reason in one line: `object: cause; remedy`."""


class MissingExtraError(SoundNetError, ImportError):
    """A package is not installed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed: pip install 'soundnet-port[{extra}]'")
