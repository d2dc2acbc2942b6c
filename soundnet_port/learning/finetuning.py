"""Teaching a SoundNet classes of one's own: a new head on any layer, and as much of the trunk as wanted.

The original's script (main_finetune.lua) puts a convolution of 4 frames on conv7 and trains the whole
network with random crops of 5 s. Here the head sees one frame by default, its logits are averaged
over the clip, and the sounds are changed at random while it learns: without that, a network of this
size learns a few hundred clips by heart.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from soundnet_port.audio.loading import AudioError, load_audio
from soundnet_port.files import atomic_write, exclusive_lock
from soundnet_port.inference.prediction import predict
from soundnet_port.learning.common import (
    Augmentation,
    Log,
    TrainingError,
    check_same,
    curves,
    fabric_for,
    load_checkpoint,
    mixed,
    rng,
    save_checkpoint,
    write_trained,
)
from soundnet_port.learning.datasets import LabeledSounds, Split, read_labeled
from soundnet_port.network.architecture import CLASSES, SAMPLE_RATE, SOUNDNET8, Architecture
from soundnet_port.network.gradients import keep_freed_memory
from soundnet_port.network.model import SoundNet
from soundnet_port.network.weights import checksum
from soundnet_port.pretrained import load_pretrained

CHECKPOINT, LOG, CURVES, WEIGHTS, RESULT = (
    "checkpoint.pt",
    "log.csv",
    "curves.png",
    "weights.safetensors",
    "result.json",
)
_ORDER, _CHANGES, _START, _DROPOUT = range(4)  # what random numbers are for; see learning.rng
_CHANGED = Augmentation(gain=6, shift=5, stretch=1.12, flip=True, mix=0.2)


@dataclass(frozen=True)
class FinetuneConfig:
    """How a network is fine-tuned. The defaults are for a few hundred to a few thousand clips.

    Attributes:
        epochs: how often every sound is heard.
        batch: sounds in a step.
        lr: the highest learning rate of AdamW, in one cycle of cosine form (Smith and Topin, 2018); by
            default 0.003 from random values, and 0.001 from weights.
        decay: AdamW's weight decay, of weights but not of biases and batch norms.
        dropout: of the features that the head sees.
        seconds: of a random crop; shorter sounds are repeated.
        augmentation: changes to each crop.
        patience: with validation sounds, epochs without improvement after which to stop; 0: never.
        seed: of start values, order, crops and changes.
        edge_frames: learn from head frames that look at edge frames, too, and answer by them (see
            `SoundNet.edge_frames`). By default they are left out, and a crop or clip that gives no others
            is repeated until it does. Only a head on conv7 (conv4 with 5 layers) has any.
    """

    epochs: int = 60
    batch: int = 16
    lr: float | None = None
    decay: float = 0.05
    dropout: float = 0.3
    seconds: float = 5.0
    augmentation: Augmentation = _CHANGED
    patience: int = 0
    seed: int = 0
    edge_frames: bool = False

    def __post_init__(self) -> None:
        for name, least, most in (
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
            if value is not None and not least <= value <= most:
                raise TrainingError(f"{name} must be from {least} to {most}, not {value}")


@dataclass(frozen=True)
class Epoch:
    """An epoch that is done: its number, of how many, its mean loss, and what was measured after it."""

    number: int
    epochs: int
    loss: float
    figures: Mapping[str, float]


@dataclass(frozen=True)
class FinetuneResult:
    """What a fine-tuning came to.

    Attributes:
        folder: of the run.
        weights: the file, for `load_pretrained` and `predict`.
        classes: names, in the order of the outputs.
        epoch: the one whose weights these are.
        fold: name of the fold that was held out; "" without one.
        accuracy: of `predict`'s first class on the held-out sounds, 0 to 1; None without any.
        predictions: for each held-out sound its path, its class, and the class predicted.
        unreadable: reason by path, of sounds that were left out.
        seconds: that it took, over all interruptions.
        edge_frames: whether training and answers took in edge frames; predict such a network with
            `edge_frames=True`.
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


