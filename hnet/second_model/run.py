"""A trained run as a second model: its network, its parameters, and whether its texts have BOS."""

import os
from functools import lru_cache
from typing import Any

import jax

from hnet.checkpoint.save import Checkpointer
from hnet.checkpoint.settings import CheckpointConfig
from hnet.checkpoint.step_folders import split_step
from hnet.chunking.upgrade import up_to_date
from hnet.config import HNetConfig
from hnet.fields import from_json
from hnet.files import read_object
from hnet.model import abstract


def is_run(checkpoint: str) -> bool:
    """Whether this is a work directory with a run, perhaps with a step (WORKDIR@STEP)."""
    return bool(checkpoint) and os.path.isfile(_settings_file(checkpoint))


def read_network(checkpoint: str) -> HNetConfig:
    """The network of a run. Raises ConfigError."""
    model = _settings(checkpoint)["model"]
    up_to_date(model)
    return from_json(HNetConfig, model, "model")


def reads_bos(checkpoint: str) -> bool:
    """Whether the texts of a run begin with the byte BOS. Raises ConfigError."""
    return from_json(bool, _settings(checkpoint)["data"].get("bos_eos", True), "data.bos_eos")


@lru_cache(maxsize=2)
def read_parameters(checkpoint: str, network: HNetConfig) -> dict:
    """Parameters of a run with this network, on the host. Raises ConfigError."""
    workdir, step = split_step(checkpoint)
    _, params = abstract(network)
    with Checkpointer(workdir, CheckpointConfig(asynchronous=False)) as checkpointer:
        return jax.device_get(checkpointer.restore(params, step, only="params").state)


def _settings(checkpoint: str) -> dict[str, Any]:
    return read_object(_settings_file(checkpoint), "configuration file", model=dict, data=dict)


def _settings_file(checkpoint: str) -> str:
    return f"{split_step(checkpoint)[0]}/config.json"
