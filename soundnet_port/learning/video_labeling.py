"""Make training data from videos: image classifiers label what is seen while a sound is heard.

The paper's teachers are networks that name objects and scenes in images. Every 5 s of a video gives
one frame, and a teacher's probabilities for it are the pseudo-labels of these 5 s of sound. Any image
classifier that Hugging Face's `transformers` loads can be a teacher.

The output is a folder of pseudo-labels, see `soundnet_port.learning.label_folder`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from soundnet_port.audio.finding import Failure
from soundnet_port.corpus.errors import CorpusError, format_write_error
from soundnet_port.corpus.processes import available_cpus
from soundnet_port.corpus.run import CorpusResult
from soundnet_port.errors import require
from soundnet_port.files import exclusive_lock
from soundnet_port.learning.image_classifiers import ImageClassifier, Teachers, load_classifiers
from soundnet_port.learning.label_folder import ERRORS, MANIFEST, LabelFolder, Source, find_sources
from soundnet_port.learning.video_frames import STEP_SECONDS, read_frames
from soundnet_port.progress import Progress, ProgressCallback

# Of files in a directory; a file named on its own may have any name.
SUFFIXES = frozenset(
    ".mp4 .m4v .mov .webm .mkv .avi .flv .wmv .mpg .mpeg .ts .mts .m2ts .3gp .ogv .vob".split()
)
_POLL = 0.1  # seconds, after which threads check whether to stop


def label_videos(
    videos: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    teachers: Teachers,
    *,
    batch: int = 32,
    workers: int | None = None,
    device: str | torch.device = "cpu",
    root: str | os.PathLike[str] | None = None,
    progress: ProgressCallback | None = None,
) -> CorpusResult:
    """Make training data from videos, with image classifiers as teachers.

    A frame is taken at the middle of every 5 s of the sound, at 2.5 s, 7.5 s and so on: the one that
    a player shows at that time, upright. Results of earlier runs stay, and videos that have results are
    not read again.

    Args:
        videos: as on the command line: files, folders to be searched, "@LIST" for a text file with a
            path per line.
        output: a folder; the manifest for training is `manifest.tsv` there.
        teachers: for "objects", "scenes" or both, one model or several: names on the Hugging Face hub, or
            folders. Weights must be safetensors; code that comes with a model is never run.
        batch: frames per forward pass of a teacher.
        workers: decoding threads; by default one per CPU of this process.
        device: of the teachers.
        root: a folder that the names of results are relative to; by default each folder searched.
        progress: called after every video, with a message if it failed.

    Returns:
        counts, failures, and the manifest as its output

    Raises:
        CorpusError: settings that cannot work, a model that cannot be loaded or is no image classifier,
            results of other teachers in the folder, another run at work there, results that cannot be
            written.
        MissingExtraError: the extra `[videos]` is not installed.
    """
    for package in ("av", "PIL", "transformers"):
        require(package, "videos")
    started = time.monotonic()
    if batch < 1 or (workers is not None and workers < 1):
        raise CorpusError("batch and workers must be 1 or more")
    folder = Path(output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise CorpusError(f"{folder}: is a file; name a folder for the results")
    found, failures = find_sources(
        [videos] if isinstance(videos, (str, os.PathLike)) else videos, root, "video", SUFFIXES
    )
    classifiers = load_classifiers(teachers, torch.device(device))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(folder, CorpusError):
            run = _Run(folder, classifiers, found, failures, progress or (lambda _: None))
            run.label(batch, workers or available_cpus())
    except OSError as error:
        raise CorpusError(format_write_error(error.filename or folder, error)) from None
    return run.result(time.monotonic() - started)


@dataclass(frozen=True)
class _Item:
    """A frame of a video, preprocessed for each teacher by column; or, without that, the video's end.

    Attributes:
        error: why the video failed.
    """

    video: Source
    inputs: Mapping[str, Mapping[str, torch.Tensor]] | None = None
    error: str = ""


@dataclass
class _Run:
    folder: Path
    teachers: list[ImageClassifier]
    videos: list[Source]
    failures: list[Failure]
    report: ProgressCallback
    skipped: int = 0  # results of earlier runs
    labeled: int = 0
    steps: int = 0
    rows: dict[tuple[str, str], list[NDArray[np.float32]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.total = len(self.videos) + len(self.failures)
        records = {
            teacher.column: {"model": teacher.source, "sha256": teacher.sha256} for teacher in self.teachers
        }
        self.labels = LabelFolder(self.folder, records)
        self.sounds = self.labels.manifest_paths(self.videos, self.failures)
        self.videos = [video for video in self.videos if video.name in self.sounds]

    def _missing(self, video: Source) -> list[ImageClassifier]:
        """Return the teachers whose labels of a video do not exist yet."""
        return [
            teacher for teacher in self.teachers if not self.labels.is_labeled(teacher.column, video.name)
        ]

    def label(self, batch: int, workers: int) -> None:
        """Label all videos that have no labels yet, and write the manifest."""
        self.labels.write_teachers(
            {teacher.head: teacher.categories for teacher in self.teachers if teacher.column == teacher.head}
        )
        for failure in self.failures:
            self._report(str(failure))
        missing = [video for video in self.videos if self._missing(video)]
        self.skipped = len(self.videos) - len(missing)
        self._report()
        try:
            waiting: list[_Item] = []
            with contextlib.closing(_decode(missing, self._missing, workers, 2 * batch)) as items:
                for item in items:
                    waiting.append(item)
                    if sum(item.inputs is not None for item in waiting) >= batch:
                        self._classify(waiting)
                        waiting = []
            self._classify(waiting)
        finally:  # when interrupted, too
            self.labels.write_manifest(self.sounds, self.failures)

    def _classify(self, items: Sequence[_Item]) -> None:
        """Classify frames, and write the labels of videos that are complete."""
        for teacher in self.teachers:
            frames = [
                (item.video.name, item.inputs[teacher.column])
                for item in items
                if item.inputs and teacher.column in item.inputs
            ]
            # processors that keep an image's shape give tensors that cannot be batched
            for _, same_shape in itertools.groupby(frames, key=lambda frame: _shapes(frame[1])):
                names, inputs = zip(*same_shape, strict=True)
                for name, row in zip(names, teacher.classify(inputs), strict=True):
                    self.rows.setdefault((name, teacher.column), []).append(row)
        for item in items:
            if item.inputs is None:
                self._finish(item.video, item.error)

    def _finish(self, video: Source, error: str) -> None:
        labels = {
            teacher.column: self.rows.pop((video.name, teacher.column), []) for teacher in self.teachers
        }
        if error:
            self.failures.append(Failure(video.path, error))
            self._report(str(self.failures[-1]))
            return
        steps = 0
        for column, rows in labels.items():
            if rows:  # other columns exist already
                steps = len(rows)
                self.labels.write_labels(column, video.name, np.stack(rows))
        self.labeled += 1
        self.steps += steps
        self._report()

    def _report(self, message: str = "") -> None:
        done = self.skipped + self.labeled + len(self.failures)
        self.report(Progress(done, self.total, "video", message=message))

    def result(self, elapsed: float) -> CorpusResult:
        return CorpusResult(
            self.folder / MANIFEST,
            self.total,
            self.labeled,
            self.skipped,
            tuple(self.failures),
            self.steps * STEP_SECONDS,
            elapsed,
            self.folder / ERRORS if self.failures else None,
        )


def _decode(
    videos: Sequence[Source],
    teachers_of: Callable[[Source], list[ImageClassifier]],
    workers: int,
    capacity: int,
) -> Generator[_Item, None, None]:
    """Decode in threads; yield all frames of all videos, those of a video in order and then its end."""
    pending, lock, stop = iter(videos), threading.Lock(), threading.Event()
    items: queue.Queue[_Item] = queue.Queue(capacity)

    def put(item: _Item) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                items.put(item, timeout=_POLL)
                return

    def work() -> None:
        while not stop.is_set():
            with lock:
                video = next(pending, None)
            if video is None:
                return
            try:
                teachers = teachers_of(video)
                with contextlib.closing(read_frames(video.path)) as images:
                    for image in images:
                        put(_Item(video, {teacher.column: teacher.preprocess(image) for teacher in teachers}))
                        if stop.is_set():
                            return
                put(_Item(video))
            except Exception as error:  # a processor may raise anything
                reason = " ".join(str(error).split()) or type(error).__name__
                put(_Item(video, error=reason.removeprefix(f"{video.path}: ")))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(workers, len(videos)))]
    try:
        for thread in threads:
            thread.start()
        ends = 0
        while ends < len(videos):
            item = items.get()
            ends += item.inputs is None
            yield item
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _shapes(inputs: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Size]]:
    return [(name, tensor.shape) for name, tensor in inputs.items()]
