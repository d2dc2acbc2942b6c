"""Finds SoundNet in a Torch7 graph, by table, and refuses what is not SoundNet.

Strict about everything that changes the numbers of trunk and heads: class, order, kernel, stride,
padding, rounding, eps, shapes, finite values. Tolerant about the rest: fields that change nothing
are listed, what follows the heads is listed, containers and do-nothing modules are looked through.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soundnet_port.conversion.interpreter import FLOATING, class_of
from soundnet_port.conversion.t7 import LuaFunction, LuaObject, T7File, Table, Tensor, shown
from soundnet_port.errors import SoundNetError
from soundnet_port.network.architecture import ARCHITECTURES, BATCH_NORM_EPS, Architecture, Block, Head

MAX_MODULES = 1_000
MAX_NAMES = 8  # in one note, and networks looked at in one table

_WRAPPERS = ("Sequential", "DataParallelTable", "GPU")
_DOING_NOTHING = ("Identity", "Contiguous", "Copy")
_SPATIAL = ("CUDNN_BATCHNORM_SPATIAL", "CUDNN_BATCHNORM_SPATIAL_PERSISTENT")
_MAXIMUM = ("CUDNN_POOLING_MAX", "CUDNN_POOLING_MAX_DETERMINISTIC")
_CONVOLUTIONS = ("SpatialConvolution", "SpatialConvolutionMM")  # the latter with 2D weights

# Fields that change nothing at inference: buffers, gradients, training and cudnn's bookkeeping.
# What is in neither this list nor the tables below is named in the report.
_HARMLESS = frozenset(
    "_type output gradInput gradWeight gradBias train momentum inplace affine finput fgradInput "
    "_input _gradOutput save_mean save_std indices indices_x name iSize input_offset output_offset "
    "weight_offset pad stride nElem groups padding nDim mode buffer buffer2 centered std normalized "
    "accUpdateGradParameters scaleT fmode bmode bwmode extraBuffer benchmark".split()
)


class NotSoundNet(SoundNetError):
    """The graph is not SoundNet: which module, what it has, and what is expected."""


@dataclass(frozen=True)
class Setting:
    """A field of a module that changes its numbers."""

    names: tuple[str, ...]  # the first that is there counts
    expected: Any
    default: Any = None  # what versions of Torch7 without the field do; None: it must be there


@dataclass
class Found:
    """SoundNet in a graph.

    Attributes:
        architecture: with the file's widths and head sizes.
        network: the container that holds it, where an interpreter starts.
        tensors: name in our state dict -> the file's tensor.
        inverse_std: names in `tensors` that hold 1 / sqrt(var + eps), as nn did until 2016.
        modules: Torch7 module number, or head's name -> the module's path in the file.
        ignored: what was left aside, in words.
    """

    architecture: Architecture
    network: LuaObject
    tensors: dict[str, Tensor] = field(default_factory=dict)
    inverse_std: set[str] = field(default_factory=set)
    modules: dict[int | str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)


def find_soundnet(source: T7File) -> Found:
    """Finds SoundNet in a parsed file.

    Raises:
        NotSoundNet: naming the module, what it has, and what is expected.
    """
    candidates = _containers(source.root)
    # Where none fits, the architecture that fits furthest explains what is wrong.
    attempts = [
        (_Match(template, network), where)
        for where, network in candidates
        for template in ARCHITECTURES.values()
    ]
    best, where = max(attempts, key=lambda attempt: (attempt[0].error is None, attempt[0].matched))
    fitting = sum(match.error is None for match, _ in attempts)
    if len(candidates) > 1 and fitting != 1:
        names = ", ".join(place for place, _ in candidates)
        raise NotSoundNet(
            f"the file holds a table with {len(candidates)} networks ({names}), {fitting} of them "
            "SoundNet, expected one"
        )
    if best.error is not None:
        raise best.error
    found = best.found
    found.ignored[:0] = source.notes + ([f"network found at {where}"] if where else [])
    claimed = sum(tensor.numel for tensor in found.tensors.values())
    if 2 * claimed > source.size:
        raise NotSoundNet(f"its parameters are {claimed:,} values, in a file of {source.size:,} bytes")
    return found


def load_state(found: Found) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """The state dict's (name, float32 array), loaded from the file one at a time.

    Raises:
        NotSoundNet: a parameter is not finite, or a variance + eps is not positive.
        T7Error: the file does not hold the numbers.
    """
    shapes = found.architecture.state_shapes()
    for name, tensor in found.tensors.items():
        stored = tensor.array()
        label = f"{tensor.class_name} for {name} at byte {tensor.offset:,}"
        if name in found.inverse_std:
            # a running average of 1 / sqrt(var + eps), so at most 1 / sqrt(eps)
            if not ((stored > 0) & (stored * math.sqrt(BATCH_NORM_EPS) <= 1.001)).all():
                raise NotSoundNet(
                    f"{label}: running_std from {stored.min():g} to {stored.max():g}, expected "
                    f"above 0 and up to {BATCH_NORM_EPS**-0.5:.1f}"
                )
            with np.errstate(over="ignore"):
                stored = stored.astype(np.float64) ** -2.0 - BATCH_NORM_EPS
        with np.errstate(over="ignore"):
            array = stored.astype(np.float32, copy=False).reshape(shapes[name])
        if not np.isfinite(array).all():
            count = int((~np.isfinite(array)).sum())
            raise NotSoundNet(f"{label}: {count:,} of its {array.size:,} values are NaN or infinite")
        if name.endswith("running_var") and not (array + np.float32(BATCH_NORM_EPS) > 0).all():
            raise NotSoundNet(f"{label}: variance {array.min():g}, expected variance + eps > 0")
        yield name, array


def _containers(root: Any) -> list[tuple[str, LuaObject]]:
    """(where, container) of all that may be the network; at the top, where is ""."""
    if isinstance(root, LuaObject):
        if class_of(root) not in _WRAPPERS:
            raise NotSoundNet(f"the file holds a {root.class_name}, expected an nn.Sequential")
        return [("", root)]
    if not isinstance(root, Table):
        name = getattr(root, "class_name", type(root).__name__)
        raise NotSoundNet(f"the file holds a {name}, expected an nn.Sequential")
    candidates: list[tuple[str, LuaObject]] = []
    seen: set[int] = set()
    level: list[tuple[str, Any]] = [("", root)]
    for _ in range(3):  # {model = net}, {state = {model = net}}, ...
        deeper: list[tuple[str, Any]] = []
        for path, table in level:
            for key, value in table.items():
                if id(value) in seen or not isinstance(value, (Table, LuaObject)):
                    continue
                seen.add(id(value))
                here = f"{path}[{shown(repr(key))}]"
                if isinstance(value, Table):
                    deeper.append((here, value))
                elif class_of(value) in _WRAPPERS:
                    candidates.append((here, value))
        level = deeper
    if not candidates:
        raise NotSoundNet("the file holds a table with 0 networks, expected one nn.Sequential")
    return candidates[:MAX_NAMES]


class _Leaves:
    """The modules that compute, one after the other: containers and do-nothing modules unfolded."""

    def __init__(self, ignored: list[str]) -> None:
        self.ignored = ignored
        self.visited = 0

    def below(
        self, module: LuaObject, path: str = "", above: tuple[int, ...] = ()
    ) -> Iterator[tuple[str, LuaObject]]:
        """(path, module) pairs; paths count from 1 as Torch7 does, "2.1" is a child of "2"."""
        kind, fields, label = class_of(module), module.fields, _label(path, module)
        self.visited += 1
        if self.visited > MAX_MODULES:
            raise NotSoundNet(f"the network unfolds to more than {MAX_MODULES:,} modules")
        if id(module) in above:
            raise NotSoundNet(f"{label} contains itself")
        for name in ("updateOutput", "forward"):
            if isinstance(fields.get(name), LuaFunction):
                raise NotSoundNet(f"{label} has a function {name} of its own, expected its class's")
        if kind in _WRAPPERS:
            children = _children(module, label)
            if kind == "DataParallelTable" and len(children) > 1:
                self.ignored.append(f"{label}: {len(children) - 1} copies of the network on other GPUs")
                children = children[:1]
            for number, child in enumerate(children, 1):
                yield from self.below(child, f"{path}.{number}".lstrip("."), (*above, id(module)))
        elif kind == "Copy" and not {fields.get("intype"), fields.get("outtype")} <= set(FLOATING):
            types = " to ".join(shown(fields.get(name)) for name in ("intype", "outtype"))
            raise NotSoundNet(f"{label} copies {types}, expected float types")
        elif kind in _DOING_NOTHING:
            self.ignored.append(f"{label}: does nothing")
        elif kind in ("Dropout", "SpatialDropout") and not fields.get("stochastic_inference"):
            # Dropout's second version, and only that, does nothing in evaluation (see interpreter).
            if fields.get("p", 0.5) != 0 and not (kind == "Dropout" and fields.get("v2") is True):
                raise NotSoundNet(
                    f"{label} scales by 1 - p in evaluation (p = {shown(fields.get('p', 0.5))}), "
                    "expected one that does nothing there (nn.Dropout with v2)"
                )
            self.ignored.append(f"{label}: does nothing in evaluation")
        else:
            yield path, module


def _label(path: str, module: LuaObject, what: str = "") -> str:
    inside = f"{module.class_name}, {what}" if what else module.class_name
    return f"module {path} ({inside})" if path else f"the network ({inside})"


def _children(module: LuaObject, label: str) -> list[LuaObject]:
    children = module.children()
    if children is None:
        raise NotSoundNet(f"{label} has no list of modules")
    return children


class _Match:
    """One architecture's table held against a network; `error` says where it does not fit."""

    def __init__(self, template: Architecture, network: LuaObject) -> None:
        self.template = template
        self.found = Found(template, network)
        self.leaves = _Leaves(self.found.ignored)
        self.queue = self.leaves.below(network)
        self.matched = 0  # modules matched so far
        self.error: NotSoundNet | None = None
        try:
            self._match()
        except NotSoundNet as error:
            self.error = error

    def _match(self) -> None:
        channels, widths = 1, []
        for block in self.template.blocks:
            conv = self._next(f"nn.SpatialConvolution ({block.name})", _CONVOLUTIONS)
            channels = self._convolution(conv, block, channels)
            self._batch_norm(self._next(f"nn.SpatialBatchNormalization ({block.norm})"), block, channels)
            self._relu(self._next(f"nn.ReLU ({block.name})"))
            if block.pool:
                self._pooling(self._next(f"nn.SpatialMaxPooling ({block.pooled})"), block)
            widths.append(channels)
        after = next(self.queue, None)
        sizes = {} if after is None else self._heads(after, channels)
        self.found.architecture = self.template.resized(widths, sizes)
        self._list_rest(self.queue)

    def _next(self, expected: str, classes: tuple[str, ...] = ()) -> tuple[str, LuaObject]:
        """The next module of the trunk, which must be of the class that `expected` names."""
        leaf = next(self.queue, None)
        expected = f"{expected} of {self.template.name}"
        if leaf is None:
            raise NotSoundNet(f"the network ends after {self.matched} modules, expected {expected}")
        path, module = leaf
        if class_of(module) not in (classes or (expected.split()[0].removeprefix("nn."),)):
            raise NotSoundNet(f"module {path} is {module.class_name}, expected {expected}")
        self.matched += 1
        self.found.modules[self.matched] = path
        return leaf

    def _heads(self, leaf: tuple[str, LuaObject], channels: int) -> dict[str, int]:
        path, module = leaf
        heads = self.template.heads
        if class_of(module) != "ConcatTable":
            raise NotSoundNet(
                f"module {path} is {module.class_name}, expected nn.ConcatTable of the two heads of "
                f"{self.template.name}, or the end of the network"
            )
        branches = _children(module, _label(path, module))
        if len(branches) != len(heads):
            raise NotSoundNet(
                f"{_label(path, module)} has {len(branches)} branches, expected {len(heads)} heads"
            )
        sizes = {}
        for number, (head, branch) in enumerate(zip(heads, branches, strict=True), 1):
            inside = self.leaves.below(branch, f"{path}.{number}", (id(module),))
            first = next(inside, None)
            if first is None or class_of(first[1]) not in _CONVOLUTIONS:
                raise NotSoundNet(
                    f"module {path}.{number} is {first[1].class_name if first else 'empty'}, "
                    f"expected nn.SpatialConvolution ({head.name})"
                )
            sizes[head.name] = self._convolution(first, head, channels)
            self.found.modules[head.name] = first[0]
            self._list_rest(inside)
        if list(sizes.values()) == [head.categories for head in reversed(heads)]:
            raise NotSoundNet(
                f"{_label(path, module)} has the {heads[1].categories} scenes first, expected the "
                f"{heads[0].categories} objects"
            )
        return sizes

    def _list_rest(self, rest: Iterator[tuple[str, LuaObject]]) -> None:
        """Names what follows the heads; it never matters, so nothing in it is an error."""
        names = []
        try:
            for path, module in rest:
                names.append(f"{path} ({module.class_name})")
        except NotSoundNet as error:
            names.append(str(error))
        if names:
            self.found.ignored.append(f"after the heads, not used: {_few(names)}")

    def _convolution(self, leaf: tuple[str, LuaObject], row: Block | Head, channels: int) -> int:
        module = leaf[1]
        label = self._settings(
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
            raise NotSoundNet(f"{label}: nOutputPlane is {shown(width)}, expected a number of channels")
        full = (width, channels, row.kernel, 1)
        flat = (width, channels * row.kernel)
        self._tensor(label, module, "weight", f"{row.name}.weight", full, flat)
        self._tensor(label, module, "bias", f"{row.name}.bias", (width,))
        return width

    def _batch_norm(self, leaf: tuple[str, LuaObject], block: Block, width: int) -> None:
        module = leaf[1]
        label = self._settings(
            leaf,
            block.norm,
            Setting(("eps",), BATCH_NORM_EPS, BATCH_NORM_EPS),
            Setting(("nDim",), 4, 4),
            Setting(("mode",), _SPATIAL, _SPATIAL[0]),
            used=("weight", "bias", "running_mean", "running_var", "running_std"),
        )
        for name in ("weight", "bias", "running_mean"):
            self._tensor(label, module, name, f"{block.norm}.{name}", (width,))
        variance = f"{block.norm}.running_var"
        # Class version 1 kept running_std, and version 2 of nn converts it when it reads such a file.
        old = module.fields.get("running_std") is not None
        if old and (module.version < 2 or module.fields.get("running_var") is None):
            self._tensor(label, module, "running_std", variance, (width,))
            self.found.inverse_std.add(variance)
        else:
            self._tensor(label, module, "running_var", variance, (width,))

    def _relu(self, leaf: tuple[str, LuaObject]) -> None:
        relu = "CUDNN_ACTIVATION_RELU"
        self._settings(
            leaf,
            "ReLU",
            Setting(("threshold",), 0, 0),
            Setting(("val",), 0, 0),
            Setting(("mode",), relu, relu),
        )

    def _pooling(self, leaf: tuple[str, LuaObject], block: Block) -> None:
        self._settings(
            leaf,
            block.pooled,
            Setting(("kW",), 1),
            Setting(("kH",), block.pool),
            Setting(("dW",), 1),
            Setting(("dH",), block.pool),
            Setting(("padW",), 0, 0),
            Setting(("padH",), 0, 0),
            Setting(("ceil_mode",), False, False),
            Setting(("mode",), _MAXIMUM, _MAXIMUM[0]),
        )

    def _settings(
        self, leaf: tuple[str, LuaObject], what: str, *settings: Setting, used: tuple[str, ...] = ()
    ) -> str:
        """Checks a module's settings and lists its unknown fields; returns its label for errors."""
        path, module = leaf
        label = _label(path, module, what)
        for setting in settings:
            name = next((n for n in setting.names if module.fields.get(n) is not None), None)
            value = setting.default if name is None else module.fields[name]
            if value is None:
                raise NotSoundNet(f"{label}: {setting.names[-1]} is missing, expected {setting.expected}")
            if not _same(value, setting.expected):
                expected = setting.expected
                raise NotSoundNet(
                    f"{label}: {name or setting.names[-1]} is {shown(value)}, "
                    f"expected {expected[0] if isinstance(expected, tuple) else expected}"
                )
        known = _HARMLESS.union(used, *(setting.names for setting in settings))
        unknown = sorted(shown(name) for name in module.fields if name not in known)
        if unknown:
            self.found.ignored.append(f"{label}: unknown fields {_few(unknown)}")
        return label

    def _tensor(
        self, label: str, module: LuaObject, field_name: str, name: str, *shapes: tuple[int, ...]
    ) -> None:
        tensor = module.fields.get(field_name)
        if not isinstance(tensor, Tensor):
            has = "is missing" if tensor is None else f"is a {type(tensor).__name__}"
            raise NotSoundNet(f"{label}: {field_name} {has}, expected a tensor of {_sizes(shapes[0])}")
        if tensor.shape not in shapes:
            raise NotSoundNet(
                f"{label}: {field_name} is {_sizes(tensor.shape)}, expected {_sizes(shapes[0])}"
            )
        if tensor.storage is None or tensor.storage.dtype.kind != "f":
            raise NotSoundNet(f"{label}: {field_name} is a {tensor.class_name}, expected floats")
        self.found.tensors[name] = tensor


def _few(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


def _same(value: Any, expected: Any) -> bool:
    if isinstance(expected, tuple):
        return any(_same(value, each) for each in expected)
    if isinstance(expected, float):  # eps: a float32's rounding of it is no difference
        return isinstance(value, float) and math.isclose(value, expected, rel_tol=1e-6)
    return type(value) is type(expected) and bool(value == expected)


def _sizes(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "nothing"
