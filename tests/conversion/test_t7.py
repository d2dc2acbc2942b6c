"""The reader: all forms give the same numbers, and no false claim of a file is believed."""

import io
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.budget import budget
from support.networks import DEMO, VARIANTS5, VARIANTS8, file
from support.t7_writer import Elements, load_mutable, module, modules_of, serialize, tensor

from soundnet_port.conversion import t7, t7_binary
from soundnet_port.conversion.t7 import open_t7
from soundnet_port.conversion.t7_objects import LuaFunction, LuaObject, T7Error, Table, Tensor

PATHS = [f"n8_d16_{v}.t7" for v in VARIANTS8] + [f"n5_d8_{v}.t7" for v in VARIANTS5]


def parse(data):
    return t7.parse_t7("test.t7", io.BytesIO(data), len(data))


def sequential(*children):
    return module("nn.Sequential", *children)


@pytest.mark.parametrize("name", PATHS)
def test_writing_a_real_file_again_gives_its_bytes(name):
    """So the test writer writes what Torch7 would."""
    data = file(name).read_bytes()
    assert serialize(load_mutable(file(name)), ascii="ascii" in name) == data


@pytest.mark.parametrize("long_bytes", [4, 8])
@pytest.mark.parametrize("ascii", [False, True])
@pytest.mark.parametrize("kind", ["f2", "f4", "f8", "u1", "i1", "i2", "i4", "i8"])
@pytest.mark.parametrize("cuda", [False, True])
def test_every_tensor_type_reads_back(long_bytes, ascii, kind, cuda):
    array = (np.arange(24) * 5 - 30).astype(kind).reshape(2, 3, 4)
    if kind[0] == "f":
        array = np.sqrt(np.abs(array)).astype(kind)
    root = sequential(module("nn.Identity", here=tensor(array, cuda=cuda)))
    data = serialize(root, long_bytes=long_bytes, ascii=ascii)
    back = parse(data).root.fields["modules"][1].fields["here"]
    np.testing.assert_array_equal(back.array(), array)
    assert parse(data).form == ("ascii" if ascii else "binary" + " with 32-bit longs" * (long_bytes == 4))


def test_views_show_their_own_elements():
    base = Elements("torch.FloatStorage", np.arange(100, dtype="f4"))
    values = np.arange(100)
    root = Table(
        transposed=tensor(np.zeros(1, "f4"), storage=base, first=10, shape=(3, 4), strides=(1, 3)),
        every_fifth=tensor(np.zeros(1, "f4"), storage=base, first=4, shape=(20,), strides=(5,)),
        expanded=tensor(np.zeros(1, "f4"), storage=base, first=7, shape=(6, 2), strides=(0, 1)),
        last=tensor(np.zeros(1, "f4"), storage=base, first=99, shape=(1,)),
        one_row=tensor(np.zeros(1, "f4"), storage=base, first=3, shape=(1, 4), strides=(2**62, 1)),
        empty=tensor(np.zeros(0, "f4")),
    )
    for ascii in (False, True):
        read = parse(serialize(root, ascii=ascii)).root
        np.testing.assert_array_equal(read["transposed"].array(), values[10:22].reshape(4, 3).T)
        np.testing.assert_array_equal(read["every_fifth"].array(), values[4::5])
        np.testing.assert_array_equal(read["expanded"].array(), np.tile([7, 8], (6, 1)))
        np.testing.assert_array_equal(read["last"].array(), [99])
        np.testing.assert_array_equal(read["one_row"].array(), [values[3:7]])
        assert read["empty"].array().size == 0
        assert read["last"].storage is read["transposed"].storage


def test_the_ascii_form_is_exact_in_long_storages_and_for_all_floats():
    bits = np.random.default_rng(3).integers(0, 2**32, 300_000, dtype=np.uint64).astype(np.uint32)
    values = bits.view(np.float32)
    special = np.array([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45], np.float32)
    values = np.concatenate([special, values[np.isfinite(values)]])
    read = parse(serialize(tensor(values), ascii=True)).root
    np.testing.assert_array_equal(read.array(), values)
    part = Tensor("torch.FloatTensor", read.storage, 150_000, (7, 11), (13, 1000), 0)
    expected = np.lib.stride_tricks.as_strided(values[150_000:], (7, 11), (52, 4000))
    np.testing.assert_array_equal(part.array(), expected)


