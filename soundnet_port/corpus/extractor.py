"""Computing a corpus: groups of files, in this process or in workers.

A group is the unit of work. What is computed together, in it, depends on its files alone.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soundnet_port.audio.finding import Failure
from soundnet_port.audio.loading import read_blocks
from soundnet_port.corpus.formats import FORMATS, PEAKS, Contents, Features, Format, write_failures
from soundnet_port.errors import SoundNetError
from soundnet_port.files import atomic_write
from soundnet_port.inference.alignment import Clock
from soundnet_port.inference.pooling import Pooling
from soundnet_port.network.architecture import SAMPLE_RATE, Architecture, Layer
from soundnet_port.network.engine import StreamState, get_engine
from soundnet_port.network.evaluation_mode import evaluation_mode
from soundnet_port.network.model import SoundNet
from soundnet_port.network.weights import build_model, cpu_state_dict

# what is wrong with one result's name, not with the place of all of them
_NAME_FAULTS = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EILSEQ, errno.EINVAL)


class CorpusError(SoundNetError):
    """A run that cannot start or go on: why, and what to do."""


@dataclass(frozen=True)
class Input:
    name: str  # of its results, relative to their place, with forward slashes
    path: str  # as the user knows it
    file: str  # what is read
    bytes: int

    @property
    def text(self) -> str:
        """The name, where it has to be text."""
        return printable_name(self.name)


@dataclass(frozen=True)
class Group:
    number: int
    inputs: tuple[Input, ...]
    bytes: int


@dataclass(frozen=True)
class Job:
    """What every worker has to know."""

    keys: tuple[str | int, ...]  # layers as asked for
    contents: Contents
    format: str
    decoder: str
    block: int  # samples computed at once
    folder: Path  # of the results, or of the parts
    staging: Path
    in_one: bool  # all results in one file, made of parts

    @property
    def form(self) -> Format:
        return PEAKS if self.format == "peaks" else FORMATS[self.format]

    def files(self, each: Input) -> list[str]:
        """An input's own results."""
        return [f"{self.folder}/{each.name}{suffix}" for suffix in self.form.suffixes(self.contents)]

    def part(self, group: Group) -> Path:
        return self.folder / f"{group.number:06}{self.form.suffix}"

    def failures(self, group: Group) -> Path:
        """Of a part: the inputs that are not in it."""
        return self.folder / f"{group.number:06}.tsv"

    def missing(self, group: Group) -> list[int]:
        """The inputs without results, by their place in the group."""
        if self.in_one:
            return [] if self.part(group).exists() else list(range(len(group.inputs)))
        return [
            number
            for number, each in enumerate(group.inputs)
            if not all(map(os.path.exists, self.files(each)))
        ]


# ---- computing


@dataclass(frozen=True)
class InputResult:
    """An input of a group that is through: seconds of sound, or why not. Long ones say how far they are."""

    number: int
    seconds: float
    reason: str | None = None
    done: bool = True


class InputError(Exception):
    """An input that gives nothing."""


class OutputError(Exception):
    """Nothing can be written any more."""


@dataclass(frozen=True)
class Loaded:
    first: Tensor  # a block of the waveform, or all of it
    rest: Iterator[Tensor] | None  # of a sound longer than a block


