"""The command export: networks for ONNX and torch.export."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from soundnet_port.cli.options import (
    add_layers_option,
    add_weights_option,
    check_output,
    explicit_options,
    parse_layers,
)
from soundnet_port.cli.parser import AddCommand


def add_commands(add_command: AddCommand) -> None:
    """Add export."""
    command = add_command(
        "export",
        _export,
        "export a network to ONNX or torch.export",
        description="Writes a network as ONNX (OUT.onnx; extra [onnx]) or as a torch.export program\n"
        "(OUT.pt2), which PyTorch runs without this package. Input: float samples (batch, samples)\n"
        "at 22,050 Hz within +-256. Outputs: layers (batch, channels, frames); heads are logits.\n"
        "The file is run and compared with the network before it is kept.",
        examples=(
            "soundnet-port export -w soundnet8 -o soundnet8.onnx",
            "soundnet-port export -w soundnet8 -o features.onnx -l pool5,conv7 --no-heads",
            "soundnet-port export -w demo -o demo.pt2",
        ),
    )
    add_weights_option(command)
    command.add_argument("-o", "--output", metavar="OUT", required=True, help=".onnx or .pt2 file")
    add_layers_option(command, "the last pooled and the last layer: pool5,conv7")
    command.add_argument(
        "--heads", action=argparse.BooleanOptionalAction, default=True, help="include the heads (default)"
    )
    command.add_argument("--opset", type=int, metavar="N", help="ONNX operator set (default: 17)")
    command.add_argument(
        "--license", metavar="NAME", help="of the weights, such as mit (default: from their metadata)"
    )
    command.add_argument("-f", "--force", action="store_true", help="replace the file")
    command.add_argument("--json", action="store_true", help="a summary as a JSON object")


def _export(options: argparse.Namespace) -> int:
    check_output(options.output, options.force)

    from soundnet_port.conversion.golden import TOLERANCE
    from soundnet_port.interop.onnx_export import default_layers, export
    from soundnet_port.network.architecture import SAMPLE_RATE
    from soundnet_port.network.weights import build_model, read_weights
    from soundnet_port.pretrained import locate_weights

    architecture, state, metadata = read_weights(locate_weights(options.weights))
    layers = [str(layer) for layer in parse_layers(options)] or default_layers(architecture)
    if options.heads:
        layers += list(architecture.head_sizes)
    result = export(
        build_model(architecture, state, metadata["categories"]),
        options.output,
        layers,
        license=options.license or metadata["license"],
        **explicit_options(options, "opset"),
    )
    if options.json:
        print(json.dumps(asdict(result) | {"path": str(result.path)}))
        return 0
    print(f"wrote {result.path}, {result.path.stat().st_size:,} bytes")
    shortest = f"at least {result.shortest:,} samples, {result.shortest / SAMPLE_RATE:.3f} s"
    print(f"  input   waveform: batch x samples ({shortest})")
    for name in result.outputs:
        print(f"  output  {name}: batch x {architecture.layer(name).channels} x frames")
    worst = max(difference.relative for difference in result.differences)
    print(f"  worst {worst:.1e} of an output's largest value from the network, {TOLERANCE:.0e} allowed")
    return 0
