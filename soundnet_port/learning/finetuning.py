"""Fine-tune a SoundNet on new classes: a new head on any layer, training as much of the trunk as wanted.

From weights, evaluate's linear classifier becomes a pooled head, in seconds: with a few hundred clips that
is more accurate than training the network further.

The original's script (main_finetune.lua) puts a convolution of 4 frames on conv7 and trains the full
network with random crops of 5 s. Here such a head sees one frame by default, its logits are averaged over
the clip, and the crops are augmented: without that, a network of this size memorizes a few hundred clips.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import torch

from soundnet_port.files import exclusive_lock
from soundnet_port.learning.datasets import read_labeled
from soundnet_port.learning.devices import create_fabric
from soundnet_port.learning.errors import TrainingError
from soundnet_port.learning.feature_cache import open_cache
from soundnet_port.learning.finetune_loop import FinetuneLoop
from soundnet_port.learning.finetune_run import FinetuneConfig, FinetuneResult
from soundnet_port.learning.finetune_setup import prepare_run
from soundnet_port.learning.labeled_sounds import LabeledSounds
from soundnet_port.learning.pooled_head import fit_pooled_head
from soundnet_port.network.architecture import Architecture
from soundnet_port.network.gradients import keep_freed_memory
from soundnet_port.network.model import SoundNet
from soundnet_port.progress import Progress, ProgressCallback


def finetune(
    data: LabeledSounds | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    weights: SoundNet | Architecture | str | os.PathLike[str] | None = None,
    head: str | None = None,
    layer: str | None = None,
    kernel: int = 1,
    frozen: str | None = None,
    config: FinetuneConfig | None = None,
    test: str | None = None,
    validation: str | None = None,
    device: str = "auto",
    precision: str = "32-true",
    cache: str | os.PathLike[str] | bool = True,
    progress: ProgressCallback | None = None,
) -> FinetuneResult:
    """Train a network on labeled sounds, or resume an interrupted run.

    Writes to the folder `weights.safetensors`, `log.csv`, `curves.png`, `result.json`; and
    `checkpoint.pt`, from which the same call resumes, until it is done. A run that is done is only read.

    Args:
        data: labeled sounds, or what `read_labeled` takes.
        folder: of the run.
        weights: initial weights: a network, or its name or file; or an Architecture for random values,
            by default SOUNDNET8.
        head: "pooled": `evaluate`'s linear classifier on whole sounds, fitted to the network as it is, in
            seconds; or "convolution": trained by gradient descent together with the trunk. By default
            pooled for weights, unless one of the settings for convolutions is given: `layer`, `kernel`,
            `frozen`, `validation`.
        layer: that a convolution is put on, such as "pool5"; by default conv6 (with 5 layers conv4) of
            weights, and the last one of a trunk with random values. Later ones are left out.
        kernel: frames that the head sees at once; its logits are averaged over all frames.
        frozen: the layer up to which nothing changes, batch norm's statistics included; by default
            everything is trained.
        config: hyperparameters; by default `FinetuneConfig()`.
        test: name of a fold to hold out and measure accuracy on at the end. It chooses nothing.
        validation: name of a fold to hold out for choosing the epoch with the least loss on it, and
            for early stopping.
        device: "cpu", "cuda", "cuda:1", "mps", or "auto" for the best one available.
        precision: "32-true", "bf16-mixed" or "16-mixed".
        cache: for pooled heads, folder of their features, as for `evaluate`, which shares it.
        progress: called after every epoch with an `EpochProgress`; with a pooled head after every sound.

    Raises:
        TrainingError: settings that cannot work, a folder with another run or with another process at
            work, too few sounds.
        LabeledSoundsError: the data cannot be read.
        WeightsError: no such weights.
        MissingExtraError: the extra `[learn]` is not installed.
    """
    with torch.random.fork_rng(devices=[]):  # modules draw initial values
        config = config or FinetuneConfig()
        run = prepare_run(
            data, folder, weights, head, layer, kernel, frozen, config, test, validation, precision
        )
        if (result := run.read_result()) is not None:
            return result
        fabric = create_fabric(device, precision=precision)
        run.folder.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(run.folder, TrainingError):  # another process may have finished it since
            if (result := run.read_result()) is not None:
                return result
            if run.pooled:
                return fit_pooled_head(run, open_cache(cache, run.model), progress)
            return FinetuneLoop(run, fabric, progress).train()


def cross_validate(
    data: LabeledSounds | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    workers: int = 1,
    progress: ProgressCallback | None = None,
    **settings: Any,
) -> list[FinetuneResult]:
    """Hold out each fold in turn; a run per fold, in `fold-1`, `fold-2`, ... of the folder.

    Args:
        data: labeled sounds with folds.
        folder: of the runs; those that are done are not repeated.
        workers: folds at a time, each in a process with its share of the CPUs.
        progress: called after each fold, with its accuracy as the message; with one worker also by the runs,
            as for `finetune`.
        **settings: as for `finetune`.

    Raises:
        TrainingError: no folds; and as `finetune`.
    """
    if not isinstance(data, LabeledSounds):
        data = read_labeled(data)
    if len(data.folds) < 2:
        raise TrainingError("the sounds have no folds to hold out in turn")
    finetune_fold = partial(_finetune_fold, data, Path(folder), settings)
    results: dict[str, FinetuneResult] = {}

    def add(result: FinetuneResult) -> None:
        results[result.fold] = result
        if progress:
            epoch = f"epoch {result.epoch}, " if result.epoch else ""
            accuracy = "" if result.accuracy is None else f"{result.accuracy:.1%} of "
            progress(
                Progress(
                    len(results),
                    len(data.folds),
                    "fold",
                    message=f"fold {result.fold}: {accuracy}{len(result.predictions)} sounds, "
                    f"{epoch}{result.seconds:.0f} s",
                )
            )

    if workers == 1:
        for fold in data.folds:
            add(finetune_fold(0, fold, progress))
    else:
        if progress:
            progress(Progress(0, len(data.folds), "fold", message=f"{workers} folds at a time"))
        threads = max(1, torch.get_num_threads() // workers)
        # Ctrl-C ends the workers without a traceback
        with ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_DFL)
        ) as pool:
            futures = [pool.submit(finetune_fold, threads, fold) for fold in data.folds]
            try:
                for future in as_completed(futures):
                    add(future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return [results[fold] for fold in data.folds]


def _finetune_fold(
    data: LabeledSounds,
    folder: Path,
    settings: dict[str, Any],
    threads: int,
    fold: str,
    progress: ProgressCallback | None = None,
) -> FinetuneResult:
    """Hold out a fold; in a worker process, which has so many threads, or, with 0, in the caller's."""
    if threads:
        torch.set_num_threads(threads)
        keep_freed_memory()
    return finetune(data, folder / f"fold-{fold}", test=fold, progress=progress, **settings)
