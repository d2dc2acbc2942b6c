"""What a student is trained on: sounds with teachers' distributions, from three forms of data.

The forms are described in training.py. All of them are read at any place in any order, so that a
training's order is a matter of its seed alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from soundnet_port.audio.finding import SUFFIXES
from soundnet_port.learning.common import TrainingError
from soundnet_port.network.categories import original_categories

HEADS = ("objects", "scenes")
_SUM_TOLERANCE = 2e-3  # of a distribution; float16 rounds each probability by up to 5e-4 of it
Labels = dict[str, NDArray[np.float32]]  # by teacher, (steps, categories)


class Data(Protocol):
    """Sounds with labels, in a fixed order.

    Attributes:
        name: what it was read from.
        steps: label steps of each sound, (sounds,).
        teachers: number of categories by column ("objects", "objects:vit", "scenes").
        categories: names of the outputs by head, where they are known.
        identity: of the lists that it was read from; a training goes on with the same one only.
    """

    name: str
    steps: NDArray[np.int64]
    teachers: dict[str, int]
    categories: dict[str, list[str]] | None
    identity: str

    def sound(self, index: int) -> contextlib.AbstractContextManager[Path]:
        """A file with that sound, as a context manager."""
        ...

    def called(self, index: int) -> str:
        """What the sound is called in messages."""
        ...

    def labels(self, index: int) -> Labels:
        """The teachers' distributions for that sound."""
        ...


def head_of(teacher: str) -> str:
    """The head that a teacher's column is for."""
    return teacher.partition(":")[0]


def open_data(source: str | os.PathLike[str], split: str = "train") -> Data:
    """The data of a manifest, a shard or a folder of shards, or the folder of the released data.

    Args:
        source: `*.tsv`, `*.tar`, a folder of `*.tar`, or a folder with the released lists.
        split: "train" or "val", of the released data.

    Raises:
        TrainingError: it is none of these, or what it lists is not as it must be.
    """
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            if shards := sorted(path.glob("*.tar")):
                return Shards(shards, str(path))
            return Release(path, split)
        if not path.exists():
            raise TrainingError(f"{path}: no such file or folder")
        return Shards([path], str(path)) if path.suffix == ".tar" else Manifest(path)
    except OSError as error:
        raise TrainingError(f"{error.filename or path}: {error.strerror or error}") from None


class Manifest:
    """A text file that names sounds and their label files; all of these are looked at."""

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
        _check_teachers(str(path), columns[1:])
        self.name = str(path)
        self.identity = hashlib.sha256(text.encode()).hexdigest()
        self._columns = columns[1:]
        self._rows: list[list[Path]] = []
        self.teachers: dict[str, int] = {}
        steps = []
        for number, line in enumerate(lines, 2):
            if not line.strip():
                continue
            cells = line.split("\t")
            if len(cells) != len(columns):
                raise TrainingError(f"{path}, line {number}: {len(cells)} columns, expected {len(columns)}")
            row = [path.parent / cell for cell in cells]
            if not row[0].is_file():
                raise TrainingError(f"{path}, line {number}: {row[0]}: no such sound file")
            labels = {}
            for column, file in zip(self._columns, row[1:], strict=True):
                try:
                    labels[column] = _read_labels(file)
                except TrainingError as error:
                    raise TrainingError(f"{path}, line {number}: {error}") from None
            steps.append(_check_shapes(f"{path}, line {number}", labels, self.teachers))
            self._rows.append(row)
        if not self._rows:
            raise TrainingError(f"{path}: lists no sounds")
        self.steps = np.array(steps, np.int64)
        self.categories = _category_names(path.parent, self.teachers)

    def sound(self, index: int) -> contextlib.AbstractContextManager[Path]:
        return contextlib.nullcontext(self._rows[index][0])

    def called(self, index: int) -> str:
        return str(self._rows[index][0])

    def labels(self, index: int) -> Labels:
        files = zip(self._columns, self._rows[index][1:], strict=True)
        return {column: _read_labels(file) for column, file in files}


