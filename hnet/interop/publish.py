"""Folders of the Hub: weights, configuration and a model card, both ways."""

import json
import os
import shutil
import tempfile
from pathlib import Path

from hnet.errors import ConfigError
from hnet.interop.card import make_card
from hnet.interop.convert import export
from hnet.outputs import new_file, one_line
from hnet.train.metrics_file import read_metrics
from hnet.train.workdir import read_config
from hnet.weights import hub
from hnet.weights.file import DType, WeightFile
from hnet.weights.sources import resolve
from hnet.weights.tensors import write_tensors


def push(
    source: str | os.PathLike,
    address: str,
    *,
    config: str | os.PathLike | None = None,
    dtype: DType | None = None,
    step: int | None = None,
    ema: bool = False,
    private: bool = False,
    replace_card: bool = False,
) -> str:
    """Put a model on the Hub, in one commit; returns the address of that commit.

    source, config, dtype, step, ema: as in `convert`. address: `hf://owner/name[@branch]`. A model
    with an official form is written in it, another one in ours. A model card that is there is kept,
    unless `replace_card`. Raises ConfigError; nothing is sent before all of it is written.
    """
    repository, _ = hub.parse(address)
    hub.check_library(address)
    found = resolve(source, step)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        exported = export(found, config=config, dtype=dtype, ema=ema, own_form=True)
        count = sum(array.size for array in exported.tensors.values())
        if exported.config.tie_embeddings and "lm_head.weight" in exported.tensors:
            count -= exported.tensors["lm_head.weight"].size  # stored twice
        write_tensors(folder / "model.safetensors", exported.tensors)
        (folder / "config.json").write_text(json.dumps(exported.content, indent=1) + "\n")
        run = {}
        if found.is_run:
            rows = read_metrics(found.path)
            run = {"run": read_config(found.path), "step": exported.step, "rows": rows}
        (folder / "README.md").write_text(make_card(repository, exported.config, count, **run))
        return hub.upload(address, folder, private=private, replace_card=replace_card)


def pull(address: str, target: str | os.PathLike) -> Path:
    """Copy the weights of a repository, their JSON and model card into a new folder.

    Raises ConfigError, also for weights that do not fit their JSON; nothing is left then.
    """
    hub.parse(address)
    new_file(target, "target")
    weights = hub.fetch(address)
    WeightFile.open(str(weights))
    with one_line(target, "target"):
        target = Path(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".pull-", dir=target.parent) as name:
            folder = Path(name) / "folder"
            folder.mkdir()
            for file in weights.parent.iterdir():
                if file == weights or file.suffix == ".json" or file.name == "README.md":
                    shutil.copyfile(file, folder / file.name)
            if os.path.lexists(target):
                raise ConfigError(f"target={str(target)!r} exists: choose another name")
            folder.rename(target)
    return target
