"""Labelled sounds: lists of files with their classes, and data sets as they are downloaded.

| what | how it is laid out |
|---|---|
| ESC-50 (and its subset ESC-10) | `meta/esc50.csv`, `audio/`; fold, target and category per file |
| ESC-50, ESC-10 as first released | `101 - Dog/1-100032-A.ogg`: class in the folder, fold first in the name |
| DCASE, TUT, TAU scenes | `meta.txt` or `meta.csv`, `audio/`, `evaluation_setup/fold1_train.txt`, ... |
| DCASE 2013 and 2014 scenes | `scenes_stereo/bus01.wav`: the class, then two digits |
| the original's evaluation scripts | `splits/train1.txt`, `splits/test1.txt`, or `train.txt`, `test.txt` |
| any folder | a folder of sounds for each class |
| any list | a line `path<TAB>label<TAB>fold` per sound, or a table whose first line names its columns |
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from soundnet_port.audio.finding import has_sound_suffix, parse_path_list
from soundnet_port.errors import SoundNetError

# Names of columns, in the order of preference.
_COLUMNS = {
    "path": ("filename", "file", "path"),
    "label": ("category", "label", "class", "scene_label"),
    "fold": ("fold",),
    "target": ("target",),
    "esc10": ("esc10",),
}
_TABLES = ("meta/esc50.csv", "meta.tsv", "meta.csv", "meta.txt")
_FOLD_LISTS = (
    ("evaluation_setup", re.compile(r"fold(?P<fold>\d+)_(?P<part>train|test|evaluate)\.(txt|csv)")),
    ("splits", re.compile(r"(?P<part>train|test)(?P<fold>\d+)\.txt")),
    ("", re.compile(r"(?P<part>train|test)(?P<fold>\d*)\.txt")),
)
_ESC_FOLDER = re.compile(r"(?P<number>\d+) - (?P<label>.+)")
_ESC_NAME = re.compile(r"(?P<fold>\d+)-")
_SCENE_NAME = re.compile(r"(?P<label>[a-z]+)\d\d\.wav")
_NAMED = 3  # files in a message


class LabeledSoundsError(SoundNetError):
    """Labelled sounds that cannot be used: where, and why."""


@dataclass(frozen=True)
class LabeledSound:
    """A sound file and its class.

    Attributes:
        path: of the file.
        label: its class.
        fold: whose test set it is in; "" where there are no folds, or where it is in no test set.
    """

    path: Path
    label: str
    fold: str = ""


@dataclass(frozen=True)
class Split:
    """What is learnt from, and what is tested on.

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
    """A labelled data set.

    Attributes:
        sounds: in the order of the list, or of their names.
        classes: in the data set's own order (ESC's `target`) if it has one, else sorted.
        listed: training and test sets of each fold, where the data set lists them. Else they
            follow from the sounds' folds, see `splits`.
    """

    sounds: tuple[LabeledSound, ...]
    classes: tuple[str, ...]
    listed: tuple[Split, ...] = ()

    @cached_property
    def targets(self) -> tuple[int, ...]:
        """For each sound the index of its class in `classes`."""
        index = {label: number for number, label in enumerate(self.classes)}
        return tuple(index[sound.label] for sound in self.sounds)

    @cached_property
    def folds(self) -> tuple[str, ...]:
        """Names of the folds, in natural order ("2" before "10"); empty if there are none."""
        if self.listed:
            return tuple(split.fold for split in self.listed)
        return tuple(sorted({sound.fold for sound in self.sounds} - {""}, key=natural))

    @cached_property
    def splits(self) -> tuple[Split, ...]:
        """A split for each fold, as listed, or with its sounds in the test and all others to learn from."""
        if self.listed:
            return self.listed
        numbers = range(len(self.sounds))
        return tuple(
            Split(
                fold,
                tuple(i for i in numbers if self.sounds[i].fold != fold),
                tuple(i for i in numbers if self.sounds[i].fold == fold),
            )
            for fold in self.folds
        )


