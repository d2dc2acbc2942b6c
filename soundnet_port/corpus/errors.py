"""Errors of corpus runs, and the file that lists failed inputs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from soundnet_port.audio.finding import Failure
from soundnet_port.errors import SoundNetError


class CorpusError(SoundNetError):
    """A run that cannot start or continue."""


class InputError(Exception):
    """An input without features; the message is the reason, without the input's name."""


class OutputError(Exception):
    """Results cannot be written; the run ends."""


def describe_error(error: Exception, path: str) -> str:
    """Return an error about a file as one line, without the file's name."""
    text = str(error).removeprefix(f"{path}: ")
    if isinstance(error, RuntimeError):  # torch appends a stack trace
        text = text.partition("\n")[0]
    if not isinstance(error, (ValueError, OSError, RuntimeError)):
        text = f"{type(error).__name__} {text}"
    return " ".join(text.split()) or type(error).__name__


def format_write_error(file: object, error: Exception | str) -> str:
    """Return the message for a file that cannot be written."""
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    return f"{file}: cannot be written ({text}); results so far are kept, the same command resumes"


# ---- lists of failed inputs: a line per input, its path and the reason, separated by a tab


def serialize_failures(failures: Iterable[Failure]) -> bytes:
    """Return the lines of failed inputs; backslashes, tabs and line feeds in paths are escaped."""
    lines = []
    for failure in failures:
        path = failure.path.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n")
        lines.append(os.fsencode(f"{path}\t{' '.join(failure.reason.split())}\n"))
    return b"".join(lines)


def parse_failures(content: bytes) -> list[Failure]:
    """Return the failures that `serialize_failures` wrote."""
    failures = []
    for line in content.split(b"\n"):
        path, tab, reason = os.fsdecode(line).partition("\t")
        if tab:
            path = path.replace("\\\\", "\0").replace("\\t", "\t").replace("\\n", "\n").replace("\0", "\\")
            failures.append(Failure(path, reason))
    return failures


def sort_failures(failures: Iterable[Failure]) -> list[Failure]:
    """Return failures in the order of their paths' bytes."""
    return sorted(failures, key=lambda failure: os.fsencode(failure.path))


def write_failures(path: Path, failures: Iterable[Failure]) -> None:
    """Write a list of failed inputs."""
    path.write_bytes(serialize_failures(failures))


def read_failures(path: Path) -> list[Failure]:
    """Read a list of failed inputs; empty if the file does not exist."""
    try:
        return parse_failures(path.read_bytes())
    except FileNotFoundError:
        return []
