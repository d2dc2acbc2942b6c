"""Processes forked from one that has already done the slow imports: command lines, and spawned workers.

A new interpreter takes seconds to import PyTorch and its companions; one of these takes milliseconds.
"""

import contextlib
import importlib
import multiprocessing
import os
import select
import socket
import sys
import warnings
from multiprocessing import connection, forkserver

from soundnet_port.cli.main import main

_CAN_FORK = "forkserver" in multiprocessing.get_all_start_methods()
_processes = multiprocessing.get_context("forkserver" if _CAN_FORK else "spawn")
_LAZY_IMPORTS = [
    "soundnet_port.learning.training",
    "soundnet_port.corpus.workers",
    "lightning_fabric",
    "matplotlib.pyplot",
    "sklearn.svm",
    "transformers.models.auto",
]
if _CAN_FORK:
    _processes.set_forkserver_preload(_LAZY_IMPORTS)


def fork_the_server():
    """Let this process, which has imported much, become the fork server; to be called before tests change it.

    Without it, multiprocessing starts a new interpreter as the server, which does all the imports again.
    """
    if not _CAN_FORK or sys.version_info >= (3, 14):  # whose server takes other arguments
        return
    address = connection.arbitrary_address("AF_UNIX")
    alive, until_end = os.pipe()
    with socket.socket(socket.AF_UNIX) as listener, warnings.catch_warnings():
        listener.bind(address)
        listener.listen()
        warnings.simplefilter("ignore", DeprecationWarning)  # threads here are idle
        child = os.fork()
        if not child:
            os.close(until_end)
            _serve(listener, alive)
    os.close(alive)
    server = forkserver._forkserver
    server._forkserver_address, server._forkserver_alive_fd, server._forkserver_pid = (
        address,
        until_end,
        child,
    )


def _serve(listener, alive):
    try:
        asked, _, _ = select.select([listener, alive], [], [])
        if listener in asked:  # the first process is wanted
            for name in _LAZY_IMPORTS:
                with contextlib.suppress(ImportError):
                    importlib.import_module(name)
            forkserver.main(listener.fileno(), alive, [])
    finally:
        os._exit(0)


def run_forked(function, *arguments, seconds=120):
    """Call a function of a module in a process with one thread; return the exit code, or None if it hangs."""
    process = _processes.Process(target=function, args=arguments)
    process.start()
    process.join(seconds)
    return process.exitcode


# ---- the command line


def run_at_once(commands, outputs, environments=None, limit=None):
    """Run command lines, all starting at the same moment; return their exit codes.

    The output of each goes to the file at the same position in `outputs`. `environments` holds additional
    environment variables for each. No file may grow larger than `limit` bytes.
    """
    barrier = _processes.Barrier(len(commands))
    processes = [
        _processes.Process(target=_run, args=(command, path, barrier, environment, limit))
        for command, path, environment in zip(
            commands, outputs, environments or [{}] * len(outputs), strict=True
        )
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def start(command, output):
    """Start a command line in a process group of its own; return the process."""
    process = _processes.Process(target=_run, args=(command, output, None, {}, None))
    process.start()
    return process


def _run(command, output, barrier, environment, limit):
    os.environ.update(environment)
    with open(output, "w") as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
        if barrier:
            barrier.wait()
            replace_spawn(_ForkContext)
        else:
            os.setpgid(0, 0)
        if limit is not None:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        code = main(command)
    sys.exit(code)


# ---- spawned processes

if _CAN_FORK:
    # Ctrl-C finds processes by the beginning of these classes' names

    class SpawnProcess(multiprocessing.context.ForkServerProcess):
        """From the fork server; like a spawned one it has the environment variables of its creator."""

        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            self._environment = dict(os.environ)

        def run(self):
            os.environ.clear()
            os.environ.update(self._environment)
            super().run()

    class SpawnProcessByFork(multiprocessing.context.ForkProcess):
        """For processes of the fork server, which have no other threads."""

    class _ForkServerContext(multiprocessing.context.ForkServerContext):
        Process = SpawnProcess

    class _ForkContext(multiprocessing.context.ForkContext):
        Process = SpawnProcessByFork


def replace_spawn(context=None):
    """Let code that starts processes get them from the fork server; return a function that ends that.

    What they are given is pickled, as it is for a new interpreter.
    """
    if not _CAN_FORK:
        return lambda: None
    contexts = multiprocessing.context._concrete_contexts
    before, start_server = contexts.copy(), forkserver.ensure_running
    contexts["spawn"] = contexts["forkserver"] = (context or _ForkServerContext)()
    forkserver.ensure_running = lambda: None  # it runs, or nobody needs it

    def restore():
        contexts.update(before)
        forkserver.ensure_running = start_server

    return restore
