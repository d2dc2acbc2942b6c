"""What a fine-tuning run is: its configuration, its data and network, and its result on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from soundnet_port.learning.augmentation import Augmentation
from soundnet_port.learning.datasets import read_labeled
from soundnet_port.learning.errors import TrainingError
from soundnet_port.learning.labeled_sounds import LabeledSounds, Split
from soundnet_port.learning.randomness import INITIALIZATION, derive_rng
from soundnet_port.learning.run_files import WEIGHTS, check_settings
from soundnet_port.network.architecture import (
    CLASSES,
    SAMPLE_RATE,
    SOUNDNET8,
    Architecture,
    describe_shortest,
)
from soundnet_port.network.model import SoundNet
from soundnet_port.network.weights import checksum
from soundnet_port.pretrained import load_pretrained

RESULT = "result.json"
_DEFAULT_AUGMENTATION = Augmentation(gain=6, shift=5, stretch=1.12, flip=True, mix=0.2)


@dataclass(frozen=True)
class FinetuneConfig:
    """Hyperparameters of fine-tuning; the defaults suit a few hundred to a few thousand clips.

    Attributes:
        epochs: passes over the training sounds.
        batch: sounds per step.
        lr: peak learning rate of AdamW's one-cycle cosine schedule (Smith and Topin, 2018); by default
            0.003 from random values, and 0.001 from weights.
        decay: AdamW's weight decay, of weights but not of biases and batch norms.
        dropout: probability, on the head's input.
        seconds: of a random crop; shorter sounds are repeated.
        augmentation: of each crop.
        patience: with validation sounds, stop after this many epochs without improvement; 0: never.
        seed: of initialization, order, crops, augmentation and dropout.
        edge_frames: include head frames that see edge frames in training and predictions (see
            `SoundNet.edge_frames`). By default they are left out, and a crop or clip that has no others
            is repeated until it does. Only a head on conv7 (conv4 with 5 layers) has any.
    """

    epochs: int = 60
    batch: int = 16
    lr: float | None = None
    decay: float = 0.05
    dropout: float = 0.3
    seconds: float = 5.0
    augmentation: Augmentation = _DEFAULT_AUGMENTATION
    patience: int = 0
    seed: int = 0
    edge_frames: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (
            ("epochs", 1, 10**6),
            ("batch", 2, 10**5),
            ("lr", 1e-9, 10),
            ("decay", 0, 10),
            ("dropout", 0, 0.99),
            ("seconds", 0.2, 3600),
            ("patience", 0, 10**6),
            ("seed", 0, 2**63),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise TrainingError(f"{name} must be from {low} to {high}, not {value}")


@dataclass(frozen=True)
class FinetuneResult:
    """The result of a fine-tuning run.

    Attributes:
        folder: of the run.
        weights: the file, for `load_pretrained` and `predict`.
        classes: names, in the order of the outputs.
        epoch: the one whose weights these are.
        fold: name of the held-out fold; "" without one.
        accuracy: of `predict`'s top class on the held-out sounds, 0 to 1; None without any.
        predictions: for each held-out sound its path, its class, and the predicted class.
        unreadable: reason by path, of sounds that were left out.
        seconds: training time, over all interruptions.
        edge_frames: whether training and predictions included edge frames; predict with such a network
            with `edge_frames=True`.
    """

    folder: Path
    weights: Path
    classes: tuple[str, ...]
    epoch: int
    fold: str
    accuracy: float | None
    predictions: tuple[tuple[str, str, str], ...]
    unreadable: Mapping[str, str]
    seconds: float
    edge_frames: bool = False


@dataclass(frozen=True)
class FinetuneRun:
    """A run that is ready to start.

    Attributes:
        folder: of the run.
        data: labeled sounds.
        model: the network before the first step.
        frozen_blocks: how many of its first blocks stay as they are.
        config: with the learning rate.
        train: indices of sounds.
        test: indices of the held-out sounds.
        validation: indices of the sounds that choose the epoch.
        fold: name of the held-out fold; "" without one.
        settings: all that the result depends on, as checkpoint and result.json record it.
    """

    folder: Path
    data: LabeledSounds
    model: SoundNet
    frozen_blocks: int
    config: FinetuneConfig
    train: tuple[int, ...]
    test: tuple[int, ...]
    validation: tuple[int, ...]
    fold: str
    settings: dict[str, Any]

    def read_result(self) -> FinetuneResult | None:
        """Read the result of this run; None if it is not done.

        Raises:
            TrainingError: the folder holds a run with other settings.
        """
        path = self.folder / RESULT
        try:
            result = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise TrainingError(f"{path}: {error}; remove it to start over") from None
        self.check_settings(result.get("settings"))
        return FinetuneResult(
            self.folder,
            self.folder / WEIGHTS,
            tuple(self.data.classes),
            result["epoch"],
            self.fold,
            result["accuracy"],
            tuple(tuple(prediction) for prediction in result["predictions"]),
            result["unreadable"],
            result["seconds"],
            self.settings.get("edge_frames", False),
        )

    def check_settings(self, saved: Any) -> None:
        """Raise a TrainingError if the settings in the folder differ from this run's."""
        if isinstance(saved, Mapping) and "edge_frames" in self.settings:
            saved = {"edge_frames": True, **saved}  # runs from before it was a setting included them
        check_settings(self.folder, "run", saved, self.settings)