def read_labeled(
    source: str | os.PathLike[str], root: str | os.PathLike[str] | None = None, *, esc10: bool = False
) -> LabeledSounds:
    """Reads a list of labelled sounds, or a data set's folder.

    Args:
        source: a folder in one of the layouts of this module's table, or a list. A line of a list is
            `path<TAB>label<TAB>fold`, the fold may be left out; or `path label` as in the original's
            lists; or the first line names the columns, separated by tabs or commas: file (or
            filename, path), label (or category, class, scene_label), and optionally fold and target.
            Lines that begin with # are comments.
        root: folder that a list's paths are relative to; by default the list's own.
        esc10: only the sounds that ESC-50's `esc10` column marks.

    Raises:
        LabelledError: nothing that is known, missing files, unknown columns, a file that is named
            twice, classes without sounds, fewer than two classes, folds that contradict each other.
    """
    place = Path(source).expanduser()
    if esc10 and not (place.is_file() or _table_of(place)):
        raise LabeledSoundsError(f"{place}: no table with an esc10 column, as in ESC-50's meta/esc50.csv")
    if place.is_dir():
        return _read_folder(place, esc10)
    rows = _rows(place, _content(place))
    above = Path(root).expanduser() if root is not None else place.parent
    return _checked(place, _listed(place, rows, [above], esc10), rows)


def natural(text: str) -> list[tuple[int, int | str]]:
    """A key that sorts numbers inside texts by their value."""
    parts = re.split(r"([0-9]+)", text)
    return [(0, int(part)) if number % 2 else (1, part) for number, part in enumerate(parts)]


# ---- lists


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise LabeledSoundsError(f"{path}: {error.strerror or error}") from None


def _rows(place: Path, content: bytes) -> list[dict[str, str]]:
    """A dictionary for each line, by our names of the columns."""
    lines = [line for line in parse_path_list(content) if not line.startswith("#")]
    if not lines:
        raise LabeledSoundsError(f"{place}: empty")
    if "\t" in lines[0]:
        table = [line.split("\t") for line in lines]
        columns = _columns(place, table[0])
        if columns is None:  # no header
            columns = {name: number for number, name in enumerate(("path", "label", "fold"))}
            _check_width(place, table)
        else:
            table = table[1:]
    elif "," in lines[0] and (place.suffix.lower() == ".csv" or _columns(place, lines[0].split(","))):
        text = content.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
        try:
            table = [row for row in csv.reader(io.StringIO(text, newline="")) if row and row[0][:1] != "#"]
        except csv.Error as error:
            raise LabeledSoundsError(f"{place}: not a CSV file ({error})") from None
        columns = _columns(place, table[0])
        if columns is None:
            raise LabeledSoundsError(
                f"{place}: its first line must name the columns, such as filename,category,fold; "
                f"there are {', '.join(table[0][:8])}"
            )
        table = table[1:]
    else:  # as the original's lists: no spaces in paths, or none but in paths
        table = [line.strip().rsplit(None, 1) for line in lines]
        columns = {"path": 0, "label": 1}
        if _columns(place, lines[0].split()):
            table = table[1:]
    return [{name: row[number] for name, number in columns.items() if number < len(row)} for row in table]


def _columns(place: Path, header: Sequence[str]) -> dict[str, int] | None:
    """Where our columns are in a header; None if it is none."""
    names = [name.strip().lower() for name in header]
    found = {
        ours: names.index(theirs)
        for ours, choices in _COLUMNS.items()
        for theirs in reversed(choices)
        if theirs in names
    }
    if "path" in found and "label" not in found and len(names) > 1:
        raise LabeledSoundsError(
            f"{place}: has no column for the class (one of {', '.join(_COLUMNS['label'])}); "
            f"there are {', '.join(names[:8])}"
        )
    return found if "path" in found else None


def _check_width(place: Path, table: Sequence[Sequence[str]]) -> None:
    for number, row in enumerate(table, 1):
        if not 1 <= len(row) <= 3:
            raise LabeledSoundsError(
                f"{place}: sound {number} has {len(row)} columns; expected path<TAB>label<TAB>fold, "
                "or a first line that names the columns"
            )


def _listed(
    place: Path, rows: Sequence[Mapping[str, str]], above: Sequence[Path], esc10: bool
) -> list[LabeledSound]:
    if esc10:
        if not any("esc10" in row for row in rows):
            raise LabeledSoundsError(f"{place}: has no esc10 column; ESC-50's meta/esc50.csv has one")
        rows = [row for row in rows if row.get("esc10", "").strip().lower() == "true"]
    sounds = []
    for number, row in enumerate(rows, 1):
        path, label = row.get("path", ""), row.get("label", "").strip()
        if not path.strip() or not label:
            raise LabeledSoundsError(f"{place}: sound {number} ({path or 'no path'}) has no label")
        sounds.append(LabeledSound(_found(path, above), label, row.get("fold", "").strip()))
    return sounds