@dataclass(frozen=True)
class _Member:
    """Where a file lies in a shard."""

    start: int
    size: int


class Shards:
    """WebDataset shards: tar files in which the files of a sound share a key.

    The places of all files are looked up once, so that any sound can be read at any time.
    """

    def __init__(self, paths: Sequence[Path], name: str) -> None:
        self.name = name
        self.teachers: dict[str, int] = {}
        self._paths = list(paths)
        self._sounds: list[tuple[int, str, _Member, dict[str, _Member]]] = []
        steps = []
        digest = hashlib.sha256()
        for number, path in enumerate(self._paths):
            for key, files in _samples(path):
                digest.update(f"{path.name}\t{key}\t{sorted(files)}\n".encode())
                suffixes = [suffix for suffix in files if f".{suffix.lower()}" in SUFFIXES]
                labels = {
                    suffix.removesuffix(".npy"): member
                    for suffix, member in files.items()
                    if suffix.endswith(".npy") and head_of(suffix.removesuffix(".npy")) in HEADS
                }
                if len(suffixes) != 1 or not labels:
                    raise TrainingError(
                        f"{path}: {key} has {len(suffixes)} sounds and {len(labels)} label files; "
                        f"expected {key}.mp3 (or another sound), {key}.objects.npy, {key}.scenes.npy"
                    )
                _check_teachers(f"{path}: {key}", list(labels))
                if self._sounds and set(labels) != set(self.teachers):
                    raise TrainingError(
                        f"{path}: {key} has {', '.join(labels)}, the first sound {', '.join(self.teachers)}"
                    )
                read = {column: self._labels(number, key, column, m) for column, m in labels.items()}
                steps.append(_check_shapes(f"{path}: {key}", read, self.teachers))
                self._sounds.append((number, f"{key}.{suffixes[0]}", files[suffixes[0]], labels))
        if not self._sounds:
            raise TrainingError(f"{name}: holds no sounds")
        self.identity = digest.hexdigest()
        self.steps = np.array(steps, np.int64)
        self.categories = _category_names(self._paths[0].parent, self.teachers)

    @contextlib.contextmanager
    def sound(self, index: int) -> Iterator[Path]:
        number, name, member, _ = self._sounds[index]
        with tempfile.NamedTemporaryFile(suffix=Path(name).suffix) as file:
            file.write(self._read(number, member))
            file.flush()
            yield Path(file.name)

    def called(self, index: int) -> str:
        number, name, _, _ = self._sounds[index]
        return f"{self._paths[number]}: {name}"

    def labels(self, index: int) -> Labels:
        number, name, _, labels = self._sounds[index]
        return {column: self._labels(number, name, column, m) for column, m in labels.items()}

    def _labels(self, number: int, key: str, column: str, member: _Member) -> NDArray[np.float32]:
        raw = io.BytesIO(self._read(number, member))
        return _read_labels(raw, f"{self._paths[number]}: {key}, {column}")

    def _read(self, number: int, member: _Member) -> bytes:
        with open(self._paths[number], "rb") as file:
            file.seek(member.start)
            raw = file.read(member.size)
        if len(raw) < member.size:
            raise TrainingError(f"{self._paths[number]}: has become shorter")
        return raw


