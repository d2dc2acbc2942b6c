"""Excerpts of top sounds: sound files, spectrograms, and the activations around the peak (extra `[plot]`)."""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import soundfile
import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from soundnet_port.audio.loading import read_blocks
from soundnet_port.corpus.errors import CorpusError
from soundnet_port.corpus.processes import available_cpus
from soundnet_port.network.architecture import FULL_SCALE, SAMPLE_RATE, Layer
from soundnet_port.network.engine import BLOCK
from soundnet_port.network.evaluation_mode import evaluation_mode
from soundnet_port.network.model import SoundNet
from soundnet_port.progress import Progress, ProgressCallback
from soundnet_port.viewing.spectrograms import draw_spectrogram
from soundnet_port.viewing.units import TopSounds, frame_window

MIN_SECONDS = 3.0  # of an excerpt: enough to hear what half a second is part of
MIN_FIELDS = 1.5  # receptive fields in an excerpt, at least
_MAX_POINTS = 320  # of a curve


class Window(NamedTuple):
    """What a picture and a curve show, in samples; it may extend outside the sound."""

    start: int
    end: int


@dataclass(frozen=True)
class Excerpt:
    """A part of a sound that contains the receptive fields of peaks, and units' activations in it.

    Attributes:
        name: stem of the names of its sound and its picture.
        window: what its picture's axis covers.
        start: first sample of its sound, the window's or 0.
        end: where its sound ends, in samples of the file.
        first_frame: number of the curves' first frame.
        frame_step: frames of a value in the curves, which is their maximum.
        curves: activations by unit.
    """

    name: str
    window: Window
    start: int
    end: int
    first_frame: int
    frame_step: int
    curves: Mapping[int, tuple[float, ...]]

    @property
    def sound(self) -> str:
        """Its sound file, relative to the gallery."""
        return f"sounds/{self.name}{_sound_suffix()}"

    @property
    def picture(self) -> str:
        """Its spectrogram, relative to the gallery."""
        return f"pictures/{self.name}.png"


Excerpts = Mapping[tuple[str, str, int], Excerpt]  # by path, layer and frame; near frames share one


class Span(NamedTuple):
    """Frames of a layer, and the samples from `start` to `end` that contain their receptive fields."""

    frames: range
    start: int
    end: int


