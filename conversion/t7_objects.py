"""The values in a Torch7 file: Lua tables, objects and functions, storages and tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol

import numpy as np

from soundnet_port.errors import SoundNetError


class ElementReader(Protocol):
    """A reader that loads elements of storages."""

    size: int  #: bytes of the file

    def elements(self, storage: Storage, first: int, count: int) -> np.ndarray[Any, Any]:
        """Load `count` elements of a storage, from element `first` on."""


def format_value(value: object, width: int = 60) -> str:
    """Format a value from a file as one short line, without control characters."""
    text = str(value)[: 4 * width]
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= width else f"{text[: width - 3]}..."


class T7Error(SoundNetError):
    """A damaged file, or not a Torch7 file.

    Attributes:
        offset: byte position in the file.
        found: what is there, in words.
        expected: what should be there, in words.
    """

    def __init__(self, offset: int, found: str, expected: str) -> None:
        super().__init__(f"byte {offset:,}: found {found}, expected {expected}")
        self.offset, self.found, self.expected = offset, found, expected


class Table(dict[Any, Any]):
    """A Lua table, compared and hashed by identity: tables may be keys of tables."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other

    def __repr__(self) -> str:
        # without the contents, which may be cyclic
        return f"a table of {len(self):,} entries"

    def items_in_order(self) -> list[Any] | None:
        """Return the values of the keys 1 to n; None if the table is not such a list."""
        if all(type(key) is int for key in self) and set(self) == set(range(1, len(self) + 1)):
            return [self[i] for i in range(1, len(self) + 1)]
        return None


@dataclass(eq=False)
class LuaObject:
    """An instance of a Torch7 class that is neither tensor nor storage, such as a module."""

    class_name: str  #: "nn.Sequential"
    version: int  #: of the class, 0 in files older than class versions
    fields: Table = field(default_factory=Table, repr=False)

    def children(self) -> list[LuaObject] | None:
        """Return a container's modules, in order; None if it has no valid list of them."""
        table = self.fields.get("modules")
        modules = table.items_in_order() if isinstance(table, Table) else None
        if modules is None or not all(isinstance(module, LuaObject) for module in modules):
            return None
        return modules


@dataclass(eq=False)
class LuaFunction:
    """A Lua function's position. Its bytecode is skipped: nothing from the file is ever run."""

    offset: int
    size: int  # bytes of bytecode


@dataclass(eq=False)
class Storage:
    """A run of elements in the file, not loaded."""

    class_name: str
    dtype: np.dtype[Any]
    count: int  #: elements
    offset: int  #: of the first element in the file, in bytes
    reader: ElementReader = field(repr=False)

    def elements(self, first: int, count: int) -> np.ndarray[Any, Any]:
        """Load `count` elements from element `first` on; the caller checks the range."""
        return self.reader.elements(self, first, count)


@dataclass(eq=False)
class Tensor:
    """A view into a storage; all of its elements lie inside."""

    class_name: str
    storage: Storage | None = field(repr=False)
    first: int  #: index of the first element in the storage, from 0
    shape: tuple[int, ...]
    strides: tuple[int, ...]  #: in elements
    offset: int  #: of the tensor in the file

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape) if self.shape else 0

    def array(self) -> np.ndarray[Any, Any]:
        """Load the elements as a new contiguous array of the file's type.

        Raises:
            T7Error: an expanded view of more elements than the file can hold, or an ascii
                storage whose text is not numbers.
        """
        if self.storage is None or not self.numel:
            return np.empty(self.shape or (0,), np.float32)
        if 2 * self.numel > self.storage.reader.size:
            raise T7Error(self.offset, f"a view of {self.numel:,} elements", "no more than the file holds")
        span = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        elements = self.storage.elements(self.first, span)
        # the stride of a dimension of size 1 may be any number
        strides = [s if n > 1 else 1 for n, s in zip(self.shape, self.strides, strict=True)]
        byte_strides = [s * elements.itemsize for s in strides]
        view = np.lib.stride_tricks.as_strided(elements, self.shape, byte_strides)
        return np.ascontiguousarray(view)
