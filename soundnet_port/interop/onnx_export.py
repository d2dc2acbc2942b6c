"""Export to ONNX (extra `[onnx]`) and to torch.export.

The ONNX graph is built node by node: Conv (batch norm folded in), Relu, MaxPool for each block. Internally it
is 2-D, (batch, channels, 1, frames), for which runtimes have the fastest convolutions; outputs are (batch,
channels, frames). Two parts are not a plain chain:

-   A sound that is too short must be an error. onnxruntime's MaxPool outputs a frame for an incomplete window
    (its division rounds toward zero), so short sounds would give plausible numbers. The graph therefore first
    reshapes the waveform to at least the shortest length, which fails if it is shorter.
-   Heads with padding (5 layers) have a frame where the kernel hangs over the end; see `Window.count_frames`.
    A Pad extends the input to the kernel size; only the shortest sounds need it.

Each file passes a parity check against the network's modules before it is kept.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from soundnet_port.conversion.golden import TOLERANCE, LayerDifference, sweep
from soundnet_port.errors import SoundNetError, require
from soundnet_port.files import atomic_write
from soundnet_port.network.architecture import FULL_SCALE, SAMPLE_RATE, Architecture, Block, Head, Layer
from soundnet_port.network.engine_cache import get_engine
from soundnet_port.network.model import SoundNet
from soundnet_port.network.weights import build_model, checksum, cpu_state_dict
from soundnet_port.version import __version__

SUFFIXES = (".onnx", ".pt2")
OPSET = 17  # of 2022, widely supported
_MIN_OPSET = 15  # Shape with start and end
_INPUT = "waveform"
_METADATA_FILE = "soundnet.json"  # in a .pt2

_Runner = Callable[[Tensor], dict[str, Tensor]]


class ExportError(SoundNetError):
    """An export that is not possible, or that failed its parity check."""


@dataclass(frozen=True)
class ExportResult:
    """An exported file and its parity check.

    Attributes:
        path: the file.
        outputs: layers, in the file's order.
        shortest: minimum length of the input, in samples.
        differences: one for each test sound and output; shapes are (batch, channels, frames).
    """

    path: Path
    outputs: tuple[str, ...]
    shortest: int
    differences: list[LayerDifference]


def export(
    model: SoundNet,
    path: str | os.PathLike[str],
    layers: Sequence[str] | None = None,
    *,
    opset: int = OPSET,
    license: str | None = None,  # noqa: A002
) -> ExportResult:
    """Write a network as `.onnx`, or as `.pt2` (torch.export), after a parity check.

    The input is `waveform`, float32 `(batch, samples)` within +-256 at 22,050 Hz, of any batch size and any
    length that gives all outputs a frame; shorter inputs are errors. Outputs are float32 `(batch, channels,
    frames)`, named after their layers. Heads give logits; a softmax over dimension 1 gives probabilities.
    Sample rate, scale, geometry of the outputs, categories, checksum and license of the weights are metadata
    of an `.onnx`, and `soundnet.json` in a `.pt2`.

    For the parity check, onnxruntime, or PyTorch for `.pt2`, runs the file on sounds of several lengths and
    batch sizes; each output must agree with the network's modules within 1e-5 of its largest value.

    Args:
        model: any `SoundNet`; it is exported in eval mode, with float32 parameters.
        path: ends in `.onnx` or `.pt2`; an existing file is replaced.
        layers: names of the outputs, heads included; by default `default_layers` and the heads.
        opset: of ONNX.
        license: of the weights, an SPDX identifier such as `"mit"`.

    Raises:
        ExportError: another suffix, unknown layers, an unsupported opset, or a failed parity check.
        MissingExtraError: the extra `[onnx]` is not installed.
    """
    path, architecture = Path(path), model.architecture
    if path.suffix.lower() not in SUFFIXES:
        raise ExportError(f"{path}: unknown format; name a file that ends in {' or '.join(SUFFIXES)}")
    names = [*default_layers(architecture), *architecture.head_sizes] if layers is None else layers
    for name in names:
        if name not in architecture.layers:
            choices = ", ".join(architecture.layers)
            raise ExportError(f"{architecture.name} has no layer {name!r}; choose from {choices}")
    outputs = [layer for name, layer in architecture.layers.items() if name in names]
    if not outputs:
        raise ExportError("no layers to export; name some")
    state = cpu_state_dict(model, torch.float32)
    plain = build_model(architecture, state, model.categories)
    plain.use_engine = False
    metadata = _build_metadata(plain, outputs, checksum(state), license)
    with atomic_write(path) as temporary:
        if path.suffix.lower() == ".onnx":
            temporary.write_bytes(_build_onnx(plain, outputs, metadata, opset))
            run = _load_onnx(temporary)
        else:
            temporary.write_bytes(_build_program(plain, outputs, metadata))
            run = torch.export.load(io.BytesIO(temporary.read_bytes())).module()
        differences = list(_compare(plain, outputs, run))
        for row in differences:
            if not row.passed:
                raise ExportError(
                    f"{path}: not written: {row.layer} differs from the network by {row.relative:.1e} of its "
                    f"largest value at {row.samples:,} samples; the tolerance is {TOLERANCE:.0e}"
                )
        if _accepts(run, _find_shortest(outputs) - 1):
            raise ExportError(f"{path}: not written: it accepts inputs that are too short")
    return ExportResult(path, tuple(layer.name for layer in outputs), _find_shortest(outputs), differences)


def default_layers(architecture: Architecture) -> list[str]:
    """Return the layers most used as features: the last pooled one, and the last one before the heads.

    >>> from soundnet_port import SOUNDNET8
    >>> default_layers(SOUNDNET8)
    ['pool5', 'conv7']
    """
    pooled = [block.pool_layer for block in architecture.blocks if block.pool]
    return list(dict.fromkeys([*pooled[-1:], architecture.last_layer]))


def _find_shortest(layers: Sequence[Layer]) -> int:
    """Return the shortest input, in samples, that gives all layers a frame."""
    return max(layer.shortest for layer in layers)


def _build_metadata(
    model: SoundNet, layers: Sequence[Layer], sha256: str, license_name: str | None
) -> dict[str, Any]:
    """Return what a program needs to use the file, and its origin."""
    geometry = "module", "channels", "stride", "receptive_field", "start", "shortest"  # in samples
    return {
        "architecture": model.architecture.name,
        "sample_rate": int(SAMPLE_RATE),
        "full_scale": FULL_SCALE,
        "shortest": _find_shortest(layers),
        "layers": {layer.name: {name: getattr(layer, name) for name in geometry} for layer in layers},
        "categories": model.categories or None,
        "weights_sha256": sha256,
        "license": license_name,
        "soundnet_port": __version__,
    }


# ---- ONNX


def _build_onnx(model: SoundNet, layers: Sequence[Layer], metadata: dict[str, Any], opset: int) -> bytes:
    """Return the content of an ONNX file."""
    onnx = require("onnx", "onnx")
    from onnx import TensorProto, helper, numpy_helper

    max_opset = onnx.defs.onnx_opset_version()
    if not _MIN_OPSET <= opset <= max_opset:
        raise ExportError(f"opset {opset}: choose from {_MIN_OPSET} to {max_opset}")
    nodes: list[Any] = []
    constants: dict[str, Any] = {}

    def constant(name: str, values: Any) -> str:
        constants[name] = numpy_helper.from_array(np.ascontiguousarray(values), name)
        return name

    def integers(*values: int) -> str:
        return constant("_".join(map(str, values)).replace("-", "minus"), np.array(values, np.int64))

    def node(operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [output], output, **attributes))
        return output

    def convolution(x: str, row: Block | Head, filters: Tensor, bias: Tensor) -> str:
        weight = constant(f"{row.name}/weight", filters[:, :, None].numpy())
        return node(
            "Conv",
            [x, weight, constant(f"{row.name}/bias", bias.flatten().numpy())],
            f"{row.name}/conv",
            kernel_shape=[1, row.kernel],
            strides=[1, row.stride],
            pads=[0, row.padding, 0, row.padding],
        )

    names = {layer.name for layer in layers}
    deepest = max(layer.module for layer in layers)
    sound = node("Unsqueeze", [_INPUT, integers(1, 2)], "sound")
    # no Concat, which onnxruntime would simplify to a reshape with an inferred length (-1)
    needed = integers(0, 1, 1, _find_shortest(layers))
    x = node("Reshape", [sound, node("Max", [node("Shape", [sound], "shape"), needed], "needed")], "checked")
    values = {}
    module = 0
    for block in model.architecture.blocks:
        if module >= deepest:
            break
        filters, bias = get_engine(model).filters(block)
        x = values[block.name] = node("Relu", [convolution(x, block, filters, bias)], f"{block.name}/relu")
        if block.pool and deepest >= module + 4:
            window = {"kernel_shape": [1, block.pool], "strides": [1, block.pool]}
            x = values[block.pool_layer] = node("MaxPool", [x], f"{block.name}/pool", **window)
        module += block.modules
    heads = [head for head in model.architecture.heads if head.name in names]
    if heads and heads[0].padding:
        room = integers(heads[0].kernel - 2 * heads[0].padding)
        frames = node("Shape", [x], "heads/frames", start=3, end=4)
        overhang = node("Max", [node("Sub", [room, frames], "heads/room"), integers(0)], "heads/overhang")
        pads = node("Concat", [integers(0, 0, 0, 0, 0, 0, 0), overhang], "heads/pads", axis=0)
        x = node("Pad", [x, pads], "heads/padded")
    for head in heads:
        weights = (model.state_dict()[f"{head.name}.{name}"] for name in ("weight", "bias"))
        values[head.name] = convolution(x, head, *weights)
    for layer in layers:
        node("Squeeze", [values[layer.name], integers(2)], layer.name)

    def tensor_info(name: str, *shape: int | str) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    graph = helper.make_graph(
        nodes,
        model.architecture.name,
        [tensor_info(_INPUT, "batch", "samples")],
        [tensor_info(layer.name, "batch", layer.channels, f"{layer.name}_frames") for layer in layers],
        list(constants.values()),
    )
    operators = [helper.make_opsetid("", opset)]
    onnx_model = helper.make_model(
        graph,
        opset_imports=operators,
        ir_version=helper.find_min_ir_version_for(operators),
        producer_name="soundnet-port",
        producer_version=__version__,
        doc_string="SoundNet (Aytar, Vondrick, Torralba, NIPS 2016). Input: float32 samples at 22,050 Hz "
        "within +-256, one channel. Heads are logits, a softmax over dimension 1 makes them probabilities.",
    )
    helper.set_model_props(
        onnx_model,
        {key: item if isinstance(item, str) else json.dumps(item) for key, item in metadata.items() if item},
    )
    onnx.checker.check_model(onnx_model, full_check=True)
    content: bytes = onnx_model.SerializeToString(deterministic=True)
    return content


def _load_onnx(path: Path) -> _Runner:
    """Return a function that runs the file in onnxruntime."""
    onnxruntime = require("onnxruntime", "onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # errors of too short inputs are expected, see _accepts
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's have no common base class
        version = onnxruntime.__version__
        reason = str(error).splitlines()[0]
        raise ExportError(f"onnxruntime {version} cannot load the file: {reason}") from None
    names = [output.name for output in session.get_outputs()]

    def run(waveforms: Tensor) -> dict[str, Tensor]:
        outputs = session.run(names, {_INPUT: waveforms.numpy()})
        return {name: torch.from_numpy(values) for name, values in zip(names, outputs, strict=True)}

    return run


# ---- torch.export


class _LayerExtractor(nn.Module):
    """A network whose forward returns layers by name."""

    def __init__(self, model: SoundNet, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, list(names)

    def forward(self, waveform: Tensor) -> dict[str, Tensor]:
        return self.model.extract(waveform, self.names)


def _build_program(model: SoundNet, layers: Sequence[Layer], metadata: dict[str, Any]) -> bytes:
    """Return the content of a torch.export file."""
    from torch.export import Dim
    from torch.fx.experimental import _config

    config: Any = _config

    module = _LayerExtractor(model, [layer.name for layer in layers])
    example = torch.zeros(2, _find_shortest(layers) + 2 * max(layer.stride for layer in layers))
    shapes = {_INPUT: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    if not hasattr(config, "backed_size_oblivious"):
        raise ExportError(f"PyTorch {torch.__version__} is too old for .pt2; use 2.13 or later")
    # otherwise programs are specialized to more than one sound and one frame
    with config.patch(backed_size_oblivious=True), torch.no_grad():
        program = torch.export.export(module, (example,), dynamic_shapes=shapes)
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={_METADATA_FILE: json.dumps(metadata)})
    return buffer.getvalue()


# ---- parity check


def _compare(model: SoundNet, layers: Sequence[Layer], run: _Runner) -> Iterator[LayerDifference]:
    """Compare the file with the modules, on sounds that do and do not end with a frame."""
    shortest, stride = _find_shortest(layers), max(layer.stride for layer in layers)
    names = [layer.name for layer in layers]
    for batch, more in ((1, 0), (2, 1), (1, stride - 1), (3, 2 * stride)):
        length = shortest + more
        sound = torch.from_numpy(sweep(length) / np.float32(128))
        sounds = torch.stack([sound.roll(5_000 * number) for number in range(batch)])
        outputs = run(sounds)
        for name, expected in model.extract(sounds, names).items():
            largest = float(expected.abs().max())
            same_shape = outputs[name].shape == expected.shape
            error = float((outputs[name] - expected).abs().max()) if same_shape else float("inf")
            relative = error / largest if largest > 0 else (0.0 if error == 0 else float("inf"))
            yield LayerDifference(length, name, tuple(expected.shape), largest, error, relative)


def _accepts(run: _Runner, samples: int) -> bool:
    """Return whether the file runs on a sound of this length."""
    try:
        run(torch.zeros(1, samples))
    except Exception:  # each runtime has its own
        return False
    return True
