"""Convert checkpoints between formats, in about the memory of one copy, and compare two."""

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hnet.checkpoint import manifest
from hnet.checkpoint.save import Checkpointer
from hnet.checkpoint.step_folders import checkpoint_folder
from hnet.checkpoint.verify import read_arrays
from hnet.config import HNetConfig
from hnet.data.config import DataConfig
from hnet.errors import ConfigError
from hnet.fields import to_json
from hnet.interop.load import check_average, load
from hnet.model import HNetLM, split
from hnet.outputs import new_file, write_new
from hnet.train.config import CheckpointConfig, Config
from hnet.train.workdir import claim_workdir, read_config
from hnet.weights.file import DType, WeightFile, dtypes, shown
from hnet.weights.official import Leaf, check_official, check_runs, entries, leaves
from hnet.weights.own import own_json, own_leaves
from hnet.weights.sources import Source, resolve
from hnet.weights.tensors import FORMATS, is_tensor_file, write_tensors


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    config: str | os.PathLike | None = None,
    dtype: DType | None = None,
    step: int | None = None,
    ema: bool = False,
) -> None:
    """Convert a work directory or an official file to an official file, or an official file to a
    work directory. Arguments as in `load`; with dtype None every bit is kept.

    The configuration is written to the same folder as the weights. Raises ConfigError if the target
    exists, or for any input that `load` refuses.
    """
    target = Path(target)
    new_file(target, "target")
    is_file = is_tensor_file(target)
    if is_file:
        new_file(target.with_suffix(".json"), "target")
    found = resolve(source, step)
    if found.is_run and not is_file:
        raise ConfigError(
            f"{str(target)!r} and {str(source)!r} are both work directories: "
            f"give a target that ends in {', '.join(FORMATS)}"
        )
    if not is_file:
        if ema:
            raise ConfigError(f"ema=True: {str(source)!r} is no work directory, which may hold one")
        _write_workdir(target, WeightFile.open(found.path, config).model(dtype))
        return
    exported = export(found, config=config, dtype=dtype, ema=ema)
    write_tensors(target, exported.tensors)
    content = json.dumps(exported.content, indent=1) + "\n"
    write_new(target.with_suffix(".json"), content, "target")


class Exported(NamedTuple):
    """Weights as a file holds them."""

    tensors: dict[str, np.ndarray]
    content: dict[str, Any]
    """of the JSON beside them"""
    config: HNetConfig
    step: int | None
    """of the run that they are from"""


def export(
    source: Source,
    *,
    config: str | os.PathLike | None = None,
    dtype: DType | None = None,
    ema: bool = False,
    own_form: bool = False,
) -> Exported:
    """Read all weights of a source, in the official form.

    own_form: a model without an official form comes in ours. Raises ConfigError for one without an
    official form otherwise, and for whatever `load` refuses.
    """
    cast = _caster(dtype)
    if source.is_run:
        if config is not None:
            raise ConfigError(f"config: {source.path!r} is a work directory and has its own")
        return _export_run(source, cast, own_form, ema)
    if ema:
        raise ConfigError(f"ema=True: {source.path!r} is no work directory, which may hold one")
    weights = WeightFile.open(source.path, config)
    if weights.is_official:
        content = weights.config.to_json()
        check_runs(weights.config)
    else:
        content = own_json(weights.config)
    names = shown(f"reading {source.path}")(list(weights.file))
    tensors = {name: cast(name, weights.file[name]) for name in names}
    return Exported(tensors, content, weights.config, None)


def _export_run(source: Source, cast: Callable, own_form: bool, ema: bool) -> Exported:
    run = read_config(source.path)
    check_average(run, source.path, ema)
    if run.data.tokenizer:
        raise ConfigError(
            f"{source.path!r} is a model of the tokens of {run.data.tokenizer!r}, and "
            "weights are read as a model of bytes: keep its work directory"
        )
    model = run.model
    try:
        check_official(model)
        content, wanted = model.to_json(), leaves(model)
        check_runs(model)
    except ConfigError:
        if not own_form:
            raise
        content, wanted = own_json(model), own_leaves(model)
    with Checkpointer(source.path, CheckpointConfig(asynchronous=False)) as checkpointer:
        record = checkpointer.manifest(source.step)
    # Largest first: while a large one is held twice, few others have been read.
    wanted = sorted(wanted, key=lambda leaf: -math.prod(leaf.shape))
    arrays = _read_leaves(source.path, record, wanted, "ema" if ema else "params")
    is_official = "arch_layout" in content
    named = entries(model, arrays) if is_official else ((leaf.names[0], a) for leaf, a in arrays)
    tensors = {name: cast(name, array) for name, array in named}
    return Exported(tensors, content, model, record.step)


