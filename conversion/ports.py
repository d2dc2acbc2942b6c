"""Weights that other ports of SoundNet made: `sound8.npy` (TensorFlow, Keras) and PyTorch state dicts.

Such files hold tensors without the graph that they come from, so there is nothing to run a proof
against. What can be said is said: which tensors are missing, whether conv1 and conv2 are those of
the released network, and, where weights converted from Torch7 are at hand, how far from them each
module is. No pickle is ever executed: a `.npy` goes through a reader that only builds data, a state
dict through torch's `weights_only`.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import time
import tokenize
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy_format
from torch import Tensor

import soundnet_port
from soundnet_port.architecture import ARCHITECTURES, BATCH_NORM_EPS, Architecture
from soundnet_port.categories import original_categories
from soundnet_port.conversion.convert import Refused, describe, destination_of, is_released_front, placed
from soundnet_port.conversion.pickled import Made, as_array, text, unpickled
from soundnet_port.conversion.proof import SAMPLES, proof_signal
from soundnet_port.conversion.t7 import shown
from soundnet_port.weights import (
    WeightsError,
    build,
    find_weights,
    read_weights,
    write_weights,
    written_aside,
)

MAX_BYTES = 1 << 30  # SoundNet-8 takes 57 MB
NPY, STATE_DICT = "npy of the TensorFlow port", "PyTorch state dict"

# The names in such a dict, and ours
_NPY_FIELDS = {
    "weights": "weight",
    "biases": "bias",
    "gamma": "weight",
    "beta": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_NORM_FIELDS = ("weight", "bias", "running_mean", "running_var")
_HEAD_HINTS = {"objects": ("obj", "imagenet"), "scenes": ("sc", "place")}


@dataclass(frozen=True)
class Difference:
    """One module of a port's weights beside converted ones.

    Attributes:
        layer: "conv1", "bn1", ..., "objects", "scenes".
        parameters: largest difference of its tensors, relative to each tensor's largest value.
        output: the same of its output for the proof's test sound, with all that lies before it.
    """

    layer: str
    parameters: float
    output: float


@dataclass(frozen=True)
class PortReport:
    """What came of a port's weights; `against` and `differences` where there was something to compare."""

    source: str
    weights: Path
    form: str
    metadata: Mapping[str, Any]
    against: Path | None
    differences: list[Difference]
    seconds: float
    unchanged: bool


@dataclass
class Tensors:
    """What a port's file holds, in SoundNet's order.

    Attributes:
        form: `NPY` or `STATE_DICT`.
        convolutions: (name in the file, {"weight", "bias"}), weight (out, in, kernel).
        norms: (name in the file, what it has of `_NORM_FIELDS`).
        rest: names of what was not used.
    """

    form: str
    convolutions: list[tuple[str, dict[str, Tensor]]] = field(default_factory=list)
    norms: list[tuple[str, dict[str, Tensor]]] = field(default_factory=list)
    rest: list[str] = field(default_factory=list)


def form_of(path: str | Path) -> str | None:
    """`NPY` or `STATE_DICT` by the file's first bytes; None for all else, and for what cannot be read."""
    try:
        with open(path, "rb") as file:
            start = file.read(6)
        if start == npy_format.MAGIC_PREFIX:
            return NPY
        if start[:1] == b"\x80":  # a pickle: torch's form before 1.6
            return STATE_DICT
        if start[:2] == b"PK":
            with zipfile.ZipFile(path) as archive:
                return STATE_DICT if any(n.endswith("/data.pkl") for n in archive.namelist()) else None
    except (OSError, ValueError, zipfile.BadZipFile):
        pass
    return None


