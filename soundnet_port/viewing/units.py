"""What drives each hidden unit most: its top sounds in a corpus, how selective it is, and for what.

As on the original's project page, a unit is known by the sounds that it answers strongest. A unit's answer
to a sound is its largest activation there, edge frames left out; where that frame lies tells what the unit
heard. One pass over the corpus, that of corpus.py, writes each group's largest answers, and these are
merged to a few for each unit. What is said about a unit beyond that:

    selectivity   lifetime sparseness of the answers to all sounds, see `sparseness`
    class         the most frequent one among the top sounds, where sounds have labels
    purity        its share among them
    enrichment    that share against the class's share in the corpus
    p             probability of so many or more of that class among as many sounds drawn without
                  replacement (hypergeometric, one-sided; not corrected for looking at many units)
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soundnet_port.audio.finding import STDIN, Failure, absolute_path
from soundnet_port.audio.loading import DECODERS
from soundnet_port.corpus.extractor import CorpusError, Input, printable_name
from soundnet_port.corpus.formats import MOST, names_of, read_peaks
from soundnet_port.corpus.run import Progress, extract_inputs, find_layer, list_inputs, resolve_model
from soundnet_port.learning.datasets import LabeledSounds, abbreviate, read_labeled
from soundnet_port.network.architecture import SAMPLE_RATE, Architecture, Layer
from soundnet_port.network.engine import BLOCK
from soundnet_port.network.model import SoundNet
from soundnet_port.pretrained import load_pretrained

FOUND = "peaks.npz"  # in the folder of a pass
_METADATA = ("version", "architecture", "weights", "layers", "decoder", "edge_frames")


@dataclass(frozen=True)
class TopSound:
    """A sound that drives a unit strongly, and the moment at which it does.

    Attributes:
        rank: 1 is the strongest of the unit's sounds.
        activation: the unit's largest value in the sound, after ReLU; edge frames count only on demand.
        path: of the file, as it was named.
        name: of the file, within the folder that holds all of the corpus.
        label: its class; None without labels.
        frame: in which the unit has that value, counted from 0; the first of equal ones.
        start: in seconds, of what that frame sees, where the sound has begun.
        peak: in seconds, the center of what the frame sees, as `SoundNet.frame_times` has it. The first
            frames' center may lie before 0 and the last ones' after the end, through padding.
        end: in seconds, of what that frame sees, where the sound has not ended.
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


