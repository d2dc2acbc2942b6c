"""Labeled sounds: files with their classes and folds, and lists of them."""

from __future__ import annotations

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from soundnet_port.audio.finding import parse_path_list
from soundnet_port.learning.errors import LabeledSoundsError

# Accepted column names, in order of preference.
_COLUMNS = {
    "path": ("filename", "file", "path"),
    "label": ("category", "label", "class", "scene_label"),
    "fold": ("fold",),
    "target": ("target",),
    "esc10": ("esc10",),
}
_SHOWN_NAMES = 3  # in a message


@dataclass(frozen=True)
class LabeledSound:
    """A sound file and its class.

    Attributes:
        path: of the file.
        label: its class.
        fold: the fold whose test set it is in; "" without folds, or if it is in no test set.
    """

    path: Path
    label: str
    fold: str = ""


@dataclass(frozen=True)
class Split:
    """The training set and the test set of a fold.

    Attributes:
        fold: its name.
        train: indices of sounds.
        test: indices of other sounds.
    """

    fold: str
    train: tuple[int, ...]
    test: tuple[int, ...]


@dataclass(frozen=True)
class LabeledSounds:
    """A labeled data set.

    Attributes:
        sounds: in the order of the list, or of their names.
        classes: in the data set's own order (ESC's `target`) if it has one, else sorted.
        listed_splits: training and test sets as the data set lists them; without them `splits` follows
            from the sounds' folds.
    """

    sounds: tuple[LabeledSound, ...]
    classes: tuple[str, ...]
    listed_splits: tuple[Split, ...] = ()

    @cached_property
    def targets(self) -> tuple[int, ...]:
        """The index in `classes` of each sound's class."""
        index = {label: number for number, label in enumerate(self.classes)}
        return tuple(index[sound.label] for sound in self.sounds)

    @cached_property
    def folds(self) -> tuple[str, ...]:
        """Names of the folds, in natural order ("2" before "10"); empty without folds."""
        if self.listed_splits:
            return tuple(split.fold for split in self.listed_splits)
        return tuple(sorted({sound.fold for sound in self.sounds} - {""}, key=natural_sort_key))

    @cached_property
    def splits(self) -> tuple[Split, ...]:
        """A split per fold, as listed or with the fold as the test set and all others for training."""
        if self.listed_splits:
            return self.listed_splits
        indices = range(len(self.sounds))
        return tuple(
            Split(
                fold,
                tuple(i for i in indices if self.sounds[i].fold != fold),
                tuple(i for i in indices if self.sounds[i].fold == fold),
            )
            for fold in self.folds
        )


def natural_sort_key(text: str) -> list[tuple[int, int | str]]:
    """Return a sort key that orders numbers inside texts by value."""
    parts = re.split(r"([0-9]+)", text)
    return [(0, int(part)) if number % 2 else (1, part) for number, part in enumerate(parts)]


def summarize_names(names: Iterable[object]) -> str:
    """Return the first names and the number of the others, for a message."""
    texts = [str(name) for name in names]
    rest = f" and {len(texts) - _SHOWN_NAMES:,} more" if len(texts) > _SHOWN_NAMES else ""
    return ", ".join(texts[:_SHOWN_NAMES]) + rest


# ---- lists


