"""The parity check fails for every single fault, one at a time."""

from functools import cache

import numpy as np
import pytest
import torch
from support.networks import DEMO, file
from support.t7_writer import load_mutable, modules_of, serialize

from soundnet_port import SOUNDNET5, SOUNDNET8
from soundnet_port.conversion import interpreter, parity
from soundnet_port.conversion.mapping import find_soundnet, load_state
from soundnet_port.conversion.parity import SAMPLES, ParityError, check_parity, parity_signal
from soundnet_port.conversion.t7 import open_t7
from soundnet_port.network.weights import build_model

SOURCES = {"n8_d16": DEMO, "n5_d8": "n5_d8_cudnnA.t7"}


@pytest.fixture(params=SOURCES)
def opened(request):
    """A mapped file, still open, and its state dict."""
    source = SOURCES[request.param]
    with open_t7(source if source == DEMO else file(source)) as parsed:
        mapping = find_soundnet(parsed)
        yield mapping, {name: torch.from_numpy(array) for name, array in load_state(mapping)}


def assert_caught(mapping, state, fault, rehearsal=None):
    """The check fails; `fault` is the first tensor that is wrong."""
    model = build_model(mapping.architecture, state)
    try:
        check_parity(mapping, rehearsal.replay(model, fault.split(".")[0]) if rehearsal else model)
    except ParityError as failure:
        assert not all(row.passed for row in failure.rows)
    else:
        pytest.fail(f"not caught: {fault}")


def test_a_right_conversion_passes(opened):
    mapping, state = opened
    rows = check_parity(mapping, build_model(mapping.architecture, state))
    assert all(row.passed for row in rows)
    assert [row.module for row in rows] == list(mapping.modules.values())
    assert max(row.relative for row in rows) < 5e-6
    # every module with parameters was also compared on noise
    assert sum(row.alone is not None for row in rows) == 2 * len(mapping.architecture.blocks) + 2


class Rehearsal:
    """Both sides of a passing check, so that only what follows a change is run again.

    Attributes:
        changed: path of the first module that was changed in the file's graph; None if none was.
    """

    def __init__(self, mapping, state):
        self.changed, self.steps = None, []
        signal = parity.parity_signal(SAMPLES[mapping.architecture.name])
        self.signal = signal.astype(np.float64)[None, :, None]
        for step in interpreter.run(mapping.network, self.signal):
            self.steps.append(step)
            if step[0] == list(mapping.modules.values())[-1]:
                break
        with torch.inference_mode():
            trunk = build_model(mapping.architecture, state).trunk(torch.from_numpy(signal)[None, None])
            outputs = {mapping.architecture.layer(number).parameters: output for number, output in trunk}
        self.outputs = {name: output for name, output in outputs.items() if name}

    def run(self, *_):
        """Replaces interpreter.run."""
        paths = [path for path, _, _ in self.steps]
        first = paths.index(self.changed) if self.changed else len(paths)
        yield from self.steps[:first]
        x = self.steps[first - 1][2] if first else self.signal
        for path, module, _ in self.steps[first:]:
            out = interpreter.apply(module, x)
            yield path, module, out
            x = x if "." in path else out  # both heads have the same input

    def replay(self, model, until=None):
        """Replay the network's modules with parameters before this one."""
        for name, output in self.outputs.items():
            if name == until:
                break
            model.get_submodule(name).forward = lambda x, output=output: output.to(x.dtype)
        return model


@pytest.fixture
def rehearsal(opened, monkeypatch):
    monkeypatch.setattr(parity, "parity_signal", cache(parity_signal))
    rehearsal = Rehearsal(*opened)
    monkeypatch.setattr(interpreter, "run", rehearsal.run)
    return rehearsal