class Extractor:
    """Computes groups and writes their results."""

    def __init__(self, job: Job, model: SoundNet) -> None:
        self.job, self.model = job, model
        self.layers = {result_key(key): model.architecture.layer(key) for key in job.keys}
        # bare convolutions and batch norms are no layers of the engine's
        self.is_layer = [layer for layer in self.layers.values() if layer.is_layer]
        self.bare = [layer for layer in self.layers.values() if not layer.is_layer]
        self.edged = {key: layer_key(self.layers[key]) for key in job.contents.edge_layers}
        self.engine = get_engine(model)
        self.device = next(model.parameters()).device

    def load(self, each: Input) -> Loaded:
        """The sound, or its first block if it is longer than that.

        Raises:
            Bad: it cannot be read, or is too short for the layers.
        """
        try:
            blocks = read_blocks(each.file, decoder=self.job.decoder, samples=self.job.block)
            first = next(blocks)
            second = next(blocks, None)
            if second is None:
                self.long_enough(len(first))
        except Exception as error:  # decoders may raise anything, and one file must not end a run
            raise InputError(describe_error(error, each)) from None
        return Loaded(first, None if second is None else chain([second], blocks))

    def group(
        self,
        group: Group,
        excluded: Mapping[int, str],
        load: Callable[[Input], Loaded],
    ) -> Iterator[InputResult]:
        """Computes a group, without those excluded, and writes what is missing.

        Raises:
            Stopped: results cannot be written.
        """
        job, reasons = self.job, dict(excluded)
        early: dict[int, Loaded] = {}
        missing = job.missing(group)
        if len(missing) < len(group.inputs):  # results are there; are the others bad files, as before?
            for number in missing:
                try:
                    if number not in reasons:
                        early[number] = load(group.inputs[number])
                        break
                except InputError as error:
                    reasons[number] = str(error)
            if not early:
                for number in missing:
                    yield InputResult(number, 0, reasons[number])
                return
        made: dict[int, Features] = {}
        batch: dict[int, Tensor] = {}
        for number, each in enumerate(group.inputs):
            try:
                if number in reasons:
                    raise InputError(reasons[number])
                loaded = early.pop(number, None) or load(each)
                if loaded.rest is not None:
                    seconds = 0.0
                    for seconds, features in self._long(each, loaded):
                        if features is None:
                            yield InputResult(number, seconds, done=False)
                        else:
                            made[number] = features
                    yield self._written(group, number, seconds, made)
                    continue
            except InputError as error:
                reasons[number] = str(error)
                yield InputResult(number, 0, str(error))
                continue
            if sum(map(len, batch.values())) + len(loaded.first) > job.block:
                yield from self._batch(group, batch, made, reasons)
                batch.clear()
            batch[number] = loaded.first
        yield from self._batch(group, batch, made, reasons)
        if job.in_one:
            self._part(group, made, reasons)

    def alone(self, each: Input) -> None:
        """Computes an input and writes nothing: to see whether that can be survived."""
        with contextlib.suppress(InputError):
            loaded = self.load(each)
            if loaded.rest is None:
                self._computed([loaded.first])
            else:
                deque(self._long(each, loaded), 0)

    def _batch(
        self, group: Group, batch: Mapping[int, Tensor], made: dict[int, Features], reasons: dict[int, str]
    ) -> Iterator[InputResult]:
        if not batch:
            return
        try:
            pools = self._computed(list(batch.values()))
        except (RuntimeError, MemoryError) as error:
            for number in batch:
                reasons[number] = describe_error(error, group.inputs[number])
                yield InputResult(number, 0, reasons[number])
            return
        for (number, wave), each in zip(batch.items(), pools, strict=True):
            try:
                made[number] = self._features(group.inputs[number], each, len(wave))
            except (ValueError, RuntimeError, MemoryError) as error:
                reasons[number] = describe_error(error, group.inputs[number])
                yield InputResult(number, 0, reasons[number])
            else:
                yield self._written(group, number, len(wave) / SAMPLE_RATE, made)

    def _pools(self) -> dict[str, Pooling | Clock]:
        contents = self.job.contents
        if contents.clock:
            return {key: Clock(layer, *contents.clock) for key, layer in self.layers.items()}
        return {key: Pooling(contents.pool) for key in self.layers}

    def _computed(self, waves: Sequence[Tensor]) -> list[dict[str, Pooling | Clock]]:
        """Each layer's frames for each sound."""
        pools = [self._pools() for _ in waves]
        moved = [wave.to(self.device) for wave in waves]
        with evaluation_mode(self.model):
            new = StreamState(self.engine, self.is_layer, len(moved)).push(moved, last=True)
            for number, wave in enumerate(moved):
                bare = self.model.extract(wave, [layer.module for layer in self.bare]) if self.bare else {}
                left_out = self._left_out(len(wave))
                for key, layer in self.layers.items():
                    frames = bare[layer.module][0].T if not layer.is_layer else new[layer.name][number]
                    pools[number][key].add(frames[: len(frames) - left_out.get(key, 0)].cpu())
        return pools

    def _left_out(self, samples: int) -> dict[str, int]:
        """How many frames at the end of each layer are left out: its edge frames, unless they are wanted."""
        if self.job.contents.all_frames or self.job.contents.edge_frames:
            return {}
        return {key: self.model.edge_frames(layer, samples) for key, layer in self.edged.items()}

    def _long(self, each: Input, loaded: Loaded) -> Iterator[tuple[float, Features | None]]:
        """A sound of more than one block: seconds after each, in the end with the features.

        Bare modules need it in one piece.
        """
        assert loaded.rest is not None
        try:
            if self.bare:
                whole = torch.cat([loaded.first, *loaded.rest])
                self.long_enough(len(whole))
                made = self._features(each, self._computed([whole])[0], len(whole))
                yield len(whole) / SAMPLE_RATE, made
                return
            pools = self._pools()
            flow, samples = StreamState(self.engine, self.is_layer), 0
            piece: Tensor | None = loaded.first
            while piece is not None:
                following = next(loaded.rest, None)
                with evaluation_mode(self.model):
                    new = flow.push([piece.to(self.device)], last=following is None)
                samples += len(piece)
                left_out = self._left_out(samples) if following is None else {}
                for key, layer in self.layers.items():
                    frames = new[layer.name][0]
                    pools[key].add(frames[: len(frames) - left_out.get(key, 0)].cpu())
                piece = following
                yield samples / SAMPLE_RATE, None
            self.long_enough(samples)
            yield samples / SAMPLE_RATE, self._features(each, pools, samples)
        except Exception as error:  # decoders, again
            raise InputError(describe_error(error, each)) from None

    def long_enough(self, samples: int) -> None:
        """Raises a ValueError if so many samples are too short for a layer, or give edge frames alone."""
        self.model.architecture.check_length(samples, self.layers.values())
        contents = self.job.contents
        if not (contents.all_frames or contents.edge_frames or contents.clock):
            self.model.architecture.check_ordinary(samples, self.layers.values())

    def _features(self, each: Input, pools: Mapping[str, Pooling | Clock], samples: int) -> Features:
        arrays: dict[str, NDArray[Any]] = {}
        times = {}
        left_out = self._left_out(samples)
        for key, pool in pools.items():
            if isinstance(pool, Clock):
                rows, heard = pool.result(samples, left_out.get(key, 0))
                arrays[key], times[key] = rows.numpy(), heard.numpy()
                continue
            arrays[key] = pool.result().contiguous().numpy()
            if self.job.format == "peaks":
                arrays |= {f"{key}_frames": pool.peaks.numpy(), "samples": np.array(samples)}
            if self.job.contents.timed:
                times[key] = self.model.frame_times(layer_key(self.layers[key]), len(arrays[key])).numpy()
        edges = {}
        if self.job.contents.all_frames:
            edges = {key: self.model.edge_frames(layer, samples) for key, layer in self.edged.items()}
        return Features(each.text, arrays, times, edges)

    def _written(self, group: Group, number: int, seconds: float, made: dict[int, Features]) -> InputResult:
        """An input's own results, where they are missing; those of a part wait."""
        job = self.job
        if job.in_one:
            return InputResult(number, seconds)
        features, each = made.pop(number), group.inputs[number]
        for file, content in zip(job.files(each), job.form.split(features), strict=True):
            try:
                if not os.path.exists(file):  # noqa: PTH110
                    with atomic_write(Path(file), job.staging) as aside:
                        job.form.write(aside, [content], job.contents, False)
            except OSError as error:
                if error.errno not in _NAME_FAULTS:
                    raise OutputError(format_write_error(file, error)) from None
                return InputResult(number, 0, f"{file} cannot be written: {error.strerror}")
            except (ValueError, RuntimeError) as error:  # a size or a name that the format does not know
                return InputResult(number, 0, f"{file} cannot be written: {describe_error(error, each)}")
        return InputResult(number, seconds)

    def _part(self, group: Group, made: Mapping[int, Features], reasons: Mapping[int, str]) -> None:
        job = self.job
        inputs = [made[number] for number in sorted(made)]
        try:
            if reasons:
                failures = [Failure(group.inputs[n].path, reasons[n]) for n in sorted(reasons)]
                with atomic_write(job.failures(group), job.staging) as aside:
                    write_failures(aside, failures)
            with atomic_write(job.part(group), job.staging) as aside:
                job.form.write(aside, inputs, job.contents, True)
        except (OSError, ValueError, RuntimeError) as error:
            raise OutputError(format_write_error(job.part(group), error)) from None


