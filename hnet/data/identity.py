"""Check by content that a run reads the same text as before, since files can change.

Resuming in a work directory, the points of a sweep and the evaluation of a trained model all open
text by name, possibly days apart. Hashes of what they read are stored with the run.
"""

import hashlib
from collections.abc import Mapping

from hnet.data.config import DataConfig
from hnet.data.corpus import Corpus
from hnet.errors import ConfigError

NAMES = ("files", "eval_files", "eval_fraction", "eval_max_bytes", "tokenizer")
"""fields of `DataConfig` that the hashes cover: two spellings of a path are the same text"""
SPEED = ("num_workers", "prefetch_batches")
"""fields that do not change the batches"""

Inputs = Mapping[str, str]
"""name of the input -> hash of its content"""


def inputs(config: DataConfig, corpus: Corpus) -> dict[str, str]:
    """Hashes of the inputs of a run, by name. Raises ConfigError for an unreadable tokenizer."""
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
    """Raise ConfigError if `now` differs from `before`, the hashes of `reader`; None: unknown."""
    if before is None:
        return
    for name in dict.fromkeys((*before, *now)):
        if (was := before.get(name, "none")) != (is_ := now.get(name, "none")):
            raise ConfigError(
                f"{name}: the content has fingerprint {is_}, but {reader} read {was}: {remedy}"
            )
