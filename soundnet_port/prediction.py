"""Names for sounds: the released scripts' extract_predictions.lua, with times and averages."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor

from soundnet_port.architecture import SAMPLE_RATE
from soundnet_port.categories import label
from soundnet_port.features import heard
from soundnet_port.model import SoundNet

MIN_SAMPLES = 10 * SAMPLE_RATE  # shorter clips are repeated, as the original does


class Category(NamedTuple):
    """An output of a head, with its probability from 0 to 1."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    label: str
    probability: float


class Frame(NamedTuple):
    """What one head frame heard; times in seconds of all that it saw, not clipped to the clip."""

    start: float
    centre: float
    end: float
    objects: list[Category]
    scenes: list[Category]


@dataclass(frozen=True)
class Prediction:
    """The objects and scenes of a clip.

    Attributes:
        objects: top categories by the mean over frames of each frame's probabilities.
        scenes: likewise.
        object_probabilities: (categories, frames).
        scene_probabilities: (categories, frames).
        frames: every head frame's times and its own top categories.
        middle: (object, scene) of the middle frame, the ceil(frames / 2)-th counted from 1: the
            answer that the original prints.
        seconds: length of the clip as it was given.
        repeats: how often the clip was played in a row; 1 for clips of 10 s and longer.
        decoder: which one read the file (see `load_audio`); None for a waveform.
    """

    objects: list[Category]
    scenes: list[Category]
    object_probabilities: Tensor
    scene_probabilities: Tensor
    frames: list[Frame]
    middle: tuple[Category, Category]
    seconds: float
    repeats: int
    decoder: str | None = None

    @property
    def repeated(self) -> bool:
        """The clip was shorter than 10 s; times are those of the repeated clip."""
        return self.repeats > 1

    def to_dict(self, *, frames: bool = True) -> dict[str, Any]:
        """Plain lists and dicts, for JSON; without the full probabilities."""

        def plain(categories: list[Category]) -> list[dict[str, Any]]:
            return [category._asdict() for category in categories]

        result: dict[str, Any] = {
            "seconds": self.seconds,
            "decoder": self.decoder,
            "repeated": self.repeated,
            "repeats": self.repeats,
            "objects": plain(self.objects),
            "scenes": plain(self.scenes),
            "middle": {"object": self.middle[0]._asdict(), "scene": self.middle[1]._asdict()},
        }
        if frames:
            result["frames"] = [
                f._asdict() | {"objects": plain(f.objects), "scenes": plain(f.scenes)} for f in self.frames
            ]
        return result


def predict(
    model: SoundNet, sound: str | os.PathLike[str] | Tensor, *, top: int = 5, decoder: str = "auto"
) -> Prediction:
    """Names what a clip sounds like.

    As the original does, a clip shorter than 10 s is repeated a whole number of times (never
    cut); the result says so. The model is used in evaluation mode, whatever mode it is in.

    Args:
        model: a network with heads.
        sound: a sound file, or a waveform of shape (samples,) at 22,050 Hz within +-256.
        top: how many categories the lists hold.
        decoder: of sound files, see `load_audio`.

    Raises:
        AudioError: the file cannot be used.
        ValueError: the waveform is empty or not one-dimensional, `top` is below 1, or the network
            has no heads.
    """
    if top < 1:
        raise ValueError(f"top must be at least 1, not {top}")
    if not model.architecture.heads:
        raise ValueError("these weights have no heads; they cannot name sounds")
    clip = heard(model, sound, ["objects", "scenes"], decoder=decoder, least=MIN_SAMPLES)
    objects, scenes = (torch.softmax(clip.activations[head].T, 0) for head in ("objects", "scenes"))

    def best(head: str, probabilities: Tensor) -> list[Category]:
        values, indices = probabilities.topk(min(top, len(probabilities)))
        return [
            Category(index, label(model.categories, head, index), value)
            for index, value in zip(indices.tolist(), values.tolist(), strict=True)
        ]

    times = model.frame_times("objects", objects.shape[1]).tolist()
    frames = [
        Frame(start, centre, end, best("objects", objects[:, t]), best("scenes", scenes[:, t]))
        for t, (start, centre, end) in enumerate(times)
    ]
    middle = frames[ceil(len(frames) / 2) - 1]
    return Prediction(
        objects=best("objects", objects.mean(1)),
        scenes=best("scenes", scenes.mean(1)),
        object_probabilities=objects,
        scene_probabilities=scenes,
        frames=frames,
        middle=(middle.objects[0], middle.scenes[0]),
        seconds=clip.samples / SAMPLE_RATE,
        repeats=clip.repeats,
        decoder=clip.decoder,
    )