def layer_key(layer: Layer) -> str | int:
    """A layer, for the model's methods."""
    return layer.name if layer.kind == "head" else layer.module


def printable_name(path: str) -> str:
    """A file's name as text, whatever bytes it has."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def describe_error(error: Exception, each: Input) -> str:
    """One line, without the input's name."""
    text = str(error).removeprefix(f"{each.file}: ")
    if isinstance(error, RuntimeError):  # torch adds a stack
        text = text.partition("\n")[0]
    if not isinstance(error, (ValueError, OSError, RuntimeError)):
        text = f"{type(error).__name__} {text}"
    return " ".join(text.split()) or type(error).__name__


def format_write_error(file: object, error: Exception | str) -> str:
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    return f"{file}: cannot be written ({text}); what is there stays, the same command goes on from it"


def run_in_process(
    extractor: Extractor, groups: Sequence[Group], threads: int
) -> Generator[tuple[Group, InputResult | None], None, None]:
    """All groups in this process, with one thread as in workers; so many others decode ahead.

    Each group ends with a None.
    """
    coming = (each for group in groups for each in group.inputs)
    ahead: dict[Input, Future[Loaded]] = {}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(threads or 1) as pool:

        def load(each: Input) -> Loaded:
            while len(ahead) < 2 * threads and (following := next(coming, None)):
                ahead[following] = pool.submit(extractor.load, following)
            loading = ahead.pop(each, None)
            return loading.result() if loading else extractor.load(each)

        try:
            for group in groups:
                for through in extractor.group(group, {}, load):
                    yield group, through
                yield group, None
        except OutputError as stop:
            raise CorpusError(str(stop)) from None
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(before)


