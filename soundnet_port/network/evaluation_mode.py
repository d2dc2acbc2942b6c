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

# modules' modes and the model's check_scale from before, and the number of threads inside
_modes: weakref.WeakKeyDictionary[SoundNet, tuple[list[tuple[nn.Module, bool]], bool, int]] = (
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
        modes, check_scale, inside = _modes.get(model, ([], False, 0))
        if not inside:
            modes = [(module, module.training) for module in model.modules()]
            check_scale, model.check_scale = model.check_scale, False
            model.eval()
        _modes[model] = modes, check_scale, inside + 1
    try:
        with torch.no_grad():
            yield
    finally:
        with _lock:
            modes, check_scale, inside = _modes.pop(model)
            if inside > 1:
                _modes[model] = modes, check_scale, inside - 1
            else:
                model.check_scale = check_scale
                for module, mode in modes:
                    module.training = mode
