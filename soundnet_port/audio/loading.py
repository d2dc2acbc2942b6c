"""Sound files as SoundNet hears them: first channel, 22,050 Hz, a full-scale sample at 256."""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from soundnet_port.audio.decoders import DecodeError, Samples, open_decoder
from soundnet_port.audio.finding import STDIN
from soundnet_port.errors import SoundNetError
from soundnet_port.files import temporary_copy
from soundnet_port.network.architecture import FULL_SCALE, MAX_RATE, MIN_RATE, SAMPLE_RATE
from soundnet_port.network.resampling import create_resampler

if TYPE_CHECKING:
    import torch

DECODERS = ("auto", "soundfile", "av", "sox")


class AudioError(SoundNetError):
    """A sound file that cannot be used: which, and why."""


@dataclass(frozen=True)
class AudioClip:
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


@dataclass(frozen=True)
class AudioReader:
    """A sound file that is open for reading in blocks.

    Attributes:
        sample_rate: of the blocks, in Hz.
        file_rate: of the file, in Hz.
        seconds: its length, if the file says it; the samples may say otherwise.
        decoder: the one that runs.
        chunks: the waveform in pieces as they are decoded.
    """

    sample_rate: int
    file_rate: int
    seconds: float | None
    decoder: str
    chunks: Iterator[Samples]

    def blocks(self, samples: int) -> Iterator[torch.Tensor]:
        """Yield the waveform in tensors of so many samples; the last one may have fewer."""
        import torch

        pending: list[Samples] = []
        count = 0
        for chunk in self.chunks:
            pending.append(chunk)
            count += len(chunk)
            while count >= samples:
                joined = np.concatenate(pending)
                yield torch.from_numpy(joined[:samples])
                pending, count = [joined[samples:].copy()], count - samples
        if count:
            yield torch.from_numpy(np.concatenate(pending))


def load_audio(
    path: str | os.PathLike[str],
    *,
    sample_rate: int | None = SAMPLE_RATE,
    channel: int = 0,
    decoder: str = "auto",
) -> torch.Tensor:
    """Load a sound file as the original's scripts did, resampled to 22,050 Hz.

    The original took the first channel (never a mix) of what libsox decoded, scaled so that full
    scale is 256. Integer WAV and FLAC files give exactly its numbers, with any decoder. Files at
    another rate are resampled (soxr, high quality), which the original did not do. Of MP3 and Ogg files
    that were joined end to end all parts are read.

    Args:
        path: wav, flac, mp3, ogg, opus, aiff, au, caf, w64, and with the extra `[av]` mp4, m4a,
            webm, mkv and others (the first audio stream); "-" is standard input.
        sample_rate: in Hz; None keeps the file's.
        channel: counted from 0.
        decoder: "auto" is "soundfile", or "av" for what that cannot read; "sox" runs the `sox`
            program, for the alignment of MP3 files that Torch7 had.

    Shape:
        returns `(samples,)`, float32 within +-256 (what resampling overshoots is kept)

    Raises:
        AudioError: the file is missing, not audio, truncated or empty, joined from files of different
            rates or channels, holds NaN or infinite samples, or has no such channel; or the decoder
            is not installed.
        ValueError: an unknown decoder or an impossible sample rate.
    """
    return read_sound(path, sample_rate=sample_rate, channel=channel, decoder=decoder).waveform


def read_sound(
    path: str | os.PathLike[str],
    *,
    sample_rate: int | None = SAMPLE_RATE,
    channel: int = 0,
    decoder: str = "auto",
) -> AudioClip:
    """Load a sound file with the decoder that ran and the file's rate; otherwise as `load_audio`."""
    import torch

    with open_sound(path, sample_rate=sample_rate, channel=channel, decoder=decoder) as reader:
        chunks = list(reader.chunks)
        samples = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
        return AudioClip(torch.from_numpy(samples), reader.sample_rate, reader.file_rate, reader.decoder)


def read_blocks(
    path: str | os.PathLike[str],
    *,
    sample_rate: int | None = SAMPLE_RATE,
    channel: int = 0,
    decoder: str = "auto",
    samples: int = 1 << 21,
) -> Iterator[torch.Tensor]:
    """Load a sound file block by block, in the memory of a block; otherwise as `load_audio`.

    Shape:
        yields `(samples,)`, the last one `(1 to samples,)`; together what `load_audio` gives

    Raises:
        AudioError: as `load_audio`; damage further on shows when it is reached.
        ValueError: as `load_audio`.
    """
    with open_sound(path, sample_rate=sample_rate, channel=channel, decoder=decoder) as reader:
        yield from reader.blocks(samples)


@contextlib.contextmanager
def open_sound(
    path: str | os.PathLike[str],
    *,
    sample_rate: int | None = SAMPLE_RATE,
    channel: int = 0,
    decoder: str = "auto",
) -> Iterator[AudioReader]:
    """Open a sound file for reading in blocks, as a context manager; otherwise as `load_audio`."""
    if decoder not in DECODERS:
        raise ValueError(f"unknown decoder {decoder!r}; choose from {', '.join(DECODERS)}")
    if sample_rate is not None and not 1 <= sample_rate <= MAX_RATE:
        raise ValueError(f"sample_rate must be a number of Hz or None, not {sample_rate}")
    try:
        with _open_file(path) as file, open_decoder(file, channel, decoder) as (decoding, used_decoder):
            file_rate = decoding.sample_rate
            rate = sample_rate or file_rate
            if file_rate != rate and not MIN_RATE <= file_rate <= MAX_RATE:
                raise DecodeError(f"a sample rate of {file_rate:,} Hz, expected {MIN_RATE} to {MAX_RATE:,}")
            chunks = _convert(decoding.blocks, file_rate, rate)
            yield AudioReader(rate, file_rate, decoding.seconds, used_decoder, chunks)
    except DecodeError as error:
        raise AudioError(f"{path}: {error}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise AudioError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


@contextlib.contextmanager
def _open_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a file that has a name; standard input as a temporary copy, since decoders seek."""
    with contextlib.ExitStack() as stack:
        if str(path) == STDIN:
            path = stack.enter_context(temporary_copy(sys.stdin.buffer))
        mode = Path(path).stat().st_mode
        if stat.S_ISDIR(mode):
            raise DecodeError("a directory, not a sound file")
        if not stat.S_ISREG(mode):
            raise DecodeError("not a regular file; pipe it to standard input and name that '-'")
        yield stack.enter_context(open(path, "rb"))


def _convert(blocks: Iterator[Samples], file_rate: int, rate: int) -> Iterator[Samples]:
    """Clip decoded samples, resample them, and scale them to +-256."""
    resampler = create_resampler(file_rate, rate)
    decoded = converted = 0
    for block in itertools.chain(blocks, [None]):
        if block is not None:
            if not np.isfinite(block).all():
                first = decoded + int(np.flatnonzero(~np.isfinite(block))[0])
                raise DecodeError(f"sample {first:,} is NaN or infinite; repair or re-export the file")
            decoded += len(block)
            samples = np.clip(block, -1.0, 1.0)  # as libsox does with floats beyond full scale
        else:
            samples = np.empty(0, np.float32)
        if resampler is not None:
            samples = resampler.resample_chunk(samples, last=block is None)
        converted += len(samples)
        if len(samples):
            yield samples * np.float32(FULL_SCALE)
    if not converted:
        raise DecodeError("holds no samples")
