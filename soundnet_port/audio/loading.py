"""Sound files as SoundNet hears them: first channel, 22,050 Hz, a full-scale sample at 256.

Three decoders. soundfile (libsndfile) reads most formats. PyAV (FFmpeg; extra `[av]`) reads what it
cannot: mp4, m4a, webm, mkv, wma and the sound of videos. The `sox` program is what Torch7's
audio.load was made of (libsox): with it every file gives the samples that the original heard.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from soundnet_port.audio.finding import STDIN
from soundnet_port.errors import SoundNetError
from soundnet_port.network.architecture import FULL_SCALE, MAX_RATE, MIN_RATE, SAMPLE_RATE

if TYPE_CHECKING:
    import torch

DECODERS = ("auto", "soundfile", "av", "sox")
LOUDEST = 2  # times full scale: resampling overshoots by less, and what is louder is at another scale

_BLOCK = 1 << 18  # sample frames read at a time
_AV_FRAMES = 100  # of about 1,000 samples each
_MP3_FRAME = 1152
# kbit/s by index, of MPEG-2 and 2.5, and of MPEG-1; Hz by index of MPEG-1, of the others halves of it
_MP3_BITRATES = (
    (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
)
_MP3_RATES = (44_100, 48_000, 32_000)
# libsndfile's log of sound that says it is longer than the file, in wav, aiff, au, w64 and rf64;
# sizes near 2^31 and 2^32 mean "unknown" in files that were written to a pipe
_CUT_CHUNK = re.compile(
    r"^\s*(?:data|SSND|Data Size|riff|Riff size)\s*:\s*(\d+) \(should be (\d+)\)", re.MULTILINE
)
_UNKNOWN_SIZES = (2**31 - 4096, 2**32 - 4096)

_OTHERS_MAY_KNOW = (1, 4)  # libsndfile's codes for an unrecognised format, an unsupported encoding

Samples = NDArray[np.float32]
# a file's sample rate, its seconds if it says so, and its blocks
_Opened = tuple[int, float | None, Iterator[Samples]]


class AudioError(SoundNetError):
    """A sound file that cannot be used: which, and why."""


@dataclass(frozen=True)
class Sound:
    """A loaded sound and how it was loaded.

    Attributes:
        waveform: (samples,), float32 within +-256.
        sample_rate: of the waveform, in Hz.
        file_rate: of the file, in Hz.
        decoder: the one that ran: "soundfile", "av" or "sox".
    """

    waveform: torch.Tensor
    sample_rate: int
    file_rate: int
    decoder: str


def load_audio(
    path: str | os.PathLike[str],
    *,
    sample_rate: int | None = SAMPLE_RATE,
    channel: int = 0,
    decoder: str = "auto",
) -> torch.Tensor:
    """Loads a sound file the way the original's scripts did, resampled to what the network knows.

    The original took the first channel (never a mix) of what libsox decoded, scaled so that full
    scale is 256. Integer WAV and FLAC files give exactly its numbers, with any decoder. Files at
    another rate are resampled (soxr, high quality); the original did not, it was trained on
    22,050 Hz throughout.

    Args:
        path: wav, flac, mp3, ogg, opus, aiff, au, caf, w64, and with the extra `[av]` mp4, m4a,
            webm, mkv and others (the first audio stream); "-" reads standard input.
        sample_rate: in Hz; None keeps the file's own.
        channel: counted from 0.
        decoder: "auto" is "soundfile", or "av" for what that cannot read; "sox" runs the `sox`
            program, for the alignment of MP3 files that Torch7 had.

    Shape:
        returns `(samples,)`, float32 within +-256 (what resampling overshoots is kept)

    Raises:
        AudioError: the file is missing, not audio, truncated or empty, holds NaN or infinite
            samples, or has no such channel; or the decoder is not installed.
        ValueError: an unknown decoder or an impossible sample rate.
    """
    return read_sound(path, sample_rate=sample_rate, channel=channel, decoder=decoder).waveform


def read_sound(
    path: str | os.PathLike[str],
    *,
    sample_rate: int | None = SAMPLE_RATE,
    channel: int = 0,
    decoder: str = "auto",
) -> Sound:
    """As `load_audio`, and tells which decoder ran and the file's own rate."""
    import torch

    with open_sound(path, sample_rate=sample_rate, channel=channel, decoder=decoder) as sound:
        parts = list(sound._parts)
        samples = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return Sound(torch.from_numpy(samples), sound.sample_rate, sound.file_rate, sound.decoder)


