"""Prepare a fine-tuning run: read the data, build the network, and check that they and the settings fit."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from soundnet_port.learning.datasets import read_labeled
from soundnet_port.learning.errors import TrainingError
from soundnet_port.learning.finetune_crops import count_variants
from soundnet_port.learning.finetune_run import FinetuneConfig, FinetuneRun
from soundnet_port.learning.labeled_sounds import LabeledSounds, Split
from soundnet_port.learning.protocol_features import modern_layers
from soundnet_port.learning.randomness import INITIALIZATION, derive_rng
from soundnet_port.network.architecture import (
    CLASSES,
    SAMPLE_RATE,
    SOUNDNET8,
    Architecture,
    describe_shortest,
)
from soundnet_port.network.model import SoundNet
from soundnet_port.network.weights import checksum, cpu_state_dict
from soundnet_port.pretrained import load_pretrained

HEADS = ("pooled", "convolution")


def prepare_run(
    data: LabeledSounds | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    weights: SoundNet | Architecture | str | os.PathLike[str] | None,
    head: str | None,
    layer: str | None,
    kernel: int,
    frozen: str | None,
    config: FinetuneConfig,
    test: str | None,
    validation: str | None,
    precision: str,
) -> FinetuneRun:
    """Prepare a run; for arguments and errors see `finetune`."""
    if not isinstance(data, LabeledSounds):
        data = read_labeled(data)
    source = SOUNDNET8 if weights is None else weights
    if not isinstance(source, (SoundNet, Architecture)):
        source = load_pretrained(source)
    if _is_pooled(source, head, layer, kernel, frozen, config, validation):
        assert isinstance(source, SoundNet)
        return _prepare_pooled_run(data, folder, source, test)
    full = source.architecture if isinstance(source, SoundNet) else source
    try:
        default = modern_layers(full)[-1] if isinstance(source, SoundNet) else full.last_layer
        architecture = full.with_classes(len(data.classes), layer or default, kernel)
    except ValueError as error:
        raise TrainingError(str(error)) from None
    frozen_blocks = _count_frozen(architecture, frozen)
    if frozen_blocks and not isinstance(source, SoundNet):
        raise TrainingError("a network with random values cannot be frozen; start from weights")
    output = architecture.layer(CLASSES)
    if config.seconds * SAMPLE_RATE < output.shortest:
        raise TrainingError(f"crops of {config.seconds} s are too short: {describe_shortest(output)}")
    train_sounds, test_sounds, validation_sounds = _hold_out(data, test, validation)
    trunk = None
    if isinstance(source, SoundNet):
        state = source.state_dict()
        names = [name for name in architecture.state_shapes() if not name.startswith(f"{CLASSES}.")]
        trunk = {name: state[name].float().cpu() for name in names}
    if config.lr is None:
        config = replace(config, lr=0.001 if trunk else 0.003)
    if trunk and config.trunk_lr is None:
        config = replace(config, trunk_lr=float(config.lr or 0) / 10)
    config = replace(config, variants=count_variants(architecture, frozen_blocks, config, len(train_sounds)))
    hyperparameters = asdict(config)
    variants = hyperparameters.pop("variants")  # 0 where none are kept
    edge_frames = hyperparameters.pop("edge_frames")  # most heads have none, so nothing to choose
    settings = {
        "architecture": architecture.name,
        "widths": list(architecture.widths),
        "layer": architecture.last_layer,
        "kernel": kernel,
        **({"edge_frames": edge_frames} if architecture.has_edge_frames(output) else {}),
        "frozen": frozen,
        **({"variants": variants} if variants else {}),
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
        False,
        trunk is not None,
        frozen_blocks,
        config,
        train_sounds,
        test_sounds,
        validation_sounds,
        test or "",
        json.loads(json.dumps(settings)),  # as reading them gives them
    )


def _is_pooled(
    source: SoundNet | Architecture,
    head: str | None,
    layer: str | None,
    kernel: int,
    frozen: str | None,
    config: FinetuneConfig,
    validation: str | None,
) -> bool:
    """Whether to fit a pooled head: by default to weights, where no setting is for a convolution.

    Raises:
        TrainingError: settings that only a convolution has, or a pooled head on random values.
    """
    if head not in (None, *HEADS):
        raise TrainingError(f"unknown head {head!r}; choose from {', '.join(HEADS)}")
    given = {
        "layer": layer,
        "kernel": kernel != 1,
        "frozen": frozen,
        "validation": validation,
        "edge_frames": config.edge_frames,
    }
    names = [name for name, value in given.items() if value]
    if head == "convolution" or (head is None and (names or not isinstance(source, SoundNet))):
        return False
    if not isinstance(source, SoundNet):
        raise TrainingError("a pooled head is fitted to features of a trained network; start from weights")
    if names:
        raise TrainingError(
            f"{', '.join(names)}: a pooled head is fitted without training the network; leave them "
            "out, or the head"
        )
    return True


def _prepare_pooled_run(
    data: LabeledSounds, folder: str | os.PathLike[str], model: SoundNet, test: str | None
) -> FinetuneRun:
    train_sounds, test_sounds, _ = _hold_out(data, test, None)
    settings = {
        "architecture": model.architecture.name,
        "widths": list(model.architecture.widths),
        "head": "pooled",
        "start": checksum(cpu_state_dict(model, torch.float32)),
        "classes": list(data.classes),
        "test": test,
        "sounds": _hash_sounds(data),
        "training sounds": len(train_sounds),
    }
    return FinetuneRun(
        Path(folder),
        data,
        model,
        True,
        True,
        len(model.architecture.blocks),
        FinetuneConfig(),
        train_sounds,
        test_sounds,
        (),
        test or "",
        json.loads(json.dumps(settings)),
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
