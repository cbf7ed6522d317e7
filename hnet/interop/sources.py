"""What a path of weights means: a run, a step of it, a file with its JSON, a folder of the Hub."""

import os
from pathlib import Path
from typing import NamedTuple

from hnet.config import PUBLISHED, HNetConfig
from hnet.errors import ConfigError
from hnet.interop.hub import fetch, is_address
from hnet.interop.tensors import FORMATS
from hnet.outputs import one_line


class Source(NamedTuple):
    """Weights on this machine, or in a bucket; see `resolve`."""

    path: str
    """a work directory, or a file of weights"""
    step: int | None
    """of a work directory; None is its newest one, or a file"""
    is_run: bool
    """whether it is a work directory"""


def resolve(path: str | os.PathLike, step: int | None = None) -> Source:
    """What to read for a path: `load(source.path, step=source.step)` is the model.

    path: a work directory, its `checkpoints/<step>`, a file of weights (.pt, .safetensors, .npz), a
    folder with one such file, or `hf://owner/name[@revision]`, which is downloaded into the cache
    of the Hub's library. step: of a work directory. Nothing is loaded. Raises ConfigError, also
    for a path that does not exist.
    """
    path = os.fspath(path)
    if is_address(path):
        return _file(str(fetch(path)), step)
    if "://" in path:  # a work directory in a bucket
        return Source(path, step, True)
    with one_line(path, "checkpoint"):
        os.stat(path)
    if not os.path.isdir(path):
        return _file(path, step)
    folder = Path(path)
    absolute = folder.absolute()
    if absolute.name.isdecimal() and absolute.parent.name == "checkpoints":
        if step not in (None, int(absolute.name)):
            raise ConfigError(f"checkpoint={path!r} is a step, and step={step} another: give one")
        return Source(str(folder / ".." / ".."), int(absolute.name), True)
    files = [entry.name for entry in folder.iterdir() if entry.suffix in FORMATS]
    if files and not (folder / "checkpoints").exists():
        return _file(str(folder / weights_among(files, path)), step)
    return Source(path, step, True)


def _file(path: str, step: int | None) -> Source:
    if step is not None:
        raise ConfigError(f"checkpoint={path!r} is a file, which has no step={step}: leave it out")
    return Source(path, None, False)


def weights_among(names: list[str], where: str) -> str:
    """The file of weights of a folder. Raises ConfigError if that is not clear."""
    found = [n for n in names if "/" not in n and n.endswith(FORMATS)]
    if "model.safetensors" in found:
        return "model.safetensors"
    if len(found) != 1:
        raise ConfigError(
            f"checkpoint={where!r} has {len(found)} files of weights "
            f"({', '.join(sorted(found)[:4]) or 'none'}): name one, or call it model.safetensors"
        )
    return found[0]


def json_names(weights: str) -> list[str]:
    """Names of the JSON that may belong to a file of weights, best first."""
    stem = Path(weights).stem
    return [f"{stem}.json", f"{stem.removesuffix('_params')}_config.json", "config.json"]


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
