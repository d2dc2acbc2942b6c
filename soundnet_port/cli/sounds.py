"""Sounds named on the command line, one after the other: options, search, failures."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

from soundnet_port.cli.options import add_decoder_option, add_device_option, add_weights_option
from soundnet_port.cli.reporting import FAILED, ProgressReporter, UsageError, report
from soundnet_port.inference.prediction_formats import csv_line
from soundnet_port.progress import Progress

_MIN_FILES = 10  # for a bar on a terminal while results go elsewhere

SoundInput = Path | UsageError
"""A sound file, or why an argument names none."""


def add_sound_options(
    command: argparse.ArgumentParser, formats: Sequence[str], torch7_file: str, default: str
) -> None:
    """Add what predict and extract share; `default` describes the default format."""
    command.add_argument(
        "sounds",
        metavar="SOUND",
        nargs="+",
        help="file, directory (searched), - (a sound on stdin), or @LIST: a text file with a path per line, "
        "relative to the current folder; @- is a list on stdin",
    )
    add_weights_option(command)
    command.add_argument(
        "--format",
        choices=formats,
        help=f"default: {default}; torch7 writes {torch7_file} next to each sound X, like the original's "
        "script (extra [hdf5])",
    )
    command.add_argument(
        "--json", dest="format", action="store_const", const="json", help="JSON, a line per sound"
    )
    command.add_argument("--csv", dest="format", action="store_const", const="csv", help="CSV with a header")
    command.add_argument("-f", "--force", action="store_true", help="replace existing files")
    add_device_option(command)
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="precision (default: float32); half precision is off by up to 4 %%",
    )
    add_decoder_option(command)


def list_sounds(arguments: Sequence[str]) -> list[SoundInput]:
    """List the sounds that files, directories and @lists name."""
    from soundnet_port.audio.finding import Failure, find_sounds

    return [
        UsageError(str(result)) if isinstance(result, Failure) else result[0]
        for result in find_sounds(arguments)
    ]


def mirror_sounds(
    sounds: Sequence[SoundInput], arguments: Sequence[str], folder: str | Path
) -> dict[Path, Path]:
    """Map sounds to paths in a folder that mirrors their folders.

    These are relative to the folder that holds all sounds and searched folders. Names are complete, as in
    `monday/dog.wav`: results get suffixes after that, and no two sounds the same path.

    Raises:
        UsageError: no folder holds them all, as on several drives.
    """
    from soundnet_port.audio.finding import STDIN, absolute_path

    searched = [absolute_path(argument) for argument in arguments if os.path.isdir(argument)]  # noqa: PTH112
    paths = [path for path in sounds if isinstance(path, Path)]
    absolute = [absolute_path("stdin" if str(path) == STDIN else path) for path in paths]
    try:
        root = os.path.commonpath([*searched, *map(os.path.dirname, absolute)] or [""])
    except ValueError:
        raise UsageError(f"{folder}: the sounds are on several drives; use a folder for each") from None
    return {
        path: Path(folder, os.path.relpath(name, root)) for path, name in zip(paths, absolute, strict=True)
    }


def process_sounds(
    sounds: Sequence[SoundInput], process: Callable[[Path], str | None], *, prints: bool = True
) -> int:
    """Process each sound, and report those that fail; return the exit code.

    Args:
        sounds: from `list_sounds`.
        process: takes a sound; it may return a note to report.
        prints: whether results go to standard output.
    """
    failures = 0
    with ProgressReporter() if _shows_progress(len(sounds), prints) else nullcontext() as progress:
        for number, path in enumerate(sounds):
            message = ""
            try:
                if isinstance(path, UsageError):
                    raise path
                message = process(path) or ""
            except (UsageError, ValueError, RuntimeError, MemoryError) as error:
                failures += 1
                message = str(error) or type(error).__name__
                if isinstance(error, RuntimeError):  # torch adds a stack
                    message = message.splitlines()[0]
                if str(path) not in message:
                    message = f"{path}: {message}"
            if progress:
                progress(Progress(number + 1, len(sounds), "file", message=message))
            elif message:
                report(message)
    return FAILED if failures else 0


def _shows_progress(count: int, prints: bool) -> bool:
    if prints and sys.stdout.isatty():  # which shows how the results come in
        return False
    if prints and sys.stderr.isatty():
        return count >= _MIN_FILES
    return count > 1  # in a log, lines appear after seconds only


def is_done(path: Path, force: bool) -> bool:
    """Tell, and note, whether a result exists and stays."""
    done = path.exists() and not force
    if done:
        report(note_existing(path))
    return done


def note_existing(path: Path) -> str:
    """Return the note that a result exists and stays."""
    return f"{path}: already exists; use --force to replace it"


def print_csv_row(*cells: object) -> None:
    """Print a CSV row."""
    sys.stdout.write(csv_line(*cells))
