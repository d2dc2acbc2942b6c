"""MPEG audio streams (MP3) by their frame headers: whether a file is one, and how many are in it.

libsndfile (by way of libmpg123) hunts for frames in any file that is called .mp3 and complains on stderr;
it stops where the first stream's Xing, Info or VBRI header says that this stream ends; and it reckons the
length of a stream of variable bitrate without such a header from the first frame.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import IO, NamedTuple

_BLOCK = 1 << 16  # bytes read at a time
_SEARCHED = 1 << 20  # bytes that are searched for a frame
_CONFIRMED = 3  # frames in a row that are no coincidence
# kbit/s by index: MPEG-1 layers I, II and III; MPEG-2 and 2.5 layer I, and layers II and III
_BITRATES = (
    (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
)
_RATES = (44_100, 48_000, 32_000)  # Hz, of MPEG-1; MPEG-2 has halves, MPEG-2.5 quarters
_TAGS = (b"Xing", b"Info", b"VBRI")
_VBRI = 36  # where a VBRI header is in its frame


class Stream(NamedTuple):
    """A stream of frames in a file.

    Attributes:
        start: its first byte.
        stop: the byte after its last.
        length_known: whether libsndfile reads it to its end.
    """

    start: int
    stop: int
    length_known: bool


class _Frame(NamedTuple):
    size: int  # bytes
    kind: tuple[int, int, int]  # version, layer and index of the sample rate: the same all through a stream
    bitrate: int
    tag: int  # where a Xing or Info header is: after the side information


class _Header(NamedTuple):
    """What a Xing, Info or VBRI header says; 0 where it does not say."""

    frames: int  # after the header's own
    size: int  # bytes, the header's own frame included


def starts_with_sync(file: IO[bytes]) -> bool:
    """Whether the file starts, after its tags, with the sync bits of a frame."""
    reader = _Reader(file)
    start = reader.peek(reader.skip_tags(0), 2)
    return len(start) == 2 and start[0] == 0xFF and start[1] >= 0xE0


def find_streams(file: IO[bytes]) -> list[Stream]:
    """Find the streams in a file; there are several where files were joined end to end.

    Of a stream with a header that says how long it is, no more than that is read.
    """
    reader = _Reader(file)
    start = reader.skip_tags(0)
    head = int.from_bytes(reader.peek(start, 4), "big")
    if _is_header(head) and head >> 12 & 15 == 0:  # free format, whose frames do not say their size
        return [Stream(start, reader.size, length_known=True)]
    streams: list[Stream] = []
    at = reader.find_frame(start)
    while at is not None:
        stop, following, known = reader.find_end(at)
        streams.append(Stream(at, stop, known))
        at = reader.find_frame(following) if following < reader.size else None
    return streams


class _Reader:
    """The bytes of a file, read in blocks."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._block, self._start = b"", 0
        self.size = file.seek(0, os.SEEK_END)

    def peek(self, at: int, count: int) -> bytes:
        """Return so many bytes from a position on, fewer at the file's end."""
        if not self._start <= at <= at + count <= self._start + len(self._block):
            self._file.seek(at)
            self._block, self._start = self._file.read(max(count, _BLOCK)), at
        offset = at - self._start
        return self._block[offset : offset + count]

    def skip_tags(self, at: int) -> int:
        """Return where the tags (ID3v1, ID3v2, APE) that begin at a position end."""
        while True:
            start = self.peek(at, 16)
            if start[:3] == b"ID3" and len(start) >= 10:  # the size has seven bits to the byte
                at += 10 + sum(byte << shift for byte, shift in zip(start[6:10], (21, 14, 7, 0), strict=True))
            elif start[:3] == b"TAG":
                at += 128
            elif start[:8] == b"APETAGEX" and len(start) == 16:  # the header is not in its size
                at += 32 + int.from_bytes(start[12:16], "little")
            else:
                return min(at, self.size)

    def read_frame(self, at: int) -> _Frame | None:
        """Return the frame at a position, or None if there is none."""
        return _parse_frame(int.from_bytes(self.peek(at, 4), "big"))

    def read_header(self, at: int) -> _Header | None:
        """Return the Xing, Info or VBRI header of the frame at a position, or None if it has none."""
        data = self.peek(at, 64)
        frame = _parse_frame(int.from_bytes(data[:4], "big"))
        if len(data) < 64 or frame is None:
            return None
        if data[_VBRI : _VBRI + 4] == b"VBRI":
            return _Header(int.from_bytes(data[50:54], "big"), int.from_bytes(data[46:50], "big"))
        if data[frame.tag : frame.tag + 4] not in _TAGS:
            return None
        has_frames, has_size = data[frame.tag + 7] & 1, data[frame.tag + 7] & 2
        fields = [int.from_bytes(data[i : i + 4], "big") for i in (frame.tag + 8, frame.tag + 12)]
        return _Header(fields[0] if has_frames else 0, fields[has_frames] if has_size else 0)

    def is_stream(self, at: int) -> bool:
        """Whether frames of one kind follow each other from a position on."""
        kind = None
        for number in range(_CONFIRMED):
            frame = self.read_frame(at)
            if frame is None or kind not in (None, frame.kind):
                # fewer are enough where they end as a stream does
                is_end = at == self.size or self.skip_tags(at) > at or (at > self.size and number > 1)
                return number > 0 and is_end
            at, kind = at + frame.size, frame.kind
        return True

    def find_frame(self, at: int) -> int | None:
        """Return the position of the first frame of a stream from a position on, or None."""
        at = self.skip_tags(at)
        if self.is_stream(at):
            return at
        searched = self.peek(at, _SEARCHED)
        offset = searched.find(b"\xff", 1)
        while offset >= 0:
            if searched[offset + 1 : offset + 2] >= b"\xe0" and self.is_stream(at + offset):
                return at + offset
            offset = searched.find(b"\xff", offset + 1)
        return None

    def find_end(self, at: int) -> tuple[int, int, bool]:
        """Return where a stream ends, where the next one may begin, and whether its length is known."""
        header = self.read_header(at)
        declared = at + header.size if header and header.size else 0
        if 0 < declared <= self.size:
            following = self.skip_tags(declared)
            if self.is_stream(following):
                if following > declared or self.read_header(following):
                    return declared, following, True
            elif following == self.size or self.find_frame(following) is None:
                return self.size, self.size, True  # what follows, if anything, is no sound
        return self._walk(at, header, declared)

    def _walk(self, at: int, header: _Header | None, declared: int) -> tuple[int, int, bool]:
        """Find a stream's end frame by frame."""
        first, bitrates = self.read_frame(at), set[int]()
        assert first is not None
        tags = self._find_tags(at + first.size)
        position, last, count = at, at, 0
        while True:
            frame = self.read_frame(position)
            has_header = frame and (position + frame.tag in tags or position + _VBRI in tags)
            if frame and frame.kind == first.kind and not has_header:
                if header and position == declared and count == header.frames + 1:
                    return declared, declared, True  # and a stream without a header follows
                bitrates.add(frame.bitrate)
                position, last, count = position + frame.size, position, count + 1
                continue
            is_known = header is not None or len(bitrates) < 2
            following = self.skip_tags(position)
            if following >= self.size:
                return self.size, self.size, is_known
            if self.is_stream(following):
                return position, following, is_known
            resumed = self.find_frame(last + 1)  # the last frame may be cut
            if resumed is None:
                return self.size, self.size, is_known
            frame = self.read_frame(resumed)
            if frame is None or frame.kind != first.kind or self.read_header(resumed):
                return resumed, resumed, is_known
            position = resumed  # damage in the midst of the stream

    def _find_tags(self, at: int) -> set[int]:
        """Find all names of headers from a position on."""
        tags: set[int] = set()
        while data := self.peek(at, _SEARCHED):
            for name in _TAGS:
                offset = data.find(name)
                while offset >= 0:
                    tags.add(at + offset)
                    offset = data.find(name, offset + 1)
            at += len(data) - 3 if len(data) == _SEARCHED else len(data)
        return tags


