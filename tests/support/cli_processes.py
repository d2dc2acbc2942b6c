"""The command line in processes of its own, forked from one that has already done the slow imports."""

import contextlib
import multiprocessing
import os
import sys

from soundnet_port.cli.main import main

_processes = multiprocessing.get_context("forkserver")
_LAZY_IMPORTS = ["lightning_fabric", "matplotlib.pyplot", "sklearn.svm", "transformers.models.auto"]
_processes.set_forkserver_preload(
    ["support.cli_processes", "soundnet_port.learning.training", *_LAZY_IMPORTS]
)


def run_at_once(commands, outputs, environments=None):
    """Run command lines, all starting at the same moment; return their exit codes.

    The output of each goes to the file at the same position in `outputs`. `environments` holds additional
    environment variables for each.
    """
    barrier = _processes.Barrier(len(commands))
    processes = [
        _processes.Process(target=_run, args=(command, path, barrier, environment))
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
    process = _processes.Process(target=_run, args=(command, output, None, {}))
    process.start()
    return process


def _run(command, output, barrier, environment):
    os.environ.update(environment)
    with open(output, "w") as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
        if barrier:
            barrier.wait()
        else:
            os.setpgid(0, 0)
        code = main(command)
    sys.exit(code)
