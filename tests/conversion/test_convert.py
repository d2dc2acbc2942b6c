"""Conversion: every real form gives the same weights; with any one fault nothing is written."""

import json
import os
import signal
import time
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support import reference_weights
from support.budget import budget
from support.cli_processes import run_forked
from support.networks import DEMO, NETS, VARIANTS5, VARIANTS8, file
from support.t7_writer import LuaFunction, Table, graph, load_mutable, module, modules_of, serialize, tensor

from soundnet_port import load_pretrained
from soundnet_port.cli.main import main
from soundnet_port.conversion.convert import ConversionError, ConversionResult, convert, verify
from soundnet_port.conversion.parity import ParityError
from soundnet_port.network.architecture import SOUNDNET8
from soundnet_port.network.weights import read_weights

VARIANTS = [("n8_d16", v) for v in VARIANTS8] + [("n5_d8", v) for v in VARIANTS5]


def convert_one(source, destination, **options):
    """Convert a file with one network; raise the error if it is refused."""
    (result,) = convert(source, destination, **options)
    if isinstance(result, ConversionError):
        raise result
    return result


def save_graph(root, folder, name="net.t7", **form):
    path = folder / name
    path.write_bytes(serialize(root, **form))
    return path


def convert_graph(root, folder, **form):
    return convert_one(save_graph(root, folder, **form), folder / "out.safetensors", force=True)


def state_of(result):
    return read_weights(result.weights)[1]


def fields_of(root, number):
    return modules_of(root)[number].fields


# ---- accepted forms


@pytest.mark.parametrize(("net", "variant"), VARIANTS)
def test_every_variant_gives_the_same_weights(tmp_path, net, variant):
    result = convert_one(file(f"{net}_{variant}.t7"), tmp_path / "out.safetensors")
    state = state_of(result)
    expected = reference_weights.state_dict(NETS[net].architecture, NETS[net].seed)
    assert state.keys() == expected.keys()
    for name, array in expected.items():
        if variant == "oldbn" and name.endswith("running_var"):
            # running_std was rounded to float32, and the power of -2 doubles that error
            np.testing.assert_allclose(state[name], array, rtol=1e-6)
        else:
            np.testing.assert_array_equal(state[name], array, err_msg=name)
    assert len(result.parity) == len(NETS[net].architecture.modules) + 2
    assert max(row.relative for row in result.parity) < 5e-6
    assert load_pretrained(result.weights).architecture == NETS[net].architecture


def test_full_width_with_the_released_layout(tmp_path):
    result = convert_one(file("full8_cudnnA.t7"), tmp_path / "full.safetensors")
    expected = reference_weights.state_dict(SOUNDNET8, NETS["full8"].seed)
    for name, tensor_ in state_of(result).items():
        np.testing.assert_array_equal(tensor_, expected[name], err_msg=name)
    model = load_pretrained(result.weights)
    assert model.categories["objects"][0] == "tench, Tinca tinca"
    assert model.categories["scenes"][400] == "/z/zen_garden"
    assert result.metadata["released"] is None


@pytest.fixture(scope="module")
def rounded_state(tmp_path_factory):
    """The demonstration network's tensors, of values that all number types hold exactly."""
    root = load_mutable(DEMO)
    for view in _all_tensors(root):
        view.storage.array = view.storage.array.astype("f2").astype("f4")
    return state_of(convert_graph(root, tmp_path_factory.mktemp("rounded")))


@pytest.mark.parametrize("kind", ["f2", "f4", "f8"])
@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("form", [{}, {"long_bytes": 4}, {"ascii": True}, {"versions": False}])
def test_all_number_types_and_forms(rounded_state, tmp_path, kind, cuda, form):
    root = load_mutable(DEMO)
    name = "torch." + ("Cuda" if cuda else "") + {"f2": "Half", "f4": "Float", "f8": "Double"}[kind]
    name = "torch.Cuda" if name == "torch.CudaFloat" else name
    for view in _all_tensors(root):
        view.storage.array = view.storage.array.astype("f2").astype("f4").astype(kind)
        view.class_name, view.storage.class_name = f"{name}Tensor", f"{name}Storage"
    again = state_of(convert_graph(root, tmp_path, **form))
    for name in rounded_state:
        np.testing.assert_array_equal(again[name], rounded_state[name])


