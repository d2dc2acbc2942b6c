"""Extract features of corpora on a Ray cluster (extra `[ray]`), from and to anywhere that fsspec reaches.

Groups of inputs are those of a local run (see run.py), and so are the numbers. A task computes a group and
writes it as one Parquet file, named by the group's number. Ray distributes the tasks, and repeats those
whose process or machine dies. A group that is computed twice gives the same file twice, and files appear
when they are complete, so a death at any time does no harm.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from soundnet_port.audio.finding import Failure
from soundnet_port.corpus.errors import (
    CorpusError,
    InputError,
    OutputError,
    describe_error,
    format_write_error,
)
from soundnet_port.corpus.extractor import Extractor, LoadedSound
from soundnet_port.corpus.inputs import check_names, group_inputs, inputs_digest
from soundnet_port.corpus.jobs import Group, Input, Job
from soundnet_port.corpus.processes import available_cpus
from soundnet_port.corpus.remote_files import (
    REPORT,
    ResultStore,
    download,
    list_remote_inputs,
    open_url,
    protocols,
)
from soundnet_port.corpus.run import CorpusResult, RunStatus
from soundnet_port.corpus.settings import check_settings, resolve_model
from soundnet_port.corpus.workers import SerializedModel, deserialize_model, serialize_model
from soundnet_port.errors import require
from soundnet_port.network.kernels.library import VARIABLE
from soundnet_port.network.model import SoundNet
from soundnet_port.progress import ProgressCallback

_RETRIES = 3  # of a group whose process dies; a file may be what kills it
_QUEUED = 4  # tasks per CPU that wait in Ray or run


def extract_on_cluster(
    model: SoundNet | str | os.PathLike[str],
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    layers: Sequence[str | int] | None = None,
    pool: str = "none",
    workers: int | None = None,
    decoder: str = "auto",
    batch_seconds: float | None = None,
    root: str | os.PathLike[str] | None = None,
    edge_frames: bool = False,
    force: bool = False,
    progress: ProgressCallback | None = None,
) -> CorpusResult:
    """Run `extract_corpus` on a Ray cluster; the extra `[ray]` is needed on all its machines.

    It uses the Ray that the script has connected to, else the cluster that RAY_ADDRESS names, else a
    Ray of its own on this machine, which ends with the call.

    Args:
        model: as for `extract_corpus`; computed on CPUs.
        inputs: files, folders and @lists that all machines see under the same path; fsspec URLs of files
            and folders, such as s3://bucket/clips/, or with wildcards.
        output: a folder that all machines see, or its URL. A Parquet file is written there for each
            group of inputs.
        layers: as for `extract_corpus`.
        pool: as for `extract_corpus`.
        workers: processes, with a CPU and a network each; by default as many as Ray has CPUs for.
        decoder: of sound files, see `load_audio`.
        batch_seconds: how much sound is computed at once; by default 95 s.
        root: a folder or URL that the names of inputs are relative to; by default each input folder.
        edge_frames: as for `extract_corpus`.
        force: start over where there are results.
        progress: called after every group of inputs.

    Raises:
        CorpusError: as `extract_corpus`; Ray cannot be reached.
        MissingExtraError: Ray is not installed.
        WeightsError: no such weights.
    """
    ray = import_ray()
    output = os.fspath(output)
    block = check_settings("parquet", pool, decoder, workers, batch_seconds)
    model, spec = resolve_model(
        model,
        layers,
        format_name="parquet",
        pool=pool,
        decoder=decoder,
        block=block,
        edge_frames=edge_frames,
    )
    if next(model.parameters()).device.type != "cpu":
        raise CorpusError("on a cluster the network is computed on CPUs")
    if "memory" in protocols(open_url(output)[0]):
        raise CorpusError(f"{output}: is in this process's memory, which others do not see")
    sources, failures = list_remote_inputs(inputs, root)
    status = RunStatus(len(sources), failures, progress)
    store = ResultStore(output)
    job = Job(spec, "parquet", decoder, block, Path(), Path(), single_file=True)
    check_names(job, sources)
    groups = group_inputs(sources)
    try:
        settings = {**spec.metadata, "format": "parquet", **inputs_digest(groups)}
        complete, earlier_failures = store.prepare(settings, force)
        incomplete = [group for group in groups if group.number not in complete]
        status.failures |= {failure.path: failure for failure in earlier_failures}
        status.failed = len(earlier_failures)
        status.already_done = len(sources) - sum(len(group.inputs) for group in incomplete) - status.failed
        status.report()
        for group, result in _run_tasks(ray, job, model, incomplete, store, workers) if incomplete else ():
            if result is None:
                reason = "its group was given up, the process died each time; Ray's logs say more"
                result = GroupResult(0, [Failure(source.path, reason) for source in group.inputs])
            status.extracted += len(group.inputs) - len(result.failures)
            status.seconds += result.seconds
            for failure in result.failures:
                status.add_failure(failure)
            if not result.failures:
                status.report()
        store.finish(list(status.failures.values()))
    except OSError as error:
        raise CorpusError(format_write_error(output, error)) from None
    return status.result(output, store.child_url(REPORT))


# ---- in Ray's processes


@dataclass(frozen=True)
class GroupResult:
    """The outcome of a group: seconds of sound computed, and failed inputs."""

    seconds: float
    failures: list[Failure]


_extractors: dict[str, Extractor] = {}  # of the run that this process computes for, by its id


def compute_group(
    run_id: str, job: Job, serialized: SerializedModel, group: Group, store: ResultStore
) -> GroupResult:
    """Compute a group and write its results.

    Raises:
        OutputError: they cannot be written.
    """
    if run_id not in _extractors:
        _extractors.clear()
        torch.set_num_threads(1)
        os.environ[VARIABLE] = serialized.kernel  # a machine without them ends the run
        _extractors[run_id] = Extractor(job, deserialize_model(serialized))
    extractor = _extractors[run_id]
    with tempfile.TemporaryDirectory() as folder:
        extractor.job = job = replace(job, folder=Path(folder), staging=Path(folder))

        def load(source: Input) -> LoadedSound:
            try:
                return extractor.load(download(source, folder))
            except InputError:
                raise
            except Exception as error:  # stores may raise anything
                raise InputError(describe_error(error, source.file)) from None

        results = [result for result in extractor.compute_group(group, {}, load) if result.done]
        failures = [Failure(group.inputs[r.index].path, r.reason) for r in results if r.reason]
        try:
            store.write_group(group, job.part_file(group).read_bytes(), failures)
        except OSError as error:
            raise OutputError(format_write_error(store.url, error)) from None
    return GroupResult(sum(result.seconds for result in results), failures)


# ---- in the run's process


def import_ray() -> Any:
    """Import Ray.

    Raises:
        MissingExtraError: it is not installed.
    """
    if not os.environ.get("RAY_ADDRESS") and "ray" not in sys.modules:
        # Ray reads this when it is imported: one that is started here then listens to this machine only
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    return require("ray", "ray")


def _run_tasks(
    ray: Any, job: Job, model: SoundNet, groups: Sequence[Group], store: ResultStore, workers: int | None
) -> Iterator[tuple[Group, GroupResult | None]]:
    """Yield each group's result as it comes; None for a group whose process died again and again."""
    with _connect(ray, workers):
        cpus = int(ray.cluster_resources().get("CPU", 0))
        if (workers or 1) > cpus:
            raise CorpusError(f"Ray has {cpus} CPUs, fewer than {workers or 1} workers need")
        try:
            yield from _submit_tasks(ray, job, model, groups, store, workers)
        except CorpusError:
            raise
        except Exception as error:  # Ray's own, and what its workers raised
            lines = str(error).strip().splitlines() or [""]  # the last one follows the traces
            raise CorpusError(f"Ray: {type(error).__name__}: {' '.join(lines[-1].split())}") from None


