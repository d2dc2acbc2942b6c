"""The command `export`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from soundnet_port.cli.main import Command, UsageError, explicit_options


def add_commands(command: Command) -> None:
    """Adds it to the parser."""
    sub = command(
        "export",
        _export,
        "write a network for other programs: ONNX, torch.export",
        description="Writes a network as ONNX (OUT.onnx), which runtimes for many languages and devices\n"
        "take (extra [onnx]), or as a program of torch.export (OUT.pt2), which PyTorch runs without this\n"
        "package. Input: float samples (batch, samples) at 22,050 Hz within +-256. Outputs: layers\n"
        "(batch, channels, frames); heads are logits. The file is run and compared with the network\n"
        "before it is kept.",
        epilog="examples:\n"
        "  soundnet-port export -w soundnet8 -o soundnet8.onnx\n"
        "  soundnet-port export -w soundnet8 -o features.onnx --layers pool5,conv7 --no-heads\n"
        "  soundnet-port export -w demo -o demo.pt2",
    )
    sub.add_argument("-w", "--weights", default="soundnet8", help="name or file (default: soundnet8)")
    sub.add_argument("-o", "--output", metavar="OUT", required=True, help=".onnx or .pt2 file")
    sub.add_argument(
        "-l",
        "--layers",
        metavar="L,L,...",
        help="layers to give (default: the last pooled one and the end of the trunk: pool5,conv7)",
    )
    sub.add_argument(
        "--heads", action=argparse.BooleanOptionalAction, default=True, help="give the heads too (default)"
    )
    sub.add_argument("--opset", type=int, metavar="N", help="of ONNX's operators (default: 17)")
    sub.add_argument("--license", metavar="NAME", help="of the weights, such as mit (default: what they say)")
    sub.add_argument("-f", "--force", action="store_true", help="replace the file")
    sub.add_argument("--json", action="store_true", help="what was written and compared, as a JSON object")


def _export(options: argparse.Namespace) -> int:
    if Path(options.output).exists() and not options.force:
        raise UsageError(f"{options.output}: is there already; --force replaces it")

    from soundnet_port.conversion.golden import TOLERANCE
    from soundnet_port.interop.onnx_export import ExportError, default_layers, export
    from soundnet_port.network.architecture import SAMPLE_RATE
    from soundnet_port.network.weights import build_model, read_weights
    from soundnet_port.pretrained import locate_weights

    architecture, state, metadata = read_weights(locate_weights(options.weights))
    layers: list[str] = options.layers.split(",") if options.layers else default_layers(architecture)
    if options.heads:
        layers += list(architecture.head_sizes)
    try:
        exported = export(
            build_model(architecture, state, metadata["categories"]),
            options.output,
            layers,
            license=options.license or metadata["license"],
            **explicit_options(options, "opset"),
        )
    except ExportError as error:
        raise UsageError(str(error)) from None
    if options.json:
        print(json.dumps(asdict(exported) | {"path": str(exported.path)}))
        return 0
    print(f"wrote {exported.path}, {exported.path.stat().st_size:,} bytes")
    least = f"at least {exported.shortest:,} samples, {exported.shortest / SAMPLE_RATE:.3f} s"
    print(f"  input   waveform: batch x samples ({least})")
    for name in exported.outputs:
        print(f"  output  {name}: batch x {architecture.layer(name).channels} x frames")
    worst = max(each.relative for each in exported.differences)
    print(f"  worst {worst:.1e} of an output's largest value from the network, {TOLERANCE:.0e} allowed")
    return 0
