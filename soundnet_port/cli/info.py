"""The command info: the contents of Torch7 files, other ports' files, and weights."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from soundnet_port.cli.parser import AddCommand
from soundnet_port.cli.reporting import FAILED, MAX_LISTED, MISUSE, report
from soundnet_port.cli.weights import describe_source
from soundnet_port.network.architecture import SAMPLE_RATE


def add_commands(add_command: AddCommand) -> None:
    """Add info."""
    command = add_command(
        "info",
        _info,
        "show the contents of a .t7, zip or weights file",
        description="Lists the modules, settings and shapes of any Torch7 file, and whether it can be\n"
        "converted; or the layers and metadata of weights.",
    )
    command.add_argument(
        "file", metavar="FILE", help=".t7, .zip, .npy, .pth, .safetensors, or a name of weights"
    )
    command.add_argument("--json", action="store_true", help="metadata or lines as JSON")


def _info(options: argparse.Namespace) -> int:
    from soundnet_port.conversion.convert import ConversionError, conversion_errors, member_name
    from soundnet_port.conversion.info import describe_t7
    from soundnet_port.conversion.package import extract_package, is_package
    from soundnet_port.conversion.port_files import port_format
    from soundnet_port.conversion.ports import describe_port
    from soundnet_port.conversion.t7 import members, open_t7
    from soundnet_port.network.weights import SUFFIX, find_weights

    path = Path(options.file)
    if path.suffix == SUFFIX or not (path.exists() or path.suffix in (".t7", ".zip")):
        _show_weights(find_weights(options.file), options.json)
        return 0
    if port_format(path) or is_package(path):
        with extract_package(path) if is_package(path) else nullcontext(path) as readable:
            _print_lines(list(describe_port(readable)), options.json)
        return 0
    successes = refusals = 0
    with conversion_errors(str(path)):
        names = members(path)
    for member in names:
        try:
            with conversion_errors(member_name(path, member)), open_t7(path, member) as file:
                lines = list(describe_t7(file))
        except ConversionError as error:
            refusals += 1
            report(error)
        else:
            successes += 1
            _print_lines(lines, options.json)
    return (FAILED if successes else MISUSE) if refusals else 0


def _print_lines(lines: list[str], as_json: bool) -> None:
    print(json.dumps(lines) if as_json else "\n".join(lines))


def _show_weights(path: Path, as_json: bool) -> None:
    import torch

    from soundnet_port.conversion.recognition import recognize
    from soundnet_port.network.architecture import CLASSES
    from soundnet_port.network.engine import describe_path
    from soundnet_port.network.weights import WeightsError, read_weights

    architecture, state, metadata = read_weights(path)
    recognition = recognize(architecture, state)
    if as_json:
        row = {"released": recognition.released, "recognition": recognition.summary}
        print(json.dumps({"file": str(path), **metadata, **row}))
        return
    print(f"{path}: weights of {architecture.name}, {path.stat().st_size:,} bytes")
    print(f"  {recognition.summary}")
    print(f"  {'layer':<10}{'module':>8}{'channels':>10}{'stride':>9}{'receptive field':>17}{'seconds':>9}")
    for name, layer in architecture.layers.items():
        seconds = layer.receptive_field / SAMPLE_RATE
        print(
            f"  {name:<10}{layer.module:>8}{layer.channels:>10}{layer.stride:>9,}"
            f"{layer.receptive_field:>17,}{seconds:>9.3f}"
        )
    parameters = sum(tensor.numel() for name, tensor in state.items() if "running" not in name)
    print(f"  parameters: {parameters:,}, computed by {describe_path(torch.empty(0))} on this CPU")
    categories, training = metadata["categories"] or {}, metadata["training"]
    if CLASSES in categories:
        names = categories[CLASSES]
        more = f", ... and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
        print(f"  {len(names)} classes: {', '.join(names[:MAX_LISTED])}{more}")
    else:
        print(f"  category names: {'yes' if categories else 'none stored'}")
    if training:
        try:
            print(f"  source: {_describe_training(training)}")
        except (KeyError, TypeError, ValueError):
            raise WeightsError(f"{path}: damaged metadata (training settings)") from None
        print(f"  written by soundnet-port {metadata['converter']}")
    else:
        source, parity, recordings = metadata["source"], metadata["parity"], metadata["torch7_parity"]
        detail = f"{describe_source(metadata)}, {source.get('bytes')} bytes, sha256 {source.get('sha256')}"
        print(f"  source: {detail if source else 'not recorded'}")
        print(f"  converted by soundnet-port {metadata['converter']}")
        if "worst" in parity:
            print(f"  parity with the file's own graph: worst {parity['worst']} relative")
        if "worst" in recordings:
            print(f"  parity with recordings of Torch7: worst {recordings['worst']} relative")
    for note in metadata["ignored"]:
        print(f"  note: {note}")


def _describe_training(settings: Mapping[str, Any]) -> str:
    """Describe how weights were trained, by the settings of their run."""
    from soundnet_port.network.architecture import ARCHITECTURES

    start = settings["start"] or "random values"
    parts = [f"from {start if start == 'random values' else f'weights with sha256 {start}'}"]
    if settings.get("head") == "pooled":
        parts += [f"fold {settings['test']} held out for test"] if settings["test"] else []
        parts.append(f"pooled head, ridge penalty {settings['alpha']:g}")
        return f"fitted to {settings['training sounds']} labeled sounds; " + "; ".join(parts)
    if "tuning" in settings:
        config = settings["tuning"]
        summary = f"fine-tuned on {settings['training sounds']} labeled sounds"
        if settings["frozen"]:
            parts.append(f"frozen up to {settings['frozen']}")
        parts += [
            f"fold {settings[part]} held out for {part}" for part in ("test", "validation") if settings[part]
        ]
        last = ARCHITECTURES[settings["architecture"]].last_layer
        # weights from before this setting included edge frames, which the last layer alone has
        if settings.get("edge_frames", settings["layer"] == last):
            parts.append("with edge frames (predict with --edge-frames)")
        parts.append(f"epoch {settings['epoch']:,} of {config['epochs']:,}")
    else:
        config = settings["recipe"]
        summary = f"trained by {', '.join(settings['teachers'])} on data with sha256 {settings['data']}"
        parts.append(f"step {settings['step']:,} of {config['iterations']:,}")
    parts.append(f"batch {config['batch']}, lr {config['lr']}, seed {config['seed']}")
    return "; ".join([summary, *parts])