def _all_tensors(root):
    return [
        value
        for child in _all_modules(root)
        for value in child.fields.values()
        if getattr(value, "storage", None) is not None and value.storage.array.dtype.kind == "f"
    ]


def _all_modules(root):
    for child in (root.fields.get("modules") or {}).values():
        yield child
        yield from _all_modules(child)


def test_other_widths_and_heads(tmp_path):
    """Widths that do not double, odd head sizes: nothing depends on the published ones."""
    rng = np.random.default_rng(1)
    for template, widths, heads in (
        (NETS["full8"].template, (3, 5, 4, 7, 6, 9, 8), {"objects": 5, "scenes": 2}),
        (NETS["full5"].template, (2, 1, 6, 3), {"objects": 1, "scenes": 30}),
    ):
        architecture = template.resized(widths, heads)
        state = {
            name: rng.standard_normal(shape).astype("f4")
            for name, shape in architecture.state_shapes().items()
        }
        state = {n: np.abs(a) + 0.1 if n.endswith("var") else a * 0.3 for n, a in state.items()}
        result = convert_graph(graph(architecture, state), tmp_path)
        assert load_pretrained(result.weights).architecture == architecture
        for name, array in state_of(result).items():
            np.testing.assert_array_equal(array, state[name])


# ---- tolerated changes


def tolerated_changes():
    """Return {name: change of the graph} for changes that change no number."""

    def without(name, *classes):
        def change(root):
            for child in _all_modules(root):
                if child.class_name.split(".")[1] in classes:
                    child.fields.pop(name, None)

        return change

    def insert(inserted, position):
        def change(root):
            children = list(modules_of(root).values())
            children.insert(position, inserted)
            root.fields["modules"] = Table(dict(enumerate(children, 1)))

        return change

    def cut(keep):
        def change(root):
            for number in list(modules_of(root)):
                if number > keep:
                    del modules_of(root)[number]

        return change

    def nested(root):
        children = list(modules_of(root).values())
        parts = [module("nn.Sequential", *children[:7]), module("nn.Sequential", *children[7:24])]
        root.fields["modules"] = Table(dict(enumerate([module("nn.Sequential", *parts), *children[24:]], 1)))

    def renamed_all(package):
        def change(root):
            for child in _all_modules(root):
                child.class_name = f"{package}.{child.class_name.split('.')[1]}"

        return change

    def odd_tail(root):
        tail = module("nn.Sequential", module("nn.Dropout", p=0.5))
        modules_of(root)[29] = tail
        tail.fields["modules"][2] = tail  # a cycle, where it does not matter

    def unknown(root):
        fields_of(root, 5)["weather"] = "fine"
        fields_of(root, 5)["parent"] = root
        fields_of(root, 6)["hook"] = LuaFunction(0, 10)

    def heads_go_on(root):
        table = fields_of(root, 25)["modules"]
        for number in (1, 2):
            table[number] = module("nn.Sequential", table[number], module("nn.SplitTable", dimension=3))

    def nan_gradients(root):
        grads = fields_of(root, 1)["gradWeight"].storage
        assert grads is not fields_of(root, 1)["weight"].storage
        grads.array = np.full_like(grads.array, np.nan)

    return {
        "no padW": without("padW", "SpatialConvolution", "SpatialMaxPooling"),
        "no groups": without("groups", "SpatialConvolution"),
        "no ceil_mode": without("ceil_mode", "SpatialMaxPooling"),
        "no eps": without("eps", "SpatialBatchNormalization"),
        "no gradients": without("gradWeight", "SpatialConvolution", "SpatialBatchNormalization"),
        "NaN gradients": nan_gradients,
        "no mode": without("mode", "ReLU", "SpatialMaxPooling"),
        "no thresholds": without("threshold", "ReLU"),
        "padding of the heads": lambda root: [
            head.fields.update(padding=0) or head.fields.pop("padH")
            for head in fields_of(root, 25)["modules"].values()
        ],
        "Identity at the start": insert(module("nn.Identity"), 0),
        "Dropout inside": insert(module("nn.Dropout", p=0.5, v2=True), 11),
        "Dropout of nothing": insert(module("nn.SpatialDropout", p=0), 3),
        "Dropout before the heads": insert(module("nn.Dropout", p=0.5, v2=True), 24),
        "cut after the heads": cut(25),
        "nested": nested,
        "nn": renamed_all("nn"),
        "cunn": renamed_all("cunn"),
        "odd tail": odd_tail,
        "heads that go on": heads_go_on,
        "a copy to float": insert(
            module("nn.Copy", intype="torch.DoubleTensor", outtype="torch.CudaTensor"), 0
        ),
        "persistent mode": lambda root: [
            m.fields.update(mode="CUDNN_BATCHNORM_SPATIAL_PERSISTENT")
            for m in _all_modules(root)
            if "BatchNorm" in m.class_name
        ],
        "unknown fields": unknown,
        "training mode": lambda root: [m.fields.update(train=True) for m in _all_modules(root)],
        "eps as float32": lambda root: [
            m.fields.update(eps=float(np.float32(1e-5)))
            for m in _all_modules(root)
            if "BatchNorm" in m.class_name
        ],
        "version 2": lambda root: [setattr(m, "version", 2) for m in _all_modules(root)],
    }


