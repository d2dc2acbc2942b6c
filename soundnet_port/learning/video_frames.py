"""Read the frames of a video that pseudo-labels are for: one in the middle of every 5 s of its sound."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from soundnet_port.errors import require
from soundnet_port.learning.errors import VideoError

if TYPE_CHECKING:
    from PIL import Image

STEP_SECONDS = 5.0  # of sound per frame, as in the paper
_ROUNDING = 1e-6  # seconds; at the very time of a frame, that frame is shown


class _CannotSeek(Exception):
    """A file has to be decoded from its beginning."""


def read_frames(path: str | os.PathLike[str]) -> Generator[Image.Image, None, None]:
    """Yield the frames that a player shows at the middle of every 5 s of a video's sound, upright.

    A frame is shown from its own time until the next one's. Times count from the beginning of the
    sound, as `load_audio` returns it. Before its time, the first frame is shown.

    Raises:
        VideoError: the file is missing, has no pictures or no sound, is shorter than 2.5 s or truncated,
            or cannot be decoded; frames before the damage come first.
        MissingExtraError: the extra `[videos]` is not installed.
    """
    av = require("av", "videos")
    require("PIL", "videos")
    count = 0
    try:
        try:
            with contextlib.closing(_read_frames(path, seeking=True)) as images:
                for image in images:
                    yield image
                    count += 1
        except _CannotSeek:
            with contextlib.closing(_read_frames(path, seeking=False)) as images:
                yield from itertools.islice(images, count, None)
    except VideoError:
        raise
    except av.FFmpegError as error:
        where = f" after {count * STEP_SECONDS:.0f} s" if count else ""
        reason = getattr(error, "strerror", None) or error
        raise VideoError(f"{path}: cannot be decoded{where} ({reason})") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name, what PyAV cannot open
        raise VideoError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def _read_frames(path: str | os.PathLike[str], *, seeking: bool) -> Generator[Image.Image, None, None]:
    av = require("av", "videos")
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(path, "rb"))
        if not file.read(1):
            raise VideoError(f"{path}: empty")
        file.seek(0)
        # a playlist that poses as a video must not open other files or addresses
        container = stack.enter_context(
            av.open(file, "r", options={"protocol_whitelist": "none"}, metadata_errors="replace")
        )
        streams = [
            stream
            for stream in container.streams.video
            if not stream.disposition & av.stream.Disposition.attached_pic  # the cover of an album
        ]
        if not streams:
            raise VideoError(f"{path}: has no video stream")
        if not container.streams.audio:
            raise VideoError(f"{path}: has no audio stream")
        stream = streams[0]
        stream.thread_type = "AUTO"
        # decoders drop samples before time 0: the encoder's padding
        begin = max(0.0, _seconds(container.streams.audio[0].start_time, container.streams.audio[0]))
        interval = 1 / float(stream.average_rate or 25)
        frames = _add_times(container.decode(stream), begin, interval, strict=seeking)
        current = following = next(frames, None)  # the frame shown at the middle, and the one after it
        if following is None:
            raise VideoError(f"{path}: has no frames")
        for step in itertools.count():
            middle = begin + (step + 0.5) * STEP_SECONDS + _ROUNDING
            if seeking and step and following is not None and following.seconds <= middle:
                reached = following.seconds
                try:
                    container.seek(int(middle / stream.time_base), stream=stream)
                except av.FFmpegError:
                    raise _CannotSeek from None
                frames = _add_times(container.decode(stream), begin, interval, strict=True)
                current = following = next(frames, None)
                if following is None or following.seconds > middle:
                    raise _CannotSeek
                # key frames further apart than steps: seeking would decode the same again
                seeking = following.seconds > reached
            while following is not None and following.seconds <= middle:
                current, following = following, next(frames, None)
            assert current is not None
            if following is None:
                duration = current.frame.duration
                shown = float(duration * current.frame.time_base) if duration else interval
                end = current.seconds + shown
                declared = _seconds(stream.start_time, stream) + _seconds(stream.duration, stream)
                if declared > end + STEP_SECONDS:
                    raise VideoError(
                        f"{path}: truncated or damaged, its pictures end at {end:.1f} s of {declared:.1f} s"
                    )
                if middle >= max(end, declared):
                    if not step:
                        raise VideoError(
                            f"{path}: too short, {max(end, declared) - begin:.2f} s; "
                            f"a frame at {STEP_SECONDS / 2} s is needed"
                        )
                    return
            yield _to_upright_image(current.frame)


@dataclass(frozen=True)
class _TimedFrame:
    frame: Any
    seconds: float


def _add_times(
    frames: Iterable[Any], begin: float, interval: float, *, strict: bool
) -> Iterator[_TimedFrame]:
    """Yield frames with times; one without follows the frame before it after `interval`."""
    seconds = begin - interval
    for frame in frames:
        if frame.pts is None and strict:
            raise _CannotSeek
        seconds = seconds + interval if frame.pts is None else float(frame.pts * frame.time_base)
        yield _TimedFrame(frame, seconds)


def _seconds(value: int | None, stream: Any) -> float:
    return 0.0 if value is None else float(value * stream.time_base)


def _to_upright_image(frame: Any) -> Image.Image:
    image: Image.Image = frame.to_image()
    # phones record how they were held; counter-clockwise, as in PIL
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image
