"""The command line's learning: train, finetune, teach, evaluate."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean, pstdev
from typing import TYPE_CHECKING, Any

from soundnet_port.audio.loading import DECODERS
from soundnet_port.cli.main import (
    FAILED,
    LISTED,
    Command,
    UsageError,
    advance,
    advance_files,
    complain,
    explicit_options,
    layer_key,
    network_of,
    show_summary,
)
from soundnet_port.errors import MissingExtraError

if TYPE_CHECKING:
    from soundnet_port.learning.finetuning import Epoch
    from soundnet_port.learning.training import Progress as Step

_LINE_EVERY = 30  # seconds, of a training whose progress goes to a file


def _train(options: argparse.Namespace) -> int:
    from soundnet_port.learning.common import Augmentation, TrainingError, first_process
    from soundnet_port.learning.training import TrainConfig, train
    from soundnet_port.network.architecture import ARCHITECTURES

    if options.start and (options.architecture or options.widths):
        raise UsageError("--from says which network it is; leave out --architecture and --widths")
    architecture = ARCHITECTURES[options.architecture or "soundnet8"]
    try:
        if options.widths:
            widths = [int(width) for width in options.widths.split(",")]
            architecture = architecture.resized(widths, architecture.head_sizes)
        weights = [each.rpartition("=") for each in options.teacher or ()]
        teachers = {name: float(weight) for name, _, weight in weights}
        devices = options.devices if options.devices == "auto" else int(options.devices)
    except ValueError as error:
        raise UsageError(f"--widths, --teacher or --devices: {error}") from None
    try:
        result = train(
            options.data,
            options.output,
            recipe=TrainConfig(
                augmentation=Augmentation(
                    **explicit_options(options, "gain", "shift", "stretch", "flip", "mix")
                ),
                teachers=teachers,
                **explicit_options(
                    options, "iterations", "batch", "lr", "schedule", "balance", "temperature", "seed"
                ),
            ),
            architecture=architecture,
            start=options.start,
            validation=options.validation,
            validate_every=options.validate_every,
            save_every=options.save_every,
            accelerator=options.accelerator,
            devices=devices,
            precision=options.precision,
            workers=options.workers,
            cache=options.cache,
            progress=_TrainingBar(),
        )
    except TrainingError as error:
        raise UsageError(str(error)) from None
    if not first_process():  # it speaks for all
        return 130 if result.interrupted else 0
    for reason in list(result.unreadable.values())[:LISTED]:
        complain(reason)
    if result.unreadable:
        complain(
            f"{len(result.unreadable):,} sounds cannot be read and were silence in the training; "
            f"listed in {result.folder / 'unreadable.tsv'}"
        )
    if options.json:
        print(json.dumps(asdict(result), default=str))
    else:
        figures = "".join(f", {name} {value:.4g}" for name, value in result.validation.items())
        print(f"{result.weights}: step {result.best:,} of {result.step:,}{figures}")
    if result.interrupted:
        complain(f"{result.folder}: interrupted; the same command goes on from step {result.step:,}")
        return 130
    return FAILED if result.unreadable else 0


def _finetune(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from soundnet_port.learning.common import Augmentation, TrainingError
    from soundnet_port.learning.datasets import LabeledSoundsError, read_labeled
    from soundnet_port.learning.finetuning import FinetuneConfig, FinetuneResult, cross_validate, finetune
    from soundnet_port.network.architecture import ARCHITECTURES

    if bool(options.weights) == bool(options.scratch):
        raise UsageError("begin from what? name weights with -w, or a network with --scratch")
    if options.workers != 1 and options.test != "all":
        raise UsageError("--workers is for --test all")

    def show_fold(tuned: FinetuneResult) -> None:
        if tuned.accuracy is not None:
            result = f"{tuned.accuracy:.1%} of {len(tuned.predictions)} sounds"
            complain(f"fold {tuned.fold}: {result}, epoch {tuned.epoch}, {tuned.seconds:.0f} s")

    with tqdm(unit="epoch", disable=options.test == "all" or not sys.stderr.isatty()) as bar:

        def show(epoch: Epoch) -> None:
            bar.set_postfix_str(f"loss {epoch.loss:.4g}", refresh=False)
            advance(bar, epoch.number, epoch.epochs)

        try:
            changes = FinetuneConfig().augmentation
            settings: dict[str, Any] = {
                "start": options.weights or ARCHITECTURES[options.scratch],
                "tuning": FinetuneConfig(
                    augmentation=Augmentation(
                        **asdict(changes) | explicit_options(options, "gain", "shift", "stretch", "mix"),
                    ),
                    **explicit_options(
                        options, "epochs", "batch", "lr", "decay", "dropout", "seconds", "patience", "seed"
                    ),
                    edge_frames=options.edge_frames,
                ),
                **explicit_options(options, "layer", "frozen", "validation"),
                "kernel": options.kernel,
                "accelerator": options.accelerator,
                "precision": options.precision,
            }
            data = read_labeled(options.labelled, options.root, esc10=options.esc10)
            if options.test == "all":
                made = cross_validate(
                    data, options.output, workers=options.workers, finished=show_fold, **settings
                )
            else:
                made = [finetune(data, options.output, test=options.test, progress=show, **settings)]
        except (TrainingError, LabeledSoundsError) as error:
            raise UsageError(str(error)) from None
    unreadable = {path: reason for each in made for path, reason in each.unreadable.items()}
    for reason in unreadable.values():
        complain(reason)
    if options.json:
        print(json.dumps([asdict(each) for each in made], default=str))
    else:
        for each in made:
            accuracy = "" if each.accuracy is None else f": {each.accuracy:.1%} of fold {each.fold}"
            print(f"{each.weights}{accuracy}")
        accuracies = [each.accuracy for each in made if each.accuracy is not None]
        if len(made) > 1:
            print(f"mean {mean(accuracies):.1%}, std over folds {pstdev(accuracies):.1%}")
    return FAILED if unreadable else 0


class _TrainingBar:
    """Shows a training's progress, a bar on a terminal and lines elsewhere. Made where it runs."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._shown = 0.0

    def __call__(self, progress: Step) -> None:
        if self._bar is None:
            from tqdm import tqdm

            quiet = not sys.stderr.isatty()
            total = progress.iterations
            self._bar = tqdm(
                total=total, initial=progress.step, unit="step", disable=quiet, dynamic_ncols=True
            )
            self._at = progress.step
        loss = "" if progress.loss is None else f"loss {progress.loss:.5g}"
        if progress.validation:
            self._bar.clear()
            figures = ", ".join(f"{name} {value:.4g}" for name, value in progress.validation.items())
            complain(f"step {progress.step:,}: {loss}; validation {figures}")
        elif self._bar.disable and loss and time.monotonic() - self._shown > _LINE_EVERY:
            complain(f"step {progress.step:,} of {progress.iterations:,}: {loss}")
            self._shown = time.monotonic()
        if progress.unreadable:
            self._bar.clear()
            complain(f"{progress.unreadable}; it is silence in this training")
        self._bar.set_postfix_str(loss, refresh=False)
        self._bar.update(progress.step - self._at)
        self._at = progress.step


