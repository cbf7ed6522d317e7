"""Files of named tensors: .pt, .safetensors and .npz, read one tensor at a time.

Files are not trusted: pickles are never executed (see `torch_file`; object arrays are refused),
shapes are known before a tensor is read, and any error of a reader becomes a one-line ConfigError.
"""

import contextlib
import io
import os
import stat
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from hnet.errors import ConfigError
from hnet.outputs import new_file, one_line
from hnet.weights.torch_file import Tensor, TorchFile

FORMATS = (".pt", ".safetensors", ".npz")
_NO_FLOAT = "not floating point"
_MOST_HEADER = 1 << 14  # maximum bytes of an array header; numpy itself parses up to 10,000


def is_tensor_file(path: str | os.PathLike) -> bool:
    """Whether the name is that of a file of weights, in capitals too."""
    return Path(path).suffix.lower() in FORMATS


class TensorFile(Mapping[str, np.ndarray]):
    """Mapping from names to tensors; each access reads one tensor from the file as a NumPy array.

    Raises ConfigError, in one line, for a file that is missing, damaged, of another format, or
    contains anything other than tensors of numbers.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        suffix = self.path.suffix.lower()
        with one_line(path, "checkpoint"):
            is_file = stat.S_ISREG(os.stat(path).st_mode)
        if not is_file or not is_tensor_file(path):
            raise ConfigError(
                f"checkpoint {os.fspath(path)!r} is of no known format: give a work directory, or "
                f"a file that ends in {', '.join(FORMATS)}"
            )
        opened = {".pt": _open_torch, ".safetensors": _open_safetensors, ".npz": _open_npz}[suffix]
        with self._one_line():
            self.shapes: dict[str, tuple[int, ...]]
            self.shapes, self._read = opened(self.path)

    @contextlib.contextmanager
    def _one_line(self):
        try:
            yield
        except ConfigError:
            raise
        except ImportError as e:
            raise _missing(self.path, e) from None
        except Exception as e:  # each library raises its own errors for damaged or malicious files
            raise ConfigError(
                f"checkpoint {str(self.path)!r} cannot be read safely: {_reason(e)}"
            ) from None

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.shapes:
            raise KeyError(name)
        with self._one_line():
            array = self._read(name)
        if array.shape != self.shapes[name]:
            raise ConfigError(f"checkpoint {str(self.path)!r}: {name} changed while it was read")
        if array.dtype.kind != "f" and array.dtype != ml_dtypes.bfloat16:
            raise ConfigError(
                f"checkpoint {str(self.path)!r}: {name} is {array.dtype}, {_NO_FLOAT}"
            )
        if not np.all(np.isfinite(array)):
            raise ConfigError(f"checkpoint {str(self.path)!r}: {name} has NaN or infinite values")
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def _missing(path: Path, error: ImportError) -> ConfigError:
    return ConfigError(
        f"{str(path)!r} needs {error.name}, which is not installed: "
        f"pip install 'hnet-jax[{error.name}]'"
    )


Opened = tuple[dict[str, tuple[int, ...]], Callable[[str], np.ndarray]]


def _open_torch(path: Path) -> Opened:
    file = TorchFile(path)
    state = file.content
    if not isinstance(state, dict) or not state:
        raise ConfigError(f"checkpoint {str(path)!r} holds no dictionary of tensors")
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ConfigError(
                f"checkpoint {str(path)!r} holds {type(tensor).__name__} {name[:80]!r}: "
                "give a plain state dict, of tensors only"
            )
    return {name: tensor.shape for name, tensor in state.items()}, lambda n: file.read(state[n])


def _open_safetensors(path: Path) -> Opened:
    from safetensors import safe_open

    def opened():
        return safe_open(path, framework="np", backend="pread")

    with opened() as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}

    def read(name: str) -> np.ndarray:
        with opened() as file:
            return file.get_tensor(name)

    return shapes, read


def _open_npz(path: Path) -> Opened:
    shapes = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            with archive.open(member) as file:
                start = io.BytesIO(file.read(_MOST_HEADER))
            version = np.lib.format.read_magic(start)
            header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, _, dtype = header(start)
            name = member.removesuffix(".npy")
            if dtype.kind != "f":  # numpy would read it, whatever its size
                raise ConfigError(f"checkpoint {str(path)!r}: {name} is {dtype}, {_NO_FLOAT}")
            shapes[name] = shape

    def read(name: str) -> np.ndarray:
        with np.load(path, allow_pickle=False) as file:
            return file[name]

    return shapes, read


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a new file in the format given by its suffix. Raises ConfigError if it exists.

    The file gets its name only when it is complete.
    """
    if not is_tensor_file(path):
        raise ConfigError(f"{str(path)!r} is of no known format: use {', '.join(FORMATS)}")
    new_file(path, "target")
    try:
        with one_line(path, "target"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent) as folder:
                partial = Path(folder) / path.name
                _write(partial, tensors)
                try:
                    os.link(partial, path)  # unlike a rename, fails if the target exists
                except PermissionError:  # a file system without links
                    partial.rename(path)
    except ConfigError:
        raise
    except ImportError as e:
        raise _missing(path, e) from None
    except Exception as e:  # each library raises its own errors for a full disk
        raise ConfigError(f"target={str(path)!r} cannot be written: {_reason(e)}") from None


def _write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    match path.suffix.lower():
        case ".npz":
            _write_npz(path, tensors)
        case ".safetensors":
            from safetensors.numpy import save_file

            save_file(tensors, path)
        case ".pt":
            _write_torch(path, tensors)
        case suffix:
            raise ValueError(suffix)


def _write_npz(path: Path, tensors: dict[str, np.ndarray]) -> None:
    if any(array.dtype == ml_dtypes.bfloat16 for array in tensors.values()):
        raise ConfigError(f"{str(path)!r}: .npz has no bfloat16: use .safetensors, or float32")
    with open(path, "wb") as file:  # numpy adds a suffix to other names, such as X.NPZ
        np.savez(file, **tensors)


def _write_torch(path: Path, tensors: dict[str, np.ndarray]) -> None:
    import torch

    def tensor(array: np.ndarray):
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    torch.save({name: tensor(array) for name, array in tensors.items()}, path)
