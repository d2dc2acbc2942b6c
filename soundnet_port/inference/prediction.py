"""Names for sounds: the released scripts' extract_predictions.lua, with times and averages."""

from __future__ import annotations

import html
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from soundnet_port.audio.loudness import QUIET
from soundnet_port.inference.activations import LayerActivations, compute_activations
from soundnet_port.network.architecture import CLASSES, SAMPLE_RATE
from soundnet_port.network.categories import label, readable, singular
from soundnet_port.network.evaluation_mode import check_is_model
from soundnet_port.network.model import SoundNet

_COLOURS = {"objects": "70, 130, 200", "scenes": "210, 80, 70", CLASSES: "70, 160, 90"}  # of bars
MIN_SAMPLES = 10 * SAMPLE_RATE  # the original repeats shorter clips


class _Category(NamedTuple):
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    label: str
    probability: float


class Category(_Category):
    """An output of a head: (index, label, probability), counted from 0, and from 0 to 1.

    Attributes:
        original: the label as the original's lists spell it: `/t/train_station/platform` where `label`
            is `train station, platform`.
    """

    _original: str | None = None

    def __new__(cls, index: int, label: str, probability: float, original: str | None = None) -> Category:
        category = super().__new__(cls, index, label, probability)
        category._original = original
        return category

    @property
    def original(self) -> str:
        return self.label if self._original is None else self._original

    def _replace(self, **changes: Any) -> Category:
        replaced = super()._replace(**changes)
        if "label" not in changes:
            replaced._original = self._original
        return replaced

    def to_dict(self) -> dict[str, Any]:
        """Index, both spellings of the label, and probability, for JSON."""
        return {
            "index": self.index,
            "label": self.label,
            "original": self.original,
            "probability": self.probability,
        }


class Frame(NamedTuple):
    """What one head frame heard; times in seconds of all that it saw, not clipped to the clip."""

    start: float
    center: float
    end: float
    objects: list[Category]
    scenes: list[Category]
    classes: list[Category]


@dataclass(frozen=True)
class Prediction:
    """The objects and scenes of a clip, or its classes where the network has classes of its own.

    What the network has no head for is empty.

    Attributes:
        objects: top categories by the mean over frames of each frame's probabilities.
        scenes: likewise.
        object_probabilities: (categories, frames).
        scene_probabilities: (categories, frames).
        frames: every head frame's times and its own top categories.
        middle: (object, scene) of the middle frame, the ceil(frames / 2)-th counted from 1, or (class,);
            with edge frames the answer that the original prints.
        seconds: length of the clip as it was given.
        repeats: how often the clip was played in a row; 1 if it is long enough.
        edge_frames: whether edge frames (see `SoundNet.edge_frames`) are among the frames, as in the
            original.
        dropped: how many edge frames were left out.
        level: RMS of the clip's loudest second as it was given, in dB of full scale.
        normalized: whether it was brought to another level first.
        decoder: which one read the file (see `load_audio`); None for a waveform.
        classes: top classes by the softmax of the logits' mean over frames, which is what the network
            was trained for.
        class_probabilities: (classes, frames).
    """

    objects: list[Category]
    scenes: list[Category]
    object_probabilities: Tensor
    scene_probabilities: Tensor
    frames: list[Frame]
    middle: tuple[Category, ...]
    seconds: float
    repeats: int
    edge_frames: bool = False
    dropped: int = 0
    level: float = 0.0
    normalized: bool = False
    decoder: str | None = None
    classes: list[Category] = field(default_factory=list)
    class_probabilities: Tensor = field(default_factory=lambda: torch.empty(0, 0))

    @property
    def repeated(self) -> bool:
        """Whether the clip was too short, and repeated; times are those of the repeated clip."""
        return self.repeats > 1

    @property
    def quiet(self) -> bool:
        """Whether the clip's level lies so far below what the network was trained on that answers change."""
        return self.level < QUIET and not self.normalized

    def __repr__(self) -> str:
        best = [getattr(self, head)[0] for head in self.heads if getattr(self, head)]
        summary = ", ".join(f"{each.label[:40]} {each.probability:.2f}" for each in best)
        repeated = f" played {self.repeats} times" if self.repeated else ""
        frames = f"{len(self.frames)} frame{'s' * (len(self.frames) != 1)}"
        return f"<Prediction of {self.seconds:.2f} s{repeated}: {summary}; {frames}>"

    def _repr_html_(self) -> str:
        """For notebooks: the clip's lists as bars."""
        repeated = f", played {self.repeats} times" if self.repeated else ""
        rows = [f"<caption>{self.seconds:.2f} s{repeated}</caption>"]
        for head in self.heads:
            rows.append(f'<tr><th colspan="3" style="text-align: left">{head}</th></tr>')
            for _, name, probability in getattr(self, head):
                bar = f"width: {probability:.1%}; height: 1em; background: rgba({_COLOURS[head]}, 0.6)"
                rows.append(
                    f'<tr><td style="text-align: left">{html.escape(name)}</td><td style="min-width: 16em">'
                    f'<div style="{bar}"></div></td><td>{probability:.4f}</td></tr>'
                )
        return f"<table>{''.join(rows)}</table>"

    @property
    def heads(self) -> list[str]:
        """Which of the lists there are, objects and scenes or classes."""
        return [CLASSES] if self.classes else ["objects", "scenes"]

    def to_dict(self, *, frames: bool = True) -> dict[str, Any]:
        """Plain lists and dicts, for JSON; without the full probabilities."""

        def plain(categories: Sequence[Category]) -> list[dict[str, Any]]:
            return [category.to_dict() for category in categories]

        heads = self.heads
        result: dict[str, Any] = {
            "seconds": self.seconds,
            "decoder": self.decoder,
            "repeated": self.repeated,
            "repeats": self.repeats,
            "edge_frames": self.edge_frames,
            "level": self.level if math.isfinite(self.level) else None,
            "normalized": self.normalized,
            **{head: plain(getattr(self, head)) for head in heads},
            "middle": {singular(head): best.to_dict() for head, best in zip(heads, self.middle, strict=True)},
        }
        if frames:
            times = ("start", "center", "end")
            result["frames"] = [
                {name: getattr(frame, name) for name in times}
                | {head: plain(getattr(frame, head)) for head in heads}
                for frame in self.frames
            ]
        return result

    def to_rows(self, *, frames: bool = True) -> list[tuple[float, float, str, int, int, str, float]]:
        """For tables: start, end, head, rank, index, label, probability; the whole clip, then its frames.

        Labels are spelled as in the original's lists.
        """
        seconds = self.seconds * self.repeats
        whole = Frame(0.0, seconds / 2, seconds, self.objects, self.scenes, self.classes)
        return [
            (frame.start, frame.end, singular(head), rank, index, category.original, probability)
            for frame in [whole, *(self.frames if frames else [])]
            for head in self.heads
            for rank, category in enumerate(getattr(frame, head), 1)
            for index, _, probability in [category]
        ]


