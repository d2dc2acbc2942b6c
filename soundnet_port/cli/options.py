"""Options that commands share, and what they mean: layers, devices, networks, labeled sounds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soundnet_port.audio.loading import DECODERS
from soundnet_port.cli.reporting import UsageError, report

if TYPE_CHECKING:
    import torch

    from soundnet_port.learning.labeled_sounds import LabeledSounds
    from soundnet_port.network.model import SoundNet


def add_weights_option(command: argparse.ArgumentParser) -> None:
    """Add -w/--weights, the released network by default."""
    command.add_argument("-w", "--weights", default="soundnet8", help="name or file (default: soundnet8)")


def add_device_option(command: argparse.ArgumentParser, default: str = "cpu", note: str = "") -> None:
    """Add --device, for a torch device."""
    names = "cpu, cuda, cuda:1, mps" + (", auto" if default == "auto" else "")
    command.add_argument("--device", default=default, help=f"{names} (default: {default}){note}")


def add_layers_option(command: argparse.ArgumentParser, default: str) -> None:
    """Add -l/--layers, which `parse_layers` reads; `default` is a help text."""
    command.add_argument(
        "-l",
        "--layers",
        metavar="L,L,...",
        action="append",
        help=f"names, or Torch7's module numbers (default: {default}); -l can be repeated",
    )


def add_cache_options(command: argparse.ArgumentParser, what: str = "features") -> None:
    """Add --cache and --no-cache, which `parse_cache` reads; `what` is kept, a help text."""
    command.add_argument("--cache", metavar="DIR", help=f"folder for {what} (default: the user's cache)")
    command.add_argument("--no-cache", action="store_true", help="neither read nor write cached features")


def parse_cache(options: argparse.Namespace) -> str | bool:
    """Return the cache of `add_cache_options`: a folder, or whether to use the user's.

    Raises:
        UsageError: both options are given.
    """
    if options.cache and options.no_cache:
        raise UsageError("--cache and --no-cache exclude each other")
    return options.cache or not options.no_cache


def add_decoder_option(command: argparse.ArgumentParser) -> None:
    """Add --decoder."""
    command.add_argument(
        "--decoder",
        choices=DECODERS,
        default="auto",
        help="auto (default), soundfile, av, or sox (the same samples as Torch7)",
    )


def add_labeled_sounds_options(command: argparse.ArgumentParser, metavar: str) -> None:
    """Add a positional argument for labeled sounds and its options, for `read_labeled_sounds`."""
    command.add_argument(
        "labeled",
        metavar=metavar,
        help="folder of ESC-50, ESC-10 or DCASE, or with a folder of sounds per class; or a list with "
        "path<TAB>label<TAB>fold per line, or with named columns",
    )
    command.add_argument("--root", metavar="DIR", help="folder that a list's paths are relative to")
    command.add_argument("--esc10", action="store_true", help="of ESC-50, only the classes of ESC-10")


def read_labeled_sounds(options: argparse.Namespace) -> LabeledSounds:
    """Read the labeled sounds of `add_labeled_sounds_options`."""
    from soundnet_port.learning.datasets import read_labeled

    return read_labeled(options.labeled, options.root, esc10=options.esc10)


def explicit_options(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return the options that were given, by name; the callee has the others' defaults."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def parse_layers(options: argparse.Namespace) -> list[str | int]:
    """Return the layers of `add_layers_option`, empty without any."""
    return [parse_layer(name) for text in options.layers or () for name in text.split(",")]


def parse_layer(name: str) -> str | int:
    """Return a layer's name, or its module number as an int."""
    return int(name) if name.isdecimal() and len(name) < 9 else name


def check_output(path: str, force: bool) -> None:
    """Refuse an existing file, without --force.

    Raises:
        UsageError: the file exists.
    """
    if Path(path).exists() and not force:
        raise UsageError(f"{path}: already exists; use --force to replace it")


def warn_if_unused(options: argparse.Namespace, condition: str, *names: str) -> None:
    """Note options that have no effect; `condition` says what they would need."""
    for name in names:
        if getattr(options, name) not in (None, False):
            report(f"--{name.replace('_', '-')} has no effect {condition}")


def parse_device(name: str) -> torch.device:
    """Return a torch device that exists on this machine.

    Raises:
        UsageError: there is no such device.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "meta":
        raise UsageError(f"--device {name}: unknown; choose from cpu, cuda, cuda:1 for the second one, mps")
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    count = counts.get(device.type)
    if count is not None and (device.index or 0) >= count:
        raise UsageError(
            f"--device {name}: PyTorch {torch.__version__} finds {count or 'no'} {device.type} devices; "
            "choose another, or install a PyTorch build for it"
        )
    return device


def load_network(options: argparse.Namespace) -> SoundNet:
    """Load the network of -w, on --device and in --dtype where a command has them.

    Raises:
        UsageError: there is no such device, or its memory is full.
        WeightsError: no such weights.
    """
    import torch

    from soundnet_port.pretrained import load_pretrained

    name = getattr(options, "device", "cpu")
    device = parse_device(name)
    dtype = getattr(torch, getattr(options, "dtype", "float32"))
    try:
        model = load_pretrained(options.weights, device, dtype=dtype)
    except (RuntimeError, AssertionError) as error:  # torch, of the device or its memory
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from None
    model.check_scale = False  # commands load waveforms from files
    if options.weights == "soundnet8":
        _warn_if_not_released(options.weights)
    return model


def _warn_if_not_released(name: str) -> None:
    """Note that what bears the released network's name is another one."""
    from soundnet_port.conversion.recognition import released_checksum
    from soundnet_port.network.weights import find_weights, read_metadata

    path = find_weights(name)
    metadata = read_metadata(path)  # its checksum was verified when the weights were loaded
    if metadata["sha256"] != released_checksum():
        report(f"{path}: {metadata['recognition'] or 'not the released SoundNet-8'}")
