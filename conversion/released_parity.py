"""Compare the released SoundNet-8 on this machine with recordings of real Torch7.

`soundnet8_torch7.npz` holds what torch7 814ea4a with nn 8726825 computed with the released weights on
the example sounds that ship with the package: of all 24 modules, both heads and both softmaxes, up to
1,000 values spread evenly over each output, and its largest absolute value. `benchmarks/make_released.py`
made it. Named layers are compared twice, for they have two implementations: the engine's and the modules'.

    about                 JSON: what made it, checksum of the weights, the inputs
    <i>/<output>/shape    (channels, frames); <output> is "1" to "24", "objects", "scenes",
    <i>/<output>/values       "24 ordinary" (without the last frame), "objects softmax", "scenes softmax"
    <i>/<output>/largest
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from soundnet_port.audio.examples import example
from soundnet_port.audio.loading import load_audio
from soundnet_port.conversion.golden import sample_evenly
from soundnet_port.conversion.recognition import WHOLE, Recognition
from soundnet_port.errors import SoundNetError
from soundnet_port.network.architecture import Architecture
from soundnet_port.network.evaluation_mode import evaluation_mode
from soundnet_port.network.model import SoundNet
from soundnet_port.network.weights import build_model

# Relative to a layer's largest value. Float32's own rounding: on 14 sounds Torch7 is up to 5.2e-6 from
# float64 at the heads and 3.5e-6 in the trunk, and this network about 1e-6.
TOLERANCE = 1e-5
# conv7's last frame sees zeros after the sound's end and is up to a hundred times as large as all others;
# measured against their own largest value, Torch7 is up to 7.7e-6 from float64 in those, this network 3.2e-6.
ORDINARY_TOLERANCE = 2e-5
SOFTMAX_TOLERANCE = 2e-5  # absolute
VALUES = 1_000
ORDINARY, SOFTMAX = " ordinary", " softmax"


class ReleasedParityError(SoundNetError):
    """The released network does not compute on this machine what Torch7 computed with it."""


@dataclass(frozen=True)
class ReleasedLayerParity:
    """One output of the network compared with Torch7's, the worst of all recorded inputs.

    Attributes:
        module: Torch7's number, or "25.1" and "25.2" for the heads.
        layer: its name, such as "conv7", "conv7, ordinary frames" or "objects, softmax".
        computed_by: "modules" or "engine".
        error: largest absolute difference.
        relative: error relative to the output's largest absolute value; for softmax the error itself.
        tolerance: largest relative difference allowed.
    """

    module: str
    layer: str
    computed_by: str
    error: float
    relative: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether it is within the tolerance; NaN is not."""
        return self.relative <= self.tolerance


@dataclass(frozen=True)
class ReleasedParity:
    """The released network compared with Torch7's recordings.

    Attributes:
        layers: a row for each output and implementation.
        inputs: example sounds and repetitions, such as "waves x 3".
    """

    layers: list[ReleasedLayerParity]
    inputs: list[str]

    @property
    def passed(self) -> bool:
        """Whether every output is within its tolerance."""
        return all(layer.passed for layer in self.layers)

    @property
    def worst(self) -> ReleasedLayerParity:
        """The output that is closest to its tolerance, or furthest beyond it."""
        return _worst(self.layers)

    @property
    def summary(self) -> str:
        """What was compared and how closely it agrees, in one line."""
        groups = (
            ("layers", "", TOLERANCE),
            ("conv7's ordinary frames", "ordinary", ORDINARY_TOLERANCE),
            ("softmax", "softmax", SOFTMAX_TOLERANCE),
        )
        texts = []
        for name, part, tolerance in groups:
            worst = _worst(row for row in self.layers if part in row.layer and row.tolerance == tolerance)
            texts.append(f"{name} within {worst.relative:.1e} ({tolerance:.0e} allowed)")
        return f"compared with {len(self.inputs)} recordings of real Torch7: {', '.join(texts)}"

    def table(self) -> str:
        """Format all rows as text; those beyond their tolerance are marked."""
        header = ("module", "layer", "computed by", "error", "relative", "allowed", "")
        rows = [
            (
                *(row.module, row.layer, row.computed_by),
                *(f"{row.error:.1e}", f"{row.relative:.1e}", f"{row.tolerance:.0e}"),
                "" if row.passed else "  <- differs",
            )
            for row in self.layers
        ]
        return "\n".join("  {:>8}  {:<24}{:<13}{:>9}{:>10}{:>9}{}".format(*row) for row in (header, *rows))

    def to_metadata(self) -> dict[str, Any]:
        """Return the figures as weights files keep them, to two digits."""
        return {
            "inputs": self.inputs,
            "layers": [
                [row.module, row.layer, row.computed_by, float(f"{row.relative:.1e}"), row.tolerance]
                for row in self.layers
            ],
            "worst": float(f"{self.worst.relative:.1e}"),
        }


