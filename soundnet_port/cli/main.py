"""The command line. Results go to stdout; progress, notes and errors to stderr.

Exit codes: 0 success; 1 some inputs failed; 2 misuse, or refused input; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

from soundnet_port.cli import (
    demo,
    encode,
    evaluate,
    export,
    extract,
    finetune,
    info,
    label_videos,
    pages,
    predict,
    train,
    verify,
    weights,
)
from soundnet_port.cli.parser import Parser, Run
from soundnet_port.cli.reporting import INTERRUPTED, MISUSE, UsageError, report
from soundnet_port.errors import SoundNetError
from soundnet_port.version import __version__

_COMMANDS = (
    demo,
    predict,
    extract,
    pages,
    evaluate,
    encode,
    finetune,
    train,
    label_videos,
    export,
    weights,
    verify,
    info,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # file names may hold anything
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    options = build_parser().parse_args(arguments)
    handler = None
    with suppress(ValueError):  # not in the main thread
        handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # removes temporary files
    try:
        return _run(options)
    except KeyboardInterrupt:
        resumable = options.resumable and options.output
        report("interrupted" + ("; the same command goes on from here" if resumable else ""))
        return INTERRUPTED
    finally:
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)


def _run(options: argparse.Namespace) -> int:
    run: Run = options.run
    try:
        code = run(options)
        sys.stdout.flush()
    except (UsageError, SoundNetError) as error:
        report(error)
        return MISUSE
    except BrokenPipeError:  # `soundnet-port ... | head`
        _discard_stdout()
        return 0
    except OSError as error:
        report(f"{error.filename or 'standard output'}: {error.strerror or error}")
        _discard_stdout()
        return MISUSE
    return code


def _discard_stdout() -> None:
    """Discard what a standard output that takes no more has not written yet."""
    with suppress(OSError):  # in a notebook it is not a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command line; parsed options have the command as `run`."""
    parser = Parser(
        prog="soundnet-port",
        description="SoundNet: names the objects and scenes in sounds. Ported exactly from Torch7.",
        epilog="Start with 'soundnet-port demo', then try a sound of yours:\n"
        "  soundnet-port predict dog.wav\n"
        "The released network is downloaded on first use.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"soundnet-port {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add_command(
        name: str,
        run: Run,
        summary: str,
        *,
        description: str = "",
        examples: Sequence[str] = (),
        resumable: bool = False,
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=summary,
            description=description or summary,
            epilog="\n  ".join(["examples:", *examples]) if examples else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run, resumable=resumable)
        return command

    for module in _COMMANDS:
        module.add_commands(add_command)
    return parser
