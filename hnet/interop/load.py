"""Load models from our work directories and official checkpoints."""

import os
from dataclasses import replace

import jax
from flax import nnx

from hnet.checkpoint.save import Checkpointer
from hnet.config import HNetConfig
from hnet.errors import ConfigError
from hnet.model import HNetLM, abstract
from hnet.nn.kernels.table import with_dtypes, without
from hnet.train.config import CheckpointConfig, Config
from hnet.train.workdir import check_tokenizer, read_config, tokenizer_of
from hnet.weights.file import DType, WeightFile, dtypes
from hnet.weights.sources import resolve


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

    path: a work directory of ours, `WORKDIR@STEP` or `WORKDIR/checkpoints/STEP`, a file of weights
    (.pt, .safetensors, .npz), a folder with one, or `hf://owner/name[@revision]`. config: of
    weights in a file, as an object or its JSON; default is `NAME.json`, `NAME_config.json` or
    `config.json` in the same folder. dtype: dtype of the matmuls and their weights (default: as
    configured; float32 for files); parameters that need float32 keep it. step: step of a work
    directory; default: the newest. bos: whether its texts begin with byte 254; default: as the run
    was trained, True for files, which do not say. ema: load the moving average of a run's
    parameters instead of the parameters.

    Raises ConfigError for a missing, damaged or malicious file, or for another architecture.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise ConfigError(f"dtype={dtype!r}: use 'float32' or 'bfloat16'")
    source = resolve(path, step)
    if source.is_run:
        if config is not None:
            raise ConfigError(f"config: {source.path!r} is a work directory and has its own")
        model = _load_workdir(source.path, dtype, source.step, ema)
        model.bos = model.bos if bos is None else bos
        return model
    if ema:
        raise ConfigError(f"ema=True: {source.path!r} is no work directory, which may hold one")
    weights = WeightFile.open(source.path, config)
    if dtype:
        compute = replace(weights.config.compute, dtype=dtype)
        weights = weights._replace(config=replace(weights.config, compute=compute))
    model = weights.model(dtype)
    model.bos = bos is not False
    return model


def check_average(config: Config, workdir: str | os.PathLike, ema: bool) -> None:
    """Raise ConfigError if the average of the parameters is wanted of a run that has none."""
    if ema and not config.optim.ema_decay:
        raise ConfigError(
            f"ema=True: the run in {os.fspath(workdir)!r} kept no average (optim.ema_decay=0.0)"
        )


def _load_workdir(
    path: str | os.PathLike, dtype: DType | None, step: int | None, ema: bool
) -> HNetLM:
    trained = read_config(path)
    check_average(trained, path, ema)
    compute = without(trained.model.compute)
    if dtype:
        compute = replace(compute, dtype=dtype, matmul_inputs="auto")
    else:
        compute = with_dtypes(compute, jax.default_backend())
    config = replace(trained.model, compute=compute)
    graph, params = abstract(config)
    with Checkpointer(path, CheckpointConfig(asynchronous=False)) as checkpointer:
        params = checkpointer.restore(params, step, only="ema" if ema else "params").state
    dtype_of = dtypes(dtype)
    cast = lambda keys, leaf: leaf.astype(dtype_of(tuple(key.key for key in keys)))
    model = nnx.merge(graph, jax.tree_util.tree_map_with_path(cast, params))
    check_tokenizer(path, trained.data)
    model.bos, model.tokenizer = trained.data.bos_eos, tokenizer_of(path, trained.data)
    return model
