"""Features of whole corpora: files in, files out, on all cores, and to be interrupted at any time.

What is computed together decides the last bits of a number: a matrix product of another size may add in
another order. So that results depend neither on the number of workers nor on interruptions, it follows
from the inputs alone. They are sorted and cut into groups of consecutive ones. A group is the unit of
work: one process computes it with one thread, and if any of its results is missing, all of it again.

Results appear under their names when they are complete, never before. They are written in the folder
`.extract/<run>/` at the place of the results, synchronised, and renamed. A run holds a lock there. Who
starts while nobody else is at work removes what killed runs left; a worker that has outlived its run
loses its folder with that, and can put nothing in place any more.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import soundnet_port
from soundnet_port.architecture import SAMPLE_RATE, Architecture, Layer
from soundnet_port.audio import DECODERS, STDIN, SUFFIXES, read_blocks
from soundnet_port.engine import BLOCK, Flow, engine_of
from soundnet_port.features import POOLINGS, evaluating
from soundnet_port.model import SoundNet
from soundnet_port.outputs import FORMATS, Contents, Features, Format, format_of
from soundnet_port.weights import build, checksum, load_pretrained

try:
    import fcntl
except ImportError:  # Windows: nobody is refused there, and nothing of killed runs is removed
    fcntl = None  # type: ignore[assignment]

GROUP_FILES = 64  # inputs in a group, at most
GROUP_BYTES = 32 << 20  # of inputs, from which on a group ends
_POOLED_FRAMES = 1 << 13  # in float64 at a time
# what is wrong with one result's name, not with the place of all of them
_NAME_FAULTS = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EILSEQ, errno.EINVAL)


class CorpusError(ValueError):
    """A run that cannot start or go on: why, and what to do."""


@dataclass(frozen=True)
class Failure:
    """An input that gave nothing, and why."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes:
        files: inputs that are through, with those of earlier runs and bad ones.
        total: inputs of the run.
        seconds: of sound that this run has computed.
        failure: the input that has just turned out to be bad.
    """

    files: int
    total: int
    seconds: float
    failure: Failure | None = None


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes:
        output: folder or file of the results.
        files: inputs altogether.
        extracted: inputs computed by this run.
        there: inputs whose results were there already.
        failures: inputs that gave nothing.
        seconds: of sound, computed by this run.
        elapsed: seconds that the run took.
        report: the file that lists the failures; None if there are none.
    """

    output: Path
    files: int
    extracted: int
    there: int
    failures: tuple[Failure, ...]
    seconds: float
    elapsed: float
    report: Path | None


