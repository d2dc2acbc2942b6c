"""The command line in a process of its own, without the seconds that imports take."""

import contextlib
import multiprocessing
import os
import sys

from soundnet_port.cli.main import main

_processes = multiprocessing.get_context("forkserver")
_LATE = ["lightning_fabric", "matplotlib.pyplot", "sklearn.svm", "transformers.models.auto"]
_processes.set_forkserver_preload(["support.cli_processes", "soundnet_port.learning.training", *_LATE])


def run_at_once(commands, said, environments=None):
    """Runs command lines, all from the same moment on; returns their exit codes.

    What each one says goes into the file of the same place in `said`. Environment variables are added for
    each if they are given.
    """
    ready = _processes.Barrier(len(commands))
    begun = [
        _processes.Process(target=_run, args=(words, path, ready, environment))
        for words, path, environment in zip(commands, said, environments or [{}] * len(said), strict=True)
    ]
    for process in begun:
        process.start()
    for process in begun:
        process.join()
    return [process.exitcode for process in begun]


def _run(words, said, ready, environment):
    os.environ.update(environment)
    with open(said, "w") as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
        ready.wait()
        code = main(words)
    sys.exit(code)
