"""Conversion as a whole: read, map, write, re-read, prove, and only then give the file its name."""

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

from soundnet_port.conversion.mapping import Found, NotSoundNet, find_soundnet, load_state
from soundnet_port.conversion.proof import TOLERANCE, ParityFailed, Row, check_parity
from soundnet_port.conversion.recognition import WHOLE, Recognition, recognize
from soundnet_port.conversion.released_parity import Parity, ParityError, compare_with_torch7
from soundnet_port.conversion.t7 import T7Error, T7File, members, open_t7
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
Naming = Callable[[str | None, str, Recognition], tuple[str, str]]


class ConversionError(SoundNetError):
    """A file that is not converted: which, and why. Nothing was written for it."""


@dataclass(frozen=True)
class ConversionResult:
    """What a conversion or verification found.

    Attributes:
        source: path of the Torch7 file, with the member's name for a zip.
        weights: path of the weights.
        form: how the file is written, such as "binary".
        metadata: as stored in the weights.
        proof: a row per module.
        seconds: time taken without the proof.
        proof_seconds: time that the proof took.
        unchanged: weights with these tensors were there already, and stay.
        recognition: whether it is the released network.
        parity: the comparison with Torch7's recordings, of the released network; else None.
    """

    source: str
    weights: Path
    form: str
    metadata: Mapping[str, Any]
    proof: list[Row]
    seconds: float
    proof_seconds: float
    unchanged: bool
    recognition: Recognition
    parity: Parity | None


def convert(
    source: str | Path,
    destination: str | Path | None = None,
    *,
    force: bool = False,
    naming: Naming | None = None,
) -> Iterator[ConversionResult | ConversionError]:
    """Converts a Torch7 file, or each network in a zip, and proves each conversion.

    Args:
        source: a .t7 file, or a zip with several (as MIT's `soundnet_models_public.zip`).
        destination: a `.safetensors` path or a folder; without it the first weights folder that
            can be written. In a folder the file gets the architecture's name.
        force: replace weights that differ.
        naming: gives the weights' name and a note, by the zip's member, the architecture's name and the
            recognition; without it, the architecture's name.

    Yields:
        for each network its `ConversionResult`, or `ConversionError` where it is not converted.

    Raises:
        Refused: nothing at all can be converted.
    """
    with refusals(str(source)):
        inside = members(source)
    target = None if destination is None else Path(destination)
    if target is not None and target.suffix == SUFFIX and not target.is_dir() and len(inside) > 1:
        raise ConversionError(f"{source}: holds {len(inside)} networks; give -o a folder, not {target.name}")
    written: set[Path] = set()
    for member in inside:
        try:
            report = _convert_one(source, member, target, force, written, naming)
        except ConversionError as refusal:
            yield refusal
        except ParityFailed as failure:
            yield ConversionError(f"{member_name(source, member)}: {failure}; nothing was written")
        else:
            written.add(report.weights)
            yield report


def verify(weights: str | Path, source: str | Path) -> ConversionResult:
    """Proves existing weights against the Torch7 file they were made from.

    The tensors must be the file's bit for bit, and the file's own graph must agree.

    Raises:
        ProofFailed: they differ.
        Refused: the source cannot be read or is not SoundNet.
        WeightsError: the weights cannot be read.
    """
    start = time.perf_counter()
    path = find_weights(weights)
    architecture, state, metadata = read_weights(path)
    with refusals(str(source)):
        inside = members(source)
    others: list[ParityFailed | ConversionError] = []
    for member in inside:
        try:
            with opened_soundnet(source, member) as (file, found):
                if found.architecture != architecture:
                    raise ParityFailed(
                        f"{path} is {describe(architecture)}; {file.name} is {describe(found.architecture)}"
                    )
                for name, array in load_state(found):
                    if not _same_bits(array, state[name]):
                        raise ParityFailed(f"{path}: {name} is not what {file.name} holds")
                proof_start = time.perf_counter()
                rows = check_parity(found, build_model(architecture, state))
                recognition = recognize(architecture, state)
                parity = released_parity(architecture, state, recognition)
                now = time.perf_counter()
                return ConversionResult(
                    file.name,
                    path,
                    file.form,
                    metadata,
                    rows,
                    proof_start - start,
                    now - proof_start,
                    True,
                    recognition,
                    parity,
                )
        except (ParityFailed, ConversionError) as error:
            others.append(error)  # another network of the zip may be the one
    raise next((error for error in others if isinstance(error, ParityFailed)), others[0])


def released_parity(
    architecture: Architecture, state: Mapping[str, torch.Tensor], recognition: Recognition
) -> Parity | None:
    """Compare the released network, if it is that, with Torch7's recordings.

    Raises:
        ParityError: this machine does not compute what Torch7 computed.
    """
    if recognition.released != WHOLE:
        return None
    parity = compare_with_torch7(build_model(architecture, state))
    if not parity.passed:
        worst = parity.worst
        raise ParityError(
            f"the released network, but {worst.layer} ({worst.computed_by}) is off Torch7's recording by "
            f"{worst.relative:.1e} on this machine ({worst.tolerance:.0e} is allowed); nothing was written"
        )
    return parity


