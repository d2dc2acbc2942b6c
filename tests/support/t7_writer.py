"""Write Torch7's format, for tests: any graph, right or wrong, in all its forms."""

import functools
import pickle
import struct
from dataclasses import dataclass, field

import numpy as np

from soundnet_port.conversion.t7 import open_t7
from soundnet_port.conversion.t7_objects import LuaFunction, LuaObject, Storage, Table, Tensor

NAMES = {"u1": "Byte", "i1": "Char", "i2": "Short", "i4": "Int", "i8": "Long"}
NAMES |= {"f2": "Half", "f4": "Float", "f8": "Double"}


@dataclass(eq=False)
class Elements:
    """A storage in memory; `count` may be false."""

    class_name: str
    array: np.ndarray
    count: int | None = None


@dataclass(eq=False)
class Writer:
    """Torch7's File.lua, writing side."""

    ascii: bool = False
    long_bytes: int = 8
    versions: bool = True  # False: class names without "V 1", as in the oldest files
    out: bytearray = field(default_factory=bytearray)
    indices: dict = field(default_factory=dict)
    values: list = field(default_factory=list)  # so that no id is used twice

    def text(self, words):
        words = list(words)
        if words:
            self.out += " ".join(words).encode() + b"\n"

    def int32(self, value):
        self.text([str(value)]) if self.ascii else self.out.extend(struct.pack("<i", value))

    def longs(self, values):
        if self.ascii:
            self.text(map(str, values))
        else:
            self.out += struct.pack(f"<{len(values)}{'q' if self.long_bytes == 8 else 'i'}", *values)

    def double(self, value):
        self.text([f"{value:.17g}"]) if self.ascii else self.out.extend(struct.pack("<d", value))

    def raw(self, data):
        self.out += data + (b"\n" if self.ascii and data else b"")

    def string(self, text):
        self.int32(len(text))
        self.raw(text.encode("latin-1"))

    def seen(self, tag, value):
        self.int32(tag)
        known = id(value) in self.indices
        if not known:
            self.indices[id(value)] = len(self.indices) + 1
            self.values.append(value)
        self.int32(self.indices[id(value)])
        return known

    def write(self, value):
        if value is None:
            self.int32(0)
        elif isinstance(value, bool):
            self.int32(5)
            self.int32(int(value))
        elif isinstance(value, (int, float)):
            self.int32(1)
            self.double(value)
        elif isinstance(value, str):
            self.int32(2)
            self.string(value)
        elif isinstance(value, LuaFunction):
            if not self.seen(8, value):
                self.string("x" * value.size)
                self.write(Table())
        elif isinstance(value, dict):
            if not self.seen(3, value):
                self.int32(len(value))
                for key, entry in value.items():
                    self.write(key)
                    self.write(entry)
        elif not self.seen(4, value):
            if self.versions:
                self.string(f"V {getattr(value, 'version', 1)}")
            self.string(value.class_name)
            if isinstance(value, LuaObject):
                if value.class_name == "nn.DataParallelTable" and value.version >= 2:
                    self.write(Table({1: 1, 2: 2}))
                self.write(value.fields)
            elif isinstance(value, Tensor):
                self.int32(len(value.shape))
                self.longs(value.shape)
                self.longs(value.strides)
                self.longs([value.first + 1])
                self.write(value.storage)
            else:
                self.storage(value)

    def storage(self, value):
        if isinstance(value, Storage):
            array, count = value.elements(0, value.count), value.count
        else:
            array, count = value.array, value.count if value.count is not None else len(value.array)
        self.longs([count])
        if array.dtype.kind == "i" and array.dtype.itemsize == 8 and self.long_bytes == 4:
            array = array.astype("<i4")
        if not self.ascii or array.dtype.itemsize == 1:
            self.raw(array.tobytes())
        else:
            digits = {2: 5, 4: 9, 8: 17}[array.dtype.itemsize]
            self.text(f"{v:.{digits}g}" if array.dtype.kind == "f" else str(v) for v in array.tolist())


def serialize(root, **options):
    """Return the bytes of a graph in Torch7's format."""
    writer = Writer(**options)
    writer.write(root)
    return bytes(writer.out)


