"""The network against real Torch7's recorded activations: every module, every recorded length."""

import numpy as np
import pytest
import torch
from support import reference_weights
from support.networks import DEVICES, NETS, SOFTMAX_TOLERANCE, assert_agrees, file, lengths, model_of

from soundnet_port.conversion import interpreter
from soundnet_port.conversion.t7 import open_t7

HEADS = {"objects": "obj", "scenes": "scn"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NETS)
def test_every_module_agrees_with_torch7(name, device):
    net = NETS[name]
    reference = np.load(net.reference)
    model = model_of(net).to(device)
    numbers = range(1, len(model.architecture.modules) + 1)
    for samples in lengths(reference):
        recorded = f"L{samples}/obj/stats" in reference.files
        assert recorded == (model.architecture.frames("objects", samples) > 0)
        with torch.no_grad():
            out = model.extract(
                torch.from_numpy(reference_weights.waveform(samples)).to(device),
                [*numbers, *(HEADS if recorded else [])],
            )
        for key, output in out.items():
            values = output.cpu()
            assert_agrees(reference, samples, HEADS.get(key) or f"m{key:02d}", values)
            if key in HEADS:
                probabilities = torch.softmax(values, 1)
                assert_agrees(reference, samples, f"{HEADS[key]}_softmax", probabilities, SOFTMAX_TOLERANCE)


@pytest.mark.parametrize("name", ["n8_d16", "n8_d8", "n5_d8"])
def test_the_interpreter_agrees_with_torch7(name):
    """The parity check rests on the interpreter, so it has to be Torch7's equal by itself."""
    reference = np.load(NETS[name].reference)
    heads = {"25.1": "obj", "25.2": "scn", "16.1": "obj", "16.2": "scn"}
    with open_t7(file(f"{name}_clear.t7")) as source:
        for samples in lengths(reference):
            sound = reference_weights.waveform(samples).astype(np.float64)[None, :, None]
            seen = 0
            try:
                for path, _, values in interpreter.run(source.root, sound):
                    assert_agrees(reference, samples, heads.get(path) or f"m{int(path):02d}", values)
                    seen += 1
                    if heads.get(path) == "scn":
                        break
            except interpreter.InterpreterError as error:  # Torch7's heads fail there as well
                assert "does not fit" in str(error)
                assert f"L{samples}/obj/stats" not in reference.files
            assert seen >= len(NETS[name].architecture.modules)


def test_the_formula_gives_the_weights_torch7_wrote():
    """Ties the formula, and so the full-width networks built from it, to Torch7's own files."""
    for name, path in (("n8_d16", "n8_d16_clear.t7"), ("n5_d8", "n5_d8_clear.t7")):
        state = reference_weights.state_dict(NETS[name].architecture, NETS[name].seed)
        with open_t7(file(path)) as source:
            first = source.root.fields["modules"][1].fields
            np.testing.assert_array_equal(first["weight"].array()[..., 0], state["conv1.weight"])
            np.testing.assert_array_equal(first["bias"].array(), state["conv1.bias"])
