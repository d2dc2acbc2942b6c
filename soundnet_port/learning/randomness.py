"""Random numbers that depend on a seed alone and leave torch's global generators as they were.

Whatever a run draws comes from `derive_rng(seed, purpose, ...)`, so no random state has to be saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

ORDER, AUGMENTATION, INITIALIZATION, DROPOUT = range(4)  # purposes


def derive_rng(*key: int) -> np.random.Generator:
    """Return the generator for one purpose, a function of `key` alone, such as (seed, epoch, index)."""
    return np.random.default_rng(key)


@contextmanager
def seeded_torch(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's generators of the CPU and of `device` inside the block, and restore them after it."""
    module = None if device.type == "cpu" else torch.get_device_module(device)
    state = module.get_rng_state() if module else None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if module:
            module.manual_seed(seed)
        try:
            yield
        finally:
            if module:
                module.set_rng_state(state)


def initialize(model: nn.Module, generator: np.random.Generator) -> None:
    """Initialize weights in place as the original does (main_train.lua, weights_init).

    Convolution weights N(0, 0.01), batch-norm gammas N(1, 0.02) (standard deviations), all biases 0;
    running means 0, running variances 1.
    """

    def normal(tensor: Tensor, mean: float, std: float) -> None:
        values = generator.normal(mean, std, tuple(tensor.shape)).astype(np.float32)
        tensor.copy_(torch.from_numpy(values))

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv1d):
                normal(module.weight, 0.0, 0.01)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.BatchNorm1d):
                module.reset_running_stats()
                normal(module.weight, 1.0, 0.02)
                module.bias.zero_()
