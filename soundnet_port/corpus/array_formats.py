"""Files of named arrays: NumPy's npz and npy, HDF5, the original's HDF5, MATLAB.

Writers take (path, sounds, spec, part), mergers (path, parts, spec); see `formats.Format`.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from soundnet_port.corpus.features import METADATA_KEY, Features, OutputSpec
from soundnet_port.inference.torch7_files import save_h5

_MAT_HEADER = b"MATLAB 5.0 MAT-file, written by soundnet-port".ljust(116)
_MAT_HEADER_SIZE = 128  # bytes: the text, and the version
_COPY_BYTES = 1 << 20


# ---- NumPy


def write_npy(path: Path, sounds: Sequence[Features], spec: OutputSpec, part: bool) -> None:
    (features,) = sounds
    (values,) = features.arrays.values()
    with open(path, "wb") as file:
        np.save(file, values, allow_pickle=False)


def write_npz(path: Path, sounds: Sequence[Features], spec: OutputSpec, part: bool) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        if not part:
            add_array(archive, METADATA_KEY, np.array(spec.metadata_json()))
        for features in sounds:
            for name, values in features.named_arrays(part=part):
                add_array(archive, name, values)


def merge_npz(path: Path, parts: Sequence[Path], spec: OutputSpec) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        add_array(archive, METADATA_KEY, np.array(spec.metadata_json()))
        for part in parts:
            with zipfile.ZipFile(part) as source:
                for member in source.infolist():
                    large = member.file_size >= zipfile.ZIP64_LIMIT
                    with (
                        source.open(member) as values,
                        archive.open(zipfile.ZipInfo(member.filename), "w", force_zip64=large) as copy,
                    ):
                        shutil.copyfileobj(values, copy, _COPY_BYTES)


def add_array(archive: zipfile.ZipFile, name: str, values: NDArray[Any]) -> None:
    """Add an array to an npz archive as `numpy.savez` does, without a date."""
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=values.nbytes >= 1 << 30) as file:
        np.lib.format.write_array(file, values, allow_pickle=False)


# ---- HDF5


def write_h5(path: Path, sounds: Sequence[Features], spec: OutputSpec, part: bool) -> None:
    attributes = {} if part else {METADATA_KEY: spec.metadata_json()}
    arrays = [item for features in sounds for item in features.named_arrays(part=part)]
    save_h5(path, arrays, attributes)


def merge_h5(path: Path, parts: Sequence[Path], spec: OutputSpec) -> None:
    import h5py

    with h5py.File(path, "w") as merged:
        merged.attrs[METADATA_KEY] = spec.metadata_json()

        def copy(name: str, node: Any) -> None:
            if isinstance(node, h5py.Dataset):
                merged.create_dataset(name, data=node[()])

        for part in parts:
            with h5py.File(part) as source:
                source.visititems(copy)


def write_torch7(path: Path, sounds: Sequence[Features], spec: OutputSpec, part: bool) -> None:
    """Write what extract_feat.lua writes: one dataset, (channels, frames), squeezed."""
    (features,) = sounds
    ((layer, values),) = features.arrays.items()
    module = spec.metadata["modules"][layer]
    save_h5(path, [(f"layer{module}", np.ascontiguousarray(values.T.squeeze()))], {})


# ---- MATLAB


def write_mat(path: Path, sounds: Sequence[Features], spec: OutputSpec, part: bool) -> None:
    with open(path, "wb+") as file:
        if not part:
            _add_variable(file, METADATA_KEY, spec.metadata_json())
        for features in sounds:
            for name, values in features.named_arrays(part=part):
                _add_variable(file, name, values)
        _write_header(file)


def merge_mat(path: Path, parts: Sequence[Path], spec: OutputSpec) -> None:
    """Concatenate the parts' variables, which follow the header."""
    with open(path, "wb+") as merged:
        _add_variable(merged, METADATA_KEY, spec.metadata_json())
        for part in parts:
            with open(part, "rb") as source:
                source.seek(_MAT_HEADER_SIZE)
                shutil.copyfileobj(source, merged, _COPY_BYTES)
        _write_header(merged)


def mat_name(name: str) -> str:
    """Return a variable's name in ASCII; MATLAB hides names with a leading underscore."""
    escaped = name.encode("ascii", "backslashreplace").decode()
    return f"x{escaped}" if escaped.startswith("_") else escaped


def _add_variable(file: IO[bytes], name: str, values: object) -> None:
    from scipy.io import savemat

    savemat(file, {mat_name(name): values}, appendmat=False, oned_as="row")


def _write_header(file: IO[bytes]) -> None:
    """Replace the header's text, which contains the time of day."""
    if file.tell() < _MAT_HEADER_SIZE:  # a part without variables
        file.write(bytes(_MAT_HEADER_SIZE - file.tell()))
    file.seek(0)
    file.write(_MAT_HEADER)