def read_blocks(
    path: str | os.PathLike[str],
    *,
    sample_rate: int | None = SAMPLE_RATE,
    channel: int = 0,
    decoder: str = "auto",
    samples: int = 1 << 21,
) -> Iterator[torch.Tensor]:
    """As `load_audio`, a block after the other, so that a sound of any length takes the memory of a block.

    Shape:
        yields `(samples,)`, the last one `(1 to samples,)`; together what `load_audio` gives

    Raises:
        AudioError: as `load_audio`; what is wrong further on shows when that place is reached.
        ValueError: as `load_audio`.
    """
    with open_sound(path, sample_rate=sample_rate, channel=channel, decoder=decoder) as sound:
        yield from sound.blocks(samples)


@dataclass(frozen=True)
class OpenSound:
    """A sound that is being read.

    Attributes:
        sample_rate: of what `blocks` gives, in Hz.
        file_rate: of the file, in Hz.
        seconds: its length as the file says it, if it does; what is read may differ.
        decoder: the one that runs.
    """

    sample_rate: int
    file_rate: int
    seconds: float | None
    decoder: str
    _parts: Iterator[Samples]

    def blocks(self, samples: int) -> Iterator[torch.Tensor]:
        """The waveform in tensors of so many samples; the last one may have fewer."""
        import torch

        held: list[Samples] = []
        count = 0
        for part in self._parts:
            held.append(part)
            count += len(part)
            while count >= samples:
                whole = np.concatenate(held)
                yield torch.from_numpy(whole[:samples])
                held, count = [whole[samples:].copy()], count - samples
        if count:
            yield torch.from_numpy(np.concatenate(held))