@lru_cache(4096)
def _parse_frame(head: int) -> _Frame | None:
    """Return the frame that begins with these 32 bits, or None if none does."""
    version, layer = head >> 19 & 3, 4 - (head >> 17 & 3)
    index, rate, padding = head >> 12 & 15, head >> 10 & 3, head >> 9 & 1
    if not _is_header(head) or index in (0, 15):
        return None
    is_mpeg1, is_mono = version == 3, head >> 6 & 3 == 3
    bitrate = _BITRATES[layer - 1 if is_mpeg1 else 3 if layer == 1 else 4][index - 1]
    hertz = _RATES[rate] >> (0 if is_mpeg1 else 1 if version == 2 else 2)
    if layer == 1:
        size = (12_000 * bitrate // hertz + padding) * 4
    else:
        size = (72_000 if layer == 3 and not is_mpeg1 else 144_000) * bitrate // hertz + padding
    side_information = (17 if is_mono else 32) if is_mpeg1 else (9 if is_mono else 17)
    return _Frame(size, (version, layer, rate), bitrate, 4 + side_information)


def _is_header(head: int) -> bool:
    """Whether 32 bits have a frame's sync bits, and a version, layer and sample rate that exist."""
    return head >> 21 == 0x7FF and head >> 19 & 3 != 1 and head >> 17 & 3 != 0 and head >> 10 & 3 != 3
