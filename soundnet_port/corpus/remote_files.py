"""Inputs and results of corpus runs anywhere that fsspec reaches (extra `[ray]`)."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from soundnet_port.audio.finding import STDIN, Failure, absolute_path, has_sound_suffix, parse_path_list
from soundnet_port.corpus.errors import (
    CorpusError,
    describe_error,
    parse_failures,
    serialize_failures,
    sort_failures,
)
from soundnet_port.corpus.inputs import list_inputs, sort_inputs
from soundnet_port.corpus.jobs import Group, Input
from soundnet_port.corpus.settings import check_record, parse_record, serialize_record
from soundnet_port.errors import require
from soundnet_port.files import atomic_write

RECORD, REPORT = "_extract.json", "_errors.tsv"  # readers of Parquet folders skip names with "_" and "."
_LOOKUP_THREADS = 32  # for inputs that are listed one by one
# stores where a put is all or nothing, and a rename is a copy
_OBJECT_STORES = frozenset("s3 s3a gs gcs az abfs abfss adl oss r2".split())
_RUN_FILES = re.compile(r"(\d{6,})\.parquet|_\d{6,}\.tsv|_extract\.json|_errors\.tsv")


def open_url(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL or path, and the path there."""
    try:
        filesystem, path = require("fsspec", "ray").core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # "Install s3fs to access S3"
        raise CorpusError(f"{url}: {error}") from None
    return filesystem, path.rstrip("/") or path


def protocols(filesystem: Any) -> set[str]:
    """Return the protocols of a file system, such as "s3"."""
    names = filesystem.protocol
    return {names} if isinstance(names, str) else set(names)


# ---- inputs


def list_remote_inputs(
    inputs: Sequence[str | os.PathLike[str]], root: str | os.PathLike[str] | None
) -> tuple[list[Input], list[Failure]]:
    """Look up inputs as `list_inputs` does, those at URLs too.

    Raises:
        CorpusError: no inputs, standard input, or one outside of the root.
    """
    arguments: list[str] = []
    failures: list[Failure] = []
    for argument in [os.fspath(argument) for argument in inputs]:
        if argument.startswith("@") and not os.path.exists(argument):  # noqa: PTH110
            try:
                arguments += parse_path_list(_read(argument[1:]))
            except OSError as error:
                failures.append(Failure(argument[1:], error.strerror or str(error)))
        else:
            arguments.append(argument)
    if STDIN in arguments:
        raise CorpusError("a sound on standard input is for the local engine: machines cannot share it")
    urls = [argument for argument in arguments if "://" in argument]
    paths = [argument for argument in arguments if "://" not in argument]
    sources: dict[str, Input] = {}
    if paths or not (urls or failures):
        with contextlib.ExitStack() as stack:
            local, local_failures = list_inputs(paths, None if urls else root, stack)
        sources |= {source.file: replace(source, file=absolute_path(source.file)) for source in local}
        failures += local_failures
    url_root = None if root is None else os.fspath(root)
    with ThreadPoolExecutor(_LOOKUP_THREADS) as threads:
        for matches in threads.map(lambda url: _list_url(url, url_root), urls):
            if isinstance(matches, Failure):
                failures.append(matches)
            else:
                sources |= {source.file: source for source in matches}
    return sort_inputs(sources.values()), failures


def _read(name: str) -> bytes:
    if "://" not in name:
        return sys.stdin.buffer.read() if name == STDIN else Path(name).read_bytes()
    filesystem, path = open_url(name)
    content: bytes = filesystem.cat_file(path)
    return content


def _list_url(url: str, root: str | None) -> list[Input] | Failure:
    """Return the sound files at a URL: a file, a folder, or a pattern with wildcards."""
    filesystem, path = open_url(url)
    try:
        if glob.has_magic(path):
            matches = filesystem.glob(path, detail=True).values()
            files = [file for file in matches if file["type"] == "file"]
            parent = re.split(r"[*?\[]", path, maxsplit=1)[0].rpartition("/")[0]
        else:
            files, parent = [filesystem.info(path)], path.rpartition("/")[0]
            if files[0]["type"] == "directory":
                matches, parent = filesystem.find(path, detail=True).values(), path
                files = [file for file in matches if has_sound_suffix(PurePosixPath(file["name"]).name)]
    except Exception as error:  # whatever the store's package raises
        return Failure(url, describe_error(error, url))
    if not files:
        return Failure(url, "no sound files")
    parent = (open_url(root)[1] if root is not None else parent).rstrip("/") + "/"
    is_local = "file" in protocols(filesystem)
    inputs = []
    for file in files:
        name, file_url = file["name"], filesystem.unstrip_protocol(file["name"])
        if not name.startswith(parent):
            raise CorpusError(f"{file_url}: not inside {root}, which names are to be relative to")
        source_file = name if is_local else file_url
        inputs.append(Input(name.removeprefix(parent), file_url, source_file, int(file["size"] or 0)))
    return inputs


