"""The command line's pages: units, serve."""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from typing import Any

from soundnet_port.audio.loading import DECODERS
from soundnet_port.cli.main import (
    FAILED,
    Command,
    UsageError,
    advance,
    advance_files,
    complain,
    layer_key,
    network_of,
    show_failures,
)


def _units(options: argparse.Namespace) -> int:
    """A gallery into a folder. Failures and figures go to stderr, as of `extract -o`."""
    from tqdm import tqdm

    from soundnet_port.corpus.extractor import CorpusError
    from soundnet_port.learning.datasets import LabeledSoundsError, read_labeled
    from soundnet_port.viewing.gallery import write_gallery

    if options.esc10 and not options.labels:
        raise UsageError("--esc10 is for --labels")
    began = time.monotonic()
    quiet = not sys.stderr.isatty()
    with (
        tqdm(unit="file", desc="listening", disable=quiet, dynamic_ncols=True) as bar,
        tqdm(unit="file", desc="cutting", disable=quiet, dynamic_ncols=True, delay=1e-9) as second,
    ):
        try:
            found = write_gallery(
                network_of(options),
                options.output,
                options.sounds,
                [layer_key(name) for each in options.layer or () for name in each.split(",")],
                top=options.top,
                labels=read_labeled(options.labels, esc10=options.esc10) if options.labels else None,
                fold=options.fold,
                edge_frames=options.edge_frames,
                table=options.table,
                workers=options.workers,
                decoder=options.decoder,
                force=options.force,
                progress=partial(advance_files, bar),
                cutting=partial(advance, second),
            )
        except (CorpusError, LabeledSoundsError) as error:
            raise UsageError(str(error)) from None
    failures = found.failures
    if failures:
        show_failures(failures)
    if not found.heard:
        complain("no sound could be heard; nothing written")
        return FAILED
    dead = sum(unit.dead for unit in found.units)
    index = f"{options.output.rstrip('/')}/index.html"
    if options.json:
        said: dict[str, Any] = {
            "gallery": index,
            "layers": list(found.layers),
            "units": len(found.units),
            "dead": dead,
            "sounds": found.heard,
            **({"edge_frames": found.edge_frames} if found.edge_layers else {}),
            "failures": [{"path": each.path, "reason": each.reason} for each in failures],
        }
        print(json.dumps(said))
    else:
        print(index)
    complain(
        f"{len(found.units):,} units of {' and '.join(found.layers)}"
        f"{f', {dead:,} of them never above 0' if dead else ''}; {found.heard:,} sounds, "
        f"{time.monotonic() - began:.1f} s"
    )
    return FAILED if failures else 0


def _serve(options: argparse.Namespace) -> int:
    if not 0 <= options.port <= 65_535:
        raise UsageError(f"--port is 0 to 65535, not {options.port}")
    if options.max_megabytes < 1:
        raise UsageError(f"--max-megabytes must be at least 1, not {options.max_megabytes}")
    if not 0 < options.max_hours <= 24:
        raise UsageError(f"--max-hours is up to 24, not {options.max_hours:g}")
    from soundnet_port.viewing.web_app import serve

    def ready(address: str) -> None:
        print(address, flush=True)
        if options.open:
            import webbrowser

            webbrowser.open(address)

    model = network_of(options)
    try:
        serve(
            model,
            options.host,
            options.port,
            megabytes=options.max_megabytes,
            hours=options.max_hours,
            edge_frames=options.edge_frames,
            ready=ready,
        )
    except OSError as error:
        where = f"--host {options.host} --port {options.port}"
        raise UsageError(f"{where}: {error.strerror or error}; take another with --port, or 0") from None
    except ValueError as error:
        raise UsageError(str(error)) from None
    except KeyboardInterrupt:
        pass
    return 0


def add_commands(command: Command) -> None:
    """Adds them to the parser."""
    sub = command(
        "units",
        _units,
        "hear what drives each hidden unit",
        description="Finds the sounds of a corpus that drive each unit of a layer most, and writes pages\n"
        "to hear and see them: OUT/index.html opens in any browser, without a server. Only the\n"
        "excerpt that the unit sees at its peak is kept, at most one of each file. A run that\n"
        "was interrupted goes on when the same command is given again. Goes on past bad files;\n"
        "exit code 1 if there were any. Spectrograms need the extra [plot].",
        epilog="examples:\n"
        "  soundnet-port units recordings/ -o units/\n"
        "  soundnet-port units --labels ESC-50-master --esc10 --fold 5 -o units/ -w demo\n"
        "  soundnet-port units recordings/ -o units/ --layers conv3,conv5 --top 5 --table",
    )
    sub.add_argument(
        "sounds",
        metavar="CORPUS",
        nargs="*",
        help="file, directory (searched), or @LIST: a text file with a path per line (default: the "
        "labelled sounds)",
    )
    sub.add_argument("-o", "--output", metavar="OUT", required=True, help="folder of the pages")
    sub.add_argument("-w", "--weights", default="soundnet8", help="name or file (default: soundnet8)")
    sub.add_argument(
        "-l",
        "--layers",
        dest="layer",
        metavar="LAYER",
        action="append",
        help="several times, or with commas (default: conv7 and conv5; with 5 layers conv4 and conv3)",
    )
    sub.add_argument("-n", "--top", type=int, default=9, help="sounds for each unit, up to 32 (default: 9)")
    sub.add_argument(
        "--labels",
        metavar="SOURCE",
        help="classes of the sounds: a data set's folder, a folder with a folder per class, or a list, as "
        "for 'evaluate'; units are then named after what they prefer",
    )
    sub.add_argument("--fold", metavar="F", help="of the labelled sounds, hear this fold only")
    sub.add_argument("--esc10", action="store_true", help="of ESC-50 only the classes of ESC-10")
    sub.add_argument(
        "--edge-frames",
        action="store_true",
        help="take in the last frames of conv7 (with 5 layers conv4), which hear zeros after the sound's end "
        "(left out by default)",
    )
    sub.add_argument("--table", action="store_true", help="also units.parquet (extra [parquet])")
    sub.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each CPU)")
    sub.add_argument("-f", "--force", action="store_true", help="replace a gallery, start anew")
    sub.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, mps")
    sub.add_argument("--decoder", choices=DECODERS, default="auto", help="auto (default), soundfile, av, sox")
    sub.add_argument("--json", action="store_true", help="a summary as a JSON object")

    sub = command(
        "serve",
        _serve,
        "show in the browser what the network hears",
        description="Serves a page on this computer: drop, choose or record a sound or a video there, and\n"
        "see its scenes and objects over time while it plays, and what any layer does. Prints the\n"
        "page's address; Ctrl-C ends it. Files stay on this computer, in a temporary folder, and\n"
        "are removed when the page is closed (extra [web]).",
        epilog="examples:\n  soundnet-port serve --open\n  soundnet-port serve -w demo --port 0",
    )
    sub.add_argument("-w", "--weights", default="soundnet8", help="name or file (default: soundnet8)")
    sub.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    sub.add_argument("--port", type=int, default=8765, help="default: 8765; 0 takes a free one")
    sub.add_argument("--open", action="store_true", help="open the page in the browser")
    sub.add_argument(
        "--edge-frames",
        action="store_true",
        help="as the original: all frames, clips repeated to 10 s (left out by default: the last frames of "
        "conv7 and the heads, which hear zeros after the sound's end)",
    )
    sub.add_argument(
        "--max-megabytes", type=int, default=500, metavar="N", help="of a file at most (default: 500)"
    )
    sub.add_argument("--max-hours", type=float, default=6, metavar="H", help="of sound at most (default: 6)")
    sub.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, mps")
