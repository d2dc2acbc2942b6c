"""The command encode: predict recordings such as fMRI from the layers of a network."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from soundnet_port.cli.encoding_options import add_response_options, parse_response
from soundnet_port.cli.options import (
    add_cache_options,
    add_decoder_option,
    add_device_option,
    add_layers_option,
    add_weights_option,
    explicit_options,
    load_network,
    parse_cache,
    parse_layers,
    warn_if_unused,
)
from soundnet_port.cli.parser import AddCommand
from soundnet_port.cli.reporting import ProgressReporter, UsageError, report


def add_commands(add_command: AddCommand) -> None:
    """Add encode."""
    command = add_command(
        "encode",
        _encode,
        "predict recordings, such as fMRI, from each layer",
        description="Fits ridge regression from each layer to recorded arrays (time, outputs), and tests it\n"
        "on held-out runs: correlation and R2 per output and layer, the best layer of each output, and\n"
        "the noise ceiling where stimuli were repeated.",
        examples=(
            "soundnet-port encode runs.tsv --tr 1.5 -o results/",
            "soundnet-port encode runs.tsv --tr 2 --hrf glover -l pool5,conv7 -o results/",
            "soundnet-port encode ecog.tsv --tr 0.1 --delays 0,1,2,3,4 --align end -o results/",
        ),
    )
    command.add_argument(
        "table",
        metavar="TABLE",
        help="columns file (sound) and targets (.npy, .npz, .csv, .tsv, .h5:dataset; time by outputs); "
        "optional run, stimulus, onset",
    )
    command.add_argument(
        "--tr", type=float, required=True, metavar="SECONDS", help="from one row of targets to the next"
    )
    add_weights_option(command)
    add_layers_option(command, "all of the trunk, after pooling where there is one")
    add_response_options(command)
    command.add_argument(
        "--folds", type=int, metavar="N", help="held-out sets at most (default: 10; up to there one per run)"
    )
    command.add_argument(
        "--edge-frames",
        action="store_true",
        help="include conv7's last frames, which see zeros past the sound's end",
    )
    command.add_argument("-o", "--output", metavar="OUT", help="folder for arrays, JSON and a figure")
    command.add_argument(
        "--predictions", action="store_true", help="with -o: write predictions of held-out rows, too"
    )
    command.add_argument("--json", action="store_true", help="print a JSON object")
    add_cache_options(command)
    command.add_argument("-f", "--force", action="store_true", help="replace results in OUT")
    add_device_option(command)
    add_decoder_option(command)


def _encode(options: argparse.Namespace) -> int:
    from soundnet_port.errors import require
    from soundnet_port.learning.encoding import fit_encoding_models
    from soundnet_port.learning.encoding_data import read_recordings
    from soundnet_port.learning.encoding_results import format_encoding, write_encoding

    cache = parse_cache(options)
    if options.output and Path(options.output).exists() and not Path(options.output).is_dir():
        raise UsageError(f"{options.output}: a file, and results need a folder; choose another name")
    if options.output and not options.force and (Path(options.output) / "encoding.json").exists():
        raise UsageError(f"{options.output}: already has encoding results; use --force to replace them")
    if options.output:
        require("matplotlib", "plot")  # for the figure, after all the work
    else:
        warn_if_unused(options, "without -o", "force", "predictions")
    response = parse_response(options)
    recordings = read_recordings(options.table)
    with ProgressReporter() as progress:
        result = fit_encoding_models(
            load_network(options),
            recordings,
            tr=options.tr,
            layers=parse_layers(options) or None,
            edge_frames=options.edge_frames,
            predictions=options.predictions and bool(options.output),
            decoder=options.decoder,
            cache=cache,
            progress=progress,
            **response,
            **explicit_options(options, "folds"),
        )
    written = write_encoding(result, options.output) if options.output else []
    for note in result.notes:
        report(note)
    if written:
        names = ", ".join(str(path.relative_to(options.output)) for path in written)
        report(f"wrote {names} to {options.output}")
    print(json.dumps(result.to_dict()) if options.json else format_encoding(result))
    return 0
