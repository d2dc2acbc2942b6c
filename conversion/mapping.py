"""Map a Torch7 graph to SoundNet by table, and refuse all other graphs.

Whatever changes the numbers of trunk and heads must fit: class, order, kernel, stride, padding, rounding,
eps, shapes, finite values. The rest is noted: unknown fields, modules without effect, what follows the heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soundnet_port.conversion.graph import (
    GraphWalker,
    MappingError,
    find_containers,
    list_children,
    module_label,
)
from soundnet_port.conversion.interpreter import module_class
from soundnet_port.conversion.t7 import T7File
from soundnet_port.conversion.t7_objects import LuaObject, Tensor, format_value
from soundnet_port.network.architecture import ARCHITECTURES, BATCH_NORM_EPS, Architecture, Block, Head

MAX_NAMES = 8  # in one note

_SPATIAL_MODES = ("CUDNN_BATCHNORM_SPATIAL", "CUDNN_BATCHNORM_SPATIAL_PERSISTENT")
_MAX_POOLING_MODES = ("CUDNN_POOLING_MAX", "CUDNN_POOLING_MAX_DETERMINISTIC")
_CONVOLUTIONS = ("SpatialConvolution", "SpatialConvolutionMM")  # the latter with 2D weights

# Fields without effect in evaluation: buffers, gradients, training, cudnn's bookkeeping. Other
# fields that no table below names are noted.
_IRRELEVANT_FIELDS = frozenset(
    "_type output gradInput gradWeight gradBias train momentum inplace affine finput fgradInput "
    "_input _gradOutput save_mean save_std indices indices_x name iSize input_offset output_offset "
    "weight_offset pad stride nElem groups padding nDim mode buffer buffer2 centered std normalized "
    "accUpdateGradParameters scaleT fmode bmode bwmode extraBuffer benchmark".split()
)


@dataclass(frozen=True)
class Setting:
    """A field of a module that changes its numbers."""

    names: tuple[str, ...]  #: in order of preference
    expected: Any  #: a value, or a tuple of alternatives
    default: Any = None  #: in versions of Torch7 without the field; None: it is required


@dataclass
class GraphMapping:
    """How a Torch7 graph maps to SoundNet.

    Attributes:
        architecture: with the file's widths and head sizes.
        network: the container of the network, where an interpreter starts.
        tensors: name in our state dict -> the file's tensor.
        inverse_std: names in `tensors` that hold 1 / sqrt(var + eps), as nn did until 2016.
        modules: Torch7 module number, or head's name -> the module's path in the file.
        ignored: notes on what is not used.
    """

    architecture: Architecture
    network: LuaObject
    tensors: dict[str, Tensor] = field(default_factory=dict)
    inverse_std: set[str] = field(default_factory=set)
    modules: dict[int | str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)


def find_soundnet(source: T7File) -> GraphMapping:
    """Find SoundNet in a parsed file.

    Raises:
        MappingError: the file does not hold exactly one SoundNet; the message names the first module
            that differs.
    """
    candidates = find_containers(source.root)
    attempts = [
        (_Matcher(template, network), position)
        for position, network in candidates
        for template in ARCHITECTURES.values()
    ]
    # if none fits, the error of the one that fits furthest explains why
    best, position = max(attempts, key=lambda attempt: (attempt[0].error is None, attempt[0].matched))
    fitting = sum(matcher.error is None for matcher, _ in attempts)
    if len(candidates) > 1 and fitting != 1:
        names = ", ".join(position for position, _ in candidates)
        raise MappingError(
            f"the file holds a table with {len(candidates)} networks ({names}), {fitting} of them "
            "SoundNet, expected one"
        )
    if best.error is not None:
        raise best.error
    mapping = best.mapping
    mapping.ignored[:0] = source.notes + ([f"network found at {position}"] if position else [])
    values = sum(tensor.numel for tensor in mapping.tensors.values())
    if 2 * values > source.size:
        raise MappingError(f"its parameters are {values:,} values, in a file of {source.size:,} bytes")
    return mapping


def load_state(mapping: GraphMapping) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Load the state dict from the file, one (name, float32 array) at a time.

    Raises:
        MappingError: a parameter is not finite, or a variance + eps is not positive.
        T7Error: the file cannot give the numbers.
    """
    shapes = mapping.architecture.state_shapes()
    for name, tensor in mapping.tensors.items():
        stored = tensor.array()
        label = f"{tensor.class_name} for {name} at byte {tensor.offset:,}"
        if name in mapping.inverse_std:
            # a running average of 1 / sqrt(var + eps), so at most 1 / sqrt(eps)
            if not ((stored > 0) & (stored * math.sqrt(BATCH_NORM_EPS) <= 1.001)).all():
                raise MappingError(
                    f"{label}: running_std from {stored.min():g} to {stored.max():g}, expected "
                    f"above 0 and up to {BATCH_NORM_EPS**-0.5:.1f}"
                )
            with np.errstate(over="ignore"):
                stored = stored.astype(np.float64) ** -2.0 - BATCH_NORM_EPS
        with np.errstate(over="ignore"):
            array = stored.astype(np.float32, copy=False).reshape(shapes[name])
        if not np.isfinite(array).all():
            count = int((~np.isfinite(array)).sum())
            raise MappingError(f"{label}: {count:,} of its {array.size:,} values are NaN or infinite")
        if name.endswith("running_var") and not (array + np.float32(BATCH_NORM_EPS) > 0).all():
            raise MappingError(f"{label}: variance {array.min():g}, expected variance + eps > 0")
        yield name, array


