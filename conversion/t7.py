"""Open Torch7 files, and members of zips, and parse them."""

from __future__ import annotations

import io
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from soundnet_port.conversion.t7_ascii import AsciiReader
from soundnet_port.conversion.t7_binary import BinaryReader
from soundnet_port.conversion.t7_objects import T7Error, format_value
from soundnet_port.files import stream_sha256

MAX_MEMBERS = 16  # of a zip
MAX_MEMBER_BYTES = 1 << 30  # of a zip's member, unpacked; the released files have about 115 MB
MAX_MEMBER_RATIO = 60  # unpacked to packed; weights hardly pack, zeroed gradients pack away


@dataclass
class T7File:
    """A parsed file; its tensors can be loaded while it is open."""

    name: str  #: path, or "archive.zip/member.t7"
    root: Any  #: the object that it holds
    form: str  #: "binary", "ascii", "binary with 32-bit longs"...
    size: int  #: bytes
    notes: list[str]  #: on skipped contents
    stream: BinaryIO

    def sha256(self) -> str:
        """Compute the sha256 of the file, or of the unpacked member of a zip."""
        self.stream.seek(0)
        return stream_sha256(self.stream)


def parse_t7(name: str, f: BinaryIO, size: int) -> T7File:
    """Parse the object in `f`, in any form.

    A file does not say whether its longs have 8 bytes or 4. Both are tried: read as the other kind, a
    file is invalid at its first tensor. If neither fits, the error further into the file is raised.

    Raises:
        T7Error: the file is damaged, or not a Torch7 file.
    """
    start = f.read(8)
    if not start:
        raise T7Error(0, "an empty file", "a Torch7 object")
    attempts: list[tuple[type[BinaryReader], int]]
    if re.match(rb"[0-8]\r?\n", start):
        attempts = [(AsciiReader, 8)]
    elif re.match(rb"[\0-\x08]\0\0\0", start):
        attempts = [(BinaryReader, 8), (BinaryReader, 4)]
    else:
        big = " (a big-endian file?)" if re.match(rb"\0\0\0[\0-\x08]", start) else ""
        raise T7Error(0, f"{start!r}{big}", "the type tag of a Torch7 object, such as b'\\x04\\0\\0\\0'")
    errors: list[tuple[int, T7Error]] = []
    for reader_class, long_bytes in attempts:
        reader = reader_class(f, size, long_bytes)
        f.seek(0)
        try:
            root = reader.read_obj()
            rest = size - f.tell()
            if rest and long_bytes == 4:
                raise T7Error(f.tell(), f"{rest:,} bytes after the object", "the end of the file")
        except T7Error as error:
            errors.append((f.tell(), error))
            continue
        form = reader.form + (" with 32-bit longs" if long_bytes == 4 else "")
        if rest:
            reader.notes.append(f"{rest:,} bytes follow the object, not read")
        return T7File(name, root, form, size, reader.notes, f)
    raise max(errors, key=lambda entry: entry[0])[1]


@contextmanager
def open_t7(path: str | Path, member: str | None = None) -> Iterator[T7File]:
    """Open and parse a .t7 file, or a member of a zip without unpacking it to disk.

    Raises:
        T7Error: the file is damaged, or not a Torch7 file.
        OSError: it cannot be read.
    """
    if member is None:
        with _open_regular(path) as f:
            yield parse_t7(str(path), f, os.fstat(f.fileno()).st_size)
    else:
        with _open_zip(path) as archive:
            info = archive.getinfo(member)
            data = _unpack(archive, info)
        yield parse_t7(f"{path}/{member}", data, info.file_size)


def members(path: str | Path) -> list[str | None]:
    """List the Torch7 files in `path`: `[None]` for a plain file, the members' names for a zip.

    Raises:
        T7Error: a zip without any .t7 inside.
        OSError: it cannot be read.
    """
    with _open_regular(path) as f:
        if f.read(4) != b"PK\x03\x04":
            return [None]
    with _open_zip(path) as archive:
        names = archive.namelist()
    t7_names: list[str | None] = [
        n for n in names if n.lower().endswith(".t7") and not re.search(r"(^|/)(\._|__MACOSX/)", n)
    ]
    if not t7_names:
        contents = ", ".join(format_value(name) for name in names[:3]) or "nothing"
        raise T7Error(0, f"a zip with {contents}", "a zip with Torch7 files (.t7), as MIT released it")
    if len(t7_names) != len(set(t7_names)) or len(t7_names) > MAX_MEMBERS:
        raise T7Error(
            0, f"a zip with {len(t7_names)} .t7 files", f"at most {MAX_MEMBERS}, of different names"
        )
    return t7_names


def _open_regular(path: str | Path) -> BinaryIO:
    mode = Path(path).stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise T7Error(0, "a pipe or device", "a file that can be read again from its start")
    return open(path, "rb")


@contextmanager
def _open_zip(path: str | Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip; all that zipfile raises on a damaged one becomes T7Error."""
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


def _unpack(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> io.BytesIO:
    """Unpack a member into memory, unless it is a zip bomb."""
    packed, size = info.compress_size, info.file_size
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise T7Error(info.header_offset, f"packing method {info.compress_type}", "0 or 8 (deflate)")
    if size > MAX_MEMBER_BYTES or size > (1 << 20) + MAX_MEMBER_RATIO * packed:
        raise T7Error(
            info.header_offset,
            f"{format_value(info.filename)} of {size:,} bytes packed into {packed:,}",
            f"at most {MAX_MEMBER_BYTES:,} bytes and {MAX_MEMBER_RATIO} times its packed size",
        )
    data = io.BytesIO()
    with archive.open(info) as f:
        while data.tell() <= size and (chunk := f.read(1 << 20)):
            data.write(chunk)
    if data.tell() != size:
        raise T7Error(
            info.header_offset, f"{data.tell():,} bytes in {format_value(info.filename)}", f"{size:,}"
        )
    data.seek(0)
    return data