def _submit_tasks(
    ray: Any, job: Job, model: SoundNet, groups: Sequence[Group], store: ResultStore, workers: int | None
) -> Iterator[tuple[Group, GroupResult | None]]:
    task = ray.remote(num_cpus=1, max_retries=_RETRIES)(compute_group)
    run_id, shared_job, network = secrets.token_hex(8), ray.put(job), ray.put(serialize_model(model))
    upcoming = iter(groups)
    running: dict[Any, Group] = {}
    try:
        while True:
            limit = workers or _QUEUED * int(ray.cluster_resources().get("CPU", 1))
            while len(running) < limit and (group := next(upcoming, None)):
                running[task.remote(run_id, shared_job, network, group, store)] = group
            if not running:
                return
            ((finished,), _) = ray.wait(list(running))
            group = running.pop(finished)
            try:
                result = ray.get(finished)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, OutputError):
                    raise CorpusError(str(error.cause)) from None
                raise
            except ray.exceptions.RayError:  # the process died
                result = None
            yield group, result
    finally:
        for task_reference in running:
            ray.cancel(task_reference)


@contextlib.contextmanager
def _connect(ray: Any, workers: int | None) -> Iterator[None]:
    """Connect to Ray, unless the script has."""
    if ray.is_initialized():
        yield
        return
    starts_own = not os.environ.get("RAY_ADDRESS")
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if starts_own:
        cpus = max(available_cpus(), workers or 1)
        settings |= {"address": "local", "num_cpus": cpus, "include_dashboard": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray's own, of settings to come
            ray.init(**settings)
    except Exception as error:  # plain ones too, such as when it takes too long to start
        raise CorpusError(f"Ray cannot be reached: {' '.join(str(error).split())}") from None
    try:
        addresses = {node["NodeManagerAddress"] for node in ray.nodes()}
        if starts_own and not addresses <= {"127.0.0.1", "::1"}:
            raise CorpusError(
                f"Ray listens to other machines ({', '.join(addresses)}), as it was imported before; "
                "call ray.init() yourself, or set RAY_ADDRESS"
            )
        yield
    finally:
        ray.shutdown()
