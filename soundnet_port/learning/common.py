"""What all training here has in common: devices, log, checkpoints, curves, start values, augmentation.

A run can be killed at any time. Its checkpoint is one file, written aside and renamed; the log is cut
back to the checkpoint's step when the run goes on, so that no row is there twice. All randomness is
drawn from `rng(seed, ...)` with what it is for, so nothing random has a state that must be kept.
"""

from __future__ import annotations

import csv
import io
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from soundnet_port.errors import MissingExtraError, SoundNetError
from soundnet_port.files import atomic_write
from soundnet_port.network.architecture import FULL_SCALE, SAMPLE_RATE
from soundnet_port.network.weights import cpu_state_dict, write_weights
from soundnet_port.version import __version__

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from soundnet_port.network.model import SoundNet

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


class TrainingError(SoundNetError):
    """A training cannot start or go on: what is wrong, and what to do."""


def rng(*key: int) -> np.random.Generator:
    """The random numbers for one purpose, a function of `key` alone, such as (seed, epoch, index)."""
    return np.random.default_rng(key)


def fabric_for(
    *,
    accelerator: str = "auto",
    devices: int | str = 1,
    strategy: str = "auto",
    precision: str = "32-true",
) -> Fabric:
    """Lightning Fabric for these devices; `fabric.launch(function, ...)` runs there.

    Args:
        accelerator: "cpu", "cuda", ... or "auto" for what is there.
        devices: how many, or "auto" for all.
        strategy: "auto" is one process for one device, and DistributedDataParallel in processes of
            its own for several (in those that are there already under torchrun).
        precision: "32-true", "bf16-mixed" or "16-mixed".

    Raises:
        TrainingError: the extra `[learn]` is not installed, or there are no such devices.
    """
    try:
        import matplotlib  # noqa: F401  (what `curves` needs, after hours)
        from lightning_fabric import Fabric
    except ImportError as error:
        raise MissingExtraError(str(error.name), "learn") from None
    if precision not in PRECISIONS:
        raise TrainingError(f"unknown precision {precision!r}; choose from {', '.join(PRECISIONS)}")
    if strategy == "auto" and devices != 1:
        strategy = "ddp" if "TORCHELASTIC_RUN_ID" in os.environ else "ddp_spawn"
    try:
        return Fabric(accelerator=accelerator, devices=devices, strategy=strategy, precision=precision)
    except (RuntimeError, ValueError, TypeError) as error:  # Lightning's own kinds are among these
        reason = str(error).splitlines()[0]
        raise TrainingError(f"devices {devices} of {accelerator}, {precision}: {reason}") from None


def first_process() -> bool:
    """Whether this is the process that speaks and writes; launchers such as torchrun begin several."""
    from lightning_fabric.utilities.rank_zero import rank_zero_only

    return getattr(rank_zero_only, "rank", 0) == 0


