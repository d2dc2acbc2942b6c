"""Weights of other ports: read without running anything, compared, and refused if incomplete."""

import io
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.budget import budget
from support.networks import DEMO, NETS, model_of
from support.port_writer import modern_npy, port_state_dict, python2_npy, tensorflow_layers
from torch import nn

from soundnet_port import load_pretrained
from soundnet_port.cli.main import main
from soundnet_port.conversion.convert import ConversionError, convert
from soundnet_port.conversion.port_files import NPY, STATE_DICT, port_format
from soundnet_port.conversion.ports import convert_port
from soundnet_port.conversion.unpickling import read_pickle
from soundnet_port.network.weights import read_weights

NET = NETS["n8_d16"]


def state_of(net):
    return {name: t.clone() for name, t in model_of(net).state_dict().items() if "num_b" not in name}


STATE = state_of(NET)


# ---- files in the ports' namings


def plain(name):
    return name.replace("bn", "batchnorm").replace("objects", "conv8_objs").replace("scenes", "conv8_scns")


def numbered(name):
    """nn.Sequential under DataParallel: positions as names."""
    module, _, parameter = name.rpartition(".")
    positions = {}
    position = 0
    for block in NET.architecture.blocks:
        positions[block.name], positions[block.norm] = position, position + 1
        position += 4 if block.pool else 3
    return (
        f"module.features.{positions[module]}.{parameter}" if module in positions else f"module.{plain(name)}"
    )


def save(path, content):
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    return path


def in_c_order(layers):
    return {
        name: {key: np.ascontiguousarray(v) for key, v in layer.items()} for name, layer in layers.items()
    }


FILES = {
    "python2.npy": lambda: python2_npy(tensorflow_layers(STATE)),
    "c_order.npy": lambda: python2_npy(in_c_order(tensorflow_layers(STATE))),
    "big_endian.npy": lambda: python2_npy(tensorflow_layers(STATE), ">"),
    "today.npy": lambda: modern_npy(tensorflow_layers(STATE)),
    "plain.pth": lambda: port_state_dict(STATE, plain),
    "numbered.pth": lambda: {"epoch": 3, "state_dict": port_state_dict(STATE, numbered)},
    "wide.pth": lambda: {
        k: v.movedim(2, 3) if v.ndim == 4 else v for k, v in port_state_dict(STATE, plain).items()
    },
    "backwards.pth": lambda: {
        **{k: v for k, v in port_state_dict(STATE, plain).items() if "norm" not in k},
        **{k: v for k, v in reversed(port_state_dict(STATE, plain).items()) if "norm" in k},
    },
    "deep.pth": lambda: {"checkpoint": {"state_dict": port_state_dict(STATE, plain), "step": 3}, "lr": 0.1},
    "twice.pth": lambda: {"model": port_state_dict(STATE, plain), "best": port_state_dict(STATE, plain)},
    "flat.pth": lambda: {plain(name): tensor.double() for name, tensor in STATE.items()},
}


@pytest.mark.parametrize("name", FILES)
def test_every_common_form_gives_the_same_weights(tmp_path, name):
    source = save(tmp_path / name, FILES[name]())
    assert port_format(source) == (NPY if name.endswith("npy") else STATE_DICT)
    result = convert_port(source, tmp_path / "out.safetensors")
    architecture, state, metadata = read_weights(result.weights)
    assert architecture == NET.architecture
    assert all(torch.equal(tensor, STATE[key]) for key, tensor in state.items())
    assert metadata["parity"] == {}
    assert any("no parity check" in note for note in metadata["ignored"])


def test_torchs_form_before_version_1_6_is_read(tmp_path):
    path = tmp_path / "sound8.pth"
    torch.save(port_state_dict(STATE, plain), path, _use_new_zipfile_serialization=False)
    result = convert_port(path, tmp_path / "out.safetensors")
    assert torch.equal(read_weights(result.weights)[1]["scenes.weight"], STATE["scenes.weight"])


