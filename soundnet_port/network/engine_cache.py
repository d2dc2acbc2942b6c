"""The engine of each model, built when it is first needed and again when parameters have changed."""

from __future__ import annotations

import os
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from soundnet_port.network.engine import Engine
from soundnet_port.network.kernels.library import VARIABLE
from soundnet_port.network.modules import list_tensors
from soundnet_port.network.plain import PlainSoundNet

_SAMPLED = 64  # values of each tensor, at least
_engines: weakref.WeakKeyDictionary[PlainSoundNet, tuple[_Stamp, Engine]] = weakref.WeakKeyDictionary()


def get_engine(model: PlainSoundNet) -> Engine:
    """Return the model's engine, a new one if its parameters have changed."""
    entry = _engines.get(model)
    if entry is None or not entry[0].matches(model):
        entry = _engines[model] = (_Stamp(model), Engine(model))
    return entry[1]


def drop_engine(model: PlainSoundNet) -> None:
    """Have the next call of `get_engine` build a new engine."""
    _engines.pop(model, None)


class _Stamp:
    """What tells a model's parameters from those that its engine was built of, cheap beside any call.

    That is where its tensors lie, PyTorch's counts of changes to them, batch norm's eps, and, for changes
    that PyTorch does not count (through `.data` or NumPy), the bits of some values of each tensor.
    """

    def __init__(self, model: PlainSoundNet) -> None:
        self._identity = _identify(model)
        tensors = [t.detach() for t in list_tensors(model.modules()) if t.is_floating_point()]
        # flattening a tensor that is not contiguous copies it, so that is done again at each comparison
        self._views = [_sample(t.reshape(-1)) for t in tensors if t.is_contiguous()]
        self._strided = [t for t in tensors if not t.is_contiguous()]
        self._values = self._sample_values()

    def matches(self, model: PlainSoundNet) -> bool:
        return self._identity == _identify(model) and torch.equal(self._values, self._sample_values())

    def _sample_values(self) -> Tensor:
        values = torch.cat([*self._views, *(_sample(t.reshape(-1)) for t in self._strided)])
        return values.view(torch.uint8)  # bits, for NaN is not equal to itself


def _sample(flat: Tensor) -> Tensor:
    return flat[:: max(1, len(flat) // _SAMPLED)]


def _identify(model: PlainSoundNet) -> tuple[Any, ...]:
    modules = list(model.modules())
    tensors = tuple((t.data_ptr(), t._version) for t in list_tensors(modules))
    norms = tuple(module.eps for module in modules if isinstance(module, nn.BatchNorm1d))
    return tensors, norms, os.environ.get(VARIABLE)