@pytest.mark.parametrize("name", tolerated_changes())
def test_changes_without_effect_are_tolerated(tmp_path, name, demo_report):
    root = load_mutable(DEMO)
    tolerated_changes()[name](root)
    result = convert_graph(root, tmp_path)
    expected = state_of(demo_report)
    for key, array in state_of(result).items():
        np.testing.assert_array_equal(array, expected[key])
    if name == "unknown fields":
        notes = " ".join(result.metadata["ignored"])
        assert "unknown fields parent, weather" in notes
        assert "Lua function" in notes


def test_a_bare_trunk(tmp_path, demo_report):
    for net, modules in (("n8_d16", 24), ("n5_d8", 15)):
        root = load_mutable(file(f"{net}_cudnnA.t7"))
        for number in list(modules_of(root)):
            if number > modules:
                del modules_of(root)[number]
        model = load_pretrained(convert_graph(root, tmp_path).weights)
        assert model.architecture.heads == ()
        with pytest.raises(ValueError, match="no heads"):
            model(torch.zeros(300_000))
        assert model.extract(torch.zeros(300_000), ["conv4"])["conv4"].shape[0] == 1


@pytest.mark.parametrize(
    "wrap",
    [
        lambda net: module("nn.Sequential", net),
        lambda net: module("nn.DataParallelTable", net, version=3),
        lambda net: module("nn.DataParallelTable", net, net, version=1),
        lambda net: module("nn.GPU", net, device=1),
        lambda net: Table({"model": net, "epoch": 3, "best": Table({"loss": 0.5})}),
        lambda net: Table({1: Table({"net": net})}),
        lambda net: Table({"net": net, "soft": module("nn.Sequential", module("nn.SoftMax"))}),
    ],
)
def test_containers_around_the_net(tmp_path, wrap, demo_report):
    result = convert_graph(wrap(load_mutable(DEMO)), tmp_path)
    for key, array in state_of(result).items():
        np.testing.assert_array_equal(array, state_of(demo_report)[key])


def test_old_variances_win_as_in_torch7(tmp_path):
    """Class version 1 with both: nn overwrites running_var from running_std when it reads the file."""
    root = load_mutable(file("n8_d16_oldbn.t7"))
    plain = state_of(convert_graph(root, tmp_path))
    for child in _all_modules(root):
        if "running_std" in child.fields:
            child.fields["running_var"] = tensor(np.full(child.fields["running_std"].shape, 9, "f4"))
    for version, is_new in ((1, False), (2, True)):
        for child in _all_modules(root):
            child.version = version
        state = state_of(convert_graph(root, tmp_path))
        assert bool((state["bn1.running_var"] == 9).all()) is is_new
        assert is_new or torch.equal(state["bn1.running_var"], plain["bn1.running_var"])


# ---- refused changes