class Pooling:
    """All frames ("none"), their mean, their maximum, or mean and population std ("mean+std").

    Frames may come bit by bit. Means are taken in float64, by Chan, Golub and LeVeque's formula for
    the mean and the squared deviations of two sets together.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._kept: list[Tensor] = []
        self._count = 0
        self._largest = torch.tensor(-torch.inf)
        self._mean = self._squares = torch.zeros((), dtype=torch.float64)

    def add(self, frames: Tensor) -> None:
        """More frames, (frames, channels)."""
        if self.kind == "none":
            self._kept.append(frames)
        for some in frames.split(_POOLED_FRAMES) if self.kind != "none" and len(frames) else ():
            if self.kind == "max":
                self._largest = torch.maximum(self._largest, some.amax(0))
                continue
            values = some.double()
            mean = values.mean(0)
            apart, total = mean - self._mean, self._count + len(some)
            self._mean = self._mean + apart * (len(some) / total)
            self._squares = self._squares + (values - mean).square().sum(0)
            self._squares = self._squares + apart.square() * (self._count * len(some) / total)
            self._count = total

    def result(self) -> Tensor:
        """Float32, (channels,), (2 * channels,) for "mean+std", (frames, channels) for "none"."""
        if self.kind == "none":
            return torch.cat(self._kept).float()
        if self.kind == "max":
            return self._largest.float()
        if self.kind == "mean":
            return self._mean.float()
        return torch.cat([self._mean, (self._squares / self._count).sqrt()]).float()


def extract_corpus(
    model: SoundNet | str | os.PathLike[str],
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    layers: Sequence[str | int] = ("pool5",),
    pool: str = "none",
    format: str | None = None,  # noqa: A002  (as on the command line)
    workers: int | None = None,
    decoder: str = "auto",
    batch_seconds: float | None = None,
    root: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Features of many sound files, written to files; a run that was interrupted goes on where it was.

    Results depend neither on the number of workers nor on interruptions. Arrays are (frames,
    channels), or (channels,) if pooled.

    Args:
        model: a SoundNet, whose parameters and device are used (hooks and replaced modules are
            not), or weights as for `load_pretrained`.
        inputs: as on the command line: files, folders to be searched, "@LIST" for a text file with
            a path per line, "-" for a sound on standard input.
        output: a folder, in which the inputs' tree is mirrored, or a file for all of it, whose
            suffix is that of a format.
        layers: names, or Torch7's module numbers.
        pool: "none", or over time "mean", "max", or "mean+std" (both, one after the other;
            population std).
        format: "npz", "npy", "h5", "csv", "mat", "parquet" or "torch7"; by default the output's
            suffix, or npz.
        workers: processes; by default as many as there are CPUs for this one. 1 computes in this
            process. With a model on a GPU they are threads that decode.
        decoder: of sound files, see `load_audio`.
        batch_seconds: how much sound is computed at once; by default 95 s.
        root: a folder that the names of results are relative to; by default each input folder.
        force: starts anew where there are results.
        progress: called in this process whenever an input is through.

    More than one worker need a script that can be imported, with its work under
    `if __name__ == "__main__":`.

    Raises:
        CorpusError: settings that cannot work, results of other settings at the same place, two
            inputs of the same name, a package that is not installed, results that cannot be written.
        WeightsError: no such weights.
    """
    begun = time.monotonic()
    output = Path(output).expanduser()
    named = None if output.is_dir() else format_of(output.name)
    block = BLOCK if batch_seconds is None else round(batch_seconds * SAMPLE_RATE)
    form = format or named or "npz"
    _check(form, named, output, pool, decoder, workers, block)
    if not isinstance(model, SoundNet):
        model = load_pretrained(model)
    wanted = _wanted(model.architecture, layers, form)
    if named and FORMATS[form].one_layer and len(wanted) > 1:
        raise CorpusError(f"{output}: {form} holds one layer; name a folder, or another format")
    contents = _contents(model, wanted, pool, decoder, block)
    with contextlib.ExitStack() as stack:
        found, failures = _named(inputs, root, stack)
        folder = output.with_name(f"{output.name}.parts") if named else output
        staging = stack.enter_context(_claimed(folder, output, alone=force or named is not None))
        job = _Job(
            tuple(layers),
            contents,
            form,
            decoder,
            block,
            folder,
            staging,
            named is not None,
        )
        _check_names(job, found)
        run = _Run(job, output, _grouped(found), failures, progress or (lambda _: None))
        if not run.finished_before(force):
            run.compute(model, workers)
        return run.summary(time.monotonic() - begun)


# ---- the inputs


@dataclass(frozen=True)
class _Input:
    name: str  # of its results, relative to their place, with forward slashes
    path: str  # as the user knows it
    file: str  # what is read
    bytes: int

    @property
    def text(self) -> str:
        """The name, where it has to be text."""
        return os.fsencode(self.name).decode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class _Group:
    number: int
    inputs: tuple[_Input, ...]
    bytes: int


def find_sounds(inputs: Sequence[str | os.PathLike[str]]) -> Iterator[tuple[Path, str] | Failure]:
    """The sound files that are named, each with the folder that was searched for it, or "".

    Args:
        inputs: files, folders (searched for sound files) and @lists of paths. What cannot be looked
            at comes as a `Failure`.
    """
    for argument in map(os.fspath, inputs):
        if argument.startswith("@") and not os.path.exists(argument):  # noqa: PTH110  (never raises)
            try:
                listed = sys.stdin.buffer.read() if argument == "@-" else Path(argument[1:]).read_bytes()
            except OSError as error:
                yield Failure(argument[1:], error.strerror or str(error))
                continue
            # as bytes: names need not be text, and only line feeds end them
            for line in listed.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
                if line.strip():
                    yield Path(os.fsdecode(line.removesuffix(b"\r"))), ""
        elif os.path.isdir(argument):  # noqa: PTH112
            troubles: list[OSError] = []
            found = sorted(
                Path(folder, name)
                for folder, _, names in os.walk(argument, onerror=troubles.append)
                for name in names
                if Path(name).suffix.lower() in SUFFIXES and not name.startswith("._")
            )
            for path in found:
                yield path, argument
            for trouble in troubles:
                yield Failure(str(trouble.filename), trouble.strerror or str(trouble))
            if not found and not troubles:
                yield Failure(argument, "no sound files in this directory")
        else:
            yield Path(argument), ""


