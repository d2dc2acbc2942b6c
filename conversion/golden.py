"""Pin a network's numbers in a file, to compare them on other machines, versions and devices.

A golden file (.npz) holds inputs, the outputs of every module, and what computed them:

    about                JSON: architecture, widths, heads, sha256 of the tensors, versions, device
    <i>/input            16-bit samples; the network gets them / 128
    <i>/<key>/shape      of module <key> ("1" to "24", "objects", "scenes")
    <i>/<key>/values     up to 4,096 values, evenly spread over the flat array
    <i>/<key>/largest    largest absolute value of all
"""

from __future__ import annotations

import json
import os
import platform
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from soundnet_port.errors import SoundNetError
from soundnet_port.files import atomic_write
from soundnet_port.network.architecture import SAMPLE_RATE
from soundnet_port.network.evaluation_mode import evaluation_mode
from soundnet_port.network.model import SoundNet
from soundnet_port.network.weights import checksum, cpu_state_dict
from soundnet_port.version import __version__

TOLERANCE = 1e-5  # of a layer's largest absolute value; machines and threads differ by about 2e-6
_VALUES = 4_096


class GoldenError(SoundNetError):
    """A golden file that cannot be used."""


@dataclass(frozen=True)
class LayerDifference:
    """One module's output for one input compared with the golden one."""

    samples: int  #: length of the input
    layer: str  #: Torch7's module number, or the head's name
    shape: tuple[int, ...]
    largest: float
    error: float  #: NaN for NaN, infinite for another shape
    relative: float

    @property
    def passed(self) -> bool:
        """Whether it is within the tolerance."""
        return self.relative <= TOLERANCE


@dataclass(frozen=True)
class GoldenComparison:
    """A network compared with a golden file.

    Attributes:
        differences: a row for each module and input.
        same_weights: the tensors are the golden file's, bit for bit.
        made_by: versions and device that made the file.
        run_by: versions and device of the comparison.
    """

    differences: list[LayerDifference]
    same_weights: bool
    made_by: dict[str, str]
    run_by: dict[str, str]

    @property
    def passed(self) -> bool:
        """Whether the weights are the same and every module is within the tolerance."""
        return self.same_weights and all(difference.passed for difference in self.differences)

    def table(self) -> str:
        """Format the differences as text, the failing ones marked."""
        lines = [f"{'samples':>9}  {'module':<8}{'shape':>18}{'largest':>10}{'error':>10}{'relative':>10}"]
        for d in self.differences:
            shape = " x ".join(map(str, d.shape))
            lines.append(
                f"{d.samples:>9,}  {d.layer:<8}{shape:>18}{d.largest:>10.3f}{d.error:>10.1e}"
                f"{d.relative:>10.1e}" + ("" if d.passed else "  <- differs")
            )
        return "\n".join(lines)


