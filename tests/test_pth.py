"""Checkpoints of PyTorch: both formats as torch writes them, and files that were made to do harm.

The files are written here opcode by opcode, as torch is not needed; where it is there, its own are read too.
"""

import builtins
import io
import os
import struct
import sys
import zipfile
import zlib
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
from calls import python
from hypothesis import given
from hypothesis import strategies as st

from dcn_np.pth import read_pth, state_dict_of

MAGIC = 0x1950A86A20F9469CFC6C

STORAGES = {
    "float64": "Double",
    "float32": "Float",
    "float16": "Half",
    "int64": "Long",
    "int32": "Int",
    "int16": "Short",
    "int8": "Char",
    "uint8": "Byte",
    "bool": "Bool",
    "bfloat16": "BFloat16",
}

# ---- writing pickles


class Opcodes(bytes):
    """Opcodes as they are, that leave one value."""


def name(text):
    module, attribute = text.rsplit(" ", 1)
    return Opcodes(b"c" + module.encode() + b"\n" + attribute.encode() + b"\n")


def call(function, *arguments):
    return Opcodes(encoded(name(function)) + encoded(tuple(arguments)) + b"R")


def ordered(entries, state=None):
    built = b"" if state is None else encoded(state) + b"b"
    return Opcodes(encoded(call("collections OrderedDict")) + items(entries) + built)


def items(entries):
    return b"(" + b"".join(encoded(key) + encoded(value) for key, value in entries.items()) + b"u"


def integer(value):
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def encoded(value):
    """Return the opcodes that leave this value on the stack."""
    match value:
        case Opcodes():
            return bytes(value)
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return integer(value)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return text(value)
        case tuple():
            return b"(" + b"".join(map(encoded, value)) + b"t"
        case list():
            return b"](" + b"".join(map(encoded, value)) + b"e"
        case dict():
            return b"}" + items(value)
    raise TypeError(type(value))


def pickled(value):
    return b"\x80\x02" + encoded(value) + b"."


# ---- writing checkpoints


def storage(key="0", entries=6, kind="Float", legacy=False):
    kind = name(f"torch {kind}Storage")
    reference = ("storage", kind, key, "cuda:0", entries) + ((None,) if legacy else ())
    return Opcodes(encoded(reference) + b"Q")


def tensor(offset=0, shape=(2, 3), strides=(3, 1), of=None, **kind):
    of = storage(**kind) if of is None else of
    return call("torch._utils _rebuild_tensor_v2", of, offset, shape, strides, False, ordered({}))


