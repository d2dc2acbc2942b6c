"""The commands that train networks: finetune and train."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict
from statistics import mean, pstdev
from typing import TYPE_CHECKING, Any

from soundnet_port.cli.options import (
    add_cache_options,
    add_device_option,
    add_labeled_sounds_options,
    explicit_options,
    parse_cache,
    read_labeled_sounds,
    warn_if_unused,
)
from soundnet_port.cli.parser import AddCommand
from soundnet_port.cli.reporting import (
    FAILED,
    INTERRUPTED,
    MAX_LISTED,
    ProgressReporter,
    UsageError,
    report,
)

if TYPE_CHECKING:
    from soundnet_port.network.architecture import Architecture

_ARCHITECTURES = ("soundnet8", "soundnet5")


def add_commands(add_command: AddCommand) -> None:
    """Add finetune and train."""
    _add_finetune(add_command)
    _add_train(add_command)


def _add_finetune(add_command: AddCommand) -> None:
    command = add_command(
        "finetune",
        _finetune,
        "train a network on classes of your own",
        description="Gives the network classes of labeled sounds. From weights a pooled head is fitted in\n"
        "seconds: the classifier of 'evaluate', on whole sounds. --head convolution (or --layer,\n"
        "--scratch) puts a convolution on a layer, and trains as much of the network as you like.\n"
        "RUN/weights.safetensors works with 'predict', like any weights. With --test a fold is held\n"
        "out and measured at the end; with --test all each fold in turn, in RUN/fold-1, ... The same\n"
        "command resumes an interrupted run (extra [learn]).",
        examples=(
            "soundnet-port finetune birds/ -o run/ -w soundnet8",
            "soundnet-port finetune birds/ -o run/ -w soundnet8 --head convolution --frozen conv4",
            "soundnet-port finetune ESC-50-master --esc10 --scratch soundnet8 --test all -o run/",
            "soundnet-port predict chirp.wav -w run/weights.safetensors",
        ),
        resumable=True,
    )
    add_labeled_sounds_options(command, "DATA")
    command.add_argument("-o", "--output", metavar="RUN", required=True, help="folder of the run")
    command.add_argument("-w", "--weights", help="initial weights: name or file")
    command.add_argument("--scratch", choices=_ARCHITECTURES, help="random initial weights instead")
    command.add_argument(
        "--head",
        choices=("pooled", "convolution"),
        help="pooled: fitted to the network as it is (default with -w); the other one is trained",
    )
    command.add_argument("-l", "--layer", help="for the convolution (default: the last one, conv7 or conv4)")
    command.add_argument(
        "--kernel", type=int, default=1, metavar="N", help="frames that the head sees at once (default: 1)"
    )
    command.add_argument(
        "--edge-frames",
        action="store_true",
        help="train and predict with the last frames too, which see zeros past the sound's end",
    )
    command.add_argument("--frozen", metavar="LAYER", help="freeze up to this layer (default: train all)")
    command.add_argument(
        "--test", metavar="FOLD", help="hold out this fold and measure on it; all: each in turn"
    )
    command.add_argument("--validation", metavar="FOLD", help="hold out this fold to choose the best epoch")
    _add_numbers(
        command,
        (
            ("--epochs", int, "N", "passes over the sounds (default: 60)"),
            ("--batch", int, "N", "sounds per step (default: 16)"),
            ("--lr", float, "X", "peak learning rate (default: 0.003 from scratch, 0.001 from weights)"),
            ("--trunk-lr", float, "X", "that of layers from weights (default: a tenth of --lr)"),
            ("--decay", float, "X", "weight decay (default: 0.05)"),
            ("--dropout", float, "P", "on the head's input (default: 0.3)"),
            ("--seconds", float, "S", "of a random crop (default: 5)"),
            ("--gain", float, "DB", "augmentation: up to DB louder or softer (default: 6)"),
            ("--shift", float, "S", "augmentation: up to S seconds earlier or later (default: 5)"),
            ("--stretch", float, "X", "augmentation: up to X times faster or slower (default: 1.12)"),
            ("--mix", float, "P", "augmentation: probability of mixing two sounds (default: 0.2)"),
            ("--patience", int, "N", "with --validation: stop after N epochs without improvement"),
            ("--seed", int, "N", "of everything random (default: 0)"),
        ),
    )
    command.add_argument(
        "--train-batch-norm",
        action="store_true",
        help="train batch norms from weights, too (default: their statistics and factors stay)",
    )
    command.add_argument(
        "--workers", type=int, default=1, metavar="N", help="with --test all: folds at a time (default: 1)"
    )
    add_cache_options(command, "a pooled head's features")
    _add_hardware_options(command)
    command.add_argument("--json", action="store_true", help="the results as JSON")


def _add_train(add_command: AddCommand) -> None:
    command = add_command(
        "train",
        _train,
        "train a network on teachers' probabilities, as in the paper",
        description="Trains SoundNet on the probabilities that teachers gave to videos. DATA is a manifest\n"
        "(.tsv), WebDataset shards (.tar, or a folder of them), or the folder of the released\n"
        "Flickr data; see docs/train.md. Writes RUN/weights.safetensors, log.csv, curves.png and a\n"
        "checkpoint; the same command resumes an interrupted run, with the same numbers. Unreadable\n"
        "sounds are silence, as in the original; exit code 1 if there were any (extra [learn]).",
        examples=(
            "soundnet-port train clips.tsv -o run/ --validation held-out.tsv --iterations 2000",
            "soundnet-port train flickr/ -o run/ --devices 4 --workers 10 --precision bf16-mixed",
        ),
        resumable=True,
    )
    command.add_argument("data", metavar="DATA", help="manifest, shards, or folder of the released data")
    command.add_argument("-o", "--output", metavar="RUN", required=True, help="folder of the run")
    command.add_argument("--validation", metavar="DATA", help="held-out data; the best weights are kept")
    command.add_argument("-w", "--weights", help="initial weights: name or file (default: random)")
    command.add_argument("--architecture", choices=_ARCHITECTURES, help="default: soundnet8")
    command.add_argument("--widths", metavar="N,N,...", help="channels of the blocks, for a narrower network")
    _add_numbers(
        command,
        (
            ("--iterations", int, "N", "optimizer steps (default: 100000)"),
            ("--batch", int, "N", "examples per step, over all devices (default: 64)"),
            ("--lr", float, "X", "learning rate (default: 0.001)"),
            ("--balance", float, "X", "factor of the loss, the original's lambda (default: 250)"),
            ("--temperature", float, "X", "of teachers and student (default: 1)"),
            ("--gain", float, "DB", "augmentation: up to DB louder or softer (default: 0)"),
            ("--shift", float, "S", "augmentation: up to S seconds earlier or later (default: 0)"),
            ("--stretch", float, "X", "augmentation: up to X times faster or slower (default: 1)"),
            ("--mix", float, "P", "augmentation: probability of mixing two sounds (default: 0)"),
            ("--seed", int, "N", "of everything random (default: 0)"),
        ),
    )
    command.add_argument("--flip", action="store_true", help="augmentation: negate half of the sounds")
    command.add_argument(
        "--schedule", choices=("constant", "cosine"), help="of the learning rate (default: constant)"
    )
    command.add_argument(
        "--teacher", metavar="NAME=X", action="append", help="weight of a teacher, such as objects:vit=0.5"
    )
    command.add_argument("--validate-every", type=int, default=5000, metavar="N", help="default: 5000")
    command.add_argument("--save-every", type=int, default=500, metavar="N", help="default: 500")
    command.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes that decode (default: 0)"
    )
    command.add_argument(
        "--cache", type=float, default=1.0, metavar="GB", help="decoded sound in memory (default: 1)"
    )
    _add_hardware_options(command)
    command.add_argument("--devices", default="1", metavar="N", help="number of them, or auto (default: 1)")
    command.add_argument("--json", action="store_true", help="the result as a JSON object")


def _add_numbers(
    command: argparse.ArgumentParser, rows: Iterable[tuple[str, type[int] | type[float], str, str]]
) -> None:
    for flag, kind, metavar, text in rows:
        command.add_argument(flag, type=kind, metavar=metavar, help=text)


def _add_hardware_options(command: argparse.ArgumentParser) -> None:
    add_device_option(command, "auto")
    command.add_argument("--precision", default="32-true", help="32-true (default), bf16-mixed, 16-mixed")


def _finetune(options: argparse.Namespace) -> int:
    from soundnet_port.learning.augmentation import Augmentation
    from soundnet_port.learning.finetune_run import FinetuneConfig
    from soundnet_port.learning.finetuning import cross_validate, finetune
    from soundnet_port.network.architecture import ARCHITECTURES
    from soundnet_port.network.gradients import keep_freed_memory

    if bool(options.weights) == bool(options.scratch):
        raise UsageError("initial weights: give either -w, or --scratch for random ones")
    if options.workers != 1 and options.test != "all":
        raise UsageError("--workers is for --test all")
    cache = parse_cache(options)
    if not options.validation:
        warn_if_unused(options, "without --validation", "patience")
    defaults = asdict(FinetuneConfig().augmentation)
    changes = explicit_options(options, "gain", "shift", "stretch", "mix")
    settings: dict[str, Any] = {
        "weights": options.weights or ARCHITECTURES[options.scratch],
        "config": FinetuneConfig(
            augmentation=Augmentation(**defaults | changes),
            edge_frames=options.edge_frames,
            train_batch_norm=options.train_batch_norm,
            **explicit_options(
                options,
                "epochs",
                "batch",
                "lr",
                "trunk_lr",
                "decay",
                "dropout",
                "seconds",
                "patience",
                "seed",
            ),
        ),
        **explicit_options(options, "head", "layer", "frozen", "validation"),
        "kernel": options.kernel,
        "device": options.device,
        "precision": options.precision,
        "cache": cache,
    }
    convolution = options.scratch or options.layer or options.frozen or options.validation
    convolution = convolution or options.kernel != 1 or options.edge_frames
    if options.head == "pooled" or not (options.head or convolution):
        names = "epochs batch lr trunk_lr decay dropout seconds gain shift stretch mix patience seed"
        warn_if_unused(options, "without --head convolution", *names.split(), "train_batch_norm")
    data = read_labeled_sounds(options)
    keep_freed_memory()
    with ProgressReporter() as progress:
        if options.test == "all":
            results = cross_validate(
                data, options.output, workers=options.workers, progress=progress, **settings
            )
        else:
            results = [finetune(data, options.output, test=options.test, progress=progress, **settings)]
    unreadable = {path: reason for result in results for path, reason in result.unreadable.items()}
    for reason in unreadable.values():
        report(reason)
    if options.json:
        print(json.dumps([asdict(result) for result in results], default=str))
    else:
        for result in results:
            accuracy = "" if result.accuracy is None else f": {result.accuracy:.1%} of fold {result.fold}"
            print(f"{result.weights}{accuracy}")
        accuracies = [result.accuracy for result in results if result.accuracy is not None]
        if len(results) > 1:
            print(f"mean {mean(accuracies):.1%}, std over folds {pstdev(accuracies):.1%}")
    return FAILED if unreadable else 0


def _train(options: argparse.Namespace) -> int:
    from soundnet_port.learning.augmentation import Augmentation
    from soundnet_port.learning.devices import is_first_process
    from soundnet_port.learning.distillation import TrainConfig
    from soundnet_port.learning.training import train
    from soundnet_port.network.gradients import keep_freed_memory

    if options.weights and (options.architecture or options.widths):
        raise UsageError("--weights brings its architecture; leave out --architecture and --widths")
    try:
        weights = options.weights or _parse_architecture(options)
        pairs = [pair.rpartition("=") for pair in options.teacher or ()]
        teachers = {name: float(weight) for name, _, weight in pairs}
        devices = -1 if options.devices == "auto" else int(options.devices)
    except ValueError as error:
        raise UsageError(f"--widths, --teacher or --devices: {error}") from None
    keep_freed_memory()
    with ProgressReporter() as progress:
        result = train(
            options.data,
            options.output,
            weights=weights,
            config=TrainConfig(
                augmentation=Augmentation(
                    **explicit_options(options, "gain", "shift", "stretch", "flip", "mix")
                ),
                teachers=teachers,
                **explicit_options(
                    options, "iterations", "batch", "lr", "schedule", "balance", "temperature", "seed"
                ),
            ),
            validation=options.validation,
            validate_every=options.validate_every,
            save_every=options.save_every,
            device=options.device,
            devices=devices,
            precision=options.precision,
            workers=options.workers,
            cache=options.cache,
            progress=progress,
        )
    if not is_first_process():  # the first one reports
        return INTERRUPTED if result.interrupted else 0
    for reason in list(result.unreadable.values())[:MAX_LISTED]:
        report(reason)
    if result.unreadable:
        report(
            f"{len(result.unreadable):,} sounds are unreadable and were silence in the training; "
            f"see {result.folder / 'unreadable.tsv'}"
        )
    if options.json:
        print(json.dumps(asdict(result), default=str))
    else:
        figures = "".join(f", {name} {value:.4g}" for name, value in result.validation.items())
        print(f"{result.weights}: step {result.best:,} of {result.step:,}{figures}")
    if result.interrupted:
        report(f"{result.folder}: interrupted; the same command goes on from step {result.step:,}")
        return INTERRUPTED
    return FAILED if result.unreadable else 0


def _parse_architecture(options: argparse.Namespace) -> Architecture:
    from soundnet_port.network.architecture import ARCHITECTURES

    architecture = ARCHITECTURES[options.architecture or "soundnet8"]
    if not options.widths:
        return architecture
    widths = [int(width) for width in options.widths.split(",")]
    return architecture.resized(widths, architecture.head_sizes)
