"""The tokenizer that a run learns from its own training text (`data.tokenizer="bpe:2048"`).

It is kept in the work directory, where later starts and all tools find it. So config.json names its
file, and the fingerprints of the inputs cover its content.
"""

import json
from dataclasses import replace

from hnet.checkpoint.step_folders import work_folder
from hnet.data import open_corpus
from hnet.data.tokenizers import SAMPLE_BYTES, wanted
from hnet.errors import ConfigError
from hnet.fields import read_json
from hnet.outputs import write_new
from hnet.runtime.distributed import on_first_host
from hnet.train.config import Config

FILE, LEARNED = "tokenizer.json", "tokenizer_source.json"


def with_tokenizer(config: Config) -> Config:
    """`config` with the file of the tokenizer that it asks for, learned at the first start.

    Raises ConfigError if the work directory holds another run, or a tokenizer of another kind.
    """
    if not (asked := wanted(config.data.tokenizer)):
        return config
    if "://" in config.workdir:
        raise ConfigError(
            f"data.tokenizer={config.data.tokenizer!r} is learned into a local work directory: "
            f"workdir={config.workdir!r} is none, give the file of a tokenizer"
        )
    if asked.size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size}: data.tokenizer="
            f"{config.data.tokenizer!r} needs {asked.size}"
        )
    folder = work_folder(config.workdir)

    def learn() -> None:
        if (folder / LEARNED).exists():
            had = read_json(folder / LEARNED).get("tokenizer")
            if had != config.data.tokenizer:
                raise ConfigError(
                    f"data.tokenizer={config.data.tokenizer!r}, but the run in workdir="
                    f"{config.workdir} learned {had!r}: use that, or another workdir"
                )
            return
        if (folder / "config.json").exists() or (folder / FILE).exists():
            raise ConfigError(
                f"data.tokenizer={config.data.tokenizer!r}: workdir={config.workdir} holds another "
                "run or tokenizer: use another workdir"
            )
        texts = open_corpus(config.data).train.beginning(SAMPLE_BYTES)
        write_new(folder / FILE, asked.train(texts), "workdir")
        write_new(folder / LEARNED, json.dumps({"tokenizer": config.data.tokenizer}), "workdir")

    on_first_host("tokenizer", learn)
    return replace(config, data=replace(config.data, tokenizer=str(folder / FILE)))
