"""The device a run computes on, by name, through Lightning Fabric."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from soundnet_port.errors import require
from soundnet_port.learning.errors import TrainingError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


def create_fabric(
    device: str = "auto", *, devices: int = 1, strategy: str = "auto", precision: str = "32-true"
) -> Fabric:
    """Create a Lightning Fabric for a device; `fabric.launch(function, ...)` runs there.

    Args:
        device: "cpu", "cuda", "cuda:1", "mps", or "auto" for the best one available.
        devices: number of devices of that kind; -1 for all.
        strategy: "auto" is one process for one device, and DistributedDataParallel for several, in
            spawned processes or, under torchrun, in those it started.
        precision: "32-true", "bf16-mixed" or "16-mixed".

    Raises:
        TrainingError: no such device or precision.
        MissingExtraError: the extra `[learn]` is not installed.
    """
    require("matplotlib", "learn")  # draws the curves, after hours
    fabric = require("lightning_fabric", "learn").Fabric
    if precision not in PRECISIONS:
        raise TrainingError(f"unknown precision {precision!r}; choose from {', '.join(PRECISIONS)}")
    kind, _, index = device.partition(":")
    if index and (devices != 1 or not index.isdecimal()):
        raise TrainingError(f"device {device}: names one device; use {kind} with {devices} devices")
    if strategy == "auto" and devices != 1:
        strategy = "ddp" if "TORCHELASTIC_RUN_ID" in os.environ else "ddp_spawn"
    chosen = [int(index)] if index else "auto" if devices == -1 else devices
    try:
        created: Fabric = fabric(accelerator=kind, devices=chosen, strategy=strategy, precision=precision)
    except (RuntimeError, ValueError, TypeError) as error:  # Lightning's own errors are among these
        reason = str(error).splitlines()[0]
        raise TrainingError(f"device {device}, {devices} of them, {precision}: {reason}") from None
    return created


def is_first_process() -> bool:
    """Tell whether this process reports and writes; launchers such as torchrun start several."""
    rank = getattr(require("lightning_fabric.utilities.rank_zero", "learn").rank_zero_only, "rank", 0)
    return bool(rank == 0)
