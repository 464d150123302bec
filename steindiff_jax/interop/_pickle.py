"""Pickles of networks read as data: nothing is imported, nothing is called.

A pickle is a program for a stack machine. This machine knows the instructions that build numbers,
text and containers, and the few names that torch and NVIDIA's snapshots use; any other instruction
or name is a ValueError. Time and memory grow with the file: nothing is as large as it says, and
what a file holds once and uses often is read once. Flax's msgpack, which is no program, is read by
Flax.
"""

import io
import math
import pickletools
import re
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import serialization

MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of torch's files before it wrote zips
MSGPACK = re.compile(rb"[\x81-\x8f][\xa1-\xbf]")  # a dict with a few keys, the first short text
BROKEN = (
    *(ValueError, LookupError, TypeError, OverflowError, EOFError, OSError, RuntimeError),
    *(zipfile.BadZipFile, NotImplementedError, zlib.error),
    *(AttributeError, MemoryError, SyntaxError),  # of damaged msgpack
)

STORAGES = {
    "torch.DoubleStorage": np.dtype("<f8"),
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.HalfStorage": np.dtype("<f2"),
    "torch.BFloat16Storage": np.dtype(jnp.bfloat16),
    "torch.LongStorage": np.dtype("<i8"),
    "torch.IntStorage": np.dtype("<i4"),
    "torch.BoolStorage": np.dtype("?"),
}
LONGEST = 200  # characters of a name
DICTS = {"collections.OrderedDict", "dnnlib.util.EasyDict"}
OBJECT = "torch_utils.persistence._reconstruct_persistent_obj"
CALLS = {
    OBJECT,
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.storage._load_from_bytes",
}
# Kept as a name: they say nothing about a network.
NUMPY = {
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
}
VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
KNOWN = {
    *("PROTO", "FRAME", "STOP", "MARK", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET", "ADDITEMS"),
    *("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "SETITEM", "SETITEMS"),
    *("MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
    *("GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID"),
    *VALUES,
    *CONSTANTS,
}
INSTRUCTIONS = {op.code.encode("latin-1"): op for op in pickletools.opcodes}


class Name(NamedTuple):
    """Of a class or a function that is not imported."""

    name: str


class Node:
    """An object of a class that is not imported: its name, and the state that the file gives it."""

    __slots__ = ("name", "state")

    def __init__(self, name: str, state: Any = None) -> None:
        self.name, self.state = name, state


class Storage:
    """The bytes behind tensors; a file may name them before it holds them."""

    def __init__(self, dtype: np.dtype, count: int) -> None:
        self.dtype, self.count, self.data = dtype, count, memoryview(b"")

    def fill(self, data: bytes | memoryview) -> None:
        """Take the bytes, as many as there must be."""
        self.data = memoryview(data)
        if len(self.data) != self.count * self.dtype.itemsize:
            raise ValueError(f"a storage of {self.count} numbers has {len(self.data)} bytes")


class Tensor(NamedTuple):
    """A view of a storage, in its elements."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def array(self) -> np.ndarray:
        """The array, which shares the bytes of the file."""
        flat = np.frombuffer(self.storage.data, self.storage.dtype)
        last = self.offset + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))
        # No element is there twice: an expanded tensor would be as large as it likes.
        if min(self.size, default=1) < 1 or math.prod(self.size) > flat.size or last >= flat.size:
            raise ValueError(f"a tensor does not fit its storage of {flat.size} numbers")
        strides = [s * flat.itemsize if n > 1 else 0 for n, s in zip(*self[2:], strict=True)]
        return np.lib.stride_tricks.as_strided(flat[self.offset :], self.size, strides)


def load(file: Path) -> Any:
    """What a file holds: containers, numbers, text, `Tensor` and `Node`, arrays if it is Flax's."""
    try:
        with file.open("rb") as stream:
            if stream.read(4) == b"PK\x03\x04":
                return _zip(file)
            stream.seek(0)
            data = stream.read()
        if MSGPACK.match(data):
            return serialization.msgpack_restore(data)
        return _stream(data)
    except FileNotFoundError as error:
        raise ValueError(f"no file {file}") from error
    except BROKEN as error:
        what = str(error)[:200]  # some quote the file
        raise ValueError(f"{file} is no file of a network that can be read: {what}") from error


def _zip(file: Path) -> Any:
    """torch.save's archive: a pickle, and a file for each storage."""
    with zipfile.ZipFile(file) as archive:
        sizes = {e.filename: -1 if e.compress_type else e.file_size for e in archive.infolist()}
        main = next((name for name in sizes if name.endswith("/data.pkl")), "")
        folder = main.removesuffix("data.pkl")
        if not main or min(sizes.values()) < 0 or sum(sizes.values()) > file.stat().st_size:
            raise ValueError("its archive is not one of torch.save")
        if (order := f"{folder}byteorder") in sizes and archive.read(order) != b"little":
            raise ValueError("its numbers are big-endian")
        storages = _Storages()
        found = _run(io.BytesIO(archive.read(main)), storages.find)
        for key, storage in storages.items():
            storage.fill(archive.read(f"{folder}data/{key}"))
        return found


def _stream(data: bytes) -> Any:
    """A pickle, or torch's four, of which the last is the object, then its storages' bytes."""
    stream = io.BytesIO(data)
    first = _run(stream, load=_Once(_legacy).find)
    return _legacy(data) if type(first) is int and first == MAGIC else first


def _legacy(data: bytes) -> Any:
    """What torch saved before it wrote zips."""
    stream = io.BytesIO(data)
    magic, _, system = _run(stream), _run(stream), _run(stream)
    if magic != MAGIC or not system["little_endian"]:
        raise ValueError("its numbers are big-endian, or no torch wrote it")
    storages = _Storages()
    found = _run(stream, storages.find)
    for key in _run(stream):
        storage, start = storages[key], stream.tell() + 8  # after their count
        end = stream.seek(start + storage.count * storage.dtype.itemsize)
        storage.fill(memoryview(data)[start:end])
    return found


class _Once:
    """A function of bytes, called once for each object that holds some."""

    def __init__(self, function: Callable[[bytes], Any]) -> None:
        self.function, self.found = function, {}

    def find(self, data: Any) -> Any:
        """What the function returns; the bytes are kept, so that no other object has their id."""
        if id(data) not in self.found:
            self.found[id(data)] = data, self.function(data)
        return self.found[id(data)][1]


class _Storages(dict[str, Storage]):
    """Storages by their keys."""

    def find(self, pid: Any) -> Storage:
        """The storage of a persistent id; its bytes come later."""
        kind, name, key, _, count = _few(pid)[:5]
        if kind != "storage" or name.name not in STORAGES or type(key) is not str:
            raise ValueError("a persistent id is no storage")
        if type(count) is not int or count < 0:
            raise ValueError("a storage's size must be a count")
        return self.setdefault(key, Storage(STORAGES[name.name], count))


def _few(items: Any) -> tuple[Any, ...]:
    """A tuple with no more in it than a tensor has sizes."""
    if type(items) is not tuple or len(items) > 8:
        raise ValueError("a short tuple is expected")
    return items


def _name(module: Any, name: Any) -> Name:
    """A name that the files of networks use, or ValueError."""
    full = f"{module}.{name}" if type(module) is type(name) is str else "what is no name"
    known = {*DICTS, *CALLS, *NUMPY, *STORAGES}
    if full in known or (full.startswith("torch.nn.modules.") and len(full) < LONGEST):
        return Name(full)
    raise ValueError(f"it names {full[:80]}, which no network needs; nothing was run")


def _call(function: Any, args: Any, load: Callable[[Any], Any] | None) -> Any:
    """What a known name stands for, applied to its arguments."""
    name = function.name if type(function) is Name else ""
    if name in DICTS and _few(args) == ():
        return {}
    if name in NUMPY or name.startswith("torch.nn.modules."):
        return Node(name)
    if name not in CALLS:
        raise ValueError(f"it calls {name or 'what is no name'}; nothing was run")
    if name == OBJECT:
        (meta,) = _few(args)
        if type(meta["class_name"]) is not str or len(meta["class_name"]) > LONGEST:
            raise ValueError("a class name must be text")
        return Node(meta["class_name"], meta["state"])
    if name == "torch._utils._rebuild_parameter":
        return _few(args)[0]
    if name == "torch.storage._load_from_bytes":
        if load is None:
            raise ValueError("storages lie within storages")
        (data,) = _few(args)
        return load(data)
    storage, offset, size, stride = _few(args)[:4]
    numbers = (offset, *_few(size), *_few(stride))
    if type(storage) is not Storage or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError("a tensor must be a view of a storage")
    return Tensor(storage, offset, size, stride)


class _Machine:
    """The stack of a pickle, and the stacks below it that a mark put aside."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def above(self) -> list[Any]:
        """What was pushed since the last mark."""
        found, self.stack = self.stack, self.below.pop()
        return found

    def top(self, kind: type) -> Any:
        """What is on top, which must be a container of a kind."""
        if type(self.stack[-1]) is not kind:
            raise ValueError(f"a {kind.__name__} is expected")
        return self.stack[-1]

    def put(self, keys: list[Any], values: list[Any]) -> None:
        """Items in the dict on top."""
        if any(type(key) is not str for key in keys):  # hashing a tuple may take forever
            raise ValueError("keys must be text")
        self.top(dict).update(zip(keys, values, strict=True))


def _run(
    stream: io.BytesIO,
    storage: Callable[[Any], Storage] | None = None,
    load: Callable[[Any], Any] | None = None,
) -> Any:
    """The object that the next pickle of the stream builds.

    storage: of a persistent id; load: what torch saved to some bytes; None where these have no use.
    """
    m = _Machine()
    while code := stream.read(1):
        op = INSTRUCTIONS.get(code)
        if op is None or op.name not in KNOWN:  # its argument is not read
            what = op.name if op else code
            raise ValueError(f"the instruction {what} has no use in a network's file")
        # pickletools decodes escapes in a GLOBAL, which has none.
        arg: Any = op.arg.reader(stream) if op.arg and op.name != "GLOBAL" else None
        match op.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return m.stack.pop()
            case name if name in VALUES:
                m.stack.append(arg)
            case name if name in CONSTANTS:
                m.stack.append(CONSTANTS[name])
            case "EMPTY_DICT":
                m.stack.append({})
            case "EMPTY_LIST":
                m.stack.append([])
            case "EMPTY_SET":
                m.stack.append(Node("set"))
            case "ADDITEMS":
                m.above()  # a set says nothing about a network
            case "MARK":
                m.below.append(m.stack)
                m.stack = []
            case "TUPLE":
                items = tuple(m.above())
                m.stack.append(items)
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                n = int(op.name[-1])
                if len(m.stack) < n:
                    raise ValueError("the stack is empty")
                m.stack[-n:] = [tuple(m.stack[-n:])]
            case "APPEND":
                item = m.stack.pop()
                m.top(list).append(item)
            case "APPENDS":
                items = m.above()
                m.top(list).extend(items)
            case "SETITEM":
                value, key = m.stack.pop(), m.stack.pop()
                m.put([key], [value])
            case "SETITEMS":
                items = m.above()
                m.put(items[::2], items[1::2])
            case "MEMOIZE":
                m.memo[len(m.memo)] = m.stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                m.memo[arg] = m.stack[-1]
            case "BINGET" | "LONG_BINGET":
                m.stack.append(m.memo[arg])
            case "GLOBAL":
                module, name = (stream.readline()[:-1].decode("ascii") for _ in range(2))
                m.stack.append(_name(module, name))
            case "STACK_GLOBAL":
                name, module = m.stack.pop(), m.stack.pop()
                m.stack.append(_name(module, name))
            case "REDUCE" | "NEWOBJ":
                args, function = m.stack.pop(), m.stack.pop()
                m.stack.append(_call(function, args, load))
            case "BUILD":
                state = m.stack.pop()
                if type(m.stack[-1]) is not dict:  # attributes of a dict are of no use
                    m.top(Node).state = state
            case "BINPERSID" if storage:
                pid = m.stack.pop()
                m.stack.append(storage(pid))
            case _:
                raise ValueError("it names a storage, but none is in the file")
    raise ValueError("it has no end")
