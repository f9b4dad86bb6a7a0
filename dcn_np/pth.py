"""Checkpoints of PyTorch (.pth, .pt, .bin) as plain values and NumPy arrays, without PyTorch.

A checkpoint is a pickle: a program that builds its values. The program is read here opcode by opcode, with
what containers, numbers and tensors need. Nothing is imported, looked up or called by name; an opcode or a
name outside of these tables is an error. `pickle.Unpickler` with a strict `find_class` would not do: ten
bytes make it allocate gigabytes (a large memo index), and a few hundred keep it busy for days (nested tuples
as a key).

Two formats have the suffix. Since torch 1.6 a file is a zip archive: <name>/data.pkl is the pickle and
<name>/data/<key> the bytes of a storage, which tensors view with offset and strides. Before, it was five
pickles (magic number, version, system, value, keys of the storages) and then the storages one after another.
"""

from __future__ import annotations

import io
import math
import os
import pickletools
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias, cast

import numpy
from numpy.typing import NDArray

from .messages import count, listed, number, shown

__all__ = ["read_pth", "state_dict_of"]

Array: TypeAlias = NDArray[Any]

# What torch calls each storage, and the dtype of its entries; for bfloat16 see _kind.
_DTYPES = {
    "torch DoubleStorage": "f8",
    "torch FloatStorage": "f4",
    "torch HalfStorage": "f2",
    "torch LongStorage": "i8",
    "torch IntStorage": "i4",
    "torch ShortStorage": "i2",
    "torch CharStorage": "i1",
    "torch ByteStorage": "u1",
    "torch BoolStorage": "?",
}
_BFLOAT16 = "torch BFloat16Storage"

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001

# Opcodes of a pickle, of which a tensor takes about 40. Bounds time and memory, since a byte may be a list.
_MOST_STEPS = 10_000_000
_MOST_AXES = 64
_BLOCK = 1 << 20

# What zipfile raises on archives that are none; ValueError is what everything else here raises.
_MALFORMED = (
    ValueError,
    zipfile.BadZipFile,
    struct.error,
    EOFError,
    KeyError,
    IndexError,
    OverflowError,
    NotImplementedError,
    RuntimeError,
)

# ---- the public functions


def read_pth(file: str | os.PathLike[str] | IO[bytes]) -> Any:
    """Read a checkpoint of PyTorch; PyTorch is not needed, and nothing in the file is run.

    Parameters
    ----------
    file : str, os.PathLike or binary file
        What `torch.save` wrote, in the zip format or in the one before torch 1.6. A file that is open already
        is read from its beginning and must allow seeking.

    Returns
    -------
    object
        The saved value: dictionaries, lists, tuples, strings and numbers as they are, ordered dictionaries as
        `dict`, tensors and parameters as `numpy.ndarray` in the byte order of this machine. Tensors that
        shared memory share it here. bfloat16 needs ml_dtypes; without it, the values come as float32.

    Raises
    ------
    TypeError
        `file` is neither a path nor a binary file.
    ValueError
        The file is damaged, in another format, or holds what is neither tensor nor plain value; the message
        names the class or the opcode, the storage or the entry of the archive.
    OSError
        The file cannot be read.

    See Also
    --------
    state_dict_of : The arrays of the model in what this returns.

    Notes
    -----
    What is allocated is bounded by the size of the file: compressed entries and storages that together are
    larger are refused. Also refused are sparse and quantised tensors, complex numbers, sets, pickled NumPy
    arrays and whole modules; save `model.state_dict()` instead. Checksums are verified, so a file saved with
    `torch.serialization.set_crc32_options(False)` counts as damaged.
    """
    with _opened(file) as source:
        start = source.read(4)
        source.seek(0)
        try:
            return _read_zip(source) if start == b"PK\3\4" else _read_legacy(source, start)
        except _MALFORMED as error:
            raise ValueError(f"{source.name} is no checkpoint that can be read: {error}") from error


