"""Read binary Torch7 files, trusting nothing in them.

torchfile's reader is the base: it knows the plain values and the tds containers. What it takes on
faith is checked here: every count, size, stride, offset and index is compared with the bytes in the
file. Storages are not loaded but remembered by position, so that reading a file of any size costs
little; `Tensor.array()` loads just the elements that it shows. All errors are `T7Error`.

The binary form is little-endian: an int32 tag, then

    nil      0
    number   1  float64
    string   2  int32 length, bytes
    table    3  int32 index, int32 count, then count pairs of key and value
    object   4  int32 index, string "V <version>", string class name, then what its class writes:
                a tensor int32 dims, long sizes, long strides, long offset (from 1), its storage;
                a storage long count, raw elements; most others one table of their fields
    boolean  5  int32
    function 6  string of bytecode, upvalues; 7 and 8 likewise, with an index before the string

An index that was read before stands for the same object again. Strings are int32 length, bytes;
longs have 8 bytes, or 4 in files from 32-bit machines.
"""

from __future__ import annotations

import os
import re
import struct
from typing import Any, BinaryIO

import numpy as np
import torchfile

from soundnet_port.conversion.t7_objects import (
    LuaFunction,
    LuaObject,
    Storage,
    T7Error,
    Table,
    Tensor,
    format_value,
)

MAX_DEPTH = 150  # nested values; a network nested in 30 containers is far below
MAX_VALUES = 100_000  # tables, strings, numbers...; a SoundNet file has about 3,000. Plus one per
BYTES_PER_VALUE = 64  # bytes of the file, so that all values take no more than about twice its size
MAX_DIMENSIONS = 32

_ELEMENTS = {
    "Byte": "u1",
    "Char": "i1",
    "Short": "<i2",
    "Int": "<i4",
    "Long": "<i8",
    "Half": "<f2",
    "Float": "<f4",
    "Double": "<f8",
}
# torch.FloatTensor, torch.CudaDoubleTensor...; torch.CudaTensor without a type is float
_DTYPES = {f"torch.{device}{name}": dtype for device in ("", "Cuda") for name, dtype in _ELEMENTS.items()} | {
    "torch.Cuda": "<f4"
}
_CLASS = re.compile(r"[A-Za-z_][\w.:]{0,99}\Z", re.ASCII)