def finetune(
    data: LabeledSounds | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    start: SoundNet | Architecture | str | os.PathLike[str] = SOUNDNET8,
    layer: str | None = None,
    kernel: int = 1,
    frozen: str | None = None,
    tuning: FinetuneConfig = FinetuneConfig(),
    test: str | None = None,
    validation: str | None = None,
    accelerator: str = "cpu",
    precision: str = "32-true",
    progress: Callable[[Epoch], None] | None = None,
) -> FinetuneResult:
    """Trains a network on labelled sounds, or goes on with a run that was interrupted.

    In the folder: `weights.safetensors`, `log.csv`, `curves.png`, `result.json`; and `checkpoint.pt`,
    from which the same call goes on, until it is done. A run that is done is only read.

    Args:
        data: labelled sounds, or what `read_labeled` takes.
        folder: of the run.
        start: a network or its name or file; or an architecture, to begin from random values.
        layer: that the head is put on, such as "pool5"; by default the end of the trunk. Later ones
            are left out.
        kernel: frames that the head sees at once; its logits are averaged over all frames.
        frozen: the layer up to which nothing is changed, batch norm's statistics included; by
            default everything learns.
        tuning: how to train.
        test: name of a fold to hold out and to be measured on at the end. Nothing is chosen by it.
        validation: name of a fold to hold out for choosing the epoch with the least loss on it, and
            for stopping early.
        accelerator: "cpu", "cuda", "mps" or "auto".
        precision: "32-true", "bf16-mixed" or "16-mixed".
        progress: called after every epoch.

    Raises:
        TrainingError: settings that cannot work, another run's folder, another process at work in it,
            too few sounds.
        LabelledError: the data cannot be read.
        WeightsError: there are no such weights.
    """
    run = _prepared(data, folder, start, layer, kernel, frozen, tuning, test, validation, precision)
    if (done := _done(run)) is not None:
        return done
    fabric = fabric_for(accelerator=accelerator, precision=precision)
    run.folder.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(run.folder, TrainingError):
        return _done(run) or _tune(run, fabric, progress)  # it may have been done in the meantime


