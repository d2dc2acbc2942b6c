"""Ogg files by their pages (RFC 3533): the links of a chain, and whether each is complete."""

from __future__ import annotations

import os
from typing import IO

_BEGINNING = b"OggS\x00\x02"  # a page of version 0 with the flag "beginning of stream"
_HEADER = 27  # bytes before a page's table of segments
_LONGEST_HEADER = _HEADER + 255
_LONGEST_PAGE = 65_307
_BLOCK = 1 << 20


def is_ogg(file: IO[bytes]) -> bool:
    """Whether a file starts with an Ogg page."""
    file.seek(0)
    return file.read(4) == b"OggS"


def is_flac(file: IO[bytes]) -> bool:
    """Whether the first stream of an Ogg file is FLAC."""
    file.seek(0)
    return b"\x7fFLAC" in file.read(_LONGEST_HEADER)


def find_links(file: IO[bytes]) -> list[tuple[int, int]]:
    """Find the links of a chain, [(start, stop)]; files that are joined end to end are such a chain.

    A link begins with the first pages of all its streams, one after the other.
    """
    size = file.seek(0, os.SEEK_END)
    starts: list[int] = []
    previous_end = -1
    for page in _find_beginnings(file):
        if page != previous_end:
            starts.append(page)
        file.seek(page)
        previous_end = page + _page_size(file.read(_LONGEST_HEADER))
    return list(zip(starts, [*starts[1:], size], strict=True))


def is_complete(file: IO[bytes], start: int, stop: int) -> bool:
    """Whether a link's last page is whole and says that it is the last (header_type_flag 4)."""
    file.seek(max(start, stop - 2 * _LONGEST_PAGE))
    end = file.read(stop - file.tell())
    page = end[max(0, end.rfind(b"OggS")) :]
    return page[:4] == b"OggS" and len(page) >= max(_HEADER, _page_size(page)) and bool(page[5] & 4)


def _find_beginnings(file: IO[bytes]) -> list[int]:
    """Find the first pages of all streams."""
    pages: list[int] = []
    start, overlap = 0, len(_BEGINNING) - 1
    while True:
        file.seek(start)
        block = file.read(_BLOCK)
        at = block.find(_BEGINNING)
        while at >= 0:
            pages.append(start + at)
            at = block.find(_BEGINNING, at + 1)
        if len(block) < _BLOCK:
            return pages
        start += _BLOCK - overlap


def _page_size(page: bytes) -> int:
    """Return the size of a page from its header, 0 if that is cut."""
    segments = page[_HEADER - 1 : _HEADER]
    return _HEADER + segments[0] + sum(page[_HEADER : _HEADER + segments[0]]) if segments else 0
