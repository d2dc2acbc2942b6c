"""Training data from videos: what image classifiers see is what SoundNet is to hear.

The paper's teachers are networks that name objects and scenes in images. Every 5 s of a video gives
one frame, and a teacher's probabilities for it are the labels of these 5 s of sound. Any image
classifier that Hugging Face's `transformers` loads can be a teacher.

A folder of teaching holds

    manifest.tsv          a video a row: `sound` (its path), and a column for every teacher
    objects.categories.txt    the names of a head's categories, in the order of the probabilities
    teachers.json         which models the teachers are, with checksums
    errors.tsv            videos that gave nothing, and why
    objects/a.mp4.npy     (steps, categories), float32; step k is of the seconds 5k to 5k + 5

as `soundnet_port.learning.training` reads it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from soundnet_port.audio.finding import STDIN, Failure
from soundnet_port.corpus.extractor import CorpusError, Input, format_write_error
from soundnet_port.corpus.formats import write_failures
from soundnet_port.corpus.run import CorpusResult, Progress, available_cpus, list_inputs
from soundnet_port.errors import MissingExtraError, SoundNetError
from soundnet_port.files import atomic_write, exclusive_lock
from soundnet_port.learning.distillation_data import HEADS, head_of
from soundnet_port.network.weights import checksum

try:
    import av
    from PIL import Image
except ImportError as error:
    raise MissingExtraError(str(error.name), "videos") from None

STEP = 5.0  # seconds of sound that a frame of the video labels, as in the paper

# What a directory is searched for; a file named outright may have any name.
SUFFIXES = frozenset(
    ".mp4 .m4v .mov .webm .mkv .avi .flv .wmv .mpg .mpeg .ts .mts .m2ts .3gp .ogv .vob".split()
)

_ROUNDING = 1e-6  # seconds; a frame whose time is the middle of a step is the one that is shown there
_PATIENCE = 0.1  # seconds, after which threads look whether they are still wanted


def label_videos(
    videos: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    teachers: Mapping[str, str | os.PathLike[str] | Sequence[str | os.PathLike[str]]],
    *,
    batch: int = 32,
    workers: int | None = None,
    device: str | torch.device = "cpu",
    root: str | os.PathLike[str] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> CorpusResult:
    """Makes training data from videos, with image classifiers as teachers.

    A frame is taken at the middle of every 5 s of the sound, at 2.5 s, 7.5 s and so on: the one that
    a player shows at that time, upright. What was made by an earlier run stays, and a video whose
    results are there is not looked at again.

    Args:
        videos: as on the command line: files, folders to be searched, "@LIST" for a text file with a
            path per line.
        output: a folder; the manifest for training is `manifest.tsv` there.
        teachers: for "objects", "scenes" or both, one model or several: names on the Hugging Face hub, or
            folders. Weights must be safetensors; code that comes with a model is never run.
        batch: frames that go through a teacher at once.
        workers: threads that decode; by default as many as there are CPUs for this process.
        device: of the teachers.
        root: a folder that the names of results are relative to; by default each folder searched.
        progress: called whenever a video is through; its seconds are those that have labels.

    Returns:
        what was done; its output is the manifest

    Raises:
        CorpusError: settings that cannot work, a model that cannot be loaded or is no image
            classifier, results of other teachers in the folder, another run at work there, results that
            cannot be written.
    """
    begun = time.monotonic()
    if batch < 1 or (workers is not None and workers < 1):
        raise CorpusError("batch and workers must be 1 or more")
    folder = Path(output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise CorpusError(f"{folder}: is a file; name a folder for the results")
    named = [videos] if isinstance(videos, (str, os.PathLike)) else videos
    if STDIN in [os.fspath(each) for each in named]:
        raise CorpusError("a video on standard input cannot be trained with later; name a file")
    with contextlib.ExitStack() as stack:
        found, failures = list_inputs(named, root, stack, "video", SUFFIXES)
    _check_names(found)
    loaded = _loaded(teachers, torch.device(device))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(folder, CorpusError):
            run = _Run(folder, loaded, found, failures, progress or (lambda _: None))
            run.compute(batch, workers or available_cpus())
    except OSError as error:
        raise CorpusError(format_write_error(error.filename or folder, error)) from None
    return run.summary(time.monotonic() - begun)


def _check_names(found: Sequence[Input]) -> None:
    for one, other in itertools.pairwise(found):  # they are sorted
        if one.name == other.name:
            raise CorpusError(
                f"{one.path} and {other.path} would both become {one.name}.npy; "
                "name a folder that holds both, or give one with --root"
            )


# ---- frames of a video


class VideoError(SoundNetError):
    """A video that cannot be used, and why."""


class _CannotSeek(Exception):
    """A file that has to be decoded from its beginning."""


def frames(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """The frames that a player shows at the middle of every 5 s of a video's sound, upright.

    A frame is shown from its own time until the next one's. Times count from the beginning of the
    sound, as `load_audio` gives it. The first frame stands for times before it as well.

    Raises:
        VideoError: the file is missing, has no pictures or no sound, is shorter than 2.5 s or cut
            off, or cannot be decoded; what is wrong further on shows when that place is reached.
    """
    given = 0
    try:
        try:
            for image in _frames(path, seeking=True):
                yield image
                given += 1
        except _CannotSeek:
            yield from itertools.islice(_frames(path, seeking=False), given, None)
    except av.FFmpegError as error:
        where = f" after {given * STEP:.0f} s" if given else ""
        raise VideoError(f"{path}: cannot be decoded{where} ({_reason(error)})") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name, what PyAV cannot open
        if isinstance(error, VideoError):
            raise
        raise VideoError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _frames(path: str | os.PathLike[str], *, seeking: bool) -> Iterator[Image.Image]:
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(path, "rb"))
        if not file.read(1):
            raise VideoError(f"{path}: an empty file")
        file.seek(0)
        # a playlist that poses as a video must not open other files or addresses
        container = stack.enter_context(
            av.open(file, "r", options={"protocol_whitelist": "none"}, metadata_errors="replace")
        )
        pictures = [
            each
            for each in container.streams.video
            if not each.disposition & av.stream.Disposition.attached_pic  # the cover of an album
        ]
        if not pictures:
            raise VideoError(f"{path}: has no video stream")
        if not container.streams.audio:
            raise VideoError(f"{path}: has no audio stream")
        stream = pictures[0]
        stream.thread_type = "AUTO"
        # samples before time 0 are the encoder's start, which decoders drop
        begin = max(0.0, _seconds(container.streams.audio[0].start_time, container.streams.audio[0]))
        a_frame = 1 / float(stream.average_rate or 25)
        decoded = _timed(container.decode(stream), begin, a_frame, strict=seeking)
        shown = ahead = next(decoded, None)  # the frame for the time in question, and the one after it
        if ahead is None:
            raise VideoError(f"{path}: has no frames")
        for step in itertools.count():
            middle = begin + (step + 0.5) * STEP + _ROUNDING
            if seeking and step and ahead is not None and ahead.seconds <= middle:
                reached = ahead.seconds
                try:
                    container.seek(int(middle / stream.time_base), stream=stream)
                except av.FFmpegError:
                    raise _CannotSeek from None
                decoded = _timed(container.decode(stream), begin, a_frame, strict=True)
                shown = ahead = next(decoded, None)
                if ahead is None or ahead.seconds > middle:
                    raise _CannotSeek
                # key frames are further apart than steps: to seek would decode the same again
                seeking = ahead.seconds > reached
            while ahead is not None and ahead.seconds <= middle:
                shown, ahead = ahead, next(decoded, None)
            assert shown is not None
            if ahead is None:
                lasts = shown.frame.duration
                end = shown.seconds + (float(lasts * shown.frame.time_base) if lasts else a_frame)
                declared = _seconds(stream.start_time, stream) + _seconds(stream.duration, stream)
                if declared > end + STEP:
                    raise VideoError(
                        f"{path}: cut off or damaged, its pictures end at {end:.1f} s of {declared:.1f} s"
                    )
                if middle >= max(end, declared):
                    if not step:
                        raise VideoError(
                            f"{path}: too short, {max(end, declared) - begin:.2f} s; "
                            f"a frame at {STEP / 2} s is needed"
                        )
                    return
            yield _upright(shown.frame)


@dataclass(frozen=True)
class _Timed:
    frame: Any
    seconds: float


def _timed(decoded: Iterable[Any], begin: float, a_frame: float, *, strict: bool) -> Iterator[_Timed]:
    """Frames with times; where a file has none, each comes a frame's duration after the one before."""
    last = begin - a_frame
    for frame in decoded:
        if frame.pts is None and strict:
            raise _CannotSeek
        last = last + a_frame if frame.pts is None else float(frame.pts * frame.time_base)
        yield _Timed(frame, last)


