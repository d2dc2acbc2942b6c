"""Features of corpora over a cluster, on Ray Data (extra `[ray]`): from and to any place that fsspec reaches.

Groups of inputs are those of the local run (see corpus.py), and so are the numbers. Tasks decode a group;
actors, which hold the network, compute it and put it in its place as one Parquet file, named by the group's
number. Ray shares the work out, holds decoding back where the network is behind, and repeats what was lost
with a process or a machine. A group that is computed twice gives the same file twice, and no file appears
before it is complete, so it does not matter when something dies.

Names that begin with "_" or "." are passed over by readers of folders of Parquet files.
"""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import os
import re
import secrets
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from soundnet_port.audio.finding import STDIN, Failure, absolute_path, has_sound_suffix, parse_path_list
from soundnet_port.audio.loading import read_blocks
from soundnet_port.corpus.extractor import (
    CorpusError,
    Extractor,
    Group,
    Input,
    InputError,
    Job,
    Loaded,
    OutputError,
    describe_error,
    deserialize_model,
    format_write_error,
    serialize_model,
)
from soundnet_port.corpus.formats import failures_as_bytes, failures_from_bytes
from soundnet_port.corpus.run import (
    CorpusResult,
    Progress,
    available_cpus,
    check_names,
    check_same,
    check_settings,
    group_inputs,
    inputs_digest,
    list_inputs,
    resolve_model,
)
from soundnet_port.errors import MissingExtraError
from soundnet_port.files import atomic_write
from soundnet_port.network.model import SoundNet
from soundnet_port.pretrained import load_pretrained

try:
    import fsspec
    import ray
    import ray.data
    from fsspec.implementations.local import LocalFileSystem
except ImportError:
    raise MissingExtraError("Ray", "ray") from None

RECORD, REPORT = "_extract.json", "_errors.tsv"
_RETRIES = 3  # of a group whose process dies: a file may be what kills it
_LOOKING = 32  # threads that look at inputs which are named one by one
# a put is all or nothing there, and renaming is copying
_OBJECT_STORES = frozenset("s3 s3a gs gcs az abfs abfss adl oss r2".split())
_OURS = re.compile(r"(\d{6,})\.parquet|_\d{6,}\.tsv|_extract\.json|_errors\.tsv")


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
    progress: Callable[[Progress], None] | None = None,
) -> CorpusResult:
    """As `extract_corpus`, on a Ray cluster; the extra `[ray]` has to be there, on its machines too.

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
        workers: processes that hold the network; by default as many as Ray finds CPUs for, but one,
            which is left for decoding.
        decoder: of sound files, see `load_audio`.
        batch_seconds: how much sound is computed at once; by default 95 s.
        root: a folder or URL that the names of inputs are relative to; by default each input folder.
        edge_frames: as for `extract_corpus`.
        force: starts anew where there are results.
        progress: called whenever a group of inputs is through.

    Raises:
        CorpusError: as `extract_corpus`; Ray cannot be reached.
        WeightsError: no such weights.
    """
    begun = time.monotonic()
    output = os.fspath(output)
    block = check_settings("parquet", None, Path(output), pool, decoder, workers, batch_seconds)
    if not isinstance(model, SoundNet):
        model = load_pretrained(model)
    layers = [model.architecture.default_layer] if layers is None else layers
    model, contents = resolve_model(model, layers, "parquet", pool, decoder, block, edge_frames=edge_frames)
    if next(model.parameters()).device.type != "cpu":
        raise CorpusError("on a cluster the network is computed on CPUs")
    place = _Place(output)
    if "memory" in _protocols(place.reached()[0]):
        raise CorpusError(f"{output}: is in this process's memory, which others do not see")
    found, bad = _found(inputs, root)
    job = Job(tuple(layers), contents, "parquet", decoder, block, Path(), Path(), True)
    check_names(job, found)
    groups = group_inputs(found)
    failures = {failure.path: failure for failure in bad}
    total, extracted, there, seconds = len(found), 0, 0, 0.0
    try:
        complete, earlier = place.cleared(
            {**contents.metadata, "format": "parquet", **inputs_digest(groups)}, force
        )
        todo = {group.number: group for group in groups if group.number not in complete}
        failures |= {failure.path: failure for failure in earlier}
        there = sum(len(group.inputs) for group in groups if group.number in complete) - len(earlier)
        done = total - sum(len(group.inputs) for group in todo.values())
        tell = progress or (lambda _: None)
        tell(Progress(done, total, seconds))
        for result in _computed(job, model, list(todo.values()), place, workers) if todo else ():
            group = todo.pop(result["number"])
            lost = result["failures"]
            extracted += len(group.inputs) - len(lost)
            seconds += result["seconds"]
            done += len(group.inputs)
            failures |= {failure.path: failure for failure in lost}
            for failure in lost or [None]:
                tell(Progress(done, total, seconds, failure))
        for each in (each for group in todo.values() for each in group.inputs):
            reason = "its group was given up, the process died each time; Ray's logs say more"
            failures[each.path] = Failure(each.path, reason)
            tell(Progress(total, total, seconds, failures[each.path]))
        place.report(list(failures.values()))
    except OSError as error:
        raise CorpusError(format_write_error(output, error)) from None
    return CorpusResult(
        output,
        total,
        extracted,
        there,
        tuple(failures.values()),
        seconds,
        time.monotonic() - begun,
        place.url_of(REPORT) if failures else None,
    )