def _caster(dtype: DType | None):
    """Return a function (official name, array) -> array in the dtype that `load` would use."""
    if dtype is None:
        return lambda name, array: array
    dtype_of = dtypes(dtype)

    def cast(name: str, array: np.ndarray) -> np.ndarray:
        is_matrix = name.endswith(".weight") and array.ndim == 2
        path = (*name.split(".")[:-1], "kernel" if is_matrix else "scale")
        return array.astype(dtype_of(path))

    return cast


def _read_leaves(
    workdir: str, record: manifest.Manifest, wanted: list[Leaf], tree: str
) -> Iterator[tuple[Leaf, np.ndarray]]:
    """The parameters of a checkpoint one by one, their checksums compared."""
    folder = checkpoint_folder(workdir) / str(record.step)
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
        for leaf in shown(f"reading {folder}")(wanted):
            path = "/".join([tree, *map(str, leaf.path)])
            if tuple(record.leaves.get(path, {}).get("shape", ())) != leaf.shape:
                raise ConfigError(f"checkpoint {folder} has no {path} of shape {leaf.shape}")
            try:
                arrays = read_arrays(orbax, folder, record, {path: None})
            except manifest.Damaged as e:
                raise ConfigError(f"checkpoint {folder}: {e}") from None
            yield leaf, arrays.pop(path)  # released before the next one is read


def _write_workdir(target: Path, model: HNetLM) -> None:
    """Write a work directory with the model as its checkpoint of step 0."""
    data = DataConfig(bos_eos=model.bos)
    config = Config(model=model.config, workdir=str(target), data=data)
    claim_workdir(config)
    _, params = split(model)
    with Checkpointer(target, CheckpointConfig(asynchronous=False)) as checkpointer:
        checkpointer.save(0, {"params": params}, {"config": to_json(config)})


@dataclass(frozen=True)
class Comparison:
    """Difference of two models on the same bytes."""

    max_difference: float
    """largest absolute difference of two logits"""
    max_logit: float
    """largest absolute logit of the first model, for scale"""
    other_boundaries: int
    """number of positions, over all stages, where only one of the models has a boundary"""
    positions: int
    """number of bytes compared"""


def verify(
    first: str | os.PathLike,
    second: str | os.PathLike,
    *,
    config: str | os.PathLike | None = None,
    rows: int = 4,
    length: int = 256,
) -> Comparison:
    """Compare the logits of two checkpoints, loaded one after the other, on the same bytes.

    Half of the rows are text-like (few byte values, spaces), half uniform. config: configuration
    for official files; default: the JSON in the same folder.
    """
    sources = [resolve(path) for path in (first, second)]
    if config is not None and all(source.is_run for source in sources):
        raise ConfigError(f"config={os.fspath(config)!r}: both are work directories with their own")
    for source in sources:  # raises before the first is loaded
        if not source.is_run:
            WeightFile.open(source.path, config)
    rng = np.random.default_rng(0)
    ids_BL = rng.integers(0, 256, (rows, length)).astype(np.int32)
    ids_BL[::2] = rng.choice(np.frombuffer(b"  aeiounrst,.\n", np.uint8), ids_BL[::2].shape)
    answers = []
    for source in sources:
        own = None if source.is_run else config
        answers.append(_answer(load(source.path, step=source.step, config=own), ids_BL))
    (a, masks_a), (b, masks_b) = answers
    if a.shape != b.shape or len(masks_a) != len(masks_b):
        raise ConfigError(
            f"{os.fspath(first)!r} and {os.fspath(second)!r} are of different architectures: "
            f"{len(masks_a)} and {len(masks_b)} stages that cut, vocabularies of {a.shape[-1]} "
            f"and {b.shape[-1]}"
        )
    return Comparison(
        float(np.max(np.abs(a - b))),
        float(np.max(np.abs(a))),
        sum(int(np.sum(x != y)) for x, y in zip(masks_a, masks_b)),
        rows * length,
    )


def _answer(model: HNetLM, ids_BL: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    graph, params = split(model)
    del model

    @jax.jit
    def forward(params, ids_BL):
        logits_BLV, routes = nnx.merge(graph, params)(ids_BL)
        return logits_BLV, [route.boundary_mask_BL for route in routes]

    return jax.device_get(forward(params, jnp.asarray(ids_BL)))