def convert_port(
    source: str | Path,
    destination: str | Path | None = None,
    *,
    against: str | Path | None = None,
    force: bool = False,
) -> PortReport:
    """Converts another port's weights, and compares them with ones converted from Torch7.

    Args:
        source: a `.npy` or a file with a PyTorch state dict.
        destination: as for `convert`, but in a folder, or without it, the file keeps its own name:
            the names of architectures are for what was proven.
        against: weights to compare with; without it those of the architecture's name, if there are any.
        force: replace weights that differ.

    Raises:
        Refused: it is not SoundNet, or something is missing or wrong; nothing was written.
    """
    start = time.perf_counter()
    path = Path(source)
    tensors = read_port(path)
    with _naming(path):
        architecture, state, notes = _arranged(tensors)
    reference = _reference(architecture, against)
    missing = _missing(architecture, state)
    if missing:
        raise Refused(
            f"{path}: without its {missing} this cannot give SoundNet's numbers; "
            + _what_now(architecture, state, reference)
        )
    state = {name: state[name] for name in architecture.state_shapes()}
    with _naming(path):
        _check_values(state)
    target = destination_of(destination, path.name.partition(".")[0])
    metadata: dict[str, Any] = {
        "categories": original_categories(architecture.head_sizes),
        "source": {"sha256": _sha256(path), "bytes": path.stat().st_size, "form": tensors.form},
        "converter": soundnet_port.__version__,
        "released_front": architecture.name == "soundnet8" and is_released_front(state),
        "ignored": notes,
    }
    with written_aside(target) as draft:
        write_weights(draft, architecture, state, metadata)
        read_weights(draft)
        unchanged = placed(draft, target, force)
    return PortReport(
        str(path),
        target,
        tensors.form,
        metadata,
        reference[0] if reference else None,
        list(_compared(architecture, state, reference[1])) if reference else [],
        time.perf_counter() - start,
        unchanged,
    )


def read_port(path: Path) -> Tensors:
    """The tensors of a port's file.

    Raises:
        Refused: it cannot be read, or holds something else.
    """
    form = form_of(path)
    try:
        if form is None:
            raise Refused(f"{path}: neither a .npy nor a PyTorch state dict")
        if path.stat().st_size > MAX_BYTES:
            raise Refused(f"{path}: {path.stat().st_size:,} bytes, too large for a SoundNet")
        with _naming(path):
            return _from_npy(path) if form == NPY else _from_state_dict(path)
    except OSError as error:
        raise Refused(f"{path}: {error.strerror or error}") from None


def listing(path: Path) -> Iterator[str]:
    """Lines that describe a port's file: its modules with their tensors, and what is missing.

    Raises:
        Refused: it cannot be read.
    """
    tensors = read_port(path)
    yield f"{path}: {tensors.form}, {path.stat().st_size:,} bytes"
    for name, group in sorted([*tensors.convolutions, *tensors.norms], key=lambda each: _numbers(each[0])):
        shapes = (f"{key} {'x'.join(map(str, tensor.shape))}" for key, tensor in group.items())
        yield f"  {shown(name)}  {' '.join(shapes)}"
    try:
        with _naming(path):
            architecture, state, notes = _arranged(tensors)
    except Refused as refusal:
        yield f"not convertible: {refusal}"
        return
    missing = _missing(architecture, state)
    yield f"not convertible: without its {missing}" if missing else describe(architecture)
    for note in notes:
        yield f"  note: {note}"


# ---- sound8.npy


def _from_npy(path: Path) -> Tensors:
    """From {"conv1": {"weights": (kernel, 1, in, out), "biases", "gamma", "beta", "mean", "var"}, ...}."""
    data = io.BytesIO(path.read_bytes())
    version = npy_format.read_magic(data)
    read_header = {1: npy_format.read_array_header_1_0, 2: npy_format.read_array_header_2_0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what Python 2 wrote, such as 10L in a header
        shape, _, dtype = read_header[version[0]](data)
        if dtype != np.dtype(object):
            raise ValueError(f"holds an array {shape} of {dtype}, expected a dict of layers")
        held = unpickled(data)
    if isinstance(held, Made) and held.maker.endswith("multiarray._reconstruct"):
        held = held.state[-1][0]  # the array around the dict
    if not isinstance(held, dict):
        raise ValueError(f"holds a {type(held).__name__}, expected a dict of layers")
    result = Tensors(NPY)
    layers = {text(key): value for key, value in held.items()}
    # Python 2's dicts had no order
    for name in sorted(layers, key=_numbers):
        conv: dict[str, Tensor] = {}
        norm: dict[str, Tensor] = {}
        if not isinstance(layers[name], dict):
            result.rest.append(name)
            continue
        for key, value in layers[name].items():
            theirs = text(key)
            ours = _NPY_FIELDS.get(theirs)
            if ours is None:
                result.rest.append(f"{name}/{theirs}")
                continue
            array = as_array(value, f"{name}/{theirs}")
            if theirs == "weights":
                if array.ndim != 4 or array.shape[1] != 1:
                    raise ValueError(f"{name}/weights is {array.shape}, expected (kernel, 1, in, out)")
                array = array[:, 0].transpose(2, 1, 0)
            (conv if theirs in ("weights", "biases") else norm)[ours] = torch.from_numpy(array.copy())
        if "weight" in conv:
            result.convolutions.append((name, conv))
            result.norms.append((name, norm))
    return result


def _numbers(name: str) -> list[int]:
    """Sorts conv8 between conv7 and conv8_2."""
    return [int(digits) for digits in re.findall(r"\d+", name)]


# ---- PyTorch state dicts


def _from_state_dict(path: Path) -> Tensors:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:  # torch stores; what is packed may unfold to anything
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise ValueError("a packed zip, which torch.save does not write")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about its old forms
            held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged pickle makes torch raise
        reason = str(error).split(". ")[0].splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"torch does not read it as a state dict without running code of the file ({shown(reason)}); "
            "if it is a whole model, load it where it was made and save model.state_dict()"
        ) from None
    result = Tensors(STATE_DICT)
    for name, group in _grouped(_largest_of_tensors(held)).items():
        weight = group.get("weight")
        if weight is not None and weight.ndim in (3, 4) and group.keys() <= {"weight", "bias"}:
            if weight.ndim == 4:
                if 1 not in weight.shape[2:]:
                    raise ValueError(f"{name}.weight is {tuple(weight.shape)}, expected (out, in, kernel, 1)")
                weight = weight.flatten(2)
            result.convolutions.append((name, {**group, "weight": weight}))
        elif "running_mean" in group or (weight is not None and weight.ndim == 1):
            result.norms.append((name, {key: group[key] for key in _NORM_FIELDS if key in group}))
        else:
            result.rest.append(name)
    return result