def recognized_metadata(recognition: Recognition, parity: Parity | None) -> dict[str, Any]:
    """What weights keep of a recognition and of the comparison with Torch7's recordings."""
    return {
        "released": recognition.released,
        "recognition": recognition.summary,
        "torch7_parity": parity.to_metadata() if parity else {},
    }


def _convert_one(
    source: str | Path,
    member: str | None,
    target: Path | None,
    force: bool,
    written: set[Path],
    naming: Naming | None,
) -> ConversionResult:
    start = time.perf_counter()
    with opened_soundnet(source, member) as (file, found):
        state = {name: torch.from_numpy(array) for name, array in load_state(found)}
        architecture = found.architecture
        recognition = recognize(architecture, state)
        name, note = naming(member, architecture.name, recognition) if naming else (architecture.name, "")
        path = destination_of(target, name)
        if path in written:
            raise ConversionError(f"{file.name}: another network of this zip is already at {path}")
        metadata: dict[str, Any] = {
            "categories": original_categories(architecture.head_sizes),
            "source": {"sha256": file.sha256(), "bytes": file.size, "form": file.form},
            "converter": __version__,
            "ignored": [*found.ignored, note] if note else found.ignored,
        }
        with atomic_write(path) as draft:
            write_weights(draft, architecture, state, metadata)
            _, again, _ = read_weights(draft)
            for name, tensor in state.items():
                if not _same_bits(tensor.numpy(), again[name]):
                    raise ConversionError(f"{file.name}: {name} was not written as it was read")
            del state
            proof_start = time.perf_counter()
            rows = check_parity(found, build_model(architecture, again))
            parity = released_parity(architecture, again, recognition)
            proof_seconds = time.perf_counter() - proof_start
            metadata |= recognized_metadata(recognition, parity)
            metadata["proof"] = {
                "worst": max(_rounded(row.relative) for row in rows),
                "tolerance": TOLERANCE,
                "layers": [[r.module, r.layer, _rounded(r.error), _rounded(r.relative)] for r in rows],
            }
            write_weights(draft, architecture, again, metadata)
            unchanged = placed(draft, path, force)
        return ConversionResult(
            file.name,
            path,
            file.form,
            metadata,
            rows,
            time.perf_counter() - start - proof_seconds,
            proof_seconds,
            unchanged,
            recognition,
            parity,
        )


def destination_of(asked: str | Path | None, name: str) -> Path:
    """The path of new weights: as asked, or under their name in the folder asked for or the first one."""
    path = None if asked is None else Path(asked)
    if path is None or path.is_dir() or not path.suffix:
        return (path or folder_for_new_weights()) / f"{name}{SUFFIX}"
    if path.suffix != SUFFIX:
        raise ConversionError(f"{path}: weights are {SUFFIX} files; give -o such a name, or a folder")
    return path


def placed(draft: Path, path: Path, force: bool) -> bool:
    """Whether the network of a draft is at its place already; refused if other weights are there.

    The same tensors from another source are the same network: those that are there stay.
    """
    if not path.exists():
        return False
    if filecmp.cmp(path, draft, shallow=False):
        return True
    if force:
        return False
    same = _same_parts(path, draft)
    if "sha256" not in same or "categories" not in same:
        raise ConversionError(
            f"{path}: other weights are there already; --force replaces them, -o names another place"
        )
    if {"source", "license"} <= same:
        return False  # from the same file; what this version says of it takes the place
    shutil.copyfile(path, draft)
    return True


@contextmanager
def opened_soundnet(source: str | Path, member: str | None) -> Iterator[tuple[T7File, Found]]:
    """Open a Torch7 file, or a member of a zip, and find SoundNet in it."""
    with refusals(member_name(source, member)), open_t7(source, member) as file:
        yield file, find_soundnet(file)


@contextmanager
def refusals(name: str) -> Iterator[None]:
    """Names the file in whatever stops its conversion."""
    try:
        yield
    except (T7Error, NotSoundNet, ParityError) as error:
        raise ConversionError(f"{name}: {error}") from None
    except WeightsError as error:
        raise ConversionError(str(error)) from None
    except OSError as error:
        raise ConversionError(f"{error.filename or name}: {error.strerror or error}") from None


def member_name(source: str | Path, member: str | None) -> str:
    return str(source) if member is None else f"{source}/{member}"


def describe(a: Architecture) -> str:
    heads = ", ".join(f"{n} {head}" for head, n in a.head_sizes.items()) or "no heads"
    return f"{a.name}: widths {' '.join(map(str, a.widths))}; {heads}"


def _same_parts(path: Path, draft: Path) -> set[str]:
    """What two weights files have in common, by the keys of their metadata; empty if one cannot be read."""
    try:
        before, after = (read_metadata(each) for each in (path, draft))
    except WeightsError:
        return set()
    return {key for key, value in after.items() if before.get(key) == value}


def _same_bits(array: NDArray[np.float32], tensor: torch.Tensor) -> bool:
    return np.array_equal(array.view(np.int32), tensor.numpy().view(np.int32))


def _rounded(value: float) -> float:
    """Two digits: what is stored must not hang on the last bits of a machine's arithmetic."""
    return float(f"{value:.1e}")
