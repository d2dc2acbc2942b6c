"""Train SoundNet as the paper did: teachers that saw the videos, and a student that hears them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soundnet_port.files import exclusive_lock
from soundnet_port.learning.devices import create_fabric, is_first_process
from soundnet_port.learning.distillation import TrainConfig
from soundnet_port.learning.distillation_data import open_distillation_data
from soundnet_port.learning.errors import TrainingError
from soundnet_port.learning.pseudo_labels import HEADS, DistillationData, get_head
from soundnet_port.learning.randomness import INITIALIZATION, derive_rng, initialize
from soundnet_port.learning.run_files import CHECKPOINT, check_settings, load_checkpoint
from soundnet_port.learning.training_loop import TrainRun, stop_on_signals, train_process
from soundnet_port.network.architecture import SOUNDNET8, Architecture
from soundnet_port.network.model import SoundNet
from soundnet_port.network.weights import checksum, cpu_state_dict, read_weights
from soundnet_port.pretrained import locate_weights
from soundnet_port.progress import ProgressCallback

_VARIABLE_SETTINGS = ("iterations",)  # may differ when a run resumes


@dataclass(frozen=True)
class TrainResult:
    """The result of a training run.

    Attributes:
        folder: of the run.
        weights: the file, for `load_pretrained`: the best by validation if there is any, else the last.
        step: iterations done, with those of earlier calls.
        best: the step whose weights these are.
        loss: of the last iteration.
        validation: figures of the best step.
        unreadable: reason by name, of sounds that were silence in the training.
        interrupted: stopped by a signal before the last iteration; the same call resumes.
    """

    folder: Path
    weights: Path
    step: int
    best: int
    loss: float | None
    validation: Mapping[str, float]
    unreadable: Mapping[str, str]
    interrupted: bool


def train(
    data: DistillationData | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    weights: SoundNet | Architecture | str | os.PathLike[str] | None = None,
    config: TrainConfig | None = None,
    validation: DistillationData | str | os.PathLike[str] | None = None,
    validate_every: int = 5000,
    save_every: int = 500,
    device: str = "auto",
    devices: int = 1,
    strategy: str = "auto",
    precision: str = "32-true",
    workers: int = 0,
    cache: float = 1.0,
    progress: ProgressCallback | None = None,
) -> TrainResult:
    """Train a SoundNet on teachers' distributions, or resume an interrupted run.

    Writes to the folder `log.csv`, `curves.png`, `checkpoint.pt`, `weights.safetensors`, and
    `unreadable.tsv` if there are unreadable sounds. Order and augmentation are functions of seed,
    epoch and index alone, so a run that was killed gives the same numbers as an uninterrupted one.

    Args:
        data: what `open_distillation_data` returns or takes.
        folder: of the run; if it has a checkpoint, the run resumes from there.
        weights: initial weights: a network, or its name or file; heads of other sizes than the data's
            start anew. Or an Architecture, for random values and the widths of the blocks; by default
            SOUNDNET8.
        config: hyperparameters; by default `TrainConfig()`. When a run resumes, only `iterations` may differ.
        validation: other data of the same kind; the weights of the step with the least loss there
            are kept. The folder of the released data stands for its val lists.
        validate_every: iterations between validations; also after the last one.
        save_every: iterations between checkpoints; also after the last one, and on SIGINT or SIGTERM.
        device: "cpu", "cuda", "cuda:1", "mps", or "auto" for the best one available.
        devices: how many of that kind, -1 for all; each computes its part of a batch with batch-norm
            statistics of its own, gradients are averaged. The running statistics that are saved are
            the first device's.
        strategy: how several devices work together, see `soundnet_port.learning.devices.create_fabric`.
        precision: "32-true", "bf16-mixed" or "16-mixed".
        workers: decoding processes per device; 0 decodes in the training process.
        cache: GB of decoded sound to keep in memory, for each device.
        progress: called in the first device's process with a `StepProgress`; it must be picklable if
            there are several devices.

    Raises:
        TrainingError: invalid data or settings, a folder with another run or with another process at
            work, no such devices, a loss that is no number any more.
        WeightsError: no such weights.
        MissingExtraError: the extra `[learn]` is not installed.
    """
    config = config or TrainConfig()
    fabric = create_fabric(device, devices=devices, strategy=strategy, precision=precision)
    if isinstance(data, (str, os.PathLike)):
        data = open_distillation_data(data)
    if isinstance(validation, (str, os.PathLike)):
        validation = open_distillation_data(validation, "val")
    if validation is not None and validation.teachers != data.teachers:
        raise TrainingError(f"{validation.name}: teachers {validation.teachers}, expected {data.teachers}")
    if min(validate_every, save_every) < 1 or workers < 0 or not cache >= 0:
        raise TrainingError("validate_every and save_every must be at least 1, workers and cache 0 or more")
    if config.batch % fabric.world_size:
        raise TrainingError(f"a batch of {config.batch} cannot be shared by {fabric.world_size} devices")
    config.teacher_weights(list(data.teachers))
    with torch.random.fork_rng(devices=[]):  # modules draw initial values
        model, sha256 = _build_model(weights, data, config)
    settings = {
        "recipe": asdict(config) | {"teachers": dict(config.teachers)},
        "architecture": model.architecture.name,
        "widths": list(model.architecture.widths),
        "teachers": dict(data.teachers),
        "data": data.identity,
        "validation": validation.identity if validation is not None else None,
        "start": sha256,
        "precision": precision,
        "falling to": config.iterations if config.schedule != "constant" else None,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    run = TrainRun(
        folder,
        data,
        validation,
        config,
        model,
        settings,
        validate_every,
        save_every,
        workers,
        cache,
        progress,
        os.getpid(),
    )
    # one lock is for all processes
    with exclusive_lock(folder, TrainingError) if is_first_process() else nullcontext():
        if (folder / CHECKPOINT).exists():
            saved = load_checkpoint(folder / CHECKPOINT).get("settings")
            check_settings(folder, "training", _flatten(saved), _flatten(settings), _VARIABLE_SETTINGS)
        with stop_on_signals():  # passes signals on to processes of other devices
            # Fabric looks into arguments and results, and cannot into frozen ones
            return TrainResult(**fabric.launch(partial(train_process, run=run)))


def _build_model(
    weights: SoundNet | Architecture | str | os.PathLike[str] | None,
    data: DistillationData,
    config: TrainConfig,
) -> tuple[SoundNet, str | None]:
    """Build the network before the first step; with the sha256 of the initial weights, if any."""
    state: dict[str, Tensor] = {}
    sha256 = None
    if weights is None or isinstance(weights, Architecture):
        architecture = weights or SOUNDNET8
    elif isinstance(weights, SoundNet):
        architecture, state = weights.architecture, cpu_state_dict(weights, torch.float32)
        sha256 = checksum(state)
    else:
        architecture, state, metadata = read_weights(locate_weights(weights))
        sha256 = metadata["sha256"]
    if set(architecture.head_sizes) != set(HEADS):
        source = weights if isinstance(weights, (str, os.PathLike)) else architecture.name
        raise TrainingError(f"{source}: no heads objects and scenes; training needs both")
    sizes = {get_head(column): size for column, size in data.teachers.items()}
    model = SoundNet(architecture.resized(architecture.widths, sizes), data.categories)
    model.fast_gradients = True
    initialize(model, derive_rng(config.seed, INITIALIZATION))
    shapes = model.architecture.state_shapes()
    same_size = {
        head: f"{head}.weight" in state and state[f"{head}.weight"].shape == shapes[f"{head}.weight"]
        for head in HEADS
    }
    taken = {name: tensor for name, tensor in state.items() if same_size.get(name.partition(".")[0], True)}
    model.load_state_dict(taken, strict=False)
    return model, sha256


def _flatten(settings: Any) -> dict[str, Any]:
    """Merge the hyperparameters into the other settings."""
    settings = dict(settings) if isinstance(settings, dict) else {}
    hyperparameters = dict(settings.pop("recipe", None) or {})
    return {**settings, **hyperparameters}