def _found(path: str, above: Sequence[Path]) -> Path:
    """The file of that name in the first folder that has it, or in the first."""
    places = [folder / path for folder in above]
    try:
        return next((each for each in places if each.is_file()), places[0])
    except (OSError, ValueError):  # a name that cannot be one
        return places[0]


# ---- folders


def _table_of(folder: Path) -> Path | None:
    return next((folder / name for name in _TABLES if (folder / name).is_file()), None)


def _read_folder(folder: Path, esc10: bool) -> LabeledSounds:
    table = _table_of(folder)
    above = [folder, folder / "audio"]
    lists = _fold_lists(folder)
    if table:
        rows = _rows(table, _content(table))
        if table.name == "meta.txt":  # TUT's third column is the recording's name
            rows = [{name: cell for name, cell in row.items() if name != "fold"} for row in rows]
        labelled = _checked(table, _listed(table, rows, above, esc10), rows)
    elif lists:
        return _with_lists(folder, lists, None, [*above, folder / "scenes_stereo"])
    elif scenes := _scenes(folder):
        labelled = _checked(folder, scenes)
    else:
        labelled = _class_folders(folder)
    return _with_lists(folder, lists, labelled, above) if lists and not esc10 else labelled


def _scenes(folder: Path) -> list[LabeledSound]:
    """DCASE 2013's and 2014's scenes: `bus01.wav`, all in one folder."""
    inner = folder / "scenes_stereo"
    paths = _inside(inner if inner.is_dir() else folder)
    matches = [(path, _SCENE_NAME.fullmatch(path.name)) for path in paths]
    if not all(match for _, match in matches):
        return []
    return [LabeledSound(path, match["label"]) for path, match in matches if match]


def _class_folders(folder: Path) -> LabeledSounds:
    try:
        inner = sorted(each for each in folder.iterdir() if each.is_dir() and each.name[0] not in "._")
    except OSError as error:
        raise LabeledSoundsError(f"{folder}: {error.strerror or error}") from None
    if not inner:
        raise LabeledSoundsError(
            f"{folder}: neither a data set that is known nor a folder with a folder of sounds per class"
        )
    inside = {each: _inside(each) for each in inner}
    if empty := [each.name for each in inner if not inside[each]]:
        raise LabeledSoundsError(f"{folder}: no sounds in {abbreviate(empty)}; a class needs some")
    matches = [_ESC_FOLDER.fullmatch(each.name) for each in inner]
    sounds = []
    for each, match in zip(inner, matches, strict=True):
        for path in inside[each]:
            fold = _ESC_NAME.match(path.name)
            if all(matches) and match:
                sounds.append(LabeledSound(path, match["label"], fold["fold"] if fold else ""))
            else:
                sounds.append(LabeledSound(path, each.name))
    labelled = _checked(folder, sounds)
    if all(matches):  # in the order of the folders' numbers
        return replace(labelled, classes=tuple(dict.fromkeys(sound.label for sound in sounds)))
    return labelled


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_file() and has_sound_suffix(path.name))
    except OSError as error:
        raise LabeledSoundsError(f"{folder}: {error.strerror or error}") from None


# ---- folds that are lists of training and test sounds


def _fold_lists(folder: Path) -> dict[str, dict[str, Path]]:
    """{fold: {"train": path, "test": path}}, where a folder holds such lists."""
    for inner, pattern in _FOLD_LISTS:
        found: dict[str, dict[str, Path]] = {}
        for path in sorted((folder / inner).glob("*")):
            match = pattern.fullmatch(path.name)
            if match:
                parts = found.setdefault(match["fold"] or "1", {})
                part = match["part"].replace("evaluate", "test")
                if part not in parts or match["part"] == "evaluate":  # the one with labels
                    parts[part] = path
                elif path.suffix != parts[part].suffix:
                    raise LabeledSoundsError(f"{path}: there is {parts[part].name} too; remove one of them")
        if found:
            return dict(sorted(found.items(), key=lambda item: natural(item[0])))
    return {}


