"""The original's output files: HDF5 beside each sound, named as its Lua scripts do."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from soundnet_port.errors import require
from soundnet_port.files import atomic_write
from soundnet_port.inference.prediction import Prediction


def save_h5(path: Path, arrays: Sequence[tuple[str, NDArray[Any]]], attributes: Mapping[str, str]) -> None:
    """Write arrays as datasets of an HDF5 file.

    The file is built in memory: on a full disk HDF5 itself floods the terminal and cannot close the file.
    """
    h5py = require("h5py", "hdf5")
    with h5py.File(path.name, "w", driver="core", backing_store=False) as file:
        group: Any = file
        group.attrs.update(attributes)
        for key, values in arrays:
            group.create_dataset(key, data=values)
        file.flush()
        path.write_bytes(group.id.get_file_image())


def write_torch7_features(sound: str | os.PathLike[str], number: int, frames: Tensor) -> Path:
    """Write what extract_feat.lua wrote: `<sound>.soundnet.h5` with the dataset `layer<N>`.

    Args:
        sound: the sound file's path; the result lies beside it.
        number: Torch7's module number.
        frames: (channels, frames); squeezed in the file, so that one frame gives (channels,).
    """
    path = torch7_path(sound, "soundnet")
    _write_h5(path, {f"layer{number}": frames.squeeze()})
    return path


def write_torch7_prediction(sound: str | os.PathLike[str], prediction: Prediction) -> Path:
    """Write what extract_predictions.lua wrote: `<sound>.soundnet_categories.h5`.

    Datasets `object` (1, 1000, frames, 1) and `scene` (1, 401, frames, 1): probabilities.
    """
    path = torch7_path(sound, "soundnet_categories")
    _write_h5(
        path,
        {
            "object": prediction.object_probabilities[None, :, :, None],
            "scene": prediction.scene_probabilities[None, :, :, None],
        },
    )
    return path


def torch7_path(sound: str | os.PathLike[str], kind: str) -> Path:
    """Return the path of the original's result, with its suffix after the sound's own."""
    return Path(f"{os.fspath(sound)}.{kind}.h5")


def _write_h5(path: Path, datasets: dict[str, Tensor]) -> None:
    try:
        with atomic_write(path) as temporary:
            save_h5(temporary, [(name, values.numpy()) for name, values in datasets.items()], {})
    except OSError as error:  # ends this file, not a whole batch of them
        raise ValueError(f"{path}: cannot be written ({error.strerror or error})") from None
