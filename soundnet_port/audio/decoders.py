"""Three decoders of sound files: blocks of one channel, full scale at 1.

soundfile (libsndfile) reads most formats. PyAV (FFmpeg; extra `[av]`) reads what it cannot: mp4, m4a,
webm, mkv, wma and the sound of videos. The `sox` program is what Torch7's audio.load was built on
(libsox): with it every file gives the samples that the original heard.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from soundnet_port.audio import mpeg, ogg

_BLOCK = 1 << 18  # sample frames read at a time
_AV_FRAMES = 100  # of about 1,000 samples each
_MP3_FRAME = 1152
_AV = "pip install 'soundnet-port[av]'"
# libsndfile's log of sound that says it is longer than the file, in wav, aiff, au, w64 and rf64;
# sizes near 2^31 and 2^32 mean "unknown" in files that were written to a pipe
_CUT_CHUNK = re.compile(
    r"^\s*(?:data|SSND|Data Size|riff|Riff size)\s*:\s*(\d+) \(should be (\d+)\)", re.MULTILINE
)
_UNKNOWN_SIZES = (2**31 - 4096, 2**32 - 4096)
_UNKNOWN_FORMAT = (1, 4)  # libsndfile's codes for an unrecognized format, an unsupported encoding

Samples = NDArray[np.float32]


class DecodeError(Exception):
    """Why a decoder gives nothing, without the file's name."""


class UnknownFormatError(DecodeError):
    """Not the decoder's kind of file; another one may know it."""


class Decoding(NamedTuple):
    """A sound file that is being decoded.

    Attributes:
        sample_rate: of the file, in Hz.
        seconds: its length, if the file says it.
        blocks: samples of one channel, full scale at 1.
    """

    sample_rate: int
    seconds: float | None
    blocks: Iterator[Samples]


@contextlib.contextmanager
def open_decoder(file: IO[bytes], channel: int, decoder: str) -> Iterator[tuple[Decoding, str]]:
    """Start decoding an open file that has a name; yield the decoding and the decoder that runs.

    Raises:
        DecodeError: the file cannot be decoded, or the decoder is not installed.
    """
    if not file.read(1):
        raise DecodeError("an empty file")
    file.seek(0)
    with contextlib.ExitStack() as stack:
        if decoder != "auto":
            decoding = stack.enter_context(_DECODERS[decoder](file, channel))
        else:
            try:
                decoding, decoder = stack.enter_context(_open_soundfile(file, channel)), "soundfile"
            except UnknownFormatError as error:
                file.seek(0)
                try:
                    decoding, decoder = stack.enter_context(_open_av(file, channel)), "av"
                except UnknownFormatError:  # PyAV does not know it either, or is not installed
                    raise error from None
        yield decoding, decoder


class _FileSpan(io.RawIOBase):
    """A span of a file as a file of its own."""

    def __init__(self, file: IO[bytes], start: int, stop: int) -> None:
        super().__init__()
        self._file, self._start, self._size, self._position = file, start, stop - start, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._position)
        count = max(0, min(len(buffer), self._size - self._position))
        block = self._file.read(count)
        buffer[: len(block)] = block
        self._position += len(block)
        return len(block)


