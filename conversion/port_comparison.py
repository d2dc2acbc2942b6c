"""Compare a port's weights with weights that were converted from Torch7, module by module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from soundnet_port.conversion.convert import ConversionError, describe
from soundnet_port.conversion.parity import SAMPLES, parity_signal
from soundnet_port.conversion.recognition import released_checksum
from soundnet_port.network.architecture import Architecture
from soundnet_port.network.weights import WeightsError, build_model, find_weights, read_weights


@dataclass(frozen=True)
class ModuleDifference:
    """One module of a port's weights compared with converted ones.

    Attributes:
        layer: "conv1", "bn1", ..., "objects", "scenes".
        parameters: largest difference of its tensors, relative to each tensor's largest value.
        output: the same of the network's output at the module, for the parity check's test signal.
    """

    layer: str
    parameters: float
    output: float


@dataclass(frozen=True)
class Reference:
    """Weights to compare with; without any, the reason."""

    path: Path | None = None
    state: dict[str, Tensor] | None = None
    reason: str = ""


def find_reference(architecture: Architecture, against: str | Path | None, target: Path) -> Reference:
    """Read the requested weights, or else those of the architecture's name; the trunk must fit.

    Weights that were not requested must be the released network's or have passed a parity check, and lie
    elsewhere than `target`.

    Raises:
        ConversionError: the requested weights cannot be read or do not fit.
    """
    try:
        path = find_weights(against or architecture.name)
    except WeightsError as error:
        if against is not None:
            raise ConversionError(str(error)) from None
        return Reference(reason=f"no {architecture.name} converted from Torch7 exists (soundnet-port fetch)")
    try:
        other, state, metadata = read_weights(path)
    except WeightsError as error:
        if against is not None:
            raise ConversionError(str(error)) from None
        return Reference(reason=str(error))
    if (other.name, other.widths) != (architecture.name, architecture.widths):
        reason = f"{path} is {describe(other)}; the file is {describe(architecture)}"
        if against is not None:
            raise ConversionError(reason)
        return Reference(reason=reason)
    is_checked = "worst" in metadata["parity"] or metadata["sha256"] == released_checksum()
    if against is None and (not is_checked or path.resolve() == target.resolve()):
        return Reference(reason=f"{path} has not passed a parity check (--against compares with it)")
    return Reference(path, state)


def compare_modules(
    architecture: Architecture, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
) -> Iterator[ModuleDifference]:
    """Compare the tensors and the output of each module with parameters, in order.

    Args:
        architecture: of our network.
        ours: state dict.
        theirs: state dict of the reference, with the same trunk.
    """
    common = {
        head: size
        for head, size in architecture.head_sizes.items()
        if f"{head}.bias" in theirs and len(theirs[f"{head}.bias"]) == size
    }
    if len(common) < 2:
        common = {}
    architecture = architecture.resized(architecture.widths, common)
    signal = torch.from_numpy(parity_signal(SAMPLES[architecture.name]))
    names = architecture.state_shapes()
    models = [build_model(architecture, {name: state[name] for name in names}) for state in (ours, theirs)]
    modules: dict[str | int, str] = {m.module: m.parameters for m in architecture.modules if m.parameters}
    modules |= {head: head for head in common}
    outputs = [model.extract(signal, list(modules)) for model in models]
    for key, module in modules.items():
        parameters = [name for name in names if name.startswith(f"{module}.")]
        yield ModuleDifference(
            module,
            max(_relative(ours[name], theirs[name]) for name in parameters),
            _relative(outputs[0][key], outputs[1][key]),
        )


def _relative(ours: Tensor, theirs: Tensor) -> float:
    error = float((ours - theirs).abs().max())
    largest = float(theirs.abs().max()) or float(ours.abs().max())
    return error / largest if largest else 0.0


def suggest_remedy(architecture: Architecture, state: Mapping[str, Tensor], reference: Reference) -> str:
    """Suggest what to do about missing tensors."""
    fetch = "convert MIT's own files: soundnet-port fetch"
    if not reference.state:
        return fetch
    names = [name for name in architecture.state_shapes() if name in state and not name.startswith("bn")]
    equal = [name for name in names if torch.equal(state[name], reference.state.get(name, torch.empty(0)))]
    if len(equal) == len(names):
        return f"its convolutions are those of {reference.path}: use that"
    return f"{len(equal)} of its {len(names)} other tensors are those of {reference.path}; {fetch}"
