"""Predictions as text: for people, for tables, and as labels over time for players and annotation programs.

Frames see 14.5 s (8 layers) and there is one every 3 s, so that they overlap. In labels over time each moment
of the clip belongs to the frame whose center is nearest, and frames in a row with the same answer are one
label. A clip that was repeated, or has a single frame, has labels from its start to its end.
"""

from __future__ import annotations

import csv
import html
import io
import itertools
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from soundnet_port.network.architecture import SAMPLE_RATE
from soundnet_port.network.categories import singularize

if TYPE_CHECKING:
    from soundnet_port.inference.prediction import Category, Frame, Prediction

_LABEL_LENGTH = 38  # characters, where people read
_CSV_HEADER = ("file", "start", "end", "head", "rank", "index", "label", "probability")
_WIDE_HEADER = ("file", "seconds", "repeats", "level")
# BirdNET-Analyzer's columns, with head, category and probability for its species and confidence
_RAVEN_HEADER = (
    "Selection,View,Channel,Begin Time (s),End Time (s),Low Freq (Hz),High Freq (Hz),"
    "Head,Category,Probability,Begin Path,File Offset (s)"
).split(",")


@dataclass(frozen=True)
class TextFormat:
    """How predictions become text.

    Attributes:
        suffix: of a sound's own file; it follows the sound's complete name, as in `dog.wav.srt`.
        write: (name of the sound, prediction, over_time) to its text; `over_time` asks for a line per frame.
        header: what a file begins with, once.
        labels: whether these are labels over time, of one sound alone.
    """

    suffix: str
    write: Callable[[str, Prediction, bool], str]
    header: str = ""
    labels: bool = False


def format_prediction(
    prediction: Prediction, file_format: str = "text", name: str = "", *, over_time: bool = False
) -> str:
    """Format a prediction as the text of a file.

    Labels over time ("srt", "vtt", "audacity", "raven") are of the categories in the frames' lists, of which
    there are as many as `predict` was asked for; with more than one subtitles change more often.

    Args:
        prediction: from `predict`, or `apply_threshold`.
        file_format: "text", "json", "csv", "srt", "vtt", "audacity" or "raven".
        name: of the sound, for the formats that state it; Raven wants a path.
        over_time: a line per frame too, in "text", "json" and "csv".

    Raises:
        ValueError: an unknown format.
    """
    if file_format not in FORMATS:
        raise ValueError(f"unknown format {file_format!r}; choose from {', '.join(FORMATS)}")
    return FORMATS[file_format].header + FORMATS[file_format].write(name, prediction, over_time)


def apply_threshold(prediction: Prediction, threshold: float) -> Prediction:
    """Return a prediction whose lists have only categories of at least this probability, perhaps none.

    Lists get no longer than they were: ask `predict` for more with `top`. The probabilities of all categories
    and the middle frame stay.
    """

    def select(categories: list[Category]) -> list[Category]:
        return [category for category in categories if category.probability >= threshold]

    return replace(
        prediction,
        heads={name: head._replace(top=select(head.top)) for name, head in prediction.heads.items()},
        frames=[
            frame._replace(top={name: select(categories) for name, categories in frame.top.items()})
            for frame in prediction.frames
        ],
    )


# ---- for people, and for programs