def _samples(path: Path) -> Iterator[tuple[str, dict[str, _Member]]]:
    """(key, files by suffix) of a shard. As for WebDataset, a key ends at the first dot of a name."""
    found: dict[str, dict[str, _Member]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, slash, base = member.name.rpartition("/")
                stem, dot, suffix = base.partition(".")
                if member.isfile() and stem and dot:
                    place = _Member(member.offset_data, member.size)
                    found.setdefault(f"{folder}{slash}{stem}", {})[suffix] = place
            end = tar.offset
    except tarfile.TarError as error:
        raise TrainingError(f"{path}: not a tar file, or a damaged one ({error})") from None
    if end > path.stat().st_size:
        raise TrainingError(f"{path}: truncated")
    yield from found.items()


class Release:
    """The released Flickr data, as they are unpacked from MIT's archives, in any folders under `folder`.

    `train_frames4_0001.txt` to `_0040.txt` (and `val_frames4_*`) have a line for each frame, whose
    first word is the frame's path. Consecutive lines with the same folder are one video: its label
    steps, 1 to 4. The folder after `frames/`, with `.mp3` added, is its sound under `mp3/`.
    `VGG16_IMNET_TRAIN_B0001/prob` and `VGG16_PLACES2_TRAIN_B0001/prob` (for val `..._VAL_...`) hold a
    row of 1000 or 401 float32 for every line of the list of that number. They are mapped into memory.
    """

    heads = (("objects", "IMNET", 1000), ("scenes", "PLACES2", 401))

    def __init__(self, folder: Path, split: str = "train") -> None:
        lists = _found(folder, f"{split}_frames4_*.txt")
        if not lists:
            raise TrainingError(
                f"{folder}: holds neither shards (*.tar) nor the released lists ({split}_frames4_0001.txt)"
            )
        mp3 = _found(folder, "mp3")
        if not mp3 or not mp3[0].is_dir():
            raise TrainingError(f"{folder}: the folder mp3 with the sounds is not there")
        self._mp3 = mp3[0]
        self.name = str(folder)
        self.teachers = {column: size for column, _, size in self.heads}
        self.categories = original_categories(self.teachers)
        self._rows: dict[str, list[NDArray[np.float32]]] = {column: [] for column, _, _ in self.heads}
        digest = hashlib.sha256()
        names, lists_of, firsts, steps = [], [], [], []
        for number, path in enumerate(lists):
            digest.update(path.name.encode())
            videos, starts, lines = _videos(path, digest)
            names.append(np.array(videos, dtype=np.bytes_))
            lists_of.append(np.full(len(videos), number, np.int16))
            firsts.append(np.array(starts, np.int64))
            steps.append(np.diff(np.array([*starts, lines], np.int64)))
            if steps[-1].max() > 4:
                first = int(starts[int(steps[-1].argmax())]) + 1
                raise TrainingError(f"{path}, line {first}: more than 4 frames of one video")
            block = path.stem.rpartition("_")[2]
            for column, what, size in self.heads:
                self._rows[column].append(
                    _mapped(folder, f"VGG16_{what}_{split.upper()}_B{block}", lines, size)
                )
        self._names = np.concatenate(names)
        self._list = np.concatenate(lists_of)
        self._first = np.concatenate(firsts)
        self.steps = np.concatenate(steps).astype(np.int64)
        self.identity = digest.hexdigest()

    def sound(self, index: int) -> contextlib.AbstractContextManager[Path]:
        return contextlib.nullcontext(Path(self.called(index)))

    def called(self, index: int) -> str:
        return str(self._mp3 / f"{os.fsdecode(bytes(self._names[index]))}.mp3")

    def labels(self, index: int) -> Labels:
        first, steps = self._first[index], self.steps[index]
        labels = {}
        for column, blocks in self._rows.items():
            rows = np.array(blocks[self._list[index]][first : first + steps], np.float32)
            labels[column] = _checked(rows, f"{column} of {self.called(index)}")
        return labels


def _found(folder: Path, pattern: str) -> list[Path]:
    """What fits the pattern in the first of the folder, its subfolders and theirs that holds any."""
    for depth in ("", "*/", "*/*/"):
        if found := sorted(folder.glob(depth + pattern)):
            return [path for path in found if path.parent == found[0].parent]
    return []


def _videos(path: Path, digest: Any) -> tuple[list[bytes], list[int], int]:
    """Videos of a list: their names, the lines on which they begin (from 0), and how many lines there are."""
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
        raise TrainingError(f"{path}: an empty list")
    return videos, starts, lines


def _mapped(folder: Path, name: str, lines: int, size: int) -> NDArray[np.float32]:
    found = _found(folder, f"{name}/prob")
    if not found:
        raise TrainingError(f"{folder}: {name}/prob is not there; its list is")
    expected, there = lines * size * 4, found[0].stat().st_size
    if there != expected:
        raise TrainingError(
            f"{found[0]}: {there:,} bytes, expected {expected:,} ({lines:,} lines x {size} float32)"
        )
    return np.memmap(found[0], np.dtype("<f4"), "r", shape=(lines, size))


def _read_labels(file: Path | io.BytesIO, name: str = "") -> NDArray[np.float32]:
    name = name or str(file)
    try:
        rows = np.load(file, allow_pickle=False)
    except OSError as error:
        raise TrainingError(f"{name}: {error.strerror or error}") from None
    except (ValueError, EOFError) as error:
        raise TrainingError(f"{name}: not an array in NumPy's format ({error})") from None
    if not isinstance(rows, np.ndarray) or rows.dtype.kind != "f":
        kind = rows.dtype if isinstance(rows, np.ndarray) else "an archive"
        raise TrainingError(f"{name}: {kind}, expected an array of float32 or float16")
    return _checked(rows.astype(np.float32), name)


def _checked(rows: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    """The rows, if they are distributions."""
    if rows.ndim != 2 or not rows.size:
        raise TrainingError(f"{name}: the shape {rows.shape}, expected (steps, categories)")
    sums = rows.sum(1, dtype=np.float64)
    good = (np.abs(sums - 1) <= _SUM_TOLERANCE) & (rows >= 0).all(1)  # NaN is not good
    if not good.all():
        step = int(np.flatnonzero(~good)[0])
        if not np.isfinite(rows[step]).all():
            what = "holds NaN or infinity"
        elif (rows[step] < 0).any():
            what = f"holds {rows[step].min():.6g}; logits need a softmax first"
        else:
            what = f"sums to {sums[step]:.6g}, not to 1"
        raise TrainingError(f"{name}: step {step} {what}; each step must be a distribution")
    return rows


def _check_teachers(where: str, columns: Sequence[str]) -> None:
    for column in columns:
        head, colon, rest = column.partition(":")
        if head not in HEADS or bool(colon) != bool(rest):
            raise TrainingError(
                f"{where}: a teacher called {column!r}, expected objects or scenes, or such as objects:vit"
            )
    if len(set(columns)) < len(columns) or {head_of(column) for column in columns} != set(HEADS):
        raise TrainingError(
            f"{where}: teachers {', '.join(columns) or 'none'}; expected one or more for objects and for "
            "scenes, each of another name"
        )


def _check_shapes(where: str, labels: Mapping[str, NDArray[np.float32]], known: dict[str, int]) -> int:
    """The number of steps of a sound, if all its shapes fit; the first sound says how many categories."""
    sizes = {column: rows.shape[1] for column, rows in labels.items()}
    for column, size in sizes.items():
        expected = known.get(column) or sizes[next(c for c in sizes if head_of(c) == head_of(column))]
        if size != expected:
            raise TrainingError(f"{where}: {column} has {size} categories, expected {expected}")
    known.update(sizes)
    steps = {column: len(rows) for column, rows in labels.items()}
    if len(set(steps.values())) > 1:
        raise TrainingError(f"{where}: teachers of different lengths, {steps}")
    return next(iter(steps.values()))


def _category_names(folder: Path, teachers: Mapping[str, int]) -> dict[str, list[str]] | None:
    """Names of the outputs that stand beside the data, if those of all heads do."""
    names = {}
    for head in HEADS:
        path = folder / f"{head}.categories.txt"
        if not path.exists():
            return None
        names[head] = path.read_text("utf-8").splitlines()
        expected = next(size for column, size in teachers.items() if head_of(column) == head)
        if len(names[head]) != expected:
            raise TrainingError(f"{path}: {len(names[head])} names, but {expected} categories")
    return names
