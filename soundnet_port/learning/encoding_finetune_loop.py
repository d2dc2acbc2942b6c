"""The training loop of encoding models: ridge solution, windows of runs, and the measurements after an epoch.

The head's penalty is the ridge's. With N training volumes and the penalty a of an output, a step minimizes

    mean over volumes (y - X w)^2 + a / N |w|^2         averaged over outputs

whose minimum over w, for the trunk as it was, is the ridge solution. X is z-scored within runs, as in encode
(see encoding_finetune_data.py).
"""

from __future__ import annotations

import time
from math import ceil, cos, nan, pi
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from soundnet_port.learning.encoding_finetune_data import RunData
from soundnet_port.learning.encoding_finetune_run import (
    RIDGE,
    TEST,
    TRAIN,
    VALIDATION,
    EncodingRun,
    FinetuneEncodingResult,
    Scores,
    write_best,
    write_result,
)
from soundnet_port.learning.errors import TrainingError
from soundnet_port.learning.finetune_loop import EpochProgress
from soundnet_port.learning.randomness import ORDER, derive_rng
from soundnet_port.learning.ridge import count_steps, fit_ridge, score_predictions
from soundnet_port.learning.run_files import (
    CHECKPOINT,
    CURVES,
    LOG,
    Log,
    load_checkpoint,
    plot_curves,
    save_checkpoint,
)
from soundnet_port.progress import Progress, ProgressCallback

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_WARM_UP = 0.1  # of all epochs
_CHUNK = 2048  # outputs at a time
_FIELDS = ("step", "loss", "validation loss", "validation correlation")


class _Network(nn.Module):
    """A trunk, and a linear head, (predictors, usable outputs), on what its rows become."""

    def __init__(self, trunk: nn.Module, head: Tensor) -> None:
        super().__init__()
        self.trunk, self.head = trunk, nn.Parameter(head)