class BinaryReader(torchfile.T7Reader):  # type: ignore[misc]
    """A reader of the grammar, with all checks, over binary tokens."""

    form = "binary"

    def __init__(self, f: BinaryIO, size: int, long_bytes: int) -> None:
        super().__init__(f, use_list_heuristic=False, use_int_heuristic=True)
        self.size = size
        self.long_bytes = long_bytes
        self.depth = 0
        self.values = 0
        self.notes: list[str] = []

    # ---- tokens

    def take(self, count: int, expected: str) -> bytes:
        """Read the next `count` bytes."""
        at = self.f.tell()
        left = self.size - at
        if not 0 <= count <= left:
            raise T7Error(at, f"{left:,} bytes up to the end of the file", f"{count:,} bytes of {expected}")
        data: bytes = self.f.read(count)
        if len(data) != count:
            raise T7Error(at, f"only {len(data):,} bytes", f"{count:,} bytes of {expected}")
        return data

    def read_int(self) -> int:
        """Read a tag, index, length or count: never negative in a file of Torch7's."""
        at = self.f.tell()
        value = self.read_int32()
        if value < 0:
            raise T7Error(at, f"{value}", "a tag, an index or a count of 0 or more")
        return value

    def read_int32(self) -> int:
        return int(struct.unpack("<i", self.take(4, "an integer"))[0])

    def read_double(self) -> float:
        return float(struct.unpack("<d", self.take(8, "a number"))[0])

    def read_boolean(self) -> bool:
        at = self.f.tell()
        value = self.read_int()
        if value > 1:
            raise T7Error(at, f"the boolean {value}", "0 or 1")
        return value == 1

    def read_long(self) -> int:
        return self.read_long_array(1)[0]

    def read_long_array(self, n: int) -> list[int]:
        raw = self.take(n * self.long_bytes, "sizes")
        return list(struct.unpack(f"<{n}{'q' if self.long_bytes == 8 else 'i'}", raw))

    def read_string(self, disable_utf8: bool = False) -> str:
        return self.take(self.read_int(), "a string").decode("latin-1")

    def least_bytes(self, dtype: np.dtype[Any]) -> int:
        """Return the least bytes that an element of a storage takes in the file."""
        return dtype.itemsize

    def skip_elements(self, dtype: np.dtype[Any], count: int) -> None:
        self.f.seek(count * dtype.itemsize, os.SEEK_CUR)

    def elements(self, storage: Storage, first: int, count: int) -> np.ndarray[Any, Any]:
        dtype = storage.dtype
        self.f.seek(storage.offset + first * dtype.itemsize)
        data = np.empty(count, dtype)
        if self.f.readinto(data.view(np.uint8)) != data.nbytes:
            raise T7Error(storage.offset, "fewer bytes than when it was first read", f"{data.nbytes:,}")
        return data

    # ---- grammar

    def read_obj(self) -> Any:
        at = self.f.tell()
        self.values += 1
        limit = MAX_VALUES + self.size // BYTES_PER_VALUE
        if self.values > limit:
            raise T7Error(at, f"more than {limit:,} values", "a network, which has a few thousand")
        if self.depth >= MAX_DEPTH:
            raise T7Error(at, f"values nested more than {MAX_DEPTH} deep", "a network")
        self.depth += 1
        try:
            tag = self.read_int()
            if tag == torchfile.TYPE_TABLE:
                return self._table(at)
            if tag == torchfile.TYPE_TORCH:
                return self._torch(at)
            if tag in (
                torchfile.TYPE_FUNCTION,
                torchfile.LEGACY_TYPE_RECUR_FUNCTION,
                torchfile.TYPE_RECUR_FUNCTION,
            ):
                return self._function(at, indexed=tag != torchfile.TYPE_FUNCTION)
            if tag not in (
                torchfile.TYPE_NIL,
                torchfile.TYPE_NUMBER,
                torchfile.TYPE_STRING,
                torchfile.TYPE_BOOLEAN,
            ):
                raise T7Error(at, f"the type tag {tag}", "one from 0 to 8")
            self.f.seek(at)  # torchfile reads plain values
            return super().read_obj()
        finally:
            self.depth -= 1

    def _read_index(self, at: int, kind: type | tuple[type, ...]) -> tuple[int, Any]:
        """Read an index; return it with the object it already stands for, if any."""
        index = self.read_int()
        if index not in self.objects:
            return index, None
        known = self.objects[index]
        if known is None:
            raise T7Error(at, f"object {index} inside itself", "a tensor or storage of its own")
        if not isinstance(known, kind):
            raise T7Error(at, f"index {index}, which is a {type(known).__name__}", "the same kind of object")
        return index, known

    def _table(self, at: int) -> Table:
        index, known = self._read_index(at, Table)
        if known is not None:
            return known  # type: ignore[no-any-return]
        table = self.objects[index] = Table()
        self._pairs(table, self.read_int())
        return table

    def _pairs(self, table: Table, count: int) -> None:
        for _ in range(count):
            at = self.f.tell()
            key = self.read_obj()
            if key is None or key != key or key in table:
                raise T7Error(at, f"the table key {format_value(key)}", "a new key that is not nil or NaN")
            table[key] = self.read_obj()

    def _function(self, at: int, indexed: bool) -> LuaFunction:
        index, known = self._read_index(at, LuaFunction) if indexed else (0, None)
        if known is not None:
            return known  # type: ignore[no-any-return]
        size = self.read_int()
        function = LuaFunction(at, size)
        self.take(size, "a function's bytecode")
        if indexed:
            self.objects[index] = function
        self.notes.append(f"byte {at:,}: skipped a Lua function ({size:,} bytes of bytecode)")
        self.read_obj()  # its upvalues
        return function

    def _torch(self, at: int) -> Any:
        index, known = self._read_index(at, (LuaObject, Tensor, Storage, Table))
        if known is not None:
            return known
        version, name = 0, self.read_string()
        match = re.fullmatch(r"V (-?\d{1,9})", name)
        if match:  # older files have the class name without a version before it
            version, name = int(match[1]), self.read_string()
        if not _CLASS.match(name):
            raise T7Error(at, f"the class name {format_value(name)!r}", "one like nn.Sequential")
        kind = name.removesuffix("Tensor").removesuffix("Storage")
        if kind in _DTYPES and name != kind:
            self.objects[index] = None  # while it is read, nothing inside it may refer to it
            read = self._tensor if name.endswith("Tensor") else self._storage
            self.objects[index] = read(at, name, np.dtype(_DTYPES[kind]))
        elif name in ("tds.Hash", "tds.Vec"):
            self.objects[index] = table = Table()
            self._tds(table, name)
        else:
            self.objects[index] = instance = LuaObject(name, version)
            self._fields(at, instance)
        return self.objects[index]

    def _tds(self, table: Table, name: str) -> None:
        count = self.read_int()
        self.read_obj()  # the allocator
        if name == "tds.Hash":
            self._pairs(table, count)
        else:
            for i in range(1, count + 1):
                table[i] = self.read_obj()

    def _fields(self, at: int, instance: LuaObject) -> None:
        if instance.class_name == "nn.DataParallelTable" and instance.version >= 2:
            self.read_obj()  # it writes its GPU assignments before its fields
        fields = self.read_obj()
        if fields is None or type(fields) is not Table:
            raise T7Error(at, f"{instance.class_name} without a table of fields", "its fields")
        instance.fields = fields

    def _storage(self, at: int, name: str, dtype: np.dtype[Any]) -> Storage:
        if name.endswith("LongStorage") and self.long_bytes == 4 and self.form == "binary":
            dtype = np.dtype("<i4")
        count = self.read_long()
        start = self.f.tell()
        left = self.size - start
        if not 0 <= count <= left // self.least_bytes(dtype):
            raise T7Error(
                start, f"{left:,} bytes up to the end of the file", f"the {count:,} elements of a {name}"
            )
        self.skip_elements(dtype, count)
        return Storage(name, dtype, count, start, self)

    def _tensor(self, at: int, name: str, dtype: np.dtype[Any]) -> Tensor:
        dimensions = self.read_int()
        if dimensions > MAX_DIMENSIONS:
            raise T7Error(at, f"a {name} of {dimensions:,} dimensions", f"at most {MAX_DIMENSIONS}")
        shape = tuple(self.read_long_array(dimensions))
        strides = tuple(self.read_long_array(dimensions))
        first = self.read_long() - 1
        storage = self.read_obj()
        tensor = Tensor(name, storage, first, shape, strides, at)
        if storage is not None and (
            not isinstance(storage, Storage) or storage.class_name != name.removesuffix("Tensor") + "Storage"
        ):
            other = getattr(storage, "class_name", type(storage).__name__)
            raise T7Error(at, f"a {name} on a {other}", f"{name.removesuffix('Tensor')}Storage")
        if min(shape, default=1) < 1 or min(strides, default=0) < 0 or first < 0:
            raise T7Error(
                at,
                f"a {name} of sizes {shape}, strides {strides}, offset {first + 1}",
                "sizes from 1 (an empty tensor has none), strides from 0, an offset from 1",
            )
        if tensor.numel:
            last = first + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
            count = storage.count if storage else 0
            if last >= count:
                raise T7Error(
                    at,
                    f"a {name} of sizes {shape}, strides {strides}, offset {first + 1} "
                    f"on a storage of {count:,} elements",
                    f"at least {last + 1:,} elements",
                )
        return tensor
