"""Arrays out of a pickle that nobody trusts, without running any of it.

`sound8.npy` is a dict of arrays that numpy pickled under Python 2. Python's own unpickler would run
whatever such a file asks for; this one only ever builds plain data and says what it will not do.
"""

from __future__ import annotations

import io
import math
import pickletools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soundnet_port.conversion.t7 import shown

MAX_STEPS = 1_000_000  # sound8.npy takes about 1,000

# What a pickled array asks for, before and since numpy 2; the last is bytes in Python 3's old protocols
_MAKERS = (
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.dtype",
    "_codecs.encode",
)


class _Global(str):
    """A name that a pickle wants imported; it never is."""


@dataclass
class Made:
    """What a pickle wants made by calling `maker`; it is never called."""

    maker: str
    arguments: Any
    state: Any = None


_MARK = object()


def unpickled(data: io.BytesIO) -> Any:
    """What a pickle describes, as plain data: nothing is imported, called or set.

    The standard library takes the file apart; of its opcodes those are understood that numpy and
    plain containers need, in the protocols of Python 2 and 3.
    """
    stack: list[Any] = []
    memo: dict[Any, Any] = {}

    def from_mark() -> list[Any]:
        at = next(i for i in range(len(stack) - 1, -1, -1) if stack[i] is _MARK)
        above = stack[at + 1 :]
        del stack[at:]
        return above

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
            stack.append({"TUPLE": tuple, "LIST": list}[name](from_mark()))
        elif name == "DICT":
            items = from_mark()
            stack.append(_pairs(items))
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else from_mark()
            stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else from_mark()
            stack[-1].update(_pairs(items))
        elif name == "GLOBAL":
            stack.append(_Global(str(argument).replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            module, name = stack.pop(-2), stack.pop()
            if type(module) is not str or type(name) is not str:
                raise ValueError("its pickle has a name that is no text")
            stack.append(_Global(f"{module}.{name}"))
        elif name == "REDUCE":
            arguments, maker = stack.pop(), stack.pop()
            if not isinstance(maker, _Global) or maker not in _MAKERS:
                what = shown(maker) if isinstance(maker, _Global) else f"a {type(maker).__name__}"
                raise ValueError(f"its pickle wants to call {what}, which is not done here")
            stack.append(Made(maker, arguments))
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
    raise ValueError("its pickle has no end")


def _pairs(items: list[Any]) -> dict[Any, Any]:
    # nothing else for keys: hashing nested tuples can take for ever
    if not all(type(key) in (str, bytes, int) for key in items[::2]):
        raise ValueError("its pickle has a dict with keys that are no names")
    return dict(zip(items[::2], items[1::2], strict=True))


def text(value: Any) -> str:
    if type(value) not in (str, bytes, int):
        raise ValueError(f"has a {type(value).__name__} for a name")
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _bytes(value: Any) -> bytes:
    if isinstance(value, Made) and value.maker == "_codecs.encode":
        value = value.arguments[0]
    if isinstance(value, str):
        return value.encode("latin-1")
    if not isinstance(value, (bytes, bytearray)):
        raise ValueError(f"has a {type(value).__name__} for bytes")
    return bytes(value)


def as_array(value: Any, name: str) -> NDArray[np.float32]:
    """The float32 array that a pickled ndarray describes."""
    if not (isinstance(value, Made) and value.maker.endswith("multiarray._reconstruct")):
        raise ValueError(f"{name} is a {type(value).__name__}, expected an array")
    *_, shape, dtype, fortran, data = value.state
    code, order = text(dtype.arguments[0]), text(dtype.state[1])
    if code not in ("f2", "f4", "f8") or order not in ("<", ">", "=", "|"):
        raise ValueError(f"{name} is of type {shown(order + code)}, expected floats")
    raw, kind = _bytes(data), np.dtype(order + code)
    if type(shape) is not tuple or any(type(size) is not int or size < 0 for size in shape):
        raise ValueError(f"{name} has a shape that is none")
    if math.prod(shape) * kind.itemsize != len(raw):
        raise ValueError(f"{name} is {tuple(shape)} of {kind}, but has {len(raw):,} bytes")
    array = np.frombuffer(raw, kind).reshape(shape, order="F" if fortran else "C")
    with np.errstate(over="ignore"):
        result: NDArray[np.float32] = array.astype(np.float32)
        return result
