"""Weights that a run can start from, read parameter by parameter: of a run, or official ones."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from hnet.checkpoint import manifest, step_folders
from hnet.checkpoint.save import Checkpointer
from hnet.checkpoint.settings import CheckpointConfig
from hnet.checkpoint.verify import groups, read_arrays
from hnet.config import HNetConfig
from hnet.data import DataConfig
from hnet.errors import ConfigError
from hnet.train.workdir import read_config
from hnet.weights.file import WeightFile
from hnet.weights.official import EMBEDDING, HEAD, leaves, to_ours
from hnet.weights.own import own_leaves
from hnet.weights.sources import Source, resolve

FIELD = "init.from"

Shapes = dict[str, tuple[int, ...]]
"""shape of each parameter by its path, such as "backbone/encoder/rmsnorm/scale\""""


class Weights(Protocol):
    """Parameters of a checkpoint. A file is not read before `read` is called."""

    name: str
    """the checkpoint in words, with its step"""
    shapes: Shapes

    def read(
        self, shardings: Mapping[str, jax.sharding.Sharding]
    ) -> Iterable[tuple[str, jax.Array]]:
        """Yield (path, array) of these parameters in some order; the bits are verified if the
        checkpoint has checksums. Raises ConfigError for damaged files."""


def described(given: str) -> tuple[HNetConfig, DataConfig]:
    """Architecture of weights, and the data settings of their run.

    Official weights do not say whether their texts began with BOS; as in `load`, they did. Raises
    ConfigError.
    """
    source = resolve(given, field=FIELD)
    if not source.is_run:
        return WeightFile.open(source.path).config, DataConfig()
    config = read_config(source.path)
    return config.model, config.data


def open_weights(given: str, ema: bool = False) -> Weights:
    """The weights of a path (`resolve`). Raises ConfigError if they are missing or damaged.

    ema: take the moving average of a run's parameters. All processes of a run make the same calls.
    """
    source = resolve(given, field=FIELD)
    if ema and not source.is_run:
        raise ConfigError(
            f"init.ema=True: init.from={given!r} is a file, and only a run keeps an average: use "
            "False, or a work directory"
        )
    return _Run(given, source, ema) if source.is_run else _File(Path(source.path))


class _Run:
    """Parameters of a checkpoint of a run."""

    def __init__(self, given: str, at: Source, ema: bool):
        self.folder = step_folders.checkpoint_folder(at.path)
        with Checkpointer(at.path, CheckpointConfig(asynchronous=False)) as checkpointer:
            self.manifest = checkpointer.manifest(at.step)
        self.folder /= str(self.manifest.step)
        if why := step_folders.why_not(self.folder):
            raise ConfigError(f"init.from={given!r}: {why}")
        self.name = f"{at.path}, step {self.manifest.step}{', moving average' if ema else ''}"
        below = self.below = "ema/" if ema else "params/"
        self.shapes = {
            path.removeprefix(below): tuple(leaf["shape"])
            for path, leaf in self.manifest.leaves.items()
            if path.startswith(below)
        }
        if not self.shapes:
            raise ConfigError(
                f"init.ema=True: the run in init.from={given!r} kept no average "
                "(optim.ema_decay=0.0): use False"
            )

    def read(self, shardings):
        import orbax.checkpoint as ocp

        wanted = {f"{self.below}{path}": sharding for path, sharding in shardings.items()}
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
            for group in groups({path: self.manifest.leaves[path] for path in wanted}):
                own = {path: wanted[path] for path in group}
                try:
                    arrays = read_arrays(orbax, self.folder, self.manifest, own)
                except manifest.Damaged as e:
                    raise ConfigError(f"checkpoint {self.folder}: {e}") from None
                except Exception as e:  # Orbax raises many types for damaged files
                    why = f"it cannot be read ({manifest.first_line(e)})"
                    raise ConfigError(f"checkpoint {self.folder}: {why}") from None
                for path in group:
                    yield path.removeprefix(self.below), arrays.pop(path)


class _File:
    """Parameters of an official file, or of one in our own form."""

    def __init__(self, path: Path):
        opened = WeightFile.open(str(path))
        self.name, self.file, config = str(path), opened.file, opened.config
        self.is_official = opened.is_official
        if self.is_official and config.tie_embeddings and HEAD in self.file.shapes:
            if not np.array_equal(self.file[HEAD], self.file[EMBEDDING]):
                raise ConfigError(f"{path}: {HEAD} differs from {EMBEDDING}, to which it is tied")
        found = leaves(config) if self.is_official else own_leaves(config)
        self.leaves = {"/".join(map(str, leaf.path)): leaf for leaf in found}
        self.shapes = {path: leaf.shape for path, leaf in self.leaves.items()}

    def read(self, shardings):
        for path, sharding in shardings.items():
            leaf = self.leaves[path]
            layers = [self.file[name] for name in leaf.names]
            if self.is_official:
                layers = [to_ours(leaf.path, layer) for layer in layers]
            array = np.stack(layers) if leaf.is_stacked else np.ascontiguousarray(layers[0])
            yield path, jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
