"""Read state dicts written by `torch.save`, without torch and without executing their pickle.

A .pt file is a zip archive: `data.pkl` describes the tensors, and each record `data/KEY` holds the
raw numbers of one storage. The description is a pickle, a program for a stack machine. This module
interprets its instructions symbolically: the names that a state dict needs become plain records,
any other name or instruction is an error, and nothing is imported or called.
"""

import math
import pickletools
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_MOST_DESCRIPTION = 1 << 22  # maximum bytes of data.pkl; a tensor takes about 200 bytes
_MOST_AXES = 64  # NumPy's limit
_PART = 1 << 24  # bytes per read
_DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


class _Name(NamedTuple):
    """A name that a pickle would import."""

    module: str
    name: str


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    size: int
    """number of elements"""


@dataclass(frozen=True)
class Tensor:
    """Offset, shape and strides of a tensor in its storage, in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TorchFile:
    """The object described by `data.pkl` (`content`); `read` returns the numbers of a tensor.

    Raises ValueError or an error of `zipfile` for a damaged file, or for a file with other content
    than dictionaries, lists, numbers, strings and tensors.
    """

    def __init__(self, path: Path):
        self.path = path
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if n.partition("/")[2] == "data.pkl"]
            if len(names) != 1:
                raise ValueError("it is no archive that torch.save wrote")
            self._root = names[0].partition("/")[0]
            if archive.getinfo(names[0]).file_size > _MOST_DESCRIPTION:
                raise ValueError(f"data.pkl is larger than {_MOST_DESCRIPTION:,} bytes")
            order = f"{self._root}/byteorder"
            if order in archive.namelist() and _content(archive, order) != sys.byteorder.encode():
                raise ValueError("it was written on a machine with another byte order")
            self.content, tensors = _describe(_content(archive, names[0]))
            for tensor in tensors:
                self._check(archive, tensor)

    def _record(self, storage: _Storage) -> str:
        return f"{self._root}/data/{storage.key}"

    def _check(self, archive: zipfile.ZipFile, tensor: Tensor) -> None:
        """Raise ValueError unless the file contains all numbers of a tensor."""
        storage = tensor.storage
        info, size = archive.getinfo(self._record(storage)), storage.size * storage.dtype.itemsize
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != size:
            raise ValueError(
                f"record {storage.key!r} has {info.file_size:,} bytes, its tensor says {size:,}"
            )
        last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides))
        count = math.prod(tensor.shape)
        if count and tensor.offset + last >= storage.size or count > storage.size:
            raise ValueError(f"record {storage.key!r} has {storage.size:,} elements, too few")

    def read(self, tensor: Tensor) -> np.ndarray:
        """Read the numbers of a tensor from the file."""
        flat = np.empty(tensor.storage.size, tensor.storage.dtype)
        left = memoryview(flat.view(np.uint8))
        with zipfile.ZipFile(self.path) as archive:
            with archive.open(self._record(tensor.storage)) as file:
                while part := file.read(_PART):  # zipfile verifies the checksum at the end
                    left[: len(part)] = part
                    left = left[len(part) :]
        strides = [step * flat.itemsize for step in tensor.strides]
        return np.ndarray(
            tensor.shape, flat.dtype, flat, offset=tensor.offset * flat.itemsize, strides=strides
        )


def _content(archive: zipfile.ZipFile, name: str) -> bytes:
    with archive.open(name) as file:
        return file.read(_MOST_DESCRIPTION)  # a small record may expand to any size


def _describe(pickled: bytes) -> tuple[Any, list[Tensor]]:
    """(the object that a pickle describes, all tensors in it)."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    tensors: list[Tensor] = []

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for operation, argument, _ in pickletools.genops(pickled):
        match operation.name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                marks.append(len(stack))
            case (
                "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT"
                | "BINUNICODE" | "SHORT_BINUNICODE"
            ):  # fmt: skip
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[operation.name])
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list}.get(operation.name, tuple)())
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                marks.append(len(stack) - int(operation.name[-1]))
                stack.append(tuple(since_mark()))
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items = since_mark()
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                if operation.name == "SETITEM":
                    marks.append(len(stack) - 2)
                items = since_mark()
                _set_items(stack[-1], items[::2], items[1::2])
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_Name(*argument.split(" ")))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_Name(module, name))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments, name = stack.pop(), stack.pop()
                stack.append(made := _made(name, arguments))
                if isinstance(made, Tensor):
                    tensors.append(made)
            case "BUILD":  # attributes of a dictionary, such as `_metadata`
                stack.pop()
            case "STOP":
                return stack.pop(), tensors
            case name:
                raise ValueError(f"its pickle has the instruction {name}, which no state dict has")
    raise ValueError("its pickle has no end")


def _set_items(target: Any, keys: list[Any], values: list[Any]) -> None:
    if not isinstance(target, dict) or not all(isinstance(key, str) for key in keys):
        raise ValueError("it has a dictionary whose names are no texts")
    target.update(zip(keys, values, strict=True))


def _storage(reference: Any) -> _Storage:
    match reference:
        case ("storage", _Name("torch", kind), str(key), str(), int(size)) if kind in _DTYPES:
            return _Storage(key, np.dtype(_DTYPES[kind]), size)
        case ("storage", _Name(str(), str(kind)), *_):
            raise ValueError(f"it has numbers of another kind, {kind[:80]!r}")
        case _:
            raise ValueError("it refers to what is no storage")


def _made(name: Any, arguments: Any) -> Any:
    """The record for the result of a call in the pickle of a state dict."""
    match name, arguments:
        case _Name("collections", "OrderedDict"), ():
            return {}
        case _Name("torch._utils", "_rebuild_parameter"), (Tensor() as tensor, *_):
            return tensor
        case (
            _Name("torch._utils", "_rebuild_tensor_v2"),
            (_Storage() as storage, int(offset), tuple(shape), tuple(strides), *_),
        ):
            numbers = (offset, *shape, *strides)
            is_size = all(type(n) is int and 0 <= n < 1 << 63 for n in numbers)
            if len(shape) != len(strides) or len(shape) > _MOST_AXES or not is_size:
                raise ValueError("it has a tensor without a shape")
            return Tensor(storage, offset, shape, strides)
        case _Name(str(module), str(called)), _:
            raise ValueError(f"it asks for {module[:80]}.{called[:80]}, which no state dict needs")
        case _:
            raise ValueError("it calls what has no name")