@contextlib.contextmanager
def open_sound(
    path: str | os.PathLike[str],
    *,
    sample_rate: int | None = SAMPLE_RATE,
    channel: int = 0,
    decoder: str = "auto",
) -> Iterator[OpenSound]:
    """Opens a sound file for reading in blocks, as a context manager; otherwise as `load_audio`."""
    if decoder not in DECODERS:
        raise ValueError(f"unknown decoder {decoder!r}; choose from {', '.join(DECODERS)}")
    if sample_rate is not None and not 1 <= sample_rate <= MAX_RATE:
        raise ValueError(f"sample_rate must be a number of Hz or None, not {sample_rate}")
    try:
        with _opened(path) as file, _decoded(file, channel, decoder) as (own_rate, seconds, blocks, ran):
            rate = sample_rate or own_rate
            if own_rate != rate and not MIN_RATE <= own_rate <= MAX_RATE:
                raise _Unreadable(f"a sample rate of {own_rate:,} Hz, expected {MIN_RATE} to {MAX_RATE:,}")
            yield OpenSound(rate, own_rate, seconds, ran, _heard(blocks, own_rate, rate))
    except _Unreadable as error:
        raise AudioError(f"{path}: {error}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise AudioError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def _heard(blocks: Iterator[Samples], own_rate: int, rate: int) -> Iterator[Samples]:
    """What the network hears of decoded samples: clipped, resampled, at +-256."""
    resampler = None
    if own_rate != rate:
        import soxr

        resampler = soxr.ResampleStream(own_rate, rate, 1, dtype="float32", quality="HQ")
    read = made = 0
    for block in itertools.chain(blocks, [None]):
        if block is not None:
            if not np.isfinite(block).all():
                first = read + int(np.flatnonzero(~np.isfinite(block))[0])
                raise _Unreadable(f"sample {first:,} is NaN or infinite; repair or re-export the file")
            read += len(block)
            samples = np.clip(block, -1.0, 1.0)  # as libsox does with floats beyond full scale
        else:
            samples = np.empty(0, np.float32)
        if resampler is not None:
            samples = resampler.resample_chunk(samples, last=block is None)
        made += len(samples)
        if len(samples):
            yield samples * np.float32(FULL_SCALE)
    if not made:
        raise _Unreadable("holds no samples")


class _Unreadable(Exception):
    """Why a decoder gives nothing; read_sound adds the file's name."""


class _UnknownFormat(_Unreadable):
    """Not the decoder's kind of file; another one may know it."""


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """The file, open and with a name; standard input as a temporary one, since decoders seek."""
    if str(path) == STDIN:
        with tempfile.NamedTemporaryFile() as copy:
            shutil.copyfileobj(sys.stdin.buffer, copy)
            copy.seek(0)
            yield copy.file
        return
    kind = Path(path).stat().st_mode
    if stat.S_ISDIR(kind):
        raise _Unreadable("a directory, not a sound file")
    if not stat.S_ISREG(kind):
        raise _Unreadable("not a regular file; pipe it to standard input and name that '-'")
    with open(path, "rb") as file:
        yield file


@contextlib.contextmanager
def _decoded(
    file: IO[bytes], channel: int, decoder: str
) -> Iterator[tuple[int, float | None, Iterator[Samples], str]]:
    """(sample rate, seconds, blocks of one channel with full scale at 1, decoder that runs)."""
    if not file.read(1):
        raise _Unreadable("an empty file")
    file.seek(0)
    with contextlib.ExitStack() as stack:
        if decoder != "auto":
            opened, ran = stack.enter_context(_DECODERS[decoder](file, channel)), decoder
        else:
            try:
                opened, ran = stack.enter_context(_with_soundfile(file, channel)), "soundfile"
            except _UnknownFormat as error:
                file.seek(0)
                try:
                    opened, ran = stack.enter_context(_with_av(file, channel)), "av"
                except _UnknownFormat:  # PyAV does not know it either, or is not there
                    raise error from None
        yield (*opened, ran)


@contextlib.contextmanager
def _with_soundfile(file: IO[bytes], channel: int) -> Iterator[_Opened]:
    import soundfile

    try:
        # by name, as bytes (a name need not be text): libsndfile seeks more freely in files of its own
        sound = soundfile.SoundFile(file.name if os.name == "nt" else os.fsencode(file.name))
    except TypeError:  # by its suffix headerless samples, of which neither rate nor kind is known
        raise _Unreadable("a raw file without a header; convert it to WAV") from None
    except (soundfile.SoundFileError, RuntimeError) as error:
        if getattr(error, "code", 0) in _OTHERS_MAY_KNOW:
            hint = "; a video, m4a and the like need the extra [av]: pip install 'soundnet-port[av]'"
            if importlib.util.find_spec("av"):
                hint = ""
            raise _UnknownFormat(f"cannot be decoded ({_reason(error)}){hint}") from None
        raise _Unreadable(f"cannot be decoded ({_reason(error)})") from None
    with sound:
        if not 0 <= channel < sound.channels:
            raise _Unreadable(f"has {sound.channels} channels (from 0), no channel {channel}")
        for declared, held in _CUT_CHUNK.findall(sound.extra_info):
            unknown = any(size <= int(declared) < size + 8192 for size in _UNKNOWN_SIZES)
            if int(held) < int(declared) and not unknown:
                raise _Unreadable(f"truncated, {int(held):,} of {int(declared):,} bytes are there")
        if sound.format in ("MP3", "MPEG") and _mp3_length_unknown(file):
            raise _UnknownFormat(
                "an MP3 of variable bitrate without a header for its length, which libsndfile would cut "
                "short; the extra [av] reads it: pip install 'soundnet-port[av]'"
            )
        if sound.format == "OGG" and not _ogg_ended(file):
            raise _Unreadable("truncated, its last Ogg page is not marked as the end")
        # An MP3 without a header for its length is estimated by libsndfile, to a frame or so.
        slack = 2 * _MP3_FRAME if sound.format in ("MP3", "MPEG") else 0

        def blocks() -> Iterator[Samples]:
            count, step = 0, _BLOCK // max(1, sound.channels // 2)
            try:
                while len(block := sound.read(step, dtype="float32", always_2d=True)):
                    count += len(block)
                    yield np.ascontiguousarray(block[:, channel])
            except (soundfile.SoundFileError, RuntimeError) as error:
                raise _Unreadable(f"cannot be decoded to its end ({_reason(error)})") from None
            if count + slack < sound.frames:
                raise _Unreadable(f"truncated, {count:,} of {sound.frames:,} samples are there")

        rate, known = int(sound.samplerate), 0 < sound.frames < 1 << 60  # more stands for unknown
        yield rate, sound.frames / rate if known and rate else None, blocks()


@contextlib.contextmanager
def _with_av(file: IO[bytes], channel: int) -> Iterator[_Opened]:
    try:
        import av
    except ImportError:
        raise _UnknownFormat("PyAV is not installed: pip install 'soundnet-port[av]'") from None
    try:
        # a playlist that poses as sound must not open other files or addresses
        container = av.open(file, "r", options={"protocol_whitelist": "none"}, metadata_errors="replace")
    except (av.FFmpegError, ValueError) as error:
        raise _UnknownFormat(f"cannot be decoded ({_reason(error)})") from None
    with container:
        if not container.streams.audio:
            raise _Unreadable("has no audio stream")
        stream = container.streams.audio[0]
        if stream.codec_context is None:
            raise _Unreadable("has an audio stream in a coding that FFmpeg does not know")
        if not 0 <= channel < stream.channels:
            raise _Unreadable(f"has {stream.channels} channels (from 0), no channel {channel}")
        # channels side by side, for of planes PyAV can count no more than eight: it reads past their end
        converter = av.AudioResampler(format="flt")  # rate and channels as they are

        def blocks() -> Iterator[Samples]:
            parts: list[Samples] = []
            try:
                for frame in itertools.chain(container.decode(stream), [None]):  # None: what is left inside
                    for made in converter.resample(frame):
                        samples = made.to_ndarray().reshape(made.samples, -1)
                        parts.append(samples[:, channel].copy())
                    if len(parts) >= _AV_FRAMES:
                        yield np.concatenate(parts)
                        parts = []
            # IndexError: the first frame has fewer channels than the header says
            except (av.FFmpegError, ValueError, IndexError) as error:
                raise _Unreadable(f"cannot be decoded to its end ({_reason(error)})") from None
            if parts:
                yield np.concatenate(parts)

        seconds = container.duration / av.time_base if container.duration else None
        yield int(stream.rate), seconds, blocks()


@contextlib.contextmanager
def _with_sox(file: IO[bytes], channel: int) -> Iterator[_Opened]:
    program = shutil.which("sox")
    if program is None:
        raise _Unreadable("decoder='sox' needs the sox program, which is not installed")
    name = str(Path(file.name).absolute())  # a bare name could mean "|command" or an option to sox
    for kind in ([], ["-t", "mp3"]):  # MP3 is the one that sox knows by its suffix only
        # An .au stream of 32-bit integers: what libsox holds inside, with the rate in its header
        command = [program, "-V2", "-D", *kind, name, "-t", "au", "-e", "signed-integer", "-b", "32", "-"]
        command += ["remix", str(channel + 1)]
        with (
            tempfile.TemporaryFile() as said,
            subprocess.Popen(  # noqa: S603
                command, stdout=subprocess.PIPE, stderr=said
            ) as sox,
        ):
            assert sox.stdout is not None

            def ended(sox: subprocess.Popen[bytes] = sox, said: IO[bytes] = said) -> str:
                sox.wait()
                said.seek(0)
                return said.read().decode(errors="replace").strip()

            def failure(text: str) -> _Unreadable:
                line = text.splitlines()[-1].partition("FAIL ")[2] if "FAIL" in text else text
                reason = line.replace(name, "the file") or "no reason given"
                return _Unreadable(f"sox cannot decode it ({reason})")

            try:
                header = sox.stdout.read(24)
                if len(header) < 24:
                    text = ended()
                    if "determine type" in text and not kind:
                        continue
                    raise failure(text)
                offset, _, _, rate = struct.unpack(">4i", header[4:20])
                sox.stdout.read(offset - 24)

                def blocks(out: IO[bytes] = sox.stdout) -> Iterator[Samples]:
                    while raw := out.read(4 * _BLOCK):
                        yield np.frombuffer(raw, ">i4").astype(np.float32) * np.float32(2.0**-31)
                    text = ended()
                    if sox.returncode or "Premature EOF" in text:
                        raise failure(text)

                yield rate, None, blocks()
                return
            finally:
                sox.kill()


def _ogg_ended(file: IO[bytes]) -> bool:
    """Whether the last page says that it is the last (RFC 3533, section 6: header_type_flag 4)."""
    file.seek(0, os.SEEK_END)
    file.seek(-min(file.tell(), 1 << 17), os.SEEK_CUR)  # a page has at most 65,307 bytes
    end = file.read()
    page = end.rfind(b"OggS")
    return page >= 0 and len(end) > page + 5 and bool(end[page + 5] & 4)


def _mp3_length_unknown(file: IO[bytes]) -> bool:
    """Whether an MP3 changes its bitrate and has no Xing, Info or VBRI header to say how long it is.

    libsndfile then reckons with the first frame's bitrate and stops there.
    """
    file.seek(0)
    start = file.read(1 << 20)
    at = 0
    if start[:3] == b"ID3":  # its size has seven bits to the byte
        at = 10 + sum(byte << shift for byte, shift in zip(start[6:10], (21, 14, 7, 0), strict=True))
        file.seek(at)
        start = file.read(1 << 20)
    at += max(start.find(b"\xff"), 0)
    bitrates: set[int] = set()
    while True:
        file.seek(at)
        frame = file.read(4 if bitrates else 200)
        if len(frame) < 4:
            break
        head = int.from_bytes(frame[:4], "big")
        version, layer = head >> 19 & 3, head >> 17 & 3
        index, rate, padding = head >> 12 & 15, head >> 10 & 3, head >> 9 & 1
        if head >> 21 != 0x7FF or layer != 1 or version == 1 or index in (0, 15) or rate == 3:
            break  # not a frame of layer III: tags at the end, or damage for libsndfile to judge
        bitrate = _MP3_BITRATES[version == 3][index - 1]
        if not bitrates and any(tag in frame for tag in (b"Xing", b"Info", b"VBRI")):
            return False
        bitrates.add(bitrate)
        hertz = _MP3_RATES[rate] >> (0 if version == 3 else 1 if version == 2 else 2)
        at += (144_000 if version == 3 else 72_000) * bitrate // hertz + padding
    return len(bitrates) > 1


def _reason(error: Exception) -> str:
    text = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
    return str(text).removeprefix("Error : ").rstrip(".") or type(error).__name__


_DECODERS: dict[str, Callable[[IO[bytes], int], contextlib.AbstractContextManager[_Opened]]] = {
    "soundfile": _with_soundfile,
    "av": _with_av,
    "sox": _with_sox,
}
