"""Recordings for encoding models: sounds with arrays of targets, from a table."""

from __future__ import annotations

import csv
import io
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soundnet_port.errors import SoundNetError, require
from soundnet_port.learning.errors import EncodingError
from soundnet_port.learning.labeled_sounds import (
    locate_sound,
    match_columns,
    natural_sort_key,
    summarize_names,
)

MOST_FOLDS = 10
_COLUMNS = {
    "sound": ("file", "filename", "path", "sound"),
    "targets": ("targets", "responses"),
    "run": ("run",),
    "stimulus": ("stimulus",),
    "onset": ("onset",),
}


@dataclass(frozen=True)
class Recording:
    """What was measured while a sound was played.

    Attributes:
        sound: the sound file.
        targets: (time, outputs), such as the voxels of each fMRI volume. Volumes that are NaN in all outputs
            are left out.
        run: recordings of one run are z-scored together and held out together; its name must not be empty.
        stimulus: recordings of one stimulus are held out together, and give the noise ceiling; by default
            the sound file.
        onset: start of the first period of `targets`, in seconds after the sound's start; may be negative.
    """

    sound: Path
    targets: NDArray[np.float32]
    run: str
    stimulus: str = ""
    onset: float = 0.0

    @property
    def stimulus_key(self) -> str:
        """The stimulus, or the sound file."""
        return self.stimulus or os.path.realpath(self.sound)


def read_recordings(table: str | os.PathLike[str]) -> list[Recording]:
    """Read a table of recordings and their arrays.

    The first line names the columns, tab- or comma-separated: `file` (the sound) and `targets` (the array);
    optional `run`, `stimulus` and `onset`, see `Recording`. Without `run` each line is a run. Paths are
    relative to the table.

    Raises:
        EncodingError: the table or an array cannot be used, or a sound does not exist.
        MissingExtraError: an HDF5 file, and the extra `[hdf5]` is not installed.
    """
    path = Path(table)
    recordings = []
    for number, row in enumerate(_read_rows(path), 1):
        name = f"{path}: recording {number}"
        if not row.get("sound") or not row.get("targets"):
            raise EncodingError(f"{name}: no {'targets' if row.get('sound') else 'file'}")
        sound = locate_sound(row["sound"], [path.parent])
        try:
            onset = float(row.get("onset") or 0)
        except ValueError:
            raise EncodingError(f"{name}: onset {row['onset']!r} is not a number of seconds") from None
        run = row.get("run") or str(number)
        targets = read_array(path.parent, row["targets"])
        recordings.append(Recording(sound, targets, run, row.get("stimulus", ""), onset))
    missing = [recording.sound for recording in recordings if not os.path.isfile(recording.sound)]  # noqa: PTH113
    if missing:
        raise EncodingError(f"{path}: {len(missing):,} sounds do not exist: {summarize_names(missing)}")
    return recordings


def _read_rows(path: Path) -> list[dict[str, str]]:
    try:
        text = path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    except OSError as error:
        raise EncodingError(f"{path}: {error.strerror or error}") from None
    lines = io.StringIO("".join(line for line in text.splitlines(True) if line.strip() and line[0] != "#"))
    delimiter = "\t" if "\t" in lines.getvalue().split("\n")[0] else ","
    try:
        header, *rows = list(csv.reader(lines, delimiter=delimiter)) or [[]]
    except csv.Error:
        raise EncodingError(
            f"{path}: not a table; it needs columns such as file<TAB>targets<TAB>run"
        ) from None
    names, columns = match_columns(header, _COLUMNS)
    for column, shown in (("sound", "file"), ("targets", "targets")):
        if column not in columns:
            raise EncodingError(
                f"{path}: no column {shown!r}; the first line must name the columns, such as "
                f"file<TAB>targets<TAB>run; it has {', '.join(names[:8]) or 'none'}"
            )
    if not rows:
        raise EncodingError(f"{path}: no recordings below the names of the columns")
    return [{name: row[i].strip() for name, i in columns.items() if i < len(row)} for row in rows]


# ---- arrays


def read_array(folder: Path, name: str) -> NDArray[np.float32]:
    """Read an array of targets, (time, outputs); one dimension is one output.

    Args:
        folder: that the path is relative to.
        name: path of an .npy, .npz, .csv, .tsv or .txt file, or "file.h5:dataset"; in an .npz that holds
            several arrays, "file.npz:array".

    Raises:
        EncodingError: it cannot be read, or is no such array.
        MissingExtraError: an HDF5 file, and the extra `[hdf5]` is not installed.
    """
    path, key = _split_key(folder, name)
    suffix = path.suffix.lower()
    try:
        if suffix == ".npy":
            array = np.load(path, allow_pickle=False)
        elif suffix == ".npz":
            array = _read_npz(path, key)
        elif suffix in (".csv", ".tsv", ".txt"):
            array = _read_numbers(path)
        elif suffix in (".h5", ".hdf5"):
            array = _read_hdf5(path, key)
        else:
            raise EncodingError(f"{path}: unknown type of array; use .npy, .npz, .csv, .tsv or .h5:dataset")
    except OSError as error:
        raise EncodingError(f"{path}: {error.strerror or error}") from None
    except SoundNetError:
        raise
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split("\n")[0].split())
        raise EncodingError(f"{path}: cannot be read as an array ({reason})") from None
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2 or not array.size or array.dtype.kind not in "fiub":
        raise EncodingError(
            f"{path}: expected numbers as (time, outputs), not {array.dtype} of shape {array.shape}"
        )
    with np.errstate(over="ignore"):
        values: NDArray[np.float32] = array.astype(np.float32)
    values[np.isinf(values)] = np.nan
    return values


