"""Weights that other ports of SoundNet made: `sound8.npy` (TensorFlow, Keras) and PyTorch state dicts.

Such files hold tensors without the graph that they come from, so there is no graph to run a parity
check against. What can be said is said: which tensors are missing, whether they are those of the released
network, and, where weights converted from Torch7 are at hand, how far from them each module is. No
pickle is ever executed: a `.npy` goes through a reader that only builds data, a state dict through
torch's `weights_only`.
"""

from __future__ import annotations

import hashlib
import io
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

from soundnet_port.conversion.convert import (
    ConversionError,
    describe,
    destination_of,
    placed,
    recognized_metadata,
    refusals,
    released_parity,
)
from soundnet_port.conversion.pickled import Made, as_array, text, unpickled
from soundnet_port.conversion.proof import SAMPLES, proof_signal
from soundnet_port.conversion.recognition import WHOLE, Recognition, recognize, released_checksum
from soundnet_port.conversion.released_parity import Parity
from soundnet_port.conversion.t7 import shown
from soundnet_port.files import atomic_write
from soundnet_port.network.architecture import ARCHITECTURES, BATCH_NORM_EPS, SOUNDNET8, Architecture
from soundnet_port.network.categories import original_categories
from soundnet_port.network.weights import WeightsError, build_model, find_weights, read_weights, write_weights
from soundnet_port.version import __version__

MAX_BYTES = 1 << 30  # SoundNet-8 takes 57 MB
NPY, STATE_DICT = "npy of the TensorFlow port", "PyTorch state dict"
_FORM_BY_SUFFIX = {".npy": NPY, ".pth": STATE_DICT, ".pt": STATE_DICT}
_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number with which torch < 1.6 began a file
_SAFE_TORCH = (2, 10)  # before, weights_only could be made to run code or to write out of bounds

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
_HEAD_HINTS = {"objects": ("obj", "imagenet"), "scenes": ("scn", "scene", "place")}


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
class PortResult:
    """What came of a port's weights.

    Attributes:
        source: path of the port's file.
        weights: path of the weights.
        form: `NPY` or `STATE_DICT`.
        network: what it is, in words.
        metadata: as stored in the weights.
        recognition: whether it is the released network.
        parity: the comparison with Torch7's recordings, of the released network; else None.
        against: the weights it was compared with; None where there was nothing to compare with.
        why_not: why not, in words.
        differences: a row per module.
        seconds: time taken.
        unchanged: the weights were there already, byte for byte.
    """

    source: str
    weights: Path
    form: str
    network: str
    metadata: Mapping[str, Any]
    recognition: Recognition
    parity: Parity | None
    against: Path | None
    why_not: str
    differences: list[Difference]
    seconds: float
    unchanged: bool


_Groups = list[tuple[str, dict[str, Tensor]]]  # (name in the file, its tensors under our names)


@dataclass
class Tensors:
    """What a port's file holds, in its order.

    Attributes:
        convolutions: with "weight" (out, in, kernel) and "bias".
        norms: with what is there of `_NORM_FIELDS`.
        rest: names of what is neither.
    """

    convolutions: _Groups = field(default_factory=list)
    norms: _Groups = field(default_factory=list)
    rest: list[str] = field(default_factory=list)


@dataclass
class FoundPort:
    """SoundNet in a port's file: its tensors under our names, as far as they are there."""

    architecture: Architecture
    state: dict[str, Tensor]
    notes: list[str]


def form_of(path: str | Path) -> str | None:
    """`NPY` or `STATE_DICT`, by the file's first bytes or else its name; None for all other files."""
    try:
        with open(path, "rb") as file:
            start = file.read(64)
        if start.startswith(npy_format.MAGIC_PREFIX):
            return NPY
        if start.startswith(b"\x80") and _LEGACY_MAGIC in start:
            return STATE_DICT
        if start.startswith(b"PK"):
            with zipfile.ZipFile(path) as archive:
                if any(name.endswith("/data.pkl") for name in archive.namelist()):
                    return STATE_DICT
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile):
        pass  # by its name
    return _FORM_BY_SUFFIX.get(Path(path).suffix.lower()) if Path(path).is_file() else None


