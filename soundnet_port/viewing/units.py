"""Results of a search for top sounds: units, and the sounds that activate them most."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from soundnet_port.audio.finding import Failure
from soundnet_port.corpus.features import printable_name
from soundnet_port.network.architecture import Layer

# A unit is named after a class only with at least so many sounds, and if chance rarely does it
MIN_SOUNDS = 3
MAX_P = 0.01


@dataclass(frozen=True)
class TopSound:
    """A sound that activates a unit strongly, and where in the sound it does.

    Attributes:
        rank: 1 is the strongest of the unit's sounds.
        activation: the unit's largest value in the sound, after ReLU.
        path: of the file, as given.
        name: of the file, relative to the folder that holds the whole corpus.
        label: its class; None without labels.
        frame: of that value, counted from 0; the first of equal ones.
        start: of the frame's receptive field in seconds, clipped to the sound.
        peak: center of the receptive field in seconds, as in `SoundNet.frame_times`. Through padding it may
            lie before 0 or after the end.
        end: of the receptive field in seconds, clipped to the sound.
        duration: of the sound in seconds.
    """

    rank: int
    activation: float
    path: str
    name: str
    label: str | None
    frame: int
    start: float
    peak: float
    end: float
    duration: float


@dataclass(frozen=True)
class Unit:
    """A channel of a layer and the sounds that activate it most.

    Attributes:
        layer: such as "conv7".
        number: of the channel, counted from 0.
        sounds: the strongest first, each file once; empty for a dead unit.
        selectivity: see `sparseness`; None for a dead unit, or for a corpus of one sound.
        label: the most frequent class of its sounds, the strongest sound's of equally frequent ones; None
            without labels.
        purity: the share of that class among its sounds.
        enrichment: purity divided by the class's share in the corpus.
        p: see `hypergeometric_tail`.
    """

    layer: str
    number: int
    sounds: tuple[TopSound, ...]
    selectivity: float | None
    label: str | None = None
    purity: float | None = None
    enrichment: float | None = None
    p: float | None = None

    @property
    def dead(self) -> bool:
        """Whether it is never above 0 in the corpus."""
        return not self.sounds

    @property
    def activation(self) -> float:
        """Its largest value in the corpus."""
        return self.sounds[0].activation if self.sounds else 0.0

    @property
    def name(self) -> str | None:
        """A name by its class, such as "rooster-like"; None for a unit that does not deserve one.

        More than half of its top sounds must be of that class, out of at least three, with p < 0.01.
        """
        if self.label is None or self.purity is None or self.p is None:
            return None
        if self.purity <= 0.5 or len(self.sounds) < MIN_SOUNDS or self.p >= MAX_P:
            return None
        return f"{display_label(self.label)}-like"


@dataclass(frozen=True)
class TopSounds:
    """The top sounds of all units of some layers.

    Attributes:
        units: layer by layer.
        layers: by name.
        top: sounds per unit at most.
        sound_count: sounds in the corpus, without those that failed.
        classes: sounds of each class; empty without labels.
        failures: inputs that gave no activations.
        metadata: network, weights and settings.
        edge_layers: those of the layers that can have edge frames (see `SoundNet.edge_frames`).
        edge_frames: whether edge frames count.
    """

    units: tuple[Unit, ...]
    layers: Mapping[str, Layer]
    top: int
    sound_count: int
    classes: Mapping[str, int]
    failures: tuple[Failure, ...]
    metadata: Mapping[str, Any]
    edge_layers: tuple[str, ...] = ()
    edge_frames: bool = False

    def has_few_sounds(self, unit: Unit) -> bool:
        """Whether so few sounds of the corpus activate a unit, one or two, that it cannot have a name."""
        return 0 < len(unit.sounds) < min(MIN_SOUNDS, self.top)

    def to_rows(self) -> Iterator[dict[str, Any]]:
        r"""Yield a flat row for each unit and rank; undecodable bytes of names are written as \xNN."""
        for unit in self.units:
            for sound in unit.sounds:
                yield {
                    "layer": unit.layer,
                    "unit": unit.number,
                    "rank": sound.rank,
                    "activation": sound.activation,
                    "path": printable_name(sound.path),
                    "start": sound.start,
                    "peak": sound.peak,
                    "end": sound.end,
                    "label": sound.label,
                    "selectivity": unit.selectivity,
                    "name": unit.name,
                    "purity": unit.purity,
                }

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain types for JSON; dead units have no rows."""
        units = [
            {
                "layer": unit.layer,
                "unit": unit.number,
                "activation": unit.activation,
                "selectivity": unit.selectivity,
                "name": unit.name,
                "class": unit.label,
                "purity": unit.purity,
                "enrichment": unit.enrichment,
                "p": unit.p,
            }
            for unit in self.units
        ]
        return {
            **self.metadata,
            "top": self.top,
            "sounds": self.sound_count,
            "classes": dict(self.classes),
            "units": units,
            "rows": list(self.to_rows()),
        }


def frame_window(layer: Layer, frame: int) -> tuple[int, int]:
    """Return start and end of a frame's receptive field in samples, not clipped to the sound."""
    start = layer.start + layer.stride * frame
    return start, start + layer.receptive_field


def display_label(label: str) -> str:
    """Return a class as it is shown, such as "sea waves" for "sea_waves"."""
    return label.replace("_", " ")
