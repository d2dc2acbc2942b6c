"""Train a SoundNet as the paper did: hyperparameters, loss, optimizer and validation figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from soundnet_port.learning.augmentation import Augmentation
from soundnet_port.learning.errors import TrainingError
from soundnet_port.learning.pseudo_labels import HEADS, get_head
from soundnet_port.network.model import Logits, SoundNet

if TYPE_CHECKING:
    from lightning_fabric import Fabric

FIGURES = ("loss", *HEADS, *(f"{head} top {k}" for head in HEADS for k in (1, 5)))  # of a validation


@dataclass(frozen=True)
class TrainConfig:
    """Hyperparameters of distillation; the defaults are those of main_train.lua.

    An example is 20 s of sound at 22,050 Hz with 4 label steps of 5 s, and both networks have 4 head
    frames for it: frame `k` is compared with step `k`.

    Attributes:
        iterations: optimizer steps.
        batch: examples per step, on all devices together.
        lr: Adam's learning rate.
        schedule: "constant", as in the original, or "cosine": it falls to 0 over the iterations.
        beta1: Adam's, of the gradients' running mean.
        beta2: Adam's, of the squared gradients' running mean.
        eps: Adam's, added where Torch7 adds it: before the bias correction.
        balance: factor of the loss (the original's lambda).
        temperature: divides the teachers' and the student's logits; the loss is multiplied by its
            square (Hinton et al., 2015); the original has none.
        teachers: weight by column, by default 1; those of a head are scaled to a sum of 1.
        augmentation: of the waveforms.
        seed: of initialization, order and augmentation.
    """

    iterations: int = 100_000
    batch: int = 64
    lr: float = 0.001
    schedule: str = "constant"
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    balance: float = 250.0
    temperature: float = 1.0
    teachers: Mapping[str, float] = field(default_factory=dict)
    augmentation: Augmentation = field(default_factory=Augmentation)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("iterations", "batch"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("lr", "balance", "temperature", "eps"):
            if not 0 < getattr(self, name) < float("inf"):
                raise TrainingError(f"{name} must be a number above 0, not {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise TrainingError(f"{name} must be from 0 to below 1, not {getattr(self, name)}")
        if self.schedule not in ("constant", "cosine"):
            raise TrainingError(f"unknown schedule {self.schedule!r}; choose constant or cosine")
        if self.seed < 0:
            raise TrainingError(f"seed must be 0 or more, not {self.seed}")

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 1."""
        if self.schedule == "constant":
            return self.lr
        return self.lr * (1 + math.cos(math.pi * (step - 1) / self.iterations)) / 2

    def teacher_weights(self, columns: Sequence[str]) -> dict[str, float]:
        """Return the weight of each teacher in its head's loss.

        Raises:
            TrainingError: weights for unknown teachers, or below 0, or none above 0.
        """
        if unknown := set(self.teachers) - set(columns):
            names = ", ".join(sorted(unknown))
            raise TrainingError(f"no teacher {names}; choose from {', '.join(columns)}")
        weights = {column: float(self.teachers.get(column, 1.0)) for column in columns}
        sums = {
            head: sum(weight for column, weight in weights.items() if get_head(column) == head)
            for head in HEADS
        }
        if min(weights.values()) < 0 or not all(0 < total < float("inf") for total in sums.values()):
            raise TrainingError("teachers' weights must be 0 or more, one of each head above 0")
        return {column: weight / sums[get_head(column)] for column, weight in weights.items()}


def distillation_loss(
    logits: Logits, targets: Mapping[str, Tensor], config: TrainConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the paper's loss (section 3.2) with the original's scaling, and each head's divergence.

    For each head, step and teacher nn.DistKLDivCriterion: the sum of t * (log t - log p) divided by
    batch x categories, so that objects weigh 1/1000 and scenes 1/401. `p` is a softmax over the
    categories of each example and step, as in the paper's formula; the original's LogSoftMax got a
    tensor of three dimensions, of which nn and cudnn normalize others. Steps and heads are averaged
    and multiplied by `config.balance`.

    Shape:
        - logits: (batch, categories, steps) of each head
        - targets: by teacher, (batch, steps, categories), distributions over the last
        - returns a scalar, and for each head the mean over batch, steps and teachers of the
          Kullback-Leibler divergence in nats, without scaling
    """
    temperature = config.temperature
    weights = config.teacher_weights(list(targets))
    loss = torch.zeros((), device=logits.objects.device)
    divergences = {}
    for head in HEADS:
        scores: Tensor = getattr(logits, head)
        batch, categories, steps = scores.shape
        log_p = F.log_softmax(scores / temperature, dim=1)
        total = torch.zeros((), device=scores.device)
        for column, weight in weights.items():
            if get_head(column) != head or not weight:
                continue
            target = targets[column].transpose(1, 2)
            if target.shape != scores.shape:
                raise ValueError(
                    f"{column}: (batch, steps, categories) {tuple(targets[column].shape)} for "
                    f"logits (batch, categories, frames) {tuple(scores.shape)}"
                )
            if temperature != 1:
                softened = target ** (1 / temperature)
                target = softened / softened.sum(1, keepdim=True)
            total = total + weight * F.kl_div(log_p, target, reduction="sum")
        loss = loss + total * (config.balance * temperature**2 / (len(HEADS) * steps * batch * categories))
        divergences[head] = total.detach() / (batch * steps)
    return loss, divergences


def create_adam(model: torch.nn.Module, config: TrainConfig) -> torch.optim.Adam:
    """Create Adam with the config's settings; call `set_torch7_eps` before every step."""
    return torch.optim.Adam(
        model.parameters(), lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


def set_torch7_eps(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int) -> None:
    """Make the next step, of this number counted from 1, that of Torch7's optim.adam.

    Torch7 adds eps to sqrt(v), PyTorch to sqrt(v / (1 - beta2^step)): 32 times less in the first
    step. Where gradients are as small as here, the difference matters.
    """
    for group in optimizer.param_groups:
        group["eps"] = config.eps / (1 - config.beta2**step) ** 0.5


@torch.no_grad()
def validation_figures(
    model: SoundNet, batches: Iterable[dict[str, Any]], config: TrainConfig, fabric: Fabric, examples: int
) -> dict[str, float]:
    """Compare a network with its teachers on other data: means over examples and steps.

    `loss` is the training's; `objects` and `scenes` are divergences in nats; `objects top 1` is how
    often the student's top category is the teachers' (averaged by their weights), `objects top 5` how
    often that is among the student's top five.

    Args:
        model: the network.
        batches: this process's share of the examples.
        config: of the training.
        fabric: adds the processes' figures.
        examples: of all processes.
    """
    model.eval()
    sums = torch.zeros(len(FIGURES), dtype=torch.float64)
    for batch in batches:
        batch = fabric.to_device(batch)
        logits = model(batch["waveform"])
        loss, divergences = distillation_loss(logits, batch["targets"], config)
        figures = {"loss": float(loss)} | {head: float(value) for head, value in divergences.items()}
        weights = config.teacher_weights(list(batch["targets"]))
        for head in HEADS:
            scores = getattr(logits, head)
            target = sum(
                weight * batch["targets"][column].transpose(1, 2)
                for column, weight in weights.items()
                if get_head(column) == head
            )
            top = target.argmax(1, keepdim=True)
            for k in (1, 5):
                hits = (scores.topk(min(k, scores.shape[1]), dim=1).indices == top).any(1)
                figures[f"{head} top {k}"] = float(hits.double().mean())
        values = torch.tensor([figures[name] for name in FIGURES], dtype=torch.float64)
        sums += len(batch["waveform"]) * values
    sums = fabric.all_reduce(sums.to(fabric.device), reduce_op="sum").cpu()
    return dict(zip(FIGURES, (sums / examples).tolist(), strict=True))
