"""Predictors and targets of encoding models: which volumes are used, z-scoring within runs, noise ceiling."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from soundnet_port.learning.encoding_data import Recording
from soundnet_port.learning.encoding_features import ResponseModel, Scaling, standardize
from soundnet_port.learning.errors import EncodingError
from soundnet_port.learning.feature_cache import Values
from soundnet_port.progress import Progress, ProgressCallback

_LEAST_COVERED = 0.5  # of the sounds, without a note


class FeatureSource(Protocol):
    """What computes the rows of sounds, such as `AlignedFeatures`."""

    tr: float  #: the period in seconds

    def extract(self, sound: Path, offset: float = 0.0) -> tuple[dict[str | int, Values], float]:
        """Return the rows of each layer, (periods, channels), and the sound's seconds."""


@dataclass(frozen=True)
class AlignedSound:
    """A sound on the clock of a recording.

    Attributes:
        rows: by layer, (periods, channels).
        seconds: its length.
        skipped: periods before the first volume's; negative if volumes precede the sound.
        offset: where the first period starts, in seconds after the sound's start.
    """

    rows: dict[str | int, Values]
    seconds: float
    skipped: int
    offset: float


@dataclass(frozen=True)
class KeptVolumes:
    """The volumes of a recording that are used, and the periods of the sound they belong to."""

    kept: NDArray[np.int64]
    periods: NDArray[np.int64]


def extract_sounds(
    extractor: FeatureSource, recordings: Sequence[Recording], progress: ProgressCallback | None
) -> list[AlignedSound]:
    """Return the sound of each recording; repeats share theirs.

    Raises:
        EncodingError: a sound cannot be used.
    """
    known: dict[tuple[str, float], tuple[dict[str | int, Values], float]] = {}
    sounds = []
    for number, recording in enumerate(recordings, 1):
        skipped = int(np.floor(recording.onset / extractor.tr + 1e-6))
        offset = max(0.0, round(recording.onset - skipped * extractor.tr, 6))
        key = (os.path.realpath(recording.sound), offset)
        if key not in known:
            try:
                known[key] = extractor.extract(recording.sound, offset)
            except Exception as error:  # decoders may raise anything
                reason = str(error).split("\n")[0].removeprefix(f"{recording.sound}: ")
                raise EncodingError(f"{recording.sound}: {reason or type(error).__name__}") from None
        sounds.append(AlignedSound(*known[key], skipped, offset))
        if progress:
            progress(Progress(number, len(recordings), "sound"))
    return sounds


def select_volumes(
    recordings: Sequence[Recording], sounds: Sequence[AlignedSound], response: ResponseModel, tr: float
) -> tuple[list[KeptVolumes], list[str]]:
    """Return the volumes of each recording that all layers can predict, and notes about the others.

    Raises:
        EncodingError: most volumes of a recording are outside its sound.
    """
    selected = []
    total = outside = unknown = censored = 0
    for recording, sound in zip(recordings, sounds, strict=True):
        periods = np.arange(len(recording.targets)) + sound.skipped
        predictable = np.logical_and.reduce(
            [response.predictable(~np.isnan(rows[:, 0])) for rows in sound.rows.values()]
        )
        heard = (periods >= 0) & (periods < len(predictable))
        if 2 * heard.sum() < len(periods):
            raise EncodingError(
                f"{recording.sound}, run {recording.run}: {len(periods) - heard.sum():,} of {len(periods):,} "
                f"volumes are before or after the sound of {sound.seconds:.1f} s; check tr ({tr:g} s), onset "
                "and the order of the axes (time, outputs)"
            )
        possible = heard & predictable[periods.clip(0, len(predictable) - 1)]
        missing = np.isnan(recording.targets).all(1)
        kept = np.flatnonzero(possible & ~missing)
        selected.append(KeptVolumes(kept, periods[kept]))
        total += len(periods)
        outside += int((~heard).sum())
        unknown += int((heard & ~possible).sum())
        censored += int((possible & missing).sum())
    parts = [
        f"{count:,} {why}"
        for count, why in (
            (outside, "before or after their sound"),
            (unknown, "without frames of all layers (before the first ones, or edge frames)"),
            (censored, "NaN in all outputs"),
        )
        if count
    ]
    left_out = outside + unknown + censored
    notes = [f"all {total:,} volumes are used"]
    if left_out:
        notes = [f"{left_out:,} of {total:,} volumes left out: {', '.join(parts)}"]
    lengths = {recording.sound: sound.seconds for recording, sound in zip(recordings, sounds, strict=True)}
    seconds = sum(lengths.values())
    if tr * total < _LEAST_COVERED * seconds:
        notes.append(f"the targets last {tr * total:,.0f} s, the sounds {seconds:,.0f} s; is tr right?")
    return selected, notes


