"""One process of a training run: steps, validation, log and checkpoints."""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from soundnet_port.files import atomic_write
from soundnet_port.learning.distillation import (
    FIGURES,
    TrainConfig,
    create_adam,
    distillation_loss,
    set_torch7_eps,
    validation_figures,
)
from soundnet_port.learning.distillation_examples import (
    DistillationExamples,
    ResumableBatchSampler,
    create_loader,
)
from soundnet_port.learning.errors import TrainingError
from soundnet_port.learning.pseudo_labels import HEADS, DistillationData
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
from soundnet_port.network.gradients import keep_freed_memory
from soundnet_port.network.model import SoundNet
from soundnet_port.progress import Progress, ProgressCallback

if TYPE_CHECKING:
    from lightning_fabric import Fabric

UNREADABLE = "unreadable.tsv"
_LOG_EVERY = 10  # iterations; a GPU is not synchronized in between
_LOG_SECONDS = 5  # where one process takes longer for them
_PLOT_EVERY = 60  # seconds, at least


@dataclass(frozen=True)
class StepProgress(Progress):
    """The progress of a training run.

    Attributes:
        loss: of the last iteration, None before the first.
        validation: figures, if they have just been computed.
    """

    loss: float | None = None
    validation: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainRun:
    """What the processes of a training run share; see `train`."""

    folder: Path
    data: DistillationData
    validation: DistillationData | None
    config: TrainConfig
    model: SoundNet
    settings: dict[str, Any]
    validate_every: int
    save_every: int
    workers: int
    cache: float
    progress: ProgressCallback | None
    launcher: int  # process id of the caller


def train_process(fabric: Fabric, run: TrainRun) -> dict[str, Any]:
    """Train in one of the run's processes, and return the attributes of its `TrainResult`."""
    if os.getpid() != run.launcher and fabric.device.type == "cpu":
        keep_freed_memory()
    with stop_on_signals() as stop:
        return TrainLoop(fabric, run).train(stop)


