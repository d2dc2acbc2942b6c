"""A folder of pseudo-labels, as `label-videos` and `label-sounds` write it and `train` reads it.

manifest.tsv              a row per sound: `sound` (its path), and a column for every teacher
objects.categories.txt    the names of a head's categories, in the order of the probabilities
teachers.json             which models the teachers are, with checksums
errors.tsv                sounds that failed, and why
objects/a.wav.npy         (steps, categories), float32; step k is of the seconds 5k to 5k + 5
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soundnet_port.audio.finding import STDIN, SUFFIXES, Failure, absolute_path, find_sounds, relative_name
from soundnet_port.corpus.errors import CorpusError, write_failures
from soundnet_port.files import atomic_write

MANIFEST, TEACHERS, ERRORS = "manifest.tsv", "teachers.json", "errors.tsv"


@dataclass(frozen=True)
class Source:
    """A sound or video file, and the name of its results in the output folder."""

    name: str
    path: str


def find_sources(
    inputs: Sequence[str | os.PathLike[str]],
    root: str | os.PathLike[str] | None,
    kind: str = "sound",
    suffixes: Collection[str] = SUFFIXES,
) -> tuple[list[Source], list[Failure]]:
    """Find files to label, sorted by the names of their results, and what cannot be searched.

    Args:
        inputs: files, folders (searched for files with these suffixes) and @lists of paths.
        root: folder that names are relative to; by default each folder searched.
        kind: what to call the files in messages.
        suffixes: of files that a folder is searched for.

    Raises:
        CorpusError: no files, one outside of `root`, two with the same name, or standard input.
    """
    folders = [absolute_path(item) for item in inputs if os.path.isdir(item)]  # noqa: PTH112  (never raises)
    sources: dict[str, Source] = {}
    failures: list[Failure] = []
    for item in find_sounds(inputs, kind, suffixes):
        if isinstance(item, Failure):
            failures.append(item)
            continue
        path, folder = str(item[0]), item[1]
        if path == STDIN:
            raise CorpusError(f"standard input: training needs the {kind} later; name a file")
        absolute = absolute_path(path)
        parents = [absolute_path(root or folder)] if root is not None or folder else folders
        name = relative_name(absolute, parents)
        if root is not None and name is None:
            raise CorpusError(f"{path}: not inside {os.fspath(root)}, which names are relative to")
        sources.setdefault(absolute, Source(name or Path(absolute).name, path))
    if not sources and not failures:
        raise CorpusError("no inputs")
    found = sorted(sources.values(), key=lambda source: os.fsencode(source.name))
    for first, second in itertools.pairwise(found):
        if first.name == second.name:
            raise CorpusError(
                f"{first.path} and {second.path} would both become {first.name}.npy; "
                "name a folder that contains both, or give one with --root"
            )
    return found, failures


class LabelFolder:
    """The files of a folder of pseudo-labels.

    Args:
        path: of the folder; it exists.
        teachers: this run's, by column: `{"model": name, "sha256": checksum}`.

    Attributes:
        records: the teachers of all columns, those of earlier runs included.

    Raises:
        CorpusError: the folder has something else, or labels of other teachers.
    """

    def __init__(self, path: Path, teachers: Mapping[str, Mapping[str, str]]) -> None:
        self.path = path
        self.records = self._read_records()
        for column, new in teachers.items():
            old = self.records.setdefault(column, dict(new))
            if old["sha256"] != new["sha256"]:
                raise CorpusError(
                    f"{path}: its {column} are of another model ({old['model']}, not {new['model']}); "
                    "choose another folder"
                )

    def _read_records(self) -> dict[str, Any]:
        file = self.path / TEACHERS
        try:
            records: dict[str, Any] = json.loads(file.read_bytes())
            {column: record["sha256"] for column, record in records.items()}
        except FileNotFoundError:
            if (self.path / MANIFEST).exists():
                raise CorpusError(
                    f"{self.path}: has a manifest.tsv of something else; choose another folder"
                ) from None
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CorpusError(f"{file}: cannot be read ({reason}); choose another folder") from None
        return records

    def is_labeled(self, column: str, name: str) -> bool:
        """Whether a teacher's labels of a source exist."""
        return self._label_path(column, name).exists()

    def write_labels(self, column: str, name: str, rows: NDArray[np.float32]) -> None:
        """Write a teacher's labels of a source, (steps, categories)."""
        with atomic_write(self._label_path(column, name)) as temporary, open(temporary, "wb") as file:
            np.save(file, rows)

    def write_teachers(self, categories: Mapping[str, Sequence[str]]) -> None:
        """Write `teachers.json`, and the names of categories by head."""
        self._write(TEACHERS, json.dumps(self.records, indent=1).encode() + b"\n")
        for head, names in categories.items():
            lines = "".join(" ".join(name.split()) + "\n" for name in names)
            self._write(f"{head}.categories.txt", lines.encode())

    def write_manifest(self, sources: Mapping[str, str], failures: Sequence[Failure]) -> None:
        """Write a row for every source with all columns, of this run and earlier ones, and the failures.

        Args:
            sources: paths as `manifest_path` gives them, by name.
            failures: of this run.
        """
        sources = _read_manifest(self.path / MANIFEST) | dict(sources)
        lines = ["\t".join(["sound", *self.records])]
        for name in sorted(sources):
            paths = [self._label_path(column, name) for column in self.records]
            if all(path.exists() for path in paths):
                relative = [path.relative_to(self.path).as_posix() for path in paths]
                lines.append("\t".join([sources[name], *relative]))
        self._write(MANIFEST, "".join(f"{line}\n" for line in lines).encode())
        errors = self.path / ERRORS
        if failures:
            with atomic_write(errors) as temporary:
                write_failures(temporary, failures)
        else:
            errors.unlink(missing_ok=True)

    def manifest_paths(self, sources: Sequence[Source], failures: list[Failure]) -> dict[str, str]:
        """Return sources' paths for the manifest by name; those that it cannot hold become failures."""
        paths = {}
        for source in sources:
            path = _relative_path(source.path, self.path)
            if _fits_manifest(path) and _fits_manifest(source.name):
                paths[source.name] = path
            else:
                failures.append(Failure(source.path, "a manifest cannot hold this name; rename the file"))
        return paths

    def _label_path(self, column: str, name: str) -> Path:
        return self.path / column.replace(":", ".") / f"{name}.npy"

    def _write(self, name: str, content: bytes) -> None:
        with atomic_write(self.path / name) as temporary:
            temporary.write_bytes(content)


def _relative_path(path: str, folder: Path) -> str:
    """Return a path relative to the manifest's folder, if possible."""
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # on another drive
        return Path(path).resolve().as_posix()


def _fits_manifest(text: str) -> bool:
    """Tell whether a manifest, lines of UTF-8 with tabs, can hold a text."""
    try:
        text.encode()
    except UnicodeEncodeError:  # a name that is not text
        return False
    return "\t" not in text and text.splitlines() == [text] and text == text.strip()


def _read_manifest(path: Path) -> dict[str, str]:
    """Return the paths of an existing manifest's sources by the names of their results."""
    if not path.exists():
        return {}
    rows = [line.split("\t") for line in path.read_text("utf-8").split("\n") if "\t" in line]
    # a label file's path is the column's folder and the name
    return {row[1].partition("/")[2].removesuffix(".npy"): row[0] for row in rows[1:]}