def _named(
    inputs: Sequence[str | os.PathLike[str]], root: str | os.PathLike[str] | None, stack: contextlib.ExitStack
) -> tuple[list[_Input], list[Failure]]:
    """The inputs, in the order of their names' bytes; a file that is named twice counts once."""
    searched = [inputs] if isinstance(inputs, (str, os.PathLike)) else inputs
    folders = [_absolute(each) for each in searched if os.path.isdir(each)]  # noqa: PTH112
    found: dict[str, _Input] = {}
    failures: list[Failure] = []
    for each in find_sounds(searched):
        if isinstance(each, Failure):
            failures.append(each)
            continue
        path, folder = str(each[0]), each[1]
        if path == STDIN:  # workers cannot read it, and decoders seek
            copy = stack.enter_context(tempfile.NamedTemporaryFile())  # noqa: SIM115
            shutil.copyfileobj(sys.stdin.buffer, copy)
            copy.flush()
            found[path] = _Input("stdin", path, copy.name, copy.tell())
            continue
        whole = _absolute(path)
        if whole in found:
            continue
        above = [_absolute(root)] if root is not None else [_absolute(folder)] if folder else folders
        inside = max((each for each in above if whole.startswith(each.rstrip(os.sep) + os.sep)), default="")
        if root is not None and not inside:
            raise CorpusError(f"{path}: not inside {os.fspath(root)}, which names are to be relative to")
        name = os.path.relpath(whole, inside) if inside else Path(whole).name
        try:
            size = os.stat(whole).st_size  # noqa: PTH116
        except (OSError, ValueError):  # reading it will say why
            size = 0
        found[whole] = _Input(name.replace(os.sep, "/"), path, path, size)
    if not found and not failures:
        raise CorpusError("no inputs")
    return sorted(found.values(), key=lambda each: os.fsencode(each.name)), failures


def _absolute(path: str | os.PathLike[str]) -> str:
    return os.path.abspath(path)  # noqa: PTH100  (Path.absolute keeps "..")


def _grouped(inputs: Sequence[_Input]) -> list[_Group]:
    """Consecutive inputs; nothing but their names and sizes decides."""
    groups: list[_Group] = []
    held: list[_Input] = []
    size = 0
    for number, each in enumerate(inputs, 1):
        held.append(each)
        size += each.bytes
        if len(held) == GROUP_FILES or size >= GROUP_BYTES or number == len(inputs):
            groups.append(_Group(len(groups), tuple(held), size))
            held, size = [], 0
    return groups


# ---- the settings


@dataclass(frozen=True)
class _Job:
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
        return FORMATS[self.format]

    def files(self, each: _Input) -> list[str]:
        """An input's own results."""
        return [f"{self.folder}/{each.name}{suffix}" for suffix in self.form.suffixes(self.contents)]

    def part(self, group: _Group) -> Path:
        return self.folder / f"{group.number:06}{self.form.suffix}"

    def failures(self, group: _Group) -> Path:
        """Of a part: the inputs that are not in it."""
        return self.folder / f"{group.number:06}.tsv"

    def missing(self, group: _Group) -> list[int]:
        """The inputs without results, by their place in the group."""
        if self.in_one:
            return [] if self.part(group).exists() else list(range(len(group.inputs)))
        return [
            number
            for number, each in enumerate(group.inputs)
            if not all(map(os.path.exists, self.files(each)))
        ]


def _check(
    form: str,
    named: str | None,
    output: Path,
    pool: str,
    decoder: str,
    workers: int | None,
    block: int,
) -> None:
    for what, value, choices in (
        ("format", form, tuple(FORMATS)),
        ("pooling", pool, ("none", *POOLINGS)),
        ("decoder", decoder, DECODERS),
    ):
        if value not in choices:
            raise CorpusError(f"unknown {what} {value!r}; choose from {', '.join(choices)}")
    if named and (form != named or not FORMATS[form].merge):
        raise CorpusError(
            f"{output}: cannot hold a corpus as {form}; name a folder, or another format's file"
        )
    if output.exists() and not named and not output.is_dir():
        raise CorpusError(f"{output}: neither a folder nor a file of a known format")
    if workers is not None and workers < 1:
        raise CorpusError(f"the number of workers must be at least 1, not {workers}")
    if not 1 <= block / SAMPLE_RATE <= 3600:
        raise CorpusError(f"batch seconds must be 1 to 3600, not {block / SAMPLE_RATE:g}")
    missing = FORMATS[form].missing()
    if missing:
        raise CorpusError(f"the format {form}: {missing}")


def _wanted(architecture: Architecture, layers: Sequence[str | int], form: str) -> dict[str, Layer]:
    """The layers, under the names that they have in results."""
    if isinstance(layers, (str, int)) or not layers:
        raise CorpusError(f"layers must be a list, such as ['pool5'], not {layers!r}")
    wanted = {}
    for key in layers:
        try:
            layer = architecture.layer(key)
        except ValueError as error:
            raise CorpusError(f"layers: {error}") from None
        if form == "torch7" and layer.kind == "head":
            raise CorpusError("torch7 holds modules of the trunk; for the heads choose another format")
        wanted[_key(key)] = layer
    return wanted


def _key(layer: str | int) -> str:
    """A layer's name in results; modules are called as in the original's files."""
    return layer if isinstance(layer, str) else f"layer{layer}"


