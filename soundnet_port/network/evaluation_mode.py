"""Evaluation mode during a computation of the package's own, in any number of threads."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch
from torch import nn

from soundnet_port.network.model import SoundNet
from soundnet_port.network.waveform_scale import scale_known

# modules' modes from before, and the number of threads inside
_modes: weakref.WeakKeyDictionary[SoundNet, tuple[list[tuple[nn.Module, bool]], int]] = (
    weakref.WeakKeyDictionary()
)
_lock = Lock()


def check_is_model(model: object) -> None:
    """Check that an argument is not the name of weights or of a sound file.

    Raises:
        ValueError: it is.
    """
    if isinstance(model, (str, os.PathLike)):
        raise ValueError(
            f"the first argument must be a network, such as load_pretrained gives, not {os.fspath(model)!r}"
        )


@contextmanager
def evaluation_mode(model: SoundNet) -> Iterator[None]:
    """Set the model to evaluation mode without gradients, and restore each module's mode afterwards.

    The scale of waveforms is not checked inside: they come from files, or have been checked before.
    Of several threads that are inside at once the first one changes the modes, the last one restores them.
    """
    with _lock:
        modes, inside = _modes.get(model, ([], 0))
        if not inside:
            modes = [(module, module.training) for module in model.modules()]
            model.eval()
        _modes[model] = modes, inside + 1
    try:
        with torch.no_grad(), scale_known():
            yield
    finally:
        with _lock:
            modes, inside = _modes.pop(model)
            if inside > 1:
                _modes[model] = modes, inside - 1
            else:
                for module, mode in modes:
                    module.training = mode
