"""Locks on folders, so that two runs do not write into one. They end with the process, however it ends."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator

try:
    import fcntl
except ImportError:  # Windows: nobody is refused there
    fcntl = None  # type: ignore[assignment]

_PATIENCE = 5  # seconds; helpers of a run that was killed see that after as much


def locked(descriptor: int, *, alone: bool) -> bool | None:
    """Locks an open file, alone or with others; False if others prevent it, None if nothing can lock."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


@contextlib.contextmanager
def alone_in(
    folder: str | os.PathLike[str],
    kind: type[Exception],
    patience: float = _PATIENCE,
    waiting: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Keeps other runs that ask for this out of a folder, which must be there. It leaves no file.

    Args:
        folder: the folder.
        kind: raised when patience ends.
        patience: seconds to wait for another run.
        waiting: called once where there is one.

    Raises:
        kind: another run is at work there.
        OSError: the folder cannot be read.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        until, said = time.monotonic() + patience, False
        while locked(descriptor, alone=True) is False:
            if not said:
                said = True
                waiting()
            if time.monotonic() > until:
                raise kind(f"{os.fspath(folder)}: another run is at work there; wait for it to end")
            time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)
