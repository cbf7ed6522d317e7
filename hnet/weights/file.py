"""A file of weights with the network that it fits, read tensor by tensor."""

import os
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import jax.numpy as jnp
from rich.console import Console
from rich.progress import track

from hnet.config import HNetConfig
from hnet.files import read_json
from hnet.model import HNetLM
from hnet.weights.official import assemble, check_fit
from hnet.weights.own import assemble_own, check_own, config_of_own, is_own
from hnet.weights.sources import beside
from hnet.weights.tensors import TensorFile

DType = Literal["float32", "bfloat16"]


class WeightFile(NamedTuple):
    """A file of weights and the network that it fits."""

    file: TensorFile
    config: HNetConfig
    is_official: bool
    """whether names and layouts are the official ones, or ours"""

    @classmethod
    def open(cls, path: str, config: str | os.PathLike | HNetConfig | None = None) -> "WeightFile":
        """Open a file without reading its tensors. Raises ConfigError if it does not fit."""
        file = TensorFile(path)
        config = beside(file.path) if config is None else config
        content = None if isinstance(config, HNetConfig) else read_json(config, "configuration")
        if is_own(content):
            model = config_of_own(content)
            check_own(model, file.shapes)
            return cls(file, model, False)
        if content is not None:
            config = HNetConfig.from_json(config)
        check_fit(config, file.shapes)
        return cls(file, config, True)

    def model(self, dtype: DType | None = None) -> HNetLM:
        """The model, whose tensors are read one by one."""
        make = assemble if self.is_official else assemble_own
        bar = shown(f"reading {self.file.path}")
        return make(self.config, self.file, progress=bar, dtype_of=dtypes(dtype))


def dtypes(dtype: DType | None) -> Callable[[tuple], jnp.dtype]:
    """Return path -> dtype: `dtype` for embeddings and the matmuls of stacks, else float32."""

    def dtype_of(path: tuple):
        in_float32 = {"routing_module", "residual_proj"} & {str(part) for part in path}
        is_matrix = path[-1] in ("kernel", "embedding") and not in_float32
        return jnp.dtype(dtype if dtype and is_matrix else "float32")

    return dtype_of


def shown(what: str) -> Callable[[list], Iterable]:
    """A progress bar on stderr if it is a terminal; otherwise nothing is shown."""
    console = Console(stderr=True)
    return lambda items: track(
        items, what, console=console, transient=True, disable=not console.is_terminal
    )