def refused_changes():
    """Return {name: (change of the graph, part of the message)}, with one fault each."""

    def setting(number, name, value):
        return lambda root: fields_of(root, number).update({name: value})

    def missing(number, name):
        return lambda root: fields_of(root, number).pop(name)

    def value(number, name, wrong):
        def change(root):
            view = fields_of(root, number)[name]
            view.storage.array = view.storage.array.copy()
            view.storage.array[view.first] = wrong

        return change

    def swapped(a, b):
        def change(root):
            children = modules_of(root)
            children[a], children[b] = children[b], children[a]

        return change

    def removed(number):
        def change(root):
            children = [m for i, m in modules_of(root).items() if i != number]
            root.fields["modules"] = Table(dict(enumerate(children, 1)))

        return change

    def renamed(number, name):
        return lambda root: setattr(modules_of(root)[number], "class_name", name)

    def reshaped(root):
        weight = fields_of(root, 5)["weight"]
        weight.shape = (1, 2, 32, 1)

    def cycle(root):
        modules_of(root)[5] = root

    def integers(root):
        fields_of(root, 1)["bias"] = tensor(np.zeros(1, "i4"))

    def hole(root):
        modules_of(root)[40] = modules_of(root).pop(3)

    def many(root):
        inner = module("nn.Sequential", module("nn.Identity"))
        for _ in range(40):
            inner = module("nn.Sequential", inner, inner)
        modules_of(root)[2] = inner

    def infinite_after_rounding(root):
        bias = fields_of(root, 1)["bias"]
        fields_of(root, 1)["bias"] = tensor(np.full(bias.shape, 1e300))

    def heads(count):
        def change(root):
            table = fields_of(root, 25)["modules"]
            children = list(table.values())[:1] * count
            fields_of(root, 25)["modules"] = Table(dict(enumerate(children, 1)))

        return change

    def dag(root):
        table = Table({1: 1})
        for _ in range(40):  # 2^40 entries, if one were to write it out
            table = Table({1: table, 2: table})
        fields_of(root, 1)["nOutputPlane"] = table
        fields_of(root, 3)[table] = 1

    def swapped_heads(root):
        for number, size in enumerate((401, 1000), 1):
            head = fields_of(root, 25)["modules"][number].fields
            head["nOutputPlane"] = size
            head["weight"], head["bias"] = (
                tensor(np.ones((size, 64, 8, 1), "f4")),
                tensor(np.ones(size, "f4")),
            )

    def expanded(root):
        fields = fields_of(root, 25)["modules"][1].fields
        fields["nOutputPlane"] = 10**9
        fields["weight"].shape, fields["weight"].strides = (10**9, 64, 8, 1), (0, 8, 1, 1)
        fields["bias"].shape, fields["bias"].strides = (10**9,), (0,)

    return {
        "kernel": (setting(5, "kH", 31), "module 5 (cudnn.SpatialConvolution, conv2): kH is 31, expected 32"),
        "kernel width": (setting(5, "kW", 2), "module 5"),
        "stride": (setting(9, "dH", 1), "module 9 (cudnn.SpatialConvolution, conv3): dH is 1, expected 2"),
        "padding": (setting(9, "padH", 7), "padH is 7, expected 8"),
        "padding width": (setting(9, "padW", 1), "padW is 1, expected 0"),
        "missing padding": (missing(9, "padH"), "padH is 0, expected 8"),
        "old padding": (setting(9, "padding", 8), "padding is 8, expected 0"),
        "stride as text": (setting(9, "dH", "2"), "dH is 2, expected 2"),
        "stride as truth": (setting(9, "dW", True), "dW is True, expected 1"),
        "missing stride": (missing(9, "dH"), "dH is missing, expected 2"),
        "groups": (setting(5, "groups", 2), "groups is 2, expected 1"),
        "planes": (setting(5, "nInputPlane", 2), "nInputPlane is 2, expected 1"),
        "out planes": (setting(5, "nOutputPlane", 3), "weight is 2 x 1 x 32 x 1, expected 3 x 1 x 32 x 1"),
        "no out planes": (missing(5, "nOutputPlane"), "nOutputPlane is None"),
        "eps": (setting(6, "eps", 1e-3), "module 6 (nn.SpatialBatchNormalization, bn2): eps is 0.001"),
        "eps of 0": (setting(6, "eps", 0), "eps is 0, expected 1e-05"),
        "dimensions": (setting(6, "nDim", 2), "nDim is 2, expected 4"),
        "batch norm mode": (setting(6, "mode", "CUDNN_BATCHNORM_PER_ACTIVATION"), "mode is CUDNN_B"),
        "ceil mode": (setting(4, "ceil_mode", True), "ceil_mode is True, expected False"),
        "pool size": (setting(18, "kH", 8), "module 18 (cudnn.SpatialMaxPooling, pool5): kH is 8"),
        "pool stride": (setting(18, "dH", 1), "dH is 1, expected 4"),
        "pool padding": (setting(4, "padH", 1), "padH is 1, expected 0"),
        "average pooling": (setting(4, "mode", "CUDNN_POOLING_AVERAGE_COUNT_INCLUDE_PADDING"), "mode is"),
        "threshold": (setting(3, "threshold", 0.1), "threshold is 0.1, expected 0"),
        "value": (setting(3, "val", 1), "val is 1, expected 0"),
        "tanh": (setting(3, "mode", "CUDNN_ACTIVATION_TANH"), "mode is CUDNN_ACTIVATION_TANH"),
        "swapped modules": (swapped(6, 7), "module 6 is cudnn.ReLU, expected nn.SpatialBatchNormalization"),
        "missing module": (removed(4), "module 4 is cudnn.SpatialConvolution, expected nn.SpatialMaxPooling"),
        "renamed class": (renamed(12, "nn.SpatialFullConvolution"), "module 12 is nn.SpatialFullConvolution"),
        "own class": (renamed(12, "my.SpatialConvolution"), "module 12 is my.SpatialConvolution"),
        "leaky": (renamed(3, "nn.LeakyReLU"), "module 3 is nn.LeakyReLU, expected nn.ReLU"),
        "head stride": (
            lambda root: fields_of(root, 25)["modules"][2].fields.update(dH=1),
            "module 25.2 (cudnn.SpatialConvolution, scenes): dH is 1, expected 2",
        ),
        "one head": (heads(1), "1 branches"),
        "three heads": (heads(3), "3 branches"),
        "missing mean": (missing(6, "running_mean"), "running_mean is missing, expected a tensor of 2"),
        "missing variance": (missing(6, "running_var"), "running_var is missing"),
        "missing weight": (missing(5, "weight"), "weight is missing"),
        "missing bias": (missing(5, "bias"), "bias is missing"),
        "missing gamma": (missing(6, "weight"), "weight is missing"),
        "shape": (reshaped, "weight is 1 x 2 x 32 x 1, expected 2 x 1 x 32 x 1"),
        "integers": (integers, "bias is a torch.IntTensor, expected floats"),
        "NaN": (value(5, "weight", np.nan), "conv2.weight at byte"),
        "infinite": (value(6, "running_mean", np.inf), "1 of its 2 values are NaN or infinite"),
        "too large for float32": (infinite_after_rounding, "NaN or infinite"),
        "negative variance": (value(6, "running_var", -0.5), "variance -0.5"),
        "cycle": (cycle, "contains itself"),
        "hole": (hole, "no list of modules"),
        "unfolding": (many, "unfolds to more than"),
        "old Dropout": (
            lambda root: modules_of(root).update({3: module("nn.Sequential", module("nn.Dropout", p=0.5))}),
            "scales by 1 - p in evaluation",
        ),
        "a table that holds itself a million times": (dag, "nOutputPlane is a table of 2 entries"),
        "function of its own": (
            lambda root: fields_of(root, 3).update(updateOutput=LuaFunction(0, 10)), "updateOutput of its own"
        ),
        "a copy to integers": (
            lambda root: modules_of(root).update(
                {3: module("nn.Copy", intype="torch.CudaTensor", outtype="torch.IntTensor")}
            ),
            "copies torch.CudaTensor to torch.IntTensor",
        ),
        "swapped heads": (swapped_heads, "401 scenes first"),
        "control characters": (setting(3, "mode", "a\n\x1b[31m"), "mode is a\\n\\x1b[31m"),
        "expanded": (expanded, "values, in a file of"),
    }  # fmt: skip