def _write_text(name: str, prediction: Prediction, over_time: bool) -> str:
    """Format as text, a column per head."""

    def cell(categories: Sequence[Category]) -> str:
        return f"{categories[0].probability:.4f}  {_shorten(categories[0].label)}" if categories else ""

    def row(cells: Iterable[str]) -> str:
        return "  " + "".join(f"{text:<48}" for text in cells).rstrip()

    notes = [f"{prediction.seconds:.2f} s"]
    if prediction.repeated:
        notes.append(f"too short: played {prediction.repeats} times")
    if prediction.dropped:
        notes.append("edge frame left out")
    heads = prediction.heads
    lines = [f"{name}  ({', '.join(notes)})", row(heads)]
    top = itertools.zip_longest(*(head.top for head in heads.values()))
    listed = [row(cell([category] if category else []) for category in categories) for categories in top]
    lines += listed or ["  (none above the threshold)"]
    if over_time:
        lines.append(f"  {'seconds':<24}" + row(map(singularize, heads)).lstrip())
        for frame in prediction.frames:
            span = f"{frame.start:8.2f} to {frame.end:8.2f}"
            lines.append(f"  {span:<24}{row(cell(frame.top[head]) for head in heads)[2:]}".rstrip())
    middle = prediction.frames[(len(prediction.frames) - 1) // 2].top.values()  # of `prediction.middle`
    has_middle = len(prediction.frames) > 1 and (prediction.edge_frames or not prediction.repeated)
    if has_middle and any(middle):
        lines.append("  middle frame: " + " | ".join(cell(categories) or "-" for categories in middle))
    return "\n".join([*lines, ""])


def _shorten(label: str) -> str:
    return label if len(label) <= _LABEL_LENGTH else f"{label[: _LABEL_LENGTH - 1]}…"


def _write_json(name: str, prediction: Prediction, over_time: bool) -> str:
    return json.dumps({"file": name} | prediction.to_dict(frames=over_time)) + "\n"


def _write_csv(name: str, prediction: Prediction, over_time: bool) -> str:
    return "".join(csv_line(name, *row) for row in prediction.to_rows(frames=over_time))


def csv_line(*cells: object) -> str:
    """Format a row of a CSV file, with its line feed; cells with line breaks of any kind are quoted."""
    line = io.StringIO()
    csv.writer(line).writerow(cells)  # which quotes the characters of the terminator, by default "\r\n"
    return line.getvalue().removesuffix("\r\n") + "\n"


def format_wide_header(names: Mapping[str, Sequence[str]]) -> str:
    """Format the first line of a CSV file with a row per clip and a column per category.

    Columns are called `object:tabby, tabby cat` or `scene:/b/beach`. A name that a head has twice, such as
    "crane", gets its index: `object:crane (134)`.

    Args:
        names: of each head's categories, in the original's spelling.
    """
    columns = []
    for head, categories in names.items():
        count = Counter(categories)
        for index, category in enumerate(categories):
            number = f" ({index})" if count[category] > 1 else ""
            columns.append(f"{singularize(head)}:{category}{number}")
    return csv_line(*_WIDE_HEADER, *columns)


def format_wide_row(name: str, prediction: Prediction) -> str:
    """Format a clip's row: its probabilities of all categories, to six digits, and what is known about it."""
    probabilities = itertools.chain.from_iterable(head.clip.tolist() for head in prediction.heads.values())
    about = (name, prediction.seconds, prediction.repeats, round(prediction.level, 2))
    return csv_line(*about, *(f"{probability:.6g}" for probability in probabilities))


# ---- labels over time


class Label(NamedTuple):
    """A category that a clip has for some time."""

    start: float  #: in seconds of the clip as it was given
    end: float
    head: str
    category: Category  #: with the mean probability over the frames in a row


class _Part(NamedTuple):
    """The part of a clip whose moments are nearest to the center of one frame."""

    start: float
    end: float
    top: Mapping[str, list[Category]]


def find_labels(prediction: Prediction) -> list[Label]:
    """Find for how long categories are in the frames' lists, sorted by start, head and probability.

    Labels of different categories overlap where the lists have more than one; those of the same do not.
    """
    runs: list[tuple[float, float, str, list[Category]]] = []
    latest: dict[tuple[str, int], int] = {}  # position in `runs`
    for part in _split_clip(prediction):
        for head, categories in part.top.items():
            for category in categories:
                key = (head, category.index)
                if key in latest and runs[latest[key]][1] == part.start:
                    start, _, _, members = runs[latest[key]]
                    runs[latest[key]] = (start, part.end, head, [*members, category])
                else:
                    latest[key] = len(runs)
                    runs.append((part.start, part.end, head, [category]))
    heads = list(prediction.heads)
    labels = [Label(start, end, head, _average(members)) for start, end, head, members in runs]
    return sorted(
        labels, key=lambda label: (label.start, heads.index(label.head), -label.category.probability)
    )


def split_between_centers(frames: Sequence[Frame], seconds: float) -> list[float]:
    """Return the times where another frame's center becomes the nearest, from 0 to the end of a clip."""
    between = [(first.center + second.center) / 2 for first, second in itertools.pairwise(frames)]
    return [0.0, *(min(max(edge, 0.0), seconds) for edge in between), seconds]


def _split_clip(prediction: Prediction) -> list[_Part]:
    """Split a clip between the centers of its frames; a repeated clip is one part with the clip's lists."""
    seconds, frames = prediction.seconds, prediction.frames
    if prediction.repeated or len(frames) == 1:
        return [_Part(0.0, seconds, {name: head.top for name, head in prediction.heads.items()})]
    parts = zip(itertools.pairwise(split_between_centers(frames, seconds)), frames, strict=True)
    return [_Part(start, end, frame.top) for (start, end), frame in parts if start < end]


def _average(categories: Sequence[Category]) -> Category:
    mean = sum(category.probability for category in categories) / len(categories)
    return categories[0]._replace(probability=mean)


def _find_cues(prediction: Prediction) -> Iterator[tuple[int, int, str]]:
    """Yield subtitles, which do not overlap: start and end in ms, and a line per object, then per scene."""

    def answers(part: _Part) -> list[tuple[str, int]]:
        return [(head, category.index) for head, categories in part.top.items() for category in categories]

    for key, group in itertools.groupby(_split_clip(prediction), answers):
        parts = list(group)
        if not key:
            continue
        start = round(1000 * parts[0].start)
        lists = (itertools.chain.from_iterable(part.top.values()) for part in parts)
        lines = [_format_line(_average(categories)) for categories in zip(*lists, strict=True)]
        yield start, max(round(1000 * parts[-1].end), start + 1), "\n".join(lines)


def _format_line(category: Category) -> str:
    percent = 100 * category.probability
    label = _shorten(_clean(category.label)).replace("-->", "→")  # which separates the times
    return f"{label} {percent:.{0 if percent >= 1 else 1}f} %"


def _clean(text: str) -> str:
    """Return a text as one line without tabs and other control characters."""
    return " ".join("".join(" " if unicodedata.category(c) == "Cc" else c for c in text).split())


def _format_time(milliseconds: int, point: str) -> str:
    seconds, milliseconds = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{seconds:02d}{point}{milliseconds:03d}"


def _write_srt(name: str, prediction: Prediction, over_time: bool) -> str:
    return "".join(
        f"{number}\n{_format_time(start, ',')} --> {_format_time(end, ',')}\n{text}\n\n"
        for number, (start, end, text) in enumerate(_find_cues(prediction), 1)
    )


def _write_vtt(name: str, prediction: Prediction, over_time: bool) -> str:
    return "".join(
        f"\n{_format_time(start, '.')} --> {_format_time(end, '.')}\n{html.escape(text, quote=False)}\n"
        for start, end, text in _find_cues(prediction)
    )


def _write_audacity(name: str, prediction: Prediction, over_time: bool) -> str:
    lines = []
    for start, end, head, category in find_labels(prediction):
        kind = f"{singularize(head)}: " if len(prediction.heads) > 1 else ""
        text = f"{kind}{_clean(category.label)} {category.probability:.4f}"
        lines.append(f"{start:.6f}\t{end:.6f}\t{text}\n")
    return "".join(lines)


def _write_raven(name: str, prediction: Prediction, over_time: bool) -> str:
    path = _clean(os.path.abspath(name)) if name not in ("", "-") else ""  # noqa: PTH100
    lines = []
    for number, (start, end, head, category) in enumerate(find_labels(prediction), 1):
        cells: tuple[object, ...] = (
            *(number, "Spectrogram 1", 1, f"{start:.6f}", f"{end:.6f}"),
            *(0, SAMPLE_RATE // 2),  # what the network hears, in Hz
            *(singularize(head), _clean(category.label), f"{category.probability:.4f}"),
            *(path, f"{start:.6f}"),
        )
        lines.append("\t".join(map(str, cells)) + "\n")
    return "".join(lines)


FORMATS: Mapping[str, TextFormat] = {
    "text": TextFormat(".txt", _write_text),
    "json": TextFormat(".json", _write_json),
    "csv": TextFormat(".csv", _write_csv, csv_line(*_CSV_HEADER)),
    "srt": TextFormat(".srt", _write_srt, labels=True),
    "vtt": TextFormat(".vtt", _write_vtt, "WEBVTT\n", labels=True),
    "audacity": TextFormat(".labels.txt", _write_audacity, labels=True),
    "raven": TextFormat(".selections.txt", _write_raven, "\t".join(_RAVEN_HEADER) + "\n", labels=True),
}
