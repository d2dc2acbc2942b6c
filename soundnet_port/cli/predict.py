"""The command predict: the objects and scenes in sounds."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from soundnet_port.audio.loudness import NORMALIZED
from soundnet_port.cli.options import load_network, warn_if_unused
from soundnet_port.cli.parser import AddCommand
from soundnet_port.cli.reporting import UsageError, report
from soundnet_port.cli.sounds import (
    SoundInput,
    add_sound_options,
    is_done,
    list_sounds,
    print_csv_row,
    process_sounds,
)

if TYPE_CHECKING:
    from soundnet_port.inference.prediction import Category, Prediction


def add_commands(add_command: AddCommand) -> None:
    """Add predict."""
    command = add_command(
        "predict",
        _predict,
        "name the objects and scenes in sounds",
        description="Prints for each sound the top objects and scenes (probabilities, mean over time), and\n"
        "those of the middle frame. Edge frames, which see zeros past the sound's end, are left\n"
        "out; a clip too short to have others is repeated. Sounds that fail are skipped; exit code\n"
        "1 if there were any.",
        examples=(
            "soundnet-port predict dog.wav street.mp3",
            "soundnet-port predict recordings/ --over-time",
            "soundnet-port predict @files.txt --json > predictions.jsonl",
        ),
    )
    command.add_argument("-n", "--top", type=int, default=5, help="categories to show (default: 5)")
    command.add_argument("-t", "--over-time", action="store_true", help="also a line for each frame")
    command.add_argument(
        "--plot",
        metavar="OUT",
        help="draw waveform and categories over time: .png or .svg file, or a folder with a .png for each "
        "sound (extra [plot])",
    )
    command.add_argument(
        "--edge-frames",
        action="store_true",
        help="as the original: all frames, clips repeated to 10 s; --format torch7 always does so",
    )
    command.add_argument(
        "--normalize",
        action="store_true",
        help=f"first bring each sound's loudest second to {NORMALIZED:.0f} dB of full scale",
    )
    add_sound_options(command, ("text", "json", "csv", "torch7"), "X.soundnet_categories.h5", "text")


def _predict(options: argparse.Namespace) -> int:
    from soundnet_port.audio.loading import read_sound
    from soundnet_port.inference.prediction import predict
    from soundnet_port.inference.torch7_files import torch7_path, write_torch7_prediction
    from soundnet_port.network.architecture import CLASSES
    from soundnet_port.viewing.figures import write_figure
    from soundnet_port.viewing.prediction_plots import plot_prediction

    if options.top < 1:
        raise UsageError(f"--top must be at least 1, not {options.top}")
    torch7 = options.format == "torch7"
    if torch7:
        warn_if_unused(options, "with --format torch7", "over_time")
    elif not options.plot:
        warn_if_unused(options, "without --plot or --format torch7", "force")
    model = load_network(options)
    if not model.architecture.output_sizes:
        raise UsageError(f"{options.weights}: cannot name sounds, it has no heads")
    if torch7 and CLASSES in model.architecture.output_sizes:
        raise UsageError(f"--format torch7 is for objects and scenes; {options.weights} has other classes")
    sounds = list_sounds(options.sounds)
    plots = _plot_paths(options.plot, sounds) if options.plot else {}
    if options.format == "csv":
        print_csv_row("file", "start", "end", "head", "rank", "index", "label", "probability")

    def process(path: Path) -> None:
        if torch7 and is_done(torch7_path(path, "soundnet_categories"), options.force):
            return
        if options.plot and is_done(plots[path], options.force):
            return
        # a plot needs the waveform too, and standard input can be read only once
        sound = read_sound(path, decoder=options.decoder) if options.plot else None
        # a pooled head hears up to 22 kHz of a file
        from_file = model.architecture.pooled_head and path != Path("-")
        prediction = predict(
            model,
            path if sound is None or from_file else sound.waveform,
            top=options.top,
            decoder=options.decoder,
            edge_frames=options.edge_frames or torch7,
            normalize=options.normalize,
        )
        if sound is not None:
            prediction = replace(prediction, decoder=sound.decoder)
            write_figure(plot_prediction(prediction, sound.waveform, path.name), plots[path])
        if prediction.level == -math.inf:
            report(f"{path}: digital silence; the prediction means nothing")
        elif prediction.quiet:
            report(
                f"{path}: quiet ({prediction.level:.0f} dB of full scale in its loudest second), unlike the "
                "sounds the network was trained on; try --normalize"
            )
        if torch7:
            print(write_torch7_prediction(path, prediction))
        elif options.format == "json":
            print(json.dumps({"file": str(path)} | prediction.to_dict(frames=options.over_time)))
        elif options.format == "csv":
            for row in prediction.to_rows(frames=options.over_time):
                print_csv_row(path, *row)
        else:
            print(format_prediction(str(path), prediction, options.over_time))

    return process_sounds(sounds, process)


def _plot_paths(output: str, inputs: Sequence[SoundInput]) -> dict[Path, Path]:
    """Map sounds to plots: one file for a single sound, or a folder that mirrors the sounds' folders."""
    from soundnet_port.viewing.figures import SUFFIXES, check_figure_path

    target, sounds = Path(output), [path for path in inputs if isinstance(path, Path)]
    is_file = target.suffix.lower() in SUFFIXES
    if is_file and len(inputs) > 1:
        raise UsageError(f"--plot {target}: one file for {len(inputs)} sounds; name a folder")
    check_figure_path(target if is_file else target / f"X{SUFFIXES[0]}")
    if is_file:
        return dict.fromkeys(sounds, target)
    absolute = [Path("stdin").absolute() if path == Path("-") else path.absolute() for path in sounds]
    root = os.path.commonpath([path.parent for path in absolute]) if absolute else ""
    names = [os.path.relpath(path, root) for path in absolute]
    return {path: target / f"{name}{SUFFIXES[0]}" for path, name in zip(sounds, names, strict=True)}


def format_prediction(name: str, prediction: Prediction, over_time: bool) -> str:
    """Format a prediction as text, a column per head; `over_time` adds a line per frame."""
    from soundnet_port.network.categories import singularize

    def cell(category: Category) -> str:
        label = category.label if len(category.label) <= 38 else f"{category.label[:37]}…"
        return f"{category.probability:.4f}  {label}"

    def row(cells: Iterable[str]) -> str:
        return "  " + "".join(f"{text:<48}" for text in cells).rstrip()

    notes = [f"{prediction.seconds:.2f} s"]
    if prediction.repeated:
        notes.append(f"too short: played {prediction.repeats} times")
    if prediction.dropped:
        notes.append("edge frame left out")
    heads = prediction.heads
    lines = [f"{name}  ({', '.join(notes)})", row(heads)]
    top = zip_longest(*(getattr(prediction, head) for head in heads))
    lines += [row(cell(category) if category else "" for category in categories) for categories in top]
    if over_time:
        lines.append(f"  {'seconds':<24}" + row(map(singularize, heads)).lstrip())
        for frame in prediction.frames:
            span = f"{frame.start:8.2f} to {frame.end:8.2f}"
            lines.append(f"  {span:<24}" + row(cell(getattr(frame, head)[0]) for head in heads)[2:])
    lines.append("  middle frame: " + " | ".join(map(cell, prediction.middle)))
    return "\n".join(lines)
