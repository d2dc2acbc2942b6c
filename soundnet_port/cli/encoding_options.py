"""Options that the commands for encoding models share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, TypeVar

from soundnet_port.cli.options import explicit_options
from soundnet_port.cli.reporting import UsageError

_Number = TypeVar("_Number", int, float)


def add_response_options(command: argparse._ActionsContainer) -> None:
    """Add --delays, --hrf, --align and --alphas, which `parse_response` reads."""
    command.add_argument(
        "--delays",
        metavar="N,N,...",
        help="rows by which features are delayed; each delay has its own weights (default: 2 to 8 s)",
    )
    command.add_argument(
        "--hrf",
        choices=("glover", "spm", "none"),
        help="instead of delays: convolve features with a hemodynamic response, or use them as they are",
    )
    command.add_argument(
        "--align",
        choices=("center", "end"),
        help="what a row sees is centered on it (default), or ends with it",
    )
    command.add_argument(
        "--alphas",
        metavar="A,A,...",
        help="ridge penalties to choose from (default: thirteen from 10 to 1e7)",
    )


def parse_response(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `add_response_options` that were given, for `fit_encoding_models`.

    Raises:
        UsageError: they exclude each other, or a list holds something else than numbers.
    """
    if options.hrf and options.delays:
        raise UsageError("--hrf and --delays exclude each other")
    lists = {
        "delays": _parse_numbers("--delays", options.delays, int),
        "alphas": _parse_numbers("--alphas", options.alphas, float),
    }
    return {
        **{name: numbers for name, numbers in lists.items() if numbers is not None},
        **explicit_options(options, "hrf", "align"),
    }


def _parse_numbers(option: str, text: str | None, number: Callable[[str], _Number]) -> list[_Number] | None:
    if text is None:
        return None
    try:
        return [number(word) for word in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} {text}: expected numbers separated by commas, such as 2,3,4") from None