def _split_key(folder: Path, name: str) -> tuple[Path, str]:
    """Split "file.h5:dataset"."""
    file, _, key = name.rpartition(":")
    if file.lower().endswith((".h5", ".hdf5", ".npz")):
        return folder / file, key
    return folder / name, ""


def _read_npz(path: Path, key: str) -> NDArray[Any]:
    with np.load(path, allow_pickle=False) as arrays:
        if key not in arrays.files and (key or len(arrays.files) != 1):
            choices = summarize_names(f"{path.name}:{file}" for file in arrays.files)
            raise EncodingError(f"{path}: name one of its arrays: {choices}")
        array: NDArray[Any] = arrays[key or arrays.files[0]]
    return array


def _read_numbers(path: Path) -> NDArray[Any]:
    """Read a table of numbers, with or without a line of names."""
    text = path.read_text("utf-8", "replace").removeprefix("\ufeff")
    first = text.partition("\n")[0]
    delimiter = "\t" if "\t" in first else "," if "," in first else None
    words = first.split(delimiter)
    skipped = int(not all(_is_number(word) for word in words))
    array = np.genfromtxt(
        io.StringIO(text), delimiter=delimiter, skip_header=skipped, missing_values=("n/a", "NA"), ndmin=2
    )
    return np.asarray(array)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return word.strip().lower() in ("n/a", "na", "")
    return True


def _read_hdf5(path: Path, key: str) -> NDArray[Any]:
    h5py = require("h5py", "hdf5")
    with h5py.File(path) as file:
        datasets: list[str] = []
        file.visititems(lambda name, item: datasets.append(name) if hasattr(item, "shape") else None)
        if key.strip("/") not in datasets and (key or len(datasets) != 1):
            choices = summarize_names(f"{path.name}:{name}" for name in datasets)
            raise EncodingError(f"{path}: name one of its datasets: {choices}")
        return np.asarray(file[key or datasets[0]])


# ---- checks and folds


def list_recordings(recordings: Sequence[Recording] | str | os.PathLike[str]) -> list[Recording]:
    """Return recordings, of a table if it is one, whose arrays fit together.

    Raises:
        EncodingError: as `read_recordings`; no recordings, arrays of other shapes, or an onset that is no
            number.
        MissingExtraError: as `read_recordings`.
    """
    listed = read_recordings(recordings) if isinstance(recordings, (str, os.PathLike)) else list(recordings)
    if not listed:
        raise EncodingError("recordings: there are none")
    for recording in listed:
        shape = recording.targets.shape
        if len(shape) != 2 or not all(shape):
            raise EncodingError(f"{recording.sound}: targets must be (time, outputs), not {shape}")
        expected = listed[0].targets.shape[1]
        if shape[1] != expected:
            raise EncodingError(
                f"{recording.sound}, run {recording.run}: {shape[1]:,} outputs, where the first recording "
                f"has {expected:,}; all must have the same"
            )
        if not np.isfinite(recording.onset):
            raise EncodingError(
                f"{recording.sound}: onset must be a number of seconds, not {recording.onset}"
            )
    return listed


def group_recordings(recordings: Sequence[Recording]) -> list[int]:
    """Return the group of each recording; what shares a run or a stimulus is of one group."""
    group = list(range(len(recordings)))
    for key in ("run", "stimulus_key"):
        first: dict[str, int] = {}
        for index, recording in enumerate(recordings):
            other = group[first.setdefault(getattr(recording, key), index)]
            if other != group[index]:
                old = group[index]
                group = [other if member == old else member for member in group]
    return group


def name_runs(recordings: Sequence[Recording]) -> str:
    """Name the runs of recordings, for messages; many are abbreviated."""
    ordered = sorted({recording.run for recording in recordings}, key=natural_sort_key)
    return summarize_names(ordered)


def assign_folds(recordings: Sequence[Recording], most: int) -> tuple[list[int], list[str]]:
    """Assign recordings to folds; what shares a run or a stimulus stays together.

    Args:
        recordings: two independent groups of them at least.
        most: folds at most. Where there are more groups, each fold gets several, of about the same number
            of volumes.

    Returns:
        the fold of each recording, and the folds' names, from their runs.

    Raises:
        EncodingError: all recordings share runs or stimuli.
    """
    group = group_recordings(recordings)
    sizes: dict[int, int] = {}
    for number, recording in zip(group, recordings, strict=True):
        sizes[number] = sizes.get(number, 0) + len(recording.targets)
    if len(sizes) < 2:
        what = (
            "a single run" if len({recording.run for recording in recordings}) == 1 else "a single stimulus"
        )
        raise EncodingError(
            f"recordings: {what}; at least two are needed, as runs and stimuli are held out as a whole. "
            "A long recording can be cut into several sounds with their volumes, at pauses"
        )
    if len(sizes) <= most:
        fold_of = {number: fold for fold, number in enumerate(sizes)}
    else:
        totals = [0] * most
        fold_of = {}
        for number in sorted(sizes, key=lambda number: -sizes[number]):
            fold = totals.index(min(totals))
            fold_of[number] = fold
            totals[fold] += sizes[number]
    folds = [fold_of[number] for number in group]
    return folds, [
        name_runs([recording for recording, own in zip(recordings, folds, strict=True) if own == fold])
        for fold in range(max(folds) + 1)
    ]
