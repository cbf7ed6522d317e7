"""Load models from our work directories and official checkpoints."""

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console
from rich.progress import track

from hnet.checkpoint.save import Checkpointer
from hnet.config import HNetConfig
from hnet.errors import ConfigError
from hnet.interop.official import assemble, check_fit
from hnet.interop.tensors import TensorFile
from hnet.model import HNetLM, abstract
from hnet.nn.kernels.table import without
from hnet.train.config import CheckpointConfig, Config
from hnet.train.workdir import read_config

DType = Literal["float32", "bfloat16"]


def load(
    path: str | os.PathLike,
    *,
    config: str | os.PathLike | HNetConfig | None = None,
    dtype: DType | None = None,
    step: int | None = None,
    bos: bool | None = None,
    ema: bool = False,
) -> HNetLM:
    """Load a trained model.

    path: one of our work directories, or an official state dict (.pt, .safetensors, .npz). config:
    configuration of a state dict, as an object or a path to its official JSON; default: `NAME.json`
    or `NAME_config.json` in the same folder. dtype: dtype of the matmuls and their weights
    (default: as configured; float32 for official files); parameters that need float32 keep it.
    step: step of a work directory; default: the newest. bos: whether its texts begin with byte 254;
    default: as the run was trained, True for official files, which do not say. ema: load the moving
    average of a run's parameters instead of the parameters.

    Raises ConfigError for a missing, damaged or malicious file, or for another architecture.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise ConfigError(f"dtype={dtype!r}: use 'float32' or 'bfloat16'")
    if os.path.isdir(path) or "://" in os.fspath(path):
        model = _load_workdir(path, dtype, step, ema)
        model.bos = model.bos if bos is None else bos
        return model
    if ema:
        raise ConfigError(f"ema=True: {os.fspath(path)!r} is no work directory, which may hold one")
    file = TensorFile(path)
    if not isinstance(config, HNetConfig):
        config = HNetConfig.from_json(config or beside(file.path))
    check_fit(config, file.shapes)
    if dtype:
        config = replace(config, compute=replace(config.compute, dtype=dtype))
    model = assemble(config, file, progress=shown(str(path)), dtype_of=dtypes(dtype))
    model.bos = bos is not False
    return model


def check_average(config: Config, workdir: str | os.PathLike, ema: bool) -> None:
    """Raise ConfigError if the average of the parameters is wanted of a run that has none."""
    if ema and not config.optim.ema_decay:
        raise ConfigError(
            f"ema=True: the run in {os.fspath(workdir)!r} kept no average (optim.ema_decay=0.0)"
        )


def beside(path: Path) -> Path:
    """The official JSON in the folder of a weights file. Raises ConfigError if there is none."""
    names = [f"{path.stem}.json", f"{path.stem.removesuffix('_params')}_config.json"]
    for name in names:
        if (found := path.with_name(name)).is_file():
            return found
    raise ConfigError(
        f"checkpoint {str(path)!r} has no {' or '.join(names)} beside it: give its configuration"
    )


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


def _load_workdir(
    path: str | os.PathLike, dtype: DType | None, step: int | None, ema: bool
) -> HNetLM:
    trained = read_config(path)
    check_average(trained, path, ema)
    config = replace(trained.model, compute=without(trained.model.compute))
    if dtype:
        config = replace(config, compute=replace(config.compute, dtype=dtype))
    graph, params = abstract(config)
    with Checkpointer(path, CheckpointConfig(asynchronous=False)) as checkpointer:
        params = checkpointer.restore(params, step, only="ema" if ema else "params").state
    dtype_of = dtypes(dtype)
    cast = lambda keys, leaf: leaf.astype(dtype_of(tuple(key.key for key in keys)))
    model = nnx.merge(graph, jax.tree_util.tree_map_with_path(cast, params))
    model.bos = trained.data.bos_eos
    return model