# ---- the inputs


def _found(
    inputs: Sequence[str | os.PathLike[str]], root: str | os.PathLike[str] | None
) -> tuple[list[Input], list[Failure]]:
    """The inputs as `list_inputs` has them, and those behind URLs."""
    arguments: list[str] = []
    failures: list[Failure] = []
    for argument in [os.fspath(each) for each in inputs]:
        if argument.startswith("@") and not os.path.exists(argument):  # noqa: PTH110
            try:
                arguments += parse_path_list(_listed(argument[1:]))
            except OSError as error:
                failures.append(Failure(argument[1:], error.strerror or str(error)))
        else:
            arguments.append(argument)
    if STDIN in arguments:
        raise CorpusError("a sound on standard input is for the local engine: machines cannot share it")
    urls = [argument for argument in arguments if "://" in argument]
    local = [argument for argument in arguments if "://" not in argument]
    found: dict[str, Input] = {}
    if local or not (urls or failures):
        with contextlib.ExitStack() as stack:
            named, more = list_inputs(local, root if urls == [] else None, stack)
            found |= {each.file: replace(each, file=absolute_path(each.file)) for each in named}
            failures += more
    with ThreadPoolExecutor(_LOOKING) as threads:
        above = None if root is None else os.fspath(root)
        for each in threads.map(lambda url: _behind(url, above), urls):
            found |= {each.file: each for each in each if isinstance(each, Input)}
            failures += [each for each in each if isinstance(each, Failure)]
    return sorted(found.values(), key=lambda each: os.fsencode(each.name)), failures


def _listed(name: str) -> bytes:
    if "://" not in name:
        return sys.stdin.buffer.read() if name == STDIN else Path(name).read_bytes()
    files, path = _reached(name)
    content: bytes = files.cat_file(path)
    return content


def _reached(url: str) -> tuple[Any, str]:
    """The file system of a URL or path, and the path there."""
    try:
        files, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # "Install s3fs to access S3"
        raise CorpusError(f"{url}: {error}") from None
    return files, path.rstrip("/") or path


