"""Read the tensors in files of other ports: `sound8.npy` (TensorFlow, Keras) and PyTorch state dicts.

Nothing in such a file is executed: a `.npy` goes through a reader that builds plain data alone, a state dict
through torch's `weights_only`.
"""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy_format
from torch import Tensor

from soundnet_port.conversion.t7_objects import format_value
from soundnet_port.conversion.unpickling import PickledCall, as_array, as_text, read_pickle

MAX_BYTES = 1 << 30  # SoundNet-8 takes 57 MB
NPY, STATE_DICT = "npy of the TensorFlow port", "PyTorch state dict"
_FORMAT_BY_SUFFIX = {".npy": NPY, ".pth": STATE_DICT, ".pt": STATE_DICT}
_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number with which torch < 1.6 began a file
_SAFE_TORCH = (2, 10)  # before, weights_only could be made to run code or to write out of bounds
_MAX_DICT_DEPTH = 3  # {"checkpoint": {"state_dict": ...}}

# The TensorFlow port's names, and ours
_NPY_FIELDS = {
    "weights": "weight",
    "biases": "bias",
    "gamma": "weight",
    "beta": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_NORM_FIELDS = ("weight", "bias", "running_mean", "running_var")

# (name in the file, its tensors under our names)
NamedModules = list[tuple[str, dict[str, Tensor]]]


@dataclass
class PortTensors:
    """The tensors in a port's file, in its order.

    Attributes:
        convolutions: with "weight" (out, in, kernel) and "bias".
        norms: batch norms, with any of weight, bias, running_mean and running_var.
        rest: names of all others.
    """

    convolutions: NamedModules = field(default_factory=list)
    norms: NamedModules = field(default_factory=list)
    rest: list[str] = field(default_factory=list)


def port_format(path: str | Path) -> str | None:
    """Tell `NPY` or `STATE_DICT` by a file's first bytes, or else its name; None for all other files."""
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
        pass
    return _FORMAT_BY_SUFFIX.get(Path(path).suffix.lower()) if Path(path).is_file() else None


def read_tensors(path: Path) -> dict[str, PortTensors]:
    """Read the dicts of tensors in a file, by their names in it; the file's own is "".

    Raises:
        ValueError: the file is of another format, too large, or holds something else; a damaged one may raise
            any other exception of numpy's or Python's.
        OSError: it cannot be read.
    """
    file_format = port_format(path)
    if file_format is None:
        raise ValueError("neither a .npy nor a PyTorch state dict")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path.stat().st_size:,} bytes, too large for a SoundNet")
    return {"": _read_npy(path)} if file_format == NPY else _read_state_dicts(path)


def _read_npy(path: Path) -> PortTensors:
    """Read {"conv1": {"weights": (kernel, 1, in, out), "biases", "gamma", "beta", "mean", "var"}, ...}."""
    raw = path.read_bytes()
    if not raw.startswith(npy_format.MAGIC_PREFIX):
        raise ValueError("no .npy file, despite its name; was the download complete?")
    data = io.BytesIO(raw)
    version = npy_format.read_magic(data)
    read_header = {1: npy_format.read_array_header_1_0, 2: npy_format.read_array_header_2_0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what Python 2 wrote, such as 10L in a header
        shape, _, dtype = read_header[version[0]](data)
        if dtype != np.dtype(object):
            raise ValueError(f"holds an array {shape} of {dtype}, expected a dict of layers")
        content = read_pickle(data)
    if isinstance(content, PickledCall) and content.function.endswith("multiarray._reconstruct"):
        content = content.state[-1][0]  # the array around the dict
    if not isinstance(content, dict):
        raise ValueError(f"holds a {type(content).__name__}, expected a dict of layers")
    result = PortTensors()
    layers = {as_text(key): value for key, value in content.items()}
    for name in sorted(layers, key=digits_of):  # Python 2's dicts had no order
        conv: dict[str, Tensor] = {}
        norm: dict[str, Tensor] = {}
        if not isinstance(layers[name], dict):
            result.rest.append(format_value(name))
            continue
        for key, value in layers[name].items():
            npy_field = as_text(key)
            field_name = _NPY_FIELDS.get(npy_field)
            if field_name is None:
                result.rest.append(format_value(f"{name}/{npy_field}"))
                continue
            array = as_array(value, format_value(f"{name}/{npy_field}"))
            if npy_field == "weights":
                if array.ndim != 4 or array.shape[1] != 1:
                    raise ValueError(
                        f"{format_value(name)}/weights is {array.shape}, expected (kernel, 1, in, out)"
                    )
                array = array[:, 0].transpose(2, 1, 0)
            (conv if npy_field in ("weights", "biases") else norm)[field_name] = torch.from_numpy(
                array.copy()
            )
        if "weight" in conv:
            result.convolutions.append((name, conv))
            if norm:
                result.norms.append((name, norm))
    return result


def digits_of(name: str) -> list[int]:
    """Return the numbers in a name, which sort conv8 between conv7 and conv8_2."""
    return [int(digits) for digits in re.findall(r"\d+", name)]


def _read_state_dicts(path: Path) -> dict[str, PortTensors]:
    if tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2]) < _SAFE_TORCH:
        version = ".".join(map(str, _SAFE_TORCH))
        raise ValueError(f"state dicts are read with torch {version} or later only, for security")
    with open(path, "rb") as file:
        is_zip = file.read(2) == b"PK"
    if is_zip:
        with zipfile.ZipFile(path) as archive:  # torch does not compress; a compressed one may be a zip bomb
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise ValueError("a packed zip, which torch.save does not write")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about its old forms
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # anything that a damaged pickle makes torch raise
        message = str(error).split(". ")[0].splitlines()[0] if str(error) else type(error).__name__
        reason = format_value(message)
        raise ValueError(
            f"torch does not read it as a state dict without running code of the file ({reason}); "
            "if it is a whole model, load it where it was made and save model.state_dict()"
        ) from None
    dicts = dict(_tensor_dicts("", content, _MAX_DICT_DEPTH))
    if not dicts:
        raise ValueError("holds no dict of tensors, expected a state dict")
    return {name: _classify(state) for name, state in dicts.items()}


def _tensor_dicts(name: str, content: Any, depth: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield (name, dict) of each dict with tensors: the file's own, or under "state_dict", "net", ..."""
    if not isinstance(content, Mapping) or not depth:
        return
    own = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    for key, tensor in own.items():
        is_plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_nested
        if not is_plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{format_value(key)} is no tensor with all its numbers in the file")
    if own:
        yield name, own
    for key, value in content.items():
        yield from _tensor_dicts(f"{name}.{key}".lstrip("."), value, depth - 1)


def _classify(state: Mapping[str, Tensor]) -> PortTensors:
    """Sort the tensors of a state dict into convolutions, batch norms and others."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        module, _, parameter = name.rpartition(".")
        if parameter != "num_batches_tracked" and tensor.is_floating_point():
            groups.setdefault(module, {})[parameter] = tensor.detach().to(torch.float32).contiguous()
    result = PortTensors()
    for name, group in groups.items():
        weight = group.get("weight")
        if weight is not None and weight.ndim in (3, 4) and group.keys() <= {"weight", "bias"}:
            if weight.ndim == 4 and 1 not in weight.shape[2:]:
                result.rest.append(name)  # a convolution of images, in a network for images too
            else:
                weight = weight.flatten(2)
                result.convolutions.append((name, {**group, "weight": weight}))
        elif "running_mean" in group or (weight is not None and weight.ndim == 1):
            result.norms.append((name, {key: group[key] for key in _NORM_FIELDS if key in group}))
        else:
            result.rest.append(name)
    return result