# ---- worker processes


@dataclass(frozen=True)
class SerializedModel:
    """A network on its way to another process: its parameters as bytes, for NumPy has no bfloat16."""

    architecture: Architecture
    dtype: torch.dtype
    state: Mapping[str, NDArray[np.uint8]]


def serialize_model(model: SoundNet) -> SerializedModel:
    arrays = {name: each.view(torch.uint8).numpy() for name, each in cpu_state_dict(model).items()}
    return SerializedModel(model.architecture, next(model.parameters()).dtype, arrays)


def deserialize_model(network: SerializedModel) -> SoundNet:
    # copied, for what comes through Ray's shared memory cannot be written
    state = {name: torch.from_numpy(each.copy()).view(network.dtype) for name, each in network.state.items()}
    return build_model(network.architecture, state)


@dataclass(frozen=True)
class _Task:
    group: Group
    excluded: Mapping[int, str] = field(default_factory=dict)
    trial: int | None = None  # only try the inputs from this one on, one by one
    tried: bool = False


@dataclass
class _Worker:
    process: SpawnProcess
    connection: Connection
    ready: bool = False
    task: _Task | None = None
    trying: int = 0


def worker_main(connection: Connection) -> None:
    """A worker's life: a job, then tasks, until nobody is there any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run ends its workers
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    with contextlib.suppress(EOFError, ConnectionError):
        connection.send(None)
        job, network = connection.recv()
        extractor = Extractor(job, deserialize_model(network))
        while parent is None or parent.is_alive():
            task: _Task = connection.recv()
            if task.trial is not None:
                for number in range(task.trial, len(task.group.inputs)):
                    if number not in task.excluded:
                        connection.send(number)
                        extractor.alone(task.group.inputs[number])
            else:
                try:
                    for through in extractor.group(task.group, task.excluded, extractor.load):
                        connection.send(through)
                        if parent is not None and not parent.is_alive():
                            return
                except OutputError as stop:
                    connection.send(str(stop))
            connection.send(None)


def run_in_workers(
    job: Job, model: SoundNet, groups: Sequence[Group], count: int
) -> Generator[tuple[Group, InputResult | None], None, None]:
    """All groups in worker processes. Each group ends with a None.

    A group whose worker dies is tried file by file in a new one. Whichever file takes that with it is
    a bad file, and the group is computed without it.
    """
    network = serialize_model(model)
    waiting = deque(_Task(group) for group in groups)
    workers: list[_Worker] = []
    try:
        while waiting or any(worker.task for worker in workers):
            for worker in workers:
                if worker.ready and worker.task is None and waiting:
                    worker.task = waiting.popleft()
                    with contextlib.suppress(OSError):  # it has died, which its connection will say
                        worker.connection.send(worker.task)
            idle = sum(worker.task is None for worker in workers)
            workers += [_started() for _ in range(min(count - len(workers), len(waiting) - idle))]
            heard: list[Any] = wait([worker.connection for worker in workers])
            for worker in [worker for worker in workers if worker.connection in heard]:
                try:
                    said = worker.connection.recv()
                    if not worker.ready:
                        worker.ready = True
                        worker.connection.send((job, network))
                        said = None
                except (EOFError, OSError):
                    workers.remove(worker)
                    waiting.extendleft(handle_worker_death(worker))
                    continue
                task = worker.task
                if isinstance(said, str):
                    raise CorpusError(said)
                if isinstance(said, int):
                    worker.trying = said
                elif said is not None:
                    assert task is not None
                    yield task.group, said
                else:
                    worker.task = None
                    if task is not None and task.trial is not None:
                        waiting.appendleft(replace(task, trial=None, tried=True))
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


def _started() -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=worker_main, args=(theirs,), daemon=True)
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None  # a Ctrl-C is for the run alone
    try:
        process.start()
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)
    theirs.close()  # so that ours ends when the process does
    return _Worker(process, ours)


def handle_worker_death(worker: _Worker) -> list[_Task]:
    """What is to be done about a worker's death."""
    worker.process.join()
    code = worker.process.exitcode or 0
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    how += ", perhaps out of memory" if code == -9 else ""
    task = worker.task
    if not worker.ready:
        raise CorpusError(
            f"a worker process died before it began ({how}); a script that extracts with several workers "
            "must do so under if __name__ == '__main__':"
        )
    if task is None:
        return []
    if task.trial is not None:
        excluded = {**task.excluded, worker.trying: f"the process that read it died ({how})"}
        return [replace(task, excluded=excluded, trial=worker.trying + 1)]
    if not task.tried:
        return [replace(task, trial=0)]
    others = {
        number: f"the process that computed it with {len(task.group.inputs) - 1} others died twice ({how})"
        for number in range(len(task.group.inputs))
    }
    return [replace(task, excluded={**others, **task.excluded})]


def result_key(layer: str | int) -> str:
    """A layer's name in results; modules are called as in the original's files."""
    return layer if isinstance(layer, str) else f"layer{layer}"
