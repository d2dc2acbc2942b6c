"""Inputs of a run: looked up, named, sorted, and cut into groups."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from soundnet_port.audio.finding import STDIN, Failure, absolute_path, find_sounds, relative_name
from soundnet_port.corpus.errors import CorpusError
from soundnet_port.corpus.jobs import Group, Input, Job
from soundnet_port.files import temporary_copy

GROUP_FILES = 64  # inputs in a group, at most
GROUP_BYTES = 32 << 20  # size of inputs at which a group is complete


def list_inputs(
    inputs: Sequence[str | os.PathLike[str]],
    root: str | os.PathLike[str] | None,
    stack: contextlib.ExitStack,
) -> tuple[list[Input], list[Failure]]:
    """Look up inputs; a file that is named twice counts once.

    Args:
        inputs: as for `extract_corpus`.
        root: a folder that names of results are relative to; by default each folder searched.
        stack: keeps a copy of standard input until it is closed.

    Returns:
        the inputs, in the order of their names' bytes, and what cannot be looked up

    Raises:
        CorpusError: no inputs, or one outside of the root.
    """
    arguments = [inputs] if isinstance(inputs, (str, os.PathLike)) else inputs
    folders = [absolute_path(argument) for argument in arguments if os.path.isdir(argument)]  # noqa: PTH112
    sources: dict[str, Input] = {}
    failures: list[Failure] = []
    for match in find_sounds(arguments):
        if isinstance(match, Failure):
            failures.append(match)
            continue
        path, searched_folder = str(match[0]), match[1]
        if path == STDIN:  # workers cannot read it, and decoders seek
            copy = stack.enter_context(temporary_copy(sys.stdin.buffer))
            sources[path] = Input("stdin", path, str(copy), copy.stat().st_size)
            continue
        full_path = absolute_path(path)
        if full_path in sources:
            continue
        if root is not None:
            parents = [absolute_path(root)]
        else:
            parents = [absolute_path(searched_folder)] if searched_folder else folders
        name = relative_name(full_path, parents)
        if root is not None and name is None:
            raise CorpusError(f"{path}: not inside {os.fspath(root)}, which names are to be relative to")
        try:
            size = os.stat(full_path).st_size  # noqa: PTH116
        except (OSError, ValueError):  # the decoder will report it
            size = 0
        sources[full_path] = Input(name or Path(full_path).name, path, path, size)
    if not sources and not failures:
        raise CorpusError("no inputs")
    return sort_inputs(sources.values()), failures


def sort_inputs(inputs: Iterable[Input]) -> list[Input]:
    """Return inputs in the order of their names' bytes."""
    return sorted(inputs, key=lambda source: os.fsencode(source.name))


def group_inputs(inputs: Sequence[Input]) -> list[Group]:
    """Cut sorted inputs into groups; these depend on names and sizes alone."""
    groups: list[Group] = []
    members: list[Input] = []
    size = 0
    for position, source in enumerate(inputs, 1):
        members.append(source)
        size += source.size
        if len(members) == GROUP_FILES or size >= GROUP_BYTES or position == len(inputs):
            groups.append(Group(len(groups), tuple(members), size))
            members, size = [], 0
    return groups


def inputs_digest(groups: Sequence[Group]) -> dict[str, Any]:
    """Return number and checksum of all inputs, for the record of results that contain all of them."""
    inputs = [source for group in groups for source in group.inputs]
    digest = hashlib.sha256()
    for source in inputs:
        digest.update(f"{source.size} ".encode() + os.fsencode(source.name) + b"\0")
        if source.path == STDIN:  # always has the same name
            digest.update(Path(source.file).read_bytes())
    return {"inputs": len(inputs), "inputs_sha256": digest.hexdigest()}


def check_names(job: Job, inputs: Sequence[Input]) -> None:
    """Raise a CorpusError if two inputs would have the same result."""
    owners: dict[str, Input] = {}
    # `.extract` exists by now
    ignores_case = not job.single_file and os.path.exists(f"{job.folder}/.EXTRACT")  # noqa: PTH110
    for source in inputs:
        names = (
            [job.format.array_name(source.printable_name)] if job.single_file else job.result_files(source)
        )
        for name in names:
            owner = owners.setdefault(name.casefold() if ignores_case else name, source)
            if owner is not source:
                raise CorpusError(
                    f"{owner.path} and {source.path} would both become {name}; "
                    "name a folder that holds both, or give one with --root"
                )
