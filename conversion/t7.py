"""Reads Torch7's serialised objects, and trusts nothing in the file.

torchfile's reader is the base: it knows the plain values and the tds containers. What it takes on
faith is checked here. Every count, size, stride, offset and index is compared with the bytes that
there are; storages are not loaded but remembered by position, so that reading a file of any size
costs little, and `Tensor.array()` loads just the elements it shows. All trouble is a `T7Error`.

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
longs have 8 bytes, or 4 in files from 32-bit machines. The ascii form writes the same tokens as
text, one to a line, the elements of an array separated by single spaces.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torchfile

from soundnet_port.errors import SoundNetError

MAX_DEPTH = 150  # nested values; a network nested in 30 containers is far below
MAX_VALUES = 100_000  # tables, strings, numbers...; a SoundNet file has about 3,000. Plus one per
BYTES_PER_VALUE = 64  # bytes of the file, so that all values take no more than about twice its size
MAX_DIGITS = 40  # of an ascii number; Torch7 writes up to 24
MAX_DIMENSIONS = 32
MAX_MEMBER_BYTES = 1 << 30  # of a zip's member, unpacked; the released files have about 115 MB
MAX_MEMBER_RATIO = 60  # unpacked to packed; weights hardly pack, zeroed gradients pack away

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
_NUMBER = re.compile(rb"[-+]?(\d+\.?\d*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|nan|inf)$", re.I)
_INTEGER = re.compile(rb"-?\d{1,20}$")
_CLASS = re.compile(r"[A-Za-z_][\w.:]{0,99}\Z", re.ASCII)


def shown(value: object, width: int = 60) -> str:
    """A value from a file as short text in one line, without control characters."""
    text = str(value)[: 4 * width]
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= width else f"{text[: width - 3]}..."


class T7Error(SoundNetError):
    """The file is not what it says: where, what was found, and what was expected there.

    Attributes:
        offset: byte position in the file.
        found: in words.
        expected: in words.
    """

    def __init__(self, offset: int, found: str, expected: str) -> None:
        super().__init__(f"byte {offset:,}: found {found}, expected {expected}")
        self.offset, self.found, self.expected = offset, found, expected


class Table(dict[Any, Any]):
    """A Lua table. Compared and hashed by identity, since Lua tables may be keys of others."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other

    def __repr__(self) -> str:
        # not its contents: tables may hold each other, and then those are without end
        return f"a table of {len(self):,} entries"

    def items_in_order(self) -> list[Any] | None:
        """Values of the keys 1 to n, or None where the table is not such a list."""
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
        """The modules inside a container, in order; None where it has no proper list of them."""
        table = self.fields.get("modules")
        listed = table.items_in_order() if isinstance(table, Table) else None
        if listed is None or not all(isinstance(child, LuaObject) for child in listed):
            return None
        return listed


@dataclass(eq=False)
class LuaFunction:
    """A function's place. Its bytecode is skipped: nothing from the file is ever run."""

    offset: int
    size: int  # bytes of bytecode


@dataclass(eq=False)
class Storage:
    """A run of elements in the file, not loaded."""

    class_name: str
    dtype: np.dtype[Any]
    count: int  # elements
    offset: int  # bytes into the file where the elements begin
    reader: _Reader = field(repr=False)

    def elements(self, first: int, count: int) -> np.ndarray[Any, Any]:
        """`count` elements from number `first` on, checked by the caller to lie inside."""
        return self.reader.elements(self, first, count)


@dataclass(eq=False)
class Tensor:
    """A view into a storage; every element it shows lies inside."""

    class_name: str
    storage: Storage | None = field(repr=False)
    first: int  #: index of the first element in the storage, from 0
    shape: tuple[int, ...]
    strides: tuple[int, ...]  #: in elements
    offset: int  #: of the tensor in the file

    @property
    def numel(self) -> int:
        return prod(self.shape) if self.shape else 0

    def array(self) -> np.ndarray[Any, Any]:
        """The elements as a new contiguous array of the file's type.

        Raises:
            T7Error: an expanded view of more elements than the file can hold, or an ascii
                storage whose text is not numbers.
        """
        if self.storage is None or not self.numel:
            return np.empty(self.shape or (0,), np.float32)
        if 2 * self.numel > self.storage.reader.size:
            raise T7Error(self.offset, f"a view of {self.numel:,} elements", "no more than the file holds")
        span = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        run = self.storage.elements(self.first, span)
        # the stride of a single one says nothing, and may be any number
        strides = [s if n > 1 else 1 for n, s in zip(self.shape, self.strides, strict=True)]
        steps = [s * run.itemsize for s in strides]
        view = np.lib.stride_tricks.as_strided(run, self.shape, steps)
        return np.ascontiguousarray(view)