def compare_with_torch7(model: SoundNet) -> ReleasedParity:
    """Run the released network on the recorded inputs and compare all outputs with Torch7's.

    Args:
        model: the released SoundNet-8, on any device; used in evaluation mode, whatever mode it is in.

    Raises:
        ReleasedParityError: an example sound is not decoded to the recorded samples.
    """
    recordings = load_recordings()
    inputs = json.loads(str(recordings["about"]))["inputs"]
    rows: dict[tuple[str, str], ReleasedLayerParity] = {}
    with evaluation_mode(model):
        for number, settings in enumerate(inputs):
            waveform = _input(settings)
            for computed_by in ("modules", "engine"):
                for output, values in _outputs(model, waveform, computed_by == "modules"):
                    row = _compare(model, output, computed_by, values, recordings, f"{number}/{output}")
                    worst = rows.get((output, computed_by))
                    if worst is None or not row.relative <= worst.relative:  # keeps NaN
                        rows[output, computed_by] = row
    names = [f"{settings['example']} x {settings['repetitions']}" for settings in inputs]
    return ReleasedParity(list(rows.values()), names)


def check_released_parity(
    architecture: Architecture, state: Mapping[str, torch.Tensor], recognition: Recognition
) -> ReleasedParity | None:
    """Compare a network with Torch7's recordings if it is the released one, bit for bit.

    Raises:
        ReleasedParityError: this machine does not compute what Torch7 computed.
    """
    if recognition.released != WHOLE:
        return None
    parity = compare_with_torch7(build_model(architecture, state))
    if not parity.passed:
        worst = parity.worst
        raise ReleasedParityError(
            f"the released network, but {worst.layer} ({worst.computed_by}) is off Torch7's recording by "
            f"{worst.relative:.1e} on this machine ({worst.tolerance:.0e} is allowed)"
        )
    return parity


def recognition_metadata(recognition: Recognition, parity: ReleasedParity | None) -> dict[str, Any]:
    """Return what weights files keep of a recognition and a comparison with Torch7's recordings."""
    return {
        "released": recognition.released,
        "recognition": recognition.summary,
        "torch7_parity": parity.to_metadata() if parity else {},
    }


@functools.cache
def load_recordings() -> dict[str, NDArray[Any]]:
    """Load Torch7's recordings, as described at the top of this module."""
    resource = importlib.resources.files(__package__).joinpath("soundnet8_torch7.npz")
    with resource.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _worst(rows: Iterable[ReleasedLayerParity]) -> ReleasedLayerParity:
    return max(rows, key=lambda row: np.nan_to_num(row.relative / row.tolerance, nan=np.inf))


def _input(settings: Mapping[str, Any]) -> torch.Tensor:
    path = example(settings["example"])
    waveform = load_audio(path).repeat(settings["repetitions"])
    if hashlib.sha256(waveform.numpy().astype("<f4").tobytes()).hexdigest() != settings["sha256"]:
        raise ReleasedParityError(f"{path}: not the samples that were recorded; reinstall soundnet-port")
    return waveform


def _outputs(
    model: SoundNet, waveform: torch.Tensor, all_modules: bool
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield (output, (channels, frames)) of all modules, or of the named layers alone."""
    layers = model.architecture
    keys: list[int | str] = [
        m.module if all_modules else m.name for m in layers.modules if all_modules or m.is_layer
    ]
    keys += list(layers.head_sizes)
    device = next(model.parameters()).device
    with torch.inference_mode():
        extracted = model.extract(waveform.to(device), keys)
    last = str(layers.modules[-1].module)
    for key, values in extracted.items():
        output = key if key in layers.head_sizes else str(layers.layer(key).module)
        array = values[0].float().cpu().numpy()
        yield output, array
        if output == last:
            yield output + ORDINARY, array[:, :-1]
        if key in layers.head_sizes:
            yield output + SOFTMAX, torch.softmax(values[0].float(), 0).cpu().numpy()


def _compare(
    model: SoundNet,
    output: str,
    computed_by: str,
    values: NDArray[np.float32],
    recordings: Mapping[str, NDArray[Any]],
    prefix: str,
) -> ReleasedLayerParity:
    heads = list(model.architecture.head_sizes)
    key = output.removesuffix(ORDINARY).removesuffix(SOFTMAX)
    if values.shape != tuple(recordings[f"{prefix}/shape"]):
        error = float("inf")
    else:
        error = float(
            np.abs(sample_evenly(values, VALUES) - recordings[f"{prefix}/values"].astype(np.float64)).max()
        )
    if key in heads:
        module, layer = f"{model.architecture.layer(key).module}.{heads.index(key) + 1}", key
    else:
        module, layer = key, _name(model, int(key))
    if output.endswith(SOFTMAX):
        return ReleasedLayerParity(module, f"{layer}, softmax", computed_by, error, error, SOFTMAX_TOLERANCE)
    relative, tolerance = error / float(recordings[f"{prefix}/largest"]), TOLERANCE
    if output.endswith(ORDINARY):
        layer, tolerance = f"{layer}, ordinary frames", ORDINARY_TOLERANCE
    return ReleasedLayerParity(module, layer, computed_by, error, relative, tolerance)


def _name(model: SoundNet, module: int) -> str:
    layer = model.architecture.modules[module - 1]
    if layer.is_layer:
        return layer.name
    return f"{layer.parameters} (bare)" if layer.kind == "conv" else layer.parameters
