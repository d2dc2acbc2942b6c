"""Where the results of many sounds go: standard output, one file, or a folder with a file for each sound."""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO

from soundnet_port.cli.options import check_output
from soundnet_port.cli.reporting import UsageError, report
from soundnet_port.errors import SoundNetError
from soundnet_port.files import atomic_write

_NAME_ERRORS = (errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL)  # of one sound's file, not of the folder


class Results:
    """Texts of sounds, each sound's when it is complete.

    Args:
        files: of each sound, if they have files of their own.
        stream: where all texts go otherwise; None is standard output.
        header: what each file, or the stream, begins with.
        force: replace existing files.

    Attributes:
        written: number of texts.
        kept: number of files that existed, and stay.
    """

    def __init__(
        self,
        files: Mapping[Path, Path] | None = None,
        stream: TextIO | None = None,
        header: str = "",
        force: bool = False,
    ) -> None:
        self._files, self._stream, self._header, self._force = files, stream, header, force
        self._handled: set[Path] = set()  # files; a sound that is named twice has one
        self.written = self.kept = 0
        if files is None:
            self._print(header)

    def is_done(self, sound: Path) -> bool:
        """Whether a sound's file exists and stays."""
        if self._files is None:
            return False
        path = self._files[sound]
        if path in self._handled:
            return True
        try:
            done = path.exists() and not self._force
        except OSError:  # the name is too long: `write` will say so
            return False
        if done:
            self._handled.add(path)
            self.kept += 1
        return done

    def write(self, sound: Path, text: str) -> None:
        """Write a sound's text.

        Raises:
            UsageError: the sound's file cannot have this name.
            OSError: nothing can be written there.
        """
        if self._files is None:
            self._print(text)
        else:
            path = self._files[sound]
            try:
                with atomic_write(path) as temporary, _open(temporary) as file:
                    file.write(self._header + text)
            except OSError as error:
                if error.errno not in _NAME_ERRORS:
                    raise
                raise UsageError(f"{path}: cannot be written ({error.strerror})") from None
        self.add(sound)

    def add(self, sound: Path) -> None:
        """Count a sound's result, for one that has written it by itself."""
        self.written += 1
        if self._files is not None:
            self._handled.add(self._files[sound])

    def _print(self, text: str) -> None:
        (self._stream or sys.stdout).write(text)

    def summarize(self, output: str) -> None:
        """Report on standard error how many files there are."""
        parts, total = [], self.written + self.kept
        if self.written or not self.kept:
            parts.append(f"{self.written:,} file{'s' * (self.written != 1)} written")
        if self.kept:
            parts.append(f"{self.kept:,} of {total:,} already there (--force replaces them)")
        report(f"{output}: {', '.join(parts)}")


class _NothingWritten(SoundNetError):
    """Every sound failed."""


@contextlib.contextmanager
def open_file_of_results(path: str, header: str, force: bool) -> Iterator[Results]:
    """Open one file for the texts of all sounds, as a context manager.

    It appears when all of them are done, and only if there is any.

    Raises:
        UsageError: the file exists.
    """
    check_output(path, force)
    with contextlib.suppress(_NothingWritten), atomic_write(path) as temporary:
        with _open(temporary) as stream:
            results = Results(stream=stream, header=header)
            yield results
        if not results.written:
            raise _NothingWritten


def _open(path: Path) -> TextIO:
    """Open a text file for writing; file names, which may hold anything, become printable."""
    return open(path, "w", encoding="utf-8", errors="backslashreplace", newline="\n")
