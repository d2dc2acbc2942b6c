"""Options that the commands for training networks share."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from soundnet_port.cli.options import add_device_option

ARCHITECTURES = ("soundnet8", "soundnet5")


def add_numbers(
    command: argparse.ArgumentParser, rows: Iterable[tuple[str, type[int] | type[float], str, str]]
) -> None:
    """Add numeric options without defaults, as (flag, type, metavar, help)."""
    for flag, kind, metavar, text in rows:
        command.add_argument(flag, type=kind, metavar=metavar, help=text)


def add_hardware_options(command: argparse.ArgumentParser) -> None:
    """Add --device and --precision."""
    add_device_option(command, "auto")
    command.add_argument("--precision", default="32-true", help="32-true (default), bf16-mixed, 16-mixed")