@pytest.mark.parametrize("name", refused_changes())
def test_each_fault_is_refused_and_nothing_written(tmp_path, name):
    change, message = refused_changes()[name]
    root = load_mutable(DEMO)
    change(root)
    source = save_graph(root, tmp_path)
    with pytest.raises(ConversionError) as error:
        convert_one(source, tmp_path / "new" / "out.safetensors")
    text = str(error.value)
    assert message in text
    assert text.startswith(f"{source}: ")
    assert "\n" not in text
    assert [p.name for p in tmp_path.iterdir()] == ["net.t7"]


@pytest.mark.parametrize(
    ("root", "message"),
    [
        (tensor(np.zeros(3, "f4")), "holds a torch.FloatTensor"),
        (module("nn.ReLU"), "holds a nn.ReLU"),
        (Table({"a": module("nn.Sequential"), "b": module("nn.Sequential")}), "2 networks"),
        (Table({"a": 1}), "0 networks"),
        (module("nn.Sequential"), "no list of modules"),
        (module("nn.gModule", module("nn.ReLU")), "holds a nn.gModule"),
        ("text", "holds a str"),
        (None, "holds a NoneType"),
    ],
)
def test_other_contents_are_refused(tmp_path, root, message):
    with pytest.raises(ConversionError, match=message):
        convert_graph(root, tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"RIFF....WAVEfmt ", b"\x93NUMPY\1\0", b"PK\3\4broken", b"\x80\2}q."]
)
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "x.t7"
    path.write_bytes(content)
    with pytest.raises(ConversionError, match=str(path)):
        convert_one(path, tmp_path / "out.safetensors")


