"""Pretrained networks by name: found, or else downloaded, converted, recognized and checked first."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from soundnet_port.network.architecture import ARCHITECTURES
from soundnet_port.network.weights import (
    WeightsError,
    WeightsNotFoundError,
    build_model,
    find_weights,
    read_weights,
)

if TYPE_CHECKING:
    import torch

    from soundnet_port.network.model import SoundNet

OFFLINE = "SOUNDNET_OFFLINE"


def load_pretrained(
    name_or_path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    dtype: torch.dtype | None = None,
    download: bool = True,
) -> SoundNet:
    """Load a network with its weights, ready for use: evaluation mode, parameters frozen.

    The released networks are downloaded when they are first asked for and kept in a weights folder. For
    fine-tuning, unfreeze with `model.requires_grad_(True)`, and then call `model.train()`.

    Args:
        name_or_path: `"soundnet8"`, `"soundnet5"`, `"demo"` (a small network that comes along),
            another name of a file in the weights folders, or a path: of a `.safetensors` file, or of a
            folder with `model.safetensors`, as `soundnet_port.interop.hub` saves it.
        device: where the parameters go, such as `"cpu"` or `"cuda"`.
        dtype: float32 by default. float16 and bfloat16 take half the memory and are faster where the
            hardware has them; on the full-width reference networks they are off by 0.5 % and 4 % of
            a layer's largest value, and move a category's probability by up to 0.0017 and 0.03.
        download: whether to get a released network that is in no weights folder. With the environment
            variable `SOUNDNET_OFFLINE=1` nothing but `soundnet-port fetch` does so.

    Raises:
        WeightsError: no such weights, or they cannot be downloaded (the message lists the places and
            the commands that help), or the file is damaged or of another kind.
    """
    architecture, state, metadata = read_weights(locate_weights(name_or_path, download=download))
    model = build_model(architecture, state, metadata["categories"], device)
    return model if dtype is None else model.to(dtype)


def locate_weights(name_or_path: str | os.PathLike[str], *, download: bool = True) -> Path:
    """Return the path of weights; the released networks are downloaded if they are in no weights folder.

    Args:
        name_or_path: as for `load_pretrained`.
        download: as for `load_pretrained`.

    Raises:
        WeightsError: as `load_pretrained`.
    """
    try:
        return find_weights(name_or_path)
    except WeightsNotFoundError as error:
        name = os.fspath(name_or_path)
        if name not in ARCHITECTURES:
            raise
        if not download or is_offline():
            why = "download=False" if not download else f"{OFFLINE} is set"
            raise WeightsError(f"{error} ({why}: nothing is downloaded)") from None
    from soundnet_port.conversion.convert import ConversionError
    from soundnet_port.conversion.fetch import fetch

    try:
        errors = [result for result in fetch([str(name)]) if isinstance(result, ConversionError)]
    except ConversionError as error:
        raise WeightsError(str(error)) from None
    try:
        return find_weights(name)
    except WeightsNotFoundError as error:
        reason = errors[0] if errors else "what could be downloaded is not recognized as that network"
        raise WeightsError(f"{name}: {reason}; {error}") from None


def is_offline() -> bool:
    """Whether the environment forbids downloads."""
    return os.environ.get(OFFLINE, "").strip().lower() not in ("", "0", "false", "no", "off")
