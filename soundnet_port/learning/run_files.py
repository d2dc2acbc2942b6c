"""The files of a training run: settings, checkpoint, log, curves and weights.

A run can be killed at any time. Its checkpoint is one file, replaced atomically; the log is cut back to
the checkpoint's step when the run resumes, so no row appears twice.
"""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from soundnet_port.errors import require
from soundnet_port.files import atomic_write
from soundnet_port.learning.errors import TrainingError
from soundnet_port.network.weights import cpu_state_dict, write_weights
from soundnet_port.version import __version__

if TYPE_CHECKING:
    from soundnet_port.network.model import SoundNet

CHECKPOINT, LOG, CURVES, WEIGHTS = "checkpoint.pt", "log.csv", "curves.png", "weights.safetensors"


class Log:
    """A CSV file with a row per step, in ascending order; a context manager.

    Args:
        path: of the file.
        fields: column names; the first one is "step".
        step: rows after this step are removed; 0 starts a new file.

    Raises:
        TrainingError: the file has other columns.
    """

    def __init__(self, path: str | os.PathLike[str], fields: Sequence[str], step: int = 0) -> None:
        self.path = Path(path)
        kept: list[list[str]] = []
        if step and self.path.exists():
            header, *rows = _read_rows(self.path)
            if header != list(fields):
                raise TrainingError(
                    f"{path}: a log with the columns {', '.join(header)}, not {', '.join(fields)}"
                )
            # a row cut short by a killed run is after the checkpoint
            kept = [row for row in rows if len(row) == len(fields) and int(row[0]) <= step]
        with (
            atomic_write(self.path) as temporary,
            open(temporary, "w", newline="", encoding="utf-8") as file,
        ):
            csv.writer(file, lineterminator="\n").writerows([fields, *kept])
        self._file = open(self.path, "a", newline="", encoding="utf-8")  # noqa: SIM115  (closed in __exit__)
        self._writer = csv.DictWriter(self._file, fields, restval="", lineterminator="\n")

    def write(self, **row: object) -> None:
        """Add a row; columns without a value stay empty."""
        self._writer.writerow(row)

    def flush(self) -> None:
        """Write all rows to disk; call it before saving the checkpoint of the same step."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.flush()
        self._file.close()


def _read_rows(path: Path) -> list[list[str]]:
    try:
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            return list(csv.reader(file)) or [[]]
    except csv.Error as error:
        raise TrainingError(f"{path}: not a training log ({error})") from None


def plot_curves(log: str | os.PathLike[str], png: str | os.PathLike[str]) -> None:
    """Plot a log as a PNG: a panel per column over the steps.

    Columns whose names differ only by a leading "validation " share a panel.

    Raises:
        TrainingError: the file is no log.
        MissingExtraError: the extra `[learn]` is not installed.
    """
    figure_class = require("matplotlib.figure", "learn").Figure
    header, *rows = _read_rows(Path(log))
    panels: dict[str, list[int]] = {}
    for column, name in enumerate(header[1:], 1):
        panels.setdefault(name.removeprefix("validation "), []).append(column)
    lines, columns_wide = -(-len(panels) // 3), min(3, len(panels))
    figure = figure_class(figsize=(5 * max(1, columns_wide), 3.5 * lines or 3.5))
    for number, (name, columns) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(lines, columns_wide, number)
        for column in columns:
            points = [(int(row[0]), float(row[column])) for row in rows if row[column]]
            marker = "." if len(points) < 50 else ""
            if points:
                axes.plot(*zip(*points, strict=True), label=header[column], marker=marker, linewidth=1)
        axes.set_title(name)
        axes.set_xlabel(header[0])
        if axes.lines:
            axes.legend()
    figure.tight_layout()
    with atomic_write(png) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def read_result_file(path: Path) -> dict[str, Any] | None:
    """Read the JSON object that a run ends with; None if there is no file.

    Raises:
        TrainingError: it is damaged.
    """
    try:
        result = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path}: {error}; remove it to start over") from None
    if not isinstance(result, dict):
        raise TrainingError(f"{path}: not the result of a run; remove it to start over")
    return result


@contextmanager
def reading_result(path: Path) -> Iterator[None]:
    """Report values that are missing in the result of a run, or of another type.

    Raises:
        TrainingError: there are some.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise TrainingError(f"{path}: damaged ({reason}); remove it to start over") from None


def save_checkpoint(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Save a checkpoint atomically: tensors, numbers, text, and dicts and lists of them."""
    buffer = io.BytesIO()  # torch turns a full disk into a RuntimeError without a reason
    torch.save(dict(state), buffer)
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load a checkpoint, tensors onto the CPU, without running code in it (`weights_only`).

    Raises:
        TrainingError: the file is damaged or no checkpoint.
        OSError: it cannot be opened.
    """
    try:
        with open(path, "rb") as file:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, KeyError, EOFError, AttributeError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(
            f"{path}: damaged, or not a checkpoint ({reason}); remove it to start over"
        ) from None
    if not isinstance(state, dict):
        raise TrainingError(f"{path}: not a checkpoint; remove it to start over")
    return state


def check_settings(
    folder: Path, kind: str, saved: Any, current: Mapping[str, Any], variable: Sequence[str] = ()
) -> None:
    """Check that a folder's run can resume with these settings.

    Args:
        folder: of the run.
        kind: what the message calls the run.
        saved: the settings it was started with; anything but a mapping differs from all settings. Another
            `kind` among them is all that the message names.
        current: the settings to resume with.
        variable: keys that may differ.

    Raises:
        TrainingError: other settings differ; the message names each.
    """
    old = saved if isinstance(saved, Mapping) else {}
    if old.get("kind") != current.get("kind"):
        raise TrainingError(f"{folder}: holds another kind of run; use another folder")
    different = [key for key in {**current, **old} if old.get(key) != current.get(key)]
    texts = [
        f"{key} {old.get(key)} there, {current.get(key)} now" for key in different if key not in variable
    ]
    if texts:
        raise TrainingError(
            f"{folder}: holds a {kind} with other settings ({'; '.join(texts)}); "
            "use the same ones to resume, or another folder"
        )


def write_trained_weights(path: str | os.PathLike[str], model: SoundNet, training: Mapping[str, Any]) -> None:
    """Write a network's weights in float32, with how they were trained as metadata."""
    metadata = {
        "categories": {head: list(names) for head, names in model.categories.items()} or None,
        "source": {"form": "training"},
        "converter": __version__,
        "training": training,
    }
    write_weights(path, model.architecture, cpu_state_dict(model, torch.float32), metadata)