def _contents(model: SoundNet, wanted: Mapping[str, Layer], pool: str, decoder: str, block: int) -> Contents:
    state = model.state_dict()
    weights = checksum({name: state[name].cpu() for name in model.architecture.state_shapes()})
    return Contents(
        {key: layer.channels * (2 if pool == "mean+std" else 1) for key, layer in wanted.items()},
        pool,
        {
            "version": soundnet_port.__version__,
            "architecture": model.architecture.name,
            "weights": weights,
            "layers": list(wanted),
            "modules": {key: layer.module for key, layer in wanted.items()},
            "pool": pool,
            "axes": "frames, channels" if pool == "none" else "channels",
            "sample_rate": SAMPLE_RATE,
            "decoder": decoder,
            "device": next(model.parameters()).device.type,
            "batch_seconds": round(block / SAMPLE_RATE, 3),
        },
    )


def _check_names(job: _Job, inputs: Sequence[_Input]) -> None:
    taken: dict[str, _Input] = {}
    for each in inputs:
        for result in [each.text] if job.in_one else job.files(each):
            other = taken.setdefault(result, each)
            if other is not each:
                raise CorpusError(
                    f"{other.path} and {each.path} would both become {result}; "
                    "name a folder that holds both, or give one with --root"
                )


# ---- computing


@dataclass(frozen=True)
class _Through:
    """An input of a group that is through: seconds of sound, or why not."""

    number: int
    seconds: float
    reason: str | None = None


class _Bad(Exception):
    """An input that gives nothing."""


class _Stopped(Exception):
    """Nothing can be written any more."""


@dataclass(frozen=True)
class _Loaded:
    first: Tensor  # a block of the waveform, or all of it
    rest: Iterator[Tensor] | None  # of a sound longer than a block


