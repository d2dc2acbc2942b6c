"""Evaluation mode for the time of a computation, in any number of threads."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch
from torch import nn

from soundnet_port.network.model import SoundNet


def check_is_model(model: object) -> None:
    """Raises ValueError where weights' or a sound's name stands in a network's place."""
    if isinstance(model, (str, os.PathLike)):
        raise ValueError(
            f"the first argument must be a network, such as load_pretrained gives, not {os.fspath(model)!r}"
        )


@contextmanager
def evaluation_mode(model: SoundNet) -> Iterator[None]:
    """The model in evaluation mode and without gradients, and each module afterwards as before.

    Of several threads that are inside at once the first one changes the modes, the last one puts them back.
    """
    with _modes_lock:
        modes, inside = _modes.get(model, ([], 0))
        if not inside:
            modes = [(module, module.training) for module in model.modules()]
            model.eval()
        _modes[model] = modes, inside + 1
    try:
        with torch.no_grad():
            yield
    finally:
        with _modes_lock:
            modes, inside = _modes.pop(model)
            if inside > 1:
                _modes[model] = modes, inside - 1
            else:
                for module, mode in modes:
                    module.training = mode


_modes: weakref.WeakKeyDictionary[SoundNet, tuple[list[tuple[nn.Module, bool]], int]] = (
    weakref.WeakKeyDictionary()
)


_modes_lock = Lock()
