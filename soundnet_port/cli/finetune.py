"""The command finetune: train a network on classes, or on recorded targets."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from statistics import mean, pstdev
from typing import Any

from soundnet_port.cli.finetune_targets import add_target_options, finetune_targets, warn_of_target_options
from soundnet_port.cli.options import (
    add_cache_options,
    add_labeled_sounds_options,
    explicit_options,
    parse_cache,
    read_labeled_sounds,
    warn_if_unused,
)
from soundnet_port.cli.parser import AddCommand
from soundnet_port.cli.reporting import FAILED, ProgressReporter, UsageError, report
from soundnet_port.cli.training_options import ARCHITECTURES, add_hardware_options, add_numbers


def add_commands(add_command: AddCommand) -> None:
    """Add finetune."""
    command = add_command(
        "finetune",
        _finetune,
        "train a network on classes of your own, or on recordings",
        description="Gives the network classes of labeled sounds. From weights a pooled head is fitted in\n"
        "seconds: the classifier of 'evaluate', on whole sounds. --head convolution (or --layer,\n"
        "--scratch) puts a convolution on a layer, and trains as much of the network as you like.\n"
        "RUN/weights.safetensors works with 'predict', like any weights. With --test a fold is held\n"
        "out and measured at the end; with --test all each fold in turn, in RUN/fold-1, ...\n"
        "With --targets, DATA is a table of recordings such as fMRI, as for 'encode': its ridge\n"
        "regression becomes the start of a head that is trained together with the network. The same\n"
        "command resumes an interrupted run (extra [learn]).",
        examples=(
            "soundnet-port finetune birds/ -o run/ -w soundnet8",
            "soundnet-port finetune birds/ -o run/ -w soundnet8 --head convolution --frozen conv4",
            "soundnet-port finetune ESC-50-master --esc10 --scratch soundnet8 --test all -o run/",
            "soundnet-port predict chirp.wav -w run/weights.safetensors",
            "soundnet-port finetune runs.tsv --targets --tr 1.5 --test 3 -o run/ -w soundnet8",
        ),
        resumable=True,
    )
    add_labeled_sounds_options(command, "DATA")
    command.add_argument("-o", "--output", metavar="RUN", required=True, help="folder of the run")
    command.add_argument("-w", "--weights", help="initial weights: name or file")
    command.add_argument("--scratch", choices=ARCHITECTURES, help="random initial weights instead")
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
    add_numbers(
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
            (
                "--variants",
                int,
                "N",
                "with --frozen: crops per sound, in turn; 0: new ones every epoch (default: 8)",
            ),
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
    add_hardware_options(command)
    command.add_argument("--json", action="store_true", help="the results as JSON")
    add_target_options(command)


def _finetune(options: argparse.Namespace) -> int:
    from soundnet_port.learning.augmentation import Augmentation
    from soundnet_port.learning.finetune_run import FinetuneConfig
    from soundnet_port.learning.finetuning import cross_validate, finetune
    from soundnet_port.network.architecture import ARCHITECTURES
    from soundnet_port.network.gradients import keep_freed_memory

    if options.targets:
        return finetune_targets(options)
    warn_of_target_options(options)
    if bool(options.weights) == bool(options.scratch):
        raise UsageError("initial weights: give either -w, or --scratch for random ones")
    if options.workers != 1 and options.test != "all":
        raise UsageError("--workers is for --test all")
    cache = parse_cache(options)
    if not options.validation:
        warn_if_unused(options, "without --validation", "patience")
    if not options.frozen:
        warn_if_unused(options, "without --frozen", "variants")
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
                "variants",
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
        names = "epochs batch lr trunk_lr decay dropout seconds gain shift stretch mix variants patience seed"
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
