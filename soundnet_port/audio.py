"""Sound files as SoundNet hears them: first channel, 22,050 Hz, a full-scale sample at 256."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from soundnet_port.architecture import FULL_SCALE, SAMPLE_RATE

if TYPE_CHECKING:
    import torch

# What a directory is searched for; a file named outright may have any name.
SUFFIXES = frozenset(
    ".wav .wave .flac .mp3 .ogg .oga .opus .aif .aiff .aifc .au .snd .caf .w64 .rf64".split()
)
DECODERS = ("auto", "soundfile")

_BLOCK = 1 << 20  # sample frames read at a time
_MP3_FRAME = 1152
# libsndfile's log of sound that says it is longer than the file, in wav, aiff, au, w64 and rf64;
# sizes near 2^31 and 2^32 mean "unknown" in files that were written to a pipe
_CUT_CHUNK = re.compile(
    r"^\s*(?:data|SSND|Data Size|riff|Riff size)\s*:\s*(\d+) \(should be (\d+)\)", re.MULTILINE
)
_UNKNOWN_SIZES = (2**31 - 4096, 2**32 - 4096)


class AudioError(ValueError):
    """A sound file that cannot be used: which, and why."""


def load_audio(
    path: str | os.PathLike[str],
    *,
    sample_rate: int | None = SAMPLE_RATE,
    channel: int = 0,
    decoder: str = "auto",
) -> torch.Tensor:
    """Loads a sound file the way the original's scripts did, resampled to what the network knows.

    The original took the first channel (never a mix) of what libsox decoded, scaled so that full
    scale is 256. Integer WAV and FLAC files give exactly its numbers. Files at another rate are
    resampled (soxr, high quality); the original did not, it was trained on 22,050 Hz throughout.

    Args:
        path: wav, flac, mp3, ogg, opus, aiff, au, caf, w64...
        sample_rate: in Hz; None keeps the file's own.
        channel: counted from 0.
        decoder: "auto" or "soundfile".

    Shape:
        returns `(samples,)`, float32 within +-256 (what resampling overshoots is kept)

    Raises:
        AudioError: the file is missing, not audio, truncated or empty, holds NaN or infinite
            samples, or has no such channel.
        ValueError: an unknown decoder or an impossible sample rate.
    """
    import torch

    if decoder not in DECODERS:
        raise ValueError(f"unknown decoder {decoder!r}; choose from {', '.join(DECODERS)}")
    if sample_rate is not None and sample_rate < 1:
        raise ValueError(f"sample_rate must be a number of Hz or None, not {sample_rate}")
    samples, own_rate = _decoded(Path(path), channel)
    if not np.isfinite(samples).all():
        first = int(np.flatnonzero(~np.isfinite(samples))[0])
        raise AudioError(f"{path}: sample {first:,} is NaN or infinite; repair or re-export the file")
    np.clip(samples, -1.0, 1.0, out=samples)  # as libsox does with floats beyond full scale
    if sample_rate is not None and own_rate != sample_rate:
        import soxr

        samples = soxr.resample(samples, own_rate, sample_rate, quality="HQ")
    if not len(samples):
        raise AudioError(f"{path}: holds no samples")
    return torch.from_numpy(samples * np.float32(FULL_SCALE))


def _decoded(path: Path, channel: int) -> tuple[NDArray[np.float32], int]:
    """(samples of one channel with full scale at 1, sample rate)."""
    import soundfile

    if path.is_dir():
        raise AudioError(f"{path}: a directory, not a sound file")
    try:
        with open(path, "rb"):  # libsndfile has one message for all that can go wrong here
            pass
    except OSError as error:
        raise AudioError(f"{path}: {error.strerror or error}") from None
    if not path.stat().st_size:
        raise AudioError(f"{path}: an empty file")
    try:
        # as bytes, since a name need not be text
        with soundfile.SoundFile(path if os.name == "nt" else os.fsencode(path)) as file:
            return _channel_of(path, file, channel), file.samplerate
    except (soundfile.SoundFileError, RuntimeError, UnicodeError) as error:
        reason = getattr(error, "error_string", str(error)).removeprefix("Error : ")
        raise AudioError(
            f"{path}: cannot be decoded ({reason.rstrip('.')}); if it is audio, convert it to WAV or FLAC"
        ) from None


def _channel_of(path: Path, file: Any, channel: int) -> NDArray[np.float32]:
    if not 0 <= channel < file.channels:
        raise AudioError(f"{path}: has {file.channels} channels (from 0), no channel {channel}")
    for declared, held in _CUT_CHUNK.findall(file.extra_info):
        unknown = any(size <= int(declared) < size + 8192 for size in _UNKNOWN_SIZES)
        if int(held) < int(declared) and not unknown:
            raise AudioError(f"{path}: truncated, {int(held):,} of {int(declared):,} bytes are there")
    parts = [np.empty(0, np.float32)]
    while len(block := file.read(_BLOCK, dtype="float32", always_2d=True)):
        parts.append(np.ascontiguousarray(block[:, channel]))
    samples = np.concatenate(parts)
    # An MP3 without a header for its length is estimated by libsndfile, to a frame or so.
    slack = 2 * _MP3_FRAME if file.format in ("MP3", "MPEG") else 0
    if len(samples) + slack < file.frames:
        raise AudioError(f"{path}: truncated, {len(samples):,} of {file.frames:,} samples are there")
    return samples