@dataclass(frozen=True)
class Unit:
    """A channel of a layer and what drives it.

    Attributes:
        layer: such as "conv7".
        number: of the channel, counted from 0.
        sounds: the strongest first, no file twice; none is above 0 for a dead unit.
        selectivity: see `sparseness`; None for a dead unit, or where only one sound was heard.
        label: the class of most of its sounds, of the strongest of these where there are several; None
            without labels.
        purity: the share of that class among its sounds.
        enrichment: that share divided by the class's share in the corpus.
        p: see the module.
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
        """Whether it is above 0 nowhere in the corpus."""
        return not self.sounds

    @property
    def activation(self) -> float:
        """Its largest value in the corpus."""
        return self.sounds[0].activation if self.sounds else 0.0

    @property
    def name(self) -> str | None:
        """The name, such as "rooster-like", by its class, if more than half of its sounds are of that."""
        named = self.label is not None and self.purity is not None and self.purity > 0.5
        return f"{str(self.label).replace('_', ' ')}-like" if named else None


@dataclass(frozen=True)
class TopSounds:
    """What drives the units of some layers.

    Attributes:
        units: all of them, layer by layer.
        layers: by name.
        top: sounds for each unit, at most.
        heard: how many sounds there are in the corpus, without those that failed.
        classes: how many of the sounds are of each class; empty without labels.
        failures: inputs that gave nothing.
        metadata: network, weights and settings.
        edge_layers: those of the layers that can have edge frames (see `SoundNet.edge_frames`).
        edge_frames: whether these count, too.
    """

    units: tuple[Unit, ...]
    layers: Mapping[str, Layer]
    top: int
    heard: int
    classes: Mapping[str, int]
    failures: tuple[Failure, ...]
    metadata: Mapping[str, Any]
    edge_layers: tuple[str, ...] = ()
    edge_frames: bool = False

    def rows(self) -> Iterator[dict[str, Any]]:
        """A flat row for each unit and rank. Names that are no text have backslashes in them."""
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
        """All of it, for JSON; dead units have no rows."""
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
            "sounds": self.heard,
            "classes": dict(self.classes),
            "units": units,
            "rows": list(self.rows()),
        }


def top_sounds(
    model: SoundNet | str | os.PathLike[str],
    inputs: Sequence[str | os.PathLike[str]] = (),
    layers: Sequence[str | int] = (),
    *,
    top: int = 9,
    labels: LabeledSounds | str | os.PathLike[str] | None = None,
    fold: str | None = None,
    edge_frames: bool = False,
    folder: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    decoder: str = "auto",
    force: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> TopSounds:
    """The sounds of a corpus that drive each unit most, found in one pass in bounded memory.

    Args:
        model: a SoundNet, or weights as for `load_pretrained`.
        inputs: files, folders to be searched, and @lists, as for `extract_corpus`; by default the
            labelled sounds.
        layers: of the trunk, by name; by default the last one and the last one before it that is
            pooled: conv7 and conv5, with 5 layers conv4 and conv3.
        top: sounds for each unit, 1 to 32.
        labels: classes of the sounds, or where `read_labeled` finds them. All inputs must have one.
        fold: of the labelled sounds, the only one to be heard.
        edge_frames: count edge frames (see `SoundNet.edge_frames`), too. They are left out by default: in
            the released network the same few sounds would top nearly all units of conv7, at their ends. A
            sound that gives a layer nothing else is a failure.
        folder: where the pass keeps what it has, so that the same call goes on after an
            interruption; by default nothing is kept.
        workers: processes, as for `extract_corpus`.
        decoder: of sound files, see `load_audio`.
        force: starts anew what was interrupted.
        progress: called whenever an input is through, or a block of a long one.

    More than one worker need a script that can be imported, with its work under
    `if __name__ == "__main__":`.

    Raises:
        CorpusError: settings that cannot work, inputs without labels, no inputs, or an interrupted
            pass of other settings in the folder.
        LabelledError: labels that cannot be used.
        WeightsError: no such weights.
    """
    if not isinstance(model, SoundNet):
        model = load_pretrained(model)
    wanted = layers_of(model.architecture, layers)
    _check_settings(top, decoder, workers, inputs, labels, fold)
    with ExitStack() as stack:
        place = Path(folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="soundnet-port-")))
        found, missed, label_of = _corpus(inputs, labels, fold, stack)
        model, contents = resolve_model(
            model, list(wanted), "npz", "peak", decoder, BLOCK, edge_frames=edge_frames
        )
        summary = extract_inputs(
            model,
            found,
            missed,
            place / FOUND,
            list(wanted),
            contents,
            "peaks",
            in_one=True,
            workers=workers,
            decoder=decoder,
            force=force,
            progress=progress,
        )
        failed = {failure.path for failure in summary.failures}
        heard = [each for each in found if each.path not in failed]
        peaks = read_peaks(place / FOUND) if heard else None
    classes = dict(Counter(label_of[each.file] for each in heard)) if label_of else {}
    units: list[Unit] = []
    if peaks is not None:
        known = {each.text: each for each in heard}
        sounds = [known[name] for name in names_of(peaks)]
        for name, layer in wanted.items():
            units += _units(name, layer, peaks, sounds, label_of, classes, top)
    return TopSounds(
        tuple(units),
        wanted,
        top,
        len(heard),
        classes,
        summary.failures,
        {key: contents.metadata[key] for key in _METADATA if key in contents.metadata},
        contents.edge_layers,
        edge_frames,
    )


def layers_of(architecture: Architecture, layers: Sequence[str | int] = ()) -> dict[str, Layer]:
    """The layers whose units are looked at.

    Raises:
        CorpusError: no such layer, or one whose values are not those of a ReLU.
    """
    if isinstance(layers, (str, int)):
        raise CorpusError(f"layers must be a list, such as ['conv7'], not {layers!r}")
    if not layers:
        *before, last = architecture.blocks
        layers = [last.name, *[block.name for block in before if block.pool][-1:]]
    wanted = {}
    for key in layers:
        layer = find_layer(architecture, key)
        if not layer.is_layer or layer.kind == "head":
            trunk = ", ".join(name for name, each in architecture.layers.items() if each.kind != "head")
            raise CorpusError(f"layers: {key!r} has no units after ReLU; choose from {trunk}")
        wanted[layer.name] = layer
    return wanted


def _check_settings(
    top: int,
    decoder: str,
    workers: int | None,
    inputs: Sequence[str | os.PathLike[str]],
    labels: object,
    fold: str | None,
) -> None:
    """Raises a CorpusError for settings that cannot work."""
    if not 1 <= top <= MOST:
        raise CorpusError(f"top must be 1 to {MOST}, not {top}")
    if decoder not in DECODERS:
        raise CorpusError(f"unknown decoder {decoder!r}; choose from {', '.join(DECODERS)}")
    if workers is not None and workers < 1:
        raise CorpusError(f"the number of workers must be at least 1, not {workers}")
    if not inputs and labels is None:
        raise CorpusError("no inputs: name sounds, or labelled ones")
    if fold is not None and labels is None:
        raise CorpusError("a fold is one of labelled sounds; say where the labels are")


def _corpus(
    inputs: Sequence[str | os.PathLike[str]],
    labels: LabeledSounds | str | os.PathLike[str] | None,
    fold: str | None,
    stack: ExitStack,
) -> tuple[list[Input], list[Failure], dict[str, str]]:
    """The inputs, those that cannot be looked at, and the classes by what is read."""
    if labels is None:
        known: dict[str, str] = {}
    else:
        labelled = labels if isinstance(labels, LabeledSounds) else read_labeled(labels)
        if fold is not None and fold not in labelled.folds:
            raise CorpusError(f"no fold {fold!r}; there are {', '.join(labelled.folds) or 'none'}")
        of_fold = [each for each in labelled.sounds if fold in (None, each.fold)]
        known = {os.path.realpath(each.path): each.label for each in of_fold}
        inputs = inputs or [each.path for each in of_fold]
    found, failures = list_inputs(inputs, None, stack)
    if any(each.path == STDIN for each in found):
        raise CorpusError("a sound on standard input cannot be read again for its excerpts; save it first")
    # names that are the same whatever the sounds are named by, so that no two clash
    whole = [absolute_path(each.path) for each in found]
    above = os.path.commonpath([Path(each).parent for each in whole]) if whole else ""
    found = [
        Input(Path(os.path.relpath(full, above)).as_posix(), each.path, each.file, each.bytes)
        for full, each in zip(whole, found, strict=True)
    ]
    found.sort(key=lambda each: os.fsencode(each.name))
    if labels is None:
        return found, failures, {}
    label_of = {each.file: known[real] for each in found if (real := os.path.realpath(each.path)) in known}
    without = [each.path for each in found if each.file not in label_of]
    if without and fold is None:
        raise CorpusError(
            f"{len(without):,} of {len(found):,} sounds have no label: {abbreviate(without)}; "
            "without inputs, all labelled sounds are taken and no others"
        )
    found = [each for each in found if each.file in label_of]
    if not found and not failures:
        raise CorpusError(f"none of the inputs is in fold {fold}")
    return found, failures, label_of


def _units(
    name: str,
    layer: Layer,
    peaks: Mapping[str, NDArray[Any]],
    sounds: Sequence[Input],
    label_of: Mapping[str, str],
    classes: Mapping[str, int],
    top: int,
) -> Iterator[Unit]:
    """A layer's units."""
    total, squares = peaks[f"{name}_sums"]
    selectivities = sparseness(total, squares, int(peaks["count"]))
    for number in range(layer.channels):
        best = []
        for rank in range(min(top, len(peaks[name]))):
            activation = float(peaks[name][rank, number])
            if activation <= 0:
                break
            index, frame = (
                int(peaks[f"{name}_sounds"][rank, number]),
                int(peaks[f"{name}_frames"][rank, number]),
            )
            start, end = window(layer, frame)
            best.append(
                TopSound(
                    rank + 1,
                    activation,
                    sounds[index].path,
                    sounds[index].text,
                    label_of.get(sounds[index].file),
                    frame,
                    max(0, start) / SAMPLE_RATE,
                    (start + layer.receptive_field / 2) / SAMPLE_RATE,
                    min(end, int(peaks["samples"][index])) / SAMPLE_RATE,
                )
            )
        selectivity = float(selectivities[number])
        yield Unit(
            name,
            number,
            tuple(best),
            None if np.isnan(selectivity) else selectivity,
            *_class(best, classes),
        )