class Log:
    """A CSV file with a row per step, in rising order; a context manager.

    Args:
        path: of the file.
        fields: names of the columns; the first one is "step".
        step: rows after this step are removed, and the file is begun if it is not there.

    Raises:
        TrainingError: there is a file with other columns.
    """

    def __init__(self, path: str | os.PathLike[str], fields: Sequence[str], step: int = 0) -> None:
        self.path = Path(path)
        kept: list[list[str]] = []
        if step and self.path.exists():
            header, *rows = _rows(self.path)
            if header != list(fields):
                raise TrainingError(
                    f"{path}: a log with the columns {', '.join(header)}, not {', '.join(fields)}"
                )
            # a row that was being written when the run was killed is after the checkpoint, or cut
            kept = [row for row in rows if len(row) == len(fields) and int(row[0]) <= step]
        with atomic_write(self.path) as aside, open(aside, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([fields, *kept])
        self._file = open(self.path, "a", newline="", encoding="utf-8")  # noqa: SIM115  (closed below)
        self._writer = csv.DictWriter(self._file, fields, restval="", lineterminator="\n")

    def write(self, **row: object) -> None:
        """Adds a row; columns that are not named stay empty."""
        self._writer.writerow(row)

    def flush(self) -> None:
        """Puts all rows on the disk. To be done before a checkpoint of the same step is written."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.flush()
        self._file.close()


def _rows(path: Path) -> list[list[str]]:
    try:
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            return list(csv.reader(file)) or [[]]
    except csv.Error as error:
        raise TrainingError(f"{path}: not a log of a training ({error})") from None


def save_checkpoint(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Writes a checkpoint, all or nothing: tensors, numbers, text, and dicts and lists of them."""
    held = io.BytesIO()  # torch makes a full disk a RuntimeError, and that without a reason
    torch.save(dict(state), held)
    with atomic_write(path) as aside:
        aside.write_bytes(held.getbuffer())


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a checkpoint, tensors onto the CPU. No code inside it is run (`weights_only`).

    Raises:
        TrainingError: the file is damaged or no checkpoint.
        OSError: it cannot be opened.
    """
    try:
        with open(path, "rb") as file:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, KeyError, EOFError, AttributeError, pickle.UnpicklingError) as error:
        raise TrainingError(
            f"{path}: damaged, or not a checkpoint ({str(error).splitlines()[0]}); remove it to begin anew"
        ) from None
    if not isinstance(state, dict):
        raise TrainingError(f"{path}: not a checkpoint; remove it to begin anew")
    return state


def check_same(
    folder: Path, what: str, before: Any, now: Mapping[str, Any], allowed: Sequence[str] = ()
) -> None:
    """Whether a folder's run can go on with these settings.

    Args:
        folder: of the run.
        what: it is called in the message.
        before: the settings that it was begun with; if they are no mapping, they differ.
        now: the settings that it is to go on with.
        allowed: those that may differ.

    Raises:
        TrainingError: other settings differ; the message names each.
    """
    old = before if isinstance(before, Mapping) else {}
    differing = [key for key in {**now, **old} if old.get(key) != now.get(key) and key not in allowed]
    if differing:
        texts = [f"{key} {old.get(key)} there, {now.get(key)} now" for key in differing]
        raise TrainingError(
            f"{folder}: holds a {what} with other settings ({'; '.join(texts)}); "
            "give the same ones to go on, or another folder"
        )


def write_trained(path: str | os.PathLike[str], model: SoundNet, training: Mapping[str, Any]) -> None:
    """Writes a network as weights that say how they were trained; float32, wherever it is."""
    metadata = {
        "categories": {head: list(names) for head, names in model.categories.items()} or None,
        "source": {"form": "training"},
        "converter": __version__,
        "training": training,
    }
    write_weights(path, model.architecture, cpu_state_dict(model, torch.float32), metadata)


def curves(log: str | os.PathLike[str], png: str | os.PathLike[str]) -> None:
    """Draws a log: a panel per column over the steps.

    Columns whose names differ only by a leading "validation " share a panel.

    Raises:
        TrainingError: the extra `[learn]` is not installed, or the file is no log.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "learn") from None
    header, *rows = _rows(Path(log))
    panels: dict[str, list[int]] = {}
    for column, name in enumerate(header[1:], 1):
        panels.setdefault(name.removeprefix("validation "), []).append(column)
    figure = Figure(figsize=(5 * max(1, min(3, len(panels))), 3.5 * -(-len(panels) // 3) or 3.5))
    FigureCanvasAgg(figure)
    for number, (name, columns) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(-(-len(panels) // 3), min(3, len(panels)), number)
        for column in columns:
            points = [(int(row[0]), float(row[column])) for row in rows if row[column]]
            marker = "." if len(points) < 50 else ""
            if points:
                axes.plot(*zip(*points, strict=True), label=header[column], marker=marker, linewidth=1)
        axes.set_title(name)
        axes.set_xlabel(header[0])
        if axes.lines:
            axes.legend()
    figure.tight_layout()
    with atomic_write(png) as aside:
        figure.savefig(aside, format="png", dpi=100)


def initialize(model: nn.Module, generator: np.random.Generator) -> None:
    """Start values of the original (main_train.lua, weights_init), in place.

    Weights of convolutions N(0, 0.01), batch-norm gammas N(1, 0.02) (standard deviations), all
    biases 0; running means 0, running variances 1.
    """

    def normal(tensor: Tensor, mean: float, std: float) -> None:
        drawn = generator.normal(mean, std, tuple(tensor.shape)).astype(np.float32)
        tensor.copy_(torch.from_numpy(drawn))

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv1d):
                normal(module.weight, 0.0, 0.01)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.BatchNorm1d):
                module.reset_running_stats()
                normal(module.weight, 1.0, 0.02)
                module.bias.zero_()


@dataclass(frozen=True)
class Augmentation:
    """Random changes to a waveform; none by default, as in the original.

    Attributes:
        gain: dB; louder or softer by up to so much, clipped to full scale.
        shift: seconds; earlier or later by up to so much, and what leaves one end enters the other.
        stretch: faster or slower, higher or lower, by up to so many times; 1 changes nothing.
        flip: turn the sign of every other sound.
        mix: probability from 0 to 1 that a sound is mixed with another one, see `mixed`.
    """

    gain: float = 0.0
    shift: float = 0.0
    stretch: float = 1.0
    flip: bool = False
    mix: float = 0.0

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("gain", self.gain, 0, 200),
            ("shift", self.shift, 0, 1000),
            ("stretch", self.stretch, 1, 10),
            ("mix", self.mix, 0, 1),
        ):
            if not least <= value <= most:
                raise TrainingError(f"augmentation: {name} must be from {least} to {most}, not {value}")

    def __call__(self, waveform: Tensor, generator: np.random.Generator) -> Tensor:
        """The changed waveform, (samples,); with the same generator state, the same one."""
        samples = len(waveform)
        if self.stretch > 1:
            length = round(samples * self.stretch ** generator.uniform(-1, 1))
            waveform = F.interpolate(waveform[None, None], size=max(1, length), mode="linear")[0, 0]
            waveform = waveform.repeat(-(-samples // len(waveform)))
        if self.shift:
            most = round(self.shift * SAMPLE_RATE)
            waveform = waveform.roll(int(generator.integers(-most, most, endpoint=True)))
        waveform = waveform[:samples]
        if self.flip and generator.random() < 0.5:
            waveform = -waveform
        if self.gain:
            factor = 10 ** (generator.uniform(-self.gain, self.gain) / 20)
            waveform = (waveform * factor).clamp(-FULL_SCALE, FULL_SCALE)
        return waveform


def mixed(one: Tensor, other: Tensor, share: float) -> Tensor:
    """Two waveforms of the same length together, so that the first seems to be `share` of what is heard.

    Labels are then to be mixed in the same proportion, `share` to `1 - share`: between-class learning
    (Tokozume, Ushiku, Harada, ICLR 2018), here with the waveforms' root mean squares for their
    loudness.
    """
    loudness = [float(each.square().mean()) ** 0.5 + 1e-3 for each in (one, other)]
    weight = 1 / (1 + loudness[0] / loudness[1] * (1 - share) / max(share, 1e-6))
    together: Tensor = (weight * one + (1 - weight) * other) / (weight**2 + (1 - weight) ** 2) ** 0.5
    return together
