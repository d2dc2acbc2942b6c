"""Convert Torch7 files: read, map, write, re-read, check parity, and only then name the file."""

from __future__ import annotations

import filecmp
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from soundnet_port.conversion.graph import MappingError
from soundnet_port.conversion.mapping import GraphMapping, find_soundnet, load_state
from soundnet_port.conversion.parity import TOLERANCE, ModuleParity, ParityError, check_parity
from soundnet_port.conversion.recognition import Recognition, recognize
from soundnet_port.conversion.released_parity import (
    ReleasedParity,
    ReleasedParityError,
    check_released_parity,
    recognition_metadata,
)
from soundnet_port.conversion.t7 import T7File, members, open_t7
from soundnet_port.conversion.t7_objects import T7Error
from soundnet_port.errors import SoundNetError
from soundnet_port.files import atomic_write
from soundnet_port.network.architecture import Architecture
from soundnet_port.network.categories import original_categories
from soundnet_port.network.weights import (
    SUFFIX,
    WeightsError,
    build_model,
    find_weights,
    folder_for_new_weights,
    read_metadata,
    read_weights,
    write_weights,
)
from soundnet_port.version import __version__

# (zip's member, architecture's name, recognition) -> (name of the weights, note or "")
NameChooser = Callable[[str | None, str, Recognition], tuple[str, str]]


class ConversionError(SoundNetError):
    """A file that is not converted; nothing was written for it."""


@dataclass(frozen=True)
class ConversionResult:
    """The result of a conversion or verification.

    Attributes:
        source: path of the Torch7 file, with the member's name for a zip.
        weights: path of the weights.
        form: how the file is written, such as "binary".
        metadata: as stored in the weights.
        parity: the parity check, a row per module.
        seconds: time taken without the parity checks.
        parity_seconds: time of the parity checks.
        unchanged: weights with these tensors already exist, and stay.
        recognition: whether it is the released network.
        released_parity: of the released network, the comparison with Torch7's recordings; else None.
    """

    source: str
    weights: Path
    form: str
    metadata: Mapping[str, Any]
    parity: list[ModuleParity]
    seconds: float
    parity_seconds: float
    unchanged: bool
    recognition: Recognition
    released_parity: ReleasedParity | None


def convert(
    source: str | Path,
    destination: str | Path | None = None,
    *,
    force: bool = False,
    choose_name: NameChooser | None = None,
) -> list[ConversionResult | ConversionError]:
    """Convert a Torch7 file, or each network in a zip, and check the parity of each conversion.

    Args:
        source: a .t7 file, or a zip with several (as MIT's `soundnet_models_public.zip`).
        destination: a `.safetensors` path or a folder; without it the first weights folder that
            can be written. In a folder the file gets the architecture's name.
        force: replace weights that differ.
        choose_name: returns the weights' name and a note for a zip's member, an architecture's name and a
            recognition; by default weights get the architecture's name.

    Returns:
        for each network its `ConversionResult`, or the `ConversionError` if it cannot be converted.

    Raises:
        ConversionError: the source cannot be read, or the destination does not fit it.
    """
    return list(iter_convert(source, destination, force=force, choose_name=choose_name))


def iter_convert(
    source: str | Path,
    destination: str | Path | None = None,
    *,
    force: bool = False,
    choose_name: NameChooser | None = None,
) -> Iterator[ConversionResult | ConversionError]:
    """Convert as `convert` does, and yield each result as soon as it is ready."""
    with conversion_errors(str(source)):
        names = members(source)
    target = None if destination is None else Path(destination)
    if target is not None and target.suffix == SUFFIX and not target.is_dir() and len(names) > 1:
        raise ConversionError(f"{source}: holds {len(names)} networks; give -o a folder, not {target.name}")
    written: set[Path] = set()
    for member in names:
        try:
            result = _convert_one(source, member, target, force, written, choose_name)
        except ConversionError as error:
            yield error
        except ParityError as error:
            yield ConversionError(f"{member_name(source, member)}: {error}; nothing was written")
        else:
            written.add(result.weights)
            yield result


def verify(weights: str | Path, source: str | Path) -> ConversionResult:
    """Compare existing weights with the Torch7 file they were made from.

    The tensors must be the file's bit for bit, and the parity check must pass.

    Raises:
        ParityError: they differ.
        ConversionError: the source cannot be read or is not SoundNet.
        WeightsError: the weights cannot be read.
    """
    start = time.perf_counter()
    path = find_weights(weights)
    architecture, state, metadata = read_weights(path)
    with conversion_errors(str(source)):
        names = members(source)
    errors: list[ParityError | ConversionError] = []
    for member in names:
        try:
            with open_soundnet(source, member) as (file, mapping):
                if mapping.architecture != architecture:
                    raise ParityError(
                        f"{path} is {describe(architecture)}; {file.name} is {describe(mapping.architecture)}"
                    )
                for name, array in load_state(mapping):
                    if not _bitwise_equal(array, state[name]):
                        raise ParityError(f"{path}: {name} is not what {file.name} holds")
                parity_start = time.perf_counter()
                rows = check_parity(mapping, build_model(architecture, state))
                recognition = recognize(architecture, state)
                recordings = check_released_parity(architecture, state, recognition)
                end = time.perf_counter()
                return ConversionResult(
                    file.name,
                    path,
                    file.form,
                    metadata,
                    rows,
                    parity_start - start,
                    end - parity_start,
                    True,
                    recognition,
                    recordings,
                )
        except (ParityError, ConversionError) as error:
            errors.append(error)  # another network of the zip may fit
    raise next((error for error in errors if isinstance(error, ParityError)), errors[0])