class EncodingLoop:
    """Fine-tune a run's network from its checkpoint, or from the ridge solution, to the end.

    Args:
        run: what to train.
        fabric: where.
        progress: called after every sound, before the first epoch, and after every epoch.

    Raises:
        EncodingError: a sound or the targets cannot be used.
        TrainingError: a checkpoint of other settings.
    """

    def __init__(self, run: EncodingRun, fabric: Fabric, progress: ProgressCallback | None) -> None:
        self.run, self.fabric, self.progress = run, fabric, progress
        self.started, self.earlier_seconds = time.monotonic(), 0.0
        model = run.model.to(fabric.device).eval().requires_grad_(False)
        for block in model.architecture.blocks[run.frozen_blocks :]:
            model.get_submodule(block.name).requires_grad_(True)  # batch norms stay as they are
        state: dict[str, Any] | None = None
        if (run.folder / CHECKPOINT).exists():
            state = load_checkpoint(run.folder / CHECKPOINT)
            run.check_settings(state.get("settings"))
            model.load_state_dict(state["trunk"])
        self.data = RunData(run, progress)
        if state is None:
            head = self._fit_ridge()
        else:
            head, self.alpha = state["head"], state["alpha"].numpy()
        self.network = _Network(model, head)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.adam = torch.optim.Adam(
            [
                {"params": [self.network.head], "lr": run.config.lr},
                {"params": trained, "lr": run.config.trunk_lr},
            ]
        )
        self.rates = run.config.lr, run.config.trunk_lr
        _, self.optimizer = fabric.setup(self.network, self.adam)
        self.penalty = torch.from_numpy(self.alpha / len(self.data.targets[TRAIN])).to(fabric.device)
        self.epoch = self.step = 0
        if state is None:
            validation = self._score(VALIDATION)
            self.ridge = validation if run.measured == VALIDATION else self._score(TEST)
            self.best = self._keep(validation.loss)
            self.start = {"loss": self._score(TRAIN).loss, **_figures(validation)}
            run.write_scores(RIDGE, self.ridge)
        else:
            self.adam.load_state_dict(state["optimizer"])
            self.epoch, self.step, self.best = state["epoch"], state["step"], state["best"]
            self.start = state["start"]
            self.ridge = run.read_scores(RIDGE, state["ridge loss"])
            self.earlier_seconds = state["seconds"]

    def _fit_ridge(self) -> Tensor:
        """Return the ridge solution, (predictors, usable outputs); keep its penalties."""
        device = self.fabric.device
        done, total = 0, count_steps(int(self.data.usable.sum()), len(self.run.alphas))

        def report_step() -> None:
            nonlocal done
            done += 1
            if self.progress:
                self.progress(Progress(done, total, "fit", note="ridge"))

        fit = fit_ridge(
            self.data.predictors[TRAIN],
            self.data.targets[TRAIN],
            self.data.folds(),
            self.run.alphas,
            device="cpu" if device.type == "mps" else device,  # which has no float64
            on_step=report_step,
        )
        self.alpha = fit.alpha
        return torch.from_numpy(fit.weights)

    # ---- training

    def train(self) -> FinetuneEncodingResult:
        """Train to the last epoch, or to where patience ends; write all files."""
        run, epochs = self.run, self.run.config.epochs
        if self.progress:
            self.progress(Progress(self.epoch, epochs, "epoch", message=self._describe()))
        with Log(run.folder / LOG, _FIELDS, self.step) as log:
            if not self.step:
                log.write(step=0, **self.start)
                self._save(log)
                if self.progress:
                    self.progress(_report(0, epochs, "ridge solution: ", self.start))
            while self.epoch < epochs and not self._is_out_of_patience():
                loss = self._train_epoch()
                if not np.isfinite(loss):
                    raise TrainingError(
                        f"{run.folder}: the loss is {loss}; start over in another folder with a lower "
                        "--lr or --trunk-lr"
                    )
                self.epoch += 1
                for part in (TRAIN, VALIDATION):
                    self.data.refresh(part)
                validation = self._score(VALIDATION)
                if validation.loss < self.best["loss"]:
                    self.best = self._keep(validation.loss)
                figures = {"loss": loss, **_figures(validation)}
                log.write(step=self.step, **figures)
                self._save(log)
                if self.progress:
                    self.progress(_report(self.epoch, epochs, "", figures))
        return self._finish()

    def _describe(self) -> str:
        parameters = sum(own.numel() for own in self.network.trunk.parameters() if own.requires_grad)
        parts = [
            f"{part} {self.run.name_part(part)} ({len(targets):,} volumes)"
            for part, targets in self.data.targets.items()
        ]
        return (
            f"{self.run.layer}, {parameters:,} parameters of the trunk, {len(self.penalty):,} outputs; runs: "
            + ", ".join(parts)
        )

    def _is_out_of_patience(self) -> bool:
        patience = self.run.config.patience
        return bool(patience and self.epoch - self.best["epoch"] >= patience)

    def _train_epoch(self) -> float:
        """Train for an epoch, and return the mean squared error."""
        windows = self.data.draw_windows(derive_rng(self.run.config.seed, ORDER, self.epoch))
        total_volumes = len(self.data.targets[TRAIN])
        volumes = total_volumes / len(windows)  # per step
        total = torch.zeros((), device=self.fabric.device)
        for number, window in enumerate(windows):
            factor = self._rate((self.epoch + (number + 0.5) / len(windows)) / self.run.config.epochs)
            for group, rate in zip(self.adam.param_groups, self.rates, strict=True):
                group["lr"] = rate * factor
            target = self.data.window_targets(window)
            with self.fabric.autocast():
                predicted = self.data.window_predictors(window) @ self.network.head
            error = (predicted.float() - target).square().sum() / target.shape[1]
            shrinkage = (self.network.head.square().sum(0) * self.penalty).mean()
            self.optimizer.zero_grad()
            self.fabric.backward(error / volumes + shrinkage)
            self.optimizer.step()
            self.step += 1
            total += error.detach()
        return float(total) / total_volumes

    @staticmethod
    def _rate(progress: float) -> float:
        """Return the learning rate as a share of its peak, 0 to 1 of the way."""
        if progress < _WARM_UP:
            return progress / _WARM_UP
        return (1 + cos(pi * (progress - _WARM_UP) / (1 - _WARM_UP))) / 2

    # ---- figures and files

    def _score(self, part: str) -> Scores:
        """Return the figures of a part, whose runs are z-scored by themselves, as in encode."""
        targets, usable = self.data.targets[part], self.data.usable
        correlation = np.full(len(usable), nan, np.float32)
        r2, errors, columns = correlation.copy(), 0.0, np.flatnonzero(usable)
        rows = torch.from_numpy(self.data.predictors[part]).to(self.fabric.device)
        with torch.no_grad():
            for outputs in np.array_split(np.arange(len(columns)), ceil(len(columns) / _CHUNK)):
                predicted = (rows @ self.network.head[:, outputs]).double().cpu()
                own = torch.from_numpy(targets[:, outputs]).double()
                scores = score_predictions(predicted, own)
                correlation[columns[outputs]], r2[columns[outputs]] = (score.numpy() for score in scores)
                errors += float((own - predicted).square().sum())
        return Scores(errors / targets.size, correlation, r2)

    def _seconds(self) -> float:
        return self.earlier_seconds + time.monotonic() - self.started

    def _save(self, log: Log) -> None:
        log.flush()
        save_checkpoint(
            self.run.folder / CHECKPOINT,
            {
                "settings": self.run.settings,
                "trunk": self.run.model.state_dict(),
                "head": self.network.head.detach(),
                "alpha": torch.from_numpy(self.alpha),
                "optimizer": self.adam.state_dict(),
                "epoch": self.epoch,
                "step": self.step,
                "best": self.best,
                "start": self.start,
                "ridge loss": self.ridge.loss,
                "seconds": self._seconds(),
            },
        )

    def _keep(self, loss: float) -> dict[str, Any]:
        """Return a copy of trunk and head, which the checkpoint keeps together until the run is done."""
        trunk = {name: own.detach().cpu().clone() for name, own in self.run.model.state_dict().items()}
        head = self.network.head.detach().cpu().clone()
        return {"epoch": self.epoch, "loss": loss, "trunk": trunk, "head": head}

    def _finish(self) -> FinetuneEncodingResult:
        """Measure the epoch that is kept; write all files but the log; remove the checkpoint."""
        run, best = self.run, self.best
        run.model.load_state_dict(best["trunk"])
        with torch.no_grad():
            self.network.head.copy_(best["head"])
        write_best(run, best["epoch"], best["trunk"], best["head"].numpy().T, self.alpha, self.data.usable)
        self.data.refresh(run.measured)
        finetuned = self._score(run.measured)
        notes = list(self.data.notes)
        if run.config.epochs and not self.best["epoch"]:
            notes.append("no epoch improved on the ridge solution in the validation runs; it is kept")
        plot_curves(run.folder / LOG, run.folder / CURVES)
        result = write_result(run, self.best["epoch"], self.ridge, finetuned, notes, self._seconds())
        (run.folder / CHECKPOINT).unlink(missing_ok=True)
        return result


def _figures(validation: Scores) -> dict[str, float]:
    return {
        "validation loss": validation.loss,
        "validation correlation": validation.summarize()["median_correlation"],
    }


def _report(epoch: int, epochs: int, prefix: str, figures: dict[str, float]) -> EpochProgress:
    note = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
    return EpochProgress(epoch, epochs, "epoch", prefix + note, loss=figures["loss"], figures=figures)