def state_dict_of(contents: Any) -> dict[str, Array]:
    """Find the arrays of the model in a checkpoint.

    Parameters
    ----------
    contents : dict
        What `read_pth` returned: a state dict, or a dictionary that has one as "state_dict", "model",
        "model_state_dict" or "module"; the first of these that is there is taken.

    Returns
    -------
    dict of str to numpy.ndarray
        Names and arrays, in the order of the file. A "module." that all names begin with is removed, and
        entries that are no arrays are left out.

    Raises
    ------
    TypeError
        `contents` is no dictionary.
    ValueError
        There is no state dict in it.

    See Also
    --------
    read_pth : Read a checkpoint.

    Examples
    --------
    >>> import numpy
    >>> from dcn_np.pth import state_dict_of
    >>> state_dict_of({"state_dict": {"module.conv.bias": numpy.zeros(2)}, "epoch": 3})
    {'conv.bias': array([0., 0.])}
    """
    if not isinstance(contents, dict):
        raise TypeError(f"contents is {shown(contents)}; wanted a dictionary")
    for wrapper in ("state_dict", "model", "model_state_dict", "module"):
        if isinstance(contents.get(wrapper), dict):
            return _arrays(contents[wrapper], f"contents[{wrapper!r}]")
    return _arrays(contents, "contents")


def _arrays(state: dict[Any, Any], name: str) -> dict[str, Array]:
    found = {key: value for key, value in state.items() if isinstance(value, numpy.ndarray)}
    nested = [value for value in state.values() if isinstance(value, dict)]
    if not found or nested or not all(isinstance(key, str) for key in found):
        keys = ", ".join(map(shown, list(state)[:8])) + (", ..." if len(state) > 8 else "")
        raise ValueError(f"{name} is no state dict: wanted arrays by name; it has {keys or 'no entries'}")
    shared = "module." if all(key.startswith("module.") for key in found) else ""
    return {key.removeprefix(shared): value for key, value in found.items()}


# ---- files


class _Source:
    """A binary file of known size. No read asks for more than is there, so none allocates more."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file, self.name = file, name
        self.size = file.seek(0, os.SEEK_END)
        self.seek(0)

    def read(self, size: int = -1) -> bytes:
        rest = max(self.size - self.tell(), 0)
        return self._file.read(rest if size < 0 else min(size, rest))

    def readline(self) -> bytes:
        return self._file.readline()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self.size}[whence]
        if origin + offset < 0:
            raise ValueError("it refers to bytes before its beginning")
        return self._file.seek(origin + offset)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True


@contextmanager
def _opened(file: str | os.PathLike[str] | IO[bytes]) -> Iterator[_Source]:
    if isinstance(file, (str, os.PathLike)):
        with Path(file).open("rb") as opened:
            yield _Source(opened, str(file))
    elif hasattr(file, "seek") and hasattr(file, "read") and isinstance(file.read(0), bytes):
        yield _Source(file, str(getattr(file, "name", "the file")))
    else:
        raise TypeError(f"file is {shown(file)}; wanted a path or a binary file that allows seeking")


def _read_zip(source: _Source) -> Any:
    with zipfile.ZipFile(cast("IO[bytes]", source)) as archive:
        folder = _folder(archive)
        swapped = _byte_order(archive, folder) != sys.byteorder

        def read_storage(key: str, storage: _Storage) -> None:
            storage.fill(_stored(archive, f"{folder}data/{key}", storage.stored_bytes), swapped)

        program = _stored(archive, f"{folder}data.pkl", None).read()
        return _Program(_Storages(source.size, read_storage)).run(io.BytesIO(program))


def _folder(archive: zipfile.ZipFile) -> str:
    names = archive.namelist()
    folders = {
        name.removesuffix("data.pkl") for name in names if name.count("/") == 1 and name.endswith("/data.pkl")
    }
    if len(folders) != 1:
        raise ValueError(f"a zip archive with {count(len(folders), 'entry')} <name>/data.pkl; wanted 1")
    (folder,) = folders
    if f"{folder}constants.pkl" in names:
        raise ValueError("a program of TorchScript; wanted what torch.save(model.state_dict(), file) writes")
    return folder


def _byte_order(archive: zipfile.ZipFile, folder: str) -> str:
    """Return "little" or "big"; torch before 2.1 had only the first, and did not write it down."""
    name = f"{folder}byteorder"
    try:
        order = _stored(archive, name, None).read(8)
    except KeyError:
        return "little"
    if order not in (b"little", b"big"):
        raise ValueError(f"entry {name!r} is {order!r}; wanted b'little' or b'big'")
    return order.decode()


def _stored(archive: zipfile.ZipFile, name: str, size: int | None) -> IO[bytes]:
    """Open an entry of the archive, which must have this size and not be compressed."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise ValueError(f"entry {name!r} is compressed; torch.save stores entries as they are")
    if size is not None and info.file_size != size:
        raise ValueError(
            f"entry {name!r} has {number(info.file_size)} bytes; its storage needs {number(size)}"
        )
    return archive.open(info)


