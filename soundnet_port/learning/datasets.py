"""Read labeled sounds: lists, and data sets as they are downloaded.

| data set | layout |
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

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from soundnet_port.audio.finding import has_sound_suffix
from soundnet_port.learning.errors import LabeledSoundsError
from soundnet_port.learning.labeled_sounds import (
    LabeledSound,
    LabeledSounds,
    Split,
    check_sounds,
    locate_sound,
    natural_sort_key,
    read_list,
    rows_to_sounds,
    summarize_names,
)

_TABLES = ("meta/esc50.csv", "meta.tsv", "meta.csv", "meta.txt")
_FOLD_LISTS = (
    ("evaluation_setup", re.compile(r"fold(?P<fold>\d+)_(?P<part>train|test|evaluate)\.(txt|csv)")),
    ("splits", re.compile(r"(?P<part>train|test)(?P<fold>\d+)\.txt")),
    ("", re.compile(r"(?P<part>train|test)(?P<fold>\d*)\.txt")),
)
_ESC_FOLDER = re.compile(r"(?P<number>\d+) - (?P<label>.+)")
_ESC_NAME = re.compile(r"(?P<fold>\d+)-")
_SCENE_NAME = re.compile(r"(?P<label>[a-z]+)\d\d\.wav")


def read_labeled(
    source: str | os.PathLike[str], root: str | os.PathLike[str] | None = None, *, esc10: bool = False
) -> LabeledSounds:
    """Read a list of labeled sounds, or a data set's folder.

    Args:
        source: a folder in one of the layouts of this module's table, or a list. A line of a list is
            `path<TAB>label<TAB>fold`, with the fold optional; or `path label` as in the original's
            lists; or the first line names the columns, separated by tabs or commas: file (or
            filename, path), label (or category, class, scene_label), and optionally fold and target.
            Lines that begin with # are comments.
        root: folder that a list's paths are relative to; by default the list's own.
        esc10: only the sounds that ESC-50's `esc10` column marks.

    Raises:
        LabeledSoundsError: no known layout, missing files, unknown columns, a file listed twice,
            classes without sounds, fewer than two classes, contradictory folds.
    """
    path = Path(source).expanduser()
    if esc10 and not (path.is_file() or _find_table(path)):
        raise LabeledSoundsError(f"{path}: no table with an esc10 column, as in ESC-50's meta/esc50.csv")
    if path.is_dir():
        return _read_folder(path, esc10)
    rows = read_list(path)
    folder = Path(root).expanduser() if root is not None else path.parent
    return check_sounds(path, rows_to_sounds(path, rows, [folder], esc10), rows)


def _find_table(folder: Path) -> Path | None:
    return next((folder / name for name in _TABLES if (folder / name).is_file()), None)


def _read_folder(folder: Path, esc10: bool) -> LabeledSounds:
    table = _find_table(folder)
    folders = [folder, folder / "audio"]
    lists = _find_fold_lists(folder)
    if table:
        rows = read_list(table)
        if table.name == "meta.txt":  # TUT's third column is the recording's name
            rows = [{name: cell for name, cell in row.items() if name != "fold"} for row in rows]
        labeled = check_sounds(table, rows_to_sounds(table, rows, folders, esc10), rows)
    elif lists:
        return _apply_fold_lists(folder, lists, None, [*folders, folder / "scenes_stereo"])
    elif scenes := _find_scenes(folder):
        labeled = check_sounds(folder, scenes)
    else:
        labeled = _read_class_folders(folder)
    return _apply_fold_lists(folder, lists, labeled, folders) if lists and not esc10 else labeled


def _find_scenes(folder: Path) -> list[LabeledSound]:
    """Return DCASE 2013's and 2014's scenes: `bus01.wav`, all in one folder."""
    scenes = folder / "scenes_stereo"
    paths = _list_sounds(scenes if scenes.is_dir() else folder)
    matches = [(path, _SCENE_NAME.fullmatch(path.name)) for path in paths]
    if not all(match for _, match in matches):
        return []
    return [LabeledSound(path, match["label"]) for path, match in matches if match]


def _read_class_folders(folder: Path) -> LabeledSounds:
    try:
        subfolders = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] not in "._")
    except OSError as error:
        raise LabeledSoundsError(f"{folder}: {error.strerror or error}") from None
    if not subfolders:
        raise LabeledSoundsError(
            f"{folder}: neither a known data set nor a folder with a subfolder of sounds per class"
        )
    paths = {subfolder: _list_sounds(subfolder) for subfolder in subfolders}
    if empty := [subfolder.name for subfolder in subfolders if not paths[subfolder]]:
        raise LabeledSoundsError(f"{folder}: no sounds in {summarize_names(empty)}; remove empty classes")
    matches = [_ESC_FOLDER.fullmatch(subfolder.name) for subfolder in subfolders]
    sounds = []
    for subfolder, match in zip(subfolders, matches, strict=True):
        for path in paths[subfolder]:
            fold = _ESC_NAME.match(path.name)
            if all(matches) and match:
                sounds.append(LabeledSound(path, match["label"], fold["fold"] if fold else ""))
            else:
                sounds.append(LabeledSound(path, subfolder.name))
    labeled = check_sounds(folder, sounds)
    if all(matches):  # in the order of the folders' numbers
        return replace(labeled, classes=tuple(dict.fromkeys(sound.label for sound in sounds)))
    return labeled


def _list_sounds(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_file() and has_sound_suffix(path.name))
    except OSError as error:
        raise LabeledSoundsError(f"{folder}: {error.strerror or error}") from None


# ---- folds as lists of training and test sounds


def _find_fold_lists(folder: Path) -> dict[str, dict[str, Path]]:
    """Return {fold: {"train": path, "test": path}} of the lists in a folder."""
    for subfolder, pattern in _FOLD_LISTS:
        lists: dict[str, dict[str, Path]] = {}
        for path in sorted((folder / subfolder).glob("*")):
            match = pattern.fullmatch(path.name)
            if match:
                parts = lists.setdefault(match["fold"] or "1", {})
                part = match["part"].replace("evaluate", "test")
                if part not in parts or match["part"] == "evaluate":  # the one with labels
                    parts[part] = path
                elif path.suffix != parts[part].suffix:
                    raise LabeledSoundsError(f"{path}: {parts[part].name} exists too; remove one of them")
        if lists:
            return dict(sorted(lists.items(), key=lambda item: natural_sort_key(item[0])))
    return {}


def _apply_fold_lists(
    folder: Path,
    lists: Mapping[str, Mapping[str, Path]],
    labeled: LabeledSounds | None,
    folders: Sequence[Path],
) -> LabeledSounds:
    """Give a data set its listed folds; without `labeled` the lists bring the labels."""
    sounds = [replace(sound, fold="") for sound in labeled.sounds] if labeled else []
    indices = {os.path.realpath(sound.path): index for index, sound in enumerate(sounds)}
    splits = []
    for fold, paths in lists.items():
        parts: dict[str, tuple[int, ...]] = {}
        for part in ("train", "test"):
            if part not in paths:
                raise LabeledSoundsError(f"{folder}: fold {fold} has no list of its {part} sounds")
            members = []
            for row in read_list(paths[part]):
                path = locate_sound(row["path"], folders)
                scene = _SCENE_NAME.fullmatch(path.name)
                label = row.get("label", "").strip() or (scene["label"] if scene and not labeled else "")
                index = indices.get(os.path.realpath(path))
                if index is None and (labeled or not label):
                    raise LabeledSoundsError(f"{paths[part]}: {row['path']} has no label")
                if index is None:
                    indices[os.path.realpath(path)] = index = len(sounds)
                    sounds.append(LabeledSound(path, label))
                elif label and label != sounds[index].label:
                    raise LabeledSoundsError(
                        f"{paths[part]}: {row['path']} is {label} there and {sounds[index].label} elsewhere"
                    )
                if part == "test":
                    sounds[index] = replace(sounds[index], fold=sounds[index].fold or fold)
                members.append(index)
            if twice := [sounds[index].path for index, count in Counter(members).items() if count > 1]:
                raise LabeledSoundsError(f"{paths[part]}: {summarize_names(twice)} listed twice")
            parts[part] = tuple(members)
        if both := set(parts["train"]) & set(parts["test"]):
            names = summarize_names(sounds[index].path for index in sorted(both))
            raise LabeledSoundsError(f"{folder}: fold {fold} has {names} in both training and test set")
        splits.append(Split(fold, parts["train"], parts["test"]))
    classes = (labeled or check_sounds(folder, [replace(sound, fold="") for sound in sounds])).classes
    return LabeledSounds(tuple(sounds), classes, tuple(splits))
