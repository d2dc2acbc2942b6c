"""Training SoundNet as the paper did: from teachers who saw what was filmed, to a student who hears it.

Teachers give, for every 5 s of a sound, a distribution over the categories of a head. Three forms of
data are read:

**A manifest**, a text file in UTF-8 named `*.tsv`, tab-separated, with a header:

    sound           objects              scenes
    clips/a.mp3     labels/a.objects.npy labels/a.scenes.npy
    clips/b.wav     labels/b.objects.npy labels/b.scenes.npy

The first column is a sound file of any format that `load_audio` reads. Every other column is a
teacher, named by its head, `objects` or `scenes`; more teachers for a head are told apart by what
comes after a colon (`objects:vit`). Each head has a teacher at least. Paths are relative to the
manifest's folder. A label file is an array in NumPy's format (version 1 or later, no pickle) of
float32, float16 or float64 and of the shape (steps, categories): row `k` is the teacher's distribution
for the seconds 5k to 5k + 5, it sums to 1. `steps` is 1 or more, the same for all teachers of a sound;
`categories` is the same for all teachers of a head and all sounds. Names of the categories, a line
each and in the order of the outputs, may stand beside the manifest in `objects.categories.txt` and
`scenes.categories.txt`; the trained weights get them.

**WebDataset shards**, `.tar` files with `KEY.mp3` (or any other suffix of a sound), `KEY.objects.npy`,
`KEY.scenes.npy` (`KEY.objects:vit.npy`) for every sound, the same arrays; category names may stand
beside the shards.

**The released Flickr data** as MIT published them: see `Release`.
"""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

from soundnet_port.audio.loading import AudioError, read_blocks
from soundnet_port.files import atomic_write, exclusive_lock
from soundnet_port.learning.common import (
    Augmentation,
    Log,
    TrainingError,
    check_same,
    curves,
    fabric_for,
    first_process,
    initialize,
    load_checkpoint,
    mixed,
    rng,
    save_checkpoint,
    write_trained,
)
from soundnet_port.learning.distillation_data import HEADS, Data, head_of, open_data
from soundnet_port.network.architecture import SAMPLE_RATE, SOUNDNET8, Architecture
from soundnet_port.network.gradients import keep_freed_memory
from soundnet_port.network.model import Logits, SoundNet
from soundnet_port.network.weights import read_weights
from soundnet_port.pretrained import locate_weights

if TYPE_CHECKING:
    from lightning_fabric import Fabric

STEPS = 4  # label steps of an example
STEP = 5 * SAMPLE_RATE  # samples of a label step
CHECKPOINT, LOG, CURVES, WEIGHTS = "checkpoint.pt", "log.csv", "curves.png", "weights.safetensors"
UNREADABLE = "unreadable.tsv"
_LOGGED = 10  # iterations between writes to the log; a GPU is not waited for in between
_DRAWN = 60  # seconds between drawings of the log, at the least
_ORDER, _CHANGES, _START = range(3)  # what random numbers are for; see learning.rng
_ALLOWED = ("iterations",)  # settings that may change when a run goes on