def convert_port(
    source: str | Path,
    destination: str | Path | None = None,
    *,
    against: str | Path | None = None,
    force: bool = False,
    origin: str = "",
) -> PortResult:
    """Converts another port's weights: recognized as the released network, or compared with converted ones.

    Args:
        source: a `.npy` or a file with a PyTorch state dict.
        destination: as for `convert`. In a folder, or without it, the released network, recognized bit
            for bit, is "soundnet8", and all others keep the file's own name.
        against: weights to compare with; without it those of the architecture's name, if there are any.
        force: replace weights that differ.
        origin: where the file is from, if it is a temporary one.

    Raises:
        Refused: it is not SoundNet, or something is missing or wrong; nothing was written.
    """
    start = time.perf_counter()
    path = Path(source)
    shown_as = origin or str(path)
    form = form_of(path) or STATE_DICT
    found = read_port(path, shown_as)
    architecture, state = found.architecture, found.state
    missing = _missing(architecture, state)
    recognition = recognize(architecture, state)
    name = re.sub(r"(\.(npy|pth|pt|tar))+$", "", path.name, flags=re.IGNORECASE).lstrip(".")
    if recognition.released == WHOLE:
        name = architecture.name
    elif name in ARCHITECTURES:
        name = f"{name}-port"
    if destination is None and not name:
        raise ConversionError(f"{shown_as}: a file without a name; give -o one for the weights")
    target = destination_of(destination, name)
    if recognition.released == WHOLE and against is None:
        reference = _Reference(why_not="it is the released network")
    else:
        reference = _reference(architecture, against, target)
    if missing:
        raise ConversionError(
            f"{shown_as}: without its {missing} this cannot give SoundNet's numbers; "
            + _what_now(architecture, state, reference)
        )
    state = {key: state[key] for key in architecture.state_shapes()}
    with _naming(shown_as):
        _check_values(state)
    with refusals(shown_as):
        parity = released_parity(architecture, state, recognition)
    no_graph = [] if parity else [f"no parity check: another port's file ({form}) has no graph to run"]
    source_of = {"sha256": file_sha256(path), "bytes": path.stat().st_size, "form": form}
    metadata: dict[str, Any] = {
        "categories": original_categories(architecture.head_sizes),
        "source": source_of | ({"origin": origin} if origin else {}),
        "converter": __version__,
        **recognized_metadata(recognition, parity),
        "ignored": [*no_graph, *found.notes],
    }
    with atomic_write(target) as draft:
        write_weights(draft, architecture, state, metadata)
        read_weights(draft)
        unchanged = placed(draft, target, force)
    differences = list(_compared(architecture, state, reference)) if reference.state else []
    return PortResult(
        shown_as,
        target,
        form,
        describe(architecture),
        metadata,
        recognition,
        parity,
        reference.path if reference.state else None,
        reference.why_not,
        differences,
        time.perf_counter() - start,
        unchanged,
    )


def read_port(path: Path, name: str = "") -> FoundPort:
    """SoundNet's tensors in a port's file, which errors call by `name` if one is given.

    Raises:
        Refused: it cannot be read, or holds something else.
    """
    with _naming(name or path):
        return _only_one(_candidates(path))


def listing(path: Path) -> Iterator[str]:
    """Lines that describe a port's file: its modules with their tensors, and what is missing.

    Raises:
        Refused: it cannot be read.
    """
    with _naming(path):
        candidates = _candidates(path)
    yield f"{path}: {form_of(path)}, {path.stat().st_size:,} bytes"
    for where, tensors in candidates.items():
        if where:
            yield f"  in {shown(where)}:"
        for name, group in sorted(tensors.convolutions + tensors.norms, key=lambda each: _numbers(each[0])):
            shapes = (f"{key} {'x'.join(map(str, tensor.shape))}" for key, tensor in group.items())
            yield f"  {shown(name)}  {' '.join(shapes)}"
    try:
        with _naming(path):
            found = _only_one(candidates)
    except ConversionError as refusal:
        yield f"not convertible: {refusal}"
        return
    missing = _missing(found.architecture, found.state)
    yield f"not convertible: without its {missing}" if missing else describe(found.architecture)
    yield recognize(found.architecture, found.state).summary
    for note in found.notes:
        yield f"  note: {note}"


def _candidates(path: Path) -> dict[str, Tensors]:
    """What may be a network in a file; the file itself is ""."""
    form = form_of(path)
    try:
        if form is None:
            raise ValueError("neither a .npy nor a PyTorch state dict")
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes, too large for a SoundNet")
        return {"": _from_npy(path)} if form == NPY else _from_state_dict(path)
    except OSError as error:
        raise ConversionError(f"{path}: {error.strerror or error}") from None