def test_ascii_numbers_have_an_end():
    """For a number of 400,000 digits NumPy would give every number as much memory."""
    text = serialize(tensor(np.arange(9, dtype="f4")), ascii=True).replace(b"5", b"5." + b"0" * 400_000)
    with pytest.raises(T7Error, match="among the elements"):
        parse(text).root.array()


def test_pipes_and_devices_are_refused():
    with pytest.raises(T7Error, match="pipe or device"), open_t7("/dev/zero"):
        pass


def test_old_files_without_class_versions_are_read():
    root = sequential(module("nn.ReLU", threshold=0))
    assert parse(serialize(root, versions=False)).root.version == 0


def test_functions_are_skipped_and_noted():
    root = Table({"callback": LuaFunction(0, 40), "after": 7})
    read = parse(serialize(root))
    assert read.root["after"] == 7
    assert len(read.notes) == 1
    assert "Lua function (40 bytes of bytecode)" in read.notes[0]
    old = (
        struct.pack("<iii", 3, 1, 1) + serialize("f") + struct.pack("<ii", 6, 2) + b"xx" + serialize(Table())
    )
    assert isinstance(parse(old).root["f"], LuaFunction)  # tag 6 has no index


def test_tds_containers_and_data_parallel_tables_are_read():
    hashed = struct.pack("<ii", 4, 1) + struct.pack("<i", 3) + b"V 1" + struct.pack("<i", 8) + b"tds.Hash"
    read = parse(hashed + struct.pack("<ii", 1, 0) + serialize("k") + serialize(5.0))
    assert read.root == read.root
    assert dict(read.root) == {"k": 5}
    parallel = module("nn.DataParallelTable", module("nn.ReLU"), version=3)
    assert parse(serialize(parallel)).root.fields["modules"][1].class_name == "nn.ReLU"


def test_cycles_between_modules_are_kept_and_those_through_tensors_refused():
    loop = sequential()
    loop.fields["parent"] = loop
    read = parse(serialize(loop)).root
    assert read.fields["parent"] is read
    bad = tensor(np.zeros(3, "f4"))
    bad.storage = bad
    with pytest.raises(T7Error, match="inside itself"):
        parse(serialize(bad))


def test_bytes_after_the_object_are_noted():
    assert parse(serialize(Table()) + b"xyz").notes == ["3 bytes follow the object, not read"]


def hostile_files():
    """Return {name: (bytes, part of the message)} of files with false claims."""
    floats = np.arange(8, dtype="f4")

    def view(**wrong):
        options = {"storage": Elements("torch.FloatStorage", floats), "shape": (8,)} | wrong
        return serialize(tensor(floats[:1], **options))

    deep = Table()
    for _ in range(10_000):
        deep = Table({1: deep})
    net = serialize(sequential(module("nn.ReLU")))
    deep_bytes = b"".join(struct.pack("<iiiid", 3, i, 1, 1, 1.0) for i in range(1, 10_001)) + b"\0" * 4
    ints = struct.pack
    return {
        "empty file": (b"", "empty file"),
        "text": (b"hello world, this is text", "type tag"),
        "big-endian": (ints(">iii", 4, 1, 3) + b"V 1", "big-endian"),
        "unknown tag": (ints("<i", 5) + b"\x09\0\0\0", "boolean 9"),
        "tag 9": (ints("<iiii", 3, 1, 1, 9), "type tag 9"),
        "negative count": (ints("<iii", 3, 1, -5), "found -5"),
        "huge table": (ints("<iii", 3, 1, 2**31 - 1), "0 bytes"),
        "huge string": (ints("<ii", 2, 2**31 - 1) + b"abc", "bytes of a string"),
        "nil key": (ints("<iii", 3, 1, 1) + ints("<ii", 0, 0), "nil"),
        "nan key": (ints("<iii", 3, 1, 1) + serialize(float("nan")) + ints("<i", 0), "NaN"),
        "key twice": (ints("<iii", 3, 1, 2) + (serialize("a") + serialize(1)) * 2, "new key"),
        "object without fields": (ints("<ii", 4, 1) + net[8:8 + 7 + 17] + ints("<i", 0), "without a table"),
        "class name": (ints("<iii", 4, 1, 3) + b"V 1" + ints("<i", 4) + b"a\nb\0", "class name"),
        "reference to another kind": (
            ints("<iii", 3, 1, 1) + serialize("x") + ints("<iii", 8, 1, 0), "same kind"
        ),
        "nested 10,000 deep": (deep_bytes, "deep"),
        "storage one short": (view(storage=Elements("torch.FloatStorage", floats[:7])), "at least 8"),
        "storage beyond the file": (
            view(storage=Elements("torch.FloatStorage", floats, count=9)), "9 elements"
        ),
        "storage of 2^62": (view(storage=Elements("torch.FloatStorage", floats, 2**62)), "elements of a"),
        "storage of -1": (view(storage=Elements("torch.FloatStorage", floats, -1)), "-1 elements"),
        "offset past the end": (view(first=1), "offset 2"),
        "offset 0": (view(first=-1), "offset 0"),
        "offset of 2^62": (view(first=2**62), "elements"),
        "stride -1": (view(strides=(-1,), first=7), "strides"),
        "stride 2^62": (view(strides=(2**62,)), "elements"),
        "size 2^62": (view(shape=(2**62,), strides=(1,)), "elements"),
        "size -8": (view(shape=(-8,), strides=(1,)), "sizes"),
        "size 0": (view(shape=(0, 3), strides=(3, 1)), "sizes from 1"),
        "dimensions": (view(shape=(1,) * 33, strides=(1,) * 33), "33 dimensions"),
        "other storage": (view(storage=Elements("torch.DoubleStorage", floats.astype("f8"))), "Storage"),
        "table for a storage": (view(storage=Table()), "FloatTensor on a Table"),
        "no storage": (serialize(_without_storage()), "storage of 0"),
        "pickle": (b"\x80\x02}q\0.", "type tag"),
    }  # fmt: skip


