"""The command evaluate: linear classifiers on features of labeled sounds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from soundnet_port.cli.options import (
    add_cache_options,
    add_decoder_option,
    add_device_option,
    add_labeled_sounds_options,
    add_layers_option,
    add_weights_option,
    load_network,
    parse_cache,
    parse_layers,
    read_labeled_sounds,
    warn_if_unused,
)
from soundnet_port.cli.parser import AddCommand
from soundnet_port.cli.reporting import FAILED, ProgressReporter, UsageError, report


def add_commands(add_command: AddCommand) -> None:
    """Add evaluate."""
    command = add_command(
        "evaluate",
        _evaluate,
        "measure how well features classify labeled sounds",
        description="Fits a linear classifier to layers' features of labeled sounds, tests it on each\n"
        "fold, and prints accuracies and the confusion matrix (extra [learn]). Features are cached\n"
        "for the next evaluation.",
        examples=(
            "soundnet-port evaluate ESC-50-master",
            "soundnet-port evaluate ESC-50-master --esc10 --protocol paper -o results/",
            "soundnet-port evaluate mine.tsv -w soundnet5 -l pool3,conv4 --json > mine.json",
        ),
    )
    add_labeled_sounds_options(command, "SOURCE")
    add_weights_option(command)
    add_layers_option(command, "conv4,pool5,conv6; with the paper's protocols, which take one, pool5")
    command.add_argument(
        "--protocol",
        choices=("modern", "paper", "paper-dcase"),
        default="modern",
        help="modern (default): layers pooled over time, ridge regression; paper: the original's "
        "eval_esc50.lua; paper-dcase: its eval_dcase.lua",
    )
    command.add_argument(
        "--pool",
        choices=("mean", "max", "mean+std", "mean+max+std"),
        help="with modern, over time (default: mean+max+std)",
    )
    command.add_argument(
        "--edge-frames",
        action="store_true",
        help="with modern: include conv7's last frames, which see zeros past the sound's end",
    )
    command.add_argument("-o", "--output", metavar="OUT", help="folder for JSON, predictions and a figure")
    command.add_argument("--json", action="store_true", help="print a JSON object")
    command.add_argument(
        "--no-resample",
        action="store_true",
        help="with the paper's protocols: keep the file's sample rate, as the scripts did",
    )
    add_cache_options(command)
    command.add_argument("-f", "--force", action="store_true", help="replace results in OUT")
    add_device_option(command)
    add_decoder_option(command)


def _evaluate(options: argparse.Namespace) -> int:
    from soundnet_port.learning.evaluation import evaluate
    from soundnet_port.learning.evaluation_results import format_confusion, write_evaluation

    cache = parse_cache(options)
    if options.output and not options.force and (Path(options.output) / "evaluation.json").exists():
        raise UsageError(f"{options.output}: already has an evaluation; use --force to replace it")
    if not options.output:
        warn_if_unused(options, "without -o", "force")
    if options.protocol != "modern":
        warn_if_unused(options, f"with --protocol {options.protocol}", "pool", "edge_frames")
    with ProgressReporter() as progress:
        result = evaluate(
            load_network(options),
            read_labeled_sounds(options),
            layers=parse_layers(options) or None,
            protocol=options.protocol,
            pool=options.pool or "mean+max+std",
            resample=not options.no_resample,
            edge_frames=options.edge_frames,
            decoder=options.decoder,
            cache=cache,
            progress=progress,
        )
    written = write_evaluation(result, options.output) if options.output else []
    for note in [*result.notes, *(f"wrote {path}" for path in written)]:
        report(note)
    if options.json:
        print(json.dumps(result.to_dict()))
    else:
        for fold in result.folds:
            penalty = f"{'alpha' if result.protocol == 'modern' else 'C'} {fold.regularization:g}"
            print(f"fold {fold.name}: {fold.accuracy:.1%} of {fold.test} sounds, {penalty}")
        print(f"{result.title}: {result.accuracy:.1%}, std over folds {result.std:.1%}\n")
        print(format_confusion(result))
    return FAILED if result.failures else 0
