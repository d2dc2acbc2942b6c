"""Pseudo-labels: teachers' distributions over the categories of a head, for each 5 s of a sound."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from soundnet_port.learning.errors import TrainingError

HEADS = ("objects", "scenes")
_SUM_TOLERANCE = 2e-3  # of a distribution; float16 rounds each probability by up to 5e-4 of it
Labels = dict[str, NDArray[np.float32]]  # by teacher, (steps, categories)


class DistillationData(Protocol):
    """Sounds with pseudo-labels, in a fixed order, for random access.

    Attributes:
        name: what they were read from.
        steps: label steps of each sound, (sounds,).
        teachers: number of categories by column ("objects", "objects:vit", "scenes").
        categories: names of the outputs by head, if known.
        identity: sha256 of the lists they were read from; a run resumes with the same one only.
    """

    name: str
    steps: NDArray[np.int64]
    teachers: dict[str, int]
    categories: dict[str, list[str]] | None
    identity: str

    def open_sound(self, index: int) -> contextlib.AbstractContextManager[Path]:
        """Provide the sound as a file inside the block."""
        ...

    def sound_name(self, index: int) -> str:
        """Return the sound's name for messages."""
        ...

    def read_labels(self, index: int) -> Labels:
        """Read the teachers' distributions for the sound."""
        ...


def get_head(teacher: str) -> str:
    """Return the head that a teacher's column is for."""
    return teacher.partition(":")[0]


def read_label_file(file: Path | io.BytesIO, name: str = "") -> NDArray[np.float32]:
    """Read an array of distributions, (steps, categories), in NumPy's format without pickle.

    Raises:
        TrainingError: the file cannot be read, or holds anything else.
    """
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
    return check_distributions(rows.astype(np.float32), name)


def check_distributions(rows: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    """Return the rows if each is a distribution.

    Raises:
        TrainingError: the first row that is not one, and why.
    """
    if rows.ndim != 2 or not rows.size:
        raise TrainingError(f"{name}: the shape {rows.shape}, expected (steps, categories)")
    sums = rows.sum(1, dtype=np.float64)
    valid = (np.abs(sums - 1) <= _SUM_TOLERANCE) & (rows >= 0).all(1)  # False for NaN
    if not valid.all():
        step = int(np.flatnonzero(~valid)[0])
        if not np.isfinite(rows[step]).all():
            problem = "holds NaN or infinity"
        elif (rows[step] < 0).any():
            problem = f"holds {rows[step].min():.6g}; logits need a softmax first"
        else:
            problem = f"sums to {sums[step]:.6g}, not to 1"
        raise TrainingError(f"{name}: step {step} {problem}; each step must be a distribution")
    return rows


def check_teachers(source: str, columns: Sequence[str]) -> None:
    """Check teachers' names: one or more for each head.

    Raises:
        TrainingError: they are not.
    """
    for column in columns:
        head, colon, suffix = column.partition(":")
        if head not in HEADS or bool(colon) != bool(suffix):
            raise TrainingError(
                f"{source}: unknown teacher {column!r}; use objects or scenes, or such as objects:vit"
            )
    if len(set(columns)) < len(columns) or {get_head(column) for column in columns} != set(HEADS):
        raise TrainingError(
            f"{source}: teachers {', '.join(columns) or 'none'}; expected one or more for objects and for "
            "scenes, with different names"
        )


def check_shapes(source: str, labels: Mapping[str, NDArray[np.float32]], categories: dict[str, int]) -> int:
    """Check a sound's labels against each other and against `categories`, which the first sound fills.

    Returns:
        the sound's label steps

    Raises:
        TrainingError: the shapes differ.
    """
    sizes = {column: rows.shape[1] for column, rows in labels.items()}
    for column, size in sizes.items():
        same_head = next(other for other in sizes if get_head(other) == get_head(column))
        expected = categories.get(column) or sizes[same_head]
        if size != expected:
            raise TrainingError(f"{source}: {column} has {size} categories, expected {expected}")
    categories.update(sizes)
    steps = {column: len(rows) for column, rows in labels.items()}
    if len(set(steps.values())) > 1:
        raise TrainingError(f"{source}: teachers of different lengths, {steps}")
    return next(iter(steps.values()))


def read_category_names(folder: Path, teachers: Mapping[str, int]) -> dict[str, list[str]] | None:
    """Read `objects.categories.txt` and `scenes.categories.txt`; None unless both exist.

    Raises:
        TrainingError: another number of names than of categories.
    """
    names = {}
    for head in HEADS:
        path = folder / f"{head}.categories.txt"
        if not path.exists():
            return None
        names[head] = path.read_text("utf-8").splitlines()
        expected = next(size for column, size in teachers.items() if get_head(column) == head)
        if len(names[head]) != expected:
            raise TrainingError(f"{path}: {len(names[head])} names, but {expected} categories")
    return names