class _Extractor:
    """Computes groups and writes their results."""

    def __init__(self, job: _Job, model: SoundNet) -> None:
        self.job, self.model = job, model
        self.layers = {_key(key): model.architecture.layer(key) for key in job.keys}
        # bare convolutions and batch norms are no layers of the engine's
        self.named = [layer for layer in self.layers.values() if layer.kind in ("relu", "pool", "head")]
        self.bare = [layer for layer in self.layers.values() if layer not in self.named]
        self.engine = engine_of(model)
        self.device = next(model.parameters()).device

    def load(self, each: _Input) -> _Loaded:
        """The sound, or its first block if it is longer than that.

        Raises:
            _Bad: it cannot be read, or is too short for the layers.
        """
        try:
            blocks = read_blocks(each.file, decoder=self.job.decoder, samples=self.job.block)
            first = next(blocks)
            second = next(blocks, None)
            self.model._checked(first, self.layers.values())
        except Exception as error:  # decoders may raise anything, and one file must not end a run
            raise _Bad(_reason(error, each)) from None
        return _Loaded(first, None if second is None else chain([second], blocks))

    def group(
        self,
        group: _Group,
        excluded: Mapping[int, str],
        load: Callable[[_Input], _Loaded],
    ) -> Iterator[_Through]:
        """Computes a group, without those excluded, and writes what is missing.

        Raises:
            _Stopped: results cannot be written.
        """
        job, reasons = self.job, dict(excluded)
        early: dict[int, _Loaded] = {}
        missing = job.missing(group)
        if len(missing) < len(group.inputs):  # results are there; are the others bad files, as before?
            for number in missing:
                try:
                    if number not in reasons:
                        early[number] = load(group.inputs[number])
                        break
                except _Bad as error:
                    reasons[number] = str(error)
            if not early:
                for number in missing:
                    yield _Through(number, 0, reasons[number])
                return
        made: dict[int, Features] = {}
        batch: dict[int, Tensor] = {}
        for number, each in enumerate(group.inputs):
            try:
                if number in reasons:
                    raise _Bad(reasons[number])
                loaded = early.pop(number, None) or load(each)
                if loaded.rest is not None:
                    seconds, made[number] = self._long(each, loaded)
                    yield self._written(group, number, seconds, made)
                    continue
            except _Bad as error:
                reasons[number] = str(error)
                yield _Through(number, 0, str(error))
                continue
            if sum(map(len, batch.values())) + len(loaded.first) > job.block:
                yield from self._batch(group, batch, made, reasons)
                batch.clear()
            batch[number] = loaded.first
        yield from self._batch(group, batch, made, reasons)
        if job.in_one:
            self._part(group, made, reasons)

    def alone(self, each: _Input) -> None:
        """Computes an input and writes nothing: to see whether that can be survived."""
        with contextlib.suppress(_Bad):
            loaded = self.load(each)
            if loaded.rest is None:
                self._computed([loaded.first])
            else:
                self._long(each, loaded)

    def _batch(
        self, group: _Group, batch: Mapping[int, Tensor], made: dict[int, Features], reasons: dict[int, str]
    ) -> Iterator[_Through]:
        if not batch:
            return
        try:
            pools = self._computed(list(batch.values()))
            made |= {
                number: self._features(group.inputs[number], each)
                for number, each in zip(batch, pools, strict=True)
            }
        except (RuntimeError, MemoryError) as error:
            for number in batch:
                reasons[number] = _reason(error, group.inputs[number])
                yield _Through(number, 0, reasons[number])
            return
        for number, wave in batch.items():
            yield self._written(group, number, len(wave) / SAMPLE_RATE, made)

    def _computed(self, waves: Sequence[Tensor]) -> list[dict[str, Pooling]]:
        """Each layer's frames for each sound."""
        pools = [{key: Pooling(self.job.contents.pool) for key in self.layers} for _ in waves]
        moved = [wave.to(self.device) for wave in waves]
        with evaluating(self.model):
            new = Flow(self.engine, self.named, len(moved)).push(moved, last=True)
            for number, wave in enumerate(moved):
                bare = self.model.extract(wave, [layer.module for layer in self.bare]) if self.bare else {}
                for key, layer in self.layers.items():
                    frames = bare[layer.module][0].T if layer in self.bare else new[layer.name][number]
                    pools[number][key].add(frames.cpu())
        return pools

    def _long(self, each: _Input, loaded: _Loaded) -> tuple[float, Features]:
        """A sound of more than one block. Bare modules need it in one piece."""
        assert loaded.rest is not None
        try:
            if self.bare:
                whole = torch.cat([loaded.first, *loaded.rest])
                return len(whole) / SAMPLE_RATE, self._features(each, self._computed([whole])[0])
            pools = {key: Pooling(self.job.contents.pool) for key in self.layers}
            flow, samples = Flow(self.engine, self.named), 0
            piece: Tensor | None = loaded.first
            while piece is not None:
                following = next(loaded.rest, None)
                with evaluating(self.model):
                    new = flow.push([piece.to(self.device)], last=following is None)
                for key, layer in self.layers.items():
                    pools[key].add(new[layer.name][0].cpu())
                samples += len(piece)
                piece = following
            return samples / SAMPLE_RATE, self._features(each, pools)
        except Exception as error:  # decoders, again
            raise _Bad(_reason(error, each)) from None

    def _features(self, each: _Input, pools: Mapping[str, Pooling]) -> Features:
        arrays = {key: pooled.result().contiguous().numpy() for key, pooled in pools.items()}
        times = {}
        if self.job.contents.timed:
            for key, layer in self.layers.items():
                times[key] = self.model.frame_times(_name(layer), len(arrays[key])).numpy()
        return Features(each.text, arrays, times)

    def _written(self, group: _Group, number: int, seconds: float, made: dict[int, Features]) -> _Through:
        """An input's own results, where they are missing; those of a part wait."""
        job = self.job
        if job.in_one:
            return _Through(number, seconds)
        features, each = made.pop(number), group.inputs[number]
        for file, content in zip(job.files(each), job.form.split(features), strict=True):
            try:
                if not os.path.exists(file):  # noqa: PTH110
                    with _placed(job.staging, Path(file)) as aside:
                        job.form.write(aside, [content], job.contents, False)
            except OSError as error:
                if error.errno not in _NAME_FAULTS:
                    raise _Stopped(_unwritable(file, error)) from None
                return _Through(number, 0, f"{file} cannot be written: {error.strerror}")
            except (ValueError, RuntimeError) as error:  # a size or a name that the format does not know
                return _Through(number, 0, f"{file} cannot be written: {_reason(error, each)}")
        return _Through(number, seconds)

    def _part(self, group: _Group, made: Mapping[int, Features], reasons: Mapping[int, str]) -> None:
        job = self.job
        inputs = [made[number] for number in sorted(made)]
        try:
            if reasons:
                failures = [Failure(group.inputs[n].path, reasons[n]) for n in sorted(reasons)]
                with _placed(job.staging, job.failures(group)) as aside:
                    _write_failures(aside, failures)
            with _placed(job.staging, job.part(group)) as aside:
                job.form.write(aside, inputs, job.contents, True)
        except (OSError, ValueError, RuntimeError) as error:
            raise _Stopped(_unwritable(job.part(group), error)) from None


def _name(layer: Layer) -> str | int:
    """A layer, for the model's methods."""
    return layer.name if layer.kind == "head" else layer.module


def _reason(error: Exception, each: _Input) -> str:
    """One line, without the input's name."""
    text = str(error).removeprefix(f"{each.file}: ")
    if isinstance(error, RuntimeError):  # torch adds a stack
        text = text.partition("\n")[0]
    if not isinstance(error, (ValueError, OSError, RuntimeError)):
        text = f"{type(error).__name__} {text}"
    return " ".join(text.split()) or type(error).__name__