def save_golden(model: SoundNet, path: str | os.PathLike[str]) -> None:
    """Write a golden file of a network, all or nothing."""
    arrays: dict[str, NDArray[Any]] = {"about": np.array(json.dumps(_about(model)))}
    for number, samples in enumerate(_inputs(model)):
        arrays[f"{number}/input"] = samples
        for key, values in _activations(model, samples):
            arrays[f"{number}/{key}/shape"] = np.array(values.shape)
            arrays[f"{number}/{key}/values"] = sample_evenly(values)
            arrays[f"{number}/{key}/largest"] = np.array(np.abs(values).max())
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def compare_golden(model: SoundNet, path: str | os.PathLike[str]) -> GoldenComparison:
    """Run a network on a golden file's inputs and compare every module.

    Raises:
        GoldenError: the file cannot be read, or is of a network of another shape.
    """
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            golden = {name: file[name] for name in file.files}
        about = json.loads(str(golden["about"]))
        made_by = {name: str(value) for name, value in about["versions"].items()}
    except OSError as error:
        raise GoldenError(f"{path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise GoldenError(f"{path}: not a golden file, or a damaged one ({error})") from None
    current = _about(model)
    for name in ("architecture", "widths", "heads"):
        if about.get(name) != current[name]:
            raise GoldenError(
                f"{path}: of a network with {name} {about.get(name)}, this one has {current[name]}"
            )
    try:
        differences = list(_differences(model, golden))
    except (KeyError, TypeError) as error:
        raise GoldenError(f"{path}: not a golden file, or a damaged one ({error})") from None
    return GoldenComparison(
        differences, about.get("sha256") == current["sha256"], made_by, current["versions"]
    )


def assert_golden(model: SoundNet, path: str | os.PathLike[str]) -> None:
    """Fail a test with the table of differences unless a network matches its golden file.

    Raises:
        AssertionError: a module differs by more than `TOLERANCE`, or the weights differ.
        GoldenError: see `compare_golden`.
    """
    comparison = compare_golden(model, path)
    if not comparison.passed:
        weights = "" if comparison.same_weights else "the weights are not those that made the file\n"
        raise AssertionError(f"{path}: {weights}{comparison.table()}")


def _differences(model: SoundNet, golden: dict[str, NDArray[Any]]) -> Iterator[LayerDifference]:
    for number in range(sum(name.endswith("/input") for name in golden)):
        samples = golden[f"{number}/input"]
        for key, values in _activations(model, samples):
            expected = golden[f"{number}/{key}/values"].astype(np.float64)
            largest = float(golden[f"{number}/{key}/largest"])
            if values.shape != tuple(golden[f"{number}/{key}/shape"]):
                error = float("inf")
            else:
                error = float(np.abs(sample_evenly(values) - expected).max())
            relative = error / largest if largest > 0 else (0.0 if error == 0 else float("inf"))
            yield LayerDifference(len(samples), key, values.shape, largest, error, relative)


def _activations(model: SoundNet, samples: NDArray[np.int16]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield (key, (channels, frames)) of all modules and heads that the input is long enough for."""
    layers = model.architecture
    keys: list[int | str] = [layer.module for layer in layers.modules]
    keys += [head.name for head in layers.heads if layers.frames(head.name, len(samples))]
    device = next(model.parameters()).device
    with evaluation_mode(model):
        outputs = model.extract(torch.from_numpy(samples / np.float32(128)).to(device), keys)
    for key, values in outputs.items():
        yield str(key), values[0].float().cpu().numpy()


def sample_evenly(values: NDArray[np.float32], max_count: int = _VALUES) -> NDArray[np.float32]:
    """Return up to `max_count` values, evenly spread over the flat array."""
    flat = values.ravel()
    count = min(len(flat), max_count)
    return flat[np.arange(count) * len(flat) // count]


def _inputs(model: SoundNet) -> Iterator[NDArray[np.int16]]:
    """Yield the shortest input of the trunk, and one with two head frames."""
    layers = model.architecture
    longer = layers.modules[-1].shortest + 50_000
    if layers.heads:
        head = layers.layer(layers.heads[0].name)
        longer = head.shortest + head.stride + 2_000
    for length in (layers.modules[-1].shortest, longer):
        yield sweep(length)


def sweep(length: int) -> NDArray[np.int16]:
    """Return a rising tone with bursts of noise, as 16-bit samples; the network gets them / 128."""
    n = np.arange(length)
    noise = np.random.default_rng(length).uniform(-1, 1, length)
    tone = np.sin(2 * np.pi * (20 + 5_000 * n / length) * n / SAMPLE_RATE)
    bursts = noise * (n // 5_513 % 2)
    return np.round(10_000 * tone + 20_000 * bursts).astype(np.int16)


def _about(model: SoundNet) -> dict[str, Any]:
    device = next(model.parameters()).device
    return {
        "architecture": model.architecture.name,
        "widths": list(model.architecture.widths),
        "heads": model.architecture.head_sizes,
        "sha256": checksum(cpu_state_dict(model)),
        "versions": {
            "soundnet_port": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "threads": str(torch.get_num_threads()),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        },
    }