def test_missing_sources_are_refused(tmp_path):
    with pytest.raises(ConversionError, match="No such file"):
        convert_one(tmp_path / "no.t7", tmp_path / "out.safetensors")
    with pytest.raises(ConversionError, match="directory"):
        convert_one(tmp_path, tmp_path / "out.safetensors")


def test_a_file_of_some_kilobytes_does_not_ask_for_gigabytes(tmp_path):
    architecture = SOUNDNET8.resized((500, 1, 1, 1, 1, 1, 1), {"objects": 1, "scenes": 1})
    state = {name: np.ones(shape, "f4") for name, shape in architecture.state_shapes().items()}
    with pytest.raises(ConversionError, match="500 channels takes"):
        convert_graph(graph(architecture, state), tmp_path)


def test_rounding_of_float32_does_not_refuse_a_correct_network(tmp_path):
    """A dead unit: no variance, and a mean far above sqrt(eps), where float32 cancels."""
    root = load_mutable(DEMO)
    weight = fields_of(root, 9)["weight"]
    weight.storage.array = weight.storage.array.copy()
    weight.storage.array[weight.first : weight.first + np.prod(weight.shape[1:])] = 0
    for number, name, value in ((9, "bias", 3), (10, "running_mean", 3), (10, "running_var", 0)):
        view = fields_of(root, number)[name]
        view.storage.array[view.first] = value
    result = convert_graph(root, tmp_path)
    assert max(row.alone or 0 for row in result.parity) < 1e-7
    for mean in (3e3, 3e4):
        for number, name in ((9, "bias"), (10, "running_mean")):
            view = fields_of(root, number)[name]
            view.storage.array[view.first] = mean
        result = convert_graph(root, tmp_path)
        assert all(row.passed for row in result.parity)
    assert max(row.relative for row in result.parity) > 1e-5 > max(row.exact for row in result.parity)


# ---- writing


def test_the_same_file_gives_the_same_bytes(tmp_path, threads):
    first = convert_one(DEMO, tmp_path / "a.safetensors").weights.read_bytes()
    threads(2)
    assert convert_one(DEMO, tmp_path / "b.safetensors").weights.read_bytes() == first
    again = convert_one(DEMO, tmp_path / "a.safetensors")
    assert again.unchanged
    assert again.weights.read_bytes() == first


def test_other_weights_are_not_overwritten(tmp_path):
    path = convert_one(DEMO, tmp_path / "a.safetensors").weights
    before = path.read_bytes()
    with pytest.raises(ConversionError, match="--force"):
        convert_one(file("n5_d8_cudnnA.t7"), path)
    assert path.read_bytes() == before
    convert_one(file("n5_d8_cudnnA.t7"), path, force=True)
    assert load_pretrained(path).architecture.name == "soundnet5"
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_weights_that_differ_only_in_the_parity_checks_figures_are_replaced_without_force(
    tmp_path, monkeypatch
):
    """As they do between processors."""
    path = convert_one(DEMO, tmp_path / "a.safetensors").weights
    monkeypatch.setattr("soundnet_port.conversion.convert._round", lambda _: 7e-7)
    assert not convert_one(DEMO, path).unchanged


def test_weights_of_an_earlier_version_with_the_same_network_are_unchanged(tmp_path):
    """The figures of its parity check were under the key "proof"."""
    path = convert_one(DEMO, tmp_path / "a.safetensors").weights
    _, state, metadata = read_weights(path)
    metadata["proof"] = metadata.pop("parity")
    save_file(state, path, {"soundnet_port": json.dumps({**metadata, "converter": "0.0.1"})})
    old = path.read_bytes()
    assert convert_one(DEMO, path).unchanged
    assert path.read_bytes() == old
    assert len(verify(path, DEMO).parity) == 26
    assert main(["info", str(path)]) == 0
    assert main(["verify", str(path), str(DEMO)]) == 0


