"""Float32 at its full precision, whatever PyTorch is set to."""

from __future__ import annotations

from contextlib import ExitStack
from threading import Lock
from typing import Any

import torch


class _TrueFloat32:
    """A context in which float32 products and convolutions have float32's precision.

    Convolutions on a GPU are TF32 by default, off by 1e-3; `torch.set_float32_matmul_precision` makes matrix
    products that too, or bfloat16 on some CPUs. The settings are the whole process's, so of several threads
    that are inside at once the first one changes them and the last one restores them.
    """

    def __init__(self, *, gpu: bool) -> None:
        self._gpu, self._inside = gpu, 0
        self._lock, self._undo = Lock(), ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._change_settings()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._undo.close()

    def _change_settings(self) -> None:
        backends: Any = torch.backends
        settings: list[tuple[Any, str, Any]]
        if hasattr(backends.cudnn, "conv"):  # PyTorch 2.9 and later
            gpu = (backends.cudnn.conv, backends.cuda.matmul)
            holders = gpu if self._gpu else (backends.mkldnn.matmul,)
            settings = [(holder, "fp32_precision", "ieee") for holder in holders]
        else:
            settings = [(backends.cudnn, "allow_tf32", False)] if self._gpu else []
            self._undo.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        for holder, name, value in settings:
            self._undo.callback(setattr, holder, name, getattr(holder, name))
            setattr(holder, name, value)


_ON_CPU, _ON_GPU = _TrueFloat32(gpu=False), _TrueFloat32(gpu=True)


def true_float32(device: torch.device) -> _TrueFloat32:
    """Return the context in which float32 has its full precision on a device."""
    return _ON_CPU if device.type == "cpu" else _ON_GPU
