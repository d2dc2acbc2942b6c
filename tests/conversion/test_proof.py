"""The proof must fail for every single thing that can be wrong, one at a time."""

from functools import cache

import numpy as np
import pytest
import torch
from support.networks import DEMO, file
from support.t7_writer import modules_of, mutable, written

from soundnet_port import SOUNDNET5, SOUNDNET8
from soundnet_port.conversion import interpreter, proof
from soundnet_port.conversion.mapping import find_soundnet, load_state
from soundnet_port.conversion.proof import SAMPLES, ParityFailed, check_parity, proof_signal
from soundnet_port.conversion.t7 import open_t7
from soundnet_port.network.weights import build_model

SOURCES = {"n8_d16": DEMO, "n5_d8": "n5_d8_cudnnA.t7"}


@pytest.fixture(params=SOURCES)
def opened(request):
    """A mapped file, still open, and its state dict."""
    source = SOURCES[request.param]
    with open_t7(source if source == DEMO else file(source)) as parsed:
        found = find_soundnet(parsed)
        yield found, {name: torch.from_numpy(array) for name, array in load_state(found)}


def fails(found, state, what, rehearsed=None):
    """`what` is the first tensor that is wrong."""
    model = build_model(found.architecture, state)
    try:
        check_parity(found, rehearsed.replay(model, what.split(".")[0]) if rehearsed else model)
    except ParityFailed as failure:
        assert not all(row.passed for row in failure.rows)
    else:
        pytest.fail(f"not caught: {what}")


def test_a_right_conversion_passes(opened):
    found, state = opened
    rows = check_parity(found, build_model(found.architecture, state))
    assert all(row.passed for row in rows)
    assert [row.module for row in rows] == list(found.modules.values())
    assert max(row.relative for row in rows) < 5e-6
    # every module with parameters was also held against noise
    assert sum(row.alone is not None for row in rows) == 2 * len(found.architecture.blocks) + 2


class Rehearsed:
    """Both sides of a right proof, so that only what comes from a change on is run again.

    Attributes:
        changed: path of the first module that was changed in the file's graph; None if none was.
    """

    def __init__(self, found, state):
        self.changed, self.steps = None, []
        signal = proof.proof_signal(SAMPLES[found.architecture.name])
        self.signal = signal.astype(np.float64)[None, :, None]
        for step in interpreter.run(found.network, self.signal):
            self.steps.append(step)
            if step[0] == list(found.modules.values())[-1]:
                break
        with torch.inference_mode():
            trunk = build_model(found.architecture, state).trunk(torch.from_numpy(signal)[None, None])
            outputs = {found.architecture.layer(number).parameters: made for number, made in trunk}
        self.outputs = {name: made for name, made in outputs.items() if name}

    def run(self, *_):
        """In place of interpreter.run."""
        paths = [path for path, _, _ in self.steps]
        first = paths.index(self.changed) if self.changed else len(paths)
        yield from self.steps[:first]
        x = self.steps[first - 1][2] if first else self.signal
        for path, module, _ in self.steps[first:]:
            out = interpreter.apply(module, x)
            yield path, module, out
            x = x if "." in path else out  # both heads see the same

    def replay(self, model, until=None):
        """The network's modules with parameters before this one are not run again."""
        for name, made in self.outputs.items():
            if name == until:
                break
            model.get_submodule(name).forward = lambda x, made=made: made.to(x.dtype)
        return model


@pytest.fixture
def rehearsed(opened, monkeypatch):
    monkeypatch.setattr(proof, "proof_signal", cache(proof_signal))
    rehearsed = Rehearsed(*opened)
    monkeypatch.setattr(interpreter, "run", rehearsed.run)
    return rehearsed


