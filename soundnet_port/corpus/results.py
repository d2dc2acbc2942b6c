"""Results of a run on disk: what exists, the record of its settings, the merged file, failed inputs.

folder/extract.json             settings of the results in a folder
folder/errors.tsv               failed inputs
output.parts/extract.json       settings of an unfinished single file, beside its parts
output.json, output.errors.tsv  settings and failed inputs of a finished one
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from soundnet_port.audio.finding import STDIN, Failure
from soundnet_port.corpus.errors import (
    CorpusError,
    format_write_error,
    read_failures,
    sort_failures,
    write_failures,
)
from soundnet_port.corpus.features import OutputSpec
from soundnet_port.corpus.formats import FORMATS
from soundnet_port.corpus.inputs import inputs_digest
from soundnet_port.corpus.jobs import Group, Input, Job
from soundnet_port.corpus.settings import check_record, describe_differences, parse_record, serialize_record
from soundnet_port.files import atomic_write


class Results:
    """The files of a run.

    Attributes:
        report: the list of failed inputs.
    """

    def __init__(self, job: Job, output: Path, groups: Sequence[Group]) -> None:
        self._job, self._output, self._groups = job, output, groups
        self._inputs = [source for group in groups for source in group.inputs]
        self._record = job.folder / "extract.json"
        self._final_record = output.with_name(f"{output.name}.json")  # of a finished single file
        self.report = (
            output.with_name(f"{output.name}.errors.tsv") if job.single_file else output / "errors.tsv"
        )
        self._settings: dict[str, Any] = {**job.spec.metadata, "format": job.format_name}
        if job.single_file:
            self._settings |= inputs_digest(groups)

    # ---- before a run

    def prepare(self, force: bool) -> bool:
        """Check or remove existing results, and record the settings of new ones.

        Returns:
            whether a single file is finished

        Raises:
            CorpusError: results of other or unknown settings.
        """
        if self._job.single_file:
            return self._prepare_file(force)
        self._prepare_folder(force)
        return False

    def _prepare_folder(self, force: bool) -> None:
        record = _read_record(self._record)
        if force:
            self._clear_folder(record)
        elif record is not None:
            check_record(record, self._settings, self._output)
            for file in self._existing(source for source in self._inputs if source.path == STDIN):
                raise CorpusError(
                    f"{file}: already exists, perhaps of another sound on standard input; "
                    "choose another folder, or --force replaces it"
                )
        else:
            for file in self._existing(self._inputs):
                raise CorpusError(
                    f"{file}: already exists, without the record of its settings, {self._record}; "
                    "choose another folder, or --force replaces it"
                )
        if force or record is None:
            self._write_record(self._record)

    def _existing(self, inputs: Iterable[Input]) -> Iterator[str]:
        for source in inputs:
            yield from filter(os.path.exists, self._job.result_files(source))

    def _clear_folder(self, record: Mapping[str, Any] | None) -> None:
        """Remove the results of these inputs; those of others must have the same settings."""
        jobs = [self._job]
        if record and record.get("format") in FORMATS:
            widths = dict.fromkeys(map(str, record.get("layers", ())), 0)
            spec = OutputSpec(widths, str(record.get("pool")), {})
            jobs.append(replace(self._job, format_name=str(record["format"]), spec=spec))
        replaced = [file for job in jobs for source in self._inputs for file in job.result_files(source)]
        if record is None or describe_differences(record, self._settings):
            known = set(replaced)
            suffixes = tuple(job.format.suffix for job in jobs)
            for folder, _, names in os.walk(self._output):
                for file in (f"{folder}/{name}" for name in names if name.endswith(suffixes)):
                    if file not in known:
                        raise CorpusError(
                            f"{file}: of another input, with other settings; --force replaces results of "
                            "the inputs named only: choose another folder, or remove this file"
                        )
        self._record.unlink(missing_ok=True)  # first: results without a record are refused
        for file in replaced:
            with contextlib.suppress(OSError, ValueError):
                os.unlink(file)  # noqa: PTH108

    def _prepare_file(self, force: bool) -> bool:
        folder = self._job.folder
        if force:
            self._final_record.unlink(missing_ok=True)
        elif self._output.exists() and (record := _read_record(self._final_record)) is not None:
            check_record(record, self._settings, self._output)
            self.remove_parts()
            return True
        unfinished = None if force else _read_record(self._record)
        if unfinished is not None:
            check_record(unfinished, self._settings, folder)
            return False
        if self._output.exists() and not force:
            raise CorpusError(
                f"{self._output}: already exists, without the record of its settings, {self._final_record}; "
                "choose another name, or --force replaces it"
            )
        self._record.unlink(missing_ok=True)
        for part in folder.iterdir():
            if part.is_file():
                part.unlink()
        self._write_record(self._record)
        return False

    def _write_record(self, path: Path) -> None:
        with atomic_write(path, self._job.staging) as temporary:
            temporary.write_text(serialize_record(self._settings), "utf-8")

    # ---- after a run

    def merge(self) -> None:
        """Merge the parts into a single file.

        Raises:
            CorpusError: it cannot be written.
        """
        job = self._job
        assert job.format.merge is not None
        parts = [job.part_file(group) for group in self._groups]
        needed, free = sum(part.stat().st_size for part in parts), shutil.disk_usage(job.folder).free
        if free < needed:
            reason = f"{needed:,} bytes are needed, {free:,} are free"
            raise CorpusError(format_write_error(self._output, reason))
        try:
            with atomic_write(self._output, job.staging) as temporary:
                job.format.merge(temporary, parts, job.spec)
            self._write_record(self._final_record)
        except (OSError, RuntimeError) as error:
            raise CorpusError(format_write_error(self._output, error)) from None

    def remove_parts(self) -> None:
        """Remove the folder of a single file's parts."""
        shutil.rmtree(self._job.folder, ignore_errors=True)

    def write_report(self, failures: Mapping[str, Failure]) -> None:
        """Write the list of failed inputs, by path.

        In a folder, those of other runs' inputs are kept as long as the inputs exist.
        """
        listed = list(failures.values())
        if not self._job.single_file:
            known = {source.path for source in self._inputs} | failures.keys()
            listed += [
                earlier
                for earlier in read_failures(self.report)
                if earlier.path not in known and os.path.isfile(earlier.path)  # noqa: PTH113
            ]
        if listed:
            with atomic_write(self.report, self._job.staging) as temporary:
                write_failures(temporary, sort_failures(listed))
        else:
            self.report.unlink(missing_ok=True)


def _read_record(path: Path) -> dict[str, Any] | None:
    """Read recorded settings; None if the file does not exist."""
    try:
        return parse_record(path.read_bytes(), path)
    except FileNotFoundError:
        return None