def _unwritable(file: object, error: Exception) -> str:
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    return f"{file}: cannot be written ({text}); what is there stays, the same command goes on from it"


def _inline(
    extractor: _Extractor, groups: Sequence[_Group], threads: int
) -> Generator[tuple[_Group, _Through | None], None, None]:
    """All groups in this process, with one thread as in workers; so many others decode ahead.

    Each group ends with a None.
    """
    coming = (each for group in groups for each in group.inputs)
    ahead: dict[_Input, Future[_Loaded]] = {}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(threads or 1) as pool:

        def load(each: _Input) -> _Loaded:
            while len(ahead) < 2 * threads and (following := next(coming, None)):
                ahead[following] = pool.submit(extractor.load, following)
            loading = ahead.pop(each, None)
            return loading.result() if loading else extractor.load(each)

        try:
            for group in groups:
                for through in extractor.group(group, {}, load):
                    yield group, through
                yield group, None
        except _Stopped as stop:
            raise CorpusError(str(stop)) from None
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(before)


# ---- worker processes


@dataclass(frozen=True)
class _Task:
    group: _Group
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


def _serve(connection: Connection) -> None:
    """A worker's life: a job, then tasks, until nobody is there any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run ends its workers
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    with contextlib.suppress(EOFError, ConnectionError):
        connection.send(None)
        job, architecture, state = connection.recv()
        model = build(architecture, {name: torch.from_numpy(array) for name, array in state.items()})
        extractor = _Extractor(job, model)
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
                except _Stopped as stop:
                    connection.send(str(stop))
            connection.send(None)


def _spread(
    job: _Job, model: SoundNet, groups: Sequence[_Group], count: int
) -> Generator[tuple[_Group, _Through | None], None, None]:
    """All groups in worker processes. Each group ends with a None.

    A group whose worker dies is tried file by file in a new one. Whichever file takes that with it is
    a bad file, and the group is computed without it.
    """
    state = {name: model.state_dict()[name].cpu().numpy() for name in model.architecture.state_shapes()}
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
                        worker.connection.send((job, model.architecture, state))
                        said = None
                except (EOFError, OSError):
                    workers.remove(worker)
                    waiting.extendleft(_bereaved(worker))
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
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None  # a Ctrl-C is for the run alone
    try:
        process.start()
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)
    theirs.close()  # so that ours ends when the process does
    return _Worker(process, ours)


def _bereaved(worker: _Worker) -> list[_Task]:
    """What is to be done about a worker's death."""
    worker.process.join()
    code = worker.process.exitcode or 0
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    how += ", perhaps out of memory" if code == -signal.SIGKILL else ""
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


# ---- a run


