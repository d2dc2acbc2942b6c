"""Weights files: finding, reading and writing them.

One `.safetensors` file per network. All metadata is one JSON string, so that the same network
always gives the same bytes:

    architecture, widths, heads    which network (see architecture.py)
    classifier                     layer and kernel of a head of classes, layers and seconds of a pooled
                                   head, or null where there is neither
    training                       how they were trained, if this package did it
    categories                     names of the outputs by head, or null where they are unknown
    license                        of the weights, such as "mit" or "cc-by-4.0" (SPDX), or null where unknown
    source, converter              sha256, size, form and origin of the file; version that read it
    parity                         figures of the comparison with the file's own graph (once "proof")
    released, recognition          "whole" if all tensors are those of the network that MIT released, bit for
                                   bit, else the last layer up to which they are, or null; the same in words
    torch7_parity                  figures of the comparison with what Torch7 computed with that network
    sha256                         of the tensors, checked at every load
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from soundnet_port.errors import SoundNetError
from soundnet_port.files import atomic_write
from soundnet_port.network.architecture import ARCHITECTURES, CLASSES, Architecture

if TYPE_CHECKING:
    import torch

    from soundnet_port.network.model import SoundNet

METADATA_KEY = "soundnet_port"
SUFFIX = ".safetensors"
SHIPPED = Path(__file__).resolve().parent.parent / "shipped"  # in a checkout these are in weights/
IN_FOLDER = "model.safetensors"  # of a network saved for the Hugging Face hub (hub.py)


# name, type, default
_METADATA: tuple[tuple[str, Any, Any], ...] = (
    ("architecture", str, ""),
    ("widths", list, []),
    ("heads", dict, {}),
    ("classifier", (dict, type(None)), None),
    ("training", dict, {}),
    ("categories", (dict, type(None)), None),
    ("license", (str, type(None)), None),
    ("source", dict, {}),
    ("converter", str, ""),
    ("parity", dict, {}),
    ("released", (str, type(None)), None),
    ("recognition", str, ""),
    ("torch7_parity", dict, {}),
    ("ignored", list, []),
)


class WeightsError(SoundNetError):
    """A weights file is missing, damaged, or not one of ours."""


class WeightsNotFoundError(WeightsError):
    """There are no weights of that name in any weights folder."""


def build_model(
    architecture: Architecture,
    state: Mapping[str, torch.Tensor],
    categories: Mapping[str, Sequence[str]] | None = None,
    device: str | torch.device = "cpu",
) -> SoundNet:
    """Build the network of these tensors, in evaluation mode and frozen."""
    import torch

    from soundnet_port.network.model import SoundNet

    with torch.device("meta"):  # no random initialization, no second copy
        model = SoundNet(architecture, categories)
    model.load_state_dict(state, assign=True)
    return model.to(device).eval().requires_grad_(False)


def weights_folders() -> list[Path]:
    """Return the folders that are searched for weights by name, in order."""
    folders = []
    if os.environ.get("SOUNDNET_WEIGHTS"):
        folders.append(_expand_user(os.environ["SOUNDNET_WEIGHTS"]))
    checkout = Path(__file__).resolve().parent.parent.parent
    if (checkout / "setup.cfg").is_file() and (checkout / "conversion").is_dir():
        folders.append(checkout / "weights")
    folders.append(platformdirs.user_data_path("soundnet-port", appauthor=False) / "weights")
    return folders


def folder_for_new_weights() -> Path:
    """Return the first of the weights folders that can be written, or created.

    Raises:
        WeightsError: there is none.
    """
    folders = weights_folders()
    for folder in folders:
        with suppress(OSError):
            existing = next(path for path in (folder, *folder.parents) if path.exists())
            if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
                return folder
    searched = ", ".join(map(str, folders))
    raise WeightsError(f"no folder for weights can be written ({searched}); name a file with -o")


def find_weights(name_or_path: str | os.PathLike[str]) -> Path:
    """Find a weights file by its name or path.

    Raises:
        WeightsError: there is none, or it still has to be converted.
    """
    path = _expand_user(name_or_path)
    if path.suffix.lower() in (".t7", ".zip") or (
        path.suffix.lower() in (".npy", ".pth", ".pt") and path.exists()
    ):
        raise WeightsError(f"{path}: not converted yet; first: soundnet-port convert {path}")
    if path.suffix == SUFFIX or path.name != str(name_or_path):
        if path.is_file():
            return path
        if (path / IN_FOLDER).is_file():
            return path / IN_FOLDER
        kind = "is a directory, not a weights file" if path.is_dir() else "no such weights file"
        raise WeightsError(f"{path}: {kind}; soundnet-port convert makes them from Torch7's .t7")
    candidates = [folder / f"{path.name}{SUFFIX}" for folder in (*weights_folders(), SHIPPED)]
    for candidate in candidates:
        with suppress(OSError):  # a folder that may not be entered is one without weights
            if candidate.is_file():
                return candidate
    known = ""
    if path.name not in ARCHITECTURES:
        names = {*ARCHITECTURES, *(name for name, _ in list_weights())}
        known = f" (known names: {', '.join(sorted(names))})"
    raise WeightsNotFoundError(
        f"no weights named {path.name!r} here{known}; looked for "
        f"{', '.join(map(str, candidates[:-1]))}. Get MIT's with 'soundnet-port fetch' or "
        "'soundnet-port convert soundnet_models_public.zip', or try 'soundnet-port demo'"
    )


def list_weights() -> Iterator[tuple[str, Path]]:
    """Yield name and file of all weights that can be found by name, in the order of the folders."""
    names = set()
    for folder in (*weights_folders(), SHIPPED):
        with suppress(OSError):  # a folder that may not be entered is one without weights
            for path in sorted(folder.glob(f"*{SUFFIX}")):
                if path.stem not in names:
                    names.add(path.stem)
                    yield path.stem, path


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the metadata of a weights file.

    Raises:
        WeightsError: the file cannot be read or is not a weights file of this project.
    """
    with _open_safetensors(path) as file:
        return _read_metadata(path, file)


