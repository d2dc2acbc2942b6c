"""Run an extractor over groups: in this process, or in worker processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from soundnet_port.corpus.errors import CorpusError, OutputError
from soundnet_port.corpus.extractor import Extractor, LoadedSound
from soundnet_port.corpus.jobs import Group, Input, InputResult, Job
from soundnet_port.corpus.processes import PACKAGE_FILE, start_process, stop_forking
from soundnet_port.network.architecture import Architecture
from soundnet_port.network.engine import kernel_name
from soundnet_port.network.kernels.library import VARIABLE
from soundnet_port.network.model import SoundNet
from soundnet_port.network.weights import build_model, cpu_state_dict


def run_in_process(
    extractor: Extractor, groups: Sequence[Group], decoding_threads: int
) -> Generator[tuple[Group, InputResult | None], None, None]:
    """Compute groups in this process, with one thread as in workers; other threads decode ahead.

    Yields:
        results of inputs, and a None at the end of each group
    """
    upcoming = (source for group in groups for source in group.inputs)
    decoding: dict[Input, Future[LoadedSound]] = {}
    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(decoding_threads or 1) as pool:

        def load(source: Input) -> LoadedSound:
            while len(decoding) < 2 * decoding_threads and (following := next(upcoming, None)):
                decoding[following] = pool.submit(extractor.load, following)
            future = decoding.pop(source, None)
            return future.result() if future else extractor.load(source)

        try:
            for group in groups:
                for result in extractor.compute_group(group, {}, load):
                    yield group, result
                yield group, None
        except OutputError as error:
            raise CorpusError(str(error)) from None
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads_before)


# ---- networks for other processes


@dataclass(frozen=True)
class SerializedModel:
    """A network for another process: its parameters as bytes, as NumPy has no bfloat16."""

    architecture: Architecture
    dtype: torch.dtype
    kernel: str  # that the run computes with, and so must every process
    state: Mapping[str, NDArray[np.uint8]]


def serialize_model(model: SoundNet) -> SerializedModel:
    """Return a network in a form that can be pickled."""
    state = {name: tensor.view(torch.uint8).numpy() for name, tensor in cpu_state_dict(model).items()}
    parameter = next(model.parameters())
    return SerializedModel(model.architecture, parameter.dtype, kernel_name(parameter), state)


def deserialize_model(serialized: SerializedModel) -> SoundNet:
    """Return the network, bit for bit."""
    dtype = serialized.dtype
    # copied, as Ray's shared memory is read-only
    state = {name: torch.from_numpy(array.copy()).view(dtype) for name, array in serialized.state.items()}
    return build_model(serialized.architecture, state)


# ---- worker processes


@dataclass(frozen=True)
class _Task:
    """A group to compute.

    Attributes:
        excluded: reasons of inputs that count as failed, by index.
        probe_from: index of the first input to compute one by one, without results, to find the one
            that kills the process; None to compute the group.
        probed: whether that has been done.
    """

    group: Group
    excluded: Mapping[int, str] = field(default_factory=dict)
    probe_from: int | None = None
    probed: bool = False


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    ready: bool = False
    task: _Task | None = None
    probing: int = 0  # index of the input


def worker_main(connection: Connection) -> None:
    """Receive a job and a network, then compute tasks until the run ends.

    Sends the package's file when it is ready, and None after each task; while computing, results of
    inputs, or the message of an `OutputError`; while probing, each input's index before it is computed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run ends its workers
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    with contextlib.suppress(EOFError, ConnectionError):
        connection.send(PACKAGE_FILE)
        job, serialized = connection.recv()
        os.environ[VARIABLE] = serialized.kernel
        extractor = Extractor(job, deserialize_model(serialized))
        while parent is None or parent.is_alive():
            task: _Task = connection.recv()
            if task.probe_from is not None:
                for index in range(task.probe_from, len(task.group.inputs)):
                    if index not in task.excluded:
                        connection.send(index)
                        extractor.probe(task.group.inputs[index])
            else:
                try:
                    for result in extractor.compute_group(task.group, task.excluded, extractor.load):
                        connection.send(result)
                        if parent is not None and not parent.is_alive():
                            return
                except OutputError as error:
                    connection.send(str(error))
            connection.send(None)


def run_in_workers(
    job: Job, model: SoundNet, groups: Sequence[Group], count: int
) -> Generator[tuple[Group, InputResult | None], None, None]:
    """Compute groups in worker processes.

    A group whose worker dies is probed input by input in a new one. An input that kills the process
    fails, and the group is computed without it.

    Yields:
        results of inputs, and a None at the end of each group
    """
    serialized = serialize_model(model)
    tasks = deque(_Task(group) for group in groups)
    workers: list[_Worker] = []
    try:
        while tasks or any(worker.task for worker in workers):
            for worker in workers:
                if worker.ready and worker.task is None and tasks:
                    worker.task = tasks.popleft()
                    with contextlib.suppress(OSError):  # it has died, which its connection will report
                        worker.connection.send(worker.task)
            idle = sum(worker.task is None for worker in workers)
            missing = min(count - len(workers), len(tasks) - idle)
            workers += [_Worker(*start_process(worker_main)) for _ in range(missing)]
            readable: list[Any] = wait([worker.connection for worker in workers])
            for worker in [worker for worker in workers if worker.connection in readable]:
                try:
                    message = worker.connection.recv()
                    if not worker.ready and message != PACKAGE_FILE:  # a server found another copy
                        workers.remove(worker)
                        worker.process.terminate()
                        worker.connection.close()
                        stop_forking()
                        continue
                    if not worker.ready:
                        worker.ready = True
                        worker.connection.send((job, serialized))
                        message = None
                except (EOFError, OSError):
                    workers.remove(worker)
                    tasks.extendleft(handle_worker_death(worker))
                    continue
                task = worker.task
                if isinstance(message, str):
                    raise CorpusError(message)
                if isinstance(message, int):
                    worker.probing = message
                elif message is not None:
                    assert task is not None
                    yield task.group, message
                else:
                    worker.task = None
                    if task is not None and task.probe_from is not None:
                        tasks.appendleft(replace(task, probe_from=None, probed=True))
                    elif task is not None:
                        yield task.group, None
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join(5)
            worker.process.kill()
            worker.process.join()
            worker.connection.close()


def handle_worker_death(worker: _Worker) -> list[_Task]:
    """Return the tasks that follow from a worker's death; raise a CorpusError if it never began."""
    worker.process.join()
    code = worker.process.exitcode or 0
    cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    cause += ", perhaps out of memory" if code == -9 else ""
    task = worker.task
    if not worker.ready:
        raise CorpusError(f"a worker process died before it began ({cause}); try workers=1")
    if task is None:
        return []
    if task.probe_from is not None:
        excluded = {**task.excluded, worker.probing: f"the process that read it died ({cause})"}
        return [replace(task, excluded=excluded, probe_from=worker.probing + 1)]
    if not task.probed:
        return [replace(task, probe_from=0)]
    others = len(task.group.inputs) - 1
    reason = f"the process that computed it with {others} others died twice ({cause})"
    return [replace(task, excluded={**dict.fromkeys(range(others + 1), reason), **task.excluded})]