def _without_storage():
    bare = tensor(np.zeros(3, "f4"))
    bare.storage = None
    return bare


@pytest.mark.parametrize("name", hostile_files())
def test_hostile_files_are_refused(name):
    data, message = hostile_files()[name]
    with pytest.raises(T7Error) as error:
        parse(data)
    assert message in str(error.value)
    assert str(error.value).startswith(f"byte {error.value.offset:,}: found {error.value.found}, exp")


def test_hostile_files_take_no_memory(monkeypatch):
    """About twice the file at most, plus 400 bytes for each of MAX_VALUES values; here for fewer values."""
    monkeypatch.setattr(t7_binary, "MAX_VALUES", 20_000)
    pairs = 30_000
    tables = struct.pack("<iii", 3, 1, pairs) + b"".join(
        struct.pack("<idi", 1, float(i), 0) for i in range(pairs)
    )
    nested = serialize(Table({i: Table({1: i}) for i in range(6_000)}))
    expanded = serialize(tensor(np.zeros(4, "f4"), shape=(2**40, 4), strides=(0, 1)))
    ascii_zeros = serialize(tensor(np.zeros(40_000)), ascii=True)
    for data in (tables, nested, expanded, ascii_zeros, *(data for data, _ in hostile_files().values())):
        tracemalloc.start()
        try:
            read = parse(data)
            if isinstance(read.root, Tensor):
                read.root.array()
        except T7Error:
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        limit = 2 * len(data) + 400 * t7_binary.MAX_VALUES
        if data is ascii_zeros:
            limit += 8 * 40_000  # the array that was asked for
        assert peak < limit


def test_an_expanded_view_is_refused_when_it_is_loaded():
    read = parse(serialize(tensor(np.zeros(4, "f4"), shape=(2**40, 4), strides=(0, 1))))
    with pytest.raises(T7Error, match="a view of"):
        read.root.array()


def test_every_truncation_is_refused():
    """A prefix of a file is never taken for the file, in any of its forms."""
    root = sequential(
        module("nn.ReLU", a=tensor(np.arange(6, dtype="f4")), t=True, s="text", n=1.5, f=LuaFunction(0, 3))
    )
    for form in ({}, {"long_bytes": 4}, {"ascii": True}, {"versions": False}):
        data = serialize(root, **form)
        parse(data)
        for end in range(len(data)):
            with pytest.raises(T7Error):
                parse(data[:end])


class TimeLimit:
    """Fail if a read takes too long."""

    def __enter__(self):
        self.start = time.perf_counter()

    def __exit__(self, *_):
        assert time.perf_counter() - self.start < 5


