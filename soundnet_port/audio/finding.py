"""Find sound files: those named, those in folders, and those that lists name."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Failure:
    """An input that gave nothing, and why."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


# What a directory is searched for; a file named outright may have any name.
SUFFIXES = frozenset(
    ".wav .wave .flac .mp3 .ogg .oga .opus .aif .aiff .aifc .au .snd .caf .w64 .rf64 "
    ".mp4 .m4a .aac .webm .mkv .mka .mov .wma".split()
)


STDIN = "-"


def find_sounds(
    inputs: Sequence[str | os.PathLike[str]], kind: str = "sound", suffixes: Collection[str] = SUFFIXES
) -> Iterator[tuple[Path, str] | Failure]:
    """The sound files that are named, each with the folder that was searched for it, or "".

    Args:
        inputs: files, folders (searched for sound files) and @lists of paths. What cannot be looked
            at comes as a `Failure`.
        kind: what to call the files.
        suffixes: of files that a folder is searched for.
    """
    for argument in [os.fspath(each) for each in inputs]:
        if _is_address(argument):
            yield _address(argument, kind)
        elif argument.startswith("@") and not os.path.exists(argument):  # noqa: PTH110  (never raises)
            try:
                listed = sys.stdin.buffer.read() if argument == "@-" else Path(argument[1:]).read_bytes()
            except OSError as error:
                yield Failure(argument[1:], error.strerror or str(error))
                continue
            for line in parse_path_list(listed):
                yield _address(line, kind) if _is_address(line) else (Path(line), "")
        elif os.path.isdir(argument):  # noqa: PTH112
            troubles: list[OSError] = []
            found = sorted(
                Path(folder, name)
                for folder, _, names in os.walk(argument, onerror=troubles.append)
                for name in names
                if has_sound_suffix(name, suffixes)
            )
            for path in found:
                yield path, argument
            for trouble in troubles:
                yield Failure(str(trouble.filename), trouble.strerror or str(trouble))
            if not found and not troubles:
                yield Failure(argument, f"no {kind} files in this directory")
        else:
            yield Path(argument), ""


def _is_address(argument: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", argument) is not None


def _address(argument: str, kind: str) -> Failure:
    first = "get it first"
    if argument.lower().startswith(("http:", "https:", "ftp:")):
        first += f": curl -L -o {kind} '{argument}'"
    return Failure(argument, f"an address, not a file; {first}")


def has_sound_suffix(name: str, suffixes: Collection[str] = SUFFIXES) -> bool:
    """Whether a file that was found in a folder is to be taken for a sound, by its name."""
    return Path(name).suffix.lower() in suffixes and not name.startswith("._")


def parse_path_list(listed: bytes) -> list[str]:
    """The paths in a list."""
    # as bytes: names need not be text, and only line feeds end them
    lines = listed.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return [os.fsdecode(line.removesuffix(b"\r")) for line in lines if line.strip()]


def absolute_path(path: str | os.PathLike[str]) -> str:
    return os.path.abspath(path)  # noqa: PTH100  (Path.absolute keeps "..")