def _seconds(value: int | None, stream: Any) -> float:
    return 0.0 if value is None else float(value * stream.time_base)


def _upright(frame: Any) -> Image.Image:
    image: Image.Image = frame.to_image()
    # a telephone writes how it was held; counter-clockwise, as in PIL
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


# ---- teachers


@dataclass(frozen=True)
class _Teacher:
    """An image classifier and what comes before it.

    Attributes:
        column: of the manifest: the head, or for a further teacher of it "head:model".
        source: the model's name or folder.
        categories: names, in the order of the probabilities.
        sha256: of its parameters and settings.
    """

    column: str
    source: str
    categories: list[str]
    sha256: str
    model: Any
    processor: Any

    @property
    def head(self) -> str:
        return head_of(self.column)

    def prepared(self, image: Image.Image) -> dict[str, torch.Tensor]:
        """What the classifier takes of an image, with a batch dimension of 1."""
        made = self.processor(images=image, return_tensors="pt")
        return {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}

    def probabilities(self, prepared: Sequence[Mapping[str, torch.Tensor]]) -> NDArray[np.float32]:
        """(images, categories), rows sum to 1."""
        device = self.model.device
        with torch.inference_mode():
            inputs = {name: torch.cat([each[name] for each in prepared]).to(device) for name in prepared[0]}
            rows: NDArray[np.float32] = self.model(**inputs).logits.float().softmax(-1).cpu().numpy()
        if rows.shape != (len(prepared), len(self.categories)) or not np.isfinite(rows).all():
            raise CorpusError(
                f"{self.source}: gives {'x'.join(map(str, rows.shape))} numbers or NaN, not probabilities of "
                f"{len(self.categories)} categories for {len(prepared)} frames; choose another model"
            )
        return rows