class TrainLoop:
    """A process's network, optimizer and counters, from the checkpoint if there is one.

    Args:
        fabric: the device, and the other processes.
        run: what to train.
    """

    def __init__(self, fabric: Fabric, run: TrainRun) -> None:
        self.fabric, self.run = fabric, run
        self.is_first = fabric.global_rank == 0
        self.net = copy.deepcopy(run.model)  # processes share the one they are given
        self.net.check_scale = False  # waveforms come from files
        checkpoint = run.folder / CHECKPOINT
        state = load_checkpoint(checkpoint) if checkpoint.exists() else None
        if state is not None:
            self.net.load_state_dict(state["model"])
        self.model, self.optimizer = fabric.setup(self.net, create_adam(self.net, run.config))
        self.step, self.loss = 0, None
        self.best: dict[str, Any] = {"step": 0, "figures": {}}
        self.unreadable: dict[str, str] = {}
        self.silent = 0  # examples that were silence
        if state is not None:
            self.optimizer.optimizer.load_state_dict(state["optimizer"])
            fabric.strategy.precision.load_state_dict(state["scaler"])
            self.step, self.best, self.loss = state["step"], state["best"], state["loss"]
            self.unreadable, self.silent = state["unreadable"], state["silent"]
        self.plotted = self.logged = time.monotonic()
        self.unlogged: list[tuple[int, Tensor]] = []

    def train(self, stop: threading.Event) -> dict[str, Any]:
        """Train to the last iteration, or until any process is told to stop."""
        run, config = self.run, self.run.config
        fields = ["step", "loss", *HEADS, "silent"]
        if run.validation is not None:
            fields += [f"validation {name}" for name in FIGURES]
        # the other processes have no log, but take part in everything else
        with Log(run.folder / LOG, fields, self.step) if self.is_first else nullcontext() as self.log:
            if self.step == 0:
                self._save()
            self._report(message=self._describe_start())
            sampler = ResumableBatchSampler(
                len(run.data.steps), config, self.step, self.fabric.global_rank, self.fabric.world_size
            )
            examples = DistillationExamples(run.data, config, run.cache * 1e9, shared=bool(run.workers))
            stopped = False
            for batch in create_loader(examples, sampler, run.workers, self.fabric.device.type):
                self._train_step(self.fabric.to_device(batch))
                stopped = self._any_process(stop.is_set())
                last = stopped or self.step == config.iterations
                validate = self.step % run.validate_every == 0 or self.step == config.iterations
                save = self.step % run.save_every == 0 or last
                if validate or save or self._log_is_due():
                    self._write_log(self._validate() if validate and run.validation is not None else {})
                if save:
                    self._save()
                if last:
                    break
        return {
            "folder": run.folder,
            "weights": run.folder / WEIGHTS,
            "step": self.step,
            "best": self.best["step"],
            "loss": self.loss,
            "validation": self.best["figures"],
            "unreadable": self.unreadable,
            "interrupted": stopped and self.step < config.iterations,
        }

    def _describe_start(self) -> str:
        """Say what begins, since the first step may take a while."""
        run = self.run
        begin = f", from step {self.step:,}" if self.step else ""
        return (
            f"{run.folder}: {run.model.architecture.name} on {len(run.data.steps):,} sounds, "
            f"{run.config.iterations:,} steps of {run.config.batch} on {self.fabric.device}{begin}"
        )

    def _train_step(self, batch: dict[str, Any]) -> None:
        config = self.run.config
        self.net.train()
        self.optimizer.zero_grad()
        loss, divergences = distillation_loss(self.model(batch["waveform"]), batch["targets"], config)
        self.fabric.backward(loss)
        self.step += 1
        set_torch7_eps(self.optimizer, config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr_at(self.step)
        self.optimizer.step()
        silent = [text for text in batch["unreadable"] if text]
        for text in silent:
            name, _, reason = text.partition("\t")
            if name not in self.unreadable:
                self.unreadable[name] = reason
                self._report(message=f"{reason}; it is silence in this training")
        figures = [loss.detach(), *divergences.values(), torch.tensor(len(silent), device=loss.device)]
        self.unlogged.append((self.step, torch.stack([figure.float() for figure in figures])))

    def _log_is_due(self) -> bool:
        """Tell, in all processes alike, whether to log the steps since the last time."""
        slow = self.fabric.world_size == 1 and time.monotonic() - self.logged > _LOG_SECONDS
        return slow or self.step % _LOG_EVERY == 0

    def _write_log(self, validation: dict[str, float]) -> None:
        """Log the steps since the last time: losses are means over the devices, silence is counted."""
        if self.unlogged:
            figures = self.fabric.all_reduce(torch.stack([row for _, row in self.unlogged]), reduce_op="mean")
            for (step, _), row in zip(self.unlogged, figures.tolist(), strict=True):
                self.loss = row[0]
                self.silent += round(row[-1] * self.fabric.world_size)
                if not np.isfinite(row[0]):
                    raise TrainingError(
                        f"{self.run.folder}: the loss of iteration {step} is {row[0]}; "
                        "a lower learning rate may help"
                    )
                extra = {f"validation {k}": v for k, v in validation.items()} if step == self.step else {}
                if self.log is not None:
                    heads = dict(zip(HEADS, row[1:], strict=False))
                    self.log.write(step=step, loss=row[0], **heads, silent=self.silent, **extra)
        self.unlogged.clear()
        self.logged = time.monotonic()
        if self.log is not None:
            self.log.flush()
        self._report(validation)

    def _validate(self) -> dict[str, float]:
        """Compute figures over the validation data; the best weights are written."""
        run, fabric = self.run, self.fabric
        assert run.validation is not None
        if fabric.world_size > 1:  # each process has running statistics of its own part
            for buffer in self.net.buffers():
                buffer.copy_(fabric.broadcast(buffer, src=0))
        examples = len(run.validation.steps)
        own = range(fabric.global_rank, examples, fabric.world_size)
        size = max(1, run.config.batch // fabric.world_size)
        keys = [[(0, i) for i in own[start : start + size]] for start in range(0, len(own), size)]
        batches = create_loader(
            DistillationExamples(run.validation, None), keys, run.workers, fabric.device.type
        )
        figures = validation_figures(self.net, batches, run.config, fabric, examples)
        if not self.best["figures"] or figures["loss"] < self.best["figures"]["loss"]:
            self.best = {"step": self.step, "figures": figures}
            self._write_weights()
        return figures

    def _save(self) -> None:
        """Write the checkpoint; without validation the weights too."""
        if not self.best["figures"]:
            self.best = {"step": self.step, "figures": {}}
            self._write_weights()
        if not self.is_first:
            return
        save_checkpoint(
            self.run.folder / CHECKPOINT,
            {
                "settings": self.run.settings,
                "step": self.step,
                "loss": self.loss,
                "best": self.best,
                "unreadable": self.unreadable,
                "silent": self.silent,
                "model": self.net.state_dict(),
                "optimizer": self.optimizer.optimizer.state_dict(),
                "scaler": self.fabric.strategy.precision.state_dict(),
            },
        )
        if self.unreadable:
            with atomic_write(self.run.folder / UNREADABLE) as temporary:
                lines = [f"{name}\t{reason}\n" for name, reason in sorted(self.unreadable.items())]
                temporary.write_text("".join(lines), "utf-8", errors="surrogateescape")
        if self.step == self.run.config.iterations or time.monotonic() - self.plotted > _PLOT_EVERY:
            plot_curves(self.run.folder / LOG, self.run.folder / CURVES)
            self.plotted = time.monotonic()

    def _write_weights(self) -> None:
        if self.is_first:
            write_trained_weights(self.run.folder / WEIGHTS, self.net, {**self.run.settings, **self.best})

    def _any_process(self, stop: bool) -> bool:
        """Tell whether any process is to stop, so that all stop after the same step."""
        if self.fabric.world_size == 1:
            return stop
        request = torch.tensor(float(stop), device=self.fabric.device)
        return bool(self.fabric.all_reduce(request, reduce_op="sum") > 0)

    def _report(self, validation: Mapping[str, float] = {}, message: str = "") -> None:
        if not self.is_first or self.run.progress is None:
            return
        note = "" if self.loss is None else f"loss {self.loss:.5g}"
        if validation:
            figures = ", ".join(f"{name} {value:.4g}" for name, value in validation.items())
            message = f"step {self.step:,}: {note}; validation {figures}"
        iterations = self.run.config.iterations
        self.run.progress(
            StepProgress(self.step, iterations, "step", note, message, loss=self.loss, validation=validation)
        )


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """Provide an event that SIGINT and SIGTERM set, here and in the processes of other devices."""
    event = threading.Event()

    def stop(number: int, frame: object) -> None:
        event.set()
        for process in multiprocessing.active_children():
            if process.pid is not None and process.name.startswith("SpawnProcess"):
                os.kill(process.pid, number)

    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