def prepare_run(
    data: LabeledSounds | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    weights: SoundNet | Architecture | str | os.PathLike[str] | None,
    layer: str | None,
    kernel: int,
    frozen: str | None,
    config: FinetuneConfig,
    test: str | None,
    validation: str | None,
    precision: str,
) -> FinetuneRun:
    """Read the data, build the network, and check that they and the settings fit; see `finetune`."""
    if not isinstance(data, LabeledSounds):
        data = read_labeled(data)
    source = SOUNDNET8 if weights is None else weights
    if not isinstance(source, (SoundNet, Architecture)):
        source = load_pretrained(source)
    full = source.architecture if isinstance(source, SoundNet) else source
    try:
        architecture = full.with_classes(len(data.classes), layer or full.last_layer, kernel)
    except ValueError as error:
        raise TrainingError(str(error)) from None
    frozen_blocks = _count_frozen(architecture, frozen)
    if frozen_blocks and not isinstance(source, SoundNet):
        raise TrainingError("a network with random values cannot be frozen; start from weights")
    head = architecture.layer(CLASSES)
    if config.seconds * SAMPLE_RATE < head.shortest:
        raise TrainingError(f"crops of {config.seconds} s are too short: {describe_shortest(head)}")
    train_sounds, test_sounds, validation_sounds = _hold_out(data, test, validation)
    trunk = None
    if isinstance(source, SoundNet):
        state = source.state_dict()
        names = [name for name in architecture.state_shapes() if not name.startswith(f"{CLASSES}.")]
        trunk = {name: state[name].float().cpu() for name in names}
    if config.lr is None:
        config = replace(config, lr=0.001 if trunk else 0.003)
    hyperparameters = asdict(config)
    edge_frames = hyperparameters.pop("edge_frames")  # most heads have none, so nothing to choose
    settings = {
        "architecture": architecture.name,
        "widths": list(architecture.widths),
        "layer": architecture.last_layer,
        "kernel": kernel,
        **({"edge_frames": edge_frames} if architecture.has_edge_frames(head) else {}),
        "frozen": frozen,
        "start": checksum(trunk) if trunk else "random values",
        "tuning": hyperparameters,
        "classes": list(data.classes),
        "test": test,
        "validation": validation,
        "precision": precision,
        "sounds": _hash_sounds(data),
        "training sounds": len(train_sounds),
    }
    return FinetuneRun(
        Path(folder),
        data,
        _build_model(architecture, trunk, data.classes, config.seed),
        frozen_blocks,
        config,
        train_sounds,
        test_sounds,
        validation_sounds,
        test or "",
        json.loads(json.dumps(settings)),  # as reading them gives them
    )


def _count_frozen(architecture: Architecture, frozen: str | None) -> int:
    """Return the number of blocks up to a layer."""
    ends = [block.output for block in architecture.blocks]
    names = [block.name for block in architecture.blocks]
    if frozen is None:
        return 0
    if frozen not in [*ends, *names]:
        raise TrainingError(f"frozen: no layer {frozen!r}; choose from {', '.join(ends)}")
    return (ends if frozen in ends else names).index(frozen) + 1


def _hash_sounds(data: LabeledSounds) -> str:
    """Return the sha256 of the sounds' names, classes and folds, wherever they are stored."""
    lines = [f"{sound.path.name}\t{sound.label}\t{sound.fold}\n" for sound in data.sounds]
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _hold_out(
    data: LabeledSounds, test: str | None, validation: str | None
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the indices of training, test and validation sounds."""
    splits: dict[str, Split] = {split.fold: split for split in data.splits}
    for name in (test, validation):
        if name is not None and name not in splits:
            choices = f"choose from {', '.join(splits)}" if splits else "the sounds have no folds"
            raise TrainingError(f"no fold {name!r}; {choices}")
    if test is not None and test == validation:
        raise TrainingError(f"fold {test!r} cannot be both test and validation set")
    test_sounds = splits[test].test if test is not None else ()
    validation_sounds = splits[validation].test if validation is not None else ()
    others = splits[test].train if test is not None else tuple(range(len(data.sounds)))
    train_sounds = tuple(index for index in others if index not in set(validation_sounds))
    if missing := set(data.classes) - {data.sounds[index].label for index in train_sounds}:
        raise TrainingError(f"no training sounds of {', '.join(sorted(missing))}")
    return (
        train_sounds,
        test_sounds,
        tuple(index for index in validation_sounds if index not in set(test_sounds)),
    )


def _build_model(
    architecture: Architecture, trunk: Mapping[str, Tensor] | None, classes: Sequence[str], seed: int
) -> SoundNet:
    """Build the network: the trunk's tensors, and Kaiming initialization for everything else."""
    model = SoundNet(architecture, {CLASSES: classes})
    model.fast_gradients = True
    generator = torch.Generator().manual_seed(int(derive_rng(seed, INITIALIZATION).integers(2**31)))
    for name, nonlinearity in [(block.name, "relu") for block in architecture.blocks] + [(CLASSES, "linear")]:
        weight = model.get_parameter(f"{name}.weight")
        nn.init.kaiming_normal_(weight, nonlinearity=nonlinearity, generator=generator)  # type: ignore[arg-type]
        nn.init.zeros_(model.get_parameter(f"{name}.bias"))
    if trunk:
        model.load_state_dict(trunk, strict=False)
    return model