@dataclass(frozen=True)
class TrainConfig:
    """How a student is trained; the defaults are those of main_train.lua.

    An example is 20 s of sound at 22,050 Hz with 4 label steps of 5 s, and both networks make 4 head
    frames of it: frame `k` is compared with step `k`.

    Attributes:
        iterations: steps of the optimizer.
        batch: examples in a step, on all devices together.
        lr: Adam's learning rate.
        schedule: "constant", as in the original, or "cosine": it falls to 0 over the iterations.
        beta1: Adam's, of the gradients' running mean.
        beta2: Adam's, of the squared gradients' running mean.
        eps: Adam's, added where Torch7 adds it: before the correction of the bias.
        balance: the loss is multiplied by it (the original's lambda).
        temperature: teachers' and student's logits are divided by it, the loss is multiplied by its
            square (Hinton et al., 2015); the original has none.
        teachers: weight by column, 1 where nothing is said; those of a head are scaled to a sum of 1.
        augmentation: of the waveforms.
        seed: of start values, order and augmentation.
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
        """The learning rate of the step of that number, counted from 1."""
        if self.schedule == "constant":
            return self.lr
        return self.lr * (1 + math.cos(math.pi * (step - 1) / self.iterations)) / 2

    def weights(self, columns: Sequence[str]) -> dict[str, float]:
        """The weight of each teacher in its head's loss.

        Raises:
            TrainingError: weights for teachers that are not there, or below 0, or none above 0.
        """
        if unknown := set(self.teachers) - set(columns):
            raise TrainingError(f"no teacher {', '.join(sorted(unknown))}; there are {', '.join(columns)}")
        given = {column: float(self.teachers.get(column, 1.0)) for column in columns}
        sums = {head: sum(w for c, w in given.items() if head_of(c) == head) for head in HEADS}
        if min(given.values()) < 0 or not all(0 < total < float("inf") for total in sums.values()):
            raise TrainingError("teachers' weights must be 0 or more, one of each head above 0")
        return {column: weight / sums[head_of(column)] for column, weight in given.items()}


@dataclass(frozen=True)
class Progress:
    """Where a training is.

    Attributes:
        step: iterations done.
        iterations: of the whole run.
        loss: of the last iteration, None before the first.
        validation: figures, where they have just been made.
        unreadable: a sound that has just turned out to be unreadable, with the reason.
    """

    step: int
    iterations: int
    loss: float | None = None
    validation: Mapping[str, float] = field(default_factory=dict)
    unreadable: str = ""


@dataclass(frozen=True)
class TrainResult:
    """What a training came to.

    Attributes:
        folder: of the run.
        weights: the file, for `load_pretrained`: the best by validation if there is any, else the last.
        step: iterations done, with those of earlier runs.
        best: the step whose weights these are.
        loss: of the last iteration.
        validation: figures of the best step.
        unreadable: reason by name, of sounds that were silence in the training.
        interrupted: stopped by a signal before the last iteration; the same call goes on.
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
    data: Data | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    recipe: TrainConfig = TrainConfig(),
    architecture: Architecture = SOUNDNET8,
    start: str | os.PathLike[str] | None = None,
    validation: Data | str | os.PathLike[str] | None = None,
    validate_every: int = 5000,
    save_every: int = 500,
    accelerator: str = "auto",
    devices: int | str = 1,
    strategy: str = "auto",
    precision: str = "32-true",
    workers: int = 0,
    cache: float = 1.0,
    progress: Callable[[Progress], None] | None = None,
) -> TrainResult:
    """Trains a SoundNet on teachers' distributions, or goes on with a training that was interrupted.

    In the folder: `log.csv`, `curves.png`, `checkpoint.pt`, `weights.safetensors`, and
    `unreadable.tsv` if there are unreadable sounds. Order and augmentation are functions of seed,
    epoch and index alone, so that a run that was killed gives the same numbers as an unbroken one.

    Args:
        data: what `teachers.open_data` gives or takes.
        folder: of the run; if it holds a checkpoint, the training goes on from there.
        recipe: how to train. When a run goes on, only `iterations` may differ.
        architecture: with the widths of the blocks; the heads' sizes are those of the data.
        start: weights to start from, in place of `architecture`; heads of other sizes start anew.
        validation: other data of the same kind; the weights of the step with the least loss there
            are kept. The folder of the released data stands for its val lists.
        validate_every: iterations between validations; also after the last one.
        save_every: iterations between checkpoints; also after the last one, and on SIGINT or SIGTERM.
        accelerator: see `learning.fabric_for`, for this and the next three.
        devices: how many; each computes its part of a batch with batch-norm statistics of its own,
            gradients are averaged. The running statistics that are saved are the first device's.
        strategy: how several devices work together.
        precision: "32-true", "bf16-mixed" or "16-mixed".
        workers: processes that decode, for each device; 0 decodes in between.
        cache: GB of decoded sound to keep in memory, for each device.
        progress: called in the first device's process; it must be picklable if there are several.

    Raises:
        TrainingError: the data are not as they must be, the folder holds a run with other settings
            or another process is at work in it, there are no such devices, the loss is no number any
            more, or `[learn]` is not installed.
        WeightsError: there are no such weights to start from.
    """
    fabric = fabric_for(accelerator=accelerator, devices=devices, strategy=strategy, precision=precision)
    if isinstance(data, (str, os.PathLike)):
        data = open_data(data)
    if isinstance(validation, (str, os.PathLike)):
        validation = open_data(validation, "val")
    if validation is not None and validation.teachers != data.teachers:
        raise TrainingError(f"{validation.name}: teachers {validation.teachers}, expected {data.teachers}")
    if min(validate_every, save_every) < 1 or workers < 0 or not cache >= 0:
        raise TrainingError("validate_every and save_every must be at least 1, workers and cache 0 or more")
    if recipe.batch % fabric.world_size:
        raise TrainingError(f"a batch of {recipe.batch} cannot be shared by {fabric.world_size} devices")
    recipe.weights(list(data.teachers))
    model, begun = _beginning(architecture, start, data, recipe)
    settings = {
        "recipe": asdict(recipe) | {"teachers": dict(recipe.teachers)},
        "architecture": model.architecture.name,
        "widths": list(model.architecture.widths),
        "teachers": dict(data.teachers),
        "data": data.identity,
        "validation": validation.identity if validation is not None else None,
        "start": begun,
        "precision": precision,
        "falling to": recipe.iterations if recipe.schedule != "constant" else None,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    run = _Run(
        folder,
        data,
        validation,
        recipe,
        model,
        settings,
        validate_every,
        save_every,
        workers,
        cache,
        progress,
    )
    # one lock is for all processes
    with exclusive_lock(folder, TrainingError) if first_process() else nullcontext():
        if (folder / CHECKPOINT).exists():
            before = load_checkpoint(folder / CHECKPOINT).get("settings")
            check_same(folder, "training", _flat(before), _flat(settings), _ALLOWED)
        with _stopping():  # passes signals on to processes of other devices
            # Fabric looks into arguments and results, and cannot into frozen ones
            return TrainResult(**fabric.launch(partial(_train, run=run)))


def distillation_loss(
    logits: Logits, targets: Mapping[str, Tensor], recipe: TrainConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The paper's loss (section 3.2) with the original's scaling, and the divergence of each head.

    For each head, step and teacher nn.DistKLDivCriterion: the sum of t * (log t - log p) divided by
    batch x categories, so that objects weigh 1/1000 and scenes 1/401. `p` is a softmax over the
    categories of each example and step, as in the paper's formula; the original's LogSoftMax got a
    tensor of three dimensions, of which nn and cudnn normalise others. Steps and heads are averaged
    and multiplied by `recipe.balance`.

    Shape:
        - logits: (batch, categories, steps) of each head
        - targets: by teacher, (batch, steps, categories), distributions over the last
        - returns a scalar, and for each head the mean over batch, steps and teachers of the
          Kullback-Leibler divergence in nats, without scaling
    """
    heat = recipe.temperature
    weights = recipe.weights(list(targets))
    loss = torch.zeros((), device=logits.objects.device)
    divergences = {}
    for head in HEADS:
        scores: Tensor = getattr(logits, head)
        batch, categories, steps = scores.shape
        log_p = F.log_softmax(scores / heat, dim=1)
        total = torch.zeros((), device=scores.device)
        for column, weight in weights.items():
            if head_of(column) != head or not weight:
                continue
            target = targets[column].transpose(1, 2)
            if target.shape != scores.shape:
                raise ValueError(
                    f"{column}: (batch, steps, categories) {tuple(targets[column].shape)} for "
                    f"logits (batch, categories, frames) {tuple(scores.shape)}"
                )
            if heat != 1:
                warm = target ** (1 / heat)
                target = warm / warm.sum(1, keepdim=True)
            total = total + weight * F.kl_div(log_p, target, reduction="sum")
        loss = loss + total * (recipe.balance * heat**2 / (len(HEADS) * steps * batch * categories))
        divergences[head] = total.detach() / (batch * steps)
    return loss, divergences


def adam(model: torch.nn.Module, recipe: TrainConfig) -> torch.optim.Adam:
    """Adam with the recipe's settings; `torch7_eps` has to be called before every step of it."""
    return torch.optim.Adam(
        model.parameters(), lr=recipe.lr, betas=(recipe.beta1, recipe.beta2), eps=recipe.eps, fused=True
    )


def torch7_eps(optimizer: torch.optim.Optimizer, recipe: TrainConfig, step: int) -> None:
    """Makes the step number `step`, counted from 1, that of Torch7's optim.adam.

    Torch7 adds eps to sqrt(v), PyTorch to sqrt(v / (1 - beta2^step)): 32 times less in the first
    step. Where gradients are as small as here, that shows.
    """
    for group in optimizer.param_groups:
        group["eps"] = recipe.eps / (1 - recipe.beta2**step) ** 0.5


def fitted(waveform: Tensor, labels: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Sound and labels of exactly 20 s, as the original made them of any clip.

    Sound shorter than its label steps is zero-padded to them, longer is cut. With fewer than 4 steps
    sound and labels are repeated, and cut at 20 s. (The original also zeroes the last sample before
    the padding, by a slip in counting; this does not.)

    Shape:
        - waveform: (samples,)
        - labels: by teacher, (steps, categories), 1 to 4 steps
        - returns (441000,), and by teacher (4, categories)
    """
    steps = len(next(iter(labels.values())))
    labelled = steps * STEP
    waveform = F.pad(waveform[:labelled], (0, max(0, labelled - len(waveform))))
    times = -(-STEPS // steps)
    return (
        waveform.repeat(times)[: STEPS * STEP],
        {column: rows.repeat(times, 1)[:STEPS] for column, rows in labels.items()},
    )


class Examples(Dataset[dict[str, Any]]):
    """Examples by (epoch, index), decoded and augmented; the same pair is always the same example.

    Of a sound with more than 4 label steps, training takes 4 consecutive ones, drawn anew in each
    epoch, and validation the first 4. (The released data have at most 4.) An unreadable sound is
    silence with its labels, as in the original, and says so.

    Args:
        data: sounds and labels.
        recipe: seed and augmentation; None for validation.
        cache: bytes of decoded sound to keep: the first sounds, as many as fit.
        shared: whether processes share what is kept.
    """

    def __init__(
        self, data: Data, recipe: TrainConfig | None, cache: float = 0, shared: bool = False
    ) -> None:
        self.data = data
        self.recipe = recipe
        lengths = data.steps * STEP if recipe else np.minimum(data.steps, STEPS) * STEP
        ends = np.cumsum(lengths)
        kept = int(np.searchsorted(ends, cache / 4, side="right"))
        self._starts = np.concatenate([[0], ends[:kept]])
        self._samples = torch.empty(int(self._starts[-1]))
        self._known = torch.zeros(kept, dtype=torch.uint8)
        if shared:
            self._samples.share_memory_()  # type: ignore[no-untyped-call]
            self._known.share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self.data.steps)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        return self._example(*key)

    def _example(self, epoch: int, index: int, mix: bool = True) -> dict[str, Any]:
        labels = {name: torch.from_numpy(rows) for name, rows in self.data.labels(index).items()}
        first = 0
        steps = int(self.data.steps[index])
        if self.recipe is not None:
            generator = rng(self.recipe.seed, _CHANGES, epoch, index)
            first = int(generator.integers(max(0, steps - STEPS), endpoint=True))
        last = min(first + STEPS, steps)
        labels = {name: rows[first:last] for name, rows in labels.items()}
        waveform, reason = self._sound(index, last if self.recipe is None else steps, last)
        waveform, labels = fitted(waveform[first * STEP : last * STEP], labels)
        if self.recipe is not None:
            waveform = self.recipe.augmentation(waveform, generator)
            if mix and generator.random() < self.recipe.augmentation.mix:
                other = self._example(epoch, int(generator.integers(len(self))), mix=False)
                share = generator.random()
                waveform = mixed(waveform, other["waveform"], share)
                labels = {
                    name: share * rows + (1 - share) * other["targets"][name] for name, rows in labels.items()
                }
        return {
            "waveform": waveform,
            "targets": labels,
            "unreadable": f"{self.data.called(index)}\t{reason}" if reason else "",
        }

    def _sound(self, index: int, steps: int, last: int) -> tuple[Tensor, str]:
        """Of the sound its `steps` label steps if they are kept, else at least the `last` first ones."""
        if index >= len(self._known):
            try:
                return self._decoded(index, last * STEP), ""
            except AudioError as error:
                return torch.zeros(last * STEP), str(error)
        place = self._samples[self._starts[index] : self._starts[index + 1]]
        if not self._known[index]:
            try:
                waveform = self._decoded(index, steps * STEP)
            except AudioError as error:
                return torch.zeros(steps * STEP), str(error)
            place[: len(waveform)] = waveform
            place[len(waveform) :] = 0
            self._known[index] = 1
        return place, ""

    def _decoded(self, index: int, samples: int) -> Tensor:
        """As much of a sound as is asked for, no more of the file is decoded."""
        parts: list[Tensor] = []
        count = 0
        with self.data.sound(index) as path:
            for part in read_blocks(path, samples=STEP):
                parts.append(part)
                count += len(part)
                if count >= samples:
                    break
        return torch.cat(parts)[:samples]


class Batches(Sampler[list[tuple[int, int]]]):
    """The (epoch, index) of each batch, from any step on: one random order of all sounds after the other.

    An order is a function of (seed, epoch). A batch may end one epoch and begin the next.

    Args:
        sounds: how many there are.
        recipe: its batch, seed and number of iterations.
        step: iterations that are done.
        rank: which of the devices this is for: the part of every batch that it takes.
        devices: how many there are.
    """

    def __init__(
        self, sounds: int, recipe: TrainConfig, step: int = 0, rank: int = 0, devices: int = 1
    ) -> None:
        self.sounds, self.recipe, self.step = sounds, recipe, step
        self.share, self.rank = recipe.batch // devices, rank

    def __len__(self) -> int:
        return self.recipe.iterations - self.step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        known, order = -1, np.empty(0, np.int64)
        for step in range(self.step, self.recipe.iterations):
            first = step * self.recipe.batch + self.rank * self.share
            batch = []
            for position in range(first, first + self.share):
                epoch, place = divmod(position, self.sounds)
                if epoch != known:
                    known, order = epoch, rng(self.recipe.seed, _ORDER, epoch).permutation(self.sounds)
                batch.append((epoch, int(order[place])))
            yield batch


@dataclass(frozen=True)
class _Run:
    """All that the processes of a training are given."""

    folder: Path
    data: Data
    validation: Data | None
    recipe: TrainConfig
    model: SoundNet
    settings: dict[str, Any]
    validate_every: int
    save_every: int
    workers: int
    cache: float
    progress: Callable[[Progress], None] | None


def _train(fabric: Fabric, run: _Run) -> dict[str, Any]:
    """The training, in one of its processes."""
    with _stopping() as stopping:
        return vars(_Training(fabric, run).go(stopping))


class _Training:
    """One process of a training."""

    def __init__(self, fabric: Fabric, run: _Run) -> None:
        self.fabric, self.run = fabric, run
        checkpoint = run.folder / CHECKPOINT
        state = load_checkpoint(checkpoint) if checkpoint.exists() else None
        if fabric.device.type == "cpu":
            keep_freed_memory()
        self.first = fabric.global_rank == 0
        self.net = copy.deepcopy(run.model)  # processes are given one that they share
        if state is not None:
            self.net.load_state_dict(state["model"])
        self.model, self.optimizer = fabric.setup(self.net, adam(self.net, run.recipe))
        self.step, self.loss = 0, None
        self.best: dict[str, Any] = {"step": 0, "figures": {}}
        self.unreadable: dict[str, str] = {}
        self.count = 0  # of examples that were silence
        if state is not None:
            self.optimizer.optimizer.load_state_dict(state["optimizer"])
            fabric.strategy.precision.load_state_dict(state["scaler"])
            self.step, self.best, self.loss = state["step"], state["best"], state["loss"]
            self.unreadable, self.count = state["unreadable"], state["silent"]
        self.drawn = time.monotonic()
        self.pending: list[tuple[int, Tensor]] = []

    def go(self, stopping: threading.Event) -> TrainResult:
        run, recipe = self.run, self.run.recipe
        fields = ["step", "loss", *HEADS, "silent"]
        if run.validation is not None:
            fields += [f"validation {name}" for name in _figure_names()]
        # as the other processes, which have no log, take part in everything else
        with Log(run.folder / LOG, fields, self.step) if self.first else nullcontext() as self.log:
            if self.step == 0:
                self.save()
            self.report()
            sampler = Batches(
                len(run.data.steps), recipe, self.step, self.fabric.global_rank, self.fabric.world_size
            )
            examples = Examples(run.data, recipe, run.cache * 1e9, shared=bool(run.workers))
            stop = False
            for batch in _loader(examples, sampler, run.workers, self.fabric.device.type):
                self.iterate(self.fabric.to_device(batch))
                stop = self.agreed(stopping.is_set())
                last = stop or self.step == recipe.iterations
                check = self.step % run.validate_every == 0 or self.step == recipe.iterations
                keep = self.step % run.save_every == 0 or last
                if check or keep or self.step % _LOGGED == 0:
                    self.write(self.validate() if check and run.validation is not None else {})
                if keep:
                    self.save()
                if last:
                    break
        return TrainResult(
            folder=run.folder,
            weights=run.folder / WEIGHTS,
            step=self.step,
            best=self.best["step"],
            loss=self.loss,
            validation=self.best["figures"],
            unreadable=self.unreadable,
            interrupted=stop and self.step < recipe.iterations,
        )

    def iterate(self, batch: dict[str, Any]) -> None:
        """One step of the optimizer."""
        self.net.train()
        self.optimizer.zero_grad()
        loss, divergences = distillation_loss(
            self.model(batch["waveform"]), batch["targets"], self.run.recipe
        )
        self.fabric.backward(loss)
        self.step += 1
        torch7_eps(self.optimizer, self.run.recipe, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.run.recipe.lr_at(self.step)
        self.optimizer.step()
        silent = [text for text in batch["unreadable"] if text]
        for text in silent:
            name, _, reason = text.partition("\t")
            if name not in self.unreadable:
                self.unreadable[name] = reason
                self.report(unreadable=reason)
        figures = [loss.detach(), *divergences.values(), torch.tensor(len(silent), device=loss.device)]
        self.pending.append((self.step, torch.stack([figure.float() for figure in figures])))

    def write(self, validation: dict[str, float]) -> None:
        """Puts what has gathered into the log: losses are means over the devices, silence is counted."""
        if self.pending:
            figures = self.fabric.all_reduce(torch.stack([row for _, row in self.pending]), reduce_op="mean")
            for (step, _), row in zip(self.pending, figures.tolist(), strict=True):
                self.loss = row[0]
                self.count += round(row[-1] * self.fabric.world_size)
                if not np.isfinite(row[0]):
                    raise TrainingError(
                        f"{self.run.folder}: the loss of iteration {step} is {row[0]}; "
                        "a lower learning rate may help"
                    )
                extra = {f"validation {k}": v for k, v in validation.items()} if step == self.step else {}
                if self.log is not None:
                    heads = dict(zip(HEADS, row[1:], strict=False))
                    self.log.write(step=step, loss=row[0], **heads, silent=self.count, **extra)
        self.pending.clear()
        if self.log is not None:
            self.log.flush()
        self.report(validation=validation)

    def validate(self) -> dict[str, float]:
        """Figures over the validation data; the best weights are written."""
        assert self.run.validation is not None
        if self.fabric.world_size > 1:  # the others' running statistics are of their own part
            for buffer in self.net.buffers():
                buffer.copy_(self.fabric.broadcast(buffer, src=0))
        figures = validation_figures(
            self.net, self.run.validation, self.run.recipe, self.fabric, self.run.workers
        )
        if not self.best["figures"] or figures["loss"] < self.best["figures"]["loss"]:
            self.best = {"step": self.step, "figures": figures}
            self.write_weights()
        return figures

    def save(self) -> None:
        """Writes the checkpoint; without validation the weights too."""
        if not self.best["figures"]:
            self.best = {"step": self.step, "figures": {}}
            self.write_weights()
        if not self.first:
            return
        save_checkpoint(
            self.run.folder / CHECKPOINT,
            {
                "settings": self.run.settings,
                "step": self.step,
                "loss": self.loss,
                "best": self.best,
                "unreadable": self.unreadable,
                "silent": self.count,
                "model": self.net.state_dict(),
                "optimizer": self.optimizer.optimizer.state_dict(),
                "scaler": self.fabric.strategy.precision.state_dict(),
            },
        )
        if self.unreadable:
            with atomic_write(self.run.folder / UNREADABLE) as aside:
                lines = [f"{name}\t{reason}\n" for name, reason in sorted(self.unreadable.items())]
                aside.write_text("".join(lines), "utf-8", errors="surrogateescape")
        if self.step == self.run.recipe.iterations or time.monotonic() - self.drawn > _DRAWN:
            curves(self.run.folder / LOG, self.run.folder / CURVES)
            self.drawn = time.monotonic()

    def write_weights(self) -> None:
        if not self.first:
            return
        write_trained(self.run.folder / WEIGHTS, self.net, {**self.run.settings, **self.best})

    def agreed(self, stop: bool) -> bool:
        """Whether any of the processes wants to stop, so that all stop after the same step."""
        if self.fabric.world_size == 1:
            return stop
        wish = torch.tensor(float(stop), device=self.fabric.device)
        return bool(self.fabric.all_reduce(wish, reduce_op="sum") > 0)

    def report(self, validation: Mapping[str, float] = {}, unreadable: str = "") -> None:
        if self.first and self.run.progress is not None:
            self.run.progress(
                Progress(self.step, self.run.recipe.iterations, self.loss, validation, unreadable)
            )


def _figure_names() -> list[str]:
    return ["loss", *HEADS, *(f"{head} top {k}" for head in HEADS for k in (1, 5))]


@torch.no_grad()
def validation_figures(
    model: SoundNet, data: Data, recipe: TrainConfig, fabric: Fabric, workers: int = 0
) -> dict[str, float]:
    """How near a network is to its teachers on other data: means over examples and steps.

    `loss` is the training's; `objects` and `scenes` are divergences in nats; `objects top 1` is how
    often the student's best category is the teachers' best one, `objects top 5` how often that is
    among the student's five best (teachers averaged by their weights).
    """
    model.eval()
    names = _figure_names()
    sums = torch.zeros(len(names), dtype=torch.float64)
    mine = range(fabric.global_rank, len(data.steps), fabric.world_size)
    share = max(1, recipe.batch // fabric.world_size)
    batches = [[(0, i) for i in mine[at : at + share]] for at in range(0, len(mine), share)]
    for batch in _loader(Examples(data, None), batches, workers, fabric.device.type):
        batch = fabric.to_device(batch)
        logits = model(batch["waveform"])
        loss, divergences = distillation_loss(logits, batch["targets"], recipe)
        figures = {"loss": float(loss)} | {head: float(value) for head, value in divergences.items()}
        weights = recipe.weights(list(batch["targets"]))
        for head in HEADS:
            scores = getattr(logits, head)
            teachers = sum(
                weight * batch["targets"][column].transpose(1, 2)
                for column, weight in weights.items()
                if head_of(column) == head
            )
            best = teachers.argmax(1, keepdim=True)
            for k in (1, 5):
                found = (scores.topk(min(k, scores.shape[1]), dim=1).indices == best).any(1)
                figures[f"{head} top {k}"] = float(found.double().mean())
        sums += len(batch["waveform"]) * torch.tensor([figures[name] for name in names], dtype=torch.float64)
    sums = fabric.all_reduce(sums.to(fabric.device), reduce_op="sum").cpu()
    return dict(zip(names, (sums / len(data.steps)).tolist(), strict=True))


def _loader(examples: Examples, batches: Any, workers: int, device: str) -> DataLoader[dict[str, Any]]:
    return DataLoader(
        examples,
        batch_sampler=batches,
        num_workers=workers,
        worker_init_fn=_quiet,
        pin_memory=device == "cuda",
    )


def _quiet(worker: int) -> None:
    """In a decoding process: a signal to all processes is for the one that trains."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, here and in the processes of other devices."""
    event = threading.Event()

    def stop(number: int, frame: object) -> None:
        event.set()
        for process in multiprocessing.active_children():
            if process.pid is not None and process.name.startswith("SpawnProcess"):
                os.kill(process.pid, number)

    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _beginning(
    architecture: Architecture, start: str | os.PathLike[str] | None, data: Data, recipe: TrainConfig
) -> tuple[SoundNet, str | None]:
    """The network as it is before the first step, and the sha256 of the weights that it starts from."""
    sizes = {head_of(column): size for column, size in data.teachers.items()}
    state: dict[str, Tensor] = {}
    begun = None
    if start is not None:
        architecture, state, metadata = read_weights(locate_weights(start))
        begun = metadata["sha256"]
        if not architecture.heads:
            raise TrainingError(f"{start}: weights without heads; training needs both")
    model = SoundNet(architecture.resized(architecture.widths, sizes), data.categories)
    model.fast_gradients = True
    initialize(model, rng(recipe.seed, _START))
    shapes = model.architecture.state_shapes()
    same_head = {
        head: f"{head}.weight" in state and state[f"{head}.weight"].shape == shapes[f"{head}.weight"]
        for head in HEADS
    }
    kept = {name: tensor for name, tensor in state.items() if same_head.get(name.partition(".")[0], True)}
    model.load_state_dict(kept, strict=False)
    return model, begun


def _flat(settings: Any) -> dict[str, Any]:
    """Settings with the recipe's among them."""
    settings = dict(settings) if isinstance(settings, dict) else {}
    recipe = dict(settings.pop("recipe", None) or {})
    return {**settings, **recipe}
