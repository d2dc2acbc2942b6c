"""The command extract: layers' features of sounds, printed or in files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from soundnet_port.cli.options import add_layers_option, load_network, parse_layers, warn_if_unused
from soundnet_port.cli.parser import AddCommand
from soundnet_port.cli.reporting import ProgressReporter, UsageError, report_corpus
from soundnet_port.cli.sounds import add_sound_options, is_done, list_sounds, print_csv_row, process_sounds

if TYPE_CHECKING:
    from soundnet_port.corpus.run import CorpusResult


def add_commands(add_command: AddCommand) -> None:
    """Add extract."""
    command = add_command(
        "extract",
        _extract,
        "extract layers' features from sounds or large corpora",
        description="With -o, writes the features of any number of sounds: to a folder with a file per\n"
        "sound, or to one file (.npz, .h5, .csv, .mat, .parquet). Uses all cores; the same command\n"
        "resumes an interrupted run.\n"
        "Without -o, prints one layer: a row of units per frame with its seconds (start, center\n"
        "and end of what the frame sees), or writes the original's HDF5 files.\n"
        "Nothing is padded or repeated: a sound too short for the layer is an error.",
        examples=(
            "soundnet-port extract recordings/ -o features/ -l pool5,conv7",
            "soundnet-port extract recordings/ @more.txt -o clips.parquet --pool mean",
            "soundnet-port extract story.wav -o story.npz -l conv1,pool5,conv7 --tr 1.5",
            "soundnet-port extract dog.wav -l conv7 --csv > dog.csv",
            "soundnet-port extract dog.wav -l 18 --format torch7    writes dog.wav.soundnet.h5",
        ),
        resumable=True,
    )
    add_layers_option(command, "pool5; with 5 layers conv4")
    command.add_argument("-o", "--output", metavar="OUT", help="folder, or a file for all sounds")
    command.add_argument(
        "--pool",
        choices=("none", "mean", "max", "mean+std", "mean+max+std"),
        default="none",
        help="over time, to one vector per sound (default: none)",
    )
    command.add_argument(
        "--tr",
        type=float,
        metavar="S",
        help="a row every S seconds of the recording's clock, instead of the network's frames",
    )
    command.add_argument(
        "--align",
        choices=("center", "end"),
        help="with --tr: a frame's time is the center of what it sees (default), or its end",
    )
    command.add_argument(
        "--edge-frames",
        action="store_true",
        help="with --pool or --tr: include the last frames of conv7 and the heads, which see zeros past the "
        "sound's end",
    )
    command.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each CPU)")
    command.add_argument(
        "--backend",
        choices=("local", "ray"),
        default="local",
        help="local (default), or ray: on a Ray cluster, to Parquet files in the folder OUT (extra [ray])",
    )
    command.add_argument("--root", metavar="DIR", help="folder that the names in OUT are relative to")
    command.add_argument(
        "--batch-seconds", type=float, metavar="S", help="sound computed at a time (default: 95)"
    )
    formats = ("json", "csv", "torch7", "npz", "npy", "h5", "mat", "parquet")
    add_sound_options(command, formats, "X.soundnet.h5", "with -o npz, or by OUT's suffix; printed: json")


def _extract(options: argparse.Namespace) -> int:
    return _extract_to_files(options) if options.output else _print_layer(options)


def _print_layer(options: argparse.Namespace) -> int:
    from soundnet_port.inference.activations import compute_activations
    from soundnet_port.inference.torch7_files import torch7_path, write_torch7_features

    layers = parse_layers(options)
    if options.backend == "ray":
        raise UsageError("--backend ray writes files; name a folder or URL with -o")
    for_files = (options.pool != "none", options.root, options.workers, options.tr is not None)
    if len(layers) > 1 or any(for_files):
        raise UsageError("several layers, --pool, --tr, --root and --workers are for files; name one with -o")
    if options.format not in (None, "json", "csv", "torch7"):
        raise UsageError(f"--format {options.format} writes files; name an output with -o")
    warn_if_unused(options, "without -o", "batch_seconds", "align")
    warn_if_unused(options, "without --pool or --tr", "edge_frames")
    torch7 = options.format == "torch7"
    if not torch7:
        warn_if_unused(options, "without -o or --format torch7", "force")
    model = load_network(options)
    key = layers[0] if layers else model.architecture.default_layer
    try:
        layer = model.architecture.layer(key)
    except ValueError as error:
        raise UsageError(f"--layers: {error}") from None
    if torch7 and layer.kind == "head":
        raise UsageError("--format torch7 has no heads here; use predict for them")
    has_edge_frames = model.architecture.has_edge_frames(layer)
    if options.format == "csv":
        edge_column = ["edge"] if has_edge_frames else []
        units = (f"unit{index}" for index in range(layer.channels))
        print_csv_row("file", "start", "center", "end", *edge_column, *units)

    def process(path: Path) -> None:
        if torch7 and is_done(torch7_path(path, "soundnet"), options.force):
            return
        clip = compute_activations(model, path, [key], decoder=options.decoder)
        activations, edge_frames = clip.activations[key], model.edge_frames(key, clip.samples)
        if torch7:
            print(write_torch7_features(path, layer.module, activations.T))
            return
        times, frames = model.frame_times(key, len(activations)).tolist(), activations.tolist()
        if options.format == "csv":
            for number, (seconds, units) in enumerate(zip(times, frames, strict=True)):
                is_edge_frame = [int(number >= len(frames) - edge_frames)] if has_edge_frames else []
                print_csv_row(path, *seconds, *is_edge_frame, *units)
        else:
            row = {"file": str(path), "layer": key, "times": times, "features": frames}
            print(json.dumps(row | ({"edge_frames": edge_frames} if has_edge_frames else {})))

    return process_sounds(list_sounds(options.sounds), process)


def _extract_to_files(options: argparse.Namespace) -> int:
    if options.format == "json":
        raise UsageError("--format json is printed; with -o choose another")
    if options.align and options.tr is None:
        raise UsageError("--align needs --tr")
    if options.pool == "none" and options.tr is None:
        warn_if_unused(options, "without --pool or --tr", "edge_frames")
    if options.backend == "ray":
        if options.tr is not None:
            raise UsageError("--tr is not for --backend ray")
        if options.format not in (None, "parquet"):
            raise UsageError(f"--backend ray writes parquet, not {options.format}")
        from soundnet_port.corpus.ray_backend import extract_on_cluster

        return _run(options, extract_on_cluster)
    from soundnet_port.corpus.processes import available_cpus, worker_server

    several = (options.workers or available_cpus()) > 1 and not _is_one_file(options)
    with worker_server() if several and options.device == "cpu" else nullcontext():
        from soundnet_port.corpus.run import extract_corpus

        settings = {"format": options.format, "tr": options.tr, "align": options.align or "center"}
        return _run(options, partial(extract_corpus, **settings))


def _run(options: argparse.Namespace, extract: Callable[..., CorpusResult]) -> int:
    with ProgressReporter() as progress:
        result = extract(
            load_network(options),
            options.sounds,
            options.output,
            layers=parse_layers(options) or None,
            pool=options.pool,
            workers=options.workers,
            decoder=options.decoder,
            batch_seconds=options.batch_seconds,
            root=options.root,
            edge_frames=options.edge_frames,
            force=options.force,
            progress=progress,
        )
    return report_corpus(result)


def _is_one_file(options: argparse.Namespace) -> bool:
    return len(options.sounds) == 1 and Path(options.sounds[0]).is_file()
