"""Read training data: sounds with pseudo-labels, in one of three forms.

Teachers give, for every 5 s of a sound, a distribution over the categories of a head.

**A manifest**, a text file in UTF-8 named `*.tsv`, tab-separated, with a header:

    sound           objects              scenes
    clips/a.mp3     labels/a.objects.npy labels/a.scenes.npy
    clips/b.wav     labels/b.objects.npy labels/b.scenes.npy

The first column is a sound file of any format that `load_audio` reads. Every other column is a
teacher, named by its head, `objects` or `scenes`; further teachers of a head have a suffix after a
colon (`objects:vit`). Each head needs a teacher. Paths are relative to the manifest's folder. A label
file is an array in NumPy's format (version 1 or later, no pickle) of float32, float16 or float64 and of
the shape (steps, categories): row `k` is the teacher's distribution for the seconds 5k to 5k + 5 and
sums to 1. `steps` is 1 or more, the same for all teachers of a sound; `categories` is the same for all
teachers of a head and all sounds. `objects.categories.txt` and `scenes.categories.txt` beside the
manifest may name the categories, one per line in the order of the outputs; the trained weights get them.

**WebDataset shards**, `.tar` files with `KEY.mp3` (or any other suffix of a sound), `KEY.objects.npy`,
`KEY.scenes.npy` (`KEY.objects:vit.npy`) for every sound, the same arrays; category names may be beside
the shards.

**The released Flickr data** as MIT published them: see `FlickrRelease`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from soundnet_port.audio.finding import SUFFIXES
from soundnet_port.files import temporary_copy
from soundnet_port.learning.errors import TrainingError
from soundnet_port.learning.flickr_release import FlickrRelease
from soundnet_port.learning.pseudo_labels import (
    HEADS,
    DistillationData,
    Labels,
    check_shapes,
    check_teachers,
    get_head,
    read_category_names,
    read_label_file,
)


def open_distillation_data(source: str | os.PathLike[str], split: str = "train") -> DistillationData:
    """Open a manifest, a shard, a folder of shards, or the folder of the released data.

    Args:
        source: `*.tsv`, `*.tar`, a folder of `*.tar`, or a folder with the released lists.
        split: "train" or "val", of the released data.

    Raises:
        TrainingError: it is none of these, or its contents are invalid.
    """
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            if shards := sorted(path.glob("*.tar")):
                return Shards(shards, str(path))
            return FlickrRelease(path, split)
        if not path.exists():
            raise TrainingError(f"{path}: no such file or folder")
        return Shards([path], str(path)) if path.suffix == ".tar" else Manifest(path)
    except OSError as error:
        raise TrainingError(f"{error.filename or path}: {error.strerror or error}") from None


class Manifest:
    """A text file that lists sounds and their label files; all label files are checked."""

    def __init__(self, path: Path) -> None:
        try:
            text = path.read_text("utf-8-sig")
        except UnicodeDecodeError:
            raise TrainingError(f"{path}: not a text file in UTF-8") from None
        header, *lines = text.splitlines() or [""]
        columns = header.rstrip("\r\n").split("\t")
        if columns[0] != "sound":
            raise TrainingError(
                f"{path}: the first line must name the columns, tab-separated: sound, objects, scenes"
            )
        check_teachers(str(path), columns[1:])
        self.name = str(path)
        self.identity = hashlib.sha256(text.encode()).hexdigest()
        self._columns = columns[1:]
        self._rows: list[list[Path]] = []
        self.teachers: dict[str, int] = {}
        steps = []
        for number, line in enumerate(lines, 2):
            if not line.strip():
                continue
            source, cells = f"{path}, line {number}", line.split("\t")
            if len(cells) != len(columns):
                raise TrainingError(f"{source}: {len(cells)} columns, expected {len(columns)}")
            row = [path.parent / cell for cell in cells]
            if not row[0].is_file():
                raise TrainingError(f"{source}: {row[0]}: no such sound file")
            labels = {}
            for column, file in zip(self._columns, row[1:], strict=True):
                try:
                    labels[column] = read_label_file(file)
                except TrainingError as error:
                    raise TrainingError(f"{source}: {error}") from None
            steps.append(check_shapes(source, labels, self.teachers))
            self._rows.append(row)
        if not self._rows:
            raise TrainingError(f"{path}: lists no sounds")
        self.steps = np.array(steps, np.int64)
        self.categories = read_category_names(path.parent, self.teachers)

    def open_sound(self, index: int) -> contextlib.AbstractContextManager[Path]:
        """Provide the sound's file."""
        return contextlib.nullcontext(self._rows[index][0])

    def sound_name(self, index: int) -> str:
        """Return the sound's path."""
        return str(self._rows[index][0])

    def read_labels(self, index: int) -> Labels:
        """Read the teachers' distributions for the sound."""
        files = zip(self._columns, self._rows[index][1:], strict=True)
        return {column: read_label_file(file) for column, file in files}


