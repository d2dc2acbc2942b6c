"""Conversion as a whole: read, map, write, re-read, prove, and only then give the file its name."""

from __future__ import annotations

import filecmp
import importlib.resources
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import soundnet_port
from soundnet_port.architecture import Architecture
from soundnet_port.categories import original_categories
from soundnet_port.conversion.mapping import Found, NotSoundNet, find_soundnet, load_state
from soundnet_port.conversion.proof import TOLERANCE, ProofFailed, Row, prove
from soundnet_port.conversion.t7 import T7Error, T7File, members, open_t7
from soundnet_port.weights import (
    SUFFIX,
    WeightsError,
    build,
    find_weights,
    folder_for_new_weights,
    read_metadata,
    read_weights,
    write_weights,
    written_aside,
)


class Refused(ValueError):
    """A file that is not converted: which, and why. Nothing was written for it."""


@dataclass(frozen=True)
class Report:
    """What a conversion or verification found.

    Attributes:
        source: path of the Torch7 file, with the member's name for a zip.
        weights: path of the weights.
        form: how the file is written, such as "binary".
        metadata: as stored in the weights.
        proof: a row per module.
        seconds: time taken without the proof.
        proof_seconds: time that the proof took.
        unchanged: the weights were there already, byte for byte.
    """

    source: str
    weights: Path
    form: str
    metadata: Mapping[str, Any]
    proof: list[Row]
    seconds: float
    proof_seconds: float
    unchanged: bool = False


def convert(
    source: str | Path, destination: str | Path | None = None, *, force: bool = False
) -> Iterator[Report | Refused]:
    """Converts a Torch7 file, or each network in a zip, and proves each conversion.

    Args:
        source: a .t7 file, or a zip with several (as MIT's `soundnet_models_public.zip`).
        destination: a `.safetensors` path or a folder; without it the first weights folder that
            can be written. In a folder the file gets the architecture's name.
        force: replace weights that differ.

    Yields:
        for each network its `Report`, or `Refused` where it is not converted.

    Raises:
        Refused: nothing at all can be converted.
    """
    with refusals(str(source)):
        inside = members(source)
    target = None if destination is None else Path(destination)
    if target is not None and target.suffix == SUFFIX and not target.is_dir() and len(inside) > 1:
        raise Refused(f"{source}: holds {len(inside)} networks; give -o a folder, not {target.name}")
    written: set[Path] = set()
    for member in inside:
        try:
            report = _convert_one(source, member, target, force, written)
        except Refused as refusal:
            yield refusal
        except ProofFailed as failure:
            yield Refused(f"{member_name(source, member)}: {failure}; nothing was written")
        else:
            written.add(report.weights)
            yield report


def verify(weights: str | Path, source: str | Path) -> Report:
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
    others: list[ProofFailed | Refused] = []
    for member in inside:
        try:
            with _opened(source, member) as (file, found):
                if found.architecture != architecture:
                    raise ProofFailed(
                        f"{path} is {describe(architecture)}; {file.name} is {describe(found.architecture)}"
                    )
                for name, array in load_state(found):
                    if not _same_bits(array, state[name]):
                        raise ProofFailed(f"{path}: {name} is not what {file.name} holds")
                proof_start = time.perf_counter()
                rows = prove(found, build(architecture, state))
                now = time.perf_counter()
                return Report(
                    file.name, path, file.form, metadata, rows, proof_start - start, now - proof_start
                )
        except (ProofFailed, Refused) as error:
            others.append(error)  # another network of the zip may be the one
    raise next((error for error in others if isinstance(error, ProofFailed)), others[0])


def is_released_front(state: Mapping[str, NDArray[np.float32] | torch.Tensor]) -> bool:
    """Whether conv1, bn1, conv2 and bn2 are those of MIT's released 8-layer network.

    Held against published figures of that network, so it can be told without the file ever having
    been here. A network that was fine-tuned behind a frozen front is recognised as well.
    """
    figures = json.loads(
        importlib.resources.files(__package__).joinpath("official_front_figures.json").read_text("utf-8")
    )
    for name, expected in figures.items():
        if name.startswith("_"):
            continue
        tensor, _, statistic = name.rpartition(".")
        if statistic.endswith("_per_filter"):
            filters = np.asarray(state[tensor], np.float64)
            filters = filters.reshape(len(filters), -1)
            measured = (
                np.linalg.norm(filters, axis=1) if statistic.startswith("l2_norm") else filters.sum(axis=1)
            )
        else:
            measured = np.asarray(state[name], np.float64)
        if measured.shape != np.shape(expected) or not np.allclose(measured, expected, rtol=1e-5, atol=1e-6):
            return False
    return True