def _runs(recordings: Sequence[Recording]) -> list[list[int]]:
    """Return the recordings of each run."""
    runs: dict[str, list[int]] = {}
    for index, recording in enumerate(recordings):
        runs.setdefault(recording.run, []).append(index)
    return list(runs.values())


def assemble_targets(
    recordings: Sequence[Recording], rows: Sequence[KeptVolumes]
) -> tuple[Values, NDArray[np.bool_], list[str]]:
    """Return targets z-scored within runs, (volumes, usable outputs), which outputs are usable, and notes.

    Raises:
        EncodingError: none is usable.
    """
    usable = np.ones(recordings[0].targets.shape[1], bool)
    moments = []
    for members in _runs(recordings):
        values = np.concatenate([recordings[index].targets[rows[index].kept] for index in members])
        if not len(values):
            continue
        mean, std = values.mean(0, dtype=np.float64), values.std(0, dtype=np.float64)
        # constant but for float32's rounding, or NaN somewhere
        usable &= std > 1e-6 * np.abs(values).max(0)
        moments.append((members, mean, std))
    if not usable.any():
        raise EncodingError("targets: all outputs are constant or NaN in a run; nothing is left to fit")
    notes = []
    if excluded := int((~usable).sum()):
        notes.append(f"{excluded:,} of {len(usable):,} outputs are constant or NaN in a run; left out")
    starts = np.cumsum([0, *(len(own.kept) for own in rows)])
    targets = np.empty((starts[-1], usable.sum()), np.float32)
    for members, mean, std in moments:
        for index in members:
            values = recordings[index].targets[np.ix_(rows[index].kept, usable)]
            targets[starts[index] : starts[index + 1]] = (values - mean[usable]) / std[usable]
    return targets, usable, notes


def assemble_predictors(
    recordings: Sequence[Recording],
    sounds: Sequence[AlignedSound],
    rows: Sequence[KeptVolumes],
    layer: str | int,
    response: ResponseModel,
) -> tuple[Values, list[Scaling]]:
    """Return a layer's predictors of all kept volumes, and how those of each recording were z-scored.

    A run's rows are z-scored, delayed and selected, and then z-scored again; the latter is what is returned.
    """
    parts: list[Values] = [np.empty(0, np.float32)] * len(recordings)
    scalings: dict[int, Scaling] = {}
    for members in _runs(recordings):
        first = Scaling.of(np.concatenate([sounds[index].rows[layer] for index in members]))
        selected = [
            response.predictors(first.apply(sounds[index].rows[layer]))[rows[index].periods]
            for index in members
        ]
        # again, as a run may be a part of its sounds, and convolution leaves less of what changes fast
        second = Scaling.of(np.concatenate(selected))
        for index, own in zip(members, selected, strict=True):
            parts[index], scalings[index] = second.apply(own), second
    return np.concatenate(parts), [scalings[index] for index in range(len(recordings))]


def compute_noise_ceiling(
    recordings: Sequence[Recording],
    sounds: Sequence[AlignedSound],
    rows: Sequence[KeptVolumes],
    targets: Values,
    usable: NDArray[np.bool_],
) -> NDArray[np.float32]:
    """Return the largest correlation that a model of the stimulus can reach, by output.

    Of N z-scored repeats with the mean m, (N var(m) - 1) / (N - 1) is the share of signal (Sahani and
    Linden, 2003), which is their mean correlation; its root is the correlation of the noiseless
    response with one repeat (Schoppe et al., 2016). Shares are averaged over repeated stimuli, weighted by
    volumes; NaN without any.
    """
    ends = np.cumsum([len(own.kept) for own in rows])[:-1]
    parts = np.split(targets, ends)
    repeats: dict[tuple[str, float], list[int]] = {}  # on the same clock
    for index, (recording, sound) in enumerate(zip(recordings, sounds, strict=True)):
        repeats.setdefault((recording.stimulus_key, sound.offset), []).append(index)
    ceiling = np.full(len(usable), np.nan, np.float32)
    total, weight = np.zeros(targets.shape[1]), 0
    for members in repeats.values():
        common = rows[members[0]].periods
        for index in members[1:]:
            common = np.intersect1d(common, rows[index].periods)
        if len(members) < 2 or len(common) < 3:
            continue
        count = len(members)
        mean = np.zeros((len(common), targets.shape[1]))
        for index in members:
            mean += standardize(parts[index][np.isin(rows[index].periods, common)]) / count
        total += len(common) * (count * mean.var(0) - 1) / (count - 1)
        weight += len(common)
    if weight:
        ceiling[usable] = np.sqrt((total / weight).clip(0))
    return ceiling