def _teach(options: argparse.Namespace) -> int:
    """Training data into a folder. Failures and figures go to stderr, as of `extract -o`."""
    import torch
    from tqdm import tqdm

    from soundnet_port.corpus.extractor import CorpusError

    teachers: dict[str, list[str]] = {}
    for each in options.teacher:
        head, equals, source = each.partition("=")
        if not (equals and source):
            raise UsageError(f"--teacher {each}: say of which head, as in objects={each or 'MODEL'}")
        teachers.setdefault(head, []).append(source)
    try:
        from transformers.utils import logging

        from soundnet_port.learning.video_labeling import label_videos

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        with tqdm(unit="video", disable=not sys.stderr.isatty(), dynamic_ncols=True) as bar:
            summary = label_videos(
                options.videos,
                options.output,
                teachers,
                batch=options.batch,
                workers=options.workers,
                device=torch.device(options.device),
                root=options.root,
                progress=partial(advance_files, bar),
            )
    except MissingExtraError:
        raise
    except ImportError:
        raise MissingExtraError("transformers", "videos") from None
    except CorpusError as error:  # whole, for a name in it may have a line feed
        raise UsageError(str(error)) from None
    except RuntimeError as error:  # torch, of a device or its memory, with a stack
        raise UsageError(str(error).splitlines()[0]) from None
    show_summary(summary)
    return FAILED if summary.failures else 0


