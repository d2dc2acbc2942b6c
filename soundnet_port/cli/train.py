"""The command train: train a network on teachers' probabilities."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from soundnet_port.cli.options import explicit_options
from soundnet_port.cli.parser import AddCommand
from soundnet_port.cli.reporting import (
    FAILED,
    INTERRUPTED,
    MAX_LISTED,
    ProgressReporter,
    UsageError,
    report,
)
from soundnet_port.cli.training_options import ARCHITECTURES, add_hardware_options, add_numbers

if TYPE_CHECKING:
    from soundnet_port.network.architecture import Architecture


def add_commands(add_command: AddCommand) -> None:
    """Add train."""
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
    command.add_argument("--architecture", choices=ARCHITECTURES, help="default: soundnet8")
    command.add_argument("--widths", metavar="N,N,...", help="channels of the blocks, for a narrower network")
    add_numbers(
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
    add_hardware_options(command)
    command.add_argument("--devices", default="1", metavar="N", help="number of them, or auto (default: 1)")
    command.add_argument("--json", action="store_true", help="the result as a JSON object")


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