class _Run:
    """The groups that are to be computed, what came of them, and where that is written down."""

    def __init__(
        self,
        job: _Job,
        output: Path,
        groups: Sequence[_Group],
        failures: Sequence[Failure],
        progress: Callable[[Progress], None],
    ) -> None:
        self.job, self.output, self.groups, self.progress = job, output, groups, progress
        self.failures = {failure.path: failure for failure in failures}
        self.total = sum(len(group.inputs) for group in groups)
        self.extracted = self.there = self.bad = 0
        self.seconds = 0.0
        self.record = job.folder / "extract.json"
        self.sidecar = output.with_name(f"{output.name}.json")  # of a finished output in one file
        self.report = output.with_name(f"{output.name}.errors.tsv") if job.in_one else output / "errors.tsv"
        self.settings: dict[str, Any] = {**job.contents.metadata, "format": job.format}
        if job.in_one:
            listed = hashlib.sha256()
            for each in (each for group in groups for each in group.inputs):
                listed.update(f"{each.bytes} ".encode() + os.fsencode(each.name) + b"\0")
            self.settings |= {"inputs": self.total, "inputs_sha256": listed.hexdigest()}

    # -- what is there already

    def finished_before(self, force: bool) -> bool:
        """Whether nothing is left to do; clears the place or refuses it as need be."""
        return self._file_finished(force) if self.job.in_one else self._folder_finished(force)

    def _folder_finished(self, force: bool) -> bool:
        record = _recorded(self.record)
        if force:
            self._clear_folder(record)
        elif record is not None:
            self._same(record, self.output)
        else:
            for each in (each for group in self.groups for each in group.inputs):
                for file in filter(os.path.exists, self.job.files(each)):
                    raise CorpusError(
                        f"{file}: is there already, but not {self.record}, which would say how it was made; "
                        "choose another folder, or --force replaces it"
                    )
        if force or record is None:
            self._write_record(self.record)
        return False

    def _clear_folder(self, record: Mapping[str, Any] | None) -> None:
        """Removes the results of these inputs. Those of others must be of the same settings."""
        jobs = [self.job]
        if record and record.get("format") in FORMATS:
            widths = dict.fromkeys(map(str, record.get("layers", ())), 0)
            contents = Contents(widths, str(record.get("pool")), {})
            jobs.append(replace(self.job, format=str(record["format"]), contents=contents))
        inputs = [each for group in self.groups for each in group.inputs]
        if record is None or self._differences(record):
            ours = {file for job in jobs for each in inputs for file in job.files(each)}
            suffixes = tuple(job.form.suffix for job in jobs)
            for folder, _, names in os.walk(self.output):
                for file in (f"{folder}/{name}" for name in names if name.endswith(suffixes)):
                    if file not in ours:
                        raise CorpusError(
                            f"{file}: of another input, and made with other settings; --force replaces "
                            "results of the inputs named only: choose another folder, or remove this one"
                        )
        self.record.unlink(missing_ok=True)  # first: without it, what is left is refused
        for job in jobs:
            for file in (file for each in inputs for file in job.files(each)):
                with contextlib.suppress(OSError, ValueError):
                    os.unlink(file)  # noqa: PTH108

    def _file_finished(self, force: bool) -> bool:
        if force:
            self.sidecar.unlink(missing_ok=True)
        elif self.output.exists() and (finished := _recorded(self.sidecar)) is not None:
            self._same(finished, self.output)
            self.failures |= {failure.path: failure for failure in _read_failures(self.report)}
            self.there = self.total - sum(
                each.path in self.failures for group in self.groups for each in group.inputs
            )
            shutil.rmtree(self.job.folder, ignore_errors=True)
            return True
        unfinished = None if force else _recorded(self.record)
        if unfinished is not None:
            self._same(unfinished, self.job.folder)
        elif self.output.exists() and not force:
            raise CorpusError(
                f"{self.output}: is there already, but not {self.sidecar}, which would say how it was made; "
                "choose another name, or --force replaces it"
            )
        else:
            self.record.unlink(missing_ok=True)
            for part in self.job.folder.iterdir():
                if part.is_file():
                    part.unlink()
            self._write_record(self.record)
        return False

    def _same(self, record: Mapping[str, Any], place: Path) -> None:
        differences = self._differences(record)
        if differences:
            raise CorpusError(
                f"{place}: was made with other settings ({'; '.join(differences)}); "
                "choose another place, or --force starts anew"
            )

    def _differences(self, record: Mapping[str, Any]) -> list[str]:
        def shown(value: object) -> str:
            return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

        return [
            f"{key.replace('_', ' ')}: {shown(record.get(key))} there, {shown(value)} now"
            for key, value in self.settings.items()
            if key not in ("version", "modules", "axes") and record.get(key) != value
        ]

    def _write_record(self, path: Path) -> None:
        with _placed(self.job.staging, path) as aside:
            aside.write_text(json.dumps(self.settings, indent=2, sort_keys=True) + "\n", "utf-8")

    # -- what is done

    def compute(self, model: SoundNet, workers: int | None) -> None:
        """Computes the groups that are not complete, and puts parts together."""
        heard: dict[int, set[int]] = {}  # inputs that are counted, of groups that are not complete
        todo = []
        for group in self.groups:
            missing = self.job.missing(group)
            if missing:
                todo.append(group)
                heard[group.number] = set(range(len(group.inputs))).difference(missing)
                self.there += len(heard[group.number])
            else:
                self._complete(group)
        todo.sort(key=lambda group: -max(0, group.bytes - GROUP_BYTES))  # long sounds must not come last
        self._tell(None)
        try:
            with contextlib.closing(self._computed(model, todo, workers)) as events:
                for group, through in events:
                    known = heard.setdefault(group.number, set())
                    if through is not None and through.number not in known:
                        known.add(through.number)
                        self._count(group.inputs[through.number], through)
                    elif through is None:  # a worker may have died between writing and saying so
                        self.extracted += len(group.inputs) - len(known)
                        del heard[group.number]
            if self.job.in_one:
                self._merge()
        except BaseException:
            with contextlib.suppress(OSError):
                self._write_report()
            raise
        self._write_report()
        if self.job.in_one:
            shutil.rmtree(self.job.folder, ignore_errors=True)

    def _computed(
        self, model: SoundNet, todo: Sequence[_Group], workers: int | None
    ) -> Generator[tuple[_Group, _Through | None], None, None]:
        on_cpu = next(model.parameters()).device.type == "cpu"
        count = workers or _cpus()
        if on_cpu and count > 1 and not (workers is None and len(todo) == 1):
            return _spread(self.job, model, todo, count)
        return _inline(_Extractor(self.job, model), todo, 0 if on_cpu else count)

    def _complete(self, group: _Group) -> None:
        """A group of an earlier run; of a part, the bad files are written down."""
        failures = _read_failures(self.job.failures(group)) if self.job.in_one else []
        self.failures |= {failure.path: failure for failure in failures}
        self.bad += len(failures)
        self.there += len(group.inputs) - len(failures)

    def _count(self, each: _Input, through: _Through) -> None:
        failure = None
        if through.reason is None:
            self.extracted += 1
            self.seconds += through.seconds
        else:
            self.bad += 1
            failure = self.failures[each.path] = Failure(each.path, through.reason)
        self._tell(failure)

    def _tell(self, failure: Failure | None) -> None:
        self.progress(Progress(self.there + self.extracted + self.bad, self.total, self.seconds, failure))

    def _merge(self) -> None:
        job = self.job
        if not self.there + self.extracted:  # nothing but bad files: no output, nor anything that says so
            return
        assert job.form.merge is not None
        try:
            with _placed(job.staging, self.output) as aside:
                job.form.merge(aside, [job.part(group) for group in self.groups], job.contents)
            self._write_record(self.sidecar)
        except (OSError, RuntimeError) as error:
            raise CorpusError(_unwritable(self.output, error)) from None

    def _write_report(self) -> None:
        """The failures, and in a folder those of other runs' inputs, as long as they are there."""
        failures = list(self.failures.values())
        if not self.job.in_one and self.report.exists():
            paths = {each.path for group in self.groups for each in group.inputs}
            failures += [
                earlier
                for earlier in _read_failures(self.report)
                if earlier.path not in self.failures
                and earlier.path not in paths
                and os.path.isfile(earlier.path)  # noqa: PTH113
            ]
        if failures:
            with _placed(self.job.staging, self.report) as aside:
                _write_failures(aside, sorted(failures, key=lambda each: os.fsencode(each.path)))
        else:
            self.report.unlink(missing_ok=True)

    def summary(self, elapsed: float) -> Summary:
        """What came of it."""
        failures = tuple(self.failures.values())
        report = self.report if failures else None
        return Summary(
            self.output, self.total, self.extracted, self.there, failures, self.seconds, elapsed, report
        )


