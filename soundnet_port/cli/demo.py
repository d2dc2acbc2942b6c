"""The command demo: the released network, checked, names three sounds."""

from __future__ import annotations

import argparse
import textwrap

from soundnet_port.cli.parser import AddCommand
from soundnet_port.cli.reporting import UsageError, report


def add_commands(add_command: AddCommand) -> None:
    """Add demo."""
    add_command(
        "demo",
        _demo,
        "see the released network name three sounds",
        description="Downloads the released network if needed, compares it with recordings of Torch7, and\n"
        "names three example sounds. If it cannot be downloaded, a small network that comes with\n"
        "the package names them instead.",
    )


def _demo(options: argparse.Namespace) -> int:
    from soundnet_port.audio.examples import EXAMPLES, example
    from soundnet_port.conversion.recognition import recognize
    from soundnet_port.conversion.released_parity import check_released_parity
    from soundnet_port.inference.prediction import predict
    from soundnet_port.inference.prediction_formats import format_prediction
    from soundnet_port.network.weights import WeightsError, cpu_state_dict
    from soundnet_port.pretrained import load_pretrained, locate_weights

    name = "soundnet8"
    _print_part("1. The network: SoundNet with eight layers, as MIT released it in 2016")
    try:
        path = locate_weights(name)
        model = load_pretrained(path)
        recognition = recognize(model.architecture, cpu_state_dict(model))
        if not recognition.is_released:
            raise WeightsError(f"{path}: {recognition.summary}; replace it with soundnet-port fetch --force")
    except WeightsError as error:
        report(error)
        name = "demo"
        _print_part(
            "   Not available. In its place, a small network that comes with the package, trained on\n"
            "   320 clips of ten kinds of sound (weights/demo.md); its figures are not the released one's."
        )
        model = load_pretrained(name)
    else:
        print(f"   {path}: {recognition.summary}")
        try:
            parity = check_released_parity(model.architecture, cpu_state_dict(model), recognition)
        except ValueError as error:
            raise UsageError(f"{path}: {error}") from None
        if parity:
            print(textwrap.fill(parity.summary, 100, initial_indent="   ", subsequent_indent="   "))
    _print_part("2. Three example sounds. What are they?")
    for sound in EXAMPLES:
        prediction = predict(model, example(sound), top=3)
        print(format_prediction(prediction, name=f"{sound}.flac"), end="")
    weights = "" if name == "soundnet8" else f" --weights {name}"
    _print_part(
        "3. What to try next\n"
        f"   soundnet-port predict your_sound.wav{weights}\n"
        f"   soundnet-port extract your_sound.wav -l pool5 --csv{weights}\n"
        f"   soundnet-port serve --open{weights}        (extra [web])\n"
        + ("   soundnet-port verify soundnet8" if name == "soundnet8" else "   soundnet-port fetch")
    )
    return 0


def _print_part(text: str) -> None:
    print(f"\n{text}", flush=True)