def _largest_of_tensors(held: Any) -> Mapping[str, Tensor]:
    """The dict with the most tensors: the file's own, or one that it holds under "state_dict", "net", ..."""
    candidates = [held, *(held.values() if isinstance(held, Mapping) else ())]
    dicts = [
        {str(name): value for name, value in each.items() if isinstance(value, Tensor)}
        for each in candidates
        if isinstance(each, Mapping)
    ]
    best = max(dicts, key=len, default={})
    if not best:
        raise ValueError("holds no dict of tensors, expected a state dict")
    return best


def _grouped(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        module, _, parameter = name.rpartition(".")
        if parameter != "num_batches_tracked" and tensor.is_floating_point():
            groups.setdefault(module, {})[parameter] = tensor.detach().to(torch.float32).contiguous()
    return groups


# ---- what both have in common


def _arranged(tensors: Tensors) -> tuple[Architecture, dict[str, Tensor], list[str]]:
    """Which SoundNet it is, its tensors under our names as far as they are there, and notes."""
    convolutions = tensors.convolutions
    kernels = [weights["weight"].shape[2] for _, weights in convolutions]
    for template in ARCHITECTURES.values():
        depth = len(template.blocks)
        if kernels[:depth] == [block.kernel for block in template.blocks]:
            break
    else:
        expected = " or ".join(str([b.kernel for b in a.blocks]) for a in ARCHITECTURES.values())
        raise ValueError(f"its convolutions have the kernels {shown(str(kernels))}, expected {expected}")
    blocks = [weights for _, weights in convolutions[:depth]]
    channels = 1
    for block, weights in zip(template.blocks, blocks, strict=True):
        if weights["weight"].shape[1] != channels:
            raise ValueError(
                f"{block.name} has {weights['weight'].shape[1]} input channels, expected {channels}"
            )
        channels = weights["weight"].shape[0]
    heads = {}
    left = []
    for name, weights in convolutions[depth:]:
        head = None
        if tuple(weights["weight"].shape[1:]) == (channels, template.heads[0].kernel):
            free = [h.name for h in template.heads if h.name not in heads]
            hinted = [h for h in free if any(hint in name.lower() for hint in _HEAD_HINTS[h])]
            sized = [
                h.name for h in template.heads if h.name in free and h.categories == len(weights["weight"])
            ]
            head = next(iter(hinted or sized or free), None)
        if head is None:
            left.append(name)
        else:
            heads[head] = weights
    if len(heads) == 1:
        left.append(f"the head for {next(iter(heads))}, without the other one")
        heads = {}
    norms = tensors.norms[:depth]
    left += [name for name, norm in tensors.norms[depth:] if norm] + tensors.rest
    sizes = {h.name: len(heads[h.name]["weight"]) for h in template.heads if heads}
    architecture = template.resized([len(weights["weight"]) for weights in blocks], sizes)
    state: dict[str, Tensor] = {}
    for block, weights in zip(architecture.blocks, blocks, strict=True):
        state.update({f"{block.name}.{key}": value for key, value in weights.items()})
    for block, (_, norm) in zip(architecture.blocks, norms, strict=False):
        state.update({f"{block.norm}.{key}": value for key, value in norm.items()})
    for head_name, weights in heads.items():
        state.update({f"{head_name}.{key}": value for key, value in weights.items()})
    shapes = architecture.state_shapes()
    for name, tensor in state.items():
        if tuple(tensor.shape) != shapes.get(name):
            raise ValueError(f"{name} is {tuple(tensor.shape)}, expected {shapes.get(name, 'nothing')}")
    notes = [f"no proof: another port's file ({tensors.form}) has no graph to run"]
    notes += [f"not used: {', '.join(map(shown, left[:8]))}{' ...' if len(left) > 8 else ''}"] if left else []
    return architecture, state, notes


def _missing(architecture: Architecture, state: Mapping[str, Tensor]) -> str:
    """What is not there, in words; empty if all is."""
    absent = [name for name in architecture.state_shapes() if name not in state]
    fresh = [
        block.norm
        for block in architecture.blocks
        if f"{block.norm}.running_mean" in state
        and f"{block.norm}.running_var" in state
        and not bool(state[f"{block.norm}.running_mean"].any())
        and bool((state[f"{block.norm}.running_var"] == 1).all())
    ]
    parts = []
    if fresh:
        parts.append(
            f"batch-norm statistics (running_mean 0 and running_var 1 in {', '.join(fresh)}: never copied)"
        )
    if absent:
        parts.append(f"missing tensors ({', '.join(absent)})")
    return " and its ".join(parts)


def _what_now(architecture: Architecture, state: Mapping[str, Tensor], reference: _Reference | None) -> str:
    """What can be done about missing tensors."""
    if reference is None:
        return "convert MIT's own files: soundnet-port fetch"
    path, converted = reference
    known = [name for name in architecture.state_shapes() if name in state]
    equal = [name for name in known if torch.equal(state[name], converted[name])]
    return f"{len(equal)} of the {len(known)} tensors it has are those of {path}: use that"


def _check_values(state: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise ValueError(f"{name}: {bad:,} of its {tensor.numel():,} values are NaN or infinite")
        if name.endswith("running_var") and not bool((tensor + BATCH_NORM_EPS > 0).all()):
            raise ValueError(f"{name}: variance {float(tensor.min()):g}, expected variance + eps > 0")


_Reference = tuple[Path, dict[str, Tensor]]


def _reference(architecture: Architecture, against: str | Path | None) -> _Reference | None:
    """Converted weights to compare with: those asked for, else those of the architecture's name."""
    try:
        path = find_weights(against or architecture.name)
        other, state, _ = read_weights(path)
    except WeightsError as error:
        if against is None:
            return None
        raise Refused(str(error)) from None
    if other == architecture:
        return path, state
    if against is None:
        return None
    raise Refused(f"{path} is {describe(other)}; the file is {describe(architecture)}")


def _compared(
    architecture: Architecture, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
) -> Iterator[Difference]:
    """Each module with parameters, in order: how far its tensors and its output are apart."""
    sound = torch.from_numpy(proof_signal(SAMPLES[architecture.name]))
    models = [build(architecture, dict(state)) for state in (ours, theirs)]
    layers = [layer for layer in architecture.modules if layer.parameters]
    keys: list[str | int] = [layer.module for layer in layers] + list(architecture.head_sizes)
    outputs = [model.extract(sound, keys) for model in models]
    for key, module in zip(
        keys, [*(layer.parameters for layer in layers), *architecture.head_sizes], strict=True
    ):
        names = [name for name in ours if name.startswith(f"{module}.")]
        yield Difference(
            module,
            max(_relative(ours[name], theirs[name]) for name in names),
            _relative(outputs[0][key], outputs[1][key]),
        )


def _relative(ours: Tensor, theirs: Tensor) -> float:
    error, largest = float((ours - theirs).abs().max()), float(theirs.abs().max())
    return error / largest if largest else (0.0 if error == 0 else math.inf)


# What numpy's header parser, the unpickler and torch raise about damaged bytes
_DAMAGE = (
    *(ValueError, TypeError, LookupError, AttributeError, StopIteration, ArithmeticError),
    *(RuntimeError, MemoryError, SyntaxError, tokenize.TokenError),
)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Names the file in whatever is wrong with what it holds."""
    try:
        yield
    except Refused:
        raise
    except _DAMAGE as error:
        detail = str(error) if type(error) is ValueError else "damaged, or written by something else"
        raise Refused(f"{path}: {' '.join(detail.split())}; not a SoundNet of another port") from None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
