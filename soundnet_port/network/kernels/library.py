"""Load the compiled kernels, and choose those for the processor at hand.

The library is optional: where it was not compiled, or has nothing for the processor, the engine computes by
PyTorch's matrix products. The environment variable SOUNDNET_KERNEL chooses: "auto" (default), "engine" for
none, or "avx512", "avx2", "sse2", "neon".
"""

from __future__ import annotations

import ctypes
import os
import warnings
from ctypes import c_char_p, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

from soundnet_port.errors import SoundNetError

VARIABLE = "SOUNDNET_KERNEL"
CHOICES = ("auto", "avx512", "avx2", "sse2", "neon", "engine")
_SYMBOL = "soundnet_kernels_1"  # see kernels.cpp
DONE, NOT_FINITE, NO_MEMORY = range(3)  # what layers by overlap-save return

_FIRST = ctypes.CFUNCTYPE(c_int, c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_int64, c_int64)
_SPECTRAL = ctypes.CFUNCTYPE(
    c_int, c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int64
)
_PRODUCT = ctypes.CFUNCTYPE(
    None, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int32, c_void_p, c_int64, c_int64, c_int64
)


class KernelError(SoundNetError):
    """SOUNDNET_KERNEL names kernels that this processor or this installation doesn't have."""


class Kernels(ctypes.Structure):
    """The functions for one kind of processor, as kernels.cpp declares them."""

    _fields_ = (
        ("_name", c_char_p),
        ("lanes", c_int32),
        ("panel", c_int32),
        ("first_layer", _FIRST),
        ("pooled_64", _SPECTRAL),
        ("pooled_32", _SPECTRAL),
        ("plain_32", _SPECTRAL),
        ("product_layer", _PRODUCT),
    )
    lanes: int  #: floats in a vector
    panel: int  #: columns that `product_layer` computes at once

    @property
    def name(self) -> str:
        """One of `CHOICES`."""
        return str(self._name.decode())


def find_kernels() -> Kernels | None:
    """Return the kernels that the environment asks for, or None for the engine alone.

    Raises:
        KernelError: they are unknown, or can't run here.
    """
    return _find_kernels(os.environ.get(VARIABLE) or "auto")


@cache
def _find_kernels(name: str) -> Kernels | None:
    if name not in CHOICES:
        raise KernelError(f"{VARIABLE}={name}: unknown kernels; choose from {', '.join(CHOICES)}")
    if name == "engine":
        return None
    library = load_library()
    pointer = library.soundnet_kernels(name.encode()) if library else None
    if pointer:
        return pointer.contents  # type: ignore[no-any-return]
    if name == "auto":
        return None
    reason = "this processor can't run them" if library else "they weren't compiled in this installation"
    raise KernelError(f"{VARIABLE}={name}: {reason}; unset it, or set it to engine where the run starts")


@cache
def load_library() -> ctypes.CDLL | None:
    """Return the compiled library, or None where there is none."""
    path = Path(__file__).with_name("_kernels.dll" if os.name == "nt" else "_kernels.so")
    try:
        library = ctypes.CDLL(str(path))
    except OSError:  # not compiled, or for another system
        return None
    try:
        setattr(library, "soundnet_kernels", library[_SYMBOL])  # noqa: B010  (CDLL declares no attributes)
    except AttributeError:
        warnings.warn(
            f"{path}: from another version of soundnet-port, so the slower matrix products compute; "
            "install the package again",
            stacklevel=2,
        )
        return None
    library.soundnet_kernels.argtypes = [c_char_p]
    library.soundnet_kernels.restype = ctypes.POINTER(Kernels)
    return library