def _read_legacy(source: _Source, start: bytes) -> Any:
    if start[:1] != b"\x80":
        raise ValueError(
            f"it begins with {start!r}; checkpoints begin with b'PK\\x03\\x04', "
            "those before torch 1.6 with b'\\x80'"
        )
    magic, version, system = (_Program(None).run(source) for _ in range(3))
    if magic != _LEGACY_MAGIC or version != _LEGACY_VERSION:
        raise ValueError(
            "it is a pickle, but does not begin with the magic number and the version of torch.save"
        )
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError(
            "it was saved on a big-endian machine; in that format only little-endian ones are read"
        )
    storages = _Storages(source.size, None)
    contents = _Program(storages).run(source)
    keys = _Program(None).run(source)
    if not isinstance(keys, list) or not all(type(key) is str for key in keys):
        raise ValueError(f"the keys of its storages are {shown(keys)}; wanted a list of strings")
    if len(keys) != len(storages.found) or set(keys) != set(storages.found):
        raise ValueError(
            f"it lists the storages {shown(keys)}; its tensors use {shown(list(storages.found))}"
        )
    for key in keys:
        _read_legacy_storage(source, key, storages.found[key])
    return contents


def _read_legacy_storage(source: _Source, key: str, storage: _Storage) -> None:
    entries = int.from_bytes(source.read(8), "little", signed=True)
    if entries != storage.array.size:
        raise ValueError(
            f"storage {key!r} has {count(entries, 'entry')}; its tensors need {number(storage.array.size)}"
        )
    storage.fill(source, swapped=sys.byteorder != "little")


# ---- storages


class _Storage(NamedTuple):
    """The memory of tensors: `itemsize` bytes an entry in the file, in `array` perhaps wider."""

    name: str
    array: Array
    itemsize: int

    @property
    def stored_bytes(self) -> int:
        return self.array.size * self.itemsize

    def fill(self, file: _Source | IO[bytes], swapped: bool) -> None:
        words = numpy.empty(self.array.size, f"u{self.itemsize}")
        if self.itemsize == self.array.itemsize:
            words = self.array.view(words.dtype)
        _read_into(file, words.view(numpy.uint8))
        if swapped:
            words.byteswap(inplace=True)
        if self.array.dtype == bool and words.max(initial=0) > 1:
            raise ValueError("a bool is neither 0 nor 1")
        if self.itemsize != self.array.itemsize:
            numpy.left_shift(words, 16, out=self.array.view(numpy.uint32), dtype=numpy.uint32)


def _read_into(file: _Source | IO[bytes], target: NDArray[numpy.uint8]) -> None:
    done = 0
    while done < target.size:
        block = file.read(min(_BLOCK, target.size - done))
        if not block:
            raise ValueError(f"it is cut off: {count(target.size - done, 'byte')} of a storage are missing")
        target[done : done + len(block)] = numpy.frombuffer(block, numpy.uint8)
        done += len(block)


def _kind(name: str) -> tuple[numpy.dtype[Any], int]:
    """Return the dtype that a storage is given, and the bytes of one of its entries in the file."""
    if name != _BFLOAT16:
        dtype = numpy.dtype(_DTYPES[name])
        return dtype, dtype.itemsize
    try:
        import ml_dtypes
    except ImportError:
        return numpy.dtype(numpy.float32), 2
    return numpy.dtype(ml_dtypes.bfloat16), 2


class _Storages:
    """The storages that a pickle names, each made once, all together no larger than the file.

    `read` fills one as soon as it is made; None where the bytes come later.
    """

    def __init__(self, size: int, read: Callable[[str, _Storage], None] | None) -> None:
        self.found: dict[str, _Storage] = {}
        self.size = self._left = size
        self._read = read

    def get(self, name: str, key: str, entries: int) -> Array:
        storage = self.found.get(key)
        if storage is None:
            storage = self.found[key] = self._made(name, key, entries)
        elif (storage.name, storage.array.size) != (name, entries):
            raise ValueError(
                f"storage {key!r} is {storage.array.size} of {storage.name!r} "
                f"and {number(entries)} of {name!r}"
            )
        return storage.array

    def _made(self, name: str, key: str, entries: int) -> _Storage:
        dtype, itemsize = _kind(name)
        if entries * itemsize > self._left:
            raise ValueError(
                f"storage {key!r} needs {number(entries)}*{itemsize} = {number(entries * itemsize)} bytes; "
                f"the file has {number(self.size)}, of which other storages leave {number(self._left)}"
            )
        self._left -= entries * itemsize
        storage = _Storage(name, numpy.empty(entries, dtype), itemsize)
        if self._read is not None:
            self._read(key, storage)
        return storage