def _only_one(candidates: Mapping[str, Tensors]) -> FoundPort:
    """The one SoundNet among them."""
    attempts = {name: _arranged(tensors) for name, tensors in candidates.items()}
    fitting = {name: found for name, found in attempts.items() if isinstance(found, FoundPort)}
    if not fitting:
        raise next(iter(attempts.values()))  # type: ignore[misc]
    name, found = next(iter(fitting.items()))
    for other in list(fitting.values())[1:]:
        if other.state.keys() != found.state.keys() or any(
            not torch.equal(tensor, other.state[key]) for key, tensor in found.state.items()
        ):
            names = ", ".join(shown(each) or "the file itself" for each in fitting)
            raise ValueError(f"holds several networks ({names}); save one of them alone")
    if name:
        found.notes.append(f"network found at {shown(name)}")
    return found


# ---- sound8.npy


def _from_npy(path: Path) -> Tensors:
    """From {"conv1": {"weights": (kernel, 1, in, out), "biases", "gamma", "beta", "mean", "var"}, ...}."""
    content = path.read_bytes()
    if not content.startswith(npy_format.MAGIC_PREFIX):
        raise ValueError("no .npy file, whatever its name says; was the download complete?")
    data = io.BytesIO(content)
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
    result = Tensors()
    layers = {text(key): value for key, value in held.items()}
    # Python 2's dicts had no order
    for name in sorted(layers, key=_numbers):
        conv: dict[str, Tensor] = {}
        norm: dict[str, Tensor] = {}
        if not isinstance(layers[name], dict):
            result.rest.append(shown(name))
            continue
        for key, value in layers[name].items():
            theirs = text(key)
            ours = _NPY_FIELDS.get(theirs)
            if ours is None:
                result.rest.append(shown(f"{name}/{theirs}"))
                continue
            array = as_array(value, shown(f"{name}/{theirs}"))
            if theirs == "weights":
                if array.ndim != 4 or array.shape[1] != 1:
                    raise ValueError(f"{shown(name)}/weights is {array.shape}, expected (kernel, 1, in, out)")
                array = array[:, 0].transpose(2, 1, 0)
            (conv if theirs in ("weights", "biases") else norm)[ours] = torch.from_numpy(array.copy())
        if "weight" in conv:
            result.convolutions.append((name, conv))
            if norm:
                result.norms.append((name, norm))
    return result


def _numbers(name: str) -> list[int]:
    """Sorts conv8 between conv7 and conv8_2."""
    return [int(digits) for digits in re.findall(r"\d+", name)]


# ---- PyTorch state dicts


def _from_state_dict(path: Path) -> dict[str, Tensors]:
    if tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2]) < _SAFE_TORCH:
        least = ".".join(map(str, _SAFE_TORCH))
        raise ValueError(f"state dicts are read with torch {least} or later only, for what is in them")
    with open(path, "rb") as file:
        zipped = file.read(2) == b"PK"
    if zipped:
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
    dicts = dict(_dicts_of_tensors("", held, 3))
    if not dicts:
        raise ValueError("holds no dict of tensors, expected a state dict")
    return {name: _sorted_out(state) for name, state in dicts.items()}


