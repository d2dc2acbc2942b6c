"""Atomic writes, locks on folders, temporary copies and checksums."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_PATIENCE = 5  # seconds; the helper processes of a run that was killed see that after as much
_SHORT_PATIENCE = 2  # seconds; runs that share a folder lock others out only when they come and go
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], staging: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path; what is written there replaces `path` if the block ends without an error.

    Missing folders are created, and removed again after an error.

    Args:
        path: the file to write.
        staging: folder of the temporary file, on the same file system; by default the folder of `path`.

    Raises:
        OSError: the file cannot be written; the error names `path`, not the temporary file.
    """
    path = Path(path)
    missing = [folder for folder in path.parents if not folder.exists()]
    temporary = (staging or path.parent) / f".{secrets.token_hex(6)}.part"  # shorter than any legal name
    done = False
    try:
        if staging is None:
            path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, path)
        done = True
    except OSError as error:
        # NumPy and others report a full disk without the name of the file
        unnamed = error.filename is None and error.errno in _DISK_FULL
        if str(error.filename) != str(temporary) and not unnamed:
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from None
    finally:
        with contextlib.suppress(OSError):  # the staging folder may be gone
            temporary.unlink(missing_ok=True)
        for folder in () if done else missing:
            with contextlib.suppress(OSError):  # not empty: another process writes there too
                folder.rmdir()


@contextlib.contextmanager
def temporary_copy(stream: BinaryIO, suffix: str = "") -> Iterator[Path]:
    """Copy the rest of a stream to a temporary file, and yield its path until the block ends.

    Args:
        stream: such as standard input.
        suffix: of the file's name.
    """
    descriptor, name = tempfile.mkstemp(suffix)
    try:
        with open(descriptor, "wb") as file:
            shutil.copyfileobj(stream, file)
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


@contextlib.contextmanager
def exclusive_lock(
    folder: str | os.PathLike[str],
    error: type[Exception],
    patience: float = _PATIENCE,
    on_wait: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Keep other runs that take this lock out of an existing folder.

    The lock ends with the process, however that ends, and leaves no file.

    Args:
        folder: the folder to lock.
        error: raised when patience runs out.
        patience: seconds to wait for another run.
        on_wait: called once if another run holds the lock.

    Raises:
        error: another run holds the lock.
        OSError: the folder cannot be read.
    """
    with contextlib.ExitStack() as stack:
        take: Callable[[], bool]
        if fcntl is None:
            import filelock  # 30 ms, for Windows alone

            lock = filelock.FileLock(Path(folder, ".lock"))
            stack.callback(Path(folder, ".lock").unlink, missing_ok=True)
            stack.callback(lock.release)

            def take() -> bool:
                with contextlib.suppress(filelock.Timeout):
                    lock.acquire(timeout=0)
                return lock.is_locked
        else:
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)

            def take() -> bool:
                return _flock(descriptor, exclusive=True) is not False

        until, waiting = time.monotonic() + patience, False
        while not take():
            if not waiting:
                waiting = True
                on_wait()
            if time.monotonic() > until:
                raise error(f"{os.fspath(folder)}: another run is at work there; wait for it to end")
            time.sleep(0.05)
        yield


@contextlib.contextmanager
def output_lock(
    folder: Path, output: Path, error: type[Exception], *, exclusive: bool = True
) -> Iterator[Path]:
    """Lock a folder of results and yield a staging folder inside, for files that are not finished.

    The staging folder is removed at the end; so are those of runs that were killed, by the first run
    that has the folder to itself.

    Args:
        folder: where the results go; created if it does not exist.
        output: what to call it in messages.
        error: raised if the folder cannot be had.
        exclusive: nobody else may be at work there. Otherwise others may, but for Windows, where all
            locks are exclusive.

    Raises:
        error: another run is at work there, or the folder cannot be made.
        OSError: the folder cannot be read.
    """
    inner = folder / ".extract"
    lock = inner / "lock"
    descriptor = -1
    until = time.monotonic() + _SHORT_PATIENCE
    with contextlib.ExitStack() as stack:
        if fcntl is None:
            inner.mkdir(parents=True, exist_ok=True)
            stack.callback(_remove_empty, inner, folder)
            stack.enter_context(exclusive_lock(inner, error, _SHORT_PATIENCE))
            _remove_folders(inner)
        else:
            stack.callback(lambda: _release(descriptor, lock, folder))
            while descriptor < 0:
                with contextlib.suppress(FileNotFoundError):  # the last run to leave removes all of it
                    inner.mkdir(parents=True, exist_ok=True)
                    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
                    held = _flock(descriptor, exclusive=True)
                    if held:
                        _remove_folders(inner)
                    if not exclusive and held is not None:
                        held = _flock(descriptor, exclusive=False)
                    if held is not False and os.path.samestat(os.fstat(descriptor), lock.stat()):
                        break
                if descriptor >= 0:
                    os.close(descriptor)
                    descriptor = -1
                if time.monotonic() > until and inner.is_dir():
                    raise error(f"{output}: another run is at work there; wait for it to end")
                if time.monotonic() > until:
                    raise error(f"{output}: no folder can be made there")
                time.sleep(0.02)
        staging = inner / secrets.token_hex(4)
        staging.mkdir()
        stack.callback(shutil.rmtree, staging, ignore_errors=True)
        yield staging


def _flock(descriptor: int, *, exclusive: bool) -> bool | None:
    """Lock an open file; False if others prevent it, None if the file system has no locks."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def _release(descriptor: int, lock: Path, folder: Path) -> None:
    if descriptor < 0:
        return
    with contextlib.suppress(OSError):
        if _flock(descriptor, exclusive=True):
            lock.unlink(missing_ok=True)
            _remove_empty(lock.parent, folder)
    os.close(descriptor)


def _remove_folders(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def _remove_empty(*folders: Path) -> None:
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def stream_sha256(stream: BinaryIO) -> str:
    """Compute the sha256 of the rest of an open file, in hexadecimal digits."""
    digest = hashlib.sha256()
    while chunk := stream.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()