def _class(
    sounds: Sequence[TopSound], classes: Mapping[str, int]
) -> tuple[str | None, float | None, float | None, float | None]:
    """Class, purity, enrichment and p of a unit with these top sounds."""
    if not classes or not sounds:
        return None, None, None, None
    labels = [str(sound.label) for sound in sounds]
    ((label, times),) = Counter(labels).most_common(1)  # of equal ones the first
    total, purity = sum(classes.values()), times / len(labels)
    return (
        label,
        purity,
        purity / (classes[label] / total),
        chance(times, len(labels), classes[label], total),
    )


def window(layer: Layer, frame: int) -> tuple[int, int]:
    """What a frame sees: from this sample up to that one, perhaps outside of the sound."""
    start = layer.start + layer.stride * frame
    return start, start + layer.receptive_field


def sparseness(total: NDArray[np.float64], squares: NDArray[np.float64], sounds: int) -> NDArray[np.float64]:
    """Lifetime sparseness of units (Vinje and Gallant, Science 287:1273, 2000).

    S = (1 - (sum r / n)^2 / (sum r^2 / n)) / (1 - 1/n) for answers r to n sounds: 0 if all are equal,
    1 if the unit answers one sound alone.

    Args:
        total: sums of each unit's answers.
        squares: sums of their squares.
        sounds: n.

    Shape:
        all `(units,)`; NaN where there is no answer at all, or one sound only
    """
    if sounds < 2:
        return np.full_like(total, np.nan)
    answering = np.where(squares > 0, squares, np.nan)
    made = (1 - np.square(total / sounds) / (answering / sounds)) / (1 - 1 / sounds)
    return np.clip(made, 0, 1)  # rounding


def chance(times: int, drawn: int, of_class: int, total: int) -> float:
    """Probability that so many or more of the sounds drawn are of the class: a hypergeometric tail.

    >>> round(chance(7, 9, 40, 400), 8)
    1.87e-06
    """
    ways = sum(
        comb(of_class, more) * comb(total - of_class, drawn - more)
        for more in range(times, min(drawn, of_class) + 1)
    )
    return ways / comb(total, drawn)