def _dicts_of_tensors(name: str, held: Any, depth: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The file's own dict, or those that it holds under "state_dict", "net", ..."""
    if not isinstance(held, Mapping) or not depth:
        return
    own = {str(key): value for key, value in held.items() if isinstance(value, Tensor)}
    for key, tensor in own.items():
        there = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_nested
        if not there or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{shown(key)} is no tensor with all its numbers in the file")
    if own:
        yield name, own
    for key, value in held.items():
        yield from _dicts_of_tensors(f"{name}.{key}".lstrip("."), value, depth - 1)


def _sorted_out(state: Mapping[str, Tensor]) -> Tensors:
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        module, _, parameter = name.rpartition(".")
        if parameter != "num_batches_tracked" and tensor.is_floating_point():
            groups.setdefault(module, {})[parameter] = tensor.detach().to(torch.float32).contiguous()
    result = Tensors()
    for name, group in groups.items():
        weight = group.get("weight")
        if weight is not None and weight.ndim in (3, 4) and group.keys() <= {"weight", "bias"}:
            if weight.ndim == 4 and 1 not in weight.shape[2:]:
                result.rest.append(name)  # pictures' convolutions, in a network that has more senses
            else:
                weight = weight.flatten(2)
                result.convolutions.append((name, {**group, "weight": weight}))
        elif "running_mean" in group or (weight is not None and weight.ndim == 1):
            result.norms.append((name, {key: group[key] for key in _NORM_FIELDS if key in group}))
        else:
            result.rest.append(name)
    return result


# ---- what both have in common


def _arranged(tensors: Tensors) -> FoundPort | ValueError:
    """SoundNet in these tensors, or why it is not there."""
    try:
        return _in_order(tensors)
    except ValueError as error:
        return error


def _in_order(tensors: Tensors) -> FoundPort:
    template = _template(tensors.convolutions)
    depth = len(template.blocks)
    blocks = [weights for _, weights in tensors.convolutions[:depth]]
    channels = 1
    for block, weights in zip(template.blocks, blocks, strict=True):
        if weights["weight"].shape[1] != channels:
            raise ValueError(
                f"{block.name} has {weights['weight'].shape[1]} input channels, expected {channels}"
            )
        channels = weights["weight"].shape[0]
    heads: dict[str, dict[str, Tensor]] = {}
    left = []
    for name, weights in tensors.convolutions[depth:]:
        if tuple(weights["weight"].shape[1:]) == (channels, template.heads[0].kernel) and len(heads) < 2:
            heads[_head_of(name, len(weights["weight"]), template, heads)] = weights
        elif tuple(weights["weight"].shape[1:]) == (1, template.blocks[0].kernel):
            raise ValueError(f"holds a second network at {shown(name)}; save one of them alone")
        else:
            left.append(name)
    if len(heads) == 1:
        left.append(f"the head for {next(iter(heads))}, without the other one")
        heads = {}
    norms = _by_their_numbers(tensors.norms[:depth])
    left += [name for name, _ in tensors.norms[depth:]] + tensors.rest
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
    notes = [f"not used: {', '.join(map(shown, left[:8]))}{' ...' if len(left) > 8 else ''}"] if left else []
    return FoundPort(architecture, state, notes)


def _template(convolutions: _Groups) -> Architecture:
    """The architecture of these convolutions, by their kernels."""
    kernels = [weights["weight"].shape[2] for _, weights in convolutions]
    for template in sorted(ARCHITECTURES.values(), key=lambda a: -len(a.blocks)):
        depth = len(template.blocks)
        if kernels[:depth] != [block.kernel for block in template.blocks]:
            continue
        widths = tuple(len(weights["weight"]) for _, weights in convolutions[:depth])
        # the 5-layer network's trunk is also how the 8-layer one begins
        if template.heads[0].kernel in kernels[depth:] or template is SOUNDNET8 or widths == template.widths:
            return template
        raise ValueError(
            f"its convolutions have the kernels {shown(str(kernels))}: an 8-layer SoundNet of which "
            "something is missing, or a 5-layer one without heads"
        )
    expected = " or ".join(str([b.kernel for b in a.blocks]) for a in ARCHITECTURES.values())
    raise ValueError(f"its convolutions have the kernels {shown(str(kernels))}, expected {expected}")


def _head_of(name: str, size: int, template: Architecture, taken: Mapping[str, Any]) -> str:
    """Which head it is: by its size, else its name, else its place; size and name must not contradict."""
    last = name.rpartition(".")[2].lower()
    hinted = [head for head, hints in _HEAD_HINTS.items() if any(hint in last for hint in hints)]
    sized = [head.name for head in template.heads if head.categories == size]
    if hinted and sized and hinted != sized:
        raise ValueError(f"{shown(name)} has {size} categories, which are the {sized[0]}")
    free = [head.name for head in template.heads if head.name not in taken]
    chosen = (sized or hinted or free)[0]
    if chosen not in free:
        raise ValueError(f"{shown(name)} is a second head for {chosen}")
    return chosen


def _by_their_numbers(norms: _Groups) -> _Groups:
    """In the order of their names where these count from 1 (bn1, bn2, ...), else as they are."""
    numbers = [_numbers(name.rpartition(".")[2]) for name, _ in norms]
    if sorted(numbers) == [[n] for n in range(1, len(norms) + 1)]:
        return [norms[numbers.index([n])] for n in range(1, len(norms) + 1)]
    return norms


def _missing(architecture: Architecture, state: Mapping[str, Tensor]) -> str:
    """What is not there, in words; empty if all is."""
    absent = [name for name in architecture.state_shapes() if name not in state]
    mean, variance, gain, shift = (
        {block.norm for block in architecture.blocks if _is_all(state, f"{block.norm}.{name}", value)}
        for name, value in (("running_mean", 0), ("running_var", 1), ("weight", 1), ("bias", 0))
    )
    parts = []
    for what, fresh in (
        ("batch-norm statistics (running_mean 0 and running_var 1 in {}: never copied)", mean & variance),
        ("batch-norm weights (weight 1 and bias 0 in {}: never copied)", gain & shift),
    ):
        if fresh:
            parts.append(what.format(", ".join(sorted(fresh))))
    if absent:
        parts.append(f"missing tensors ({', '.join(absent)})")
    return " and its ".join(parts)


def _is_all(state: Mapping[str, Tensor], name: str, value: float) -> bool:
    return name in state and bool((state[name] == value).all())


def _what_now(architecture: Architecture, state: Mapping[str, Tensor], reference: _Reference) -> str:
    """What can be done about missing tensors."""
    fetch = "convert MIT's own files: soundnet-port fetch"
    if not reference.state:
        return fetch
    there = [name for name in architecture.state_shapes() if name in state and not name.startswith("bn")]
    equal = [name for name in there if torch.equal(state[name], reference.state.get(name, torch.empty(0)))]
    if len(equal) == len(there):
        return f"its convolutions are those of {reference.path}: use that"
    return f"{len(equal)} of its {len(there)} other tensors are those of {reference.path}; {fetch}"


def _check_values(state: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise ValueError(f"{name}: {bad:,} of its {tensor.numel():,} values are NaN or infinite")
        if name.endswith("running_var") and not bool((tensor + BATCH_NORM_EPS > 0).all()):
            raise ValueError(f"{name}: variance {float(tensor.min()):g}, expected variance + eps > 0")


@dataclass(frozen=True)
class _Reference:
    """Weights to compare with; without a state, why there is nothing to compare."""

    path: Path | None = None
    state: dict[str, Tensor] | None = None
    why_not: str = ""


def _reference(architecture: Architecture, against: str | Path | None, target: Path) -> _Reference:
    """Those asked for, else the proven ones of the architecture's name; at least the trunk must fit."""
    try:
        path = find_weights(against or architecture.name)
    except WeightsError as error:
        if against is not None:
            raise ConversionError(str(error)) from None
        return _Reference(why_not=f"no {architecture.name} from Torch7 is at hand (soundnet-port fetch)")
    try:
        other, state, metadata = read_weights(path)
    except WeightsError as error:
        if against is not None:
            raise ConversionError(str(error)) from None
        return _Reference(why_not=str(error))
    if (other.name, other.widths) != (architecture.name, architecture.widths):
        why_not = f"{path} is {describe(other)}; the file is {describe(architecture)}"
        if against is not None:
            raise ConversionError(why_not)
        return _Reference(why_not=why_not)
    known = "worst" in metadata["proof"] or metadata["sha256"] == released_checksum()
    if against is None and (not known or path.resolve() == target.resolve()):
        return _Reference(why_not=f"{path} is not proven against Torch7 (--against compares with it)")
    return _Reference(path, state)


def _compared(
    architecture: Architecture, ours: Mapping[str, Tensor], reference: _Reference
) -> Iterator[Difference]:
    """Each module with parameters, in order: how far its tensors and its output are apart."""
    assert reference.state
    theirs = reference.state
    common = {
        head: size
        for head, size in architecture.head_sizes.items()
        if f"{head}.bias" in theirs and len(theirs[f"{head}.bias"]) == size
    }
    if len(common) < 2:
        common = {}
    architecture = architecture.resized(architecture.widths, common)
    sound = torch.from_numpy(proof_signal(SAMPLES[architecture.name]))
    names = architecture.state_shapes()
    models = [build_model(architecture, {name: state[name] for name in names}) for state in (ours, theirs)]
    modules: dict[str | int, str] = {m.module: m.parameters for m in architecture.modules if m.parameters}
    modules |= {head: head for head in common}
    outputs = [model.extract(sound, list(modules)) for model in models]
    for key, module in modules.items():
        parameters = [name for name in names if name.startswith(f"{module}.")]
        yield Difference(
            module,
            max(_relative(ours[name], theirs[name]) for name in parameters),
            _relative(outputs[0][key], outputs[1][key]),
        )


def _relative(ours: Tensor, theirs: Tensor) -> float:
    error = float((ours - theirs).abs().max())
    largest = float(theirs.abs().max()) or float(ours.abs().max())
    return error / largest if largest else 0.0


# What numpy's header parser, the unpickler and torch raise about damaged bytes
_DAMAGE = (
    *(ValueError, TypeError, LookupError, AttributeError, StopIteration, ArithmeticError),
    *(RuntimeError, MemoryError, SyntaxError, tokenize.TokenError, zipfile.BadZipFile),
)


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Names the file in whatever is wrong with what it holds."""
    try:
        yield
    except ConversionError:
        raise
    except _DAMAGE as error:
        detail = str(error) if type(error) is ValueError else "damaged, or written by something else"
        raise ConversionError(f"{path}: {' '.join(detail.split())}; not a SoundNet of another port") from None


def file_sha256(path: str | Path) -> str:
    """Compute the sha256 of a file's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