def test_the_weights_keep_the_files_name_and_work(tmp_path):
    result = convert_port(save(tmp_path / "sound8.npy", FILES["python2.npy"]()))
    assert result.weights.name == "sound8.safetensors"
    wave = torch.randn(230_000) * 20
    assert torch.equal(load_pretrained("sound8")(wave).objects, model_of(NET)(wave).objects)
    assert result.against is None


def test_ports_are_compared_with_existing_weights_from_torch7(tmp_path):
    convert(DEMO)  # n8_d16, under the name soundnet8
    result = convert_port(save(tmp_path / "sound8.npy", FILES["python2.npy"]()))
    assert result.against.name == "soundnet8.safetensors"
    assert [row.layer for row in result.differences][:3] == ["conv1", "bn1", "conv2"]
    assert len(result.differences) == 16
    assert all(row.parameters == row.output == 0 for row in result.differences)


def test_a_difference_shows_in_its_module_and_all_later_outputs(tmp_path):
    convert(DEMO)
    state = {**STATE, "bn4.running_var": STATE["bn4.running_var"] * 1.001}
    result = convert_port(save(tmp_path / "other.pth", port_state_dict(state, plain)), against="soundnet8")
    rows = {row.layer: row for row in result.differences}
    assert {name for name, row in rows.items() if row.parameters > 0} == {"bn4"}
    assert rows["bn4"].parameters == pytest.approx(1e-3, rel=1e-2)
    assert rows["conv4"].output == 0 < rows["bn4"].output
    assert rows["conv7"].output > 0


def test_weights_without_batch_norm_statistics_are_refused_by_name(tmp_path):
    """As keunhong's converter leaves them: convolutions copied, batch norm as PyTorch makes it."""
    fresh = {}
    for name, tensor in STATE.items():
        if name.startswith("bn"):
            tensor = torch.ones_like(tensor) if name.endswith(("weight", "var")) else torch.zeros_like(tensor)
        fresh[name] = tensor
    source = save(tmp_path / "sound8.pth", port_state_dict(fresh, plain))
    with pytest.raises(ConversionError, match=r"batch-norm statistics .*bn1, bn2, .*never copied.*fetch"):
        convert_port(source)
    convert(DEMO)
    with pytest.raises(
        ConversionError, match=r"its convolutions are those of .*soundnet8.safetensors: use that"
    ):
        convert_port(source)


def test_missing_tensors_are_named(tmp_path):
    layers = tensorflow_layers(STATE)
    del layers["conv3"]["mean"], layers["conv3"]["var"]
    source = save(tmp_path / "sound8.npy", python2_npy(layers))
    with pytest.raises(ConversionError, match=r"missing tensors \(bn3.running_mean, bn3.running_var\)"):
        convert_port(source)
    assert not (tmp_path / "soundnet-weights").exists()


def test_a_single_head_is_left_out_and_the_trunk_kept(tmp_path):
    state = {name: tensor for name, tensor in STATE.items() if "objects" not in name}
    result = convert_port(save(tmp_path / "scenes.pth", port_state_dict(state, plain)))
    assert not load_pretrained(result.weights).architecture.heads
    assert any("head for scenes" in note for note in result.metadata["ignored"])


def test_the_other_architecture_is_told_apart(tmp_path):
    state = model_of(NETS["n5_d8"]).state_dict()
    source = save(
        tmp_path / "five.pth", port_state_dict({k: v for k, v in state.items() if "num_b" not in k}, plain)
    )
    result = convert_port(source)
    assert read_weights(result.weights)[0].name == "soundnet5"


# ---- hostile and unsuitable files


class Evil:
    def __reduce__(self):
        return (print, ("the payload ran",))