# What transformers says at length
_REASONS = {
    "Unrecognized configuration class": "it is a model of another kind",
    "trust_remote_code": "it needs code that comes with it, which is not run",
    "Repo id must be": "there is no such folder, and on the Hugging Face hub names look otherwise",
    "couldn't connect": "not in the cache, and the Hugging Face hub cannot be reached",
    "model.safetensors": "it has no model.safetensors, and pickled weights are not read",
    "preprocessor_config.json": "it has no preprocessor_config.json",
}


def _loaded(
    teachers: Mapping[str, str | os.PathLike[str] | Sequence[str | os.PathLike[str]]], device: torch.device
) -> list[_Teacher]:
    if not teachers:
        raise CorpusError("no teachers; name one such as objects=microsoft/resnet-50")
    loaded: dict[str, _Teacher] = {}
    for head, named in teachers.items():
        if head not in HEADS:
            raise CorpusError(f"unknown head {head!r}; choose from {', '.join(HEADS)}")
        for source in [named] if isinstance(named, (str, os.PathLike)) else named:
            text = os.fspath(source)
            column = head
            if head in loaded:
                column = f"{head}:" + re.sub(r"[^\w.-]", "_", Path(text).name)
            if column in loaded:
                raise CorpusError(f"{text}: two teachers would be called {column}; rename a folder")
            teacher = loaded[column] = _load(column, text, device)
            _check_categories(loaded[head], teacher)
    return list(loaded.values())


def _load(column: str, source: str, device: torch.device) -> _Teacher:
    try:
        from safetensors import SafetensorError
        from transformers import AutoImageProcessor, AutoModelForImageClassification
    except ImportError:
        raise MissingExtraError("transformers", "videos") from None
    try:
        model, loading = AutoModelForImageClassification.from_pretrained(
            source, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
        # through PIL in any case: torchvision, where it is installed, resizes a little differently
        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False, backend="pil")
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        text = " ".join(str(error).split())
        reason = next((short for part, short in _REASONS.items() if part in text), text)
        raise CorpusError(f"{source}: cannot be loaded as an image classifier: {reason}") from None
    if loading["missing_keys"]:  # transformers would go on with random numbers
        missing = ", ".join(sorted(loading["missing_keys"]))
        raise CorpusError(f"{source}: is no image classifier, it has no parameters {missing}")
    config = model.config
    if config.problem_type == "multi_label_classification":
        raise CorpusError(f"{source}: its categories do not exclude each other, so it gives no distribution")
    categories = [str(config.id2label.get(i, f"LABEL_{i}")) for i in range(config.num_labels)]
    model = model.float().eval()
    digest = hashlib.sha256(checksum(model.state_dict()).encode())
    digest.update(json.dumps(processor.to_dict(), sort_keys=True, default=str).encode())
    try:
        model = model.to(device)
    except (RuntimeError, AssertionError) as error:  # torch on a device that is not there
        raise CorpusError(f"device {device}: {str(error).splitlines()[0]}") from None
    return _Teacher(column, source, categories, digest.hexdigest(), model, processor)


