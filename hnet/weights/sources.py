"""What a path of weights means: a run, a step of it, a file with its JSON, a folder of the Hub."""

import os
from pathlib import Path
from typing import NamedTuple

from hnet.checkpoint.step_folders import list_saved, split_step, work_folder
from hnet.config import PUBLISHED, HNetConfig
from hnet.errors import ConfigError, shown
from hnet.outputs import one_line
from hnet.weights.hub import fetch, is_address
from hnet.weights.names import json_names, weights_among
from hnet.weights.tensors import FORMATS, is_tensor_file


class Source(NamedTuple):
    """Weights on this machine, or in a bucket; see `resolve`."""

    path: str
    """a work directory, or a file of weights"""
    step: int | None
    """of a work directory; None is its newest one, or a file"""
    is_run: bool
    """whether it is a work directory"""


def resolve(path: str | os.PathLike, step: int | None = None, *, field="checkpoint") -> Source:
    """What to read for a path: `load(source.path, step=source.step)` is the model.

    path: a work directory, `WORKDIR@STEP` or `WORKDIR/checkpoints/STEP`, a file of weights (.pt,
    .safetensors, .npz), a folder with one such file, or `hf://owner/name[@revision]`, which is
    downloaded into the cache of the Hub's library. step: of a work directory. field: setting that
    errors name. Nothing is loaded. Raises ConfigError, also for a path that does not exist.
    """
    given = os.fspath(path)
    if not given:
        raise ConfigError(f"{field}='' is no path: give one")
    if is_address(given):
        return _file(str(fetch(given)), step, field)
    workdir, own = split_step(given)
    if None not in (step, own) and step != own:
        raise ConfigError(f"{field}={given!r} is a step, and step={step} another: give one")
    step = step if own is None else own
    with one_line(given, field):
        folder = work_folder(workdir)
        is_folder = folder.is_dir()
        if not is_folder and folder.exists() and own is None:
            return _file(given, step, field)
        names = [entry.name for entry in folder.iterdir()] if is_folder else []
    if not is_folder:
        raise ConfigError(
            f"{field}={shown(given)} does not exist: give a work directory, WORKDIR@STEP, or a "
            f"file that ends in {', '.join(FORMATS)}"
        )
    if any(map(is_tensor_file, names)) and "checkpoints" not in names:
        return _file(os.path.join(workdir, weights_among(names, given)), step, field)
    if "config.json" not in names:
        raise ConfigError(f"{field}={given!r} has no config.json: it is no work directory")
    if step is not None and step not in (steps := list_saved(folder / "checkpoints")):
        raise ConfigError(f"{field}={given!r}: there is no checkpoint of step {step}: {steps}")
    return Source(workdir, step, True)


def resolve_run(path: str | os.PathLike, *, field="checkpoint") -> Source:
    """`resolve` for a work directory only. Raises ConfigError for a file of weights."""
    source = resolve(path, field=field)
    if not source.is_run:
        raise ConfigError(f"{field}={os.fspath(path)!r} is no work directory: give that of a run")
    return source


def _file(path: str, step: int | None, field: str) -> Source:
    if step is not None:
        raise ConfigError(f"{field}={path!r} is a file, which has no step={step}: leave it out")
    return Source(path, None, False)


def beside(path: Path) -> Path | HNetConfig:
    """The JSON that belongs to a file of weights, or the published size that it is named after.

    Raises ConfigError if there is neither.
    """
    names = json_names(path.name)
    for name in names:
        if (found := path.with_name(name)).is_file():
            return found
    if (size := path.stem.removeprefix("hnet_")) in PUBLISHED:
        return PUBLISHED[size]
    raise ConfigError(
        f"checkpoint {str(path)!r} has no {' or '.join(names)} beside it: give its configuration"
    )
