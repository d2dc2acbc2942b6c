"""Report on stderr: failures, notes, and the progress of long work."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from soundnet_port.audio.finding import Failure
    from soundnet_port.corpus.run import CorpusResult
    from soundnet_port.progress import Progress

FAILED, MISUSE, INTERRUPTED = 1, 2, 130  # exit codes
MAX_LISTED = 20  # failures, or class names
_FIRST_LINE, _LINE_INTERVAL = 5, 30  # seconds, of progress in a log


class UsageError(Exception):
    """Options that cannot work; the message is one line."""


def report(message: object) -> None:
    """Print a message as one line on stderr."""
    print(f"soundnet-port: {' '.join(str(message).split())}", file=sys.stderr, flush=True)


def report_failures(failures: Sequence[Failure], path: object = None) -> None:
    """Print failed inputs, or the first of many; `path` is the file that lists them all."""
    count = f"{len(failures):,} input{'s' * (len(failures) != 1)}"
    report(f"{count} failed" + (f"; see {path}:" if path else ":"))
    for failure in failures[:MAX_LISTED]:
        report(failure)
    if len(failures) > MAX_LISTED:
        report(f"... and {len(failures) - MAX_LISTED:,} more")


def report_corpus(result: CorpusResult) -> int:
    """Print the result of a run over many files; return the exit code."""
    if result.failures and result.report:
        report_failures(result.failures, result.report)
    parts = []
    if result.extracted:
        parts.append(
            f"{result.extracted:,} files, {result.seconds / 3600:.2f} hours of sound in "
            f"{result.elapsed:.1f} s, {result.seconds / result.elapsed:,.0f} times real time"
        )
    if result.already_done:
        parts.append(f"{result.already_done:,} of {result.total:,} files already done")
    if not result.extracted:
        parts.append("nothing to do" if result.already_done else "no results")
    report(f"{result.output}: {'; '.join(parts)}")
    return FAILED if result.failures else 0


class ProgressReporter:
    """A progress callback: a bar on a terminal, elsewhere a line per epoch or now and then; messages at once.

    Use it as a context manager, which ends the bar. It can be pickled before its first report.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._unit = ""
        self._done = 0

    def __call__(self, progress: Progress) -> None:
        if progress.unit != self._unit or progress.done < self._done:  # the work, or its next part, begins
            self._begin(progress)
        self._done = progress.done
        if progress.message:
            self._bar.clear()
            report(progress.message)
        if self._bar.disable:
            self._log(progress)
            return
        self._bar.total = progress.total
        self._bar.set_postfix_str(progress.note, refresh=False)
        self._bar.update(progress.done - self._bar.n)  # draws ten times a second at most
        if progress.message:
            self._bar.refresh()

    def _begin(self, progress: Progress) -> None:
        from tqdm import tqdm

        self.close()
        self._unit = progress.unit
        self._bar = tqdm(
            total=progress.total,
            initial=progress.done,
            unit=progress.unit,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self._first_done, self._start = progress.done, time.monotonic()
        self._next_line = self._start + _FIRST_LINE

    def _log(self, progress: Progress) -> None:
        now = time.monotonic()
        is_epoch = progress.unit == "epoch" and progress.note
        if not is_epoch and (now < self._next_line or progress.done >= progress.total):
            return
        self._next_line = now + _LINE_INTERVAL
        plural = "s" * (progress.total != 1)
        parts = [f"{progress.done:,} of {progress.total:,} {progress.unit}{plural}", progress.note]
        if (finished := progress.done - self._first_done) and progress.done < progress.total:
            seconds = (progress.total - progress.done) * (now - self._start) / finished
            parts.append(f"about {format_duration(seconds)} left")
        report(", ".join(filter(None, parts)))

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> ProgressReporter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def format_duration(seconds: float) -> str:
    """Format a duration to about two digits, such as "45 s", "12 min" or "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