def _behind(url: str, root: str | None) -> list[Input | Failure]:
    """The sound files at a URL."""
    files, path = _reached(url)
    try:
        if glob.has_magic(path):
            found = [each for each in files.glob(path, detail=True).values() if each["type"] == "file"]
            fixed = re.split(r"[*?\[]", path, maxsplit=1)[0].rpartition("/")[0]
        else:
            found = [files.info(path)]
            fixed = path.rpartition("/")[0]
            if found[0]["type"] == "directory":
                below, fixed = files.find(path, detail=True).values(), path
                found = [each for each in below if has_sound_suffix(PurePosixPath(each["name"]).name)]
    except Exception as error:  # whatever the store's package raises
        return [Failure(url, describe_error(error, Input("", url, url, 0)))]
    if not found:
        return [Failure(url, "no sound files there")]
    if root is not None:
        fixed = _reached(root)[1]
    inputs: list[Input | Failure] = []
    for each in found:
        name, whole = each["name"], files.unstrip_protocol(each["name"])
        if not name.startswith(fixed.rstrip("/") + "/"):
            raise CorpusError(f"{whole}: not inside {root}, which names are to be relative to")
        file = name if isinstance(files, LocalFileSystem) else whole
        inputs.append(Input(name[len(fixed.rstrip("/")) + 1 :], whole, file, int(each["size"] or 0)))
    return inputs


@contextlib.contextmanager
def _at_hand(each: Input) -> Iterator[Input]:
    """The input as a file on this machine. Decoders seek, so what is elsewhere is copied."""
    if "://" not in each.file:
        yield each
        return
    with tempfile.TemporaryDirectory() as folder:
        files, path = _reached(each.file)
        copy = Path(folder, f"sound{PurePosixPath(path).suffix}")
        files.get_file(path, str(copy))
        near = replace(each, file=str(copy))
        try:
            yield near
        except InputError:
            raise
        except Exception as error:
            raise InputError(describe_error(error, near)) from None


# ---- the place of the results


@dataclass(frozen=True)
class _Place:
    """A folder, here or elsewhere, in which files appear whole."""

    url: str

    def reached(self) -> tuple[Any, str]:
        return _reached(self.url)

    def url_of(self, name: str) -> str:
        return f"{self.url.rstrip('/')}/{name}"

    def names(self) -> set[str]:
        files, root = self.reached()
        files.invalidate_cache()
        try:
            return {PurePosixPath(each).name for each in files.ls(root, detail=False)}
        except FileNotFoundError:
            return set()

    def read(self, name: str) -> bytes:
        files, root = self.reached()
        content: bytes = files.cat_file(f"{root}/{name}")
        return content

    def put(self, name: str, content: bytes) -> None:
        files, root = self.reached()
        if _protocols(files) & _OBJECT_STORES:
            files.pipe_file(f"{root}/{name}", content)
            return
        files.makedirs(f"{root}/.extract", exist_ok=True)
        if isinstance(files, LocalFileSystem):
            with atomic_write(Path(root, name), Path(root, ".extract")) as aside:
                aside.write_bytes(content)
            return
        aside_there = f"{root}/.extract/{secrets.token_hex(8)}"
        files.pipe_file(aside_there, content)
        files.mv(aside_there, f"{root}/{name}")

    def remove(self, names: Sequence[str]) -> None:
        files, root = self.reached()
        for name in names:
            files.rm(f"{root}/{name}", recursive=name == ".extract")

    def cleared(self, settings: Mapping[str, Any], force: bool) -> tuple[set[int], list[Failure]]:
        """The groups that are there already, and their bad files; refuses other settings."""
        names = self.names()
        ours = sorted(filter(_OURS.fullmatch, names))
        self.remove([".extract"] if ".extract" in names else [])  # what killed runs left
        if force:  # the record first: without it, what is left is refused
            self.remove(sorted(ours, key=lambda name: name != RECORD))
        elif RECORD in names:
            try:
                record = dict(json.loads(self.read(RECORD)))
            except ValueError:
                raise CorpusError(f"{self.url_of(RECORD)}: damaged; --force starts anew") from None
            check_same(record, settings, self.url)
            done = {int(found[1]) for found in map(_OURS.fullmatch, ours) if found and found[1]}
            reports = [f"_{number:06}.tsv" for number in sorted(done) if f"_{number:06}.tsv" in names]
            return done, [failure for name in reports for failure in failures_from_bytes(self.read(name))]
        elif any(name.endswith(".parquet") for name in names):
            raise CorpusError(
                f"{self.url}: holds Parquet files, but not {RECORD}, which would say how they were made; "
                "choose another place"
            )
        text = json.dumps(dict(settings), indent=2, sort_keys=True) + "\n"
        self.put(RECORD, text.encode())
        return set(), []

    def report(self, failures: Sequence[Failure]) -> None:
        """Writes the bad files down, and clears up."""
        names = self.names()
        if failures:
            self.put(REPORT, failures_as_bytes(sorted(failures, key=lambda each: os.fsencode(each.path))))
        elif REPORT in names:
            self.remove([REPORT])
        if ".extract" in self.names():
            self.remove([".extract"])