@contextlib.contextmanager
def _open_soundfile(file: IO[bytes], channel: int) -> Iterator[Decoding]:
    # by name, as bytes (a name need not be text): libsndfile seeks more freely in files of its own
    sources: list[Any] = [file.name if os.name == "nt" else os.fsencode(file.name)]
    spans = [(0, file.seek(0, os.SEEK_END))]
    streams: list[mpeg.Stream] = []
    if ogg.is_ogg(file):
        spans = ogg.find_links(file) or spans
    elif (has_sync := mpeg.starts_with_sync(file)) or Path(os.fsdecode(file.name)).suffix.lower() == ".mp3":
        streams = mpeg.find_streams(file)
        if has_sync and not streams:
            raise _unknown_format("Format not recognised")
        if has_sync:
            spans = [(stream.start, stream.stop) for stream in streams]
        elif not streams:  # by its content alone, since libsndfile would believe the name
            sources = [file]
            file.seek(0)
    if len(spans) > 1:
        sources = [_FileSpan(file, start, stop) for start, stop in spans]
    first = _open_source(sources[0], file)
    with first:
        if not 0 <= channel < first.channels:
            raise DecodeError(f"has {first.channels} channels (from 0), no channel {channel}")
        if first.format in ("MP3", "MPEG") and not all(stream.length_known for stream in streams):
            remedy = (
                "PyAV cannot read it either; re-encode it" if _has_av() else f"the extra [av] reads it: {_AV}"
            )
            raise UnknownFormatError(
                "an MP3 of variable bitrate without a header for its length, which libsndfile would cut "
                f"short; {remedy}"
            )
        _check_complete(first, file, spans[0])

        def read_blocks() -> Iterator[Samples]:
            yield from _read_soundfile(first, channel)
            for source, span in zip(sources[1:], spans[1:], strict=True):
                with _open_source(source, file) as part:
                    if (part.samplerate, part.channels) != (first.samplerate, first.channels):
                        raise DecodeError(
                            f"joined from files of {first.samplerate:,} Hz, {first.channels} channels and "
                            f"{part.samplerate:,} Hz, {part.channels} channels; split or re-encode it"
                        )
                    _check_complete(part, file, span)
                    yield from _read_soundfile(part, channel)

        rate = int(first.samplerate)
        known = 0 < first.frames < 1 << 60 and len(spans) == 1  # more frames stand for unknown
        yield Decoding(rate, first.frames / rate if known and rate else None, read_blocks())


def _open_source(source: Any, file: IO[bytes]) -> Any:
    import soundfile

    try:
        return soundfile.SoundFile(source)
    except TypeError:  # by its suffix headerless samples, of which neither rate nor kind is known
        raise DecodeError("a raw file without a header; convert it to WAV") from None
    except (soundfile.SoundFileError, RuntimeError) as error:
        if getattr(error, "code", 0) in _UNKNOWN_FORMAT or (ogg.is_ogg(file) and ogg.is_flac(file)):
            raise _unknown_format(_reason(error)) from None
        raise DecodeError(f"cannot be decoded ({_reason(error)})") from None


def _unknown_format(reason: str) -> UnknownFormatError:
    hint = f"a video, m4a and the like need the extra [av]: {_AV}"
    return UnknownFormatError(
        f"cannot be decoded ({reason}); {'not a sound or video file, or damaged' if _has_av() else hint}"
    )


def _has_av() -> bool:
    return importlib.util.find_spec("av") is not None


def _check_complete(sound: Any, file: IO[bytes], span: tuple[int, int]) -> None:
    for declared, held in _CUT_CHUNK.findall(sound.extra_info):
        unknown = any(size <= int(declared) < size + 8192 for size in _UNKNOWN_SIZES)
        if int(held) < int(declared) and not unknown:
            raise DecodeError(f"truncated, has {int(held):,} of {int(declared):,} bytes")
    if sound.format == "OGG" and not ogg.is_complete(file, *span):
        raise DecodeError("truncated, its last Ogg page is not marked as the end")


def _read_soundfile(sound: Any, channel: int) -> Iterator[Samples]:
    import soundfile

    # libsndfile estimates the length of an MP3 without a header for it, to a frame or so
    slack = 2 * _MP3_FRAME if sound.format in ("MP3", "MPEG") else 0
    count, step = 0, _BLOCK // max(1, sound.channels // 2)
    try:
        while len(block := sound.read(step, dtype="float32", always_2d=True)):
            count += len(block)
            yield np.ascontiguousarray(block[:, channel])
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise DecodeError(f"cannot be decoded to its end ({_reason(error)})") from None
    if count + slack < sound.frames:
        raise DecodeError(f"truncated, has {count:,} of {sound.frames:,} samples")