# ---- what a pickle may call


@dataclass(frozen=True)
class _Global:
    """A name in a pickle. It stands for nothing that could be run; see _CALLS."""

    name: str


def _integer(value: Any, name: str) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} is {shown(value)}; wanted an integer from 0")
    return value


def _text(value: Any) -> str | None:
    """Return a string as it is, and None for what is none and might compare in its own way."""
    return value if type(value) is str else None


def _integers(values: Any, name: str) -> tuple[int, ...]:
    if type(values) not in (tuple, list) or len(values) > _MOST_AXES:
        raise ValueError(f"{name} is {shown(values)}; wanted a tuple of up to {_MOST_AXES}")
    return tuple(_integer(value, f"an entry of the {name}") for value in values)


def _tensor(program: _Program, storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Array:
    """View a storage. `rest` is requires_grad, hooks, and from torch 2 what a lazy conjugate or sign left."""
    if len(rest) > 2 and rest[2]:
        raise ValueError(f"a tensor has {shown(rest[2])} still to be applied; wanted plain values")
    if not isinstance(storage, numpy.ndarray) or storage.ndim != 1:
        raise ValueError(f"a tensor views {shown(storage)}; wanted a storage")
    start, extents, steps = (
        _integer(offset, "offset"),
        _integers(shape, "shape"),
        _integers(strides, "strides"),
    )
    _check_view(storage.size, start, extents, steps)
    if math.prod(extents) * storage.itemsize > 2 * program.size:
        raise ValueError(f"a tensor of shape {extents} repeats its storage to more bytes than the file has")
    if 0 in extents:
        return numpy.empty(extents, storage.dtype)
    size = storage.itemsize
    memory = storage.view(numpy.uint8)
    return numpy.ndarray(extents, storage.dtype, memory, start * size, [step * size for step in steps])


def _check_view(entries: int, start: int, extents: Sequence[int], steps: Sequence[int]) -> None:
    if len(extents) != len(steps):
        raise ValueError(f"a tensor has {count(len(extents), 'axis')} and {count(len(steps), 'stride')}")
    last = start + sum((extent - 1) * step for extent, step in zip(extents, steps, strict=True))
    if 0 not in extents and last >= entries:
        raise ValueError(
            f"a tensor reaches entry {number(last)} of a storage of {entries}: offset {number(start)}, "
            f"shape ({', '.join(map(number, extents))}), strides ({', '.join(map(number, steps))})"
        )


def _ordered(program: _Program, pairs: Any = ()) -> dict[Any, Any]:
    """Make an OrderedDict; Python 2 wrote its entries as a list of pairs, Python 3 sets them later."""
    if type(pairs) not in (list, tuple):
        raise ValueError(f"the entries of an OrderedDict are {shown(pairs)}; wanted a list")
    program.spend(len(pairs))
    result: dict[Any, Any] = {}
    for pair in pairs:
        if type(pair) not in (list, tuple) or len(pair) != 2:
            raise ValueError(f"an entry of an OrderedDict is {shown(pair)}; wanted a pair")
        _set(result, *pair)
    return result


# With how many arguments each is called. A parameter is its tensor, and a torch.Size the tuple.
_CALLS: dict[str, tuple[range, Callable[..., Any]]] = {
    "collections OrderedDict": (range(2), _ordered),
    "torch Size": (range(1, 2), lambda program, extents: _integers(extents, "shape")),
    "torch._utils _rebuild_tensor": (range(4, 5), _tensor),
    "torch._utils _rebuild_tensor_v2": (range(6, 8), _tensor),
    "torch._utils _rebuild_parameter": (range(3, 4), lambda program, tensor, *rest: tensor),
    "torch._utils _rebuild_parameter_with_state": (range(4, 5), lambda program, tensor, *rest: tensor),
}
_STORAGES = {*_DTYPES, _BFLOAT16}

# ---- the machine


def _set(target: dict[Any, Any], key: Any, value: Any) -> None:
    """Set an entry. Keys are plain and new: hashing nested or comparing equal long ones can take forever."""
    if type(key) not in (str, int, float, bool, type(None)) or (type(key) is int and key.bit_length() > 64):
        raise ValueError(
            f"a key of a dictionary is {shown(key)}; wanted a string or a number of up to 64 bits"
        )
    if key in target:
        raise ValueError(f"a dictionary has the key {shown(key)} twice")
    target[key] = value


class _Program:
    """Runs one pickle. Its opcodes are the methods and the tables below; any other is refused."""

    def __init__(self, storages: _Storages | None) -> None:
        self._storages = storages
        self.size = storages.size if storages else 0
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._steps = 0

    def run(self, file: _Source | IO[bytes]) -> Any:
        code = ""
        while code != ".":
            self.spend(1)
            code = file.read(1).decode("latin-1")
            if code not in _OPCODES:
                raise ValueError(_refused(code))
            read, action = _OPCODES[code]
            action(self, read(cast("IO[bytes]", file)))
        result = self._pop()
        if self._stack or self._marks:
            raise ValueError("a pickle leaves values behind")
        return result

    def spend(self, steps: int) -> None:
        self._steps += steps
        if self._steps > _MOST_STEPS:
            raise ValueError(f"a pickle takes more than {_MOST_STEPS} steps")

    # The stack. Values below the last mark are out of reach until the mark is taken off.

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise ValueError("a pickle takes a value where there is none")
        return self._stack.pop()

    def _top(self, kind: type) -> Any:
        value = self._pop()
        self.push(value)
        if type(value) is not kind:
            raise ValueError(f"a pickle changes {shown(value)} as if it were a {kind.__name__}")
        return value

    def mark(self, _: None) -> None:
        self._marks.append(len(self._stack))

    def _since_mark(self) -> list[Any]:
        if not self._marks:
            raise ValueError("a pickle takes a mark where there is none")
        begin = self._marks.pop()
        values = self._stack[begin:]
        del self._stack[begin:]
        return values

    # The memo: values by number.

    def put(self, index: int) -> None:
        value = self._pop()
        self.push(value)
        self._memo[index] = value

    def memoize(self, _: None) -> None:
        self.put(len(self._memo))

    def get(self, index: int) -> None:
        if index not in self._memo:
            raise ValueError(f"a pickle takes value {index}, which it did not keep")
        self.push(self._memo[index])

    # Containers.

    def tuple_since_mark(self, _: None) -> None:
        self.push(tuple(self._since_mark()))

    def tuple_of(self, size: int) -> None:
        self.push(tuple(reversed([self._pop() for _ in range(size)])))

    def list_since_mark(self, _: None) -> None:
        self.push(self._since_mark())

    def dict_since_mark(self, _: None) -> None:
        values = self._since_mark()
        self.push({})
        self._set_all(values)

    def append(self, _: None) -> None:
        value = self._pop()
        self._top(list).append(value)

    def appends(self, _: None) -> None:
        values = self._since_mark()
        self._top(list).extend(values)

    def setitem(self, _: None) -> None:
        value, key = self._pop(), self._pop()
        _set(self._top(dict), key, value)

    def setitems(self, _: None) -> None:
        self._set_all(self._since_mark())

    def _set_all(self, values: list[Any]) -> None:
        if len(values) % 2:
            raise ValueError("a pickle sets a key without a value")
        target = self._top(dict)
        for key, value in zip(values[::2], values[1::2], strict=True):
            _set(target, key, value)

    # Names, calls, storages.

    def name(self, name: str) -> None:
        if name not in _CALLS and name not in _STORAGES:
            wanted = listed(sorted({*_CALLS, *_STORAGES}))
            raise ValueError(f"a pickle names {name[:200]!r}, which is refused; allowed are {wanted}")
        self.push(_Global(name))

    def refuse_instance(self, name: str) -> None:
        raise ValueError(f"a pickle names {name[:200]!r} in the opcode INST, which is refused")

    def stack_name(self, _: None) -> None:
        name, module = self._pop(), self._pop()
        if type(name) is not str or type(module) is not str:
            raise ValueError(f"a pickle names {shown(name)} of {shown(module)}; wanted strings")
        self.name(f"{module} {name}")

    def call(self, _: None) -> None:
        arguments, called = self._pop(), self._pop()
        name = called.name if type(called) is _Global else None
        if name not in _CALLS or type(arguments) is not tuple:
            raise ValueError(f"a pickle calls {name or shown(called)} with {shown(arguments)}; it is refused")
        numbers, action = _CALLS[name]
        if len(arguments) not in numbers:
            raise ValueError(f"a pickle calls {name} with {count(len(arguments), 'argument')}")
        self.push(action(self, *arguments))

    def build(self, _: None) -> None:
        """Drop the attributes of an OrderedDict: versions of the modules, which no array depends on."""
        self._pop()
        self._top(dict)

    def storage(self, _: None) -> None:
        """Take ("storage", class, key, device, entries), in the old format with None or a view's place."""
        reference = self._pop()
        if type(reference) is not tuple or len(reference) not in (5, 6) or _text(reference[0]) != "storage":
            raise ValueError(f"a pickle refers to {shown(reference)}; wanted a storage")
        kind, key, _device, entries = reference[1:5]
        if self._storages is None or type(kind) is not _Global or kind.name not in _STORAGES:
            raise ValueError(
                f"a pickle has a storage of {shown(kind)}; wanted one of {listed(sorted(_STORAGES))}"
            )
        if type(key) is not str:
            raise ValueError(f"the key of a storage is {shown(key)}; wanted a string")
        array = self._storages.get(kind.name, key, _integer(entries, f"the size of storage {key!r}"))
        self.push(array if len(reference) == 5 or reference[5] is None else _part(array, reference[5]))


def _part(array: Array, view: Any) -> Array:
    """Return the part of a storage that was a storage of its own before torch 0.4."""
    if type(view) is not tuple or len(view) != 3:
        raise ValueError(f"a part of a storage is {shown(view)}; wanted a key, a begin and a size")
    begin, entries = _integer(view[1], "the begin of a part"), _integer(view[2], "the size of a part")
    if begin + entries > array.size:
        raise ValueError(
            f"entries {number(begin)} to {number(begin + entries)} are wanted of a storage of {array.size}"
        )
    return array[begin : begin + entries]


def _constant(make: Callable[[], Any]) -> Callable[[_Program, Any], None]:
    return lambda program, _: program.push(make())


def _ignored(program: _Program, argument: Any) -> None:
    """Pass over what only helps to read the file."""


_VALUES = (
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT BINSTRING SHORT_BINSTRING UNICODE "
    "BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8"
)

# By the names of pickletools, which also reads the arguments.
_ACTIONS: dict[str, Callable[[_Program, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), _ignored),
    **dict.fromkeys(_VALUES.split(), _Program.push),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Program.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Program.get),
    "MEMOIZE": _Program.memoize,
    "NONE": _constant(lambda: None),
    "NEWTRUE": _constant(lambda: True),
    "NEWFALSE": _constant(lambda: False),
    "EMPTY_DICT": _constant(dict),
    "EMPTY_LIST": _constant(list),
    "EMPTY_TUPLE": _constant(tuple),
    "MARK": _Program.mark,
    "TUPLE": _Program.tuple_since_mark,
    "TUPLE1": lambda program, _: program.tuple_of(1),
    "TUPLE2": lambda program, _: program.tuple_of(2),
    "TUPLE3": lambda program, _: program.tuple_of(3),
    "LIST": _Program.list_since_mark,
    "DICT": _Program.dict_since_mark,
    "APPEND": _Program.append,
    "APPENDS": _Program.appends,
    "SETITEM": _Program.setitem,
    "SETITEMS": _Program.setitems,
    "GLOBAL": _Program.name,
    "STACK_GLOBAL": _Program.stack_name,
    "REDUCE": _Program.call,
    "BUILD": _Program.build,
    "BINPERSID": _Program.storage,
    "INST": _Program.refuse_instance,
}


def _no_argument(file: IO[bytes]) -> None:
    """Read nothing."""


def _two_lines(file: IO[bytes]) -> str:
    """Read a module and a name in it. The reader of pickletools warns of what it takes for escapes."""
    return " ".join(file.readline().decode().removesuffix("\n") for _ in range(2))


_READERS: dict[str, Callable[[IO[bytes]], Any]] = {
    opcode.code: _no_argument if opcode.arg is None else opcode.arg.reader for opcode in pickletools.opcodes
} | {"c": _two_lines, "i": _two_lines}

_OPCODES = {
    opcode.code: (_READERS[opcode.code], _ACTIONS[opcode.name])
    for opcode in pickletools.opcodes
    if opcode.name in _ACTIONS
}


def _refused(code: str) -> str:
    if not code:
        return "it is cut off within a pickle"
    names = {opcode.code: opcode.name for opcode in pickletools.opcodes}
    return f"a pickle has the opcode {names.get(code, repr(code))}, which no state dict needs; it is refused"