def _protocols(files: Any) -> set[str]:
    return {files.protocol} if isinstance(files.protocol, str) else set(files.protocol)


# ---- the stages


def _computed(
    job: Job, model: SoundNet, groups: Sequence[Group], place: _Place, workers: int | None
) -> Iterator[dict[str, Any]]:
    """What comes of each group, as it comes; nothing of a group whose process died again and again."""
    with _connected(workers):
        free = int(ray.cluster_resources().get("CPU", 0)) - 1  # one decodes
        if (workers or 1) > free:
            raise CorpusError(
                f"Ray has {free + 1} CPUs, but {workers or 1} workers and decoding need {(workers or 1) + 1}"
            )
        try:
            for result in _results(job, model, groups, place, workers, free):
                if "stopped" in result:
                    raise CorpusError(result["stopped"])
                result["failures"] = [Failure(*each) for each in result["failures"]]
                yield result
        except CorpusError:
            raise
        except Exception as error:  # Ray's own, and what its workers raised
            lines = str(error).strip().splitlines() or [""]  # the last one comes after the traces
            raise CorpusError(f"Ray: {type(error).__name__}: {' '.join(lines[-1].split())}") from None


def _results(
    job: Job, model: SoundNet, groups: Sequence[Group], place: _Place, workers: int | None, free: int
) -> Iterator[dict[str, Any]]:
    rows = [{"group": _as_json(group)} for group in groups]
    data = ray.data.from_items(rows, override_num_blocks=len(rows))  # a group is a task
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # retries have no other place yet
        data = data.map(_decode, fn_args=[job.decoder, job.block], num_cpus=1, max_retries=_RETRIES)
        data = data.map(
            _Network,
            fn_constructor_args=[job, ray.put(serialize_model(model)), place],
            compute=ray.data.ActorPoolStrategy(
                min_size=min(workers or 1, len(rows)), max_size=min(workers or free, len(rows))
            ),
            num_cpus=1,
            max_task_retries=_RETRIES,
        )
    data.context.enable_progress_bars = data.context.print_on_execution_start = False
    data.context.max_errored_blocks = -1  # goes on past a group that is given up
    for row in data.iter_rows():
        yield json.loads(row["result"])


