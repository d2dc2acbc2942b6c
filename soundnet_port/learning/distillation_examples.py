"""Make training examples of 20 s from sounds with pseudo-labels, in an order that can be resumed."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

from soundnet_port.audio.loading import AudioError, read_blocks
from soundnet_port.learning.augmentation import mix_waveforms
from soundnet_port.learning.distillation import TrainConfig
from soundnet_port.learning.pseudo_labels import DistillationData
from soundnet_port.learning.randomness import AUGMENTATION, ORDER, derive_rng
from soundnet_port.network.architecture import SAMPLE_RATE

EXAMPLE_STEPS = 4  # label steps of an example
STEP_SAMPLES = 5 * SAMPLE_RATE


def fit_example(waveform: Tensor, labels: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Bring sound and labels to exactly 20 s, as the original does with any clip.

    Sound shorter than its label steps is zero-padded to them, longer is cut. With fewer than 4 steps
    sound and labels are repeated, and cut at 20 s. (The original also zeroes the last sample before
    the padding, by an off-by-one error; this does not.)

    Shape:
        - waveform: (samples,)
        - labels: by teacher, (steps, categories), 1 to 4 steps
        - returns (441000,), and by teacher (4, categories)
    """
    steps = len(next(iter(labels.values())))
    samples = steps * STEP_SAMPLES
    waveform = F.pad(waveform[:samples], (0, max(0, samples - len(waveform))))
    repeats = -(-EXAMPLE_STEPS // steps)
    return (
        waveform.repeat(repeats)[: EXAMPLE_STEPS * STEP_SAMPLES],
        {column: rows.repeat(repeats, 1)[:EXAMPLE_STEPS] for column, rows in labels.items()},
    )


class DistillationExamples(Dataset[dict[str, Any]]):
    """Decoded and augmented examples by (epoch, index); the same pair is always the same example.

    Of a sound with more than 4 label steps, training takes 4 consecutive ones, drawn anew in each
    epoch, and validation the first 4. (The released data have at most 4.) An unreadable sound is
    silence with its labels, as in the original, and the example says so.

    Args:
        data: sounds and labels.
        config: seed and augmentation; None for validation.
        cache: bytes of decoded sound to keep: the first sounds, as many as fit.
        shared: whether processes share the cache.
    """

    def __init__(
        self, data: DistillationData, config: TrainConfig | None, cache: float = 0, shared: bool = False
    ) -> None:
        self.data = data
        self.config = config
        lengths = (data.steps if config else np.minimum(data.steps, EXAMPLE_STEPS)) * STEP_SAMPLES
        ends = np.cumsum(lengths)
        cached = int(np.searchsorted(ends, cache / 4, side="right"))
        self._starts = np.concatenate([[0], ends[:cached]])
        self._samples = torch.empty(int(self._starts[-1]))
        self._is_cached = torch.zeros(cached, dtype=torch.uint8)
        if shared:
            self._samples.share_memory_()  # type: ignore[no-untyped-call]
            self._is_cached.share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self.data.steps)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        return self._example(*key)

    def _example(self, epoch: int, index: int, mix: bool = True) -> dict[str, Any]:
        labels = {column: torch.from_numpy(rows) for column, rows in self.data.read_labels(index).items()}
        first = 0
        steps = int(self.data.steps[index])
        if self.config is not None:
            generator = derive_rng(self.config.seed, AUGMENTATION, epoch, index)
            first = int(generator.integers(max(0, steps - EXAMPLE_STEPS), endpoint=True))
        last = min(first + EXAMPLE_STEPS, steps)
        labels = {column: rows[first:last] for column, rows in labels.items()}
        waveform, reason = self._load(index, last if self.config is None else steps, last)
        waveform, labels = fit_example(waveform[first * STEP_SAMPLES : last * STEP_SAMPLES], labels)
        if self.config is not None:
            waveform = self.config.augmentation(waveform, generator)
            if mix and generator.random() < self.config.augmentation.mix:
                other = self._example(epoch, int(generator.integers(len(self))), mix=False)
                share = generator.random()
                waveform = mix_waveforms(waveform, other["waveform"], share)
                labels = {
                    column: share * rows + (1 - share) * other["targets"][column]
                    for column, rows in labels.items()
                }
        return {
            "waveform": waveform,
            "targets": labels,
            "unreadable": f"{self.data.sound_name(index)}\t{reason}" if reason else "",
        }

    def _load(self, index: int, steps: int, last: int) -> tuple[Tensor, str]:
        """Return the sound's `steps` label steps if they are cached, else at least the first `last`.

        An unreadable sound is silence; the text says why.
        """
        if index >= len(self._is_cached):
            try:
                return self._decode(index, last * STEP_SAMPLES), ""
            except AudioError as error:
                return torch.zeros(last * STEP_SAMPLES), str(error)
        cached = self._samples[self._starts[index] : self._starts[index + 1]]
        if not self._is_cached[index]:
            try:
                waveform = self._decode(index, steps * STEP_SAMPLES)
            except AudioError as error:
                return torch.zeros(steps * STEP_SAMPLES), str(error)
            cached[: len(waveform)] = waveform
            cached[len(waveform) :] = 0
            self._is_cached[index] = 1
        return cached, ""

    def _decode(self, index: int, samples: int) -> Tensor:
        """Decode the first samples of a sound, and no more of its file."""
        blocks: list[Tensor] = []
        count = 0
        with self.data.open_sound(index) as path:
            for block in read_blocks(path, samples=STEP_SAMPLES):
                blocks.append(block)
                count += len(block)
                if count >= samples:
                    break
        return torch.cat(blocks)[:samples]


class ResumableBatchSampler(Sampler[list[tuple[int, int]]]):
    """The (epoch, index) of each batch, from any step on: one random permutation after the other.

    A permutation is a function of (seed, epoch). A batch may end one epoch and begin the next.

    Args:
        sounds: how many.
        config: its batch, seed and number of iterations.
        step: iterations done.
        rank: the device whose part of every batch this is.
        devices: how many.
    """

    def __init__(
        self, sounds: int, config: TrainConfig, step: int = 0, rank: int = 0, devices: int = 1
    ) -> None:
        self.sounds, self.config, self.step = sounds, config, step
        self.share, self.rank = config.batch // devices, rank

    def __len__(self) -> int:
        return self.config.iterations - self.step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order_epoch, order = -1, np.empty(0, np.int64)
        for step in range(self.step, self.config.iterations):
            first = step * self.config.batch + self.rank * self.share
            batch = []
            for position in range(first, first + self.share):
                epoch, offset = divmod(position, self.sounds)
                if epoch != order_epoch:
                    order_epoch = epoch
                    order = derive_rng(self.config.seed, ORDER, epoch).permutation(self.sounds)
                batch.append((epoch, int(order[offset])))
            yield batch


def create_loader(
    examples: DistillationExamples, batches: Any, workers: int, device: str
) -> DataLoader[dict[str, Any]]:
    """Create a loader of these batches, with so many decoding processes (0: this one decodes)."""
    return DataLoader(
        examples,
        batch_sampler=batches,
        num_workers=workers,
        worker_init_fn=_ignore_interrupts,
        pin_memory=device == "cuda",
        generator=torch.Generator(),  # torch would draw the workers' seed from its global one
    )


def _ignore_interrupts(worker: int) -> None:
    """Leave a signal to all processes to the one that trains."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
