"""Excerpts of top sounds: sound files, spectrograms, and the activations around the peak (extra `[plot]`)."""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import soundfile
import torch
from torch import Tensor

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


@dataclass(frozen=True)
class Excerpt:
    """A frame's receptive field in a sound, and the layer's activations around it.

    Attributes:
        name: stem of the names of its sound and its picture.
        first_frame: number of the curves' first frame.
        curves: activations by unit.
    """

    name: str
    first_frame: int
    curves: Mapping[int, tuple[float, ...]]

    @property
    def sound(self) -> str:
        """Its sound file, relative to the gallery."""
        return f"sounds/{self.name}{_sound_suffix()}"

    @property
    def picture(self) -> str:
        """Its spectrogram, relative to the gallery."""
        return f"pictures/{self.name}.png"


Excerpts = Mapping[tuple[str, str, int], Excerpt]  # by path, layer and frame


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
    units_by_frame: dict[str, dict[tuple[str, int], list[int]]] = defaultdict(lambda: defaultdict(list))
    for unit in result.units:
        for sound in unit.sounds:
            units_by_frame[sound.path][unit.layer, sound.frame].append(unit.number)
    for name in ("sounds", "pictures"):
        (folder / name).mkdir(parents=True)
    total = sum(map(len, units_by_frame.values()))
    excerpts: dict[tuple[str, str, int], Excerpt] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(workers or available_cpus(), initializer=torch.set_num_threads, initargs=(1,))
    try:
        with evaluation_mode(model):
            tasks = {
                pool.submit(_cut_file, model, path, frames, result, decoder, folder): path
                for path, frames in units_by_frame.items()
            }
            for task in as_completed(tasks):
                for (layer, frame), excerpt in task.result().items():
                    excerpts[tasks[task], layer, frame] = excerpt
                if progress:
                    progress(Progress(len(excerpts), total, "excerpt"))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
    return excerpts


def get_context(layer: Layer, frame: int) -> Span:
    """Return the frames around one, a receptive field to either side, and the samples they need.

    The start is a multiple of the layer's stride, and so of those of all layers before: a sound cut there
    has the same frames, as they do not reach into the padding before the cut.
    """
    reach = math.ceil(layer.receptive_field / layer.stride)
    frames = range(max(0, frame - reach), frame + reach + 1)
    start = max(0, frames.start + layer.start // layer.stride) * layer.stride
    return Span(frames, start, frame_window(layer, frame + reach)[1])


@torch.no_grad()  # thread-local
def _cut_file(
    model: SoundNet,
    path: str,
    units_by_frame: Mapping[tuple[str, int], Sequence[int]],
    result: TopSounds,
    decoder: str,
    folder: Path,
) -> dict[tuple[str, int], Excerpt]:
    excerpts: dict[tuple[str, int], Excerpt] = {}
    spans = {(name, frame): get_context(result.layers[name], frame) for name, frame in units_by_frame}
    device = next(model.parameters()).device
    try:
        for key, context in _read_spans(path, decoder, spans):
            (name, frame), (frames, start, _) = key, spans[key]
            layer = result.layers[name]
            begin, end = (max(0, position - start) for position in frame_window(layer, frame))
            skipped = start // layer.stride  # frames before the span
            activations = model.extract(context.to(device), [name])[name][0].float().cpu()
            # if the sound continues after the span, its edge frames come after those needed
            edge = 0 if result.edge_frames else model.edge_frames(name, len(context))
            stop = min(frames.stop - skipped, activations.shape[1] - edge)
            activations = activations[:, frames.start - skipped : stop]
            if activations.shape[1] <= frame - frames.start:
                raise CorpusError(f"{path}: has become shorter since it was searched; run the command again")
            samples = context[begin:end] / FULL_SCALE
            position = f"{start + begin} {start + begin + len(samples)} {layer.receptive_field} "
            digest = hashlib.sha256(position.encode() + os.fsencode(path)).hexdigest()[:20]
            curves = {unit: tuple(activations[unit].tolist()) for unit in units_by_frame[key]}
            excerpts[key] = excerpt = Excerpt(digest, frames.start, curves)
            buffer = io.BytesIO()  # libsndfile does not report a full disk
            soundfile.write(buffer, samples.numpy(), SAMPLE_RATE, format=_sound_suffix()[1:])
            (folder / excerpt.sound).write_bytes(buffer.getvalue())
            draw_spectrogram(samples, layer.receptive_field, folder / excerpt.picture)
    except CorpusError:
        raise
    except (ValueError, RuntimeError) as error:  # RuntimeError: PyTorch's, with a stack trace
        reason = str(error).partition("\n")[0].removeprefix(f"{path}: ")
        raise CorpusError(
            f"{path}: {reason}; has changed since it was searched; run the command again"
        ) from None
    return excerpts


def _read_spans(
    path: str, decoder: str, spans: Mapping[tuple[str, int], Span]
) -> Iterator[tuple[tuple[str, int], Tensor]]:
    """Yield the samples of each span as far as they exist, in the memory of a block and the longest span."""
    pending = sorted(spans, key=lambda key: spans[key].end)
    longest = max(span.end - span.start for span in spans.values())
    buffer, offset = torch.empty(0), 0  # the last samples read, and the first one's position

    def take(available: int | None) -> Iterator[tuple[tuple[str, int], Tensor]]:
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