def _check_categories(one: _Teacher, other: _Teacher) -> None:
    """Teachers of a head name the same things in the same order; a few names may be spelt otherwise."""
    both = set(one.categories) & set(other.categories)
    if len(one.categories) != len(other.categories) or any(
        a != b and {a, b} <= both for a, b in zip(one.categories, other.categories, strict=True)
    ):
        raise CorpusError(
            f"{one.source} and {other.source} cannot both teach {one.head}: "
            "their categories differ in number or order"
        )


# ---- a run


@dataclass(frozen=True)
class _Item:
    """A frame of a video, prepared for each teacher by column; or, without that, the video's end.

    Attributes:
        trouble: why the video gives nothing.
    """

    video: Input
    prepared: Mapping[str, Mapping[str, torch.Tensor]] | None = None
    trouble: str = ""


@dataclass
class _Run:
    folder: Path
    teachers: list[_Teacher]
    videos: list[Input]
    bad: list[Failure]
    progress: Callable[[Progress], None]
    there: int = 0
    taught: int = 0
    steps: int = 0
    rows: dict[tuple[str, str], list[NDArray[np.float32]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.total = len(self.videos) + len(self.bad)
        self.records = self._records()
        self.sounds: dict[str, str] = {}
        for each in self.videos:
            path = _beside(each.file, self.folder)
            if _fits(path) and _fits(each.name):
                self.sounds[each.name] = path
            else:
                self.bad.append(Failure(each.path, "a manifest cannot hold this name; rename the file"))
        self.videos = [each for each in self.videos if each.name in self.sounds]

    def _records(self) -> dict[str, Any]:
        """Which models made the columns, of earlier runs and this one."""
        file = self.folder / "teachers.json"
        try:
            records: dict[str, Any] = json.loads(file.read_bytes())
            {column: record["sha256"] for column, record in records.items()}
        except FileNotFoundError:
            records = {}
            if (self.folder / "manifest.tsv").exists():
                raise CorpusError(
                    f"{self.folder}: holds a manifest.tsv of something else; choose another folder"
                ) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorpusError(f"{file}: cannot be read ({_reason(error)}); choose another folder") from None
        for each in self.teachers:
            new = {"model": each.source, "sha256": each.sha256}
            old = records.setdefault(each.column, new)
            if old["sha256"] != new["sha256"]:
                raise CorpusError(
                    f"{self.folder}: its {each.column} were made by another model ({old['model']}, "
                    f"not {each.source}); choose another folder"
                )
        return records

    def _place(self, column: str, name: str) -> Path:
        return self.folder / column.replace(":", ".") / f"{name}.npy"

    def _missing(self, video: Input) -> list[_Teacher]:
        return [each for each in self.teachers if not self._place(each.column, video.name).exists()]

    def compute(self, batch: int, workers: int) -> None:
        self._write("teachers.json", json.dumps(self.records, indent=1).encode() + b"\n")
        for each in self.teachers:
            if each.column == each.head:
                names = "".join(" ".join(name.split()) + "\n" for name in each.categories)
                self._write(f"{each.head}.categories.txt", names.encode())
        for failure in self.bad:
            self._report(failure)
        missing = [each for each in self.videos if self._missing(each)]
        self.there = len(self.videos) - len(missing)
        self._report(None)
        try:
            waiting: list[_Item] = []
            for item in _decoded(missing, self._missing, workers, 2 * batch):
                waiting.append(item)
                if sum(each.prepared is not None for each in waiting) >= batch:
                    self._through(waiting)
                    waiting = []
            self._through(waiting)
        finally:  # when interrupted, too
            self._write_manifest()

    def _through(self, items: Sequence[_Item]) -> None:
        """Classifies the frames; writes what is complete."""
        for teacher in self.teachers:
            mine = [each for each in items if each.prepared and teacher.column in each.prepared]
            prepared = [each.prepared[teacher.column] for each in mine if each.prepared]
            # processors that keep an image's shape give tensors that do not go together
            for _, alike in itertools.groupby(zip(mine, prepared, strict=True), key=_shapes):
                group = list(alike)
                rows = teacher.probabilities([tensors for _, tensors in group])
                for (item, _), row in zip(group, rows, strict=True):
                    self.rows.setdefault((item.video.name, teacher.column), []).append(row)
        for item in items:
            if item.prepared is not None:
                continue
            name, steps, failure = item.video.name, 0, None
            made = {each.column: self.rows.pop((name, each.column), []) for each in self.teachers}
            if item.trouble:
                failure = Failure(item.video.path, item.trouble)
                self.bad.append(failure)
            else:
                for column, some in made.items():
                    if some:  # others are there already
                        steps = len(some)
                        with atomic_write(self._place(column, name)) as aside, open(aside, "wb") as file:
                            np.save(file, np.stack(some))
                self.taught += 1
                self.steps += steps
            self._report(failure)

    def _report(self, failure: Failure | None) -> None:
        done = self.there + self.taught + len(self.bad)
        self.progress(Progress(done, self.total, self.steps * STEP, failure))

    def _write(self, name: str, content: bytes) -> None:
        with atomic_write(self.folder / name) as aside:
            aside.write_bytes(content)

    def _write_manifest(self) -> None:
        """A row for every video of which all columns are there, of this run's and earlier ones."""
        sounds = _earlier_rows(self.folder / "manifest.tsv") | self.sounds
        lines = ["\t".join(["sound", *self.records])]
        for name in sorted(sounds):
            places = [self._place(column, name) for column in self.records]
            if all(place.exists() for place in places):
                inside = [place.relative_to(self.folder).as_posix() for place in places]
                lines.append("\t".join([sounds[name], *inside]))
        self._write("manifest.tsv", "".join(f"{line}\n" for line in lines).encode())
        report = self.folder / "errors.tsv"
        if self.bad:
            with atomic_write(report) as aside:
                write_failures(aside, self.bad)
        else:
            report.unlink(missing_ok=True)

    def summary(self, elapsed: float) -> CorpusResult:
        return CorpusResult(
            self.folder / "manifest.tsv",
            self.total,
            self.taught,
            self.there,
            tuple(self.bad),
            self.steps * STEP,
            elapsed,
            self.folder / "errors.tsv" if self.bad else None,
        )


def _decoded(
    videos: Sequence[Input], teachers_of: Callable[[Input], list[_Teacher]], workers: int, ahead: int
) -> Iterator[_Item]:
    """All frames of all videos, those of a video in order and then its end, decoded by threads."""
    coming, lock, stop = iter(videos), threading.Lock(), threading.Event()
    made: queue.Queue[_Item] = queue.Queue(ahead)

    def put(item: _Item) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                made.put(item, timeout=_PATIENCE)
                return

    def work() -> None:
        while not stop.is_set():
            with lock:
                video = next(coming, None)
            if video is None:
                return
            try:
                teachers = teachers_of(video)
                for image in frames(video.file):
                    put(_Item(video, {each.column: each.prepared(image) for each in teachers}))
                    if stop.is_set():
                        return
                put(_Item(video))
            except Exception as error:  # a processor may raise anything
                text = " ".join(str(error).split()) or type(error).__name__
                put(_Item(video, trouble=text.removeprefix(f"{video.file}: ")))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(workers, len(videos)))]
    try:
        for thread in threads:
            thread.start()
        ends = 0
        while ends < len(videos):
            item = made.get()
            ends += item.prepared is None
            yield item
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _shapes(item: tuple[_Item, Mapping[str, torch.Tensor]]) -> list[tuple[str, torch.Size]]:
    return [(name, tensor.shape) for name, tensor in item[1].items()]


def _beside(path: str, folder: Path) -> str:
    """A path as the manifest has it: relative to its folder, if that can be."""
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # on another drive
        return Path(path).resolve().as_posix()


def _fits(text: str) -> bool:
    """Whether a manifest, lines of UTF-8 with tabs, can hold it."""
    try:
        text.encode()
    except UnicodeEncodeError:  # a name that is not text
        return False
    return "\t" not in text and text.splitlines() == [text] and text == text.strip()


def _earlier_rows(manifest: Path) -> dict[str, str]:
    """The paths of videos by the names of their results, as earlier runs left them."""
    if not manifest.exists():
        return {}
    lines = manifest.read_text("utf-8").split("\n")
    rows = [line.split("\t") for line in lines if "\t" in line]
    # the place of the first teacher's results is its column's folder and the name
    return {row[1].partition("/")[2].removesuffix(".npy"): row[0] for row in rows[1:]}
