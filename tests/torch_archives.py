"""Files as written by `torch.save`, one instruction at a time, so that tests can damage them."""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

KINDS = {"float32": "FloatStorage", "float64": "DoubleStorage", "bfloat16": "BFloat16Storage"}


def text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x09" + int(value).to_bytes(9, "little", signed=True)


def several(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def storage(key: str, kind: str, size: int) -> bytes:
    parts = text("storage"), b"ctorch\n" + kind.encode() + b"\n", text(key), text("cpu")
    return several(*parts, number(size)) + b"Q"


def tensor(stored: bytes, shape, strides, offset: int = 0) -> bytes:
    sizes = (several(*map(number, numbers)) for numbers in (shape, strides))
    hooks = b"ccollections\nOrderedDict\n)R"
    arguments = several(stored, number(offset), *sizes, b"\x89", hooks)
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"


def dictionary(items: Mapping[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(name) + value for name, value in items.items()) + b"u"


def write_archive(path: Path, pickled: bytes, records: Mapping[str, bytes], **settings) -> Path:
    with zipfile.ZipFile(path, "w", **settings) as archive:
        archive.writestr(f"{path.stem}/data.pkl", b"\x80\x02" + pickled + b".")
        for name, content in records.items():
            archive.writestr(f"{path.stem}/{name}", content)
    return path


def write_state_dict(path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    items, records = {}, {"byteorder": b"little", "version": b"3\n"}
    for key, (name, array) in enumerate(arrays.items()):
        stored = storage(str(key), KINDS[array.dtype.name], array.size)
        items[name] = tensor(stored, array.shape, np.array(array.strides) // array.itemsize)
        records[f"data/{key}"] = array.tobytes()
    return write_archive(path, dictionary(items), records)