def _convert_one(
    source: str | Path,
    member: str | None,
    target: Path | None,
    force: bool,
    written: set[Path],
    choose_name: NameChooser | None,
) -> ConversionResult:
    start = time.perf_counter()
    with open_soundnet(source, member) as (file, mapping):
        state = {name: torch.from_numpy(array) for name, array in load_state(mapping)}
        architecture = mapping.architecture
        recognition = recognize(architecture, state)
        name, note = (
            choose_name(member, architecture.name, recognition) if choose_name else (architecture.name, "")
        )
        path = resolve_destination(target, name)
        if path in written:
            raise ConversionError(f"{file.name}: another network of this zip is already at {path}")
        metadata: dict[str, Any] = {
            "categories": original_categories(architecture.head_sizes),
            "source": {"sha256": file.sha256(), "bytes": file.size, "form": file.form},
            "converter": __version__,
            "ignored": [*mapping.ignored, note] if note else mapping.ignored,
        }
        with atomic_write(path) as draft:
            write_weights(draft, architecture, state, metadata)
            _, written_state, _ = read_weights(draft)
            for name, tensor in state.items():
                if not _bitwise_equal(tensor.numpy(), written_state[name]):
                    raise ConversionError(f"{file.name}: {name} was not written as it was read")
            del state
            parity_start = time.perf_counter()
            rows = check_parity(mapping, build_model(architecture, written_state))
            recordings = check_released_parity(architecture, written_state, recognition)
            parity_seconds = time.perf_counter() - parity_start
            metadata |= recognition_metadata(recognition, recordings)
            metadata["parity"] = {
                "worst": max(_round(row.relative) for row in rows),
                "tolerance": TOLERANCE,
                "layers": [[r.module, r.layer, _round(r.error), _round(r.relative)] for r in rows],
            }
            write_weights(draft, architecture, written_state, metadata)
            unchanged = keep_existing(draft, path, force)
        return ConversionResult(
            file.name,
            path,
            file.form,
            metadata,
            rows,
            time.perf_counter() - start - parity_seconds,
            parity_seconds,
            unchanged,
            recognition,
            recordings,
        )


def resolve_destination(requested: str | Path | None, name: str) -> Path:
    """Return the path of new weights: as requested, or by their name in a folder.

    Args:
        requested: a `.safetensors` path, a folder, or None for the first weights folder.
        name: of the weights.

    Raises:
        ConversionError: `requested` is another kind of file.
    """
    path = None if requested is None else Path(requested)
    if path is None or path.is_dir() or not path.suffix:
        return (path or folder_for_new_weights()) / f"{name}{SUFFIX}"
    if path.suffix != SUFFIX:
        raise ConversionError(f"{path}: weights are {SUFFIX} files; give -o such a name, or a folder")
    return path


def keep_existing(draft: Path, path: Path, force: bool) -> bool:
    """Keep existing weights if they are those of the draft, by copying them over the draft.

    Weights are the same if their tensors and categories are. From the same source file they are replaced
    all the same if the draft's metadata differ in more than the converter's version.

    Returns:
        whether the existing weights are kept.

    Raises:
        ConversionError: other weights exist at `path`, without `force`.
    """
    if not path.exists():
        return False
    if filecmp.cmp(path, draft, shallow=False):
        return True
    if force:
        return False
    different = _different_keys(path, draft)
    if different & {"sha256", "categories"}:
        raise ConversionError(
            f"{path}: other weights already exist; use --force to replace them, or another -o"
        )
    if different - {"converter"} and not different & {"source", "license"}:
        return False
    shutil.copyfile(path, draft)
    return True


@contextmanager
def open_soundnet(source: str | Path, member: str | None) -> Iterator[tuple[T7File, GraphMapping]]:
    """Open a Torch7 file, or a member of a zip, and find SoundNet in it.

    Raises:
        ConversionError: it cannot be read or is not SoundNet.
    """
    with conversion_errors(member_name(source, member)), open_t7(source, member) as file:
        yield file, find_soundnet(file)


@contextmanager
def conversion_errors(name: str) -> Iterator[None]:
    """Turn the errors of a conversion into `ConversionError`, with the file's name."""
    try:
        yield
    except (T7Error, MappingError, ReleasedParityError) as error:
        raise ConversionError(f"{name}: {error}") from None
    except WeightsError as error:
        raise ConversionError(str(error)) from None
    except OSError as error:
        raise ConversionError(f"{error.filename or name}: {error.strerror or error}") from None


def member_name(source: str | Path, member: str | None) -> str:
    """Return the path of a file, with the member's name for a zip."""
    return str(source) if member is None else f"{source}/{member}"


def describe(architecture: Architecture) -> str:
    """Describe an architecture in one line: name, widths and heads."""
    heads = ", ".join(f"{size} {head}" for head, size in architecture.head_sizes.items()) or "no heads"
    return f"{architecture.name}: widths {' '.join(map(str, architecture.widths))}; {heads}"


def _different_keys(path: Path, draft: Path) -> set[str]:
    """Keys of the draft's metadata with other values in existing weights; all, if those cannot be read."""
    after = read_metadata(draft)
    try:
        before = read_metadata(path)
    except WeightsError:
        before = {}
    return {key for key, value in after.items() if key not in before or before[key] != value}


def _bitwise_equal(array: NDArray[np.float32], tensor: torch.Tensor) -> bool:
    return np.array_equal(array.view(np.int32), tensor.numpy().view(np.int32))


def _round(value: float) -> float:
    """Round to two digits, so that the file does not depend on the last bits of a machine's arithmetic."""
    return float(f"{value:.1e}")
