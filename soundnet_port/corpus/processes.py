"""Start worker processes: on Linux by a server that has imported PyTorch once and forks.

A new interpreter takes more than a second of a CPU to import PyTorch; a fork of the server takes
milliseconds and shares its memory. The server has no work of its own, so no thread or lock is lost to a
fork. Elsewhere, where forking is not safe, every worker is a new interpreter. This module imports nothing
slow, so that a command line can have the server import PyTorch while it does so itself.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

_PRELOADED = "soundnet_port.corpus.workers"
_CAN_FORK = sys.platform == "linux"


def available_cpus() -> int:
    """Return how many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def start_server() -> None:
    """Have the server start and import what workers need, unless it runs already; return at once."""
    if _CAN_FORK:
        from multiprocessing import forkserver

        multiprocessing.get_context("forkserver").set_forkserver_preload([_PRELOADED])
        with _without_interrupts():
            forkserver.ensure_running()


def start_process(main: Callable[[Connection], None]) -> tuple[BaseProcess, Connection]:
    """Start a daemon with one end of a pipe; return the process and the other end.

    Args:
        main: its work, a function of a module.
    """
    start_server()
    context: Any = multiprocessing.get_context("forkserver" if _CAN_FORK else "spawn")
    connection, workers_connection = context.Pipe()
    process = context.Process(target=main, args=(workers_connection,), daemon=True)
    with _without_interrupts():
        process.start()
    workers_connection.close()  # so that our end closes when the process ends
    return process, connection


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Let processes that start meanwhile ignore Ctrl-C, which is for their parent alone."""
    is_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if is_main_thread else None
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
