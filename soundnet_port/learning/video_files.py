"""Find video files, and name their results after them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from soundnet_port.audio.finding import STDIN, Failure, absolute_path, find_sounds, relative_name
from soundnet_port.corpus.errors import CorpusError

# Of files in a directory; a file named on its own may have any name.
SUFFIXES = frozenset(
    ".mp4 .m4v .mov .webm .mkv .avi .flv .wmv .mpg .mpeg .ts .mts .m2ts .3gp .ogv .vob".split()
)


@dataclass(frozen=True)
class Video:
    """A video file, and the name of its results in the output folder."""

    name: str
    path: str


def find_videos(
    inputs: Sequence[str | os.PathLike[str]], root: str | os.PathLike[str] | None
) -> tuple[list[Video], list[Failure]]:
    """Find videos, sorted by the names of their results, and what cannot be searched.

    Raises:
        CorpusError: no videos, one outside of `root`, two with the same name, or standard input.
    """
    folders = [absolute_path(item) for item in inputs if os.path.isdir(item)]  # noqa: PTH112  (never raises)
    videos: dict[str, Video] = {}
    failures: list[Failure] = []
    for item in find_sounds(inputs, "video", SUFFIXES):
        if isinstance(item, Failure):
            failures.append(item)
            continue
        path, folder = str(item[0]), item[1]
        if path == STDIN:
            raise CorpusError("standard input: training needs the video later; name a file")
        absolute = absolute_path(path)
        parents = [absolute_path(root or folder)] if root is not None or folder else folders
        name = relative_name(absolute, parents)
        if root is not None and name is None:
            raise CorpusError(f"{path}: not inside {os.fspath(root)}, which names are relative to")
        videos.setdefault(absolute, Video(name or Path(absolute).name, path))
    if not videos and not failures:
        raise CorpusError("no inputs")
    found = sorted(videos.values(), key=lambda video: os.fsencode(video.name))
    for first, second in itertools.pairwise(found):
        if first.name == second.name:
            raise CorpusError(
                f"{first.path} and {second.path} would both become {first.name}.npy; "
                "name a folder that contains both, or give one with --root"
            )
    return found, failures