@pytest.mark.parametrize("name", ["a.pt", "a.t7"])
def test_odd_destinations_are_refused(tmp_path, name):
    with pytest.raises(ConversionError, match=r"weights are \.safetensors files"):
        convert_one(DEMO, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_without_a_destination_the_weights_are_found_by_name(tmp_path):
    path = convert_one(DEMO, None).weights
    assert path == tmp_path / "soundnet-weights" / "soundnet8.safetensors"
    assert load_pretrained("soundnet8").architecture.widths == (1, 2, 4, 8, 16, 32, 64)


def test_a_zip_gives_both_networks(tmp_path):
    path = tmp_path / "soundnet_models_public.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(file("n8_d16_cudnnA.t7"), "soundnet_models_public/soundnet8_final.t7")
        archive.write(file("n5_d8_cudnnA.t7"), "soundnet_models_public/soundnet5_final.t7")
    results = convert(path)
    assert [r.weights.name for r in results] == ["soundnet8.safetensors", "soundnet5.safetensors"]
    direct = convert_one(DEMO, tmp_path / "direct.safetensors")
    assert results[0].weights.read_bytes() == direct.weights.read_bytes()
    assert verify("soundnet5", path).source.endswith("zip/soundnet_models_public/soundnet5_final.t7")
    with pytest.raises(ConversionError, match="give -o a folder"):
        convert(path, tmp_path / "one.safetensors")


def test_a_bad_network_in_a_zip_does_not_stop_the_other(tmp_path):
    root = load_mutable(DEMO)
    fields_of(root, 5)["kH"] = 31
    path = tmp_path / "models.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("soundnet8_final.t7", serialize(root))
        archive.write(file("n5_d8_cudnnA.t7"), "soundnet5_final.t7")
    bad, good = convert(path)
    assert isinstance(bad, ConversionError)
    assert "models.zip/soundnet8_final.t7: module 5" in str(bad)
    assert isinstance(good, ConversionResult)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_conversion_killed_at_any_moment_leaves_nothing_under_the_name(tmp_path):
    """In processes that have imported everything, timed by a complete conversion."""
    assert run_forked(_convert_and_kill, file("n8_d16_cudnnA.t7"), tmp_path) == 0
    paths = list(tmp_path.glob("*.safetensors"))
    assert tmp_path / "complete.safetensors" in paths
    assert tmp_path / "0.safetensors" not in paths
    for path in paths:  # then it is complete
        assert load_pretrained(path).architecture.widths[0] == 1


def _convert_and_kill(source, folder):
    torch.set_num_threads(1)  # threads do not survive a fork
    convert(source, folder / "first.safetensors")  # slower than the others
    start = time.monotonic()
    convert(source, folder / "complete.safetensors")
    duration = time.monotonic() - start
    for part in range(8):
        child = os.fork()
        if not child:
            convert(source, folder / f"{part}.safetensors")
            os._exit(0)
        time.sleep(duration * part / 8)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# ---- verification


def test_verify_accepts_what_convert_wrote_and_names_what_differs(tmp_path, demo_report):
    assert verify(demo_report.weights, DEMO).parity == demo_report.parity
    other = save_graph(load_mutable(file("n8_d16_clear.t7")), tmp_path)
    verify(demo_report.weights, other)  # the same network in another form
    root = load_mutable(DEMO)
    weight = fields_of(root, 12)["weight"]
    weight.storage.array[weight.first] *= 1.0001
    with pytest.raises(ParityError, match=r"conv4\.weight is not what"):
        verify(demo_report.weights, save_graph(root, tmp_path))
    with pytest.raises(ParityError, match="soundnet5"):
        verify(demo_report.weights, file("n5_d8_cudnnA.t7"))


# ---- random damage


@settings(max_examples=budget(40), deadline=None)
@given(st.data())
def test_damaged_files_convert_to_what_they_hold_or_are_refused(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    raw = bytearray(DEMO.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + 1] = data.draw(st.binary(max_size=4))
    source = folder / "damaged.t7"
    source.write_bytes(raw)
    try:
        result = convert_one(source, folder / "damaged.safetensors", force=True)
    except ConversionError as error:
        assert "\n" not in str(error)
    else:
        verify(result.weights, source)
