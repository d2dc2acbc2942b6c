"""How long work tells where it is: one kind of report, passed to one kind of callback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """A report from a run that takes long.

    Attributes:
        done: how many units of work are finished, those of earlier runs included.
        total: how many there are.
        unit: what is counted, in the singular: "file", "epoch", "step".
        note: figures of the moment, such as "loss 0.31"; may be empty.
        message: a line worth keeping, such as why an input failed or the figures of an epoch; may be empty.
    """

    done: int
    total: int
    unit: str
    note: str = ""
    message: str = ""


ProgressCallback = Callable[[Progress], None]
