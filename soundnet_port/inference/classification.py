"""The classes of a pooled head: a linear function of a sound's pooled layers, at two speeds and three levels.

A sound's row at a level holds mean, maximum and std over time of every layer, of the sound as it is and at
half speed, where frequencies up to 22 kHz come within what the network hears. Its logits are the mean over
three levels: as recorded, 12 dB softer, and normalized (see audio/loudness.py), since the network's answers
change with gain::

    logits = mean over levels of  weight . sqrt(row) + bias

`evaluate` (protocol "modern") fits such classifiers; `finetune` writes them as weights with a pooled head.
Sounds longer than those that it was fitted to are classified in windows that overlap by half.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from soundnet_port.audio.loading import open_sound
from soundnet_port.audio.loudness import LevelMeter, normalize
from soundnet_port.inference.activations import LayerActivations, check_waveform, compute_activations
from soundnet_port.network.architecture import CLASSES, SAMPLE_RATE, PooledHead
from soundnet_port.network.evaluation_mode import evaluation_mode
from soundnet_port.network.model import SoundNet

SPEEDS = (1, 2)  # a sound is played at its own speed, and at half of it
LEVELS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda waveform: waveform,
    lambda waveform: waveform * 0.25,  # 12 dB
    normalize,
)
POOL = "mean+max+std"


def pool_at_levels(
    model: SoundNet,
    speeds: Iterable[Tensor],
    layers: Sequence[str | int],
    pool: str = POOL,
    *,
    edge_frames: bool = False,
) -> Tensor:
    """Pool layers of a sound over time, at three levels; a sound too short for a layer is repeated.

    Args:
        model: any SoundNet.
        speeds: the sound at 22,050 and 44,100 Hz, each (samples,) within +-256.
        layers: names or module numbers.
        pool: as for `embed`.
        edge_frames: include edge frames (see `SoundNet.edge_frames`).

    Shape:
        returns `(levels, features)`: as recorded, 12 dB softer, normalized; a row has the layers one after
        the other, at each speed
    """
    architecture = model.architecture
    least = max(
        architecture.layer(key).shortest if edge_frames else architecture.shortest_ordinary(key)
        for key in layers
    )
    rows: list[list[Tensor]] = [[], [], []]
    for waveform in speeds:
        for row, change in zip(rows, LEVELS, strict=True):  # one at a time in memory
            output = compute_activations(
                model, change(waveform), layers, pool=pool, least=least, edge_frames=edge_frames
            )
            row += [output.activations[key] for key in layers]
    return torch.stack([torch.cat(row) for row in rows])


def compute_logits(model: SoundNet, rows: Tensor) -> Tensor:
    """Compute the pooled head's logits of sounds, the mean over their rows at several levels.

    Shape:
        rows: `(..., levels, features)`; returns `(..., classes)`, float32
    """
    weight, bias = (
        model.get_parameter(f"{CLASSES}.{name}").detach().cpu().double() for name in ("weight", "bias")
    )
    roots = rows.double().sqrt().mean(-2)  # in float64: 5,000 summands that nearly cancel
    return (roots @ weight.T + bias).float()


def classify_windows(
    model: SoundNet,
    sound: str | os.PathLike[str] | Tensor,
    *,
    decoder: str = "auto",
    normalized: bool = False,
) -> tuple[LayerActivations, Tensor]:
    """Compute the pooled head's logits for each window of a sound, and the windows' times.

    Args:
        model: with a pooled head.
        sound: a sound file, or a waveform (samples,) at 22,050 Hz within +-256, which has nothing above
            11 kHz for the half speed.
        decoder: of sound files, see `load_audio`.
        normalized: bring each window to a certain level first.

    Shape:
        logits: `(windows, classes)`; times: `(windows, 3)`, start, center and end in seconds

    Raises:
        AudioError: the file cannot be used.
        ValueError: the waveform is not one-dimensional, empty, or not finite.
    """
    head = model.architecture.pooled_head
    assert head is not None
    if isinstance(sound, Tensor):
        check_waveform(sound)
        model.watch_scale(sound)
    elif not isinstance(sound, (str, os.PathLike)):
        raise ValueError(f"the sound must be a path or a tensor, not {type(sound).__name__}")
    meter, used_decoder, samples = LevelMeter(), None, 0
    logits: list[Tensor] = []
    times: list[tuple[float, float, float]] = []
    with evaluation_mode(model), ExitStack() as stack:
        blocks: list[Iterable[Tensor]] = []
        for speed in SPEEDS:
            hop = _count_samples(head, speed) // 2
            if isinstance(sound, Tensor):
                blocks.append(torch.split(_resample(sound, speed), hop))
            else:
                rate = SAMPLE_RATE * speed
                reader = stack.enter_context(open_sound(sound, sample_rate=rate, decoder=decoder))
                used_decoder = reader.decoder
                blocks.append(reader.blocks(hop))
        windows = [
            _cut(part, _count_samples(head, speed), meter if speed == 1 else None)
            for part, speed in zip(blocks, SPEEDS, strict=True)
        ]
        # rounding may give one speed a last window that differs from the one before by a sample
        for (start, first), (_, second) in zip(*windows, strict=False):
            pair = [normalize(first), normalize(second)] if normalized else [first, second]
            logits.append(compute_logits(model, pool_at_levels(model, pair, head.layers)))
            samples = start + len(first)
            begin, end = start / SAMPLE_RATE, samples / SAMPLE_RATE
            times.append((begin, (begin + end) / 2, end))
    clip = LayerActivations({CLASSES: torch.stack(logits)}, samples, 1, used_decoder, meter.level)
    return clip, torch.tensor(times, dtype=torch.float64)


def _count_samples(head: PooledHead, speed: int) -> int:
    return 2 * math.ceil(head.seconds * SAMPLE_RATE / 2) * speed


def _cut(blocks: Iterable[Tensor], length: int, meter: LevelMeter | None) -> Iterator[tuple[int, Tensor]]:
    """Yield windows of so many samples with their starts, from blocks of half as many.

    The last window ends with the sound; a shorter sound is a single window.
    """
    buffer, read, yielded = torch.empty(0), 0, 0  # the end of the sound so far; the end of the last window
    for block in blocks:
        if meter is not None:
            meter.add(block)
        read += len(block)
        buffer = torch.cat([buffer, block])[-length:]
        if len(buffer) == length and (not yielded or read - yielded >= length // 2):
            yield read - length, buffer
            yielded = read
    if read > yielded:
        yield read - len(buffer), buffer


def _resample(waveform: Tensor, speed: int) -> Tensor:
    if speed == 1:
        return waveform
    import soxr

    samples = waveform.detach().cpu().float().numpy()
    return torch.from_numpy(soxr.resample(samples, SAMPLE_RATE, SAMPLE_RATE * speed, "HQ"))
