"""The training loop of fine-tuning: the steps, the loss, and the measurements after an epoch."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, nan
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from soundnet_port.audio.loading import AudioError, load_audio
from soundnet_port.inference.prediction import predict
from soundnet_port.learning.errors import TrainingError
from soundnet_port.learning.finetune_crops import (
    FeatureVariants,
    RandomCrops,
    compute_frozen,
    count_repeats,
)
from soundnet_port.learning.finetune_run import FinetuneResult, FinetuneRun, write_result
from soundnet_port.learning.randomness import DROPOUT, derive_rng, seeded_torch
from soundnet_port.learning.run_files import (
    CHECKPOINT,
    CURVES,
    LOG,
    WEIGHTS,
    Log,
    load_checkpoint,
    plot_curves,
    save_checkpoint,
    write_trained_weights,
)
from soundnet_port.network import gradients
from soundnet_port.network.architecture import CLASSES, SAMPLE_RATE
from soundnet_port.network.model import SoundNet
from soundnet_port.network.weights import build_model
from soundnet_port.pretrained import load_pretrained
from soundnet_port.progress import Progress, ProgressCallback

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_TEST_EVERY = 5  # epochs


@dataclass(frozen=True)
class EpochProgress(Progress):
    """An epoch of fine-tuning that is done.

    Attributes:
        loss: mean over the epoch.
        figures: losses and accuracies measured after it, such as "validation loss".
    """

    loss: float = nan
    figures: Mapping[str, float] = field(default_factory=dict)


class FinetuneLoop:
    """Train a run's network from its checkpoint, if there is one, to the end.

    Args:
        run: what to train.
        fabric: where.
        progress: called after every sound that is decoded, before the first epoch, and after every epoch.

    Raises:
        TrainingError: too few sounds, a checkpoint of other settings.
    """

    def __init__(self, run: FinetuneRun, fabric: Fabric, progress: ProgressCallback | None) -> None:
        self.run, self.fabric, self.progress = run, fabric, progress
        self.started = time.monotonic()
        config = run.config
        self.waveforms, self.unreadable = _decode(run, progress)
        train, self.test, self.validation = (
            [index for index in part if index in self.waveforms]
            for part in (run.train, run.test, run.validation)
        )
        if len(train) < config.batch:
            raise TrainingError(f"{len(train)} sounds are too few for a batch of {config.batch}")
        self.crops = RandomCrops(
            [self.waveforms[index] for index in train],
            [run.data.targets[index] for index in train],
            len(run.data.classes),
            config,
        )
        model, lr = run.model.train(), float(config.lr or 0)
        self.frozen_trunk: SoundNet | None = None
        self.features: FeatureVariants | None = None
        layer = model.architecture.layer(model.architecture.last_layer)
        if run.frozen_blocks and fabric.device.type == "cpu" and gradients.fits(model, [layer]):
            self.frozen_trunk = build_frozen_trunk(model, run.frozen_blocks)
            if config.variants:
                repeats = count_repeats(model.architecture, config, round(config.seconds * SAMPLE_RATE))
                self.features = FeatureVariants(self.crops, self.frozen_trunk, repeats)
        for number, block in enumerate(model.architecture.blocks):
            frozen = number < run.frozen_blocks
            model.get_submodule(block.name).requires_grad_(not frozen)
            if frozen or (run.pretrained and not config.train_batch_norm):
                model.get_submodule(block.norm).requires_grad_(False).eval()
        groups = group_parameters(run, lr)
        self.adamw = torch.optim.AdamW(groups, lr=lr)
        self.steps = len(train) // config.batch  # per epoch
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.adamw, [group["lr"] for group in groups], self.steps * config.epochs, pct_start=0.2
        )
        _, self.optimizer = fabric.setup(model, self.adamw)
        self.epoch, self.earlier_seconds = 0, 0.0
        self.best: dict[str, Any] = {"epoch": 0, "loss": inf}
        if (run.folder / CHECKPOINT).exists():
            state = load_checkpoint(run.folder / CHECKPOINT)
            run.check_settings(state.get("settings"))
            model.load_state_dict(state["model"])
            self.adamw.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.epoch, self.best, self.earlier_seconds = state["epoch"], state["best"], state["seconds"]

    def train(self) -> FinetuneResult:
        """Train to the last epoch, or to where patience ends; write all files."""
        run, config = self.run, self.run.config
        measured = {"validation": self.validation, "test": self.test}
        fields = ["step", "loss"]
        for part, indices in measured.items():
            fields += [f"{part} loss", f"{part} accuracy"] if indices else []
        if self.progress:  # an epoch may take a minute
            parameters = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
            variants = f" in {config.variants} variants" if config.variants else ""
            counts = f"{len(self.crops.waveforms):,} sounds{variants}, {parameters:,} parameters"
            message = f"training on {counts}, {self.steps:,} steps of {config.batch} per epoch"
            self.progress(Progress(self.epoch, config.epochs, "epoch", message=message))
        with Log(run.folder / LOG, fields, self.epoch * self.steps) as log:
            while self.epoch < config.epochs and not self._is_out_of_patience():
                loss = self._train_epoch()
                self.epoch += 1
                figures: dict[str, float] = {}
                for part, indices in measured.items():
                    due = self.epoch % _TEST_EVERY == 0 or self.epoch == config.epochs
                    if indices and (part == "validation" or due):
                        figures[f"{part} loss"], figures[f"{part} accuracy"], _ = self._measure(indices)
                if not self.validation or figures["validation loss"] < self.best["loss"]:
                    self.best = {"epoch": self.epoch, "loss": figures.get("validation loss", inf)}
                    if self.validation:
                        self._write_weights()
                if not np.isfinite(loss):
                    raise TrainingError(f"{run.folder}: the loss is {loss}; a lower learning rate may help")
                log.write(step=self.epoch * self.steps, loss=loss, **figures)
                log.flush()
                self._save()
                if self.progress:
                    self.progress(_report(self.epoch, config.epochs, loss, figures))
        return self._finish()

    def _is_out_of_patience(self) -> bool:
        patience = self.run.config.patience
        return bool(self.validation and patience and self.epoch - self.best["epoch"] >= patience)

    def _train_epoch(self) -> float:
        """Train for an epoch, and return the mean loss."""
        losses = []
        if self.features:
            batches = self.features.batches(self.epoch)
        else:
            batches = self.crops.batches(self.epoch, self.fabric.device.type == "cuda")
        for step, batch in enumerate(batches):
            x, target = self.fabric.to_device(batch)
            seed = int(derive_rng(self.run.config.seed, DROPOUT, self.epoch, step).integers(2**63))
            with seeded_torch(seed, self.fabric.device):
                loss = compute_loss(self.run, x, target, self.fabric, self.frozen_trunk)
            self.optimizer.zero_grad()
            self.fabric.backward(loss)
            self.optimizer.step()
            self.schedule.step()
            losses.append(loss.detach())
        return float(torch.stack(losses).mean())

    def _measure(self, indices: Sequence[int]) -> tuple[float, float, list[str]]:
        """Return mean loss, accuracy, and the predicted class of each sound, as `predict` gives them."""
        run = self.run
        losses, predicted = [], []
        top, edge_frames = len(run.data.classes), run.config.edge_frames
        with torch.no_grad():
            for index in indices:
                classes = predict(run.model, self.waveforms[index], top=top, edge_frames=edge_frames).classes
                predicted.append(classes[0].label)
                true = next(category for category in classes if category.index == run.data.targets[index])
                losses.append(-np.log(max(true.probability, 1e-12)))
        labels = [run.data.sounds[index].label for index in indices]
        correct = [label == prediction for label, prediction in zip(labels, predicted, strict=True)]
        return float(np.mean(losses)), float(np.mean(correct)), predicted

    def _seconds(self) -> float:
        return self.earlier_seconds + time.monotonic() - self.started

    def _save(self) -> None:
        save_checkpoint(
            self.run.folder / CHECKPOINT,
            {
                "settings": self.run.settings,
                "model": self.run.model.state_dict(),
                "optimizer": self.adamw.state_dict(),
                "schedule": self.schedule.state_dict(),
                "epoch": self.epoch,
                "best": self.best,
                "seconds": self._seconds(),
            },
        )

    def _write_weights(self) -> None:
        training = self.run.settings | {"epoch": self.best["epoch"]}
        write_trained_weights(self.run.folder / WEIGHTS, self.run.model, training)

    def _finish(self) -> FinetuneResult:
        """Write weights, curves and the result; remove the checkpoint."""
        run = self.run
        if self.validation:
            run.model.load_state_dict(load_pretrained(run.folder / WEIGHTS).state_dict())
        else:
            self._write_weights()
        plot_curves(run.folder / LOG, run.folder / CURVES)
        accuracy: float | None = None
        predicted: list[str] = []
        if self.test:
            _, accuracy, predicted = self._measure(self.test)
        predictions = [
            (str(run.data.sounds[index].path), run.data.sounds[index].label, label)
            for index, label in zip(self.test, predicted, strict=True)
        ]
        result = write_result(
            run, self.best["epoch"], accuracy, predictions, self.unreadable, self._seconds()
        )
        (run.folder / CHECKPOINT).unlink(missing_ok=True)
        return result


def compute_loss(
    run: FinetuneRun, x: Tensor, target: Tensor, fabric: Fabric, frozen_trunk: SoundNet | None = None
) -> Tensor:
    """Compute the cross entropy of a batch; logits are averaged over the head's frames.

    Args:
        run: whose network is trained.
        x: a batch of crops, or the frozen blocks' output for crops of `config.seconds`.
        target: their distributions over the classes.
        fabric: where the network is.
        frozen_trunk: computes the blocks that stay as they are; without it the network does.

    Shape:
        x: (batch, samples) or (batch, channels, frames); target: (batch, classes); returns a scalar
    """
    model, config = run.model, run.config
    samples = x.shape[1] if x.ndim == 2 else round(config.seconds * SAMPLE_RATE)
    repeats = count_repeats(model.architecture, config, samples)
    edge_frames = 0 if config.edge_frames else model.edge_frames(CLASSES, samples * repeats)
    with fabric.autocast():
        features = _compute_features(run, x.repeat(1, repeats) if x.ndim == 2 else x, frozen_trunk)
        logits = model.head(CLASSES, F.dropout(features, config.dropout))
    return F.cross_entropy(logits[..., : logits.shape[2] - edge_frames].float().mean(2), target)


def _compute_features(run: FinetuneRun, x: Tensor, frozen_trunk: SoundNet | None) -> Tensor:
    """Compute the head's input; the engine computes the frozen blocks, several times as fast, on a CPU."""
    model = run.model
    layer = model.architecture.layer(model.architecture.last_layer)
    if frozen_trunk is None:
        return model.extract(x, [layer.name])[layer.name]
    if x.ndim == 2:
        x = compute_frozen(frozen_trunk, x)
    if run.frozen_blocks == len(model.architecture.blocks):
        return x
    return gradients.extract(model, x, [layer], run.frozen_blocks)[layer.name]