def load_everything(read):
    """Load the values of all tensors that a caller can reach."""
    stack, seen, count = [read.root], set(), 0
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            count += value.array().size
        elif isinstance(value, LuaObject):
            stack.append(value.fields)
        elif isinstance(value, dict):
            stack += [*value, *value.values()]
    return count


small = load_mutable(DEMO)
for number in list(modules_of(small))[4:]:
    del modules_of(small)[number]
FORMS = [serialize(small, **form) for form in ({}, {"long_bytes": 4}, {"ascii": True}, {"versions": False})]


@st.composite
def damaged(draw):
    """Draw a real file with a few bytes overwritten, cut out or inserted."""
    data = bytearray(draw(st.sampled_from(FORMS)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data) - 1))
        patch = draw(
            st.one_of(
                st.binary(max_size=8),
                st.sampled_from([-1, 0, 1, 2, 3, 4, 8, 2**31 - 1]).map(lambda i: struct.pack("<i", i)),
                st.sampled_from([-1, 0, 2**62, -(2**63)]).map(lambda i: struct.pack("<q", i)),
            )
        )
        data[at : at + draw(st.sampled_from([0, 1, len(patch), len(patch)]))] = patch
    return bytes(data)


@settings(max_examples=budget(2_000), deadline=None)
@given(damaged())
def test_damaged_files_raise_nothing_but_our_error(data):
    with TimeLimit():
        try:
            load_everything(parse(data))
        except T7Error as error:
            assert "\n" not in str(error)


@settings(max_examples=budget(500), deadline=None)
@given(st.binary(max_size=200), st.sampled_from([b"", b"\4\0\0\0", b"\3\0\0\0\1\0\0\0", b"4\n1\n3\nV 1\n"]))
def test_noise_raises_nothing_but_our_error(noise, start):
    with TimeLimit():
        try:
            load_everything(parse(start + noise))
        except T7Error:
            pass


# ---- zips

TINY = serialize(sequential(module("nn.ReLU", a=tensor(np.arange(6, dtype="f4")))))


def make_zip(path, members, **options):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data, **options)
    return path


def test_a_zip_is_read_without_unpacking(tmp_path):
    data = DEMO.read_bytes()
    path = make_zip(
        tmp_path / "models.zip",
        {"m/soundnet8_final.t7": data, "m/readme.txt": b"hi", "__MACOSX/m/._soundnet8_final.t7": b"junk"},
    )
    assert t7.members(path) == ["m/soundnet8_final.t7"]
    with open_t7(path, "m/soundnet8_final.t7") as read:
        assert read.name.endswith("models.zip/m/soundnet8_final.t7")
        assert len(modules_of(read.root)) == 28
    assert [p.name for p in tmp_path.iterdir()] == ["models.zip"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.txt": b"x"}, "a.txt"),
        ({"bomb.t7": b"\0" * 200_000_000}, "times its packed size"),
        ({f"{i}.t7": b"x" for i in range(17)}, "at most 16"),
    ],
)
def test_zips_that_are_not_ours_are_refused(tmp_path, members, message):
    path = make_zip(tmp_path / "a.zip", members)
    with pytest.raises(T7Error, match=message):
        for member in t7.members(path):
            with open_t7(path, member):
                pass


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_packing_methods_with_memory_of_their_own_are_refused(tmp_path, method):
    path = make_zip(tmp_path / "a.zip", {"a.t7": DEMO.read_bytes()}, compress_type=method)
    with pytest.raises(T7Error, match="packing method"), open_t7(path, "a.t7"):
        pass


@settings(max_examples=budget(300), deadline=None)
@given(st.data())
def test_damaged_zips_raise_nothing_but_our_error(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    packed = bytearray(make_zip(folder / "good.zip", {"a.t7": TINY, "b.t7": TINY * 2}).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(
            st.one_of(st.integers(0, len(packed) - 1), st.integers(len(packed) - 150, len(packed) - 1))
        )
        packed[at : at + 1] = data.draw(st.binary(max_size=4))
    path = folder / "bad.zip"
    path.write_bytes(packed)
    try:
        for member in t7.members(path):
            with open_t7(path, member) as read:
                load_everything(read)
    except T7Error as error:
        assert "\n" not in str(error)
