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
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from soundnet_port.audio.finding import STDIN, SUFFIXES, Failure, absolute_path, find_sounds
from soundnet_port.audio.loading import DECODERS
from soundnet_port.corpus.extractor import (
    CorpusError,
    Extractor,
    Group,
    Input,
    InputResult,
    Job,
    format_write_error,
    result_key,
    run_in_process,
    run_in_workers,
)
from soundnet_port.corpus.formats import FORMATS, Contents, format_of, read_failures, write_failures
from soundnet_port.files import atomic_write, output_lock
from soundnet_port.inference.alignment import check_clock
from soundnet_port.inference.pooling import POOLINGS
from soundnet_port.network.architecture import SAMPLE_RATE, Architecture, Layer
from soundnet_port.network.engine import BLOCK
from soundnet_port.network.model import SoundNet
from soundnet_port.network.weights import checksum, cpu_state_dict
from soundnet_port.pretrained import load_pretrained
from soundnet_port.version import __version__

GROUP_FILES = 64  # inputs in a group, at most
GROUP_BYTES = 32 << 20  # of inputs, from which on a group ends


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes:
        files: inputs that are through, with those of earlier runs and bad ones.
        total: inputs of the run.
        seconds: of sound that this run has computed, with those of sounds that are under way.
        failure: the input that has just turned out to be bad.
    """

    files: int
    total: int
    seconds: float
    failure: Failure | None = None


@dataclass(frozen=True)
class CorpusResult:
    """What a run did.

    Attributes:
        output: folder or file of the results, or their URL.
        files: inputs altogether.
        extracted: inputs computed by this run.
        there: inputs whose results were there already.
        failures: inputs that gave nothing.
        seconds: of sound, computed by this run.
        elapsed: seconds that the run took.
        report: the file that lists the failures; None if there are none.
    """

    output: Path | str
    files: int
    extracted: int
    there: int
    failures: tuple[Failure, ...]
    seconds: float
    elapsed: float
    report: Path | str | None


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
    progress: Callable[[Progress], None] | None = None,
) -> CorpusResult:
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
        layers: names, or Torch7's module numbers; by default pool5, or with 5 layers conv4.
        pool: "none", or over time "mean", "max", or "mean+std" (both, one after the other;
            population std).
        tr: instead of the network's frames, a row for every so many seconds; see
            `soundnet_port.inference.alignment.align`.
        align: of such rows, "center" or "end".
        edge_frames: whether edge frames (see `SoundNet.edge_frames`) are part of what is pooled and of rows
            on a clock. Files with all frames say how many of the last ones are edge frames.
        format: "npz", "npy", "h5", "csv", "mat", "parquet" or "torch7"; by default the output's
            suffix, or npz.
        workers: processes; by default as many as there are CPUs for this one. 1 computes in this
            process. With a model on a GPU they are threads that decode.
        decoder: of sound files, see `load_audio`.
        batch_seconds: how much sound is computed at once; by default 95 s.
        root: a folder that the names of results are relative to; by default each input folder.
        force: starts anew where there are results.
        progress: called in this process whenever an input is through, or a block of a long one.

    More than one worker need a script that can be imported, with its work under
    `if __name__ == "__main__":`.

    Raises:
        CorpusError: settings that cannot work, results of other settings at the same place, two
            inputs of the same name, a package that is not installed, results that cannot be written.
        WeightsError: no such weights.
    """
    a_folder = os.fspath(output).endswith(("/", os.sep))
    output = Path(output).expanduser()
    named = None if a_folder or output.is_dir() else format_of(output.name)
    if not (a_folder or named or format or output.exists()) and output.suffix:
        known = ", ".join(f".{name}" for name in FORMATS if FORMATS[name].merge)
        raise CorpusError(
            f"{output}: no format has this suffix; take {known}, or name a folder with a slash at its end"
        )
    form = format or named or "npz"
    block = check_settings(form, named, output, pool, decoder, workers, batch_seconds)
    if not isinstance(model, SoundNet):
        model = load_pretrained(model)
    layers = [model.architecture.default_layer] if layers is None else layers
    model, contents = resolve_model(model, layers, form, pool, decoder, block, tr, align, edge_frames)
    if named and FORMATS[form].one_layer and len(contents.widths) > 1:
        raise CorpusError(f"{output}: {form} holds one layer; name a folder, or another format")
    with contextlib.ExitStack() as stack:
        found, failures = list_inputs(inputs, root, stack)
        return extract_inputs(
            model,
            found,
            failures,
            output,
            layers,
            contents,
            form,
            in_one=named is not None,
            workers=workers,
            decoder=decoder,
            block=block,
            force=force,
            progress=progress,
        )