def cross_validate(
    data: LabeledSounds | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    workers: int = 1,
    finished: Callable[[FinetuneResult], None] | None = None,
    **settings: Any,
) -> list[FinetuneResult]:
    """Holds out each fold in turn; a run per fold, in `fold-1`, `fold-2`, ... of the folder.

    Args:
        data: labelled sounds with folds.
        folder: of the runs; those that are done are not repeated.
        workers: folds at a time, each in a process with its part of the CPUs.
        finished: called after each fold.
        **settings: as for `finetune`.

    Raises:
        TrainingError: no folds; and as `finetune`.
    """
    if not isinstance(data, LabeledSounds):
        data = read_labeled(data)
    if len(data.folds) < 2:
        raise TrainingError("the sounds have no folds, so none can be held out in turn")
    work = partial(_fold, data, Path(folder), settings)
    made: dict[str, FinetuneResult] = {}
    if workers == 1:
        for fold in data.folds:
            made[fold] = work(0, fold)
            if finished:
                finished(made[fold])
    else:
        threads = max(1, torch.get_num_threads() // workers)
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            running = [pool.submit(work, threads, fold) for fold in data.folds]
            try:
                for each in as_completed(running):
                    tuned = each.result()
                    made[tuned.fold] = tuned
                    if finished:
                        finished(tuned)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [made[fold] for fold in data.folds]


def _fold(
    data: LabeledSounds, folder: Path, settings: dict[str, Any], threads: int, fold: str
) -> FinetuneResult:
    if threads:
        torch.set_num_threads(threads)
    return finetune(data, folder / f"fold-{fold}", test=fold, **settings)


@dataclass(frozen=True)
class _Run:
    """All that a run needs, found out before it begins."""

    folder: Path
    data: LabeledSounds
    model: SoundNet
    frozen: int  # blocks
    tuning: FinetuneConfig
    train: tuple[int, ...]
    test: tuple[int, ...]
    validation: tuple[int, ...]
    fold: str
    settings: dict[str, Any] = field(default_factory=dict)


def _prepared(
    data: LabeledSounds | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    start: SoundNet | Architecture | str | os.PathLike[str],
    layer: str | None,
    kernel: int,
    frozen: str | None,
    tuning: FinetuneConfig,
    test: str | None,
    validation: str | None,
    precision: str,
) -> _Run:
    if not isinstance(data, LabeledSounds):
        data = read_labeled(data)
    if not isinstance(start, (SoundNet, Architecture)):
        start = load_pretrained(start)
    whole = start.architecture if isinstance(start, SoundNet) else start
    try:
        architecture = whole.with_classes(len(data.classes), layer or whole.last_layer, kernel)
    except ValueError as error:
        raise TrainingError(str(error)) from None
    ends = [block.end for block in architecture.blocks]
    names = [block.name for block in architecture.blocks]
    if frozen is not None and frozen not in [*ends, *names]:
        raise TrainingError(f"frozen up to {frozen!r}? choose from {', '.join(ends)}")
    count = 0 if frozen is None else (ends if frozen in ends else names).index(frozen) + 1
    if count and not isinstance(start, SoundNet):
        raise TrainingError("a network that begins from random values cannot be frozen")
    needs = architecture.layer(CLASSES)
    if tuning.seconds * SAMPLE_RATE < needs.shortest:
        raise TrainingError(f"crops of {tuning.seconds} s are too short: {needs.describe()}")
    train, tested, validated = _held_out(data, test, validation)
    state = None
    if isinstance(start, SoundNet):
        state = {name: tensor.float().cpu() for name, tensor in start.state_dict().items()}
    if tuning.lr is None:
        tuning = replace(tuning, lr=0.001 if state else 0.003)
    model = _begun(architecture, state, data.classes, tuning.seed)
    recipe = asdict(tuning)
    edge_frames = recipe.pop("edge_frames")  # most heads have none, and nothing to choose
    settings = {
        "architecture": architecture.name,
        "widths": list(architecture.widths),
        "layer": architecture.last_layer,
        "kernel": kernel,
        **({"edge_frames": edge_frames} if architecture.has_edge_frames(needs) else {}),
        "frozen": frozen,
        "start": checksum(_shared(state, architecture)) if state else "random values",
        "tuning": recipe,
        "classes": list(data.classes),
        "test": test,
        "validation": validation,
        "precision": precision,
        "sounds": _identity(data),
        "training sounds": len(train),
    }
    settings = json.loads(json.dumps(settings))  # as they will be when they are read again
    return _Run(Path(folder), data, model, count, tuning, train, tested, validated, test or "", settings)


def _identity(data: LabeledSounds) -> str:
    """Which sounds these are, wherever they lie: sha256 of their names, classes and folds."""
    lines = [f"{sound.path.name}\t{sound.label}\t{sound.fold}\n" for sound in data.sounds]
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _held_out(
    data: LabeledSounds, test: str | None, validation: str | None
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Indices to learn from, to measure with, and to choose with."""
    by_name: dict[str, Split] = {split.fold: split for split in data.splits}
    for name in (test, validation):
        if name is not None and name not in by_name:
            there = f"there are {', '.join(by_name)}" if by_name else "the sounds have none"
            raise TrainingError(f"no fold {name!r}; {there}")
    if test is not None and test == validation:
        raise TrainingError(f"fold {test!r} cannot be for the test and for validation")
    every = tuple(range(len(data.sounds)))
    tested = by_name[test].test if test is not None else ()
    chosen = by_name[validation].test if validation is not None else ()
    learnt = by_name[test].train if test is not None else every
    train = tuple(i for i in learnt if i not in set(chosen))
    if missing := set(data.classes) - {data.sounds[i].label for i in train}:
        raise TrainingError(f"nothing to learn from for {', '.join(sorted(missing))}")
    return train, tested, tuple(i for i in chosen if i not in set(tested))


def _begun(
    architecture: Architecture, state: Mapping[str, Tensor] | None, classes: Sequence[str], seed: int
) -> SoundNet:
    """The network at the beginning: what there is of the trunk, the rest drawn as is good for ReLU."""
    model = SoundNet(architecture, {CLASSES: classes})
    model.fast_gradients = True
    generator = torch.Generator().manual_seed(int(rng(seed, _START).integers(2**31)))
    for block in architecture.blocks:
        weight = model.get_parameter(f"{block.name}.weight")
        nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=generator)
        nn.init.zeros_(model.get_parameter(f"{block.name}.bias"))
    nn.init.kaiming_normal_(
        model.get_parameter(f"{CLASSES}.weight"), nonlinearity="linear", generator=generator
    )
    nn.init.zeros_(model.get_parameter(f"{CLASSES}.bias"))
    if state:
        model.load_state_dict(_shared(state, architecture), strict=False)
    return model


def _shared(state: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """What a trunk takes over from another network's tensors."""
    trunk = [name for name in architecture.state_shapes() if not name.startswith(f"{CLASSES}.")]
    return {name: state[name] for name in trunk}


def _done(run: _Run) -> FinetuneResult | None:
    """What a run came to that is done already, with the same settings.

    Raises:
        TrainingError: the folder holds a run with other settings.
    """
    try:
        known = json.loads((run.folder / RESULT).read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise TrainingError(f"{run.folder / RESULT}: {error}; remove it to begin anew") from None
    _check_settings(run, known.get("settings"))
    return FinetuneResult(
        run.folder,
        run.folder / WEIGHTS,
        tuple(run.data.classes),
        known["epoch"],
        run.fold,
        known["accuracy"],
        tuple(tuple(each) for each in known["predictions"]),
        known["unreadable"],
        known["seconds"],
        run.settings.get("edge_frames", False),
    )


def _check_settings(run: _Run, before: Any) -> None:
    """Raises a TrainingError if the folder's run has other settings."""
    if isinstance(before, Mapping) and "edge_frames" in run.settings:
        before = {"edge_frames": True, **before}  # runs from before there was a choice
    check_same(run.folder, "run", before, run.settings)


class _Crops(Dataset[tuple[Tensor, Tensor]]):
    """Random crops of sounds with their distributions over the classes, by (epoch, index)."""

    def __init__(
        self, waveforms: Sequence[Tensor], targets: Sequence[int], classes: int, tuning: FinetuneConfig
    ):
        self.waveforms, self.targets, self.classes, self.tuning = waveforms, targets, classes, tuning

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key
        generator = rng(self.tuning.seed, _CHANGES, epoch, index)
        waveform, target = self._crop(index, generator)
        if generator.random() < self.tuning.augmentation.mix:
            other, others = self._crop(int(generator.integers(len(self.waveforms))), generator)
            share = generator.random()
            waveform = mixed(waveform, other, share)
            target = share * target + (1 - share) * others
        return waveform, target

    def _crop(self, index: int, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        waveform, length = self.waveforms[index], round(self.tuning.seconds * SAMPLE_RATE)
        if len(waveform) < length:
            waveform = waveform.repeat(-(-length // len(waveform)))
        start = int(generator.integers(len(waveform) - length, endpoint=True))
        target = torch.zeros(self.classes)
        target[self.targets[index]] = 1
        return self.tuning.augmentation(waveform[start : start + length], generator), target


def _tune(run: _Run, fabric: Any, progress: Callable[[Epoch], None] | None) -> FinetuneResult:
    """Trains from the checkpoint, if there is one, to the end."""
    tuning, model, lr = run.tuning, run.model, float(run.tuning.lr or 0)
    began = time.monotonic()
    if fabric.device.type == "cpu":
        keep_freed_memory()
    waveforms, unreadable = _decoded(run)
    train, test, validation = (
        [i for i in part if i in waveforms] for part in (run.train, run.test, run.validation)
    )
    if len(train) < tuning.batch:
        raise TrainingError(f"{len(train)} sounds are too few for a batch of {tuning.batch}")
    crops = _Crops(
        [waveforms[i] for i in train], [run.data.targets[i] for i in train], len(run.data.classes), tuning
    )
    model.train()
    for block in model.architecture.blocks[: run.frozen]:  # to measure in between changes no modes
        model.get_submodule(block.name).requires_grad_(False)
        model.get_submodule(block.norm).requires_grad_(False).eval()
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    plain = torch.optim.AdamW(
        [{"params": weights, "weight_decay": tuning.decay}, {"params": others, "weight_decay": 0}], lr=lr
    )
    steps = len(train) // tuning.batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(plain, lr, steps * tuning.epochs, pct_start=0.2)
    _, optimizer = fabric.setup(model, plain)
    epoch, before = 0, 0.0
    best: dict[str, Any] = {"epoch": 0, "loss": float("inf")}
    if (run.folder / CHECKPOINT).exists():
        state = load_checkpoint(run.folder / CHECKPOINT)
        _check_settings(run, state.get("settings"))
        model.load_state_dict(state["model"])
        plain.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        epoch, best, before = state["epoch"], state["best"], state["seconds"]
    measured = {"validation": validation, "test": test}
    fields = [
        "step",
        "loss",
        *(f"{part} {each}" for part, some in measured.items() if some for each in ("loss", "accuracy")),
    ]
    with Log(run.folder / LOG, fields, epoch * steps) as log:
        while epoch < tuning.epochs and not (
            validation and tuning.patience and epoch - best["epoch"] >= tuning.patience
        ):
            losses = []
            for number, batch in enumerate(_batches(crops, tuning, epoch, fabric.device.type)):
                waveform, target = fabric.to_device(batch)
                torch.manual_seed(int(rng(tuning.seed, _DROPOUT, epoch, number).integers(2**63)))
                loss = _loss(run, waveform, target, fabric)
                optimizer.zero_grad()
                fabric.backward(loss)
                optimizer.step()
                schedule.step()
                losses.append(loss.detach())
            epoch += 1
            figures: dict[str, float] = {}
            for part, some in measured.items():
                if some and (part == "validation" or epoch % 5 == 0 or epoch == tuning.epochs):
                    there, share, _ = _measured(run, waveforms, some)
                    figures |= {f"{part} loss": there, f"{part} accuracy": share}
            if not validation or figures["validation loss"] < best["loss"]:
                best = {"epoch": epoch, "loss": figures.get("validation loss", float("inf"))}
                if validation:
                    _write(run, epoch)
            mean = float(torch.stack(losses).mean())
            if not np.isfinite(mean):
                raise TrainingError(f"{run.folder}: the loss is {mean}; a lower learning rate may help")
            log.write(step=epoch * steps, loss=mean, **figures)
            log.flush()
            save_checkpoint(
                run.folder / CHECKPOINT,
                {
                    "settings": run.settings,
                    "model": model.state_dict(),
                    "optimizer": plain.state_dict(),
                    "schedule": schedule.state_dict(),
                    "epoch": epoch,
                    "best": best,
                    "seconds": before + time.monotonic() - began,
                },
            )
            if progress:
                progress(Epoch(epoch, tuning.epochs, mean, figures))
    if validation:
        kept = load_pretrained(run.folder / WEIGHTS)
        model.load_state_dict(kept.state_dict())
    else:
        _write(run, best["epoch"])
    curves(run.folder / LOG, run.folder / CURVES)
    accuracy: float | None = None
    answers: list[str] = []
    if test:
        _, accuracy, answers = _measured(run, waveforms, test)
    result = {
        "settings": run.settings,
        "epoch": best["epoch"],
        "accuracy": accuracy,
        "seconds": before + time.monotonic() - began,
        "predictions": [
            (str(run.data.sounds[i].path), run.data.sounds[i].label, answer)
            for i, answer in zip(test, answers, strict=True)
        ],
        "unreadable": unreadable,
    }
    with atomic_write(run.folder / RESULT) as aside:
        aside.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    (run.folder / CHECKPOINT).unlink(missing_ok=True)
    done = _done(run)
    assert done is not None
    return done


def _decoded(run: _Run) -> tuple[dict[int, Tensor], dict[str, str]]:
    """All sounds that are needed, by index, and those that cannot be read, with the reason."""
    waveforms: dict[int, Tensor] = {}
    unreadable: dict[str, str] = {}
    for index in sorted({*run.train, *run.test, *run.validation}):
        path = run.data.sounds[index].path
        try:
            waveforms[index] = load_audio(path)
        except AudioError as error:
            unreadable[str(path)] = str(error)
    return waveforms, unreadable


def _batches(crops: _Crops, tuning: FinetuneConfig, epoch: int, device: str) -> Iterator[list[Tensor]]:
    """An epoch's batches, in an order that follows from seed and epoch; what is left over waits."""
    order = rng(tuning.seed, _ORDER, epoch).permutation(len(crops.waveforms)).tolist()
    batches = [
        [(epoch, index) for index in order[start : start + tuning.batch]]
        for start in range(0, len(order) - tuning.batch + 1, tuning.batch)
    ]
    return iter(DataLoader(crops, batch_sampler=batches, pin_memory=device == "cuda"))


def _loss(run: _Run, waveform: Tensor, target: Tensor, fabric: Any) -> Tensor:
    architecture, dropped = run.model.architecture, 0
    end = architecture.last_layer
    if not run.tuning.edge_frames:
        least = architecture.shortest_ordinary(CLASSES)
        waveform = waveform.repeat(1, ceil(least / waveform.shape[1]))
        dropped = run.model.edge_frames(CLASSES, waveform.shape[1])
    with fabric.autocast():
        features = run.model.extract(waveform, [end])[end]
        logits = run.model.head(CLASSES, F.dropout(features, run.tuning.dropout))
    return F.cross_entropy(logits[..., : logits.shape[2] - dropped].float().mean(2), target)


def _measured(
    run: _Run, waveforms: Mapping[int, Tensor], some: Sequence[int]
) -> tuple[float, float, list[str]]:
    """Mean loss, accuracy, and the class predicted for each of some sounds: what `predict` says."""
    losses, answers = [], []
    top, edge_frames = len(run.data.classes), run.tuning.edge_frames
    with torch.no_grad():
        for index in some:
            classes = predict(run.model, waveforms[index], top=top, edge_frames=edge_frames).classes
            answers.append(classes[0].label)
            right = next(each for each in classes if each.index == run.data.targets[index])
            losses.append(-np.log(max(right.probability, 1e-12)))
    right_ones = [answer == run.data.sounds[i].label for i, answer in zip(some, answers, strict=True)]
    return float(np.mean(losses)), float(np.mean(right_ones)), answers


def _write(run: _Run, epoch: int) -> None:
    write_trained(run.folder / WEIGHTS, run.model, run.settings | {"epoch": epoch})
