"""What fine-tuning trains on: random crops, or a frozen trunk's output for a few variants of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from soundnet_port.learning.augmentation import mix_waveforms
from soundnet_port.learning.finetune_run import FinetuneConfig
from soundnet_port.learning.randomness import AUGMENTATION, ORDER, derive_rng
from soundnet_port.network.architecture import CLASSES, SAMPLE_RATE, Architecture
from soundnet_port.network.model import SoundNet

_MOST_BYTES = 2e9  # of features in memory


class RandomCrops(Dataset[tuple[Tensor, Tensor]]):
    """Augmented random crops with their distributions over the classes, by (variant, index)."""

    def __init__(
        self, waveforms: Sequence[Tensor], targets: Sequence[int], classes: int, config: FinetuneConfig
    ):
        self.waveforms, self.targets, self.classes, self.config = waveforms, targets, classes, config

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        variant, index = key
        generator = derive_rng(self.config.seed, AUGMENTATION, variant, index)
        waveform, target = self._crop(index, generator)
        if generator.random() < self.config.augmentation.mix:
            other, other_target = self._crop(int(generator.integers(len(self.waveforms))), generator)
            share = generator.random()
            waveform = mix_waveforms(waveform, other, share)
            target = share * target + (1 - share) * other_target
        return waveform, target

    def _crop(self, index: int, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        waveform, length = self.waveforms[index], round(self.config.seconds * SAMPLE_RATE)
        if len(waveform) < length:
            waveform = waveform.repeat(-(-length // len(waveform)))
        start = int(generator.integers(len(waveform) - length, endpoint=True))
        target = torch.zeros(self.classes)
        target[self.targets[index]] = 1
        return self.config.augmentation(waveform[start : start + length], generator), target

    def variant(self, epoch: int) -> int:
        """Return the number of the variants that an epoch uses: its own, or one of the run's few."""
        return epoch % self.config.variants if self.config.variants else epoch

    def order(self, epoch: int) -> list[list[int]]:
        """Return the indices of an epoch's full batches, which depend on seed and epoch."""
        size = self.config.batch
        order = derive_rng(self.config.seed, ORDER, epoch).permutation(len(self.waveforms)).tolist()
        return [order[start : start + size] for start in range(0, len(order) - size + 1, size)]

    def batches(self, epoch: int, pin_memory: bool = False) -> Iterator[list[Tensor]]:
        """Yield an epoch's batches of crops and distributions."""
        variant = self.variant(epoch)
        keys = [[(variant, index) for index in batch] for batch in self.order(epoch)]
        yield from DataLoader(self, batch_sampler=keys, pin_memory=pin_memory, generator=torch.Generator())


class FeatureVariants:
    """A frozen trunk's output for the crops' variants; each is computed once, when an epoch first uses it.

    A variant is computed in one go and always in the same batches, so that its numbers do not depend on
    where a run was resumed.

    Args:
        crops: with their number of variants.
        trunk: the frozen blocks, on the CPU.
        repeats: of each crop, see `count_repeats`.
    """

    def __init__(self, crops: RandomCrops, trunk: SoundNet, repeats: int) -> None:
        self.crops, self.trunk, self.repeats = crops, trunk, repeats
        self._variants: dict[int, tuple[Tensor, Tensor]] = {}  # features and distributions of all sounds

    def batches(self, epoch: int) -> Iterator[list[Tensor]]:
        """Yield an epoch's batches of features, (batch, channels, frames), and distributions."""
        variant = self.crops.variant(epoch)
        if variant not in self._variants:
            self._variants[variant] = self._compute(variant)
        features, targets = self._variants[variant]
        for batch in self.crops.order(epoch):
            yield [features[batch], targets[batch]]

    def _compute(self, variant: int) -> tuple[Tensor, Tensor]:
        keys = [(variant, index) for index in range(len(self.crops.waveforms))]
        features, targets = [], []
        for waveform, target in DataLoader(
            self.crops, self.crops.config.batch, sampler=keys, generator=torch.Generator()
        ):
            features.append(compute_frozen(self.trunk, waveform.repeat(1, self.repeats)))
            targets.append(target)
        return torch.cat(features), torch.cat(targets)


def compute_frozen(trunk: SoundNet, waveform: Tensor) -> Tensor:
    """Compute a frozen trunk's output, (batch, channels, frames), for (batch, samples)."""
    last = trunk.architecture.last_layer
    with torch.no_grad():
        return trunk.extract(waveform, [last])[last]


def count_repeats(architecture: Architecture, config: FinetuneConfig, samples: int) -> int:
    """Count how often a crop is repeated so that the head has a frame that sees no edge frame."""
    return 1 if config.edge_frames else ceil(architecture.shortest_ordinary(CLASSES) / samples)


def count_variants(
    architecture: Architecture, frozen_blocks: int, config: FinetuneConfig, sounds: int
) -> int:
    """Return how many variants of each sound to train on; 0: new crops every epoch.

    That is so without frozen blocks, and where the variants' features would take more than 2 GB.
    """
    if not frozen_blocks:
        return 0
    samples = round(config.seconds * SAMPLE_RATE)
    samples *= count_repeats(architecture, config, samples)
    block = architecture.blocks[frozen_blocks - 1]
    size = 4 * block.channels * architecture.frames(block.output, samples)
    variants = min(config.variants, config.epochs)
    return config.variants if variants * sounds * size <= _MOST_BYTES else 0
