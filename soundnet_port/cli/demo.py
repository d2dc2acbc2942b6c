"""The first minute: the released network got, recognized and checked, and three real sounds named."""

from __future__ import annotations

import textwrap

from soundnet_port.audio.examples import EXAMPLES, example
from soundnet_port.cli import main as cli
from soundnet_port.inference.prediction import predict
from soundnet_port.network.weights import WeightsError, cpu_state_dict
from soundnet_port.pretrained import load_pretrained, locate_weights


def demo() -> None:
    """Show the released network at work, or without a network connection the small one that comes along."""
    from soundnet_port.conversion.convert import released_parity
    from soundnet_port.conversion.recognition import recognize

    name = "soundnet8"
    _say("1. The network: SoundNet with eight layers, as MIT released it in 2016")
    try:
        path = locate_weights(name)
        model = load_pretrained(path)
        recognition = recognize(model.architecture, cpu_state_dict(model))
        if not recognition.is_released:
            raise WeightsError(f"{path}: {recognition.summary}; soundnet-port fetch --force replaces it")
    except WeightsError as error:
        cli.complain(error)
        name = "demo"
        _say(
            "   It cannot be had here. In its place answers a small network that comes along, trained on\n"
            "   320 clips of ten kinds of sound (weights/demo.md); its numbers are not the released one's."
        )
        model = load_pretrained(name)
    else:
        print(f"   {path}: {recognition.summary}")
        try:
            parity = released_parity(model.architecture, cpu_state_dict(model), recognition)
        except ValueError as error:
            raise cli.UsageError(f"{path}: {error}") from None
        if parity:
            print(textwrap.fill(parity.summary, 100, initial_indent="   ", subsequent_indent="   "))
    _say("2. Three real sounds that come along. What are they?")
    for sound in EXAMPLES:
        prediction = predict(model, example(sound), top=3)
        print(cli.as_text(f"{sound}.flac", prediction, over_time=False))
    weights = "" if name == "soundnet8" else f" --weights {name}"
    _say(
        "3. What to type next\n"
        f"   soundnet-port predict your_sound.wav{weights}\n"
        f"   soundnet-port extract your_sound.wav --layer pool5 --csv{weights}\n"
        f"   soundnet-port serve --open{weights}        (extra [web])\n"
        + ("   soundnet-port verify soundnet8" if name == "soundnet8" else "   soundnet-port fetch")
    )


def _say(text: str) -> None:
    print(f"\n{text}", flush=True)