def _with_lists(
    folder: Path,
    lists: Mapping[str, Mapping[str, Path]],
    labelled: LabeledSounds | None,
    above: Sequence[Path],
) -> LabeledSounds:
    """The data set with its listed folds; without `labelled` the lists' labels are all there is."""
    sounds = [replace(sound, fold="") for sound in labelled.sounds] if labelled else []
    known = {_key(sound.path): number for number, sound in enumerate(sounds)}
    splits = []
    for fold, paths in lists.items():
        parts: dict[str, tuple[int, ...]] = {}
        for part in ("train", "test"):
            if part not in paths:
                raise LabeledSoundsError(f"{folder}: fold {fold} has no list of its {part} sounds")
            numbers = []
            for row in _rows(paths[part], _content(paths[part])):
                path = _found(row["path"], above)
                scene = _SCENE_NAME.fullmatch(path.name)
                label = row.get("label", "").strip() or (scene["label"] if scene and not labelled else "")
                number = known.get(_key(path))
                if number is None and (labelled or not label):
                    raise LabeledSoundsError(f"{paths[part]}: {row['path']} has no label")
                if number is None:
                    known[_key(path)] = number = len(sounds)
                    sounds.append(LabeledSound(path, label))
                elif label and label != sounds[number].label:
                    raise LabeledSoundsError(
                        f"{paths[part]}: {row['path']} is {label} there and {sounds[number].label} elsewhere"
                    )
                if part == "test":
                    sounds[number] = replace(sounds[number], fold=sounds[number].fold or fold)
                numbers.append(number)
            if twice := [sounds[number].path for number, times in Counter(numbers).items() if times > 1]:
                raise LabeledSoundsError(f"{paths[part]}: {abbreviate(twice)} named twice")
            parts[part] = tuple(numbers)
        if both := set(parts["train"]) & set(parts["test"]):
            names = [sounds[number].path for number in sorted(both)]
            raise LabeledSoundsError(f"{folder}: fold {fold} both learns from and tests {abbreviate(names)}")
        splits.append(Split(fold, parts["train"], parts["test"]))
    classes = (labelled or _checked(folder, [replace(sound, fold="") for sound in sounds])).classes
    return LabeledSounds(tuple(sounds), classes, tuple(splits))


# ---- checks


def _checked(
    place: Path, sounds: Sequence[LabeledSound], rows: Sequence[Mapping[str, str]] = ()
) -> LabeledSounds:
    """The data set, if it can be one; `rows` may hold targets."""
    missing = [sound.path for sound in sounds if not os.path.isfile(sound.path)]  # noqa: PTH113  (never raises)
    if missing:
        raise LabeledSoundsError(
            f"{place}: {len(missing):,} of {len(sounds):,} sounds are not there: {abbreviate(missing)}"
        )
    seen: dict[str, LabeledSound] = {}
    for sound in sounds:
        other = seen.setdefault(_key(sound.path), sound)
        if other is not sound:
            how = "twice" if other == sound else f"as {_place(other)} and as {_place(sound)}"
            raise LabeledSoundsError(f"{place}: {sound.path} is named {how}")
    labels = {sound.label for sound in sounds}
    if len(labels) < 2:
        raise LabeledSoundsError(
            f"{place}: {len(sounds)} sounds of {len(labels)} classes; there must be two classes at least"
        )
    without = [sound.path for sound in sounds if not sound.fold]
    if 0 < len(without) < len(sounds):
        raise LabeledSoundsError(
            f"{place}: {len(without)} of {len(sounds)} sounds have no fold: {abbreviate(without)}; "
            "either all have one or none has"
        )
    return LabeledSounds(tuple(sounds), _classes(place, labels, rows))


def _classes(place: Path, labels: set[str], rows: Iterable[Mapping[str, str]]) -> tuple[str, ...]:
    """By target where there are targets, else sorted."""
    targets: dict[str, str] = {}
    for row in rows:
        if "target" in row:
            label, target = row["label"].strip(), row["target"].strip()
            if targets.setdefault(label, target) != target:
                raise LabeledSoundsError(f"{place}: {label} has the targets {targets[label]} and {target}")
    if not targets:
        return tuple(sorted(labels, key=natural))
    shared = [target for target, times in Counter(targets.values()).items() if times > 1]
    if shared or not all(target.isdecimal() for target in targets.values()):
        raise LabeledSoundsError(
            f"{place}: targets must be a number for each class, not {abbreviate(targets.values())}"
        )
    return tuple(sorted(labels, key=lambda label: int(targets[label])))


def _key(path: Path) -> str:
    return os.path.realpath(path)


def _place(sound: LabeledSound) -> str:
    return sound.label + (f" in fold {sound.fold}" if sound.fold else "")


def abbreviate(names: Iterable[object]) -> str:
    """The first few, and how many more."""
    all_of = [str(name) for name in names]
    more = f" and {len(all_of) - _NAMED:,} more" if len(all_of) > _NAMED else ""
    return ", ".join(all_of[:_NAMED]) + more
