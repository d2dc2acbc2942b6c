"""Read ascii Torch7 files: the binary form's tokens as text.

One token to a line; the elements of an array are separated by single spaces, but bytes and chars are raw.
"""

from __future__ import annotations

import os
import re
from typing import Any

import numpy as np

from soundnet_port.conversion.t7_binary import BinaryReader
from soundnet_port.conversion.t7_objects import Storage, T7Error

MAX_DIGITS = 40  # of an ascii number; Torch7 writes up to 24
_NUMBER = re.compile(rb"[-+]?(\d+\.?\d*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|nan|inf)$", re.I)
_INTEGER = re.compile(rb"-?\d{1,20}$")


class AsciiReader(BinaryReader):
    """A reader of the same grammar over ascii tokens."""

    form = "ascii"

    def read_line(self, limit: int, expected: str) -> bytes:
        """Read a line of up to `limit` bytes, without its end."""
        at = self.f.tell()
        text: bytes = self.f.readline(limit)
        if not text.endswith(b"\n"):
            actual = f"{text[:20]!r} without an end of line" if text else "the end of the file"
            raise T7Error(at, actual, expected)
        return text.strip()

    def read_int32(self) -> int:
        at = self.f.tell()
        text = self.read_line(32, "an integer")
        if not _INTEGER.match(text):
            raise T7Error(at, f"{text!r}", "an integer")
        return int(text)

    def read_double(self) -> float:
        at = self.f.tell()
        text = self.read_line(64, "a number")
        if not _NUMBER.match(text):
            raise T7Error(at, f"{text!r}", "a number")
        return float(text)

    def read_long_array(self, n: int) -> list[int]:
        if n == 0:
            return []
        at = self.f.tell()
        words = self.read_line(24 * n + 8, f"{n} integers").split()
        if len(words) != n or not all(_INTEGER.match(word) for word in words):
            raise T7Error(at, f"{b' '.join(words)[:40]!r}", f"{n} integers")
        return [int(word) for word in words]

    def read_end_of_line(self) -> None:
        """Read past an end of line."""
        at = self.f.tell()
        end = self.f.read(1)
        if end == b"\r":
            end = self.f.read(1)
        if end != b"\n":
            raise T7Error(at, f"{end!r}" if end else "the end of the file", "an end of line")

    def take(self, count: int, expected: str) -> bytes:
        data = super().take(count, expected)
        if count:
            self.read_end_of_line()
        return data

    def least_bytes(self, dtype: np.dtype[Any]) -> int:
        return 1 if dtype.itemsize == 1 else 2  # raw, or a digit and a space

    def skip_elements(self, dtype: np.dtype[Any], count: int) -> None:
        at = self.f.tell()
        if count == 0:
            return
        if dtype.itemsize == 1:  # bytes and chars are written raw
            self.f.seek(count, os.SEEK_CUR)
            self.read_end_of_line()
            return
        spaces, complete = 0, False
        while not complete:
            text = self.f.readline(1 << 20)
            if not text:
                raise T7Error(at, "the end of the file", f"a line of {count:,} numbers")
            spaces += text.count(b" ")
            complete = text.endswith(b"\n")
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
        start, rest, complete = 0, b"", False  # start: index of the chunk's first word
        while not complete and start < first + count:
            chunk = rest + self.f.readline(1 << 20)
            complete = chunk.endswith(b"\n") or chunk == rest
            text = chunk.strip() if complete else chunk[: chunk.rfind(b" ") + 1]
            rest = chunk[len(text) :]
            word_count = text.count(b" ") + complete
            skip = max(first - start, 0)
            if skip < word_count:
                words = text.split()[skip : first + count - start]
                at = start + skip - first
                data[at : at + len(words)] = self._to_numbers(storage, words, wide)
            start += word_count
        return data

    def _to_numbers(self, storage: Storage, words: list[bytes], dtype: type) -> np.ndarray[Any, Any]:
        wrong = next((word for word in words if len(word) > MAX_DIGITS or not _NUMBER.match(word)), None)
        try:
            if wrong is None:
                return np.array(words, np.bytes_).astype(dtype)
        except (ValueError, OverflowError):
            wrong = b"a number out of range"
        raise T7Error(storage.offset, f"{wrong[:20]!r} among the elements", "numbers")