def evil_npy():
    out = io.BytesIO()
    np.save(out, {"conv1": {"weights": Evil()}}, allow_pickle=True)
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("evil.npy", evil_npy, "wants to call builtins.print"),
        ("evil.pth", lambda: {"conv1.weight": Evil()}, "without running code"),
        ("numbers.npy", lambda: modern_npy(np.zeros(3)), "expected a dict of layers"),
        ("list.npy", lambda: modern_npy(np.array([[], {}], object)), "expected a dict of layers"),
        ("empty.npy", lambda: modern_npy({}), "kernels"),
        ("empty.pth", dict, "no dict of tensors"),
        ("linear.pth", lambda: nn.Linear(3, 4).state_dict(), "kernels"),
        ("other.pth", lambda: nn.Conv1d(1, 4, 7).state_dict(), r"kernels \[7\], expected"),
        (
            "ints.npy",
            lambda: modern_npy({"conv1": {"weights": np.zeros((64, 1, 1, 16), int)}}),
            "expected float",
        ),
        ("flat.npy", lambda: modern_npy({"conv1": {"weights": np.zeros((64, 16))}}), "expected .kernel, 1"),
        ("half.npy", lambda: FILES["python2.npy"]()[:9000], "only 8660 remain"),
        ("nan.pth", lambda: port_state_dict({**STATE, "bn2.bias": STATE["bn2.bias"] * np.nan}, plain), "NaN"),
        (
            "neg.pth",
            lambda: port_state_dict({**STATE, "bn2.running_var": -STATE["bn2.running_var"]}, plain),
            "variance",
        ),
        ("model.pth", lambda: nn.Conv1d(1, 16, 64), "model.state_dict"),
    ],
)
def test_anything_else_is_refused_with_a_reason_and_runs_nothing(tmp_path, capsys, name, content, reason):
    source = save(tmp_path / name, content())
    with pytest.raises(ConversionError, match=reason) as error:
        convert_port(source, tmp_path / "out.safetensors")
    assert str(source) in str(error.value)
    assert "the payload ran" not in capsys.readouterr().out  # threads of other tests may print too
    assert not (tmp_path / "out.safetensors").exists()


def test_a_packed_zip_is_refused_before_it_is_unpacked(tmp_path):
    source = save(tmp_path / "sound8.pth", port_state_dict(STATE, plain))
    packed = tmp_path / "packed.pth"
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as after:
        for name in before.namelist():
            after.writestr(name, before.read(name))
    with pytest.raises(ConversionError, match="packed zip"):
        convert_port(packed)


def state_without(*names):
    return {k: v for k, v in STATE.items() if not k.startswith(names)}


def fresh(*fields):
    values = {"running_mean": 0.0, "running_var": 1.0, "weight": 1.0, "bias": 0.0}
    return {
        name: torch.full_like(t, values[name.split(".")[1]])
        if name.startswith("bn") and name.endswith(fields)
        else t
        for name, t in STATE.items()
    }


def expanded():
    return {"conv1.weight": torch.zeros(1).expand(16, 1, 2**26)}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            lambda: port_state_dict(state_without("conv7", "bn7", "objects", "scenes"), plain),
            "8-layer SoundNet of which",
        ),
        (lambda: port_state_dict(state_without("conv5", "bn5"), plain), "8-layer SoundNet of which"),
        (
            lambda: port_state_dict(
                state_without("conv5", "conv6", "conv7", "bn5", "objects", "scenes"), plain
            ),
            "missing",
        ),
        (lambda: port_state_dict(state_without("conv2"), plain), "kernels"),
        (
            lambda: port_state_dict({**STATE, "conv3.weight": torch.randn(4, 3, 16)}, plain),
            "has 3 input channels",
        ),
        (lambda: port_state_dict(fresh("weight", "bias"), plain), "batch-norm weights .*never copied"),
        (
            lambda: {"ema": port_state_dict(fresh("bias"), plain), "model": port_state_dict(STATE, plain)},
            "networks .ema",
        ),
        (
            lambda: {f"{n}.{k}": v for n in ("ema", "net") for k, v in port_state_dict(STATE, plain).items()},
            "a second network at net.conv1",
        ),
        (expanded, "no tensor with all its numbers"),
        (lambda: {"conv1.weight": torch.empty(16, 1, 64, device="meta")}, "no tensor with all its numbers"),
        (
            lambda: port_state_dict(
                {**STATE, "objects.weight": torch.zeros(401, 64, 8), "objects.bias": torch.zeros(401)}, plain
            ),
            "conv8_objs has 401 categories, which are the scenes",
        ),
    ],
)
def test_incomplete_and_ambiguous_state_dicts_are_refused(tmp_path, content, reason):
    with pytest.raises(ConversionError, match=reason):
        convert_port(save(tmp_path / "port.pth", content()))
    assert main(["info", str(tmp_path / "port.pth")]) in (0, 2)


