"""The search for units' top sounds: the sounds of a corpus that activate each hidden unit most.

As on the original's project page, a unit is characterized by the sounds that activate it most. Its activation
by a sound is the maximum over frames, edge frames left out. One pass over the corpus writes the largest
activations of each group of sounds, with their frames; these are merged to a few for each unit.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soundnet_port.audio.finding import STDIN, Failure, absolute_path
from soundnet_port.audio.loading import DECODERS
from soundnet_port.corpus.errors import CorpusError
from soundnet_port.corpus.inputs import list_inputs
from soundnet_port.corpus.jobs import Input
from soundnet_port.corpus.peaks import MAX_TOP_SOUNDS, decode_names, read_peaks
from soundnet_port.corpus.run import run_extraction
from soundnet_port.corpus.settings import resolve_layer, resolve_model
from soundnet_port.learning.datasets import read_labeled
from soundnet_port.learning.labeled_sounds import LabeledSounds, summarize_names
from soundnet_port.network.architecture import SAMPLE_RATE, Architecture, Layer
from soundnet_port.network.model import SoundNet
from soundnet_port.pretrained import load_pretrained
from soundnet_port.progress import ProgressCallback
from soundnet_port.viewing.unit_statistics import compute_class_statistics, sparseness
from soundnet_port.viewing.units import TopSound, TopSounds, Unit, frame_window

PEAKS_FILE = "peaks.npz"  # in the folder of a pass
_METADATA = ("version", "architecture", "weights", "layers", "decoder", "edge_frames")


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
    progress: ProgressCallback | None = None,
) -> TopSounds:
    """Find the sounds of a corpus that activate each unit most, in one pass and bounded memory.

    Args:
        model: a SoundNet, or weights as for `load_pretrained`.
        inputs: files, folders to search, and @lists, as for `extract_corpus`; by default the labeled sounds.
        layers: by name, without heads; by default the last layer and the last pooled one before it: conv7
            and conv5, with 5 layers conv4 and conv3.
        top: sounds per unit, 1 to 32.
        labels: classes of the sounds, or a source for `read_labeled`. All inputs must have a label.
        fold: of the labeled sounds; only these are used.
        edge_frames: count edge frames (see `SoundNet.edge_frames`) too. They are left out by default: in
            the released network the same few sounds would top nearly all units of conv7, at their ends. A
            sound that gives a layer only edge frames is a failure.
        folder: where intermediate results are kept, so that the same call resumes after an interruption;
            by default nothing is kept.
        workers: processes, as for `extract_corpus`.
        decoder: of sound files, see `load_audio`.
        force: discard the results of an interrupted pass.
        progress: called after each file, and after each block of a long one; the unit is "file".

    Raises:
        CorpusError: invalid settings, inputs without labels, no inputs, or an interrupted pass with other
            settings in the folder.
        LabeledSoundsError: labels that cannot be used.
        WeightsError: no such weights.
    """
    if not isinstance(model, SoundNet):
        model = load_pretrained(model)
    selected = resolve_layers(model.architecture, layers)
    _check_settings(top, decoder, workers, inputs, labels, fold)
    with ExitStack() as stack:
        folder = Path(folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="soundnet-port-")))
        sounds, failures, labels_by_file = _list_sounds(inputs, labels, fold, stack)
        model, spec = resolve_model(
            model, list(selected), pool="peak", decoder=decoder, edge_frames=edge_frames
        )
        result = run_extraction(
            model,
            sounds,
            failures,
            folder / PEAKS_FILE,
            spec,
            "peaks",
            single_file=True,
            workers=workers,
            decoder=decoder,
            force=force,
            progress=progress,
        )
        failed = {failure.path for failure in result.failures}
        sounds = [sound for sound in sounds if sound.path not in failed]
        peaks = read_peaks(folder / PEAKS_FILE) if sounds else None
    classes = dict(Counter(labels_by_file[sound.file] for sound in sounds)) if labels_by_file else {}
    units: list[Unit] = []
    if peaks is not None:
        by_name = {sound.printable_name: sound for sound in sounds}
        peak_sounds = [by_name[name] for name in decode_names(peaks)]
        for layer in selected.values():
            units += _build_units(layer, peaks, peak_sounds, labels_by_file, classes, top)
    return TopSounds(
        tuple(units),
        selected,
        top,
        len(sounds),
        classes,
        result.failures,
        {key: spec.metadata[key] for key in _METADATA if key in spec.metadata},
        spec.edge_layers,
        edge_frames,
    )


def resolve_layers(architecture: Architecture, layers: Sequence[str | int] = ()) -> dict[str, Layer]:
    """Return the layers of these names, or the default ones.

    Raises:
        CorpusError: no such layer, or one without a ReLU.
    """
    if isinstance(layers, (str, int)):
        raise CorpusError(f"layers must be a list, such as ['conv7'], not {layers!r}")
    if not layers:
        *earlier, last = architecture.blocks
        layers = [last.name, *[block.name for block in earlier if block.pool][-1:]]
    selected = {}
    for key in layers:
        layer = resolve_layer(architecture, key)
        if not layer.is_layer or layer.kind == "head":
            choices = ", ".join(name for name, layer in architecture.layers.items() if layer.kind != "head")
            raise CorpusError(f"layers: {key!r} has no units after ReLU; choose from {choices}")
        selected[layer.name] = layer
    return selected


def _check_settings(
    top: int,
    decoder: str,
    workers: int | None,
    inputs: Sequence[str | os.PathLike[str]],
    labels: object,
    fold: str | None,
) -> None:
    if not 1 <= top <= MAX_TOP_SOUNDS:
        raise CorpusError(f"top must be 1 to {MAX_TOP_SOUNDS}, not {top}")
    if decoder not in DECODERS:
        raise CorpusError(f"unknown decoder {decoder!r}; choose from {', '.join(DECODERS)}")
    if workers is not None and workers < 1:
        raise CorpusError(f"workers must be at least 1, not {workers}")
    if not inputs and labels is None:
        raise CorpusError("no inputs: name sounds or a source of labels")
    if fold is not None and labels is None:
        raise CorpusError("fold: needs labels; name their source")


def _list_sounds(
    inputs: Sequence[str | os.PathLike[str]],
    labels: LabeledSounds | str | os.PathLike[str] | None,
    fold: str | None,
    stack: ExitStack,
) -> tuple[list[Input], list[Failure], dict[str, str]]:
    """Return the sounds, the inputs that cannot be read, and the labels by file."""
    label_of: dict[str, str] = {}  # by resolved path
    if labels is not None:
        labeled = labels if isinstance(labels, LabeledSounds) else read_labeled(labels)
        if fold is not None and fold not in labeled.folds:
            raise CorpusError(f"no fold {fold!r}; choose from {', '.join(labeled.folds) or 'none'}")
        in_fold = [sound for sound in labeled.sounds if fold in (None, sound.fold)]
        label_of = {os.path.realpath(sound.path): sound.label for sound in in_fold}
        inputs = inputs or [sound.path for sound in in_fold]
    sounds, failures = list_inputs(inputs, None, stack)
    if any(sound.path == STDIN for sound in sounds):
        raise CorpusError("standard input: cannot be read again for excerpts; save it to a file first")
    # relative to the common folder, so that names are unique however the inputs were given
    paths = [absolute_path(sound.path) for sound in sounds]
    common = os.path.commonpath([Path(path).parent for path in paths]) if paths else ""
    sounds = [
        Input(Path(os.path.relpath(path, common)).as_posix(), sound.path, sound.file, sound.size)
        for path, sound in zip(paths, sounds, strict=True)
    ]
    sounds.sort(key=lambda sound: os.fsencode(sound.name))
    if labels is None:
        return sounds, failures, {}
    labels_by_file = {
        sound.file: label_of[path] for sound in sounds if (path := os.path.realpath(sound.path)) in label_of
    }
    unlabeled = [sound.path for sound in sounds if sound.file not in labels_by_file]
    if unlabeled and fold is None:
        raise CorpusError(
            f"{len(unlabeled):,} of {len(sounds):,} sounds have no label: {summarize_names(unlabeled)}; "
            "give no inputs to use all labeled sounds"
        )
    sounds = [sound for sound in sounds if sound.file in labels_by_file]
    if not sounds and not failures:
        raise CorpusError(f"none of the inputs is in fold {fold}")
    return sounds, failures, labels_by_file


def _build_units(
    layer: Layer,
    peaks: Mapping[str, NDArray[Any]],
    sounds: Sequence[Input],
    labels_by_file: Mapping[str, str],
    classes: Mapping[str, int],
    top: int,
) -> Iterator[Unit]:
    activations, frames = peaks[layer.name], peaks[f"{layer.name}_frames"]
    sound_indices = peaks[f"{layer.name}_sounds"]
    total, squares = peaks[f"{layer.name}_sums"]
    selectivities = sparseness(total, squares, int(peaks["count"]))
    for number in range(layer.channels):
        unit_sounds = []
        for rank in range(min(top, len(activations))):
            activation = float(activations[rank, number])
            if activation <= 0:
                break
            index, frame = int(sound_indices[rank, number]), int(frames[rank, number])
            start, end = frame_window(layer, frame)
            samples = int(peaks["samples"][index])
            unit_sounds.append(
                TopSound(
                    rank + 1,
                    activation,
                    sounds[index].path,
                    sounds[index].printable_name,
                    labels_by_file.get(sounds[index].file),
                    frame,
                    max(0, start) / SAMPLE_RATE,
                    (start + layer.receptive_field / 2) / SAMPLE_RATE,
                    min(end, samples) / SAMPLE_RATE,
                    samples / SAMPLE_RATE,
                )
            )
        selectivity = float(selectivities[number])
        yield Unit(
            layer.name,
            number,
            tuple(unit_sounds),
            None if np.isnan(selectivity) else selectivity,
            *compute_class_statistics([str(sound.label) for sound in unit_sounds], classes),
        )