def download(source: Input, folder: str) -> Input:
    """Return the input as a file on this machine, copied to a folder if it is elsewhere; decoders seek."""
    if "://" not in source.file:
        return source
    filesystem, path = open_url(source.file)
    copy = os.path.join(folder, f"{secrets.token_hex(8)}{PurePosixPath(path).suffix}")  # noqa: PTH118
    filesystem.get_file(path, copy)
    return replace(source, file=copy)


# ---- results


@dataclass(frozen=True)
class ResultStore:
    """A folder of results at a path or URL; files appear there when they are complete.

    Each group has a Parquet file with its number as the name, and a list of failures if there are any.
    """

    url: str

    def child_url(self, name: str) -> str:
        """Return the URL of a file in the folder."""
        return f"{self.url.rstrip('/')}/{name}"

    def names(self) -> set[str]:
        """Return the names of all files."""
        filesystem, folder = open_url(self.url)
        filesystem.invalidate_cache()
        try:
            return {PurePosixPath(path).name for path in filesystem.ls(folder, detail=False)}
        except FileNotFoundError:
            return set()

    def read(self, name: str) -> bytes:
        """Read a file."""
        return _read(self.child_url(name)) if "://" in self.url else Path(self.url, name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        """Write a file; it appears complete or not at all."""
        filesystem, folder = open_url(self.url)
        kinds = protocols(filesystem)
        if kinds & _OBJECT_STORES:
            filesystem.pipe_file(f"{folder}/{name}", content)
            return
        filesystem.makedirs(f"{folder}/.extract", exist_ok=True)
        if "file" in kinds:
            with atomic_write(Path(folder, name), Path(folder, ".extract")) as temporary:
                temporary.write_bytes(content)
            return
        unfinished = f"{folder}/.extract/{secrets.token_hex(8)}"
        filesystem.pipe_file(unfinished, content)
        filesystem.mv(unfinished, f"{folder}/{name}")

    def remove(self, names: Sequence[str]) -> None:
        """Remove files, or the folder of unfinished ones."""
        filesystem, folder = open_url(self.url)
        for name in names:
            filesystem.rm(f"{folder}/{name}", recursive=name == ".extract")

    def write_group(self, group: Group, table: bytes, failures: Sequence[Failure]) -> None:
        """Write a group's results."""
        report = f"_{group.number:06}.tsv"
        if failures:  # first, so that it exists when the group does
            self.write(report, serialize_failures(failures))
        else:  # of a process that failed to read a file, and died before it wrote the group
            with contextlib.suppress(FileNotFoundError):
                self.remove([report])
        self.write(f"{group.number:06}.parquet", table)

    def prepare(self, settings: Mapping[str, Any], force: bool) -> tuple[set[int], list[Failure]]:
        """Check or remove existing results, and record the settings of new ones.

        Returns:
            the numbers of groups that have results, and their failures

        Raises:
            CorpusError: results of other or unknown settings.
        """
        names = self.names()
        run_files = sorted(filter(_RUN_FILES.fullmatch, names))
        self.remove([".extract"] if ".extract" in names else [])  # what killed runs left
        if force:  # the record first: results without it are refused
            self.remove(sorted(run_files, key=lambda name: name != RECORD))
        elif RECORD in names:
            record = parse_record(self.read(RECORD), self.child_url(RECORD))
            check_record(record, settings, self.url)
            matches = map(_RUN_FILES.fullmatch, run_files)
            complete = {int(match[1]) for match in matches if match and match[1]}
            reports = [f"_{number:06}.tsv" for number in sorted(complete)]
            return complete, [
                failure for name in reports if name in names for failure in parse_failures(self.read(name))
            ]
        elif any(name.endswith(".parquet") for name in names):
            raise CorpusError(
                f"{self.url}: holds Parquet files without the record of their settings, {RECORD}; "
                "choose another output"
            )
        self.write(RECORD, serialize_record(settings).encode())
        return set(), []

    def finish(self, failures: Sequence[Failure]) -> None:
        """Write the list of all failures, and remove what is left of the run."""
        if failures:
            self.write(REPORT, serialize_failures(sort_failures(failures)))
        obsolete = {".extract"} if failures else {".extract", REPORT}
        self.remove(sorted(obsolete & self.names()))
