"""Extract features of whole corpora: files in, files out, on all cores, resumable.

What is computed together decides the last bits of a number: a matrix product of another size may add in
another order. So that results depend neither on the number of workers nor on interruptions, inputs are
sorted and cut into groups of consecutive ones. A group is the unit of work: one process computes it with
one thread, and if any of its results is missing, all of it again.

Results appear under their names when they are complete. They are written to `.extract/<run>/` in the folder
of the results, synchronized, and renamed. A run holds a lock there. The first run that has the folder to
itself removes what killed runs left; a worker that outlives its run loses its folder, and cannot rename
anything any more.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from soundnet_port.audio.finding import Failure
from soundnet_port.corpus.errors import CorpusError, read_failures
from soundnet_port.corpus.extractor import Extractor
from soundnet_port.corpus.features import OutputSpec
from soundnet_port.corpus.formats import FORMATS
from soundnet_port.corpus.inputs import GROUP_BYTES, check_names, group_inputs, list_inputs
from soundnet_port.corpus.jobs import Group, Input, InputResult, Job
from soundnet_port.corpus.processes import available_cpus
from soundnet_port.corpus.results import Results
from soundnet_port.corpus.settings import check_settings, resolve_model, resolve_output
from soundnet_port.corpus.workers import run_in_process, run_in_workers
from soundnet_port.files import output_lock
from soundnet_port.network.engine import BLOCK
from soundnet_port.network.model import SoundNet
from soundnet_port.progress import Progress, ProgressCallback


@dataclass(frozen=True)
class FileProgress(Progress):
    """Progress of a run over files.

    Attributes:
        seconds: of sound that this run has computed, unfinished long sounds included.
        failure: the input that has just failed; `message` is its text.
    """

    seconds: float = 0.0
    failure: Failure | None = None


@dataclass(frozen=True)
class CorpusResult:
    """The outcome of a run.

    Attributes:
        output: folder or file of the results, or their URL.
        total: how many inputs there are.
        extracted: how many were computed by this run.
        already_done: how many had results already.
        failures: inputs without features.
        seconds: of sound, computed by this run.
        elapsed: seconds that the run took.
        report: the file that lists the failures; None if there are none.
    """

    output: Path | str
    total: int
    extracted: int
    already_done: int
    failures: tuple[Failure, ...]
    seconds: float
    elapsed: float
    report: Path | str | None


class RunStatus:
    """Counts of a run, reported as progress and summarized in the end."""

    def __init__(self, total: int, failures: Iterable[Failure], progress: ProgressCallback | None) -> None:
        self.total = total
        self.extracted = self.already_done = self.failed = 0
        self.seconds = 0.0
        self.failures = {failure.path: failure for failure in failures}  # with what is not among the inputs
        self._progress = progress
        self._start = time.monotonic()

    @property
    def done(self) -> int:
        """How many inputs are finished."""
        return self.already_done + self.extracted + self.failed

    def add_failure(self, failure: Failure, unfinished: float = 0.0) -> None:
        """Count a failed input and report it."""
        self.failed += 1
        self.failures[failure.path] = failure
        self.report(unfinished, failure)

    def report(self, unfinished: float = 0.0, failure: Failure | None = None) -> None:
        """Call back with the progress; `unfinished`: seconds of sounds that are not finished."""
        if self._progress:
            seconds = self.seconds + unfinished
            speed = seconds / max(time.monotonic() - self._start, 1e-6)
            note = f"{seconds / 3600:.2f} h of sound, {speed:,.0f}x real time"
            message = str(failure) if failure else ""
            self._progress(FileProgress(self.done, self.total, "file", note, message, seconds, failure))

    def result(self, output: Path | str, report: Path | str) -> CorpusResult:
        """Return the outcome."""
        return CorpusResult(
            output,
            self.total,
            self.extracted,
            self.already_done,
            tuple(self.failures.values()),
            self.seconds,
            time.monotonic() - self._start,
            report if self.failures else None,
        )


def extract_corpus(
    model: SoundNet | str | os.PathLike[str],
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    layers: Sequence[str | int] | None = None,
    pool: str = "none",
    tr: float | None = None,
    align: str = "center",
    edge_frames: bool = False,
    format: str | None = None,  # noqa: A002  (as on the command line)
    workers: int | None = None,
    decoder: str = "auto",
    batch_seconds: float | None = None,
    root: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: ProgressCallback | None = None,
) -> CorpusResult:
    """Write features of many sound files to files; an interrupted run resumes.

    Results depend neither on the number of workers nor on interruptions. Arrays are (frames,
    channels), or (channels,) if pooled.

    Args:
        model: a SoundNet, whose parameters and device are used (hooks and replaced modules are
            not), or weights as for `load_pretrained`.
        inputs: as on the command line: files, folders to be searched, "@LIST" for a text file with
            a path per line, "-" for a sound on standard input.
        output: a folder, in which the inputs' tree is mirrored, or a single file, whose suffix is
            that of a format.
        layers: names, or Torch7's module numbers; by default pool5, or with 5 layers conv4.
        pool: "none", or over time "mean", "max", "mean+std" or "mean+max+std" (one after the other;
            population std).
        tr: instead of the network's frames, a row for every so many seconds; see
            `soundnet_port.inference.alignment.align`.
        align: of such rows, "center" or "end".
        edge_frames: whether edge frames (see `SoundNet.edge_frames`) are pooled, or averaged on a clock.
            Files with all frames store how many of the last ones are edge frames.
        format: "npz", "npy", "h5", "csv", "mat", "parquet" or "torch7"; by default the output's
            suffix, or npz.
        workers: processes; by default one per available CPU. 1 computes in this process. With a
            model on a GPU they are threads that decode.
        decoder: of sound files, see `load_audio`.
        batch_seconds: how much sound is computed at once; by default 95 s.
        root: a folder that the names of results are relative to; by default each input folder.
        force: start over where there are results.
        progress: called in this process with a `FileProgress`, after every input and every block of a
            long one.

    Raises:
        CorpusError: settings that cannot work, results of other settings in the same place, two
            inputs of the same name, results that cannot be written.
        MissingExtraError: the format's package is not installed.
        WeightsError: no such weights.
    """
    output, format_name, single_file = resolve_output(output, format)
    block = check_settings(format_name, pool, decoder, workers, batch_seconds)
    model, spec = resolve_model(
        model,
        layers,
        format_name=format_name,
        pool=pool,
        decoder=decoder,
        block=block,
        tr=tr,
        align=align,
        edge_frames=edge_frames,
    )
    if single_file and FORMATS[format_name].one_layer and len(spec.widths) > 1:
        raise CorpusError(f"{output}: {format_name} holds one layer; name a folder, or another format")
    with contextlib.ExitStack() as stack:
        sources, failures = list_inputs(inputs, root, stack)
        return run_extraction(
            model,
            sources,
            failures,
            output,
            spec,
            format_name,
            single_file=single_file,
            workers=workers,
            decoder=decoder,
            block=block,
            force=force,
            progress=progress,
        )


def run_extraction(
    model: SoundNet,
    inputs: Sequence[Input],
    failures: Sequence[Failure],
    output: Path,
    spec: OutputSpec,
    format_name: str,
    *,
    single_file: bool,
    workers: int | None = None,
    decoder: str = "auto",
    block: int = BLOCK,
    force: bool = False,
    progress: ProgressCallback | None = None,
) -> CorpusResult:
    """Run `extract_corpus` on listed inputs, with resolved settings."""
    folder = output.with_name(f"{output.name}.parts") if single_file else output
    status = RunStatus(len(inputs), failures, progress)
    with output_lock(folder, output, CorpusError, exclusive=force or single_file) as staging:
        job = Job(spec, format_name, decoder, block, folder, staging, single_file)
        check_names(job, inputs)
        groups = group_inputs(inputs)
        results = Results(job, output, groups)
        if results.prepare(force):
            status.failures |= {failure.path: failure for failure in read_failures(results.report)}
            status.already_done = sum(source.path not in status.failures for source in inputs)
        else:
            _compute(job, model, groups, results, status, workers)
        return status.result(output, results.report)


def _compute(
    job: Job,
    model: SoundNet,
    groups: Sequence[Group],
    results: Results,
    status: RunStatus,
    workers: int | None,
) -> None:
    """Compute the groups that are not complete, merge parts, and write the report."""
    counted: dict[int, set[int]] = {}  # inputs that are done, by the number of an incomplete group
    incomplete = []
    for group in groups:
        missing = job.missing_inputs(group)
        if missing:
            incomplete.append(group)
            counted[group.number] = set(range(len(group.inputs))).difference(missing)
            status.already_done += len(counted[group.number])
        else:
            failures = read_failures(job.failures_file(group)) if job.single_file else []
            status.failures |= {failure.path: failure for failure in failures}
            status.failed += len(failures)
            status.already_done += len(group.inputs) - len(failures)
    incomplete.sort(key=lambda group: -max(0, group.size - GROUP_BYTES))  # long sounds must not come last
    status.report()
    unfinished: dict[int, float] = {}  # seconds of a long sound, by its group
    try:
        with contextlib.closing(_run_groups(job, model, incomplete, workers)) as events:
            for group, result in events:
                done = counted.setdefault(group.number, set())
                unfinished.pop(group.number, None)
                if result is None:  # a worker may have died after it wrote a result, before it reported it
                    status.extracted += len(group.inputs) - len(done)
                    del counted[group.number]
                elif result.index in done:  # its group is computed again
                    continue
                elif not result.done:
                    unfinished[group.number] = result.seconds
                    status.report(sum(unfinished.values()))
                else:
                    done.add(result.index)
                    if result.reason is None:
                        status.extracted += 1
                        status.seconds += result.seconds
                        status.report(sum(unfinished.values()))
                    else:
                        failure = Failure(group.inputs[result.index].path, result.reason)
                        status.add_failure(failure, sum(unfinished.values()))
        if job.single_file and status.already_done + status.extracted:  # no file of nothing but failures
            results.merge()
    except BaseException:
        with contextlib.suppress(OSError):
            results.write_report(status.failures)
        raise
    results.write_report(status.failures)
    if job.single_file:
        results.remove_parts()


def _run_groups(
    job: Job, model: SoundNet, groups: Sequence[Group], workers: int | None
) -> Generator[tuple[Group, InputResult | None], None, None]:
    on_cpu = next(model.parameters()).device.type == "cpu"
    count = workers or available_cpus()
    if on_cpu and count > 1 and not (workers is None and len(groups) == 1):
        return run_in_workers(job, model, groups, count)
    return run_in_process(Extractor(job, model), groups, 0 if on_cpu else count)