def extract_inputs(
    model: SoundNet,
    found: Sequence[Input],
    failures: Sequence[Failure],
    output: Path,
    layers: Sequence[str | int],
    contents: Contents,
    form: str,
    *,
    in_one: bool,
    workers: int | None,
    decoder: str,
    block: int = BLOCK,
    force: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> CorpusResult:
    """As `extract_corpus`, for inputs that are looked up and settings that are checked."""
    begun = time.monotonic()
    folder = output.with_name(f"{output.name}.parts") if in_one else output
    with output_lock(folder, output, CorpusError, exclusive=force or in_one) as staging:
        job = Job(tuple(layers), contents, form, decoder, block, folder, staging, in_one)
        check_names(job, found)
        run = _Run(job, output, group_inputs(found), failures, progress or (lambda _: None))
        if not run.finished_before(force):
            run.compute(model, workers)
        return run.summary(time.monotonic() - begun)


# ---- the inputs


def list_inputs(
    inputs: Sequence[str | os.PathLike[str]],
    root: str | os.PathLike[str] | None,
    stack: contextlib.ExitStack,
    kind: str = "sound",
    suffixes: Collection[str] = SUFFIXES,
) -> tuple[list[Input], list[Failure]]:
    """The inputs, in the order of their names' bytes; a file that is named twice counts once."""
    searched = [inputs] if isinstance(inputs, (str, os.PathLike)) else inputs
    folders = [absolute_path(each) for each in searched if os.path.isdir(each)]  # noqa: PTH112
    found: dict[str, Input] = {}
    failures: list[Failure] = []
    for each in find_sounds(searched, kind, suffixes):
        if isinstance(each, Failure):
            failures.append(each)
            continue
        path, folder = str(each[0]), each[1]
        if path == STDIN:  # workers cannot read it, and decoders seek
            copy = stack.enter_context(tempfile.NamedTemporaryFile())  # noqa: SIM115
            shutil.copyfileobj(sys.stdin.buffer, copy)
            copy.flush()
            found[path] = Input("stdin", path, copy.name, copy.tell())
            continue
        whole = absolute_path(path)
        if whole in found:
            continue
        above = [absolute_path(root)] if root is not None else [absolute_path(folder)] if folder else folders
        inside = max((each for each in above if whole.startswith(each.rstrip(os.sep) + os.sep)), default="")
        if root is not None and not inside:
            raise CorpusError(f"{path}: not inside {os.fspath(root)}, which names are to be relative to")
        name = os.path.relpath(whole, inside) if inside else Path(whole).name
        try:
            size = os.stat(whole).st_size  # noqa: PTH116
        except (OSError, ValueError):  # reading it will say why
            size = 0
        found[whole] = Input(name.replace(os.sep, "/"), path, path, size)
    if not found and not failures:
        raise CorpusError("no inputs")
    return sorted(found.values(), key=lambda each: os.fsencode(each.name)), failures


def group_inputs(inputs: Sequence[Input]) -> list[Group]:
    """Consecutive inputs; nothing but their names and sizes decides."""
    groups: list[Group] = []
    held: list[Input] = []
    size = 0
    for number, each in enumerate(inputs, 1):
        held.append(each)
        size += each.bytes
        if len(held) == GROUP_FILES or size >= GROUP_BYTES or number == len(inputs):
            groups.append(Group(len(groups), tuple(held), size))
            held, size = [], 0
    return groups


def inputs_digest(groups: Sequence[Group]) -> dict[str, Any]:
    """Which inputs these are, for the settings of results that depend on all of them."""
    inputs = [each for group in groups for each in group.inputs]
    listed = hashlib.sha256()
    for each in inputs:
        listed.update(f"{each.bytes} ".encode() + os.fsencode(each.name) + b"\0")
        if each.path == STDIN:  # has the same name each time
            listed.update(Path(each.file).read_bytes())
    return {"inputs": len(inputs), "inputs_sha256": listed.hexdigest()}


# ---- the settings


def check_settings(
    form: str,
    named: str | None,
    output: Path,
    pool: str,
    decoder: str,
    workers: int | None,
    batch_seconds: float | None,
) -> int:
    """Refuses settings that cannot work; returns how many samples are computed at once."""
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
    if batch_seconds is not None and not 1 <= batch_seconds <= 3600:
        raise CorpusError(f"batch seconds must be 1 to 3600, not {batch_seconds:g}")
    missing = FORMATS[form].missing()
    if missing:
        raise CorpusError(f"the format {form}: {missing}")
    return BLOCK if batch_seconds is None else round(batch_seconds * SAMPLE_RATE)


def resolve_model(
    model: SoundNet | str | os.PathLike[str],
    layers: Sequence[str | int],
    form: str,
    pool: str,
    decoder: str,
    block: int,
    tr: float | None = None,
    align: str = "center",
    edge_frames: bool = False,
) -> tuple[SoundNet, Contents]:
    """The network, and what will be in the files."""
    if not isinstance(model, SoundNet):
        model = load_pretrained(model)
    wanted = _wanted(model.architecture, layers, form)
    contents = _contents(model, wanted, pool, decoder, block)
    if tr is not None:
        contents = _clocked(contents, wanted, form, tr, align)
    if contents.edge_layers and not contents.all_frames:
        metadata = {**contents.metadata, "edge_frames": edge_frames}
        contents = replace(contents, metadata=metadata, edge_frames=edge_frames)
    return model, contents


def _clocked(contents: Contents, wanted: Mapping[str, Layer], form: str, tr: float, align: str) -> Contents:
    """With rows on a clock instead of the network's frames."""
    try:
        check_clock(tr, align)
    except ValueError as error:
        raise CorpusError(str(error)) from None
    if contents.pool != "none":
        raise CorpusError("rows on a clock are means over time already; leave the pooling out")
    if form == "torch7":
        raise CorpusError("torch7 holds the network's own frames; for rows on a clock choose another format")
    metadata = {
        "axes": "periods, channels",
        "tr": tr,
        "align": align,
        "receptive_field_seconds": {
            key: round(layer.receptive_field / SAMPLE_RATE, 6) for key, layer in wanted.items()
        },
    }
    return replace(contents, metadata={**contents.metadata, **metadata}, clock=(tr, align))


def _wanted(architecture: Architecture, layers: Sequence[str | int], form: str) -> dict[str, Layer]:
    """The layers, under the names that they have in results."""
    if isinstance(layers, (str, int)) or not layers:
        raise CorpusError(f"layers must be a list, such as ['pool5'], not {layers!r}")
    wanted = {}
    for key in layers:
        layer = find_layer(architecture, key)
        if form == "torch7" and layer.kind == "head":
            raise CorpusError("torch7 holds modules of the trunk; for the heads choose another format")
        wanted[result_key(key)] = layer
    return wanted


def find_layer(architecture: Architecture, key: str | int) -> Layer:
    """Raises a CorpusError if there is no such layer."""
    try:
        return architecture.layer(key)
    except ValueError as error:
        raise CorpusError(f"layers: {error}") from None


def _contents(model: SoundNet, wanted: Mapping[str, Layer], pool: str, decoder: str, block: int) -> Contents:
    parameter = next(model.parameters())
    return Contents(
        {key: layer.channels * (2 if pool == "mean+std" else 1) for key, layer in wanted.items()},
        pool,
        {
            "version": __version__,
            "architecture": model.architecture.name,
            "weights": checksum(cpu_state_dict(model)),
            "layers": list(wanted),
            "modules": {key: layer.module for key, layer in wanted.items()},
            "pool": pool,
            "axes": "frames, channels" if pool == "none" else "channels",
            "sample_rate": SAMPLE_RATE,
            "decoder": decoder,
            "device": parameter.device.type,
            "dtype": str(parameter.dtype).removeprefix("torch."),  # the network's; features are float32
            "batch_seconds": round(block / SAMPLE_RATE, 3),
        },
        edge_layers=tuple(key for key, layer in wanted.items() if model.architecture.has_edge_frames(layer)),
    )


def check_names(job: Job, inputs: Sequence[Input]) -> None:
    taken: dict[str, Input] = {}
    # `.extract` is there by now
    one_case = not job.in_one and os.path.exists(f"{job.folder}/.EXTRACT")  # noqa: PTH110
    for each in inputs:
        for result in [job.form.key(each.text)] if job.in_one else job.files(each):
            other = taken.setdefault(result.casefold() if one_case else result, each)
            if other is not each:
                raise CorpusError(
                    f"{other.path} and {each.path} would both become {result}; "
                    "name a folder that holds both, or give one with --root"
                )


def check_same(record: Mapping[str, Any], settings: Mapping[str, Any], place: object) -> None:
    """Refuses a place whose results have other settings."""
    differences = _differences(record, settings)
    if differences:
        raise CorpusError(
            f"{place}: was made with other settings ({'; '.join(differences)}); "
            "choose another place, or --force starts anew"
        )


def _differences(record: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    def shown(value: object) -> str:
        if value is None:
            return "none"
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    return [
        f"{key.replace('_', ' ')}: {shown(record.get(key))} there, {shown(settings.get(key))} now"
        for key in {**settings, **record}
        if key not in ("version", "modules", "axes") and record.get(key) != settings.get(key)
    ]


# ---- a run


class _Run:
    """The groups that are to be computed, what came of them, and where that is written down."""

    def __init__(
        self,
        job: Job,
        output: Path,
        groups: Sequence[Group],
        failures: Sequence[Failure],
        progress: Callable[[Progress], None],
    ) -> None:
        self.job, self.output, self.groups, self.progress = job, output, groups, progress
        self.failures = {failure.path: failure for failure in failures}
        self.total = sum(len(group.inputs) for group in groups)
        self.extracted = self.there = self.bad = 0
        self.seconds = 0.0
        self.underway: dict[int, float] = {}  # seconds of a long sound, by its group
        self.record = job.folder / "extract.json"
        self.sidecar = output.with_name(f"{output.name}.json")  # of a finished output in one file
        self.report = output.with_name(f"{output.name}.errors.tsv") if job.in_one else output / "errors.tsv"
        self.settings: dict[str, Any] = {**job.contents.metadata, "format": job.format}
        if job.in_one:
            self.settings |= inputs_digest(groups)

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
            for each in (each for group in self.groups for each in group.inputs if each.path == STDIN):
                for file in filter(os.path.exists, self.job.files(each)):
                    raise CorpusError(
                        f"{file}: is there already, perhaps of another sound on standard input; "
                        "choose another folder, or --force replaces it"
                    )
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
            self.failures |= {failure.path: failure for failure in read_failures(self.report)}
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
        check_same(record, self.settings, place)

    def _differences(self, record: Mapping[str, Any]) -> list[str]:
        return _differences(record, self.settings)

    def _write_record(self, path: Path) -> None:
        with atomic_write(path, self.job.staging) as aside:
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
                    self.underway.pop(group.number, None)
                    if through is not None and through.number not in known:
                        if through.done:
                            known.add(through.number)
                            self._count(group.inputs[through.number], through)
                        else:
                            self.underway[group.number] = through.seconds
                            self._tell(None)
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
        self, model: SoundNet, todo: Sequence[Group], workers: int | None
    ) -> Generator[tuple[Group, InputResult | None], None, None]:
        on_cpu = next(model.parameters()).device.type == "cpu"
        count = workers or available_cpus()
        if on_cpu and count > 1 and not (workers is None and len(todo) == 1):
            return run_in_workers(self.job, model, todo, count)
        return run_in_process(Extractor(self.job, model), todo, 0 if on_cpu else count)

    def _complete(self, group: Group) -> None:
        """A group of an earlier run; of a part, the bad files are written down."""
        failures = read_failures(self.job.failures(group)) if self.job.in_one else []
        self.failures |= {failure.path: failure for failure in failures}
        self.bad += len(failures)
        self.there += len(group.inputs) - len(failures)

    def _count(self, each: Input, through: InputResult) -> None:
        failure = None
        if through.reason is None:
            self.extracted += 1
            self.seconds += through.seconds
        else:
            self.bad += 1
            failure = self.failures[each.path] = Failure(each.path, through.reason)
        self._tell(failure)

    def _tell(self, failure: Failure | None) -> None:
        through = self.there + self.extracted + self.bad
        seconds = self.seconds + sum(self.underway.values())
        self.progress(Progress(through, self.total, seconds, failure))

    def _merge(self) -> None:
        job = self.job
        if not self.there + self.extracted:  # nothing but bad files: no output, nor anything that says so
            return
        assert job.form.merge is not None
        parts = [job.part(group) for group in self.groups]
        needed, free = sum(part.stat().st_size for part in parts), shutil.disk_usage(job.folder).free
        if free < needed:
            raise CorpusError(
                format_write_error(self.output, f"{needed:,} bytes are needed, {free:,} are free")
            )
        try:
            with atomic_write(self.output, job.staging) as aside:
                job.form.merge(aside, parts, job.contents)
            self._write_record(self.sidecar)
        except (OSError, RuntimeError) as error:
            raise CorpusError(format_write_error(self.output, error)) from None

    def _write_report(self) -> None:
        """The failures, and in a folder those of other runs' inputs, as long as they are there."""
        failures = list(self.failures.values())
        if not self.job.in_one and self.report.exists():
            paths = {each.path for group in self.groups for each in group.inputs}
            failures += [
                earlier
                for earlier in read_failures(self.report)
                if earlier.path not in self.failures
                and earlier.path not in paths
                and os.path.isfile(earlier.path)  # noqa: PTH113
            ]
        if failures:
            with atomic_write(self.report, self.job.staging) as aside:
                write_failures(aside, sorted(failures, key=lambda each: os.fsencode(each.path)))
        else:
            self.report.unlink(missing_ok=True)

    def summary(self, elapsed: float) -> CorpusResult:
        """What came of it."""
        failures = tuple(self.failures.values())
        report = self.report if failures else None
        return CorpusResult(
            self.output, self.total, self.extracted, self.there, failures, self.seconds, elapsed, report
        )


# ---- files


def available_cpus() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