def test_every_tensor_that_is_wrong_is_caught(opened, rehearsal):
    """Scaled a little, one element off, channels or taps in another order: each in turn."""
    mapping, state = opened
    for name, tensor in state.items():
        shifted = tensor.clone()
        shifted.view(-1)[tensor.numel() // 2] += 0.01 * max(1, float(tensor.abs().max()))
        wrong = [tensor * 1.001, shifted]
        if tensor.shape[0] > 1:
            wrong.append(tensor.roll(1, 0))
        elif tensor.ndim == 3:
            wrong.append(tensor.flip(2))
        for wrong_tensor in wrong:
            assert_caught(mapping, {**state, name: wrong_tensor.contiguous()}, name, rehearsal)


def test_nan_zero_and_reordered_weights_are_caught(opened, rehearsal):
    mapping, state = opened
    for name in ("conv2.weight", "bn2.running_mean", "objects.weight"):
        tensor = state[name]
        wrong = [tensor * np.nan, torch.zeros_like(tensor), tensor + 1]
        if tensor.ndim == 3:
            wrong += [tensor.flip(2), tensor.flip(1) if tensor.shape[1] > 1 else tensor * 2]
        for wrong_tensor in wrong:
            assert_caught(mapping, {**state, name: wrong_tensor.contiguous()}, name, rehearsal)


def test_every_exchange_of_tensors_is_caught(opened, rehearsal):
    """Any two tensors of the same shape swapped, such as gamma and beta, or mean and variance."""
    mapping, state = opened
    names = list(state)
    pairs = [
        (a, b)
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        if state[a].shape == state[b].shape and a.split(".")[0] == b.split(".")[0]
    ]
    assert len(pairs) == 6 * len(mapping.architecture.blocks)
    for a, b in pairs:
        assert_caught(mapping, {**state, a: state[b], b: state[a]}, a, rehearsal)


def test_weights_behind_silent_units_are_checked_too(tmp_path):
    """A unit that never fires on the test sound hides the next layer's weights for it."""
    root = load_mutable(DEMO)
    bias = modules_of(root)[2].fields["bias"]
    bias.storage.array[bias.first] = -1e6
    path = tmp_path / "silent.t7"
    path.write_bytes(serialize(root))
    with open_t7(path) as parsed:
        mapping = find_soundnet(parsed)
        state = {name: torch.from_numpy(array) for name, array in load_state(mapping)}
        model = build_model(mapping.architecture, state)
        with torch.no_grad():
            assert not model.extract(torch.from_numpy(parity_signal(30_000)), ["conv1"])["conv1"].any()
        check_parity(mapping, model)
        assert_caught(mapping, {**state, "conv2.weight": state["conv2.weight"] * 1.001}, "hidden weights")


def test_every_setting_that_is_wrong_is_caught(opened, rehearsal):
    """Each number that the mapping checks, changed in the file's graph after mapping."""
    mapping, state = opened
    model = rehearsal.replay(build_model(mapping.architecture, state))
    changed = 0
    for number, module in [*modules_of(mapping.network).items()]:
        if number > len(mapping.architecture.modules):
            break
        fields = module.fields
        wrong = {
            name: fields[name] + 1
            for name in ("kH", "kW", "dH", "padH", "padW", "nInputPlane", "groups")
            if name in fields
        }
        if module.class_name.endswith("BatchNormalization"):
            wrong = {"eps": 1e-3}
        if module.class_name.endswith("ReLU"):
            wrong = {"threshold": 0.5, "val": 0.5}
        if module.class_name.endswith("MaxPooling"):
            wrong.pop("padW")  # a column of padding is dropped again in floor mode
            wrong["dH"] = fields["dH"] - 1
        for name, value in wrong.items():
            original, fields[name] = fields[name], value
            rehearsal.changed = mapping.modules[number]
            with pytest.raises(ParityError):
                check_parity(mapping, model)
            fields[name] = original
            changed += 1
    check_parity(mapping, model)
    assert changed > 10 * len(mapping.architecture.blocks)


def test_a_network_of_another_shape_is_caught(opened):
    """The model's own table: another stride, padding or pooling than the file's."""
    from dataclasses import replace

    mapping, state = opened
    for i, block in enumerate(mapping.architecture.blocks):
        for change in (
            {"stride": block.stride + 1},
            {"padding": block.padding + 1},
            {"pool": block.pool + 1} if block.pool else {"stride": 1},
        ):
            blocks = list(mapping.architecture.blocks)
            blocks[i] = replace(block, **change)
            other = replace(mapping.architecture, blocks=tuple(blocks))
            with pytest.raises((ParityError, ValueError)):
                check_parity(mapping, build_model(other, state))


def test_training_mode_is_caught(opened):
    mapping, state = opened
    with pytest.raises(ParityError):
        check_parity(mapping, build_model(mapping.architecture, state).requires_grad_(True).train())


def test_ceil_mode_is_caught():
    """A pooling that rounds up has a frame more at the test signal's length, at every level."""
    with open_t7(DEMO) as parsed:
        mapping = find_soundnet(parsed)
        model = build_model(
            mapping.architecture, {name: torch.from_numpy(array) for name, array in load_state(mapping)}
        )
        caught = 0
        for number in (4, 8, 18):
            fields = modules_of(mapping.network)[number].fields
            fields["ceil_mode"] = True
            try:
                check_parity(mapping, model)
            except ParityError:
                caught += 1
            fields["ceil_mode"] = False
        assert caught == 3


def test_the_signal_reaches_two_head_frames_and_stays_in_range():
    for architecture in (SOUNDNET8, SOUNDNET5):
        signal = parity_signal(SAMPLES[architecture.name])
        assert architecture.frames("objects", len(signal)) >= 2
        assert np.abs(signal).max() <= 256
        np.testing.assert_array_equal(signal * 128, np.round(signal * 128))
        for module in architecture.modules:
            if module.kind == "pool":  # frames left over, so that rounding up would show
                before = architecture.frames(module.module - 1, len(signal))
                assert before > architecture.frames(module.module, len(signal)) * _window(module)


def _window(pool):
    return {"pool1": 8, "pool2": 8, "pool3": 8, "pool5": 4}[pool.name]
