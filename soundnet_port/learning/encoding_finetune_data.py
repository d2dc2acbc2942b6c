"""The recordings of a fine-tuning run: targets, and predictors that follow the trunk as it changes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soundnet_port.learning.encoding_design import (
    AlignedSound,
    assemble_predictors,
    assemble_targets,
    extract_sounds,
    select_volumes,
)
from soundnet_port.learning.encoding_features import Scaling
from soundnet_port.learning.encoding_finetune_run import PARTS, TRAIN, EncodingRun
from soundnet_port.learning.encoding_windows import TrunkWindows
from soundnet_port.learning.errors import EncodingError
from soundnet_port.learning.feature_cache import Values
from soundnet_port.progress import Progress, ProgressCallback

_LEAST_VARIANCE = 1e-12  # of a channel in a window; constant ones get no gradient


@dataclass(frozen=True)
class Window:
    """A stretch of a training recording.

    Attributes:
        recording: its index.
        kept: numbers of its volumes among those of the recording that are used.
    """

    recording: int
    kept: NDArray[np.int64]


class RunData:
    """Targets and predictors of a run's recordings, by part; see `encoding_design`.

    Args:
        run: whose model computes the features, on its device.
        progress: called after each sound, and then with each note as a message.

    Attributes:
        notes: caveats, and how many volumes were left out.
        usable: which outputs can be fitted.
        members: of each part, the indices of its recordings; parts without any are absent.
        targets: of each part, z-scored, (volumes, usable outputs).
        predictors: of each part, (volumes, predictors), as of the last `refresh`.

    Raises:
        EncodingError: a sound or the targets cannot be used.
    """

    def __init__(self, run: EncodingRun, progress: ProgressCallback | None) -> None:
        self._run = run
        self._features = TrunkWindows(
            run.model,
            run.frozen_blocks,
            run.tr,
            run.align,
            edge_frames=run.edge_frames,
            decoder=run.decoder,
        )
        self._device = next(run.model.parameters()).device
        indices = {part: [at for at, own in enumerate(run.parts) if own == part] for part in PARTS}
        self.members = {part: members for part, members in indices.items() if members}
        sounds = extract_sounds(self._features, run.recordings, progress)
        self._rows, self.notes = select_volumes(run.recordings, sounds, run.response, run.tr)
        for part, members in self.members.items():
            if sum(len(self._rows[index].kept) for index in members) < 2:
                raise EncodingError(
                    f"{part} run {run.name_part(part)}: fewer than two volumes can be used; see onset and tr"
                )
        targets, self.usable, notes = assemble_targets(run.recordings, self._rows)
        self.notes += notes
        self._share_targets(targets)
        self._sounds: dict[int, AlignedSound] = {}  # by recording; repeats share their rows
        self._scalings: dict[int, Scaling] = {}
        self.predictors: dict[str, Values] = {}
        for part, members in self.members.items():
            self._assemble(part, [sounds[index] for index in members])
        if not self.predictors[TRAIN].any():
            raise EncodingError(
                f"{run.layer}: no predictor varies in the training runs; see the sounds, and the delays, "
                "which must be shorter than the runs"
            )
        if progress:
            for note in self.notes:
                progress(Progress(len(sounds), len(sounds), "sound", message=note))

    def _share_targets(self, targets: Values) -> None:
        """Keep the targets by part, and those of each recording as views of these."""
        pieces = np.split(targets, np.cumsum([len(own.kept) for own in self._rows])[:-1])
        self.targets: dict[str, Values] = {}
        self._targets: dict[int, Values] = {}
        for part, members in self.members.items():
            self.targets[part] = np.concatenate([pieces[index] for index in members])
            ends = np.cumsum([len(pieces[index]) for index in members])[:-1]
            self._targets.update(zip(members, np.split(self.targets[part], ends), strict=True))

    def refresh(self, part: str) -> None:
        """Compute the predictors of a part anew, and how its runs are scaled."""
        recordings = [self._run.recordings[index] for index in self.members[part]]
        self._assemble(part, extract_sounds(self._features, recordings, None))

    def _assemble(self, part: str, sounds: list[AlignedSound]) -> None:
        members = self.members[part]
        self._sounds.update(zip(members, sounds, strict=True))
        self.predictors[part], scalings = assemble_predictors(
            [self._run.recordings[index] for index in members],
            sounds,
            [self._rows[index] for index in members],
            self._run.layer,
            self._run.response,
        )
        self._scalings.update(zip(members, scalings, strict=True))

    def folds(self) -> NDArray[np.int64]:
        """Return the fold of each training volume, counted from 0."""
        members = self.members[TRAIN]
        counts = [len(self._rows[index].kept) for index in members]
        folds = np.repeat([self._run.folds[index] for index in members], counts)
        return np.unique(folds, return_inverse=True)[1].astype(np.int64)  # a run may have no volumes

    def draw_windows(self, generator: np.random.Generator) -> list[Window]:
        """Divide the training recordings into windows, with random offsets, in random order."""
        width = max(1, round(self._run.config.seconds / self._run.tr))
        windows = []
        for index in self.members[TRAIN]:
            periods = self._rows[index].periods
            if len(periods):
                numbers = (periods - periods[0] + generator.integers(width)) // width
                windows += [Window(index, np.flatnonzero(numbers == number)) for number in np.unique(numbers)]
        return [windows[number] for number in generator.permutation(len(windows))]

    def window_targets(self, window: Window) -> Tensor:
        """Return z-scored targets, (volumes, usable outputs)."""
        return torch.from_numpy(self._targets[window.recording][window.kept]).to(self._device)

    def window_predictors(self, window: Window) -> Tensor:
        """Return predictors, (volumes, predictors), with gradients.

        They are z-scored by the run's rows as they are now: the window's, and the others as they were
        computed last. By the rows of the epoch's start, a channel that was nearly silent could become huge.
        """
        index, response = window.recording, self._run.response
        periods = self._rows[index].periods[window.kept]
        first, stop = max(0, int(periods[0]) - max(response.delays)), int(periods[-1]) + 1
        sound = self._sounds[index]
        values, known = self._features.window(self._run.recordings[index].sound, sound.offset, first, stop)
        rows = sound.rows[self._run.layer]
        rows[first:stop][known] = values.detach().cpu().numpy()[known]
        scaling, mask = self._scale_run(index), torch.from_numpy(known).to(self._device)[:, None]
        values = _project_scale(values, mask)
        values = (values - self._row(scaling.mean)) * self._row(scaling.factor) * mask
        delayed = response.delay(values)[torch.from_numpy(periods - first).to(self._device)]
        scaling = self._scalings[index]
        return (delayed - self._row(scaling.mean)) * self._row(scaling.factor)

    def _scale_run(self, index: int) -> Scaling:
        """Return how the rows of a recording's run are z-scored."""
        run = self._run.recordings[index].run
        members = [own for own in self.members[TRAIN] if self._run.recordings[own].run == run]
        return Scaling.of(np.concatenate([self._sounds[own].rows[self._run.layer] for own in members]))

    def _row(self, numbers: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(numbers).to(self._device, torch.float32)


def _project_scale(values: Tensor, mask: Tensor) -> Tensor:
    """Return the same values, (periods, channels), with the gradients that z-scoring the window would have.

    These do not change a channel's mean and scale, which z-scoring the run takes back. Otherwise that is most
    of the gradient, as larger features seem to make up for the shrinkage of ridge regression.
    """
    count = mask.sum().clamp(min=1)
    mean = (values * mask).sum(0) / count
    centered = (values - mean) * mask
    std = (centered.square().sum(0) / count).clamp(min=_LEAST_VARIANCE).sqrt()
    return centered * (std.detach() / std) + mean.detach()
