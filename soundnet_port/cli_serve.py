"""The command line's `serve`."""

from __future__ import annotations

import argparse

from soundnet_port.cli import Command, Misuse, network_of


def add_commands(command: Command) -> None:
    """Registers the sub-command."""
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
        "--max-megabytes", type=int, default=500, metavar="N", help="of a file at most (default: 500)"
    )
    sub.add_argument("--max-hours", type=float, default=6, metavar="H", help="of sound at most (default: 6)")
    sub.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, mps")


def _serve(options: argparse.Namespace) -> int:
    if not 0 <= options.port <= 65_535:
        raise Misuse(f"--port is 0 to 65535, not {options.port}")
    if options.max_megabytes < 1:
        raise Misuse(f"--max-megabytes must be at least 1, not {options.max_megabytes}")
    if not 0 < options.max_hours <= 24:
        raise Misuse(f"--max-hours is up to 24, not {options.max_hours:g}")
    try:
        from soundnet_port.server import serve
    except ValueError as error:
        raise Misuse(str(error)) from None

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
            ready=ready,
        )
    except OSError as error:
        where = f"--host {options.host} --port {options.port}"
        raise Misuse(f"{where}: {error.strerror or error}; take another with --port, or 0") from None
    except ValueError as error:
        raise Misuse(str(error)) from None
    except KeyboardInterrupt:
        pass
    return 0