def zipped(program, storages, prefix="archive", order=b"little", compression=zipfile.ZIP_STORED):
    """Write the format since torch 1.6; `storages` maps keys to bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr(f"{prefix}/data.pkl", program)
        if order is not None:
            archive.writestr(f"{prefix}/byteorder", order)
        for key, data in storages.items():
            archive.writestr(f"{prefix}/data/{key}", data)
        archive.writestr(f"{prefix}/version", b"3\n")
    return file.getvalue()


def legacy(program, storages, magic=MAGIC, version=1001, little=True, keys=None):
    """Write the format before torch 1.6; `storages` maps keys to (number of entries, bytes)."""
    system = {"protocol_version": 1001, "little_endian": little, "type_sizes": {"short": 2}}
    start = pickled(magic) + pickled(version) + pickled(system) + program
    rest = pickled(list(storages) if keys is None else keys)
    return start + rest + b"".join(struct.pack("<q", n) + data for n, data in storages.values())


def read(data):
    return read_pth(io.BytesIO(data))


VALUES = np.arange(6, dtype=np.float32)


def one_tensor(form, **options):
    """Return a checkpoint {"weight": tensor} of either format, whose storage is VALUES."""
    value = {"weight": tensor(**options, legacy=form == "legacy")}
    return checkpoint(form, pickled(value))


def checkpoint(form, program):
    if form == "legacy":
        return legacy(program, {"0": (6, VALUES.tobytes())})
    return zipped(program, {"0": VALUES.tobytes()})


both_forms = pytest.mark.parametrize("form", ["zip", "legacy"])

# ---- what torch writes


@both_forms
def test_a_tensor(form):
    weight = read(one_tensor(form))["weight"]
    assert weight.dtype == np.float32
    assert weight.dtype.isnative
    assert np.array_equal(weight, VALUES.reshape(2, 3))


@both_forms
@pytest.mark.parametrize("dtype", STORAGES)
def test_dtypes(form, dtype):
    kept = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    values = np.array([0, 1, 1, 0, 1, 0] if dtype == "bool" else [0, 1, 2, 100, 5, 6]).astype(kept)
    value = pickled(tensor(kind=STORAGES[dtype], legacy=form == "legacy"))
    data = values.tobytes()
    got = read(legacy(value, {"0": (6, data)}) if form == "legacy" else zipped(value, {"0": data}))
    assert got.dtype == kept
    assert np.array_equal(got, values.reshape(2, 3))


@both_forms
def test_bfloat16_becomes_float32_without_ml_dtypes(form, monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    values = np.array([1.0, -2.5, 0.0, np.inf, 3.140625, 1e30], np.float32)
    values = (values.view(np.uint32) >> 16 << 16).view(np.float32)
    data = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    value = pickled(tensor(kind="BFloat16", legacy=form == "legacy"))
    got = read(legacy(value, {"0": (6, data)}) if form == "legacy" else zipped(value, {"0": data}))
    assert got.dtype == np.float32
    assert np.array_equal(got, values.reshape(2, 3))


@both_forms
@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (3, 2), (1, 3)),
        (1, (2, 2), (3, 1)),
        (5, (), ()),
        (0, (0, 4), (4, 1)),
        (2, (4,), (0,)),
        (0, (6,), (1,)),
    ],
    ids=["transposed", "offset", "scalar", "empty", "expanded", "flat"],
)
def test_views(form, offset, shape, strides):
    got = read(one_tensor(form, offset=offset, shape=shape, strides=strides))["weight"]
    wanted = np.lib.stride_tricks.as_strided(VALUES[offset:], shape, [4 * step for step in strides])
    assert got.shape == shape
    assert np.array_equal(got, wanted)


@both_forms
def test_shared_storages_stay_shared(form):
    old = form == "legacy"
    program = pickled([tensor(legacy=old), tensor(offset=3, shape=(3,), strides=(1,), legacy=old)])
    first, second = read(checkpoint(form, program))
    second[0] = 70
    assert first[1, 0] == 70


@both_forms
def test_a_nested_checkpoint(form):
    old = form == "legacy"
    parameter = call("torch._utils _rebuild_parameter", tensor(legacy=old), True, ordered({}))
    attributes = {"_metadata": ordered({"": {"version": 2}})}
    value = {
        "state_dict": ordered({"module.weight": parameter, "module.bias": tensor(legacy=old)}, attributes),
        "epoch": 3,
        "meta": {"lr": [0.1, None, True], 7: (-1, "größe"), "size": call("torch Size", (2, 3))},
    }
    got = read(checkpoint(form, pickled(value)))
    assert got["epoch"] == 3
    assert got["meta"] == {"lr": [0.1, None, True], 7: (-1, "größe"), "size": (2, 3)}
    assert type(got["state_dict"]) is dict
    assert list(got["state_dict"]) == ["module.weight", "module.bias"]
    assert list(state_dict_of(got)) == ["weight", "bias"]


def test_memo_and_newer_opcodes():
    memo = b"]\x94X\x01\x00\x00\x00aq\x07ah\x07ar\x00\x01\x00\x00j\x00\x01\x00\x00\x86"
    assert read(zipped(b"\x80\x04" + memo + b".", {})) == (["a", "a"], ["a", "a"])
    value = text("collections") + text("OrderedDict") + b"\x93)R"
    assert read(zipped(b"\x80\x04" + value + b".", {})) == {}


def test_an_ordered_dict_of_python_2():
    pairs = [["a", 1], ["b", tensor(legacy=True)]]
    got = read(checkpoint("legacy", pickled(call("collections OrderedDict", pairs))))
    assert list(got) == ["a", "b"]


def test_tensors_of_the_oldest_form():
    rebuilt = call("torch._utils _rebuild_tensor", storage(legacy=True), 0, (6,), (1,))
    assert np.array_equal(read(checkpoint("legacy", pickled(rebuilt))), VALUES)


def test_a_view_of_a_storage():
    reference = ("storage", name("torch FloatStorage"), "0", "cpu", 6, ("1", 2, 3))
    part = Opcodes(encoded(reference) + b"Q")
    got = read(checkpoint("legacy", pickled(tensor(of=part, shape=(3,), strides=(1,)))))
    assert np.array_equal(got, VALUES[2:5])


@pytest.mark.parametrize("kind", ["Float", "BFloat16", "Long", "Byte"])
def test_big_endian_values_come_in_the_order_of_this_machine(kind):
    dtype = {"Float": ">f4", "BFloat16": ">u2", "Long": ">i8", "Byte": "u1"}[kind]
    data = np.arange(6).astype(dtype)
    got = read(zipped(pickled(tensor(kind=kind)), {"0": data.tobytes()}, order=b"big"))
    assert got.dtype.isnative
    assert np.array_equal(got.view(np.dtype(dtype).newbyteorder("=")).ravel(), data)


def test_without_a_byte_order_it_is_little():
    got = read(zipped(pickled(tensor()), {"0": VALUES.astype("<f4").tobytes()}, order=None))
    assert np.array_equal(got.ravel(), VALUES)


@both_forms
def test_paths_and_open_files(form, tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(one_tensor(form))
    with path.open("rb") as file:
        file.seek(5)
        contents = [read_pth(path), read_pth(str(path)), read_pth(file)]
        assert not file.closed
    assert all(np.array_equal(each["weight"], VALUES.reshape(2, 3)) for each in contents)


def test_arguments_that_are_no_files(tmp_path):
    with pytest.raises(TypeError, match="wanted a path or a binary file"):
        read_pth(3)
    with pytest.raises(TypeError, match="wanted a path or a binary file"):
        read_pth(io.StringIO("text"))
    with pytest.raises(FileNotFoundError):
        read_pth(tmp_path / "none.pth")


# ---- state dicts


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict", "module"])
def test_the_state_dict_is_found(wrapper):
    state = {"a.weight": VALUES, "steps": 3}
    assert state_dict_of({"epoch": 1, wrapper: state}) == {"a.weight": VALUES}
    assert state_dict_of(state) == {"a.weight": VALUES}


def test_a_prefix_goes_only_if_all_have_it():
    assert list(state_dict_of({"module.a": VALUES, "module.b": VALUES})) == ["a", "b"]
    assert list(state_dict_of({"module.a": VALUES, "b": VALUES})) == ["module.a", "b"]


@pytest.mark.parametrize("contents", [{}, {"epoch": 3}, {"lr": VALUES, "net": {"a": VALUES}}, {3: VALUES}])
def test_no_state_dict(contents):
    with pytest.raises(ValueError, match="is no state dict: wanted arrays by name"):
        state_dict_of(contents)
    with pytest.raises(TypeError, match="wanted a dictionary"):
        state_dict_of([contents])


# ---- files that are damaged


@both_forms
def test_truncated(form):
    data = one_tensor(form)
    for size in range(len(data)):
        with pytest.raises(ValueError, match="no checkpoint that can be read"):
            read(data[:size])


@both_forms
@given(st.data())
def test_damaged_bytes_give_a_value_or_an_error(form, data):
    file = bytearray(NESTED[form])
    for _ in range(data.draw(st.integers(1, 4))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    with suppress(ValueError):
        read(bytes(file))


NESTED = {
    form: checkpoint(
        form, pickled({"a": [tensor(legacy=form == "legacy"), (1, 2.0)], "b": ordered({"x": True})})
    )
    for form in ("zip", "legacy")
}


@given(st.binary(max_size=60))
def test_any_pickle_gives_a_value_or_an_error(program):
    with suppress(ValueError):
        read(zipped(b"\x80\x02" + program, {}))


OPCODES = [
    *[bytes([code]) for code in b"(tl)]}{de0sub\x81\x82\x85\x86\x87\x88Q\x93\x94RNa1234."],
    *[
        b"q\x00",
        b"h\x00",
        b"K\x02",
        text("storage"),
        text("0"),
        name("torch FloatStorage"),
        name("torch Size"),
    ],
    *[name("collections OrderedDict"), storage(), tensor(), name("torch._utils _rebuild_tensor_v2")],
]


@given(st.lists(st.sampled_from(OPCODES), max_size=12))
def test_any_opcodes_give_a_value_or_an_error(opcodes):
    with suppress(ValueError):
        read(checkpoint("zip", b"\x80\x02" + b"".join(map(bytes, opcodes)) + b"."))


@pytest.mark.parametrize("start", [b"", b"<html>", b"version https://git-lfs", b"\x89HDF\r\n"])
def test_other_files(start):
    with pytest.raises(ValueError, match="it begins with"):
        read(start)


def test_a_pickle_of_something_else():
    with pytest.raises(ValueError, match="does not begin with the magic number"):
        read(pickled(1) * 3)
    with pytest.raises(ValueError, match="the version"):
        read(legacy(pickled({}), {}, version=1002))
    with pytest.raises(ValueError, match="big-endian"):
        read(legacy(pickled({}), {}, little=False))


def test_other_archives():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("word/document.xml", "")
    with pytest.raises(ValueError, match=r"0 entries <name>/data\.pkl; wanted 1"):
        read(file.getvalue())
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("a/data.pkl", pickled({}))
        archive.writestr("a/constants.pkl", pickled(()))
    with pytest.raises(ValueError, match="TorchScript"):
        read(file.getvalue())
    with pytest.raises(ValueError, match="wanted b'little' or b'big'"):
        read(zipped(pickled(tensor()), {"0": VALUES.tobytes()}, order=b"middle"))


# ---- sizes that are not so


@pytest.mark.parametrize("data", [b"", bytes(20), bytes(28)])
def test_an_entry_must_have_the_size_of_its_storage(data):
    with pytest.raises(ValueError, match=f"'archive/data/0' has {len(data)} bytes; its storage needs 24"):
        read(zipped(pickled(tensor()), {"0": data}))
    with pytest.raises(ValueError, match="'archive/data/1'"):
        read(zipped(pickled(tensor(key="1")), {"0": data}))


def test_legacy_storages_must_be_those_of_the_tensors():
    program = pickled(tensor(legacy=True))
    data = VALUES.tobytes()
    for entries in (5, 7, -1, 2**62):
        with pytest.raises(ValueError, match="its tensors need 6"):
            read(legacy(program, {"0": (entries, data)}))
    for keys in ([], ["1"], ["0", "0"], [0], "0", [[]]):
        with pytest.raises(ValueError, match=r"its tensors use|wanted a list of strings"):
            read(legacy(program, {"0": (6, data)}, keys=keys))
    with pytest.raises(ValueError, match="cut off: 4 bytes"):
        read(legacy(program, {"0": (6, data[:-4])}))


@both_forms
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offset": 1}, "reaches entry 6 of a storage of 6: offset 1, shape \\(2, 3\\), strides \\(3, 1\\)"),
        ({"offset": -1}, "offset is -1 .*wanted an integer from 0"),
        ({"offset": 2**70}, "reaches entry"),
        ({"shape": (-2, 3)}, "shape is -2"),
        ({"strides": (3, -1)}, "strides is -1"),
        ({"strides": (3, 2)}, "reaches entry 7"),
        ({"strides": (3,)}, "2 axes and 1 stride"),
        ({"shape": (2, 3.0)}, "shape is 3.0"),
        ({"shape": (2, True)}, "shape is True"),
        ({"shape": 6}, "shape is 6"),
        ({"shape": (1,) * 65, "strides": (1,) * 65}, "wanted a tuple of up to 64"),
        ({"shape": (10**9, 10**9), "strides": (0, 0)}, "more bytes than the file has"),
        ({"shape": (0, 2**62, 2**62), "strides": (1, 1, 1)}, "no checkpoint"),
        ({"entries": 5}, "reaches entry 5|bytes; its storage needs|its tensors need"),
        ({"entries": -6}, "size of storage '0' is -6"),
        ({"entries": 2**40}, "needs 1099511627776\\*4 = 4398046511104 bytes; the file has"),
        ({"entries": 2**2000}, "an integer of 2001 bits"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_views_outside_of_the_storage(form, options, message):
    with pytest.raises(ValueError, match=message):
        read(one_tensor(form, **options))


def test_one_storage_cannot_be_two_things():
    for other in (tensor(kind="Int"), tensor(entries=7)):
        with pytest.raises(ValueError, match="storage '0' is 6 of 'torch FloatStorage' and"):
            read(checkpoint("zip", pickled([tensor(), other])))


def test_a_view_of_a_storage_stays_inside():
    reference = ("storage", name("torch FloatStorage"), "0", "cpu", 6, ("1", 4, 3))
    with pytest.raises(ValueError, match="entries 4 to 7 are wanted of a storage of 6"):
        read(checkpoint("legacy", pickled(Opcodes(encoded(reference) + b"Q"))))


def test_bools_are_bools():
    with pytest.raises(ValueError, match="neither 0 nor 1"):
        read(zipped(pickled(tensor(kind="Bool")), {"0": b"\0\1\2\0\0\0"}))


def test_a_compressed_entry_is_refused():
    zeros = {"0": bytes(4 * 10**7)}
    data = zipped(pickled(tensor(entries=10**7)), zeros, compression=zipfile.ZIP_DEFLATED)
    assert len(data) < 100_000
    with pytest.raises(ValueError, match="is compressed"):
        read(data)


def overlapping(size=1000, copies=50):
    """Write an archive of whose entries `copies` share one run of bytes, by their names in the directory."""
    storages = {str(key).zfill(3): b"" for key in range(copies)} | {"100": bytes(size)}
    program = pickled([storage(key=key, entries=size // 4) for key in storages])
    data = bytearray(zipped(program, storages))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        real = archive.getinfo("archive/data/100")
        crc = zlib.crc32(bytes(size))
    at = data.index(b"PK\1\2")
    while data[at : at + 4] == b"PK\1\2":
        lengths = struct.unpack_from("<HHH", data, at + 28)
        entry = bytes(data[at + 46 : at + 46 + lengths[0]])
        if entry.startswith(b"archive/data/"):
            struct.pack_into("<III", data, at + 16, crc, size, size)
            struct.pack_into("<I", data, at + 42, real.header_offset)
        at += 46 + sum(lengths)
    return bytes(data)


def test_entries_that_share_their_bytes_are_refused():
    with pytest.raises(ValueError, match="no checkpoint that can be read"):
        read(overlapping())


def test_storages_are_together_no_larger_than_the_file():
    program = pickled([storage(key=str(key), entries=200, legacy=True) for key in range(5)])
    with pytest.raises(ValueError, match="of which other storages leave"):
        read(legacy(program, {"0": (200, bytes(800))}))


def test_an_encrypted_entry_is_refused():
    data = bytearray(one_tensor("zip"))
    data[data.index(b"PK\1\2") + 8] |= 1
    with pytest.raises(ValueError, match="encrypted"):
        read(bytes(data))


# ---- pickles that call


NAMES = [
    *[
        "os system",
        "posix system",
        "builtins eval",
        "builtins exec",
        "__builtin__ getattr",
        "subprocess Popen",
    ],
    *[
        "numpy.core.multiarray _reconstruct",
        "numpy.core.multiarray scalar",
        "numpy dtype",
        "copyreg _reconstructor",
    ],
    *[
        "torch load",
        "torch.serialization load",
        "torch.hub load",
        "torch._utils _rebuild_sparse_tensor",
        "torch float32",
    ],
    *[
        "torch.nn.modules.conv Conv2d",
        "collections OrderedDict.update",
        "torch FloatStorage.from_file",
        "torch  Size",
    ],
]


@pytest.fixture
def nothing_runs(monkeypatch):
    """Fail the test if a forbidden function is called, or a module imported."""

    def forbidden(*arguments, **options):
        raise AssertionError(f"called with {arguments}")

    for owner, attribute in [(os, "system"), (builtins, "eval"), (builtins, "exec")]:
        monkeypatch.setattr(owner, attribute, forbidden)


@both_forms
@pytest.mark.parametrize("refused", NAMES)
@pytest.mark.usefixtures("nothing_runs")
def test_other_names_are_refused(form, refused):
    module, attribute = refused.rsplit(" ", 1)
    stacked = Opcodes(text(module) + text(attribute) + b"\x93")
    for program in (call(refused, "x"), name(refused), Opcodes(encoded(stacked) + encoded(("x",)) + b"R")):
        with pytest.raises(ValueError, match=f"names '{refused}', which is refused"):
            read(checkpoint(form, pickled({"weight": program})))


SYSTEM = b"cos\nsystem\n"
REFUSED_OPCODES = {
    "STRING": b"S'text'\n",
    "OBJ": b"(ccollections\nOrderedDict\no",
    "NEWOBJ": b"ccollections\nOrderedDict\n)\x81",
    "NEWOBJ_EX": b"ccollections\nOrderedDict\n)}\x92",
    "EXT1": b"\x82\x01",
    "EXT2": b"\x83\x01\x00",
    "EXT4": b"\x84\x01\x00\x00\x00",
    "PERSID": b"Pstorage\n",
    "DUP": b"]2\x86",
    "POP": b"NN0",
    "POP_MARK": b"N(N1",
    "EMPTY_SET": b"\x8f",
    "FROZENSET": b"(\x91",
    "BYTEARRAY8": b"\x96" + bytes(8),
    "NEXT_BUFFER": b"\x97",
}


@both_forms
@pytest.mark.parametrize("opcode", REFUSED_OPCODES)
@pytest.mark.usefixtures("nothing_runs")
def test_other_opcodes_are_refused(form, opcode):
    with pytest.raises(ValueError, match=f"has the opcode {opcode}"):
        read(checkpoint(form, b"\x80\x05" + REFUSED_OPCODES[opcode] + b"."))


@pytest.mark.usefixtures("nothing_runs")
def test_an_instance_is_refused_by_name():
    for refused in ("os system", "collections OrderedDict"):
        program = b"(X\1\0\0\0xi" + refused.replace(" ", "\n").encode() + b"\n"
        with pytest.raises(ValueError, match=f"names '{refused}' in the opcode INST"):
            read(checkpoint("zip", b"\x80\x02" + program + b"."))


@pytest.mark.parametrize("form", ["first", "second", "third", "keys"])
def test_each_pickle_of_the_old_format_is_restricted(form):
    harm = b"\x80\x02" + SYSTEM + b"X\1\0\0\0x\x85R."
    before = {"first": 0, "second": 1, "third": 2}.get(form)
    good = [pickled(MAGIC), pickled(1001), pickled({"little_endian": True})]
    data = b"".join(good[:before]) + harm if before is not None else b"".join(good) + pickled({}) + harm
    with pytest.raises(ValueError, match="'os system', which is refused"):
        read(data)


BROKEN = {
    "a call of no name": b"X\1\0\0\0xN\x85R",
    "a call of a storage class": b"ctorch\nFloatStorage\nK\1\x85R",
    "arguments that are no tuple": b"ccollections\nOrderedDict\n]R",
    "a number of arguments": b"ctorch\nSize\n)R",
    "a stacked name of numbers": b"K\1K\2\x93",
    "build of a list": b"]}b",
    "build of a tensor": bytes(tensor()) + b"}b",
    "append to a tuple": b")Na",
    "append to a dictionary": b"}Na",
    "items of a list": b"](NNu",
    "an odd number of items": b"}(Nu",
    "an unhashable key": b"}]Ns",
    "a tuple as key": b"}N\x85Ns",
    "a huge integer as key": b"}\x8a\x10" + b"\x11" * 16 + b"Ns",
    "the same key twice": b"}(K\1NK\1Nu",
    "equal keys": b"}(K\1N\x88Nu",
    "no value": b"",
    "too many values": b"NN",
    "a mark left": b"(N",
    "no mark": b"Nt",
    "a value below the mark": b"N(\x85",
    "an empty memo": b"h\0",
    "a memo of nothing": b"q\0",
    "a persistent string": b"X\7\0\0\0storageQ",
    "a persistent module": encoded(("module", "a", "b", "c", "d")) + b"Q",
    "a storage of no class": encoded(("storage", "torch FloatStorage", "0", "cpu", 6)) + b"Q",
    "a storage of another class": encoded(("storage", name("torch Size"), "0", "cpu", 6)) + b"Q",
    "a storage with a path": encoded(("storage", name("torch FloatStorage"), 3, "cpu", 6)) + b"Q",
    "a storage of an array": bytes(storage()) + b"\x85" * 1 + b"Q",
    "a tensor of nothing": bytes(tensor(of=Opcodes(b"N"))),
    "a tensor of a tensor": bytes(tensor(of=tensor())),
    "a lazy sign": encoded(
        call("torch._utils _rebuild_tensor_v2", storage(), 0, (6,), (1,), False, {}, {"neg": True})
    ),
    "an ordered dictionary of numbers": encoded(call("collections OrderedDict", [1, 2])),
    "an ordered dictionary of a number": encoded(call("collections OrderedDict", 1)),
    "bytes without end": b"\x8e" + struct.pack("<Q", 1 << 60),
    "text without end": b"\x8d" + struct.pack("<Q", 1 << 62),
    "a long without end": b"\x8b" + struct.pack("<i", 2**31 - 1),
    "a long of negative length": b"\x8b" + struct.pack("<i", -1),
    "a long of many digits": b"L" + b"9" * 5000 + b"L\n",
    "wrong UTF-8": b"X\2\0\0\0\xff\xff",
    "no integer": b"Ix\n",
    "a name of one line": b"ctorch\n",
    "a name with a backslash": b"ctorch\nSi\\oze\n",
    "a name that is no text": b"c\xff\nSize\n",
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_programs(case):
    with pytest.raises(ValueError, match="no checkpoint that can be read"):
        read(checkpoint("zip", b"\x80\x02" + BROKEN[case] + b"."))


def test_a_path_in_a_key_stays_in_the_archive():
    with pytest.raises(ValueError, match=r"no item named 'archive/data/\.\./\.\./etc/passwd'"):
        read(checkpoint("zip", pickled(storage(key="../../etc/passwd"))))


# ---- pickles that take time or memory

HOSTILE = """
import io, resource, time
import test_pth
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))

