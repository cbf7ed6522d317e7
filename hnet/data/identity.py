"""Whether a run reads the text that it read before: by content, since files change in their place.

A start in a work directory, a sweep's points, the evaluation of a trained model: all open text by
its name, perhaps days apart. What they read is told by hashes, which are stored with the run.
"""

import hashlib
from collections.abc import Mapping

from hnet.data.config import DataConfig
from hnet.data.corpus import Corpus
from hnet.errors import ConfigError

NAMES = ("files", "eval_files", "eval_fraction", "eval_max_bytes", "tokenizer")
"""fields of `DataConfig` whose effect the hashes tell: two spellings of a path are one text"""
SPEED = ("num_workers", "prefetch_batches")
"""fields on which no batch depends"""

Inputs = Mapping[str, str]
"""what is read -> hash of its content"""


def inputs(config: DataConfig, corpus: Corpus) -> dict[str, str]:
    """Hashes of what a run reads by name. Raises ConfigError for an unreadable tokenizer."""
    found = {"data.files": corpus.fingerprint}
    if config.tokenizer:
        try:
            with open(config.tokenizer, "rb") as f:
                found["data.tokenizer"] = hashlib.file_digest(f, "blake2b").hexdigest()[:16]
        except OSError as e:
            raise ConfigError(
                f"data.tokenizer={config.tokenizer!r} cannot be read: {e.strerror}"
            ) from None
    return found


def check_inputs(before: Inputs | None, now: Inputs, reader: str, remedy: str) -> None:
    """Raise ConfigError if something was read by `reader` with other content; None: not known."""
    if before is None:
        return
    for name in dict.fromkeys((*before, *now)):
        if (was := before.get(name, "none")) != (is_ := now.get(name, "none")):
            raise ConfigError(
                f"{name}: the content has fingerprint {is_}, but {reader} read {was}: {remedy}"
            )
