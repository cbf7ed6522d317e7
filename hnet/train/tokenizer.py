"""The tokenizer that a run learns from its own training text (`data.tokenizer="bpe:2048"`).

It is kept in the work directory, where later starts and all tools find it. So config.json names its
file, and the fingerprints of the inputs cover its content.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from hnet.checkpoint.step_folders import work_folder
from hnet.data import open_corpus
from hnet.data.tokenizers import SAMPLE_BYTES, Wanted, wanted
from hnet.errors import ConfigError
from hnet.files import read_json
from hnet.outputs import write_new
from hnet.runtime.distributed import host_id, on_first_host
from hnet.train.config import Config
from hnet.train.lock import DirectoryLock

FILE, LEARNED = "tokenizer.json", "tokenizer_source.json"


@contextlib.contextmanager
def with_tokenizer(config: Config) -> Iterator[Config]:
    """`config` with the file of the tokenizer that it asks for, learned at the first start.

    If the start is refused inside the context, the file is removed again. Raises ConfigError if the
    work directory holds another run, or a tokenizer of another kind.
    """
    if not (asked := wanted(config.data.tokenizer)):
        yield config
        return
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
    folder = Path(work_folder(config.workdir))
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        on_first_host("tokenizer", lambda: _learn(folder, config, asked))
        yield replace(config, data=replace(config.data, tokenizer=str(folder / FILE)))
    except ConfigError:
        with contextlib.suppress(ConfigError, OSError):  # another start may hold the directory
            if host_id() == 0:
                with DirectoryLock(config.workdir):
                    _undo(folder)
                for made in missing:
                    made.rmdir()
        raise


def _learn(folder: Path, config: Config, asked: Wanted) -> None:
    name = config.data.tokenizer
    with DirectoryLock(config.workdir):
        had, has_begun = _source(folder), (folder / "config.json").exists()
        if had == name and (folder / FILE).exists():
            return
        if has_begun and had is not None:
            raise ConfigError(
                f"data.tokenizer={name!r}, but the run in workdir={config.workdir} learned "
                f"{had!r}: use that, or another workdir"
            )
        if has_begun or (had is None and os.path.lexists(folder / FILE)):
            raise ConfigError(
                f"data.tokenizer={name!r}: workdir={config.workdir} holds another run or "
                "tokenizer: use another workdir"
            )
        learned = asked.train(open_corpus(config.data).train.beginning(SAMPLE_BYTES))
        _undo(folder)  # what a start left that was killed before its run began
        write_new(folder / LEARNED, json.dumps({"tokenizer": name}), "workdir")
        write_new(folder / FILE, learned, "workdir")


def _source(folder: Path) -> str | None:
    """The `data.tokenizer` whose file an earlier start learned; None if none did."""
    if not os.path.lexists(folder / LEARNED):
        return None
    found = read_json(folder / LEARNED)
    if not isinstance(found, dict) or not isinstance(found.get("tokenizer"), str):
        raise ConfigError(f"{folder / LEARNED} names no tokenizer: restore or remove it")
    return found["tokenizer"]


def _undo(folder: Path) -> None:
    """Remove what `_learn` wrote, unless a run has begun with it."""
    if not (folder / "config.json").exists() and _source(folder) is not None:
        for name in (FILE, LEARNED):
            (folder / name).unlink(missing_ok=True)