class _Matcher:
    """One architecture's table compared with a network; `error` says where it does not fit."""

    def __init__(self, template: Architecture, network: LuaObject) -> None:
        self.template = template
        self.mapping = GraphMapping(template, network)
        self.walker = GraphWalker(self.mapping.ignored)
        self.queue = self.walker.leaves(network)
        self.matched = 0  # modules
        self.error: MappingError | None = None
        try:
            self._match()
        except MappingError as error:
            self.error = error

    def _match(self) -> None:
        channels, widths = 1, []
        for block in self.template.blocks:
            conv = self._next(f"nn.SpatialConvolution ({block.name})", _CONVOLUTIONS)
            channels = self._convolution(conv, block, channels)
            self._batch_norm(self._next(f"nn.SpatialBatchNormalization ({block.norm})"), block, channels)
            self._relu(self._next(f"nn.ReLU ({block.name})"))
            if block.pool:
                self._pooling(self._next(f"nn.SpatialMaxPooling ({block.pool_layer})"), block)
            widths.append(channels)
        after = next(self.queue, None)
        sizes = {} if after is None else self._heads(after, channels)
        self.mapping.architecture = self.template.resized(widths, sizes)
        self._note_rest(self.queue)

    def _next(self, expected: str, classes: tuple[str, ...] = ()) -> tuple[str, LuaObject]:
        """The next module of the trunk, which must be of the class that `expected` names."""
        leaf = next(self.queue, None)
        expected = f"{expected} of {self.template.name}"
        if leaf is None:
            raise MappingError(f"the network ends after {self.matched} modules, expected {expected}")
        path, module = leaf
        if module_class(module) not in (classes or (expected.split()[0].removeprefix("nn."),)):
            raise MappingError(f"module {path} is {module.class_name}, expected {expected}")
        self.matched += 1
        self.mapping.modules[self.matched] = path
        return leaf

    def _heads(self, leaf: tuple[str, LuaObject], channels: int) -> dict[str, int]:
        path, module = leaf
        heads = self.template.heads
        if module_class(module) != "ConcatTable":
            raise MappingError(
                f"module {path} is {module.class_name}, expected nn.ConcatTable of the two heads of "
                f"{self.template.name}, or the end of the network"
            )
        branches = list_children(module, module_label(path, module))
        if len(branches) != len(heads):
            raise MappingError(
                f"{module_label(path, module)} has {len(branches)} branches, expected {len(heads)} heads"
            )
        sizes = {}
        for number, (head, branch) in enumerate(zip(heads, branches, strict=True), 1):
            branch_leaves = self.walker.leaves(branch, f"{path}.{number}", (id(module),))
            first = next(branch_leaves, None)
            if first is None or module_class(first[1]) not in _CONVOLUTIONS:
                raise MappingError(
                    f"module {path}.{number} is {first[1].class_name if first else 'empty'}, "
                    f"expected nn.SpatialConvolution ({head.name})"
                )
            sizes[head.name] = self._convolution(first, head, channels)
            self.mapping.modules[head.name] = first[0]
            self._note_rest(branch_leaves)
        if list(sizes.values()) == [head.categories for head in reversed(heads)]:
            raise MappingError(
                f"{module_label(path, module)} has the {heads[1].categories} scenes first, expected the "
                f"{heads[0].categories} objects"
            )
        return sizes

    def _note_rest(self, rest: Iterator[tuple[str, LuaObject]]) -> None:
        """Note what follows the heads; nothing in it is an error."""
        names = []
        try:
            for path, module in rest:
                names.append(f"{path} ({module.class_name})")
        except MappingError as error:
            names.append(str(error))
        if names:
            self.mapping.ignored.append(f"after the heads, not used: {_abbreviate(names)}")

    def _convolution(self, leaf: tuple[str, LuaObject], row: Block | Head, channels: int) -> int:
        module = leaf[1]
        label = self._check_settings(
            leaf,
            row.name,
            Setting(("kW",), 1),
            Setting(("kH",), row.kernel),
            Setting(("dW",), 1),
            Setting(("dH",), row.stride),
            Setting(("padding", "padW"), 0, 0),
            Setting(("padding", "padH"), row.padding, 0),
            Setting(("groups",), 1, 1),
            Setting(("nInputPlane",), channels),
            used=("nOutputPlane", "weight", "bias"),
        )
        width = module.fields.get("nOutputPlane")
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise MappingError(
                f"{label}: nOutputPlane is {format_value(width)}, expected a number of channels"
            )
        full = (width, channels, row.kernel, 1)
        flat = (width, channels * row.kernel)
        self._map_tensor(label, module, "weight", f"{row.name}.weight", full, flat)
        self._map_tensor(label, module, "bias", f"{row.name}.bias", (width,))
        return width

    def _batch_norm(self, leaf: tuple[str, LuaObject], block: Block, width: int) -> None:
        module = leaf[1]
        label = self._check_settings(
            leaf,
            block.norm,
            Setting(("eps",), BATCH_NORM_EPS, BATCH_NORM_EPS),
            Setting(("nDim",), 4, 4),
            Setting(("mode",), _SPATIAL_MODES, _SPATIAL_MODES[0]),
            used=("weight", "bias", "running_mean", "running_var", "running_std"),
        )
        for name in ("weight", "bias", "running_mean"):
            self._map_tensor(label, module, name, f"{block.norm}.{name}", (width,))
        variance = f"{block.norm}.running_var"
        # Class version 1 kept running_std, and version 2 of nn converts it when it reads such a file.
        old = module.fields.get("running_std") is not None
        if old and (module.version < 2 or module.fields.get("running_var") is None):
            self._map_tensor(label, module, "running_std", variance, (width,))
            self.mapping.inverse_std.add(variance)
        else:
            self._map_tensor(label, module, "running_var", variance, (width,))

    def _relu(self, leaf: tuple[str, LuaObject]) -> None:
        relu = "CUDNN_ACTIVATION_RELU"
        self._check_settings(
            leaf,
            "ReLU",
            Setting(("threshold",), 0, 0),
            Setting(("val",), 0, 0),
            Setting(("mode",), relu, relu),
        )

    def _pooling(self, leaf: tuple[str, LuaObject], block: Block) -> None:
        self._check_settings(
            leaf,
            block.pool_layer,
            Setting(("kW",), 1),
            Setting(("kH",), block.pool),
            Setting(("dW",), 1),
            Setting(("dH",), block.pool),
            Setting(("padW",), 0, 0),
            Setting(("padH",), 0, 0),
            Setting(("ceil_mode",), False, False),
            Setting(("mode",), _MAX_POOLING_MODES, _MAX_POOLING_MODES[0]),
        )

    def _check_settings(
        self, leaf: tuple[str, LuaObject], name: str, *settings: Setting, used: tuple[str, ...] = ()
    ) -> str:
        """Check a module's settings and note its unknown fields; return its label for messages."""
        path, module = leaf
        label = module_label(path, module, name)
        for setting in settings:
            field_name = next((n for n in setting.names if module.fields.get(n) is not None), None)
            value = setting.default if field_name is None else module.fields[field_name]
            if value is None:
                raise MappingError(f"{label}: {setting.names[-1]} is missing, expected {setting.expected}")
            expected = setting.expected
            if not _is_expected(value, expected):
                raise MappingError(
                    f"{label}: {field_name or setting.names[-1]} is {format_value(value)}, "
                    f"expected {expected[0] if isinstance(expected, tuple) else expected}"
                )
        known = _IRRELEVANT_FIELDS.union(used, *(setting.names for setting in settings))
        unknown = sorted(format_value(name) for name in module.fields if name not in known)
        if unknown:
            self.mapping.ignored.append(f"{label}: unknown fields {_abbreviate(unknown)}")
        return label

    def _map_tensor(
        self, label: str, module: LuaObject, field_name: str, name: str, *shapes: tuple[int, ...]
    ) -> None:
        tensor = module.fields.get(field_name)
        if not isinstance(tensor, Tensor):
            state = "is missing" if tensor is None else f"is a {type(tensor).__name__}"
            raise MappingError(
                f"{label}: {field_name} {state}, expected a tensor of {_format_shape(shapes[0])}"
            )
        if tensor.shape not in shapes:
            raise MappingError(
                f"{label}: {field_name} is {_format_shape(tensor.shape)}, expected {_format_shape(shapes[0])}"
            )
        if tensor.storage is None or tensor.storage.dtype.kind != "f":
            raise MappingError(f"{label}: {field_name} is a {tensor.class_name}, expected floats")
        self.mapping.tensors[name] = tensor


def _abbreviate(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


def _is_expected(value: Any, expected: Any) -> bool:
    if isinstance(expected, tuple):
        return any(_is_expected(value, alternative) for alternative in expected)
    if isinstance(expected, float):  # eps, which may be rounded to float32
        return isinstance(value, float) and math.isclose(value, expected, rel_tol=1e-6)
    return type(value) is type(expected) and bool(value == expected)


def _format_shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "nothing"
