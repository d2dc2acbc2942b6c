"""The commands that show a network's insides: units, filters and serve."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from soundnet_port.cli.options import (
    add_decoder_option,
    add_device_option,
    add_layers_option,
    add_weights_option,
    check_output,
    load_network,
    parse_layers,
)
from soundnet_port.cli.parser import AddCommand
from soundnet_port.cli.reporting import FAILED, ProgressReporter, UsageError, report, report_failures


def add_commands(add_command: AddCommand) -> None:
    """Add units, filters and serve."""
    _add_units(add_command)

    command = add_command(
        "filters",
        _filters,
        "plot the first layer's filters",
        description="Plots conv1's filters over time, their magnitude responses, and their bandwidths next\n"
        "to the ear's. Prints for each, lowest first, the center frequency (of the largest response),\n"
        "the bandwidths (-3 dB and equivalent rectangular), how much of its energy a gammatone, a\n"
        "reversed one and a Gabor function explain, and which of them it is (extra [plot]).",
        examples=(
            "soundnet-port filters -o filters.png",
            "soundnet-port filters -w demo -o filters.svg --json > filters.json",
        ),
    )
    add_weights_option(command)
    command.add_argument("-o", "--output", metavar="OUT", required=True, help=".png or .svg file")
    command.add_argument("-f", "--force", action="store_true", help="replace the file")
    command.add_argument("--json", action="store_true", help="the table as a JSON object")

    command = add_command(
        "serve",
        _serve,
        "explore sounds in the browser",
        description="Serves a page on this computer: drop, choose or record a sound or video, and see its\n"
        "scenes and objects over time while it plays, and the activations of any layer. Prints the\n"
        "page's address; Ctrl-C ends it. Files stay on this computer, in a temporary folder, and\n"
        "are removed when the page is closed (extra [web]).",
        examples=("soundnet-port serve --open", "soundnet-port serve -w demo --port 0"),
    )
    add_weights_option(command)
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    command.add_argument("--port", type=int, default=8765, help="default: 8765; 0 takes a free one")
    command.add_argument("--open", action="store_true", help="open the page in the browser")
    command.add_argument(
        "--edge-frames",
        action="store_true",
        help="as the original: all frames, clips repeated to 10 s (default: without the last frames of "
        "conv7 and the heads, which see zeros past the sound's end)",
    )
    command.add_argument(
        "--max-megabytes", type=int, default=500, metavar="N", help="largest file (default: 500)"
    )
    command.add_argument("--max-hours", type=float, default=6, metavar="H", help="longest sound (default: 6)")
    add_device_option(command)


def _add_units(add_command: AddCommand) -> None:
    command = add_command(
        "units",
        _units,
        "listen to the top sounds of each hidden unit",
        description="Finds the sounds of a corpus that activate each unit of a layer most, and writes a\n"
        "gallery to hear and see them: OUT/index.html opens in any browser, without a server. An\n"
        "excerpt is what the unit sees at its peak, with context if that is short, at most one per\n"
        "file. The same command resumes an interrupted run. Files that fail are skipped; exit code 1\n"
        "if there were any.\n"
        "Spectrograms need the extra [plot].",
        examples=(
            "soundnet-port units recordings/ -o units/",
            "soundnet-port units --labels ESC-50-master --esc10 --fold 5 -o units/ -w demo",
            "soundnet-port units recordings/ -o units/ -l conv3,conv5 --top 5 --table",
        ),
        resumable=True,
    )
    command.add_argument(
        "sounds",
        metavar="CORPUS",
        nargs="*",
        help="file, directory (searched), or @LIST: a text file with a path per line (default: the "
        "labeled sounds)",
    )
    command.add_argument("-o", "--output", metavar="OUT", required=True, help="folder of the gallery")
    add_weights_option(command)
    add_layers_option(command, "conv7 and conv5; with 5 layers conv4 and conv3")
    command.add_argument("-n", "--top", type=int, default=9, help="sounds per unit, up to 32 (default: 9)")
    command.add_argument(
        "--labels",
        metavar="SOURCE",
        help="classes of the sounds: a data set's folder, a folder with a folder per class, or a list, as "
        "for 'evaluate'; units are then named after the class they prefer",
    )
    command.add_argument("--fold", metavar="F", help="with --labels: this fold only")
    command.add_argument("--esc10", action="store_true", help="of ESC-50, only the classes of ESC-10")
    command.add_argument(
        "--edge-frames",
        action="store_true",
        help="include the last frames of conv7 (with 5 layers conv4), which see zeros past the sound's end",
    )
    command.add_argument("--table", action="store_true", help="also units.parquet (extra [parquet])")
    command.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each CPU)")
    command.add_argument("-f", "--force", action="store_true", help="replace a gallery, start over")
    add_device_option(command)
    add_decoder_option(command)
    command.add_argument("--json", action="store_true", help="a summary as a JSON object")


def _units(options: argparse.Namespace) -> int:
    from soundnet_port.learning.datasets import read_labeled
    from soundnet_port.viewing.gallery import write_gallery

    if options.esc10 and not options.labels:
        raise UsageError("--esc10 needs --labels")
    start = time.monotonic()
    with ProgressReporter() as progress:
        result = write_gallery(
            load_network(options),
            options.output,
            options.sounds,
            parse_layers(options),
            top=options.top,
            labels=read_labeled(options.labels, esc10=options.esc10) if options.labels else None,
            fold=options.fold,
            edge_frames=options.edge_frames,
            table=options.table,
            workers=options.workers,
            decoder=options.decoder,
            force=options.force,
            progress=progress,
        )
    if result.failures:
        report_failures(result.failures)
    if not result.sound_count:
        report("no sound could be used; nothing written")
        return FAILED
    dead = sum(unit.dead for unit in result.units)
    index = f"{options.output.rstrip('/')}/index.html"
    if options.json:
        summary: dict[str, Any] = {
            "gallery": index,
            "layers": list(result.layers),
            "units": len(result.units),
            "dead": dead,
            "sounds": result.sound_count,
            **({"edge_frames": result.edge_frames} if result.edge_layers else {}),
            "failures": [{"path": failure.path, "reason": failure.reason} for failure in result.failures],
        }
        print(json.dumps(summary))
    else:
        print(index)
    report(
        f"{len(result.units):,} units of {' and '.join(result.layers)}"
        f"{f', {dead:,} of them never above 0' if dead else ''}; {result.sound_count:,} sounds, "
        f"{time.monotonic() - start:.1f} s"
    )
    return FAILED if result.failures else 0


def _filters(options: argparse.Namespace) -> int:
    from soundnet_port.viewing.figures import check_figure_path, write_figure
    from soundnet_port.viewing.filter_plots import compute_auditory_erb, measure_filters, plot_filters

    check_output(options.output, options.force)
    check_figure_path(options.output)
    model = load_network(options)
    measured = measure_filters(model)
    write_figure(plot_filters(model, measured), options.output)
    if options.json:
        print(json.dumps({"file": options.output, "filters": [row.to_json() for row in measured]}))
        return 0
    print("filter  center (Hz)  -3 dB (Hz)  ERB (Hz)  ear's ERB  gammatone  reversed  Gabor  shape")
    for row in measured:
        if row.center is None or row.fits is None:
            print(f"{row.index:>6}  silent")
            continue
        explained = [fit.explained for fit in row.fits]
        print(
            f"{row.index:>6}{row.center:>13,.0f}{row.bandwidth:>12,.0f}{row.erb:>10,.0f}"
            f"{compute_auditory_erb(row.center):>11,.0f}"
            f"{explained[0]:>11.1%}{explained[1]:>10.1%}{explained[2]:>7.1%}  {row.shape}"
        )
    print(f"wrote {options.output}")
    return 0


def _serve(options: argparse.Namespace) -> int:
    if not 0 <= options.port <= 65_535:
        raise UsageError(f"--port must be from 0 to 65535, not {options.port}")
    if options.max_megabytes < 1:
        raise UsageError(f"--max-megabytes must be at least 1, not {options.max_megabytes}")
    if not 0 < options.max_hours <= 24:
        raise UsageError(f"--max-hours must be above 0 and at most 24, not {options.max_hours:g}")
    from soundnet_port.viewing.web_server import serve

    def announce(address: str) -> None:
        print(address, flush=True)
        if options.open:
            import webbrowser

            webbrowser.open(address)

    model = load_network(options)
    try:
        serve(
            model,
            options.host,
            options.port,
            max_megabytes=options.max_megabytes,
            max_hours=options.max_hours,
            edge_frames=options.edge_frames,
            on_ready=announce,
        )
    except OSError as error:
        address = f"--host {options.host} --port {options.port}"
        raise UsageError(f"{address}: {error.strerror or error}; use another --port, or 0") from None
    except ValueError as error:
        raise UsageError(str(error)) from None
    except KeyboardInterrupt:  # how to end it
        pass
    return 0