def _convert_one(
    source: str | Path, member: str | None, target: Path | None, force: bool, written: set[Path]
) -> Report:
    start = time.perf_counter()
    with _opened(source, member) as (file, found):
        state = {name: torch.from_numpy(array) for name, array in load_state(found)}
        architecture = found.architecture
        path = destination_of(target, architecture.name)
        if path in written:
            raise Refused(f"{file.name}: another network of this zip is already at {path}")
        metadata: dict[str, Any] = {
            "categories": original_categories(architecture.head_sizes),
            "source": {"sha256": file.sha256(), "bytes": file.size, "form": file.form},
            "converter": soundnet_port.__version__,
            "released_front": architecture.name == "soundnet8" and is_released_front(state),
            "ignored": found.ignored,
        }
        with written_aside(path) as draft:
            write_weights(draft, architecture, state, metadata)
            _, again, _ = read_weights(draft)
            for name, tensor in state.items():
                if not _same_bits(tensor.numpy(), again[name]):
                    raise Refused(f"{file.name}: {name} was not written as it was read")
            del state
            proof_start = time.perf_counter()
            rows = prove(found, build(architecture, again))
            proof_seconds = time.perf_counter() - proof_start
            metadata["proof"] = {
                "worst": max(_rounded(row.relative) for row in rows),
                "tolerance": TOLERANCE,
                "layers": [[r.module, r.layer, _rounded(r.error), _rounded(r.relative)] for r in rows],
            }
            write_weights(draft, architecture, again, metadata)
            unchanged = placed(draft, path, force)
        return Report(
            file.name,
            path,
            file.form,
            metadata,
            rows,
            time.perf_counter() - start - proof_seconds,
            proof_seconds,
            unchanged,
        )


def destination_of(asked: str | Path | None, name: str) -> Path:
    """The path of new weights: as asked, or under their name in the folder asked for or the first one."""
    path = None if asked is None else Path(asked)
    if path is None or path.is_dir() or not path.suffix:
        return (path or folder_for_new_weights()) / f"{name}{SUFFIX}"
    if path.suffix != SUFFIX:
        raise Refused(f"{path}: weights are {SUFFIX} files; give -o such a name, or a folder")
    return path


def placed(draft: Path, path: Path, force: bool) -> bool:
    """Whether a draft equals what is at its place already; refused if other weights are there."""
    unchanged = path.exists() and filecmp.cmp(path, draft, shallow=False)
    if path.exists() and not (unchanged or force or _same_network(path, draft)):
        raise Refused(
            f"{path}: other weights are there already; --force replaces them, -o names another place"
        )
    return unchanged


@contextmanager
def _opened(source: str | Path, member: str | None) -> Iterator[tuple[T7File, Found]]:
    with refusals(member_name(source, member)), open_t7(source, member) as file:
        yield file, find_soundnet(file)


@contextmanager
def refusals(name: str) -> Iterator[None]:
    """Names the file in whatever stops its conversion."""
    try:
        yield
    except (T7Error, NotSoundNet) as error:
        raise Refused(f"{name}: {error}") from None
    except WeightsError as error:
        raise Refused(str(error)) from None
    except OSError as error:
        raise Refused(f"{error.filename or name}: {error.strerror or error}") from None


def member_name(source: str | Path, member: str | None) -> str:
    return str(source) if member is None else f"{source}/{member}"


def describe(a: Architecture) -> str:
    heads = ", ".join(f"{n} {head}" for head, n in a.head_sizes.items()) or "no heads"
    return f"{a.name}: widths {' '.join(map(str, a.widths))}; {heads}"


def _same_network(path: Path, draft: Path) -> bool:
    """Whether weights differ at most in the figures of their proofs, as between processors."""
    try:
        before, after = (read_metadata(each) for each in (path, draft))
    except WeightsError:
        return False
    return {**before, "proof": None, "converter": None} == {**after, "proof": None, "converter": None}


def _same_bits(array: NDArray[np.float32], tensor: torch.Tensor) -> bool:
    return np.array_equal(array.view(np.int32), tensor.numpy().view(np.int32))


def _rounded(value: float) -> float:
    """Two digits: what is stored must not hang on the last bits of a machine's arithmetic."""
    return float(f"{value:.1e}")