def attempt(program):
    begin = time.perf_counter()
    try:
        test_pth.read(test_pth.zipped(program, {}))
        end = "value"
    except ValueError:
        end = "error"
    assert time.perf_counter() - begin < 20
    print(end)

tuples = b"K\\1\\x85" + b"".join(b"q%ch%c\\x86" % (i, i) for i in range(200))
lists = b"]" + b"".join(b"q%ch%ch%c\\x86" % (i, i, i) for i in range(200)) + b"."
attempt(b"\\x80\\2Nr\\xff\\xff\\xff\\x7f.")  # a memo of 2**31 values
attempt(b"\\x80\\2}" + tuples + b"Ns.")  # a key that takes 2**200 steps to hash
attempt(b"\\x80\\2" + tuples + b".")  # the same as a value costs nothing
attempt(b"\\x80\\2" + b"]" * 300_000 + b"a" * 299_999 + b".")  # depth
attempt(b"\\x80\\2" + b"K\\1" + b"\\x85" * 300_000 + b".")
attempt(b"\\x80\\4\\x95" + b"\\xff" * 7 + b"\\x7fN.")  # a frame of 2**63 bytes
attempt(b"\\x80\\4\\x8e" + (1 << 40).to_bytes(8, "little") + b"x.")  # bytes of 2**40
pairs = b"](" + b"".join(test_pth.encoded([i, None]) for i in range(20_000)) + b"eq\\1"
call = b"ccollections\\nOrderedDict\\nh\\1\\x85R"
attempt(b"\\x80\\2(" + pairs + call * 20_000 + b"t.")  # 4e8 entries from 700 kB
"""


def test_bombs_do_not_go_off():
    ends = python(HOSTILE, timeout=120).split()
    assert ends == ["value", "error", "value", "value", "value", "value", "error", "error"]


def test_too_many_steps(monkeypatch):
    monkeypatch.setattr("dcn_np.pth._MOST_STEPS", 1000)
    with pytest.raises(ValueError, match="more than 1000 steps"):
        read(zipped(b"\x80\x02" + b"]" * 1000 + b".", {}))


def test_a_value_may_contain_itself():
    contents = read(zipped(b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s.", {}))
    assert contents["model"] is contents
    with pytest.raises(ValueError, match="is no state dict"):
        state_dict_of(contents)


# ---- torch itself


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def equal(ours, theirs, torch):
    if isinstance(theirs, torch.Tensor):
        plain = theirs.detach().to(torch.float64).numpy()
        assert str(theirs.dtype) == f"torch.{ours.dtype}"
        assert ours.shape == plain.shape
        assert np.array_equal(ours.astype(np.float64), plain)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            equal(ours[key], theirs[key], torch)
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            equal(mine, other, torch)
    else:
        assert ours == theirs
        assert type(ours) is type(theirs)


def everything(torch):
    """Return a checkpoint as training writes it, with a model, an optimizer and all kinds of tensors."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    model(torch.randn(2, 3, 9, 9)).sum().backward()
    optimizer.step()
    base = torch.arange(24.0).reshape(4, 6)
    views = [base.t()[1:, ::2], base[2], torch.zeros(0, 3), torch.tensor(2.5), torch.ones(1).expand(5)]
    return SimpleNamespace(
        model=model,
        contents={
            "state_dict": {f"module.{key}": value for key, value in model.state_dict().items()},
            "ordered": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "meta": {
                "epoch": 3,
                "text": "größe",
                "values": [1, 2.5, None, True, -(2**40)],
                "size": views[0].shape,
            },
            "views": views,
            "parameter": torch.nn.Parameter(base),
            "dtypes": [torch.tensor([0, 1, 2]).to(getattr(torch, dtype)) for dtype in STORAGES],
        },
    )


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "legacy"])
def test_files_of_torch(torch, tmp_path, zip_format, protocol):
    pytest.importorskip("ml_dtypes")
    saved = everything(torch)
    path = tmp_path / "model.pth"
    options = {"_use_new_zipfile_serialization": zip_format, "pickle_protocol": protocol}
    torch.save(saved.contents, path, **options)
    contents = read_pth(path)
    equal(contents, saved.contents, torch)
    assert np.shares_memory(contents["views"][0], contents["parameter"])
    equal(state_dict_of(contents), dict(saved.model.state_dict()), torch)


@pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "legacy"])
@pytest.mark.filterwarnings("ignore")
def test_whole_modules_of_torch_are_refused(torch, tmp_path, zip_format):
    path = tmp_path / "model.pth"
    torch.save(torch.nn.Conv2d(1, 1, 1), path, _use_new_zipfile_serialization=zip_format)
    with pytest.raises(ValueError, match=r"'torch\.nn\.modules\.conv Conv2d', which is refused"):
        read_pth(path)


@pytest.mark.filterwarnings("ignore")
def test_programs_of_torchscript_are_refused(torch, tmp_path):
    path = tmp_path / "model.pt"
    torch.jit.script(torch.nn.ReLU()).save(str(path))
    with pytest.raises(ValueError, match="TorchScript"):
        read_pth(path)
