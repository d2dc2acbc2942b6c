"""The command verify: weights against Torch7 files, recordings of Torch7, or golden files."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from soundnet_port.cli.options import add_device_option, check_output, load_network, warn_if_unused
from soundnet_port.cli.parser import AddCommand
from soundnet_port.cli.reporting import FAILED, UsageError, report
from soundnet_port.cli.weights import show_conversion

if TYPE_CHECKING:
    from soundnet_port.conversion.golden import GoldenComparison


def add_commands(add_command: AddCommand) -> None:
    """Add verify."""
    command = add_command(
        "verify",
        _verify,
        "compare weights with Torch7, or with earlier activations",
        description="Alone, compares the released soundnet8 on this machine and device with recordings of\n"
        "Torch7. With SRC, repeats the parity check of a conversion: all tensors must equal the\n"
        "file's bit for bit, and the file's own graph must agree at every module. --save writes\n"
        "the activations of all modules to a golden file; --against compares with one. Exit code 1\n"
        "if anything differs.",
        examples=(
            "soundnet-port verify soundnet8",
            "soundnet-port verify soundnet8 soundnet8_final.t7",
            "soundnet-port verify soundnet8 --save golden.npz",
            "soundnet-port verify soundnet8 --against golden.npz --device cuda",
        ),
    )
    command.add_argument("weights", metavar="WEIGHTS", help="a name (soundnet8) or a .safetensors file")
    command.add_argument("source", metavar="SRC", nargs="?", help=".t7 file or zip")
    command.add_argument("--save", metavar="NPZ", help="write a golden file")
    command.add_argument("--against", metavar="NPZ", help="compare with a golden file")
    command.add_argument("-f", "--force", action="store_true", help="with --save: replace the file")
    add_device_option(command, note="; not used with SRC")
    command.add_argument("--json", action="store_true", help="print a JSON object")


def _verify(options: argparse.Namespace) -> int:
    if not options.save:
        warn_if_unused(options, "without --save", "force")
    if not (options.source or options.save or options.against):
        return _verify_released(options)
    if options.source and not _verify_source(options):
        return FAILED
    if not (options.save or options.against):
        return 0

    from soundnet_port.conversion.golden import compare_golden, save_golden

    model = load_network(options)
    if options.save:
        check_output(options.save, options.force)
        save_golden(model, options.save)
        if not options.json:
            print(f"wrote {options.save}")
    if not options.against:
        return 0
    comparison = compare_golden(model, options.against)
    _show_comparison(comparison, options)
    return 0 if comparison.passed else FAILED


def _verify_source(options: argparse.Namespace) -> bool:
    """Compare with a Torch7 file; tell whether the weights agree."""
    from soundnet_port.conversion.convert import verify
    from soundnet_port.conversion.parity import ParityError
    from soundnet_port.conversion.port_files import port_format

    if port_format(options.source):
        raise UsageError(
            f"{options.source}: another port's file, without a graph to run; "
            f"compare with 'soundnet-port convert {options.source} --against WEIGHTS'"
        )
    try:
        result = verify(options.weights, options.source)
    except ParityError as error:
        report(error)
        return False
    show_conversion(result, options.json, verb="verified")
    return True


def _verify_released(options: argparse.Namespace) -> int:
    """Compare the released network with recordings of Torch7."""
    from soundnet_port.conversion.recognition import WHOLE, recognize
    from soundnet_port.conversion.released_parity import compare_with_torch7
    from soundnet_port.network.weights import cpu_state_dict

    model = load_network(options)
    recognition = recognize(model.architecture, cpu_state_dict(model))
    if recognition.released != WHOLE:
        raise UsageError(
            f"{options.weights}: {recognition.summary}; there are recordings of Torch7 for that one only. "
            "Name the Torch7 file it was converted from, or use --save or --against with a golden file"
        )
    parity = compare_with_torch7(model)
    if options.json:
        row = {"weights": options.weights, "recognition": recognition.summary, "passed": parity.passed}
        print(json.dumps(row | asdict(parity)))
    else:
        print(f"{options.weights}: {recognition.summary}")
        print(f"  Against recordings of Torch7 on {', '.join(parity.inputs)}:")
        print(parity.table())
        print(f"  {parity.summary}")
    if parity.passed:
        return 0
    failed = sum(not row.passed for row in parity.layers)
    report(f"{options.weights}: {failed} outputs differ from Torch7's")
    return FAILED


def _show_comparison(comparison: GoldenComparison, options: argparse.Namespace) -> None:
    from soundnet_port.conversion.golden import TOLERANCE

    worst = max(difference.relative for difference in comparison.differences)
    failed = sum(not difference.passed for difference in comparison.differences)
    if options.json:
        rows = [asdict(difference) for difference in comparison.differences]
        print(json.dumps(asdict(comparison) | {"differences": rows, "passed": comparison.passed}))
    else:
        print(comparison.table())
        for name, then in comparison.made_by.items():
            now = comparison.run_by.get(name, "?")
            print(f"  {name}: {then}" + ("" if now == then else f" then, {now} now"))
        print(f"  worst {worst:.1e} of a layer's largest value, {TOLERANCE:.0e} allowed")
    if not comparison.same_weights:
        report(f"{options.weights}: other weights than those of {options.against}")
    if failed:
        report(f"{options.weights}: {failed} of {len(comparison.differences)} comparisons differ")