def test_heads_are_told_by_their_size_whatever_the_networks_name(tmp_path):
    sizes = {"objects": 1000, "scenes": 401}
    state = {k: v for k, v in STATE.items() if not k.startswith(tuple(sizes))}
    names = {"scenes": "soundscape_net.conv8", "objects": "soundscape_net.conv8_2"}  # scenes first
    for head, name in names.items():
        state[f"{name}.weight"] = torch.randn(sizes[head], 64, 8)
        state[f"{name}.bias"] = torch.randn(sizes[head])
    result = convert_port(save(tmp_path / "port.pth", port_state_dict(state, str)))
    assert load_pretrained(result.weights).architecture.head_sizes == sizes
    assert result.metadata["categories"]["scenes"][0] != result.metadata["categories"]["objects"][0]


def test_a_port_does_not_take_the_name_of_checked_weights(tmp_path):
    source = save(tmp_path / "soundnet8.npy", FILES["python2.npy"]())
    assert convert_port(source).weights.name == "soundnet8-port.safetensors"
    convert(DEMO)
    again = convert_port(source)
    assert again.unchanged
    assert again.against.name == "soundnet8.safetensors"
    unchecked = convert_port(source, again.against, force=True)
    assert unchecked.against is None
    assert "has not passed a parity check" in unchecked.not_compared
    assert convert_port(source).against is None  # weights of another port are no reference by default
    with pytest.raises(ConversionError, match="without a name"):
        convert_port(save(tmp_path / ".npy", FILES["python2.npy"]()))


def test_a_trunk_is_compared_with_the_trunk(tmp_path):
    convert(DEMO)
    state = {name: tensor for name, tensor in STATE.items() if "objects" not in name}
    result = convert_port(save(tmp_path / "scenes.pth", port_state_dict(state, plain)))
    assert [row.layer for row in result.differences][-1] == "bn7"
    assert all(row.parameters == row.output == 0 for row in result.differences)
    other = port_state_dict(state_of(NETS["n5_d8"]), plain)
    with pytest.raises(
        ConversionError, match=r"soundnet8.safetensors is soundnet8: .* the file is soundnet5"
    ):
        convert_port(save(tmp_path / "five.pth", other), against="soundnet8")


def npy_of(pickled):
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (), }"
    header += b" " * (-(len(header) + 11) % 16) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + pickled


NESTED = b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))  # a tuple of 2**60 empty ones


@pytest.mark.parametrize(
    ("pickled", "reason"),
    [
        (b"\x80\x02}" + NESTED + b"K\x01s.", "keys that are not names"),
        (b"\x80\x02" + NESTED + b")R.", "wants to call a tuple"),
        (b"\x80\x04" + NESTED + b"\x8c\x01a\x93.", "a name that is not text"),
        (b"\x80\x02" + b"N0" * 100 + b".", "uses POP"),
        (b"\x80\x02" + b"}q\x00" * 100 + b".", "more than 50 steps"),
        (b"\x80\x02P1\n.", "uses PERSID"),
    ],
)
def test_pickles_that_would_run_forever_are_refused_at_once(tmp_path, monkeypatch, pickled, reason):
    monkeypatch.setattr("soundnet_port.conversion.unpickling.MAX_STEPS", 50 if "50" in reason else 1_000)
    source = save(tmp_path / "bomb.npy", npy_of(pickled))
    with pytest.raises(ConversionError, match=reason):
        convert_port(source)
    assert main(["info", str(source)]) == 2


def test_arrays_must_have_their_bytes(tmp_path):
    content = FILES["c_order.npy"]()
    at = content.index(b"f4") - 40
    shape = content.index(b"(K\x40K\x01", at)  # (64, 1, 1, 1) of conv1's weights
    source = save(tmp_path / "short.npy", content[: shape + 2] + b"\x41" + content[shape + 3 :])
    with pytest.raises(
        ConversionError, match=r"conv1/weights is \(65, 1, 1, 1\) of float32, but has 256 bytes"
    ):
        convert_port(source)


