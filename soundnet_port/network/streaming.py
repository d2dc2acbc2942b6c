"""Streaming: features of a sound that arrives in pieces, as soon as they are determined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic

import torch
from torch import Tensor

from soundnet_port.network.architecture import MAX_RATE, MIN_RATE, SAMPLE_RATE, Layer
from soundnet_port.network.engine import BLOCK, StreamState
from soundnet_port.network.engine_cache import get_engine
from soundnet_port.network.model import LayerKey, SoundNet
from soundnet_port.network.resampling import create_resampler
from soundnet_port.network.waveform_scale import ScaleWatch

_SCALE_SECONDS = 5  # before a warning about the scale: recordings often begin with silence


def stream(model: SoundNet, layers: Sequence[LayerKey], sample_rate: int = SAMPLE_RATE) -> Stream[LayerKey]:
    """Start computing features of a sound that arrives in pieces: from a microphone, a socket, a long file.

    Memory does not grow with the sound. Frames come as soon as no later sample can change them: a
    layer's first ones after `receptive_field + start` samples, and as many again every `stride`::

        pool5 = sp.stream(model, ["pool5"])
        for samples in microphone:
            frames = pool5.push(samples)["pool5"]
        rest = pool5.finish()["pool5"]

    Args:
        model: any SoundNet; it is used in evaluation mode, whatever mode it is in.
        layers: names, as for `SoundNet.extract`; module numbers only where a layer has that number.
        sample_rate: of the samples that will be pushed, in Hz; others than 22,050 are resampled as
            `load_audio` does.

    Raises:
        ValueError: unknown layer, or an impossible sample rate.
    """
    return Stream(model, layers, sample_rate)


def streamable(model: SoundNet, layers: Sequence[str | int]) -> bool:
    """Whether `stream` computes these: layers, not modules inside one (bare convolutions, batch norms)."""
    return all(model.architecture.layer(key).is_layer for key in layers)


class Stream(Generic[LayerKey]):
    """The features of one sound so far; see `stream`."""

    def __init__(self, model: SoundNet, layers: Sequence[LayerKey], sample_rate: int) -> None:
        if isinstance(layers, (str, int)):
            raise ValueError(f"layers must be a list, such as [{layers!r}]")
        self._layers: dict[LayerKey, Layer] = {key: model.architecture.layer(key) for key in layers}
        if not streamable(model, layers):
            raise ValueError(
                f"{list(layers)} has a module inside a layer; streams give layers: use extract()"
            )
        if not MIN_RATE <= sample_rate <= MAX_RATE:
            raise ValueError(f"sample_rate must be {MIN_RATE} to {MAX_RATE:,} Hz, not {sample_rate}")
        self._model = model
        self._state = StreamState(get_engine(model), list(self._layers.values()))
        self._resampler = create_resampler(sample_rate)
        self._scale_watch = ScaleWatch(_SCALE_SECONDS * sample_rate)
        self._samples = 0  # at 22,050 Hz
        self._finished = False

    @property
    def edge_frames(self) -> dict[LayerKey, int]:
        """Number of edge frames at the end of each layer (see `SoundNet.edge_frames`); 0 before `finish`."""
        count = self._model.edge_frames
        return {key: count(key, self._samples) if self._finished else 0 for key in self._layers}

    @torch.no_grad()
    def push(self, samples: Tensor) -> dict[LayerKey, Tensor]:
        """Take the next samples and return the frames that are now determined.

        Shape:
            samples: `(samples,)`, float within +-256, any number of them
            returns for each layer `(1, channels, new frames)`, often with no frames at all; one
            after the other they are what `SoundNet.extract` gives for the whole sound

        Raises:
            ValueError: not such a tensor, or not finite, or the stream is finished.
        """
        if not isinstance(samples, Tensor) or samples.ndim != 1 or not samples.is_floating_point():
            raise ValueError("push takes a float tensor of shape (samples,) within +-256")
        if not bool(torch.isfinite(samples).all()):
            raise ValueError("the samples hold NaN or infinite values")
        self._model.watch_scale(samples, self._scale_watch)
        return self._push(samples, last=False)

    @torch.no_grad()
    def finish(self) -> dict[LayerKey, Tensor]:
        """End the sound and return the frames that see its end; `edge_frames` then counts the edge frames.

        Raises:
            ValueError: the sound was too short for a layer, or the stream is finished already.
        """
        return self._push(torch.empty(0), last=True)

    def _push(self, samples: Tensor, last: bool) -> dict[LayerKey, Tensor]:
        if self._finished:
            raise ValueError("this stream is finished; make a new one for another sound")
        if self._resampler is not None:
            resampled = self._resampler.resample_chunk(samples.float().cpu().numpy(), last=last)
            samples = torch.from_numpy(resampled)
        self._samples += len(samples)
        if last:
            self._finished = True
            self._model.architecture.check_length(self._samples, self._layers.values())
        like = next(self._model.parameters())
        blocks = samples.split(BLOCK)  # type: ignore[no-untyped-call]
        new = [
            self._state.push([block.to(like)], last=last and number == len(blocks))
            for number, block in enumerate(blocks, 1)
        ]
        return {
            key: torch.cat([frames[layer.name][0] for frames in new]).T[None].contiguous()
            for key, layer in self._layers.items()
        }