@contextlib.contextmanager
def _connected(workers: int | None) -> Iterator[None]:
    """Within, Ray is there."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray's own, of settings to come
            if os.environ.get("RAY_ADDRESS"):
                ray.init(log_to_driver=False, logging_level=logging.ERROR)
            else:
                with _listening_here():
                    ray.init(
                        "local",
                        num_cpus=max(2, available_cpus(), (workers or 1) + 1),
                        include_dashboard=False,
                        log_to_driver=False,
                        logging_level=logging.ERROR,
                        _node_ip_address="127.0.0.1",
                    )
    except Exception as error:  # plain ones too, such as when it takes too long to start
        raise CorpusError(f"Ray cannot be reached: {' '.join(str(error).split())}") from None
    try:
        addresses = {node["NodeManagerAddress"] for node in ray.nodes()}
        if not os.environ.get("RAY_ADDRESS") and not addresses <= {"127.0.0.1", "::1"}:
            raise CorpusError(
                f"this version of Ray listens to other machines ({', '.join(addresses)}); "
                "start one as you want it, and set RAY_ADDRESS"
            )
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _listening_here() -> Iterator[None]:
    """Within, a Ray that is started listens on the loopback address only, as it does on a Mac.

    On Linux no public setting does that. If this one goes, `_connected` will notice.
    """
    constants: Any = getattr(getattr(ray, "_private", None), "ray_constants", None)
    before = getattr(constants, "ENABLE_RAY_CLUSTER", None)
    if before is None:
        yield
        return
    constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before


def _as_json(group: Group) -> str:
    return json.dumps(asdict(group))  # escapes what is no text in names


def _from_json(text: str) -> Group:
    group = json.loads(text)
    return Group(group["number"], tuple(Input(**each) for each in group["inputs"]), group["bytes"])


def _decode(row: Mapping[str, Any], decoder: str, block: int) -> dict[str, Any]:
    """A group's waveforms, one after the other, and for each input how many samples it has there.

    In the place of that number is the reason of a bad file, or None for a sound longer than a block:
    it is left to the actor, which reads it block by block.
    """
    waves, heard = [np.empty(0, np.float32)], []
    for each in _from_json(row["group"]).inputs:
        samples: int | str | None
        try:
            with _at_hand(each) as near:
                blocks = read_blocks(near.file, decoder=decoder, samples=block)
                wave, samples = next(blocks).numpy(), None
                if next(blocks, None) is None:
                    waves.append(wave)
                    samples = len(wave)
        except InputError as error:
            samples = str(error)
        except Exception as error:  # decoders and stores may raise anything
            samples = describe_error(error, each)
        heard.append(samples)
    return {"group": row["group"], "heard": json.dumps(heard), "samples": np.concatenate(waves)}


class _Network:
    """An actor: holds the network, computes groups and puts them in their place."""

    def __init__(self, job: Job, network: Any, place: _Place) -> None:
        torch.set_num_threads(1)
        self.extractor, self.place = Extractor(job, deserialize_model(ray.get(network))), place

    def __call__(self, row: Mapping[str, Any]) -> dict[str, str]:
        group, extractor = _from_json(row["group"]), self.extractor
        heard, waves, at = dict(zip(group.inputs, json.loads(row["heard"]), strict=True)), {}, 0
        for each, samples in heard.items():
            if isinstance(samples, int):
                waves[each] = row["samples"][at : at + samples]
                at += samples
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as copies:
            extractor.job = job = replace(extractor.job, folder=Path(folder), staging=Path(folder))

            def load(each: Input) -> Loaded:
                if isinstance(heard[each], str):
                    raise InputError(heard[each])
                try:
                    if each not in waves:
                        return extractor.load(copies.enter_context(_at_hand(each)))
                    extractor.long_enough(len(waves[each]))
                except InputError:
                    raise
                except Exception as error:
                    raise InputError(describe_error(error, each)) from None
                return Loaded(torch.from_numpy(waves[each].copy()), None)

            try:
                through = [each for each in extractor.group(group, {}, load) if each.done]
                failed = [
                    Failure(group.inputs[each.number].path, each.reason) for each in through if each.reason
                ]
                report = f"_{group.number:06}.tsv"
                if failed:  # first, so that it is there when the group is
                    self.place.put(report, failures_as_bytes(failed))
                else:  # of a process that died, and could not read a file that now can be read
                    with contextlib.suppress(FileNotFoundError):
                        self.place.remove([report])
                self.place.put(f"{group.number:06}.parquet", job.part(group).read_bytes())
            except OutputError as stop:
                return {"result": json.dumps({"stopped": str(stop)})}
            except OSError as error:
                return {"result": json.dumps({"stopped": format_write_error(self.place.url, error)})}
        seconds = sum(each.seconds for each in through)
        failures = [[failure.path, failure.reason] for failure in failed]
        return {"result": json.dumps({"number": group.number, "seconds": seconds, "failures": failures})}
