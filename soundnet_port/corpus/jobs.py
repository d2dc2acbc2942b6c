"""What a run computes: inputs, groups of them, and the job that all its processes share."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from soundnet_port.corpus.features import OutputSpec, printable_name
from soundnet_port.corpus.formats import FORMATS, PEAKS, Format


@dataclass(frozen=True)
class Input:
    """A file to extract features from.

    Attributes:
        name: of its results, relative to their folder, with forward slashes.
        path: as the user named it.
        file: to read; another one than `path` for a copy of standard input.
        size: in bytes.
    """

    name: str
    path: str
    file: str
    size: int

    @property
    def printable_name(self) -> str:
        """The name as valid text."""
        return printable_name(self.name)


@dataclass(frozen=True)
class Group:
    """Consecutive inputs that one process computes together; the unit of work."""

    number: int
    inputs: tuple[Input, ...]
    size: int  # bytes


@dataclass(frozen=True)
class Job:
    """What every process of a run has to know.

    Attributes:
        spec: contents of the files.
        format_name: a key of `FORMATS`, or "peaks".
        decoder: of sound files.
        block: samples computed at once.
        folder: of the results, or of their parts.
        staging: folder of unfinished files.
        single_file: whether all results go to one file, merged from a part per group.
    """

    spec: OutputSpec
    format_name: str
    decoder: str
    block: int
    folder: Path
    staging: Path
    single_file: bool

    @property
    def format(self) -> Format:
        """The format of the results."""
        return PEAKS if self.format_name == "peaks" else FORMATS[self.format_name]

    def result_files(self, source: Input) -> list[str]:
        """Return the paths of an input's own results."""
        return [f"{self.folder}/{source.name}{suffix}" for suffix in self.format.suffixes(self.spec)]

    def part_file(self, group: Group) -> Path:
        """Return the path of a group's part."""
        return self.folder / f"{group.number:06}{self.format.suffix}"

    def failures_file(self, group: Group) -> Path:
        """Return the path of the list of inputs that failed in a group's part."""
        return self.folder / f"{group.number:06}.tsv"

    def missing_inputs(self, group: Group) -> list[int]:
        """Return the indices of a group's inputs without results."""
        if self.single_file:
            return [] if self.part_file(group).exists() else list(range(len(group.inputs)))
        return [
            index
            for index, source in enumerate(group.inputs)
            if not all(map(os.path.exists, self.result_files(source)))
        ]


@dataclass(frozen=True)
class InputResult:
    """The outcome of an input, or the progress of a long one.

    Attributes:
        index: of the input in its group.
        seconds: of sound computed.
        reason: why the input failed; None if it did not.
        done: False for the progress of a long sound.
    """

    index: int
    seconds: float
    reason: str | None = None
    done: bool = True
