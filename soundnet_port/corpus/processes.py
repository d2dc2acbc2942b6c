"""Start worker processes: new interpreters, or for the command line forks of a server.

A new interpreter takes more than a second of a CPU to import PyTorch. On Linux the command line therefore has
multiprocessing's fork server import PyTorch while it does so itself; forks of the server take milliseconds
and share its memory. The server has no work of its own, so no thread or lock is lost to a fork. It belongs to
the whole process and keeps the environment that it was started with, so programs that use the package get new
interpreters. This module imports nothing slow.
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
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE_FILE = __file__  # tells this copy of the package from others
_PRELOADED = "soundnet_port.corpus.workers"
_forking = False  # whether `start_process` forks the server


def available_cpus() -> int:
    """Return how many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def worker_server() -> Iterator[None]:
    """Have a server import what workers need, and fork it in `start_process` until the block ends.

    It starts in the background. Nothing happens where forking is not safe.
    """
    global _forking
    if sys.platform == "linux":
        from multiprocessing import forkserver

        multiprocessing.get_context("forkserver").set_forkserver_preload([_PRELOADED])
        with _without_interrupts(), _away_from_here():
            forkserver.ensure_running()
        _forking = True
    try:
        yield
    finally:
        _forking = False


def stop_forking() -> None:
    """Start new interpreters from now on."""
    global _forking
    _forking = False


def start_process(main: Callable[[Connection], None]) -> tuple[BaseProcess, Connection]:
    """Start a daemon with one end of a pipe; return the process and the other end.

    Args:
        main: its work, a function of a module.
    """
    if _forking:
        try:
            return _start(multiprocessing.get_context("forkserver"), main)
        except (EOFError, OSError):  # the server could not import what it should, or has died
            stop_forking()
    with _without_interrupts(), _without_main_module():
        return _start(multiprocessing.get_context("spawn"), main)


def _start(context: Any, main: Callable[[Connection], None]) -> tuple[BaseProcess, Connection]:
    connection, workers_connection = context.Pipe()
    process = context.Process(target=main, args=(workers_connection,), daemon=True)
    try:
        process.start()
    finally:
        workers_connection.close()  # so that our end closes when the process ends
    return process, connection


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Let processes that start meanwhile ignore Ctrl-C, which is for their parent alone."""
    # None is a handler that Python did not install and cannot restore
    replaced = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT)
    if replaced:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        if replaced:
            signal.signal(signal.SIGINT, replaced)


@contextlib.contextmanager
def _without_main_module() -> Iterator[None]:
    """Let new interpreters not run the program's script again, of which workers need nothing.

    So a script needs no `if __name__ == "__main__":` and may come from standard input.
    """
    main_module = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main_module


@contextlib.contextmanager
def _away_from_here() -> Iterator[None]:
    """Work in the standard library's folder, since a new server imports from its own folder first."""
    here = Path.cwd()
    os.chdir(Path(os.__file__).parent)
    try:
        yield
    finally:
        os.chdir(here)
