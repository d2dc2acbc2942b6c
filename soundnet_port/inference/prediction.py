"""Names for sounds, as the released extract_predictions.lua, with times and averages."""

from __future__ import annotations

import html
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from soundnet_port.audio.loudness import QUIET
from soundnet_port.inference.activations import LayerActivations, compute_activations
from soundnet_port.inference.classification import classify_windows
from soundnet_port.network.architecture import CLASSES, SAMPLE_RATE
from soundnet_port.network.categories import category_name, readable_name, singularize
from soundnet_port.network.evaluation_mode import check_is_model
from soundnet_port.network.model import SoundNet

MIN_SAMPLES = 10 * SAMPLE_RATE  # the original repeats shorter clips
_BAR_COLORS = {"objects": "70, 130, 200", "scenes": "210, 80, 70", CLASSES: "70, 160, 90"}


class _Category(NamedTuple):
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    label: str
    probability: float


class Category(_Category):
    """An output of a head: (index counted from 0, label, probability from 0 to 1)."""

    _original: str | None = None

    def __new__(cls, index: int, label: str, probability: float, original: str | None = None) -> Category:
        category = super().__new__(cls, index, label, probability)
        category._original = original
        return category

    @property
    def original(self) -> str:
        """The original's spelling of `label`: `/t/train_station/platform` for `train station, platform`."""
        return self.label if self._original is None else self._original

    def _replace(self, **changes: Any) -> Category:
        replaced = super()._replace(**changes)
        if "label" not in changes:
            replaced._original = self._original
        return replaced

    def to_dict(self) -> dict[str, Any]:
        """Return index, both spellings of the label, and probability, for JSON."""
        return {
            "index": self.index,
            "label": self.label,
            "original": self.original,
            "probability": self.probability,
        }


class Frame(NamedTuple):
    """The prediction of one head frame; its times are those of all that it sees, not clipped, in seconds."""

    start: float
    center: float
    end: float
    top: Mapping[str, list[Category]]  #: top categories by head

    @property
    def objects(self) -> list[Category]:
        """Top objects; empty without that head, as the others."""
        return self.top.get("objects", [])

    @property
    def scenes(self) -> list[Category]:
        """Top scenes."""
        return self.top.get("scenes", [])

    @property
    def classes(self) -> list[Category]:
        """Top classes."""
        return self.top.get(CLASSES, [])


class HeadPrediction(NamedTuple):
    """What one head predicts for a clip."""

    top: list[Category]  #: top categories of the whole clip
    probabilities: Tensor  #: (categories, frames)
    clip: Tensor = torch.empty(0)  #: (categories,), of the whole clip: what `top` ranks


