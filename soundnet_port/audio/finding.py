"""Finding sound files: named ones, those in folders, and those in lists."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from shlex import quote
from urllib.parse import unquote, urlsplit

STDIN = "-"
SUFFIXES = frozenset(  # of files that a folder is searched for; a file named outright may have any name
    ".wav .wave .flac .mp3 .ogg .oga .opus .aif .aiff .aifc .au .snd .caf .w64 .rf64 "
    ".mp4 .m4a .aac .webm .mkv .mka .mov .wma".split()
)
# sites whose addresses are pages with a player
_PAGES = re.compile(r"\.(youtube\.com|youtu\.be|vimeo\.com|soundcloud\.com|dailymotion\.com|tiktok\.com)$")


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
        if is_url(argument):
            yield _reject_url(argument, kind)
        elif argument.startswith("@") and not os.path.exists(argument):  # noqa: PTH110  (never raises)
            try:
                listed = sys.stdin.buffer.read() if argument == "@-" else Path(argument[1:]).read_bytes()
            except OSError as error:
                yield Failure(argument[1:], error.strerror or str(error))
                continue
            for line in parse_path_list(listed):
                yield _reject_url(line, kind) if is_url(line) else (Path(line), "")
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


def is_url(argument: str) -> bool:
    """Whether an argument is an address instead of a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", argument) is not None


def _reject_url(url: str, kind: str) -> Failure:
    """Return the failure of an address, with the commands that make a file of it.

    Nothing here reads the network: what an address sends may be endless, or no sound.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:  # such as a bracket that is not closed
        return Failure(url, f"an address, not a file ({error})")
    scheme, name = parts.scheme.lower(), PurePosixPath(unquote(parts.path)).name
    if scheme == "file":
        return Failure(url, f"an address; name the file by its path, {unquote(parts.path)}")
    if scheme not in ("http", "https", "ftp"):
        commands = {"s3": f"aws s3 cp {quote(url)} .", "gs": f"gcloud storage cp {quote(url)} ."}
        remedy = f"copy it with {commands[scheme]}" if scheme in commands else "copy it to this machine"
        return Failure(url, f"an address, not a file; {remedy} (extract --backend ray reads such addresses)")
    is_sound = PurePosixPath(name).suffix.lower() in SUFFIXES and re.fullmatch(r"\w[\w. +-]*", name)
    name = name if is_sound else kind
    download = f"curl -L -o {quote(name)} {quote(url)}"
    page = f"yt-dlp {'-x ' if kind == 'sound' else ''}{quote(url)}"
    if _PAGES.search(f".{parts.hostname}"):
        return Failure(url, f"a page, not a file; get its {kind} with {page}, then run this command on that")
    remedy = f"get it with {download}, then run this command on {name}"
    hint = "" if is_sound else f" (from a page with a player: {page})"
    return Failure(url, f"an address, not a file; {remedy}{hint}")


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