def test_every_tensor_that_is_wrong_is_caught(opened, rehearsed):
    """Scaled a little, one element off, channels or taps in another order: each in turn."""
    found, state = opened
    for name, tensor in state.items():
        one = tensor.clone()
        one.view(-1)[tensor.numel() // 2] += 0.01 * max(1, float(tensor.abs().max()))
        wrong = [tensor * 1.001, one]
        if tensor.shape[0] > 1:
            wrong.append(tensor.roll(1, 0))
        elif tensor.ndim == 3:
            wrong.append(tensor.flip(2))
        for each in wrong:
            fails(found, {**state, name: each.contiguous()}, name, rehearsed)


def test_nan_zero_and_reordered_weights_are_caught(opened, rehearsed):
    found, state = opened
    for name in ("conv2.weight", "bn2.running_mean", "objects.weight"):
        tensor = state[name]
        wrong = [tensor * np.nan, torch.zeros_like(tensor), tensor + 1]
        if tensor.ndim == 3:
            wrong += [tensor.flip(2), tensor.flip(1) if tensor.shape[1] > 1 else tensor * 2]
        for each in wrong:
            fails(found, {**state, name: each.contiguous()}, name, rehearsed)


def test_every_exchange_of_tensors_is_caught(opened, rehearsed):
    """Any two tensors of the same shape swapped, such as gamma and beta, or mean and variance."""
    found, state = opened
    names = list(state)
    pairs = [
        (a, b)
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        if state[a].shape == state[b].shape and a.split(".")[0] == b.split(".")[0]
    ]
    assert len(pairs) == 6 * len(found.architecture.blocks)
    for a, b in pairs:
        fails(found, {**state, a: state[b], b: state[a]}, a, rehearsed)


def test_weights_behind_silent_units_are_proven_too(tmp_path):
    """A unit that never fires on the test sound hides the next layer's weights for it."""
    root = mutable(DEMO)
    bias = modules_of(root)[2].fields["bias"]
    bias.storage.array[bias.first] = -1e6
    path = tmp_path / "silent.t7"
    path.write_bytes(written(root))
    with open_t7(path) as parsed:
        found = find_soundnet(parsed)
        state = {name: torch.from_numpy(array) for name, array in load_state(found)}
        model = build_model(found.architecture, state)
        with torch.no_grad():
            assert not model.extract(torch.from_numpy(proof_signal(30_000)), ["conv1"])["conv1"].any()
        check_parity(found, model)
        fails(found, {**state, "conv2.weight": state["conv2.weight"] * 1.001}, "hidden weights")


def test_every_setting_that_is_wrong_is_caught(opened, rehearsed):
    """Each number that the mapping checks, changed in the file's graph behind its back."""
    found, state = opened
    model = rehearsed.replay(build_model(found.architecture, state))
    changed = 0
    for number, module in [*modules_of(found.network).items()]:
        if number > len(found.architecture.modules):
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
            kept, fields[name] = fields[name], value
            rehearsed.changed = found.modules[number]
            with pytest.raises(ParityFailed):
                check_parity(found, model)
            fields[name] = kept
            changed += 1
    check_parity(found, model)
    assert changed > 10 * len(found.architecture.blocks)


def test_a_network_of_another_shape_is_caught(opened):
    """The model's own table: another stride, padding or pooling than the file's."""
    from dataclasses import replace

    found, state = opened
    for i, block in enumerate(found.architecture.blocks):
        for change in (
            {"stride": block.stride + 1},
            {"padding": block.padding + 1},
            {"pool": block.pool + 1} if block.pool else {"stride": 1},
        ):
            blocks = list(found.architecture.blocks)
            blocks[i] = replace(block, **change)
            other = replace(found.architecture, blocks=tuple(blocks))
            with pytest.raises((ParityFailed, ValueError)):
                check_parity(found, build_model(other, state))


def test_training_mode_is_caught(opened):
    found, state = opened
    with pytest.raises(ParityFailed):
        check_parity(found, build_model(found.architecture, state).train())


def test_ceil_mode_is_caught():
    """A pooling that rounds up has a frame more at the proof's length, at every level."""
    with open_t7(DEMO) as parsed:
        found = find_soundnet(parsed)
        model = build_model(
            found.architecture, {name: torch.from_numpy(array) for name, array in load_state(found)}
        )
        caught = 0
        for number in (4, 8, 18):
            fields = modules_of(found.network)[number].fields
            fields["ceil_mode"] = True
            try:
                check_parity(found, model)
            except ParityFailed:
                caught += 1
            fields["ceil_mode"] = False
        assert caught == 3


def test_the_signal_reaches_two_head_frames_and_stays_in_range():
    for architecture in (SOUNDNET8, SOUNDNET5):
        signal = proof_signal(SAMPLES[architecture.name])
        assert architecture.frames("objects", len(signal)) >= 2
        assert np.abs(signal).max() <= 256
        np.testing.assert_array_equal(signal * 128, np.round(signal * 128))
        for module in architecture.modules:
            if module.kind == "pool":  # frames left over, so that rounding up would show
                before = architecture.frames(module.module - 1, len(signal))
                assert before > architecture.frames(module.module, len(signal)) * _window(module)


def _window(pool):
    return {"pool1": 8, "pool2": 8, "pool3": 8, "pool5": 4}[pool.name]