@dataclass
class T7File:
    """A parsed file; its tensors can be loaded while it is open."""

    name: str  #: path, or "archive.zip/member.t7"
    root: Any
    form: str  #: "binary", "ascii", "binary with 32-bit longs"...
    size: int  #: bytes
    notes: list[str]  #: what was skipped
    stream: BinaryIO

    def sha256(self) -> str:
        """Of the whole file (for a member of a zip: unpacked)."""
        digest = hashlib.sha256()
        self.stream.seek(0)
        while chunk := self.stream.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()


class _Reader(torchfile.T7Reader):  # type: ignore[misc]
    """The grammar, with all checks, over the binary tokens."""

    form = "binary"

    def __init__(self, f: BinaryIO, size: int, long_bytes: int) -> None:
        super().__init__(f, use_list_heuristic=False, use_int_heuristic=True)
        self.size = size
        self.long_bytes = long_bytes
        self.depth = 0
        self.values = 0
        self.notes: list[str] = []

    # ---- tokens

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes."""
        at = self.f.tell()
        left = self.size - at
        if not 0 <= count <= left:
            raise T7Error(at, f"{left:,} bytes up to the end of the file", f"{count:,} bytes of {what}")
        data: bytes = self.f.read(count)
        if len(data) != count:
            raise T7Error(at, f"only {len(data):,} bytes", f"{count:,} bytes of {what}")
        return data

    def read_int(self) -> int:
        """A tag, index, length or count: never negative in any file that Torch7 wrote."""
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
        """Bytes that an element of a storage takes in the file, at least."""
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
        most = MAX_VALUES + self.size // BYTES_PER_VALUE
        if self.values > most:
            raise T7Error(at, f"more than {most:,} values", "a network, which has a few thousand")
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
            self.f.seek(at)  # plain values are torchfile's own
            return super().read_obj()
        finally:
            self.depth -= 1

    def _seen(self, at: int, kind: type | tuple[type, ...]) -> tuple[int, Any]:
        """The index that follows, and the object that it stood for before, if any."""
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
        index, known = self._seen(at, Table)
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
                raise T7Error(at, f"the table key {shown(key)}", "a new key that is not nil or NaN")
            table[key] = self.read_obj()

    def _function(self, at: int, indexed: bool) -> LuaFunction:
        index, known = self._seen(at, LuaFunction) if indexed else (0, None)
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
        index, known = self._seen(at, (LuaObject, Tensor, Storage, Table))
        if known is not None:
            return known
        version, name = 0, self.read_string()
        numbered = re.fullmatch(r"V (-?\d{1,9})", name)
        if numbered:  # older files have no versions, the class name comes at once
            version, name = int(numbered[1]), self.read_string()
        if not _CLASS.match(name):
            raise T7Error(at, f"the class name {shown(name)!r}", "one like nn.Sequential")
        kind = name.removesuffix("Tensor").removesuffix("Storage")
        if kind in _DTYPES and name != kind:
            self.objects[index] = None  # in work: nothing inside it may point back to it
            read = self._tensor if name.endswith("Tensor") else self._storage
            self.objects[index] = read(at, name, np.dtype(_DTYPES[kind]))
        elif name in ("tds.Hash", "tds.Vec"):
            self.objects[index] = table = Table()
            self._tds(table, name)
        else:
            self.objects[index] = made = LuaObject(name, version)
            self._fields(at, made)
        return self.objects[index]

    def _tds(self, table: Table, name: str) -> None:
        count = self.read_int()
        self.read_obj()  # the allocator
        if name == "tds.Hash":
            self._pairs(table, count)
        else:
            for i in range(1, count + 1):
                table[i] = self.read_obj()

    def _fields(self, at: int, made: LuaObject) -> None:
        if made.class_name == "nn.DataParallelTable" and made.version >= 2:
            self.read_obj()  # it writes its GPU assignments before its fields
        fields = self.read_obj()
        if fields is None or type(fields) is not Table:
            raise T7Error(at, f"{made.class_name} without a table of fields", "its fields")
        made.fields = fields

    def _storage(self, at: int, name: str, dtype: np.dtype[Any]) -> Storage:
        if name.endswith("LongStorage") and self.long_bytes == 4 and self.form == "binary":
            dtype = np.dtype("<i4")
        count = self.read_long()
        start = self.f.tell()
        left = self.size - start
        room = left // self.least_bytes(dtype)
        if not 0 <= count <= room:
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


class _AsciiReader(_Reader):
    """The same grammar over the ascii tokens."""

    form = "ascii"

    def line(self, limit: int, what: str) -> bytes:
        at = self.f.tell()
        text: bytes = self.f.readline(limit)
        if not text.endswith(b"\n"):
            found = f"{text[:20]!r} without an end of line" if text else "the end of the file"
            raise T7Error(at, found, what)
        return text.strip()

    def read_int32(self) -> int:
        at = self.f.tell()
        text = self.line(32, "an integer")
        if not _INTEGER.match(text):
            raise T7Error(at, f"{text!r}", "an integer")
        return int(text)

    def read_double(self) -> float:
        at = self.f.tell()
        text = self.line(64, "a number")
        if not _NUMBER.match(text):
            raise T7Error(at, f"{text!r}", "a number")
        return float(text)

    def read_long_array(self, n: int) -> list[int]:
        if n == 0:
            return []
        at = self.f.tell()
        words = self.line(24 * n + 8, f"{n} integers").split()
        if len(words) != n or not all(_INTEGER.match(word) for word in words):
            raise T7Error(at, f"{b' '.join(words)[:40]!r}", f"{n} integers")
        return [int(word) for word in words]

    def end_of_line(self) -> None:
        at = self.f.tell()
        end = self.f.read(1)
        if end == b"\r":
            end = self.f.read(1)
        if end != b"\n":
            raise T7Error(at, f"{end!r}" if end else "the end of the file", "an end of line")

    def take(self, count: int, what: str) -> bytes:
        data = super().take(count, what)
        if count:
            self.end_of_line()
        return data

    def least_bytes(self, dtype: np.dtype[Any]) -> int:
        return 1 if dtype.itemsize == 1 else 2  # raw, or a digit and a space

    def skip_elements(self, dtype: np.dtype[Any], count: int) -> None:
        at = self.f.tell()
        if count == 0:
            return
        if dtype.itemsize == 1:  # bytes and chars are written raw
            self.f.seek(count, os.SEEK_CUR)
            self.end_of_line()
            return
        spaces, ended = 0, False
        while not ended:
            text = self.f.readline(1 << 20)
            if not text:
                raise T7Error(at, "the end of the file", f"a line of {count:,} numbers")
            spaces += text.count(b" ")
            ended = text.endswith(b"\n")
        if spaces + 1 != count:
            raise T7Error(at, f"a line of {spaces + 1:,} numbers", f"{count:,}")

    def elements(self, storage: Storage, first: int, count: int) -> np.ndarray[Any, Any]:
        if storage.dtype.itemsize == 1:
            return super().elements(storage, first, count)
        # "%.9g" (float) and "%.17g" (double) read back exactly. Going through float64 is safe:
        # nine digits lie far closer to their float32 than to any tie between two of them.
        wide = np.int64 if storage.dtype.kind == "i" else np.float64
        self.f.seek(storage.offset)
        data = np.empty(count, storage.dtype)
        start, rest, ended = 0, b"", False  # start: number of the first word in the chunk
        while not ended and start < first + count:
            chunk = rest + self.f.readline(1 << 20)
            ended = chunk.endswith(b"\n") or chunk == rest
            whole = chunk.strip() if ended else chunk[: chunk.rfind(b" ") + 1]
            rest = chunk[len(whole) :]
            held = whole.count(b" ") + ended
            skip = max(first - start, 0)
            if skip < held:
                words = whole.split()[skip : first + count - start]
                at = start + skip - first
                data[at : at + len(words)] = self._numbers(storage, words, wide)
            start += held
        return data

    def _numbers(self, storage: Storage, words: list[bytes], dtype: type) -> np.ndarray[Any, Any]:
        wrong = next((word for word in words if len(word) > MAX_DIGITS or not _NUMBER.match(word)), None)
        try:
            if wrong is None:
                return np.array(words, np.bytes_).astype(dtype)
        except (ValueError, OverflowError):
            wrong = b"a number out of range"
        raise T7Error(storage.offset, f"{wrong[:20]!r} among the elements", "numbers")


def _parse(name: str, f: BinaryIO, size: int) -> T7File:
    """The object in `f`, whichever form it has.

    Whether longs have 8 bytes or 4 is not written in a file. Both are tried: a file of the one
    kind runs into nonsense at its first tensor when read as the other. Where neither fits, the
    error of the reading that came further is the one that explains.
    """
    start = f.read(8)
    if not start:
        raise T7Error(0, "an empty file", "a Torch7 object")
    attempts: list[tuple[type[_Reader], int]]
    if re.match(rb"[0-8]\r?\n", start):
        attempts = [(_AsciiReader, 8)]
    elif re.match(rb"[\0-\x08]\0\0\0", start):
        attempts = [(_Reader, 8), (_Reader, 4)]
    else:
        big = " (a big-endian file?)" if re.match(rb"\0\0\0[\0-\x08]", start) else ""
        raise T7Error(0, f"{start!r}{big}", "the type tag of a Torch7 object, such as b'\\x04\\0\\0\\0'")
    failures: list[tuple[int, T7Error]] = []
    for reader_class, long_bytes in attempts:
        reader = reader_class(f, size, long_bytes)
        f.seek(0)
        try:
            root = reader.read_obj()
            rest = size - f.tell()
            if rest and long_bytes == 4:
                raise T7Error(f.tell(), f"{rest:,} bytes after the object", "the end of the file")
        except T7Error as error:
            failures.append((f.tell(), error))
            continue
        form = reader.form + (" with 32-bit longs" if long_bytes == 4 else "")
        if rest:
            reader.notes.append(f"{rest:,} bytes follow the object, not read")
        return T7File(name, root, form, size, reader.notes, f)
    raise max(failures, key=lambda failure: failure[0])[1]


@contextmanager
def open_t7(path: str | Path, member: str | None = None) -> Iterator[T7File]:
    """Opens and parses a .t7 file, or a member of a zip without unpacking it to disk.

    Raises:
        T7Error: the file is damaged, or not a Torch7 file.
        OSError: it cannot be read.
    """
    if member is None:
        with _regular(path) as f:
            yield _parse(str(path), f, os.fstat(f.fileno()).st_size)
    else:
        with _zip(path) as archive:
            info = archive.getinfo(member)
            data = _unpacked(archive, info)
        yield _parse(f"{path}/{member}", data, info.file_size)


def members(path: str | Path) -> list[str | None]:
    """The Torch7 files in `path`: `[None]` for a plain file, the names of members for a zip.

    Raises:
        T7Error: a zip without any .t7 inside.
        OSError: it cannot be read.
    """
    with _regular(path) as f:
        if f.read(4) != b"PK\x03\x04":
            return [None]
    with _zip(path) as archive:
        names = archive.namelist()
    found = [n for n in names if n.lower().endswith(".t7") and not re.search(r"(^|/)(\._|__MACOSX/)", n)]
    if not found:
        inside = ", ".join(shown(name) for name in names[:3]) or "nothing"
        raise T7Error(0, f"a zip with {inside}", "a zip with Torch7 files (.t7), as MIT released it")
    if len(found) != len(set(found)) or len(found) > 16:
        raise T7Error(0, f"a zip with {len(found)} .t7 files", "at most 16, of different names")
    return list(found)


def _regular(path: str | Path) -> BinaryIO:
    mode = Path(path).stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise T7Error(0, "a pipe or device", "a file that can be read again from its start")
    return open(path, "rb")


@contextmanager
def _zip(path: str | Path) -> Iterator[zipfile.ZipFile]:
    """An open zip. zipfile lets all kinds of errors of a damaged archive through."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (T7Error, FileNotFoundError, PermissionError):
        raise
    except (
        *(zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, struct.error),
        *(EOFError, OSError, RuntimeError, ValueError, OverflowError, KeyError),
    ) as error:
        raise T7Error(0, f"a damaged or encrypted zip ({error})", "a zip that can be unpacked") from None


def _unpacked(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> io.BytesIO:
    """A member's bytes in memory; refused if it is, or turns out to be, a bomb."""
    packed, size = info.compress_size, info.file_size
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise T7Error(info.header_offset, f"packing method {info.compress_type}", "0 or 8 (deflate)")
    if size > MAX_MEMBER_BYTES or size > (1 << 20) + MAX_MEMBER_RATIO * packed:
        raise T7Error(
            info.header_offset,
            f"{shown(info.filename)} of {size:,} bytes packed into {packed:,}",
            f"at most {MAX_MEMBER_BYTES:,} bytes and {MAX_MEMBER_RATIO} times its packed size",
        )
    data = io.BytesIO()
    with archive.open(info) as f:
        while data.tell() <= size and (chunk := f.read(1 << 20)):
            data.write(chunk)
    if data.tell() != size:
        raise T7Error(info.header_offset, f"{data.tell():,} bytes in {shown(info.filename)}", f"{size:,}")
    data.seek(0)
    return data