def test_a_file_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("soundnet_port.conversion.port_files.MAX_BYTES", 1_000)
    with pytest.raises(ConversionError, match="too large for a SoundNet"):
        convert_port(save(tmp_path / "sound8.npy", FILES["python2.npy"]()))


@pytest.mark.parametrize("name", ["sound8.npy", "sound8.pth"])
@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"PK\x03\x04 cut short"])
def test_failed_downloads_are_told_by_the_name(tmp_path, capsys, name, content):
    (tmp_path / name).write_bytes(content)
    for command in (["convert"], ["info"], ["verify", "x"]):
        assert main([*command, str(tmp_path / name)]) == 2
        message = capsys.readouterr().err
        assert name in message
        assert "Torch7 object" not in message


@settings(max_examples=budget(300), deadline=None)
@given(st.data())
def test_damaged_files_are_refused_and_nothing_else(tmp_path_factory, data):
    kind = data.draw(st.sampled_from(["python2.npy", "plain.pth"]))
    content = UNDAMAGED.setdefault(kind, undamaged(kind, tmp_path_factory))
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        near_start = st.integers(0, 2_000) if kind.endswith("npy") else st.integers(0, len(content) - 1)
        damaged[data.draw(near_start)] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / f"damaged-{kind}"
    path.write_bytes(damaged[: data.draw(st.sampled_from([len(content), len(content) // 2]))])
    try:
        convert_port(path, path.with_suffix(".safetensors"), force=True)
    except ConversionError as error:
        assert str(path) in str(error)


UNDAMAGED = {}


def undamaged(kind, tmp_path_factory):
    return save(tmp_path_factory.getbasetemp() / kind, FILES[kind]()).read_bytes()


@settings(max_examples=budget(300), deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
        lambda inner: (
            st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner, inner, inner)
        ),
        max_leaves=20,
    ),
    st.integers(3, 5),
)
def test_plain_data_is_read_as_by_pythons_unpickler(value, protocol):
    assert read_pickle(io.BytesIO(pickle.dumps(value, protocol))) == value


# ---- on the command line


def test_convert_on_the_command_line(tmp_path, capsys):
    source = save(tmp_path / "sound8.npy", FILES["python2.npy"]())
    assert main(["convert", str(source)]) == 0
    out = capsys.readouterr().out
    assert "nothing to compare with: no soundnet8 converted from Torch7 exists" in out
    assert "soundnet8: widths 1 2 4 8 16 32 64; 10 objects, 6 scenes" in out
    assert "sound8.safetensors" in out
    convert(DEMO)
    assert main(["convert", str(source), "--against", "soundnet8"]) == 0
    out = capsys.readouterr().out
    assert "the same weights" in out
    assert "unchanged" in out
    assert main(["convert", str(source), "--json"]) == 0
    assert '"layer": "conv1"' in capsys.readouterr().out
    assert main(["info", "sound8"]) == 0
    assert "parity with" not in capsys.readouterr().out
    assert main(["info", str(source)]) == 0
    out = capsys.readouterr().out
    assert "conv8_2  weight 6x64x8 bias 6" in out
    assert "soundnet8: widths 1 2 4 8 16 32 64" in out
    assert main(["verify", "sound8", str(source)]) == 2
    assert "without a graph to run" in capsys.readouterr().err
    moved = port_state_dict({**STATE, "bn6.bias": STATE["bn6.bias"] + 0.5}, plain)
    assert main(["convert", str(save(tmp_path / "moved.pth", moved))]) == 0
    assert "  other weights, off by up to " in capsys.readouterr().out
    assert main(["convert", str(source), "--against", "nowhere"]) == 2
    assert main(["info", str(tmp_path / "nothere.pth")]) == 2
    assert "not converted yet" not in capsys.readouterr().err
    assert main(["convert", str(DEMO), "--against", "soundnet8"]) == 2
