"""The engine's threads: parts of a layer shared out, in place of PyTorch's threads in every operation.

PyTorch shares every single operation out to its threads. The engine's operations are short, so these
would mostly wait for each other, and where another process has one of the processors, all of them
for that one: fifty times as long. So the work goes to a thread in which PyTorch has one thread only,
and that shares out parts of a layer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Lock, local
from typing import Any, TypeVar

import torch

_Result = TypeVar("_Result")
_thread_state = local()  # `threads`: how many may share the parts of this thread's work


def thread_count() -> int:
    """Return how many threads `run_parts` uses in this thread."""
    return getattr(_thread_state, "threads", 1)


def run_with_parts(work: Callable[..., _Result], *arguments: Any) -> _Result:
    """Call a function in a thread whose `run_parts` uses as many threads as PyTorch may use here."""
    threads = torch.get_num_threads()
    if threads == 1 or hasattr(_thread_state, "threads"):
        return work(*arguments)

    def run() -> _Result:
        torch.set_num_threads(1)  # of this thread; only MKL's number is the whole process's
        _thread_state.threads = threads
        try:
            with torch.no_grad():
                return work(*arguments)
        finally:
            del _thread_state.threads
            torch.set_num_threads(threads)

    return _pool("soundnet-engine", 64).submit(run).result()


def run_parts(work: Callable[..., object], parts: Sequence[tuple[Any, ...]]) -> None:
    """Call a function with the arguments of each part, each call in one thread."""
    helpers = min(thread_count(), len(parts)) - 1
    if helpers < 1:
        for part in parts:
            work(*part)
        return
    remaining = iter(parts)
    lock = Lock()

    def take_parts() -> None:
        torch.set_num_threads(1)
        while True:
            with lock:
                part = next(remaining, None)
            if part is None:
                return
            work(*part)

    pool = _pool("soundnet-engine-part", thread_count())
    futures = [pool.submit(take_parts) for _ in range(helpers)]
    take_parts()
    for future in futures:
        future.result()


@cache
def _pool(name: str, count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, name)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads stay with the parent
