"""SoundNet for other programs: as ONNX, which many runtimes take, and as PyTorch's own exported program.

The ONNX graph is written here node by node: for each block Conv (batch norm folded in), Relu, MaxPool. Frames
lie along the width, (batch, channels, 1, frames), which runtimes have their fastest convolutions for; outputs
are (batch, channels, frames). Two things are not a plain chain:

-   A sound that is too short must be an error. onnxruntime's MaxPool makes a frame of less than a window
    where SoundNet has none (its division rounds towards zero), so short sounds would give plausible numbers.
    At the beginning the waveform is reshaped to at least the shortest length, which fails if it is shorter.
-   Heads with padding (5 layers) have a frame where the kernel hangs over the end; see architecture._out.
    A Pad fills up to the kernel, by 0 for all but the shortest sounds.

Whatever is written is compared with the network's modules first, as it lies there, or it does not stay.
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

from soundnet_port.conversion.golden import TOLERANCE, Difference, sweep
from soundnet_port.errors import MissingExtraError, SoundNetError
from soundnet_port.files import atomic_write
from soundnet_port.network.architecture import FULL_SCALE, SAMPLE_RATE, Architecture, Block, Head, Layer
from soundnet_port.network.engine import get_engine
from soundnet_port.network.model import SoundNet
from soundnet_port.network.weights import build_model, checksum, cpu_state_dict
from soundnet_port.version import __version__

SUFFIXES = (".onnx", ".pt2")
OPSET = 17  # of 2022, which runtimes have
_OLDEST_OPSET = 15  # Shape of some dimensions
_INPUT = "waveform"
_ABOUT = "soundnet.json"  # in a .pt2

_Run = Callable[[Tensor], dict[str, Tensor]]


class ExportError(SoundNetError):
    """A network that cannot be exported that way, or one that came out different: what, and why."""


@dataclass(frozen=True)
class ExportResult:
    """What was written, and how far it is from the network.

    Attributes:
        path: the file.
        outputs: layers, in the order of the file's outputs.
        shortest: samples that the input must have.
        differences: a row for each test sound and output; shapes are (batch, channels, frames).
    """

    path: Path
    outputs: tuple[str, ...]
    shortest: int
    differences: list[Difference]


def export(
    model: SoundNet,
    path: str | os.PathLike[str],
    layers: Sequence[str] | None = None,
    *,
    opset: int = OPSET,
    license: str | None = None,  # noqa: A002
) -> ExportResult:
    """Writes a network for other programs, and proves it: `.onnx`, or `.pt2` (torch.export).

    The input is `waveform`, float32 `(batch, samples)` within +-256 at 22,050 Hz, of any batch size and any
    length from the shortest that all outputs have a frame of; shorter ones are errors there. Outputs are
    float32 `(batch, channels, frames)` under their layers' names; heads give logits, a softmax over
    dimension 1 makes them probabilities. The file says what it is: sample rate, scale, geometry of the
    outputs, categories, checksum and licence of the weights, as metadata of an `.onnx`, and as
    `soundnet.json` in a `.pt2`.

    Onnxruntime, or PyTorch for `.pt2`, runs the file on sounds of several lengths and batch sizes before it
    takes its place, and every output must agree with the network's modules within 1e-5 of its largest value.

    Args:
        model: any `SoundNet`; its parameters are exported as float32, in evaluation.
        path: ends in `.onnx` or `.pt2`; a file that is there is replaced.
        layers: names of the outputs, heads among them; `default_layers` and the heads if not given.
        opset: of the ONNX operators.
        license: of the weights, an SPDX name such as `"mit"`.

    Raises:
        ExportError: another suffix, unknown layers, an opset that does not work, outputs that differ, or the
            extra `[onnx]` is not installed.
    """
    path, architecture = Path(path), model.architecture
    if path.suffix.lower() not in SUFFIXES:
        raise ExportError(f"{path}: name a file that ends in {' or '.join(SUFFIXES)}")
    names = [*default_layers(architecture), *architecture.head_sizes] if layers is None else layers
    for name in names:
        if name not in architecture.layers:
            there = ", ".join(architecture.layers)
            raise ExportError(f"{architecture.name} has no layer {name!r}; choose from {there}")
    ordered = [layer for name, layer in architecture.layers.items() if name in names]
    if not ordered:
        raise ExportError("no layers to export; name some")
    state = cpu_state_dict(model, torch.float32)
    plain = build_model(architecture, state, model.categories)
    plain.use_engine = False
    about = _about(plain, ordered, checksum(state), license)
    with atomic_write(path) as aside:
        if path.suffix.lower() == ".onnx":
            aside.write_bytes(_graph(plain, ordered, about, opset))
            run = _onnxruntime(aside)
        else:
            aside.write_bytes(_program(plain, ordered, about))
            run = torch.export.load(io.BytesIO(aside.read_bytes())).module()
        differences = list(_differences(plain, ordered, run))
        _refuses(run, _shortest(ordered) - 1, path)
        for each in differences:
            if not each.passed:
                raise ExportError(
                    f"{path}: not written, for {each.layer} differs from the network by {each.relative:.1e} "
                    f"of its largest value at {each.samples:,} samples; {TOLERANCE:.0e} is allowed"
                )
    return ExportResult(path, tuple(layer.name for layer in ordered), _shortest(ordered), differences)


def default_layers(architecture: Architecture) -> list[str]:
    """The two layers that are mostly used as features: the last pooled one, and the end of the trunk.

    >>> default_layers(SOUNDNET8)
    ['pool5', 'conv7']
    """
    pooled = [block.pooled for block in architecture.blocks if block.pool]
    return list(dict.fromkeys([*pooled[-1:], architecture.last_layer]))


def _shortest(layers: Sequence[Layer]) -> int:
    return max(layer.shortest for layer in layers)


def _about(model: SoundNet, layers: Sequence[Layer], sha256: str, licence: str | None) -> dict[str, Any]:
    """What a program needs to know to use the file, and what it comes from."""
    geometry = "module", "channels", "stride", "receptive_field", "start", "shortest"  # in samples
    return {
        "architecture": model.architecture.name,
        "sample_rate": int(SAMPLE_RATE),
        "full_scale": FULL_SCALE,
        "shortest": _shortest(layers),
        "layers": {layer.name: {name: getattr(layer, name) for name in geometry} for layer in layers},
        "categories": model.categories or None,
        "weights_sha256": sha256,
        "license": licence,
        "soundnet_port": __version__,
    }


# ---- ONNX


def _graph(model: SoundNet, layers: Sequence[Layer], about: dict[str, Any], opset: int) -> bytes:
    """The network as an ONNX file."""
    try:
        import onnx
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        raise MissingExtraError("onnx", "onnx") from None

    newest = onnx.defs.onnx_opset_version()
    if not _OLDEST_OPSET <= opset <= newest:
        raise ExportError(f"opset {opset}: choose from {_OLDEST_OPSET} to {newest}")
    nodes: list[Any] = []
    constants: dict[str, Any] = {}

    def constant(name: str, values: Any) -> str:
        constants[name] = numpy_helper.from_array(np.ascontiguousarray(values), name)
        return name

    def integers(*values: int) -> str:
        return constant("_".join(map(str, values)).replace("-", "minus"), np.array(values, np.int64))

    def node(kind: str, inputs: Sequence[str], output: str, **settings: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], output, **settings))
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

    wanted = {layer.name for layer in layers}
    deepest = max(layer.module for layer in layers)
    sound = node("Unsqueeze", [_INPUT, integers(1, 2)], "sound")
    # not by Concat: onnxruntime turns a shape of Concat and one unknown length into "whatever fits"
    needed = integers(0, 1, 1, _shortest(layers))
    x = node("Reshape", [sound, node("Max", [node("Shape", [sound], "shape"), needed], "needed")], "checked")
    made = {}
    module = 0
    for block in model.architecture.blocks:
        if module >= deepest:
            break
        filters, bias = get_engine(model).filters(block)
        x = made[block.name] = node("Relu", [convolution(x, block, filters, bias)], f"{block.name}/relu")
        if block.pool and deepest >= module + 4:
            window = {"kernel_shape": [1, block.pool], "strides": [1, block.pool]}
            x = made[block.pooled] = node("MaxPool", [x], f"{block.name}/pool", **window)
        module += block.modules
    heads = [head for head in model.architecture.heads if head.name in wanted]
    if heads and heads[0].padding:
        room = integers(heads[0].kernel - 2 * heads[0].padding)
        frames = node("Shape", [x], "heads/frames", start=3, end=4)
        overhang = node("Max", [node("Sub", [room, frames], "heads/room"), integers(0)], "heads/overhang")
        pads = node("Concat", [integers(0, 0, 0, 0, 0, 0, 0), overhang], "heads/pads", axis=0)
        x = node("Pad", [x, pads], "heads/padded")
    for head in heads:
        weights = (model.state_dict()[f"{head.name}.{name}"] for name in ("weight", "bias"))
        made[head.name] = convolution(x, head, *weights)
    for layer in layers:
        node("Squeeze", [made[layer.name], integers(2)], layer.name)

    def value(name: str, *shape: int | str) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    graph = helper.make_graph(
        nodes,
        model.architecture.name,
        [value(_INPUT, "batch", "samples")],
        [value(layer.name, "batch", layer.channels, f"{layer.name}_frames") for layer in layers],
        list(constants.values()),
    )
    operators = [helper.make_opsetid("", opset)]
    written = helper.make_model(
        graph,
        opset_imports=operators,
        ir_version=helper.find_min_ir_version_for(operators),
        producer_name="soundnet-port",
        producer_version=__version__,
        doc_string="SoundNet (Aytar, Vondrick, Torralba, NIPS 2016). Input: float32 samples at 22,050 Hz "
        "within +-256, one channel. Heads are logits, a softmax over dimension 1 makes them probabilities.",
    )
    helper.set_model_props(
        written,
        {key: each if isinstance(each, str) else json.dumps(each) for key, each in about.items() if each},
    )
    onnx.checker.check_model(written, full_check=True)
    content: bytes = written.SerializeToString(deterministic=True)
    return content


def _onnxruntime(path: Path) -> _Run:
    """The file as onnxruntime runs it."""
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtraError("onnxruntime", "onnx") from None

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # a sound that is too short is no news, see _refuses
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its classes have no common base
        version = onnxruntime.__version__
        raise ExportError(f"onnxruntime {version} does not take it: {str(error).splitlines()[0]}") from None
    names = [each.name for each in session.get_outputs()]

    def run(waveforms: Tensor) -> dict[str, Tensor]:
        made = session.run(names, {_INPUT: waveforms.numpy()})
        return {name: torch.from_numpy(values) for name, values in zip(names, made, strict=True)}

    return run


# ---- torch.export


class _Layers(nn.Module):
    """A network whose forward gives these layers, by name."""

    def __init__(self, model: SoundNet, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, list(names)

    def forward(self, waveform: Tensor) -> dict[str, Tensor]:
        return self.model.extract(waveform, self.names)


def _program(model: SoundNet, layers: Sequence[Layer], about: dict[str, Any]) -> bytes:
    """The network as a file of torch.export."""
    from torch.export import Dim
    from torch.fx.experimental import _config

    config: Any = _config

    module = _Layers(model, [layer.name for layer in layers])
    example = torch.zeros(2, _shortest(layers) + 2 * max(layer.stride for layer in layers))
    shapes = {_INPUT: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    if not hasattr(config, "backed_size_oblivious"):
        raise ExportError(f"PyTorch {torch.__version__} is too old for .pt2; 2.13 will do")
    # without this, programs take a batch of 1, or 1 frame, for another case and refuse it
    with config.patch(backed_size_oblivious=True), torch.no_grad():
        program = torch.export.export(module, (example,), dynamic_shapes=shapes)
    written = io.BytesIO()
    torch.export.save(program, written, extra_files={_ABOUT: json.dumps(about)})
    return written.getvalue()


# ---- the proof


def _differences(model: SoundNet, layers: Sequence[Layer], run: _Run) -> Iterator[Difference]:
    """The file held against the modules, on sounds that end on a frame, and that do not."""
    shortest, stride = _shortest(layers), max(layer.stride for layer in layers)
    names = [layer.name for layer in layers]
    for batch, more in ((1, 0), (2, 1), (1, stride - 1), (3, 2 * stride)):
        length = shortest + more
        sound = torch.from_numpy(sweep(length) / np.float32(128))
        sounds = torch.stack([sound.roll(5_000 * number) for number in range(batch)])
        made = run(sounds)
        for name, expected in model.extract(sounds, names).items():
            largest = float(expected.abs().max())
            same = made[name].shape == expected.shape
            error = float((made[name] - expected).abs().max()) if same else float("inf")
            relative = error / largest if largest > 0 else (0.0 if error == 0 else float("inf"))
            yield Difference(length, name, tuple(expected.shape), largest, error, relative)


def _refuses(run: _Run, samples: int, path: Path) -> None:
    """A sound that is too short is an error, and no frames that the network would not have."""
    try:
        run(torch.zeros(1, samples))
    except Exception:  # each runtime has its own
        return
    raise ExportError(f"{path}: not written, for it takes {samples:,} samples, which are too short")
