"""Describe a Torch7 file as text: classes, settings and shapes, whether SoundNet or not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from soundnet_port.conversion.convert import describe
from soundnet_port.conversion.graph import MappingError
from soundnet_port.conversion.mapping import find_soundnet, load_state
from soundnet_port.conversion.recognition import recognize
from soundnet_port.conversion.t7 import T7File
from soundnet_port.conversion.t7_objects import LuaObject, Storage, T7Error, Table, Tensor

MAX_LINES = 2_000

# Printed in this order, before all other numbers, booleans and strings
_SETTINGS = "nInputPlane nOutputPlane kW kH dW dH padW padH eps ceil_mode".split()
_TENSORS = "weight bias running_mean running_var running_std".split()
_OMITTED = set(
    "_type train momentum inplace affine name nElem input_offset output_offset weight_offset".split()
)


def describe_t7(file: T7File) -> Iterator[str]:
    """Yield lines that describe a parsed file, and whether it is a SoundNet."""
    yield f"{file.name}: Torch7, {file.form}, {file.size:,} bytes"
    for number, line in enumerate(_tree(file.root, "", 1, set())):
        if number == MAX_LINES:
            yield f"  ... more than {MAX_LINES:,} lines"
            break
        yield line
    try:
        mapping = find_soundnet(file)
        state = dict(load_state(mapping))
    except (MappingError, T7Error) as error:
        yield f"not convertible: {error}"
        return
    parameters = sum(a.size for name, a in state.items() if "running" not in name)
    yield f"{describe(mapping.architecture)}; {parameters:,} parameters"
    yield recognize(mapping.architecture, state).summary
    for note in mapping.ignored:
        yield f"  note: {note}"


def _tree(value: Any, path: str, depth: int, ancestors: set[int]) -> Iterator[str]:
    indent = "  " * depth
    if isinstance(value, LuaObject):
        head = indent + f"{path} {value.class_name}".lstrip()
        if id(value) in ancestors:
            yield f"{head} (itself)"
            return
        yield f"{head}  {_summary(value.fields)}".rstrip()
        modules = value.fields.get("modules")
        children = modules.items_in_order() if isinstance(modules, Table) else None
        for number, child in enumerate(children or [], 1):
            yield from _tree(child, f"{path}.{number}".lstrip("."), depth + 1, ancestors | {id(value)})
    elif isinstance(value, Table):
        if id(value) in ancestors:
            yield f"{indent}{path} (itself)"
            return
        yield f"{indent}{path or 'a table'} of {len(value):,} entries"
        for key, child in value.items():
            yield from _tree(child, f"[{str(key)[:40]!r}]", depth + 1, ancestors | {id(value)})
    else:
        yield f"{indent}{path} {_format(value)}".rstrip()


def _summary(fields: Table) -> str:
    names = [name for name in _SETTINGS if name in fields]
    names += sorted(
        str(name)
        for name, value in fields.items()
        if name not in {*_SETTINGS, *_OMITTED} and isinstance(value, (bool, int, float, str))
    )
    texts = [f"{name}={_format(fields.get(name))}" for name in names]
    texts += [f"{name} {_format(fields[name])}" for name in _TENSORS if isinstance(fields.get(name), Tensor)]
    return " ".join(texts)


def _format(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.class_name.removeprefix('torch.')} {'x'.join(map(str, value.shape)) or 'empty'}"
    if isinstance(value, Storage):
        return f"{value.class_name.removeprefix('torch.')} of {value.count:,}"
    if isinstance(value, (LuaObject, Table)) or value is None:
        return "nil" if value is None else type(value).__name__
    return repr(value)[:60] if isinstance(value, (str, float, int)) else type(value).__name__
