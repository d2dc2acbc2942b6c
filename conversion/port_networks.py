"""Arrange a port's tensors into the architecture of a SoundNet, by kernels, channels and names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from soundnet_port.conversion.port_files import NamedModules, PortTensors, digits_of
from soundnet_port.conversion.t7_objects import format_value
from soundnet_port.network.architecture import ARCHITECTURES, BATCH_NORM_EPS, SOUNDNET8, Architecture

MAX_NAMES = 8  # in one note
_HEAD_HINTS = {"objects": ("obj", "imagenet"), "scenes": ("scn", "scene", "place")}


@dataclass
class PortNetwork:
    """A SoundNet in a port's file: its tensors under our names; some may be missing."""

    architecture: Architecture
    state: dict[str, Tensor]
    notes: list[str]


def select_network(candidates: Mapping[str, PortTensors]) -> PortNetwork:
    """Arrange the one SoundNet among a file's dicts of tensors; equal copies are one.

    Raises:
        ValueError: there is none, or several that differ.
    """
    networks: dict[str, PortNetwork] = {}
    errors: list[ValueError] = []
    for name, tensors in candidates.items():
        try:
            networks[name] = _arrange(tensors)
        except ValueError as error:
            errors.append(error)
    if not networks:
        raise errors[0]
    name, network = next(iter(networks.items()))
    for other in list(networks.values())[1:]:
        if other.state.keys() != network.state.keys() or any(
            not torch.equal(tensor, other.state[key]) for key, tensor in network.state.items()
        ):
            names = ", ".join(format_value(name) or "the file itself" for name in networks)
            raise ValueError(f"holds several networks ({names}); save one of them alone")
    if name:
        network.notes.append(f"network found at {format_value(name)}")
    return network


def _arrange(tensors: PortTensors) -> PortNetwork:
    template = _select_template(tensors.convolutions)
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
    unused = []
    for name, weights in tensors.convolutions[depth:]:
        if tuple(weights["weight"].shape[1:]) == (channels, template.heads[0].kernel) and len(heads) < 2:
            heads[_identify_head(name, len(weights["weight"]), template, heads)] = weights
        elif tuple(weights["weight"].shape[1:]) == (1, template.blocks[0].kernel):
            raise ValueError(f"holds a second network at {format_value(name)}; save one of them alone")
        else:
            unused.append(name)
    if len(heads) == 1:
        unused.append(f"the head for {next(iter(heads))}, without the other one")
        heads = {}
    norms = _in_numeric_order(tensors.norms[:depth])
    unused += [name for name, _ in tensors.norms[depth:]] + tensors.rest
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
    notes = []
    if unused:
        more = " ..." if len(unused) > MAX_NAMES else ""
        notes.append(f"not used: {', '.join(map(format_value, unused[:MAX_NAMES]))}{more}")
    return PortNetwork(architecture, state, notes)


def _select_template(convolutions: NamedModules) -> Architecture:
    """Return the architecture with the kernels of these convolutions."""
    kernels = [weights["weight"].shape[2] for _, weights in convolutions]
    for template in sorted(ARCHITECTURES.values(), key=lambda architecture: -len(architecture.blocks)):
        depth = len(template.blocks)
        if kernels[:depth] != [block.kernel for block in template.blocks]:
            continue
        widths = tuple(len(weights["weight"]) for _, weights in convolutions[:depth])
        # the 8-layer trunk begins with the kernels of the 5-layer one
        if template.heads[0].kernel in kernels[depth:] or template is SOUNDNET8 or widths == template.widths:
            return template
        raise ValueError(
            f"its convolutions have the kernels {format_value(str(kernels))}: an 8-layer SoundNet of which "
            "something is missing, or a 5-layer one without heads"
        )
    expected = " or ".join(str([b.kernel for b in known.blocks]) for known in ARCHITECTURES.values())
    raise ValueError(f"its convolutions have the kernels {format_value(str(kernels))}, expected {expected}")


def _identify_head(name: str, size: int, template: Architecture, taken: Mapping[str, Any]) -> str:
    """Identify a head by its size, else its name, else its position; size and name must agree."""
    last = name.rpartition(".")[2].lower()
    by_name = [head for head, hints in _HEAD_HINTS.items() if any(hint in last for hint in hints)]
    by_size = [head.name for head in template.heads if head.categories == size]
    if by_name and by_size and by_name != by_size:
        raise ValueError(f"{format_value(name)} has {size} categories, which are the {by_size[0]}")
    free = [head.name for head in template.heads if head.name not in taken]
    selected = (by_size or by_name or free)[0]
    if selected not in free:
        raise ValueError(f"{format_value(name)} is a second head for {selected}")
    return selected


def _in_numeric_order(norms: NamedModules) -> NamedModules:
    """Sort batch norms by name if the names count from 1 (bn1, bn2, ...); else keep the order."""
    numbers = [digits_of(name.rpartition(".")[2]) for name, _ in norms]
    if sorted(numbers) == [[n] for n in range(1, len(norms) + 1)]:
        return [norms[numbers.index([n])] for n in range(1, len(norms) + 1)]
    return norms


def describe_missing(architecture: Architecture, state: Mapping[str, Tensor]) -> str:
    """Describe the tensors that are missing or were never copied; empty if there are none."""
    absent = [name for name in architecture.state_shapes() if name not in state]
    mean, variance, gain, shift = (
        {block.norm for block in architecture.blocks if _is_constant(state, f"{block.norm}.{name}", value)}
        for name, value in (("running_mean", 0), ("running_var", 1), ("weight", 1), ("bias", 0))
    )
    parts = []
    for text, initial in (
        ("batch-norm statistics (running_mean 0 and running_var 1 in {}: never copied)", mean & variance),
        ("batch-norm weights (weight 1 and bias 0 in {}: never copied)", gain & shift),
    ):
        if initial:
            parts.append(text.format(", ".join(sorted(initial))))
    if absent:
        parts.append(f"missing tensors ({', '.join(absent)})")
    return " and its ".join(parts)


def _is_constant(state: Mapping[str, Tensor], name: str, value: float) -> bool:
    return name in state and bool((state[name] == value).all())


def check_values(state: Mapping[str, Tensor]) -> None:
    """Check that all values are finite and each variance + eps is positive.

    Raises:
        ValueError: naming the first tensor that fails.
    """
    for name, tensor in state.items():
        count = int((~torch.isfinite(tensor)).sum())
        if count:
            raise ValueError(f"{name}: {count:,} of its {tensor.numel():,} values are NaN or infinite")
        if name.endswith("running_var") and not bool((tensor + BATCH_NORM_EPS > 0).all()):
            raise ValueError(f"{name}: variance {float(tensor.min()):g}, expected variance + eps > 0")