@contextlib.contextmanager
def _open_av(file: IO[bytes], channel: int) -> Iterator[Decoding]:
    try:
        import av
    except ImportError:
        raise UnknownFormatError(f"PyAV is not installed: {_AV}") from None
    try:
        # a playlist that poses as sound must not open other files or addresses
        container = av.open(file, "r", options={"protocol_whitelist": "none"}, metadata_errors="replace")
    except (av.FFmpegError, ValueError) as error:
        raise UnknownFormatError(f"cannot be decoded ({_reason(error)})") from None
    with container:
        if not container.streams.audio:
            raise DecodeError("has no audio stream; it is a video without sound, a picture or text")
        stream = container.streams.audio[0]
        if stream.codec_context is None:
            raise DecodeError("has an audio stream in a coding that FFmpeg does not know")
        if not 0 <= channel < stream.channels:
            raise DecodeError(f"has {stream.channels} channels (from 0), no channel {channel}")
        # interleaved channels, since PyAV counts no more than eight planes and reads past their end
        converter = av.AudioResampler(format="flt")  # rate and channels as they are

        def read_blocks() -> Iterator[Samples]:
            parts: list[Samples] = []
            try:
                for frame in itertools.chain(container.decode(stream), [None]):  # None flushes the converter
                    for converted in converter.resample(frame):
                        samples = converted.to_ndarray().reshape(converted.samples, -1)
                        parts.append(samples[:, channel].copy())
                    if len(parts) >= _AV_FRAMES:
                        yield np.concatenate(parts)
                        parts = []
            # IndexError: the first frame has fewer channels than the header says
            except (av.FFmpegError, ValueError, IndexError) as error:
                raise DecodeError(f"cannot be decoded to its end ({_reason(error)})") from None
            if parts:
                yield np.concatenate(parts)

        seconds = container.duration / av.time_base if container.duration else None
        yield Decoding(int(stream.rate), seconds, read_blocks())


@contextlib.contextmanager
def _open_sox(file: IO[bytes], channel: int) -> Iterator[Decoding]:
    program = shutil.which("sox")
    if program is None:
        raise DecodeError("decoder='sox' needs the sox program, which is not installed")
    name = str(Path(file.name).absolute())  # a bare name could mean "|command" or an option to sox
    for kind in ([], ["-t", "mp3"]):  # MP3 is the one that sox knows by its suffix only
        # An .au stream of 32-bit integers: what libsox holds inside, with the rate in its header
        command = [program, "-V2", "-D", *kind, name, "-t", "au", "-e", "signed-integer", "-b", "32", "-"]
        command += ["remix", str(channel + 1)]
        with (
            tempfile.TemporaryFile() as log,
            subprocess.Popen(  # noqa: S603
                command, stdout=subprocess.PIPE, stderr=log
            ) as sox,
        ):
            assert sox.stdout is not None

            def read_log(sox: subprocess.Popen[bytes] = sox, log: IO[bytes] = log) -> str:
                sox.wait()
                log.seek(0)
                return log.read().decode(errors="replace").strip()

            def failure(text: str) -> DecodeError:
                line = text.splitlines()[-1].partition("FAIL ")[2] if "FAIL" in text else text
                reason = line.replace(name, "the file") or "no reason given"
                return DecodeError(f"sox cannot decode it ({reason})")

            try:
                header = sox.stdout.read(24)
                if len(header) < 24:
                    text = read_log()
                    if "determine type" in text and not kind:
                        continue
                    raise failure(text)
                offset, _, _, rate = struct.unpack(">4i", header[4:20])
                sox.stdout.read(offset - 24)

                def read_blocks(out: IO[bytes] = sox.stdout) -> Iterator[Samples]:
                    while raw := out.read(4 * _BLOCK):
                        yield np.frombuffer(raw, ">i4").astype(np.float32) * np.float32(2.0**-31)
                    text = read_log()
                    if sox.returncode or "Premature EOF" in text:
                        raise failure(text)

                yield Decoding(rate, None, read_blocks())
                return
            finally:
                sox.kill()


def _reason(error: Exception) -> str:
    text = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
    return str(text).removeprefix("Error : ").rstrip(".") or type(error).__name__


_DECODERS: dict[str, Callable[[IO[bytes], int], contextlib.AbstractContextManager[Decoding]]] = {
    "soundfile": _open_soundfile,
    "av": _open_av,
    "sox": _open_sox,
}
