"""Finding sound files: named ones, those in folders, and those in lists."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

STDIN = "-"
SUFFIXES = frozenset(  # of files that a folder is searched for; a file named outright may have any name
    ".wav .wave .flac .mp3 .ogg .oga .opus .aif .aiff .aifc .au .snd .caf .w64 .rf64 "
    ".mp4 .m4a .aac .webm .mkv .mka .mov .wma".split()
)


@dataclass(frozen=True)
class Failure:
    """An input that gave nothing, and why."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def find_sounds(
    inputs: Sequence[str | os.PathLike[str]], kind: str = "sound", suffixes: Collection[str] = SUFFIXES
) -> Iterator[tuple[Path, str] | Failure]:
    """Yield sound files, each with the folder that was searched for it or "", and failures.

    Args:
        inputs: files, folders (searched for sound files) and @lists of paths.
        kind: what to call the files in messages.
        suffixes: of files that a folder is searched for.
    """
    for argument in [os.fspath(path) for path in inputs]:
        if _is_url(argument):
            yield _reject_url(argument, kind)
        elif argument.startswith("@") and not os.path.exists(argument):  # noqa: PTH110  (never raises)
            try:
                listed = sys.stdin.buffer.read() if argument == "@-" else Path(argument[1:]).read_bytes()
            except OSError as error:
                yield Failure(argument[1:], error.strerror or str(error))
                continue
            for line in parse_path_list(listed):
                yield _reject_url(line, kind) if _is_url(line) else (Path(line), "")
        elif os.path.isdir(argument):  # noqa: PTH112
            errors: list[OSError] = []
            paths = sorted(
                Path(folder, name)
                for folder, _, names in os.walk(argument, onerror=errors.append)
                for name in names
                if has_sound_suffix(name, suffixes)
            )
            for path in paths:
                yield path, argument
            for unreadable in errors:
                yield Failure(str(unreadable.filename), unreadable.strerror or str(unreadable))
            if not paths and not errors:
                yield Failure(argument, f"no {kind} files in this directory")
        else:
            yield Path(argument), ""


def _is_url(argument: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", argument) is not None


def _reject_url(url: str, kind: str) -> Failure:
    remedy = "get it first"
    if url.lower().startswith(("http:", "https:", "ftp:")):
        remedy += f": curl -L -o {kind} '{url}'"
    return Failure(url, f"an address, not a file; {remedy}")


def has_sound_suffix(name: str, suffixes: Collection[str] = SUFFIXES) -> bool:
    """Whether a file in a folder counts as a sound, by its name."""
    return Path(name).suffix.lower() in suffixes and not name.startswith("._")


def parse_path_list(listed: bytes) -> list[str]:
    """Parse a list of paths, one a line."""
    # as bytes, since names need not be text, and only line feeds end them
    lines = listed.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return [os.fsdecode(line.removesuffix(b"\r")) for line in lines if line.strip()]


def absolute_path(path: str | os.PathLike[str]) -> str:
    return os.path.abspath(path)  # noqa: PTH100  (Path.absolute keeps "..")


def relative_name(path: str, folders: Sequence[str]) -> str | None:
    """Return a path relative to the innermost of these folders that contains it, with forward slashes.

    All of them are absolute; None if no folder contains it.
    """
    parents = [folder for folder in folders if path.startswith(folder.rstrip(os.sep) + os.sep)]
    return os.path.relpath(path, max(parents)).replace(os.sep, "/") if parents else None