def read_weights(
    path: str | os.PathLike[str],
) -> tuple[Architecture, dict[str, torch.Tensor], dict[str, Any]]:
    """Read architecture, state dict (float32, on the CPU) and metadata of a weights file.

    Names, shapes, types and the checksum of all tensors are verified.

    Raises:
        WeightsError: the file cannot be read, is damaged, or is not one of ours.
    """
    import torch

    with _open_safetensors(path) as file:
        metadata = _read_metadata(path, file)
        try:
            state = {name: file.get_tensor(name) for name in sorted(file.keys())}
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise WeightsError(f"{path}: damaged ({error})") from None
    sizes = [*metadata["widths"], *metadata["heads"].values()]
    try:
        if not all(type(size) is int for size in sizes):
            raise ValueError("sizes that are no whole numbers")
        architecture = _parse_architecture(metadata)
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path}: its metadata describe no SoundNet ({error})") from None
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    expected = architecture.state_shapes()
    for name in sorted({*shapes, *expected}):
        if shapes.get(name) != expected.get(name):
            raise WeightsError(
                f"{path}: {name} is {shapes.get(name, 'missing')}, expected {expected.get(name, 'nothing')}"
            )
        if state[name].dtype != torch.float32:
            raise WeightsError(f"{path}: {name} is {state[name].dtype}, expected torch.float32")
    categories = metadata["categories"]
    if categories and {head: len(names) for head, names in categories.items()} != architecture.output_sizes:
        raise WeightsError(f"{path}: its category names do not fit its heads")
    if checksum(state) != metadata.get("sha256"):
        raise WeightsError(f"{path}: damaged (its tensors do not have the checksum they were written with)")
    return architecture, state, metadata


