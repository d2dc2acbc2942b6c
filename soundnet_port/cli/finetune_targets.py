"""finetune --targets: train a network and a linear head on recordings such as fMRI."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from soundnet_port.audio.loading import DECODERS
from soundnet_port.cli.encoding_options import add_response_options, parse_response
from soundnet_port.cli.options import explicit_options, warn_if_unused
from soundnet_port.cli.reporting import ProgressReporter, UsageError, report

if TYPE_CHECKING:
    from soundnet_port.progress import Progress

_NAMES = ("tr", "delays", "hrf", "align", "alphas", "decoder")
_NAMES_OF_CLASSES = (
    "root esc10 head batch decay dropout gain shift stretch mix variants train_batch_norm cache no_cache"
).split()


def add_target_options(command: argparse.ArgumentParser) -> None:
    """Add --targets and the options that go with it."""
    group = command.add_argument_group(
        "recorded targets",
        "FOLD is a run of the table. Defaults: -w soundnet8, --layer pool5 (conv4 with 5 layers), --frozen\n"
        "two blocks before it (none: train all), --validation the last run but the test run, --epochs 20,\n"
        "--seconds 120 (of a window), --lr 0.0003, --trunk-lr 0.003, --patience 10.",
    )
    group.add_argument(
        "--targets",
        action="store_true",
        help="DATA is a table of recordings, as for encode; folds are its runs",
    )
    group.add_argument("--tr", type=float, metavar="SECONDS", help="from one row of targets to the next")
    add_response_options(group)
    group.add_argument("--decoder", choices=DECODERS, help="auto (default), soundfile, av, or sox")


def warn_of_target_options(options: argparse.Namespace) -> None:
    """Note options of --targets that have no effect without it."""
    warn_if_unused(options, "without --targets", *_NAMES)


def finetune_targets(options: argparse.Namespace) -> int:
    """Run finetune --targets; return the exit code.

    Raises:
        UsageError: options that cannot work.
    """
    from soundnet_port.learning.encoding_finetune_run import VALIDATION, FinetuneEncodingConfig
    from soundnet_port.learning.encoding_finetuning import finetune_encoding
    from soundnet_port.network.gradients import keep_freed_memory

    if options.tr is None:
        raise UsageError("--targets: needs --tr, the seconds from one row of targets to the next")
    if options.scratch:
        raise UsageError("--scratch: is for classes; with --targets training starts from weights, -w")
    if options.test == "all":
        raise UsageError("--test all: is for classes; with --targets name a run, and repeat the command")
    warn_if_unused(options, "with --targets", *_NAMES_OF_CLASSES)
    for name in ("kernel", "workers"):
        if getattr(options, name) != 1:
            report(f"--{name} has no effect with --targets")
    response = parse_response(options)
    keep_freed_memory()
    reported: set[str] = set()
    with ProgressReporter() as progress:

        def show(update: Progress) -> None:
            reported.add(update.message)
            progress(update)

        result = finetune_encoding(
            options.labeled,
            options.output,
            tr=options.tr,
            config=FinetuneEncodingConfig(
                **explicit_options(options, "epochs", "seconds", "lr", "trunk_lr", "patience", "seed")
            ),
            edge_frames=options.edge_frames,
            device=options.device,
            precision=options.precision,
            progress=show,
            **response,
            **explicit_options(options, "weights", "layer", "frozen", "test", "validation", "decoder"),
        )
    for note in result.notes:
        if note not in reported:
            report(note)
    if options.json:
        print(json.dumps(result.to_dict()))
        return 0
    title = f"{result.part} run {result.held_out}"
    if result.part == VALIDATION:
        title += " (chose the epoch)"
    rows = {"ridge": result.ridge, f"epoch {result.epoch}": result.finetuned}
    width = max(len(name) for name in (title, *rows))
    print(f"{title:{width}}  median r  90th pct.  median R2")
    for name, scores in rows.items():
        figures = scores.summarize()
        print(
            f"{name:{width}}  {figures['median_correlation']:8.3f}  {figures['p90_correlation']:9.3f}  "
            f"{figures['median_r2']:9.3f}"
        )
    print(result.weights)
    return 0