def read_list(path: Path) -> list[dict[str, str]]:
    """Read a list as a dictionary per line, keyed "path", "label", "fold", "target", "esc10".

    Raises:
        LabeledSoundsError: the list cannot be read, or has no column for the class.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise LabeledSoundsError(f"{path}: {error.strerror or error}") from None
    lines = [line for line in parse_path_list(content) if not line.startswith("#")]
    if not lines:
        raise LabeledSoundsError(f"{path}: empty")
    if "\t" in lines[0]:
        table = [line.split("\t") for line in lines]
        columns = _find_columns(path, table[0])
        if columns is None:  # no header
            columns = {"path": 0, "label": 1, "fold": 2}
            _check_widths(path, table)
        else:
            table = table[1:]
    elif "," in lines[0] and (path.suffix.lower() == ".csv" or _find_columns(path, lines[0].split(","))):
        text = content.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
        try:
            table = [row for row in csv.reader(io.StringIO(text, newline="")) if row and row[0][:1] != "#"]
        except csv.Error as error:
            raise LabeledSoundsError(f"{path}: not a CSV file ({error})") from None
        columns = _find_columns(path, table[0])
        if columns is None:
            raise LabeledSoundsError(
                f"{path}: the first line must name the columns, such as filename,category,fold; "
                f"it has {', '.join(table[0][:8])}"
            )
        table = table[1:]
    else:  # as the original's lists: the label is the last word
        table = [line.strip().rsplit(None, 1) for line in lines]
        columns = {"path": 0, "label": 1}
        if _find_columns(path, lines[0].split()):
            table = table[1:]
    return [{name: row[number] for name, number in columns.items() if number < len(row)} for row in table]


def match_columns(
    header: Iterable[str], accepted: Mapping[str, Sequence[str]]
) -> tuple[list[str], dict[str, int]]:
    """Return a table's column names as they are compared, and the position of each known column.

    Args:
        header: the names as they stand.
        accepted: for each column the names it may have, in order of preference.
    """
    names = [name.strip().lower() for name in header]
    return names, {
        column: names.index(name)
        for column, choices in accepted.items()
        for name in reversed(choices)
        if name in names
    }


def _find_columns(path: Path, header: Sequence[str]) -> dict[str, int] | None:
    """Return the position of each known column; None if this is no header."""
    names, columns = match_columns(header, _COLUMNS)
    if "path" in columns and "label" not in columns and len(names) > 1:
        raise LabeledSoundsError(
            f"{path}: no column for the class (one of {', '.join(_COLUMNS['label'])}); "
            f"it has {', '.join(names[:8])}"
        )
    return columns if "path" in columns else None


def _check_widths(path: Path, table: Sequence[Sequence[str]]) -> None:
    for number, row in enumerate(table, 1):
        if not 1 <= len(row) <= 3:
            raise LabeledSoundsError(
                f"{path}: sound {number} has {len(row)} columns; expected path<TAB>label<TAB>fold, "
                "or a first line that names the columns"
            )


def rows_to_sounds(
    path: Path, rows: Sequence[Mapping[str, str]], folders: Sequence[Path], esc10: bool
) -> list[LabeledSound]:
    """Turn a list's rows into sounds; their paths are relative to the first of `folders` that has them.

    Raises:
        LabeledSoundsError: a row without path or label, or `esc10` without such a column.
    """
    if esc10:
        if not any("esc10" in row for row in rows):
            raise LabeledSoundsError(f"{path}: no esc10 column; ESC-50's meta/esc50.csv has one")
        rows = [row for row in rows if row.get("esc10", "").strip().lower() == "true"]
    sounds = []
    for number, row in enumerate(rows, 1):
        name, label = row.get("path", ""), row.get("label", "").strip()
        if not name.strip() or not label:
            raise LabeledSoundsError(f"{path}: sound {number} ({name or 'no path'}) has no label")
        sounds.append(LabeledSound(locate_sound(name, folders), label, row.get("fold", "").strip()))
    return sounds


def locate_sound(name: str, folders: Sequence[Path]) -> Path:
    """Return the file of that name in the first folder that has it, else in the first folder."""
    paths = [folder / name for folder in folders]
    try:
        return next((path for path in paths if path.is_file()), paths[0])
    except (OSError, ValueError):  # not a legal name
        return paths[0]


# ---- checks


def check_sounds(
    source: Path, sounds: Sequence[LabeledSound], rows: Sequence[Mapping[str, str]] = ()
) -> LabeledSounds:
    """Make a data set of sounds after checking them.

    Args:
        source: for messages.
        sounds: of the data set.
        rows: of the list, for its targets.

    Raises:
        LabeledSoundsError: missing files, a file listed twice, fewer than two classes, sounds without a
            fold among others, contradictory targets.
    """
    missing = [sound.path for sound in sounds if not os.path.isfile(sound.path)]  # noqa: PTH113  (never raises)
    if missing:
        raise LabeledSoundsError(
            f"{source}: {len(missing):,} of {len(sounds):,} sounds do not exist: {summarize_names(missing)}"
        )
    by_file: dict[str, LabeledSound] = {}
    for sound in sounds:
        other = by_file.setdefault(os.path.realpath(sound.path), sound)
        if other is not sound:
            how = "twice" if other == sound else f"as {_describe(other)} and as {_describe(sound)}"
            raise LabeledSoundsError(f"{source}: {sound.path} is listed {how}")
    labels = {sound.label for sound in sounds}
    if len(labels) < 2:
        raise LabeledSoundsError(
            f"{source}: {len(sounds)} sounds of {len(labels)} classes; at least two classes are needed"
        )
    without = [sound.path for sound in sounds if not sound.fold]
    if 0 < len(without) < len(sounds):
        raise LabeledSoundsError(
            f"{source}: {len(without)} of {len(sounds)} sounds have no fold: {summarize_names(without)}; "
            "give all of them one, or none"
        )
    return LabeledSounds(tuple(sounds), _order_classes(source, labels, rows))


def _order_classes(source: Path, labels: set[str], rows: Iterable[Mapping[str, str]]) -> tuple[str, ...]:
    """Order classes by target if the list has targets, else by name."""
    targets: dict[str, str] = {}
    for row in rows:
        if "target" in row:
            label, target = row["label"].strip(), row["target"].strip()
            if targets.setdefault(label, target) != target:
                raise LabeledSoundsError(f"{source}: {label} has the targets {targets[label]} and {target}")
    if not targets:
        return tuple(sorted(labels, key=natural_sort_key))
    shared = [target for target, count in Counter(targets.values()).items() if count > 1]
    if shared or not all(target.isdecimal() for target in targets.values()):
        raise LabeledSoundsError(
            f"{source}: targets must be one number per class, not {summarize_names(targets.values())}"
        )
    return tuple(sorted(labels, key=lambda label: int(targets[label])))


def _describe(sound: LabeledSound) -> str:
    return sound.label + (f" in fold {sound.fold}" if sound.fold else "")