@dataclass(frozen=True)
class _Member:
    """Offset and size of a file in a shard."""

    start: int
    size: int


class Shards:
    """WebDataset shards: tar files in which the files of a sound share a key.

    All files are indexed once, so any sound can be read at any time.
    """

    def __init__(self, paths: Sequence[Path], name: str) -> None:
        self.name = name
        self.teachers: dict[str, int] = {}
        self._paths = list(paths)
        self._sounds: list[tuple[int, str, _Member, dict[str, _Member]]] = []
        steps = []
        digest = hashlib.sha256()
        for number, path in enumerate(self._paths):
            for key, files in _index_shard(path):
                digest.update(f"{path.name}\t{key}\t{sorted(files)}\n".encode())
                suffixes = [suffix for suffix in files if f".{suffix.lower()}" in SUFFIXES]
                labels = {
                    suffix.removesuffix(".npy"): member
                    for suffix, member in files.items()
                    if suffix.endswith(".npy") and get_head(suffix.removesuffix(".npy")) in HEADS
                }
                if len(suffixes) != 1 or not labels:
                    raise TrainingError(
                        f"{path}: {key} has {len(suffixes)} sounds and {len(labels)} label files; "
                        f"expected {key}.mp3 (or another sound), {key}.objects.npy, {key}.scenes.npy"
                    )
                check_teachers(f"{path}: {key}", list(labels))
                if self._sounds and set(labels) != set(self.teachers):
                    raise TrainingError(
                        f"{path}: {key} has {', '.join(labels)}, the first sound {', '.join(self.teachers)}"
                    )
                arrays = {
                    column: self._read_array(number, key, column, member) for column, member in labels.items()
                }
                steps.append(check_shapes(f"{path}: {key}", arrays, self.teachers))
                self._sounds.append((number, f"{key}.{suffixes[0]}", files[suffixes[0]], labels))
        if not self._sounds:
            raise TrainingError(f"{name}: has no sounds")
        self.identity = digest.hexdigest()
        self.steps = np.array(steps, np.int64)
        self.categories = read_category_names(self._paths[0].parent, self.teachers)

    @contextlib.contextmanager
    def open_sound(self, index: int) -> Iterator[Path]:
        """Provide the sound as a temporary file inside the block."""
        number, name, member, _ = self._sounds[index]
        with temporary_copy(io.BytesIO(self._read(number, member)), Path(name).suffix) as path:
            yield path

    def sound_name(self, index: int) -> str:
        """Return the sound's shard and name."""
        number, name, _, _ = self._sounds[index]
        return f"{self._paths[number]}: {name}"

    def read_labels(self, index: int) -> Labels:
        """Read the teachers' distributions for the sound."""
        number, name, _, labels = self._sounds[index]
        return {column: self._read_array(number, name, column, member) for column, member in labels.items()}

    def _read_array(self, number: int, key: str, column: str, member: _Member) -> NDArray[np.float32]:
        content = io.BytesIO(self._read(number, member))
        return read_label_file(content, f"{self._paths[number]}: {key}, {column}")

    def _read(self, number: int, member: _Member) -> bytes:
        with open(self._paths[number], "rb") as file:
            file.seek(member.start)
            content = file.read(member.size)
        if len(content) < member.size:
            raise TrainingError(f"{self._paths[number]}: truncated since it was opened")
        return content


def _index_shard(path: Path) -> Iterator[tuple[str, dict[str, _Member]]]:
    """Yield (key, files by suffix). As for WebDataset, a key ends at the first dot of a name."""
    samples: dict[str, dict[str, _Member]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for entry in tar:
                folder, slash, base = entry.name.rpartition("/")
                stem, dot, suffix = base.partition(".")
                if entry.isfile() and stem and dot:
                    files = samples.setdefault(f"{folder}{slash}{stem}", {})
                    files[suffix] = _Member(entry.offset_data, entry.size)
            end = tar.offset
    except tarfile.TarError as error:
        raise TrainingError(f"{path}: not a tar file, or a damaged one ({error})") from None
    if end > path.stat().st_size:
        raise TrainingError(f"{path}: truncated")
    yield from samples.items()