@dataclass(frozen=True)
class Prediction:
    """The objects and scenes of a clip, or its classes where the network has those instead.

    Attributes:
        heads: by name. The top objects and scenes are those of the mean over frames of each frame's
            probabilities; the top classes those of the softmax of the logits' mean over frames, which
            is what the network was trained for.
        frames: every head frame's times and top categories; of a pooled head (`finetune`) those of windows as
            long as the longest sound that it was fitted to, or of the complete sound.
        middle: the first category of each head in the middle frame, the ceil(frames / 2)-th counted from
            1; with edge frames the answer that the original prints.
        seconds: length of the clip as it was given.
        repeats: how often the clip was played in a row; 1 if it is long enough.
        edge_frames: whether edge frames (see `SoundNet.edge_frames`) are among the frames, as in the
            original.
        dropped: number of edge frames left out.
        level: RMS of the clip's loudest second as it was given, in dB of full scale.
        normalized: whether it was brought to another level first.
        decoder: which one read the file (see `load_audio`); None for a waveform.
    """

    heads: Mapping[str, HeadPrediction]
    frames: list[Frame]
    middle: tuple[Category, ...]
    seconds: float
    repeats: int
    edge_frames: bool = False
    dropped: int = 0
    level: float = 0.0
    normalized: bool = False
    decoder: str | None = None

    @property
    def objects(self) -> list[Category]:
        """Top objects; empty without that head, as the others."""
        return self._head("objects").top

    @property
    def scenes(self) -> list[Category]:
        """Top scenes."""
        return self._head("scenes").top

    @property
    def classes(self) -> list[Category]:
        """Top classes."""
        return self._head(CLASSES).top

    @property
    def object_probabilities(self) -> Tensor:
        """Probabilities of all objects, (categories, frames)."""
        return self._head("objects").probabilities

    @property
    def scene_probabilities(self) -> Tensor:
        """Probabilities of all scenes, (categories, frames)."""
        return self._head("scenes").probabilities

    @property
    def class_probabilities(self) -> Tensor:
        """Probabilities of all classes, (classes, frames)."""
        return self._head(CLASSES).probabilities

    def _head(self, name: str) -> HeadPrediction:
        return self.heads.get(name) or HeadPrediction([], torch.empty(0, len(self.frames)))

    @property
    def repeated(self) -> bool:
        """Whether the clip was too short, and repeated; times are those of the repeated clip."""
        return self.repeats > 1

    @property
    def quiet(self) -> bool:
        """Whether the clip's level is so far below those of the training sounds that answers change."""
        return self.level < QUIET and not self.normalized

    def __repr__(self) -> str:
        first = [head.top[0] for head in self.heads.values() if head.top]
        summary = ", ".join(f"{category.label[:40]} {category.probability:.2f}" for category in first)
        repeated = f" played {self.repeats} times" if self.repeated else ""
        frames = f"{len(self.frames)} frame{'s' * (len(self.frames) != 1)}"
        return f"<Prediction of {self.seconds:.2f} s{repeated}: {summary}; {frames}>"

    def _repr_html_(self) -> str:
        """Show the clip's lists as bars in notebooks."""
        repeated = f", played {self.repeats} times" if self.repeated else ""
        rows = [f"<caption>{self.seconds:.2f} s{repeated}</caption>"]
        for name, head in self.heads.items():
            rows.append(f'<tr><th colspan="3" style="text-align: left">{name}</th></tr>')
            for _, label, probability in head.top:
                bar = f"width: {probability:.1%}; height: 1em; background: rgba({_BAR_COLORS[name]}, 0.6)"
                rows.append(
                    f'<tr><td style="text-align: left">{html.escape(label)}</td><td style="min-width: 16em">'
                    f'<div style="{bar}"></div></td><td>{probability:.4f}</td></tr>'
                )
        return f"<table>{''.join(rows)}</table>"

    def to_dict(self, *, frames: bool = True) -> dict[str, Any]:
        """Return lists and dicts for JSON, without the full probabilities."""

        def plain(categories: Iterable[Category]) -> list[dict[str, Any]]:
            return [category.to_dict() for category in categories]

        result: dict[str, Any] = {
            "seconds": self.seconds,
            "decoder": self.decoder,
            "repeated": self.repeated,
            "repeats": self.repeats,
            "edge_frames": self.edge_frames,
            "level": self.level if math.isfinite(self.level) else None,
            "normalized": self.normalized,
            **{name: plain(head.top) for name, head in self.heads.items()},
            "middle": {
                singularize(name): category.to_dict()
                for name, category in zip(self.heads, self.middle, strict=True)
            },
        }
        if frames:
            result["frames"] = [
                {"start": frame.start, "center": frame.center, "end": frame.end}
                | {name: plain(categories) for name, categories in frame.top.items()}
                for frame in self.frames
            ]
        return result

    def to_rows(self, *, frames: bool = True) -> list[tuple[float, float, str, int, int, str, float]]:
        """Return rows for tables: start, end, head, rank, index, label, probability.

        Those of the whole clip come first, then those of its frames. Labels have the original's spelling.
        """
        seconds = self.seconds * self.repeats
        clip = Frame(0.0, seconds / 2, seconds, {name: head.top for name, head in self.heads.items()})
        return [
            (
                frame.start,
                frame.end,
                singularize(name),
                rank,
                category.index,
                category.original,
                category.probability,
            )
            for frame in [clip, *(self.frames if frames else [])]
            for name, categories in frame.top.items()
            for rank, category in enumerate(categories, 1)
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
    """Predict what a clip sounds like.

    Edge frames, which see zeros after the sound's end and answer with nonsense, are left out (see
    `SoundNet.edge_frames`). A clip too short for an ordinary frame (with 8 layers, one under 10.98 s) is
    repeated a whole number of times, never cut, and the result says so. A pooled head (see `finetune`) takes
    clips of any length. The model is used in evaluation mode, whatever mode it is in.

    Args:
        model: a network with heads.
        sound: a sound file, or a waveform of shape (samples,) at 22,050 Hz within +-256.
        top: number of categories in the lists.
        decoder: of sound files, see `load_audio`.
        edge_frames: do exactly as the original: repeat a clip shorter than 10 s to at least that, and
            count all frames.
        normalize: bring the clip's loudest second to `loudness.NORMALIZED` first. The network was trained
            on sounds at the level of their videos; quiet recordings get other answers. With a pooled head
            each window is normalized by itself.

    Raises:
        AudioError: the file cannot be used.
        ValueError: the waveform is empty or not one-dimensional, `top` is below 1, or the network
            has no heads.
    """
    if top < 1:
        raise ValueError(f"top must be at least 1, not {top}")
    check_is_model(model)
    if model.architecture.pooled_head:
        if edge_frames:
            raise ValueError("edge_frames: a pooled head leaves out edge frames, as it was fitted")
        windows, times = classify_windows(model, sound, decoder=decoder, normalized=normalize)
        return replace(build_prediction(model, windows, top, times=times), normalized=normalize)
    heads = list(model.architecture.head_sizes)
    if not heads:
        raise ValueError("these weights have no heads; they cannot name sounds")
    clip = compute_activations(
        model,
        sound,
        heads,
        decoder=decoder,
        least=min_samples(model, edge_frames),
        edge_frames=edge_frames,
        normalized=normalize,
    )
    return replace(build_prediction(model, clip, top, edge_frames), normalized=normalize)


def min_samples(model: SoundNet, edge_frames: bool = False) -> int:
    """Return the length to which `predict` repeats shorter clips: every layer has an ordinary frame.

    With edge frames every layer has a frame; for objects and scenes it is the original's 10 s.
    """
    layers = model.architecture.layers
    if edge_frames and "objects" in layers:
        return MIN_SAMPLES
    if edge_frames:
        return max(layer.shortest for layer in layers.values())
    return max(model.architecture.shortest_ordinary(name) for name in layers)


def build_prediction(
    model: SoundNet,
    clip: LayerActivations,
    top: int,
    edge_frames: bool = False,
    times: Tensor | None = None,
) -> Prediction:
    """Build the prediction from the heads' logits, of all frames or without edge frames.

    A pooled head's logits are of windows; `times`, (windows, 3), are their starts, centers and ends.
    """
    names = list(model.architecture.output_sizes)
    probabilities = {name: torch.softmax(clip.activations[name].T, 0) for name in names}

    def rank(name: str, values: Tensor) -> list[Category]:
        values, indices = values.topk(min(top, len(values)))
        originals = [category_name(model.categories, name, index) for index in indices.tolist()]
        return [
            Category(index, readable_name(original), value, original)
            for index, original, value in zip(indices.tolist(), originals, values.tolist(), strict=True)
        ]

    def average(name: str) -> Tensor:
        if name == CLASSES:
            return torch.softmax(clip.activations[CLASSES].mean(0), 0)
        return probabilities[name].mean(1)

    count = probabilities[names[0]].shape[1]
    dropped = 0
    if times is None:
        times = model.frame_times(names[0], count)
        dropped = 0 if edge_frames else model.edge_frames(names[0], clip.samples * clip.repeats)
    frames = [
        Frame(start, center, end, {name: rank(name, values[:, t]) for name, values in probabilities.items()})
        for t, (start, center, end) in enumerate(times.tolist())
    ]
    middle = frames[math.ceil(count / 2) - 1]
    averages = {name: average(name) for name in names}
    return Prediction(
        heads={
            name: HeadPrediction(rank(name, averages[name]), probabilities[name], averages[name])
            for name in names
        },
        frames=frames,
        middle=tuple(middle.top[name][0] for name in names),
        seconds=clip.samples / SAMPLE_RATE,
        repeats=clip.repeats,
        edge_frames=edge_frames,
        dropped=dropped,
        level=clip.level,
        decoder=clip.decoder,
    )
