"""Find the containers in a Torch7 file that may be a network, and unfold them into their leaf modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from soundnet_port.conversion.interpreter import FLOATING, module_class
from soundnet_port.conversion.t7_objects import LuaFunction, LuaObject, Table, format_value
from soundnet_port.errors import SoundNetError

MAX_MODULES = 1_000
MAX_CONTAINERS = 8  # of a table that are tried as networks
MAX_TABLE_DEPTH = 3  # {model = net}, {state = {model = net}}, ...

_WRAPPERS = ("Sequential", "DataParallelTable", "GPU")
_NO_OPS = ("Identity", "Contiguous", "Copy")


class MappingError(SoundNetError):
    """A graph that is not SoundNet: the module, its setting, and the expected one."""


def find_containers(root: Any) -> list[tuple[str, LuaObject]]:
    """Find the containers that may be the network.

    Returns:
        (position, container) pairs; the position of the file's own object is "".

    Raises:
        MappingError: there is none.
    """
    if isinstance(root, LuaObject):
        if module_class(root) not in _WRAPPERS:
            raise MappingError(f"the file holds a {root.class_name}, expected an nn.Sequential")
        return [("", root)]
    if not isinstance(root, Table):
        name = getattr(root, "class_name", type(root).__name__)
        raise MappingError(f"the file holds a {name}, expected an nn.Sequential")
    candidates: list[tuple[str, LuaObject]] = []
    seen: set[int] = set()
    level: list[tuple[str, Any]] = [("", root)]
    for _ in range(MAX_TABLE_DEPTH):
        deeper: list[tuple[str, Any]] = []
        for path, table in level:
            for key, value in table.items():
                if id(value) in seen or not isinstance(value, (Table, LuaObject)):
                    continue
                seen.add(id(value))
                position = f"{path}[{format_value(repr(key))}]"
                if isinstance(value, Table):
                    deeper.append((position, value))
                elif module_class(value) in _WRAPPERS:
                    candidates.append((position, value))
        level = deeper
    if not candidates:
        raise MappingError("the file holds a table with 0 networks, expected one nn.Sequential")
    return candidates[:MAX_CONTAINERS]


class GraphWalker:
    """A walk over the modules of a network that compute; what does nothing is noted in `ignored`."""

    def __init__(self, ignored: list[str]) -> None:
        self.ignored = ignored
        self.visited = 0

    def leaves(
        self, module: LuaObject, path: str = "", ancestors: tuple[int, ...] = ()
    ) -> Iterator[tuple[str, LuaObject]]:
        """Yield (path, leaf module) pairs in order; paths count from 1, "2.1" is a child of "2".

        Raises:
            MappingError: a module changes the numbers, or the graph is cyclic or too large.
        """
        kind, fields, label = module_class(module), module.fields, module_label(path, module)
        self.visited += 1
        if self.visited > MAX_MODULES:
            raise MappingError(f"the network unfolds to more than {MAX_MODULES:,} modules")
        if id(module) in ancestors:
            raise MappingError(f"{label} contains itself")
        for name in ("updateOutput", "forward"):
            if isinstance(fields.get(name), LuaFunction):
                raise MappingError(f"{label} has a function {name} of its own, expected its class's")
        if kind in _WRAPPERS:
            children = list_children(module, label)
            if kind == "DataParallelTable" and len(children) > 1:
                self.ignored.append(f"{label}: {len(children) - 1} copies of the network on other GPUs")
                children = children[:1]
            for number, child in enumerate(children, 1):
                yield from self.leaves(child, f"{path}.{number}".lstrip("."), (*ancestors, id(module)))
        elif kind == "Copy" and not {fields.get("intype"), fields.get("outtype")} <= set(FLOATING):
            types = " to ".join(format_value(fields.get(name)) for name in ("intype", "outtype"))
            raise MappingError(f"{label} copies {types}, expected float types")
        elif kind in _NO_OPS:
            self.ignored.append(f"{label}: does nothing")
        elif kind in ("Dropout", "SpatialDropout") and not fields.get("stochastic_inference"):
            # Dropout's second version, and only that, does nothing in evaluation (see interpreter).
            if fields.get("p", 0.5) != 0 and not (kind == "Dropout" and fields.get("v2") is True):
                raise MappingError(
                    f"{label} scales by 1 - p in evaluation (p = {format_value(fields.get('p', 0.5))}), "
                    "expected one that does nothing there (nn.Dropout with v2)"
                )
            self.ignored.append(f"{label}: does nothing in evaluation")
        else:
            yield path, module


def module_label(path: str, module: LuaObject, name: str = "") -> str:
    """Name a module for messages: its path, class and the layer's name."""
    detail = f"{module.class_name}, {name}" if name else module.class_name
    return f"module {path} ({detail})" if path else f"the network ({detail})"


def list_children(module: LuaObject, label: str) -> list[LuaObject]:
    """Return a container's modules.

    Raises:
        MappingError: it has no list of modules.
    """
    children = module.children()
    if children is None:
        raise MappingError(f"{label} has no list of modules")
    return children