def tensor(array, cuda=False, strides=None, first=0, shape=None, storage=None):
    """Make a tensor with its own storage, or a view into one; empty arrays become Torch's empty tensor."""
    array = np.ascontiguousarray(array)
    name = ("Cuda" if cuda else "") + NAMES[array.dtype.str[1:]]
    name = f"torch.{'Cuda' if name == 'CudaFloat' else name}"
    if storage is None:
        storage = Elements(f"{name}Storage", array.ravel())
    shape = array.shape * bool(array.size) if shape is None else shape
    if strides is None:
        strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    return Tensor(f"{name}Tensor", storage, first, tuple(shape), tuple(strides), 0)


def module(class_name, *children, version=1, **fields):
    """Make a module with the given fields, and with children if it is a container."""
    table = Table(fields)
    if children:
        table["modules"] = Table(dict(enumerate(children, 1)))
    return LuaObject(class_name, version, table)


def graph(architecture, state, *, released=False):
    """Build a Torch7 graph of these parameters, as plain nn or in the layout of the released file.

    The latter has cudnn's classes and CUDA tensors, views into one storage for all parameters and another for
    all gradients, as after getParameters, and the modules for training behind the heads.
    """
    package = "cudnn" if released else "nn"
    order = [name for name in state if "running" not in name]
    offsets = dict(zip(order, np.cumsum([0, *(state[name].size for name in order)]).tolist(), strict=False))
    flat = np.concatenate([state[name].ravel() for name in order]) if released else None
    storages = [Elements("torch.CudaStorage", values) for values in (flat, flat * 0)] if released else []

    def parameters(row, shapes):
        fields = {}
        for name, shape in shapes.items():
            key = f"{row}.{name}"
            if not released or "running" in name:
                fields[name] = tensor(state[key].reshape(shape), cuda=released)
                continue
            for prefix, storage in zip(("", "grad"), storages, strict=True):
                field = prefix + (name.capitalize() if prefix else name)
                fields[field] = tensor(
                    state[key].reshape(shape), cuda=True, first=offsets[key], storage=storage
                )
        return fields

    children, channels = [], 1

    def convolution(row, out):
        fields = {"nInputPlane": channels, "nOutputPlane": out, "kW": 1, "kH": row.kernel, "dW": 1}
        fields |= {"dH": row.stride, "padW": 0, "padH": row.padding}
        shapes = {"weight": (out, channels, row.kernel, 1), "bias": (out,)}
        return module(f"{package}.SpatialConvolution", **fields, **parameters(row.name, shapes))

    for row in architecture.blocks:
        children.append(convolution(row, row.channels))
        norm = parameters(
            row.norm, dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (row.channels,))
        )
        children.append(module("nn.SpatialBatchNormalization", version=2, eps=1e-5, **norm))
        children.append(module(f"{package}.ReLU", threshold=0, val=0))
        if row.pool:
            children.append(module(f"{package}.SpatialMaxPooling", kW=1, kH=row.pool, dW=1, dH=row.pool))
        channels = row.channels
    heads = [convolution(row, row.categories) for row in architecture.heads]
    if heads:
        children.append(module("nn.ConcatTable", *heads))
    if released:
        children.append(module("nn.ParallelTable", *(module("nn.SplitTable", dimension=3) for _ in heads)))
        children.append(module("nn.FlattenTable"))
        steps = [module("nn.Sequential", module("cudnn.LogSoftMax")) for _ in range(8)]
        children.append(module("nn.ParallelTable", *steps))
    return module("nn.Sequential", *children)


def load_mutable(path):
    """Load a file's graph with all storages in memory, to change and write it again."""
    return pickle.loads(_load_pickled(path))


@functools.cache
def _load_pickled(path):
    """Return a pickle of the graph, which takes a tenth of the time to load again."""
    seen = {}

    def load(value):
        if id(value) in seen:
            return seen[id(value)]
        if isinstance(value, Storage):
            elements = seen[id(value)] = Elements(value.class_name, value.elements(0, value.count))
            return elements
        seen[id(value)] = value
        if isinstance(value, Tensor):
            value.storage = load(value.storage)
        elif isinstance(value, LuaObject):
            load(value.fields)
        elif isinstance(value, dict):
            for name in list(value):
                value[name] = load(value[name])
        return value

    with open_t7(path) as file:
        return pickle.dumps(load(file.root))


def modules_of(root):
    """Return a container's modules, counted from 1: modules_of(net)[22] is Torch7's module 22."""
    return root.fields["modules"]
