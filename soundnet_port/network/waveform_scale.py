"""Tell a waveform at another scale from one within +-256, and warn about it.

SoundNet was trained with a full-scale sample at 256. Most libraries give floats within +-1, which are nearly
silence to it, and nothing but the level tells them apart. The rule by a waveform's peak, with its figures on
ESC-10's 400 clips, whose peaks are 22 to 333 at +-256:

    up to 0.02      digital silence, perhaps with dither (two steps of 16 bits are 0.016): says nothing
    up to 2         full scale is 1: every whole clip at +-1 is found, and none at +-256 is mistaken for
                    one. Of first seconds 1.0 % are (silence before a sound), of first 0.2 s 13 %;
                    therefore shorter waveforms only count together
    up to 512       full scale is 256
    beyond          16-bit integers as floats, or the like
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from soundnet_port.errors import WaveformScaleWarning, warn_caller
from soundnet_port.network.architecture import FULL_SCALE, SAMPLE_RATE
from soundnet_port.network.modules import runs_eagerly

LOUDEST = 2  # times full scale: resampling overshoots by less, and what is louder is at another scale
_SILENCE = 0.02
_here = threading.local()


def looks_like_unit_scale(peak: float) -> bool:
    """Whether floats with this largest absolute value have a full scale of 1, and are not silence."""
    return _SILENCE < peak <= LOUDEST


@contextlib.contextmanager
def scale_known() -> Iterator[None]:
    """Check no waveforms in this thread until the block ends, since they are within +-256."""
    before = is_scale_known()
    _here.known = True
    try:
        yield
    finally:
        _here.known = before


def is_scale_known() -> bool:
    """Whether this thread is inside `scale_known`."""
    return bool(getattr(_here, "known", False))


class ScaleWatch:
    """Looks at waveforms until one tells their scale, and warns if that is another.

    Args:
        least: samples to see before the warning about +-1.
    """

    def __init__(self, least: int = SAMPLE_RATE) -> None:
        self._missing = least

    def settles(self, waveform: Tensor) -> bool:
        """Take a look at a waveform, `(..., samples)`, and say whether the scale is now known.

        The warning is a `WaveformScaleWarning`. Compilers, tracers and transforms see nothing of this.
        """
        if not _is_readable(waveform):
            return False
        low, high = torch.aminmax(waveform.detach())
        peak = max(float(high), -float(low))
        if looks_like_unit_scale(peak):
            self._missing -= waveform.shape[-1]
            if self._missing > 0:
                return False
            warn_caller(
                f"waveform: no sample is beyond +-{peak:.2g}, nearly silence where full scale is "
                f"{FULL_SCALE:g}; multiply what soundfile, librosa or torchaudio loaded by {FULL_SCALE:g}, "
                "or set model.check_scale = False if the sound is that quiet",
                WaveformScaleWarning,
            )
            return True
        if LOUDEST * FULL_SCALE < peak < torch.inf:
            warn_caller(
                f"waveform: samples up to {peak:,.0f}, where full scale is {FULL_SCALE:g}; divide 16-bit "
                "samples by 128, or set model.check_scale = False if that is meant",
                WaveformScaleWarning,
            )
        return peak > LOUDEST  # neither silence nor NaN


def _is_readable(waveform: Tensor) -> bool:
    """Whether reading a value is possible and leaves no trace in a graph."""
    return (
        runs_eagerly()
        and type(waveform) in (Tensor, nn.Parameter)
        and waveform.numel() > 0
        and waveform.device.type != "meta"
        and not torch._C._len_torch_dispatch_stack()  # FakeTensorMode, make_fx
        and not (waveform.is_cuda and torch.cuda.is_current_stream_capturing())
    )
