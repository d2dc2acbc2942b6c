"""Read the released Flickr data: sounds and the teachers' probabilities, as MIT published them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soundnet_port.learning.errors import TrainingError
from soundnet_port.learning.pseudo_labels import Labels, check_distributions
from soundnet_port.network.categories import original_categories


class FlickrRelease:
    """The released Flickr data, unpacked from MIT's archives into any folders under `folder`.

    `train_frames4_0001.txt` to `_0040.txt` (and `val_frames4_*`) have a line for each frame, whose
    first word is the frame's path. Consecutive lines with the same folder are one video: its label
    steps, 1 to 4. The folder after `frames/`, with `.mp3` added, is its sound under `mp3/`.
    `VGG16_IMNET_TRAIN_B0001/prob` and `VGG16_PLACES2_TRAIN_B0001/prob` (for val `..._VAL_...`) hold a
    row of 1000 or 401 float32 for every line of the list of that number. They are memory-mapped.

    Args:
        folder: with all of it.
        split: "train" or "val".

    Raises:
        TrainingError: files are missing, or of another size or form.
    """

    heads = (("objects", "IMNET", 1000), ("scenes", "PLACES2", 401))

    def __init__(self, folder: Path, split: str = "train") -> None:
        lists = _search(folder, f"{split}_frames4_*.txt")
        if not lists:
            raise TrainingError(
                f"{folder}: has neither shards (*.tar) nor the released lists ({split}_frames4_0001.txt)"
            )
        mp3 = _search(folder, "mp3")
        if not mp3 or not mp3[0].is_dir():
            raise TrainingError(f"{folder}: the folder mp3 with the sounds is missing")
        self._mp3 = mp3[0]
        self.name = str(folder)
        self.teachers = {column: size for column, _, size in self.heads}
        self.categories = original_categories(self.teachers)
        self._rows: dict[str, list[NDArray[np.float32]]] = {column: [] for column, _, _ in self.heads}
        digest = hashlib.sha256()
        names, list_numbers, first_lines, steps = [], [], [], []
        for number, path in enumerate(lists):
            digest.update(path.name.encode())
            videos, starts, lines = _read_videos(path, digest)
            names.append(np.array(videos, dtype=np.bytes_))
            list_numbers.append(np.full(len(videos), number, np.int16))
            first_lines.append(np.array(starts, np.int64))
            steps.append(np.diff(np.array([*starts, lines], np.int64)))
            if steps[-1].max() > 4:
                line = int(starts[int(steps[-1].argmax())]) + 1
                raise TrainingError(f"{path}, line {line}: more than 4 frames of one video")
            block = path.stem.rpartition("_")[2]
            for column, kind, size in self.heads:
                name = f"VGG16_{kind}_{split.upper()}_B{block}"
                self._rows[column].append(_map_probabilities(folder, name, lines, size))
        self._names = np.concatenate(names)
        self._list_numbers = np.concatenate(list_numbers)
        self._first_lines = np.concatenate(first_lines)
        self.steps = np.concatenate(steps).astype(np.int64)
        self.identity = digest.hexdigest()

    def open_sound(self, index: int) -> contextlib.AbstractContextManager[Path]:
        """Provide the sound's file."""
        return contextlib.nullcontext(Path(self.sound_name(index)))

    def sound_name(self, index: int) -> str:
        """Return the sound's path."""
        return str(self._mp3 / f"{os.fsdecode(bytes(self._names[index]))}.mp3")

    def read_labels(self, index: int) -> Labels:
        """Read the teachers' distributions for the sound."""
        first, steps = self._first_lines[index], self.steps[index]
        labels = {}
        for column, blocks in self._rows.items():
            rows = np.array(blocks[self._list_numbers[index]][first : first + steps], np.float32)
            labels[column] = check_distributions(rows, f"{column} of {self.sound_name(index)}")
        return labels


def _search(folder: Path, pattern: str) -> list[Path]:
    """Return the matches in the first of the folder, its subfolders and theirs that has any."""
    for depth in ("", "*/", "*/*/"):
        if paths := sorted(folder.glob(depth + pattern)):
            return [path for path in paths if path.parent == paths[0].parent]
    return []


def _read_videos(path: Path, digest: Any) -> tuple[list[bytes], list[int], int]:
    """Return a list's videos, the lines they begin on (from 0), and the number of lines."""
    videos: list[bytes] = []
    starts: list[int] = []
    lines = 0
    with open(path, "rb") as file:
        for line in file:
            digest.update(line)
            words = line.split(maxsplit=1)
            match = re.search(rb"(?:^|/)frames/(.+)/[^/]+$", words[0]) if words else None
            if match is None:
                raise TrainingError(f"{path}, line {lines + 1}: no path of a frame (.../frames/VIDEO/FRAME)")
            if not videos or match[1] != videos[-1]:
                videos.append(match[1])
                starts.append(lines)
            lines += 1
    if not lines:
        raise TrainingError(f"{path}: empty")
    return videos, starts, lines


def _map_probabilities(folder: Path, name: str, lines: int, size: int) -> NDArray[np.float32]:
    paths = _search(folder, f"{name}/prob")
    if not paths:
        raise TrainingError(f"{folder}: {name}/prob is missing, but its list exists")
    expected, actual = lines * size * 4, paths[0].stat().st_size
    if actual != expected:
        raise TrainingError(
            f"{paths[0]}: {actual:,} bytes, expected {expected:,} ({lines:,} lines x {size} float32)"
        )
    return np.memmap(paths[0], np.dtype("<f4"), "r", shape=(lines, size))