def write_weights(
    path: str | os.PathLike[str],
    architecture: Architecture,
    state: Mapping[str, torch.Tensor],
    metadata: Mapping[str, Any],
) -> None:
    """Write a weights file, all or nothing; equal content gives equal bytes.

    Raises:
        WeightsError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    complete = {
        **{name: default for name, _, default in _METADATA},
        **metadata,
        "architecture": architecture.name,
        "widths": list(architecture.widths),
        "heads": architecture.output_sizes,
        "classifier": _classifier(architecture),
        "sha256": checksum(state),
    }
    with atomic_write(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # by the user's umask; safetensors makes private files
        try:
            save_file(dict(state), temporary, {METADATA_KEY: json.dumps(complete, sort_keys=True)})
        except SafetensorError as error:
            raise WeightsError(f"{Path(path).parent}: weights cannot be written there ({error})") from None
        temporary.chmod(mode)


def _parse_architecture(metadata: Mapping[str, Any]) -> Architecture:
    """Return the architecture that metadata describe."""
    full = ARCHITECTURES[metadata["architecture"]]
    if metadata["classifier"] is None:
        return full.resized(metadata["widths"], metadata["heads"])
    (classes,) = metadata["heads"].values()
    if "layers" in metadata["classifier"]:
        layers, seconds = metadata["classifier"]["layers"], float(metadata["classifier"]["seconds"])
        return full.with_pooled_head(classes, layers, seconds).resized(metadata["widths"], {})
    layer, kernel = metadata["classifier"]["layer"], metadata["classifier"]["kernel"]
    if type(kernel) is not int or set(metadata["heads"]) != {CLASSES}:
        raise ValueError("a head that is not one of classes")
    return full.with_classes(classes, layer, kernel).resized(metadata["widths"], metadata["heads"])


def _classifier(architecture: Architecture) -> dict[str, Any] | None:
    if pooled := architecture.pooled_head:
        return {"layers": list(pooled.layers), "seconds": pooled.seconds}
    if [head.name for head in architecture.heads] != [CLASSES]:
        return None
    return {"layer": architecture.last_layer, "kernel": architecture.heads[0].kernel}


def cpu_state_dict(model: SoundNet, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Return the tensors that a weights file holds of a network, on the CPU, as `dtype` if given."""
    state = model.state_dict()
    return {name: state[name].to("cpu", dtype).contiguous() for name in model.architecture.state_shapes()}


def checksum(state: Mapping[str, torch.Tensor]) -> str:
    """Compute the sha256 over all tensors in the order of their names."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        # as bytes, since NumPy has no bfloat16; flat, since a scalar has no view
        flat = state[name].contiguous().flatten()
        if flat.stride(0) != 1:  # `contiguous` keeps the stride 0 of a dimension of size 1
            flat = flat.clone(memory_format=torch.contiguous_format)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _expand_user(path: str | os.PathLike[str]) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # ~nobody
        raise WeightsError(f"{os.fspath(path)}: {error}") from None


@contextmanager
def _open_safetensors(path: str | os.PathLike[str]) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with open(path, "rb"):  # safetensors has one message for all that can go wrong here
            pass
        with safe_open(os.fspath(path), framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise WeightsError(f"{path}: not a safetensors file, or a damaged one ({error})") from None
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror or error}") from None


def _read_metadata(path: str | os.PathLike[str], file: Any) -> dict[str, Any]:
    """Read the metadata, complete and with the types that the rest of the program counts on."""
    try:
        metadata = json.loads(file.metadata()[METADATA_KEY])
    except (TypeError, KeyError, ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise WeightsError(f"{path}: safetensors, but without SoundNet's metadata; not made by convert")
    # keys of earlier versions
    if metadata.pop("released_front", None) is True:  # conv1 and conv2 were compared
        metadata.setdefault("released", "pool2")
    if "proof" in metadata:
        metadata.setdefault("parity", metadata.pop("proof"))
    for name, kind, default in _METADATA:
        value = metadata.setdefault(name, default)
        if not isinstance(value, kind):
            raise WeightsError(f"{path}: its metadata are damaged ({name} is a {type(value).__name__})")
    lists = [metadata["ignored"], *(metadata["categories"] or {}).values()]
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists):
        raise WeightsError(f"{path}: its metadata are damaged (names that are no text)")
    return metadata