def predict(
    model: SoundNet,
    sound: str | os.PathLike[str] | Tensor,
    *,
    top: int = 5,
    decoder: str = "auto",
    edge_frames: bool = False,
    normalize: bool = False,
) -> Prediction:
    """Names what a clip sounds like.

    Edge frames, which hear zeros after the sound's end and answer with nonsense, are left out (see
    `SoundNet.edge_frames`). A clip too short for a frame that is none is repeated a whole number of
    times, never cut, until there is one, and the result says so: with 8 layers one under 10.98 s. The
    model is used in evaluation mode, whatever mode it is in.

    Args:
        model: a network with heads.
        sound: a sound file, or a waveform of shape (samples,) at 22,050 Hz within +-256.
        top: how many categories the lists hold.
        decoder: of sound files, see `load_audio`.
        edge_frames: as the original to the letter: a clip shorter than 10 s is repeated to at least
            that, and all frames count.
        normalize: bring the clip's loudest second to `loudness.NORMALIZED` first. The network was trained
            on sounds at the level of their videos; quiet recordings get other answers.

    Raises:
        AudioError: the file cannot be used.
        ValueError: the waveform is empty or not one-dimensional, `top` is below 1, or the network
            has no heads.
    """
    if top < 1:
        raise ValueError(f"top must be at least 1, not {top}")
    check_is_model(model)
    heads = list(model.architecture.head_sizes)
    if not heads:
        raise ValueError("these weights have no heads; they cannot name sounds")
    least = min_samples(model, edge_frames)
    clip = compute_activations(
        model,
        sound,
        heads,
        decoder=decoder,
        least=least,
        edge_frames=edge_frames,
        normalized=normalize,
    )
    return replace(build_prediction(model, clip, top, edge_frames), normalized=normalize)


def min_samples(model: SoundNet, edge_frames: bool = False) -> int:
    """Shorter clips are repeated: until every layer has a frame that is no edge frame.

    With edge frames until there is any, but objects and scenes as in the original to 10 s.
    """
    layers = model.architecture.layers
    if edge_frames and "objects" in layers:
        return MIN_SAMPLES
    if edge_frames:
        return max(layer.shortest for layer in layers.values())
    return max(model.architecture.shortest_ordinary(name) for name in layers)


def build_prediction(
    model: SoundNet, clip: LayerActivations, top: int, edge_frames: bool = False
) -> Prediction:
    """The prediction from the heads' logits, of all frames or without edge frames."""
    heads = list(model.architecture.head_sizes)
    own = heads == [CLASSES]
    probabilities = {head: torch.softmax(clip.activations[head].T, 0) for head in heads}

    def best(head: str, values: Tensor) -> list[Category]:
        values, indices = values.topk(min(top, len(values)))
        return [
            Category(index, readable(name := label(model.categories, head, index)), value, name)
            for index, value in zip(indices.tolist(), values.tolist(), strict=True)
        ]

    def top_of(probabilities: Mapping[str, Tensor]) -> dict[str, list[Category]]:
        lists = {head: best(head, each) for head, each in probabilities.items()}
        return {head: lists.get(head, []) for head in ("objects", "scenes", CLASSES)}

    count = probabilities[heads[0]].shape[1]
    frames = []
    for t, (start, center, end) in enumerate(model.frame_times(heads[0], count).tolist()):
        lists = top_of({head: each[:, t] for head, each in probabilities.items()})
        frames.append(Frame(start, center, end, **lists))
    middle = frames[math.ceil(count / 2) - 1]
    if own:
        lists = top_of({CLASSES: torch.softmax(clip.activations[CLASSES].mean(0), 0)})
    else:
        lists = top_of({head: each.mean(1) for head, each in probabilities.items()})
    nothing = torch.empty(0, count)
    return Prediction(
        objects=lists["objects"],
        scenes=lists["scenes"],
        classes=lists[CLASSES],
        object_probabilities=probabilities.get("objects", nothing),
        scene_probabilities=probabilities.get("scenes", nothing),
        class_probabilities=probabilities.get(CLASSES, nothing),
        frames=frames,
        middle=tuple(getattr(middle, head)[0] for head in heads),
        seconds=clip.samples / SAMPLE_RATE,
        repeats=clip.repeats,
        edge_frames=edge_frames,
        dropped=0 if edge_frames else model.edge_frames(heads[0], clip.samples * clip.repeats),
        level=clip.level,
        decoder=clip.decoder,
    )
