"""Convert the weights of other ports of SoundNet.

Their files hold tensors without a graph, so no parity check is possible. Reported instead are missing
tensors, whether they are the released network's, and, if weights converted from Torch7 exist, how much each
module differs from those.
"""

from __future__ import annotations

import re
import time
import tokenize
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soundnet_port.conversion.convert import (
    ConversionError,
    conversion_errors,
    describe,
    keep_existing,
    resolve_destination,
)
from soundnet_port.conversion.port_comparison import (
    ModuleDifference,
    Reference,
    compare_modules,
    find_reference,
    suggest_remedy,
)
from soundnet_port.conversion.port_files import STATE_DICT, digits_of, port_format, read_tensors
from soundnet_port.conversion.port_networks import PortNetwork, check_values, describe_missing, select_network
from soundnet_port.conversion.recognition import WHOLE, Recognition, recognize
from soundnet_port.conversion.released_parity import (
    ReleasedParity,
    check_released_parity,
    recognition_metadata,
)
from soundnet_port.conversion.t7_objects import format_value
from soundnet_port.files import atomic_write, stream_sha256
from soundnet_port.network.architecture import ARCHITECTURES
from soundnet_port.network.categories import original_categories
from soundnet_port.network.weights import read_weights, write_weights
from soundnet_port.version import __version__


@dataclass(frozen=True)
class PortResult:
    """The result of converting a port's weights.

    Attributes:
        source: path of the port's file.
        weights: path of the weights.
        form: `NPY` or `STATE_DICT`.
        network: description of the architecture.
        metadata: as stored in the weights.
        recognition: whether it is the released network.
        released_parity: of the released network, the comparison with Torch7's recordings; else None.
        against: the weights it was compared with, or None.
        not_compared: why there is no comparison; empty if there is one.
        differences: a row per module.
        seconds: time taken.
        unchanged: weights with these tensors already exist, and stay.
    """

    source: str
    weights: Path
    form: str
    network: str
    metadata: Mapping[str, Any]
    recognition: Recognition
    released_parity: ReleasedParity | None
    against: Path | None
    not_compared: str
    differences: list[ModuleDifference]
    seconds: float
    unchanged: bool


def convert_port(
    source: str | Path,
    destination: str | Path | None = None,
    *,
    against: str | Path | None = None,
    force: bool = False,
    origin: str = "",
) -> PortResult:
    """Convert another port's weights, which are recognized as the released network or compared with others.

    Args:
        source: a `.npy` or a file with a PyTorch state dict.
        destination: as for `convert`. In a folder, or without it, the released network, recognized bit
            for bit, is named "soundnet8"; all others keep the file's name.
        against: weights to compare with; by default those of the architecture's name, if any.
        force: replace weights that differ.
        origin: of a temporary file, for messages and metadata.

    Raises:
        ConversionError: it is not SoundNet, or something is missing or wrong; nothing was written.
    """
    start = time.perf_counter()
    path = Path(source)
    source_name = origin or str(path)
    form = port_format(path) or STATE_DICT
    network = read_port(path, source_name)
    architecture, state = network.architecture, network.state
    missing = describe_missing(architecture, state)
    recognition = recognize(architecture, state)
    name = re.sub(r"(\.(npy|pth|pt|tar))+$", "", path.name, flags=re.IGNORECASE).lstrip(".")
    if recognition.released == WHOLE:
        name = architecture.name
    elif name in ARCHITECTURES:
        name = f"{name}-port"
    if destination is None and not name:
        raise ConversionError(f"{source_name}: a file without a name; give -o one for the weights")
    target = resolve_destination(destination, name)
    if recognition.released == WHOLE and against is None:
        reference = Reference(reason="it is the released network")
    else:
        reference = find_reference(architecture, against, target)
    if missing:
        raise ConversionError(
            f"{source_name}: without its {missing} this cannot give SoundNet's numbers; "
            + suggest_remedy(architecture, state, reference)
        )
    state = {key: state[key] for key in architecture.state_shapes()}
    with _port_errors(source_name):
        check_values(state)
    with conversion_errors(source_name):
        recordings = check_released_parity(architecture, state, recognition)
    no_graph = [] if recordings else [f"no parity check: another port's file ({form}) has no graph to run"]
    with open(path, "rb") as file:
        source_metadata = {"sha256": stream_sha256(file), "bytes": path.stat().st_size, "form": form}
    metadata: dict[str, Any] = {
        "categories": original_categories(architecture.head_sizes),
        "source": source_metadata | ({"origin": origin} if origin else {}),
        "converter": __version__,
        **recognition_metadata(recognition, recordings),
        "ignored": [*no_graph, *network.notes],
    }
    with atomic_write(target) as draft:
        write_weights(draft, architecture, state, metadata)
        read_weights(draft)
        unchanged = keep_existing(draft, target, force)
    differences = list(compare_modules(architecture, state, reference.state)) if reference.state else []
    return PortResult(
        source_name,
        target,
        form,
        describe(architecture),
        metadata,
        recognition,
        recordings,
        reference.path if reference.state else None,
        reference.reason,
        differences,
        time.perf_counter() - start,
        unchanged,
    )


def read_port(path: Path, name: str = "") -> PortNetwork:
    """Read the SoundNet in a port's file; errors call it by `name`, if given.

    Raises:
        ConversionError: it cannot be read, or holds something else.
    """
    with _port_errors(name or path):
        return select_network(read_tensors(path))


def describe_port(path: Path) -> Iterator[str]:
    """Yield lines that describe a port's file: its modules with their tensors, and what is missing.

    Raises:
        ConversionError: it cannot be read.
    """
    with _port_errors(path):
        candidates = read_tensors(path)
    yield f"{path}: {port_format(path)}, {path.stat().st_size:,} bytes"
    for dict_name, tensors in candidates.items():
        if dict_name:
            yield f"  in {format_value(dict_name)}:"
        modules = sorted(tensors.convolutions + tensors.norms, key=lambda module: digits_of(module[0]))
        for name, parameters in modules:
            shapes = (f"{key} {'x'.join(map(str, tensor.shape))}" for key, tensor in parameters.items())
            yield f"  {format_value(name)}  {' '.join(shapes)}"
    try:
        with _port_errors(path):
            network = select_network(candidates)
    except ConversionError as error:
        yield f"not convertible: {error}"
        return
    missing = describe_missing(network.architecture, network.state)
    yield f"not convertible: without its {missing}" if missing else describe(network.architecture)
    yield recognize(network.architecture, network.state).summary
    for note in network.notes:
        yield f"  note: {note}"


# Raised by numpy's header parser, the pickle reader and torch on damaged bytes
_DAMAGE_ERRORS = (
    *(ValueError, TypeError, LookupError, AttributeError, StopIteration, ArithmeticError),
    *(RuntimeError, MemoryError, SyntaxError, tokenize.TokenError, zipfile.BadZipFile),
)


@contextmanager
def _port_errors(path: str | Path) -> Iterator[None]:
    """Turn the errors of reading a port's file into `ConversionError`, with the file's name."""
    try:
        yield
    except ConversionError:
        raise
    except OSError as error:
        raise ConversionError(f"{path}: {error.strerror or error}") from None
    except _DAMAGE_ERRORS as error:
        detail = str(error) if type(error) is ValueError else "damaged, or of another program"
        raise ConversionError(f"{path}: {' '.join(detail.split())}; not a SoundNet of another port") from None