def _evaluate(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from soundnet_port.learning.datasets import LabeledSoundsError, read_labeled
    from soundnet_port.learning.evaluation import EvaluationError, evaluate, table, write_evaluation

    if options.cache and options.no_cache:
        raise UsageError("--cache and --no-cache contradict each other")
    if options.output and not options.force and (Path(options.output) / "evaluation.json").exists():
        raise UsageError(f"{options.output}: has an evaluation already; --force replaces it")
    with tqdm(unit="sound", disable=not sys.stderr.isatty()) as bar:
        try:
            made = evaluate(
                network_of(options),
                read_labeled(options.labelled, options.root, esc10=options.esc10),
                layer=None if options.layer is None else layer_key(options.layer),
                protocol=options.protocol,
                pool=options.pool,
                resample=not options.no_resample,
                edge_frames=options.edge_frames,
                decoder=options.decoder,
                cache=options.cache or not options.no_cache,
                progress=partial(advance, bar),
            )
            written = write_evaluation(made, options.output) if options.output else []
        except (EvaluationError, LabeledSoundsError) as error:
            raise UsageError(str(error)) from None
    for note in [*made.failures, *made.notes, *(f"wrote {path}" for path in written)]:
        complain(note)
    if options.json:
        print(json.dumps(made.to_dict()))
    else:
        for fold in made.folds:
            print(f"fold {fold.name}: {fold.accuracy:.1%} of {fold.test} sounds, C {fold.c:g}")
        print(f"{made.title}: {made.accuracy:.1%}, std over folds {made.std:.1%}\n")
        print(table(made))
    return FAILED if made.failures else 0


def add_commands(command: Command) -> None:
    """Adds them to the parser."""
    sub = command(
        "train",
        _train,
        "train a network on teachers' probabilities, as the paper did",
        description="Trains SoundNet from teachers who saw what was filmed. DATA is a manifest (.tsv),\n"
        "WebDataset shards (.tar, or a folder of them), or the folder of the released Flickr data;\n"
        "docs/train.md describes them. Writes RUN/weights.safetensors, log.csv, curves.png and a\n"
        "checkpoint; the same command goes on where an interrupted run was, with the same numbers.\n"
        "Unreadable sounds are silence, as in the original; exit code 1 if there were any.",
        epilog="examples:\n"
        "  soundnet-port train clips.tsv -o run/ --validation held-out.tsv --iterations 2000\n"
        "  soundnet-port train flickr/ -o run/ --devices 4 --workers 10 --precision bf16-mixed",
    )
    sub.add_argument("data", metavar="DATA", help="manifest, shards, or folder of the released data")
    sub.add_argument("-o", "--output", metavar="RUN", required=True, help="folder of the run")
    sub.add_argument("--validation", metavar="DATA", help="held-out data; the best weights are kept")
    sub.add_argument("--architecture", choices=("soundnet8", "soundnet5"), help="default: soundnet8")
    sub.add_argument("--widths", metavar="N,N,...", help="channels of the blocks, for a narrower network")
    sub.add_argument("--from", dest="start", metavar="WEIGHTS", help="name or file to start from")
    for flag, kind, metavar, text in (
        ("--iterations", int, "N", "steps of the optimizer (default: 100000)"),
        ("--batch", int, "N", "examples in a step, on all devices together (default: 64)"),
        ("--lr", float, "X", "learning rate (default: 0.001)"),
        ("--balance", float, "X", "factor of the loss, the original's lambda (default: 250)"),
        ("--temperature", float, "X", "of teachers and student (default: 1)"),
        ("--gain", float, "DB", "augmentation: louder or softer by up to so much (default: 0)"),
        ("--shift", float, "S", "augmentation: earlier or later by up to so many seconds (default: 0)"),
        ("--stretch", float, "X", "augmentation: faster or slower by up to so many times (default: 1)"),
        ("--mix", float, "P", "augmentation: probability of a mixture of two sounds (default: 0)"),
        ("--seed", int, "N", "of start values, order and augmentation (default: 0)"),
    ):
        sub.add_argument(flag, type=kind, metavar=metavar, help=text)
    sub.add_argument("--flip", action="store_true", help="augmentation: turn the sign of half of the sounds")
    sub.add_argument("--schedule", choices=("constant", "cosine"), help="of the learning rate (constant)")
    sub.add_argument(
        "--teacher", metavar="NAME=X", action="append", help="weight of a teacher, such as objects:vit=0.5"
    )
    sub.add_argument("--validate-every", type=int, default=5000, metavar="N", help="default: 5000")
    sub.add_argument("--save-every", type=int, default=500, metavar="N", help="default: 500")
    sub.add_argument("--workers", type=int, default=0, metavar="N", help="processes that decode (default: 0)")
    sub.add_argument("--cache", type=float, default=1.0, metavar="GB", help="decoded sound in memory (1)")
    sub.add_argument("--accelerator", default="auto", help="cpu, cuda, ... (default: what is there)")
    sub.add_argument("--devices", default="1", metavar="N", help="how many, or auto (default: 1)")
    sub.add_argument("--precision", default="32-true", help="32-true (default), bf16-mixed, 16-mixed")
    sub.add_argument("--json", action="store_true", help="the result as a JSON object")

    sub = command(
        "finetune",
        _finetune,
        "teach a network classes of your own",
        description="Puts a head for the classes of labelled sounds on a layer, and trains as much of the\n"
        "network as wanted. RUN/weights.safetensors is for 'predict', like any weights. The same command\n"
        "goes on where an interrupted run was. With --test a fold is held out and measured at the end;\n"
        "with --test all every fold in turn, in RUN/fold-1, ... (extra [learn]).",
        epilog="examples:\n"
        "  soundnet-port finetune birds/ -o run/ -w soundnet8 --frozen conv4\n"
        "  soundnet-port finetune ESC-50-master --esc10 --scratch soundnet8 --test all -o run/\n"
        "  soundnet-port predict chirp.wav -w run/weights.safetensors",
    )
    _labelled_options(sub, "DATA")
    sub.add_argument("-o", "--output", metavar="RUN", required=True, help="folder of the run")
    sub.add_argument("-w", "--weights", help="name or file to begin with")
    sub.add_argument("--scratch", choices=("soundnet8", "soundnet5"), help="begin with random values instead")
    sub.add_argument("-l", "--layer", help="that the head is put on (default: the last of the trunk)")
    sub.add_argument(
        "--kernel", type=int, default=1, metavar="N", help="frames that the head sees at once (default: 1)"
    )
    sub.add_argument(
        "--edge-frames",
        action="store_true",
        help="learn from frames that hear zeros after the sound's end, too, and answer by them",
    )
    sub.add_argument("--frozen", metavar="LAYER", help="nothing changes up to this layer (default: all does)")
    sub.add_argument("--test", metavar="FOLD", help="hold this fold out and measure on it; all: each in turn")
    sub.add_argument("--validation", metavar="FOLD", help="hold this fold out to choose the best epoch")
    for flag, kind, metavar, text in (
        ("--epochs", int, "N", "how often each sound is heard (default: 60)"),
        ("--batch", int, "N", "sounds in a step (default: 16)"),
        ("--lr", float, "X", "highest learning rate (default: 0.003 from scratch, 0.001 from weights)"),
        ("--decay", float, "X", "weight decay (default: 0.05)"),
        ("--dropout", float, "P", "of what the head sees (default: 0.3)"),
        ("--seconds", float, "S", "of a random crop (default: 5)"),
        ("--gain", float, "DB", "augmentation: louder or softer by up to so much (default: 6)"),
        ("--shift", float, "S", "augmentation: earlier or later by up to so many seconds (default: 5)"),
        ("--stretch", float, "X", "augmentation: faster or slower by up to so many times (default: 1.12)"),
        ("--mix", float, "P", "augmentation: probability of a mixture of two sounds (default: 0.2)"),
        ("--patience", int, "N", "with --validation: stop after so many epochs without improvement"),
        ("--seed", int, "N", "of all that is random (default: 0)"),
    ):
        sub.add_argument(flag, type=kind, metavar=metavar, help=text)
    sub.add_argument(
        "--workers", type=int, default=1, metavar="N", help="with --test all: folds at a time (default: 1)"
    )
    sub.add_argument("--accelerator", default="cpu", help="cpu (default), cuda, mps, auto")
    sub.add_argument("--precision", default="32-true", help="32-true (default), bf16-mixed, 16-mixed")
    sub.add_argument("--json", action="store_true", help="the results as JSON")

    sub = command(
        "label-videos",
        _teach,
        "make data for training from videos",
        description="Shows a frame of every 5 s of videos to image classifiers, the teachers, and writes\n"
        "their probabilities and a manifest, OUT/manifest.tsv, for 'train'. A teacher is a model\n"
        "for image classification on the Hugging Face hub, or a folder with one (extra [videos]).\n"
        "A run that was interrupted goes on when the same command is given again. Goes on past\n"
        "bad videos; exit code 1 if there were any.",
        epilog="examples:\n"
        "  soundnet-port label-videos videos/ -o lessons --teacher objects=microsoft/resnet-50\n"
        "  soundnet-port label-videos videos/ -o lessons --teacher objects=microsoft/resnet-50 \\\n"
        "      --teacher objects=google/vit-base-patch16-224 --teacher scenes=my-places-model/",
    )
    sub.add_argument(
        "videos",
        metavar="VIDEO",
        nargs="+",
        help="file, directory (searched), or @LIST: a text file with a path per line; @- is a list on stdin",
    )
    sub.add_argument("-o", "--output", metavar="OUT", required=True, help="folder")
    sub.add_argument(
        "--teacher",
        metavar="HEAD=MODEL",
        action="append",
        required=True,
        help="of the head objects or scenes: a name on the hub, or a folder; several times for more",
    )
    sub.add_argument("--batch", type=int, default=32, metavar="N", help="frames at once (default: 32)")
    sub.add_argument("--workers", type=int, metavar="N", help="threads that decode (default: one per CPU)")
    sub.add_argument("--device", default="cpu", help="of the teachers: cpu (default), cuda, ...")
    sub.add_argument("--root", metavar="DIR", help="folder that the names in OUT are relative to")

    sub = command(
        "evaluate",
        _evaluate,
        "how well features tell labelled sounds apart",
        description="Learns a linear classifier on a layer's features from labelled sounds, tests it on\n"
        "each fold, and prints accuracies and the confusion matrix (extra [learn]). Features are kept, so\n"
        "that the next evaluation of the same sounds with the same network is quick.",
        epilog="examples:\n"
        "  soundnet-port evaluate ESC-50-master\n"
        "  soundnet-port evaluate ESC-50-master --esc10 --protocol paper -o results/\n"
        "  soundnet-port evaluate mine.tsv -w soundnet5 -l conv4 --json > mine.json",
    )
    _labelled_options(sub, "SOURCE")
    sub.add_argument("-w", "--weights", default="soundnet8", help="name or file (default: soundnet8)")
    sub.add_argument(
        "-l", "--layer", help="name, or Torch7's module number (default: pool5; with 5 layers conv4)"
    )
    sub.add_argument(
        "--protocol",
        choices=("modern", "paper", "paper-dcase"),
        default="modern",
        help="modern (default): pooled vectors, C chosen within the training folds; paper: the original's "
        "eval_esc50.lua; paper-dcase: its eval_dcase.lua",
    )
    sub.add_argument(
        "--pool",
        choices=("mean", "max", "mean+std"),
        default="mean+std",
        help="of modern, over time (default: mean+std)",
    )
    sub.add_argument(
        "--edge-frames",
        action="store_true",
        help="of modern: pool over frames that hear zeros after the sound's end (conv7's last), too",
    )
    sub.add_argument("-o", "--output", metavar="OUT", help="folder for JSON, predictions and a picture")
    sub.add_argument("--json", action="store_true", help="all figures as a JSON object")
    sub.add_argument(
        "--no-resample",
        action="store_true",
        help="of the paper's protocols: take samples at the file's own rate, as the scripts did",
    )
    sub.add_argument("--cache", metavar="DIR", help="where features are kept (default: the user's cache)")
    sub.add_argument("--no-cache", action="store_true", help="neither look for features nor keep them")
    sub.add_argument("-f", "--force", action="store_true", help="replace results in OUT")
    sub.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    sub.add_argument("--decoder", choices=DECODERS, default="auto", help="auto (default), soundfile, av, sox")


def _labelled_options(sub: argparse.ArgumentParser, metavar: str) -> None:
    """What commands that learn from labelled sounds have in common."""
    sub.add_argument(
        "labelled",
        metavar=metavar,
        help="folder of ESC-50, ESC-10, DCASE, or with a folder of sounds per class; or a list with a line "
        "path<TAB>label<TAB>fold per sound, or with named columns",
    )
    sub.add_argument("--root", metavar="DIR", help="folder that a list's paths are relative to")
    sub.add_argument("--esc10", action="store_true", help="of ESC-50 only the classes of ESC-10")