def build_frozen_trunk(model: SoundNet, blocks: int) -> SoundNet:
    """Build a network of a network's first blocks, which stay as they are."""
    architecture = replace(model.architecture, blocks=model.architecture.blocks[:blocks], heads=())
    state = model.state_dict()
    return build_model(architecture, {name: state[name].clone() for name in architecture.state_shapes()})


def group_parameters(run: FinetuneRun, lr: float) -> list[dict[str, Any]]:
    """Return AdamW's groups: the head's and the trunk's weights, which decay, and biases and batch norms."""
    config, groups = run.config, []
    trunk_lr = config.trunk_lr if run.pretrained and config.trunk_lr is not None else lr
    for is_head, rate in ((True, lr), (False, trunk_lr)):
        named = [
            parameter
            for name, parameter in run.model.named_parameters()
            if name.startswith(f"{CLASSES}.") == is_head and parameter.requires_grad
        ]
        for decays in (True, False):
            parameters = [parameter for parameter in named if (parameter.ndim > 1) == decays]
            decay = config.decay if decays else 0.0
            if parameters:
                groups.append({"params": parameters, "lr": rate, "weight_decay": decay})
    return groups


def _report(epoch: int, epochs: int, loss: float, figures: Mapping[str, float]) -> EpochProgress:
    note = ", ".join(f"{name} {value:.4g}" for name, value in {"loss": loss, **figures}.items())
    return EpochProgress(epoch, epochs, "epoch", note, loss=loss, figures=figures)


def _decode(run: FinetuneRun, progress: ProgressCallback | None) -> tuple[dict[int, Tensor], dict[str, str]]:
    """Return the sounds of the run by index, and why others cannot be read, by path."""
    waveforms: dict[int, Tensor] = {}
    unreadable: dict[str, str] = {}
    indices = sorted({*run.train, *run.test, *run.validation})
    for number, index in enumerate(indices, 1):
        path = run.data.sounds[index].path
        try:
            waveforms[index] = load_audio(path)
        except AudioError as error:
            unreadable[str(path)] = str(error)
        if progress:
            progress(Progress(number, len(indices), "sound"))
    return waveforms, unreadable
