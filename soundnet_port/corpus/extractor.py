"""Compute groups of sounds and write their results.

What is computed together depends on a group's files alone.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soundnet_port.audio.finding import Failure
from soundnet_port.audio.loading import read_blocks
from soundnet_port.corpus.errors import (
    InputError,
    OutputError,
    describe_error,
    format_write_error,
    write_failures,
)
from soundnet_port.corpus.features import Features, result_key
from soundnet_port.corpus.jobs import Group, Input, InputResult, Job
from soundnet_port.files import atomic_write
from soundnet_port.inference.alignment import Clock
from soundnet_port.inference.pooling import Pooling
from soundnet_port.network.architecture import SAMPLE_RATE, Layer
from soundnet_port.network.engine import StreamState
from soundnet_port.network.engine_cache import get_engine
from soundnet_port.network.evaluation_mode import evaluation_mode
from soundnet_port.network.model import SoundNet

# errors of one result's name, not of the folder of all results
_NAME_ERRORS = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EILSEQ, errno.EINVAL)


@dataclass(frozen=True)
class LoadedSound:
    """A waveform, or the first block of a long one and an iterator over the others."""

    first: Tensor
    rest: Iterator[Tensor] | None


class Extractor:
    """Computes groups and writes their results."""

    def __init__(self, job: Job, model: SoundNet) -> None:
        self.job, self.model = job, model
        self.layers = {result_key(key): model.architecture.layer(key) for key in job.spec.layers}
        # the engine computes layers, but not the modules inside: bare convolutions and batch norms
        self.engine_layers = [layer for layer in self.layers.values() if layer.is_layer]
        self.inner_modules = [layer.module for layer in self.layers.values() if not layer.is_layer]
        self.edge_layers = {key: _model_key(self.layers[key]) for key in job.spec.edge_layers}
        self.engine = get_engine(model)
        self.device = next(model.parameters()).device

    def load(self, source: Input) -> LoadedSound:
        """Decode a sound, or the first block of a long one.

        Raises:
            InputError: it cannot be read, or is too short for the layers.
        """
        try:
            blocks = read_blocks(source.file, decoder=self.job.decoder, samples=self.job.block)
            first = next(blocks)
            second = next(blocks, None)
            if second is None:
                self._check_length(len(first))
        except Exception as error:  # decoders may raise anything, and one file must not end a run
            raise InputError(describe_error(error, source.file)) from None
        return LoadedSound(first, None if second is None else chain([second], blocks))

    def compute_group(
        self,
        group: Group,
        excluded: Mapping[int, str],
        load: Callable[[Input], LoadedSound],
    ) -> Iterator[InputResult]:
        """Compute a group, write missing results, and yield the outcome of each input.

        Args:
            group: to compute.
            excluded: reasons of inputs that count as failed, by index.
            load: decodes an input, as `Extractor.load`.

        Raises:
            OutputError: results cannot be written.
        """
        job, reasons = self.job, dict(excluded)
        preloaded: dict[int, LoadedSound] = {}
        missing = job.missing_inputs(group)
        if len(missing) < len(group.inputs):  # some results exist: are the others failed inputs, as before?
            for index in missing:
                try:
                    if index not in reasons:
                        preloaded[index] = load(group.inputs[index])
                        break
                except InputError as error:
                    reasons[index] = str(error)
            if not preloaded:
                for index in missing:
                    yield InputResult(index, 0, reasons[index])
                return
        features: dict[int, Features] = {}
        batch: dict[int, Tensor] = {}
        for index, source in enumerate(group.inputs):
            try:
                if index in reasons:
                    raise InputError(reasons[index])
                sound = preloaded.pop(index, None) or load(source)
                if sound.rest is not None:
                    seconds = 0.0
                    for seconds, result in self._compute_long_sound(source, sound):
                        if result is None:
                            yield InputResult(index, seconds, done=False)
                        else:
                            features[index] = result
                    yield self._write_result(group, index, seconds, features)
                    continue
            except InputError as error:
                reasons[index] = str(error)
                yield InputResult(index, 0, str(error))
                continue
            if sum(map(len, batch.values())) + len(sound.first) > job.block:
                yield from self._compute_batch(group, batch, features, reasons)
                batch.clear()
            batch[index] = sound.first
        yield from self._compute_batch(group, batch, features, reasons)
        if job.single_file:
            self._write_part(group, features, reasons)

    def probe(self, source: Input) -> None:
        """Compute an input and write nothing, to find out whether the process survives it."""
        with contextlib.suppress(InputError):
            sound = self.load(source)
            if sound.rest is None:
                self._accumulate([sound.first])
            else:
                deque(self._compute_long_sound(source, sound), 0)

    # ---- computing

    def _compute_batch(
        self,
        group: Group,
        batch: Mapping[int, Tensor],
        features: dict[int, Features],
        reasons: dict[int, str],
    ) -> Iterator[InputResult]:
        """Compute short sounds together, by index; add their features, or the reasons of failures."""
        if not batch:
            return
        try:
            accumulators = self._accumulate(list(batch.values()))
        except (RuntimeError, MemoryError) as error:
            for index in batch:
                reasons[index] = describe_error(error, group.inputs[index].file)
                yield InputResult(index, 0, reasons[index])
            return
        for (index, waveform), by_layer in zip(batch.items(), accumulators, strict=True):
            source = group.inputs[index]
            try:
                features[index] = self._build_features(source, by_layer, len(waveform))
            except (ValueError, RuntimeError, MemoryError) as error:
                reasons[index] = describe_error(error, source.file)
                yield InputResult(index, 0, reasons[index])
            else:
                yield self._write_result(group, index, len(waveform) / SAMPLE_RATE, features)

    def _new_accumulators(self) -> dict[str, Pooling | Clock]:
        spec = self.job.spec
        if spec.clock:
            return {key: Clock(layer, *spec.clock) for key, layer in self.layers.items()}
        return {key: Pooling(spec.pool) for key in self.layers}

    def _accumulate(self, waveforms: Sequence[Tensor]) -> list[dict[str, Pooling | Clock]]:
        """Compute sounds together; return each one's frames by layer, pooled or on a clock."""
        accumulators = [self._new_accumulators() for _ in waveforms]
        waveforms = [waveform.to(self.device) for waveform in waveforms]
        with evaluation_mode(self.model):
            state = StreamState(self.engine, self.engine_layers, len(waveforms))
            outputs = state.push(waveforms, last=True)
            for number, waveform in enumerate(waveforms):
                inner = self.model.extract(waveform, self.inner_modules) if self.inner_modules else {}
                dropped = self._dropped_frames(len(waveform))
                for key, layer in self.layers.items():
                    frames = outputs[layer.name][number] if layer.is_layer else inner[layer.module][0].T
                    accumulators[number][key].add(frames[: len(frames) - dropped.get(key, 0)].cpu())
        return accumulators

    def _compute_long_sound(
        self, source: Input, sound: LoadedSound
    ) -> Iterator[tuple[float, Features | None]]:
        """Yield the seconds computed after each block, in the end with the features.

        Modules inside layers need the sound in one piece.
        """
        assert sound.rest is not None
        try:
            if self.inner_modules:
                waveform = torch.cat([sound.first, *sound.rest])
                self._check_length(len(waveform))
                (accumulators,) = self._accumulate([waveform])
                features = self._build_features(source, accumulators, len(waveform))
                yield len(waveform) / SAMPLE_RATE, features
                return
            accumulators = self._new_accumulators()
            state, samples = StreamState(self.engine, self.engine_layers), 0
            block: Tensor | None = sound.first
            while block is not None:
                following = next(sound.rest, None)
                with evaluation_mode(self.model):
                    outputs = state.push([block.to(self.device)], last=following is None)
                samples += len(block)
                dropped = self._dropped_frames(samples) if following is None else {}
                for key, layer in self.layers.items():
                    frames = outputs[layer.name][0]
                    accumulators[key].add(frames[: len(frames) - dropped.get(key, 0)].cpu())
                block = following
                yield samples / SAMPLE_RATE, None
            self._check_length(samples)
            yield samples / SAMPLE_RATE, self._build_features(source, accumulators, samples)
        except Exception as error:  # decoders, again
            raise InputError(describe_error(error, source.file)) from None

    def _check_length(self, samples: int) -> None:
        """Raise a ValueError if a layer needs more samples, or would give edge frames alone."""
        self.model.architecture.check_length(samples, self.layers.values())
        spec = self.job.spec
        if not (spec.all_frames or spec.edge_frames or spec.clock):
            self.model.architecture.check_ordinary(samples, self.layers.values())

    def _edge_frames(self, samples: int) -> dict[str, int]:
        return {key: self.model.edge_frames(layer, samples) for key, layer in self.edge_layers.items()}

    def _dropped_frames(self, samples: int) -> dict[str, int]:
        """Return how many frames at each layer's end do not count: its edge frames, unless requested."""
        if self.job.spec.all_frames or self.job.spec.edge_frames:
            return {}
        return self._edge_frames(samples)

    def _build_features(
        self, source: Input, accumulators: Mapping[str, Pooling | Clock], samples: int
    ) -> Features:
        arrays: dict[str, NDArray[Any]] = {}
        times = {}
        dropped = self._dropped_frames(samples)
        for key, accumulator in accumulators.items():
            if isinstance(accumulator, Clock):
                rows, row_times = accumulator.result(samples, dropped.get(key, 0))
                arrays[key], times[key] = rows.numpy(), row_times.numpy()
                continue
            arrays[key] = accumulator.result().contiguous().numpy()
            if self.job.format_name == "peaks":
                arrays |= {f"{key}_frames": accumulator.peaks.numpy(), "samples": np.array(samples)}
            if self.job.spec.timed:
                frame_times = self.model.frame_times(_model_key(self.layers[key]), len(arrays[key]))
                times[key] = frame_times.numpy()
        edge_frames = self._edge_frames(samples) if self.job.spec.all_frames else {}
        return Features(source.printable_name, arrays, times, edge_frames)

    # ---- writing

    def _write_result(
        self, group: Group, index: int, seconds: float, features: dict[int, Features]
    ) -> InputResult:
        """Write an input's own missing results; features of a part are kept until it is complete."""
        job = self.job
        if job.single_file:
            return InputResult(index, seconds)
        source = group.inputs[index]
        contents = job.format.split(features.pop(index))
        for file, content in zip(job.result_files(source), contents, strict=True):
            try:
                if not os.path.exists(file):  # noqa: PTH110
                    with atomic_write(Path(file), job.staging) as temporary:
                        job.format.write(temporary, [content], job.spec, False)
            except OSError as error:
                if error.errno not in _NAME_ERRORS:
                    raise OutputError(format_write_error(file, error)) from None
                return InputResult(index, 0, f"{file} cannot be written: {error.strerror}")
            except (ValueError, RuntimeError) as error:  # a size or a name that the format does not allow
                reason = describe_error(error, source.file)
                return InputResult(index, 0, f"{file} cannot be written: {reason}")
        return InputResult(index, seconds)

    def _write_part(self, group: Group, features: Mapping[int, Features], reasons: Mapping[int, str]) -> None:
        job, part = self.job, self.job.part_file(group)
        try:
            if reasons:
                failures = [Failure(group.inputs[index].path, reasons[index]) for index in sorted(reasons)]
                with atomic_write(job.failures_file(group), job.staging) as temporary:
                    write_failures(temporary, failures)
            with atomic_write(part, job.staging) as temporary:
                job.format.write(temporary, [features[index] for index in sorted(features)], job.spec, True)
        except (OSError, ValueError, RuntimeError) as error:
            raise OutputError(format_write_error(part, error)) from None


def _model_key(layer: Layer) -> str | int:
    """Return the key of a layer for the model's methods."""
    return layer.name if layer.kind == "head" else layer.module