# ---- files


def _cpus() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def _placed(staging: Path, path: Path) -> Iterator[Path]:
    """A name to write under; what is written there is put in its place if all goes well."""
    aside = staging / secrets.token_hex(8)
    try:
        yield aside
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(aside, path)
    except OSError as error:
        raise type(error)(
            error.errno, error.strerror or str(error), str(path)
        ) from None  # as the user knows it
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


@contextlib.contextmanager
def _claimed(folder: Path, output: Path, *, alone: bool) -> Iterator[Path]:
    """A folder for this run's unfinished files; it is removed at the end, and so is what killed runs left.

    Args:
        folder: where results or parts go; made if it is not there.
        output: for the message.
        alone: nobody else may be at work there. Otherwise others may, with the same settings.
    """
    inner = folder / ".extract"
    lock = inner / "lock"
    descriptor = -1
    patience = time.monotonic() + 2  # others lock alone for a moment, when they come and go
    try:
        while descriptor < 0:
            with contextlib.suppress(FileNotFoundError):  # who leaves last takes all of it away
                inner.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
                held = _locked(descriptor, alone=True)
                for left in inner.iterdir() if held else ():
                    if left.is_dir():
                        shutil.rmtree(left, ignore_errors=True)
                if not alone and held is not None:
                    held = _locked(descriptor, alone=False)
                if held is not False and os.path.samestat(os.fstat(descriptor), lock.stat()):
                    break
            if descriptor >= 0:
                os.close(descriptor)
                descriptor = -1
            if time.monotonic() > patience:
                raise CorpusError(f"{output}: another run is at work there; wait for it to end")
            time.sleep(0.02)
        staging = inner / secrets.token_hex(4)
        staging.mkdir()
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    finally:
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                if _locked(descriptor, alone=True):
                    lock.unlink(missing_ok=True)
                    inner.rmdir()
                    folder.rmdir()  # unless there is something in it
            os.close(descriptor)


def _locked(descriptor: int, *, alone: bool) -> bool | None:
    """Locks an open file, alone or with others; False if others prevent it, None if nothing can lock."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def _recorded(path: Path) -> dict[str, Any] | None:
    """The settings in a file, if there is one."""
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise CorpusError(f"{path}: damaged; it should say how results were made. Remove it, then --force")
    return record


def _write_failures(path: Path, failures: Sequence[Failure]) -> None:
    with open(path, "wb") as file:
        for failure in failures:
            name = failure.path.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n")
            file.write(os.fsencode(f"{name}\t{failure.reason}\n"))


def _read_failures(path: Path) -> list[Failure]:
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    failures = []
    for line in lines:
        name, tab, reason = os.fsdecode(line).partition("\t")
        if tab:
            name = name.replace("\\\\", "\0").replace("\\t", "\t").replace("\\n", "\n").replace("\0", "\\")
            failures.append(Failure(name, reason))
    return failures