def cut_excerpts(
    model: SoundNet,
    result: TopSounds,
    folder: Path,
    *,
    workers: int | None,
    decoder: str,
    progress: ProgressCallback | None = None,
) -> Excerpts:
    """Cut the excerpts of all top sounds in threads, reading each file once; write sounds and pictures.

    Raises:
        CorpusError: a file has changed since the search, or no longer exists.
    """
    peaks_by_window: dict[str, dict[tuple[str, Window], list[tuple[int, int]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for unit in result.units:
        for sound in unit.sounds:
            samples = round(sound.duration * SAMPLE_RATE)
            window = place_window(result.layers[unit.layer], sound.frame, samples)
            peaks_by_window[sound.path][unit.layer, window].append((unit.number, sound.frame))
    for name in ("sounds", "pictures"):
        (folder / name).mkdir(parents=True)
    total, done = sum(map(len, peaks_by_window.values())), 0
    excerpts: dict[tuple[str, str, int], Excerpt] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(workers or available_cpus(), initializer=torch.set_num_threads, initargs=(1,))
    try:
        with evaluation_mode(model):
            tasks = {
                pool.submit(_cut_file, model, path, peaks, result, decoder, folder): path
                for path, peaks in peaks_by_window.items()
            }
            for task in as_completed(tasks):
                path = tasks[task]
                for (layer, window), excerpt in task.result().items():
                    done += 1
                    for _, frame in peaks_by_window[path][layer, window]:
                        excerpts[path, layer, frame] = excerpt
                if progress:
                    progress(Progress(done, total, "excerpt"))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
    return excerpts


def place_window(layer: Layer, frame: int, samples: int) -> Window:
    """Place a window around a frame's receptive field in a sound of that many samples.

    It is as long as 1.5 receptive fields, and no shorter than 3 s. Windows begin at multiples of a quarter of
    their length, so that near frames share one, or are moved into the sound. A first or last frame's center
    may lie outside the sound, by the padding; windows contain it.
    """
    length = round(max(MIN_SECONDS * SAMPLE_RATE, MIN_FIELDS * layer.receptive_field))
    center = frame_window(layer, frame)[0] + layer.receptive_field // 2
    margin = max(0, -(layer.start + layer.receptive_field // 2))
    low, high = -margin, samples + margin
    if length >= high - low:
        start = (low + high - length) // 2
    else:
        step = length // 4
        start = min(max(low, round((center - length / 2) / step) * step), high - length)
    return Window(start, start + length)


def get_span(layer: Layer, window: Window, frames: Collection[int]) -> Span:
    """Return the frames with centers in a window, `frames` among them, and the samples they need.

    The start is a multiple of the layer's stride, and so of those of all layers before: a sound cut there
    has the same frames, as they do not reach into the padding before the cut.
    """
    first = min(max(0, math.ceil((window.start - layer.center) / layer.stride)), *frames)
    last = max(math.floor((window.end - layer.center) / layer.stride), *frames)
    start = min(first + layer.start // layer.stride, window.start // layer.stride)
    end = max(frame_window(layer, last)[1], window.end)
    return Span(range(first, last + 1), max(0, start) * layer.stride, end)


@torch.no_grad()  # thread-local
def _cut_file(
    model: SoundNet,
    path: str,
    peaks_by_window: Mapping[tuple[str, Window], Sequence[tuple[int, int]]],
    result: TopSounds,
    decoder: str,
    folder: Path,
) -> dict[tuple[str, Window], Excerpt]:
    excerpts: dict[tuple[str, Window], Excerpt] = {}
    spans = {
        (name, window): get_span(result.layers[name], window, {frame for _, frame in peaks})
        for (name, window), peaks in peaks_by_window.items()
    }
    device = next(model.parameters()).device
    try:
        for key, context in _read_spans(path, decoder, spans):
            (name, window), (frames, start, _) = key, spans[key]
            layer = result.layers[name]
            skipped = start // layer.stride  # frames before the span
            activations = model.extract(context.to(device), [name])[name][0].float().cpu()
            # if the sound continues after the span, its edge frames come after those needed
            edge = 0 if result.edge_frames else model.edge_frames(name, len(context))
            stop = min(frames.stop - skipped, activations.shape[1] - edge)
            activations = activations[:, frames.start - skipped : stop]
            if activations.shape[1] <= max(frame for _, frame in peaks_by_window[key]) - frames.start:
                raise CorpusError(f"{path}: has become shorter since it was searched; run the command again")
            begin, end = (max(0, position - start) for position in (max(0, window.start), window.end))
            samples = context[begin:end] / FULL_SCALE
            position = f"{start + begin} {start + begin + len(samples)} {window.end - window.start} "
            digest = hashlib.sha256(position.encode() + os.fsencode(path)).hexdigest()[:20]
            step = math.ceil(activations.shape[1] / _MAX_POINTS)
            units = sorted({unit for unit, _ in peaks_by_window[key]})
            values = max_pool1d(activations[units], step, ceil_mode=True).tolist()
            excerpts[key] = excerpt = Excerpt(
                digest,
                window,
                start + begin,
                start + begin + len(samples),
                frames.start,
                step,
                dict(zip(units, map(tuple, values), strict=True)),
            )
            buffer = io.BytesIO()  # libsndfile does not report a full disk
            soundfile.write(buffer, samples.numpy(), SAMPLE_RATE, format=_sound_suffix()[1:])
            (folder / excerpt.sound).write_bytes(buffer.getvalue())
            draw_spectrogram(samples, window.end - window.start, folder / excerpt.picture)
    except CorpusError:
        raise
    except (ValueError, RuntimeError) as error:  # RuntimeError: PyTorch's, with a stack trace
        reason = str(error).partition("\n")[0].removeprefix(f"{path}: ")
        raise CorpusError(
            f"{path}: {reason}; has changed since it was searched; run the command again"
        ) from None
    return excerpts


def _read_spans(
    path: str, decoder: str, spans: Mapping[tuple[str, Window], Span]
) -> Iterator[tuple[tuple[str, Window], Tensor]]:
    """Yield the samples of each span as far as they exist, in the memory of a block and the longest span."""
    pending = sorted(spans, key=lambda key: spans[key].end)
    longest = max(span.end - span.start for span in spans.values())
    buffer, offset = torch.empty(0), 0  # the last samples read, and the first one's position

    def take(available: int | None) -> Iterator[tuple[tuple[str, Window], Tensor]]:
        while pending and (available is None or spans[pending[0]].end <= available):
            key = pending.pop(0)
            _, start, end = spans[key]
            yield key, buffer[max(0, start - offset) : max(0, end - offset)]

    for block in read_blocks(path, decoder=decoder, samples=BLOCK):
        buffer = torch.cat([buffer, block])
        yield from take(offset + len(buffer))
        offset += max(0, len(buffer) - longest)
        buffer = buffer[-longest:]
    yield from take(None)


@cache
def _sound_suffix() -> str:
    """Return .mp3, which plays everywhere; before libsndfile 1.1 .flac."""
    return ".mp3" if "MP3" in soundfile.available_formats() else ".flac"
