"""Check by content that a run reads the same text as before, since files can change.

Resuming in a work directory, the points of a sweep and the evaluation of a trained model all open
text by name, possibly days apart. Hashes of what they read are stored with the run.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping

from etils import epath

from hnet.data.config import DataConfig
from hnet.data.corpus import Corpus
from hnet.data.labels import unigram_size
from hnet.errors import ConfigError, shown
from hnet.files import parse_json, read_bytes

NAMES = ("files", "eval_files", "eval_fraction", "eval_max_bytes", "tokenizer", "labels")
"""fields of `DataConfig` that the hashes cover: two spellings of a path are the same text"""
SPEED = ("num_workers", "prefetch_batches")
"""fields that do not change the batches"""
FILE_NAME = "inputs.json"

Inputs = Mapping[str, str]
"""name of the input -> hash of its content"""


def inputs(
    config: DataConfig, corpus: Corpus | None, files: Mapping[str, Iterable[str]] = {}
) -> dict[str, str]:
    """Hashes of the inputs of a run, by name. The text is not read again (`Corpus.fingerprint`).

    corpus: None if the text of the run is not read. files: other files of the run by setting.
    Raises ConfigError for a file that cannot be read.
    """
    found = {"data.files": corpus.fingerprint} if corpus else {}
    files = {"data.tokenizer": (config.tokenizer,) if config.tokenizer else (), **files}
    if config.labels and unigram_size(config.labels) is None:
        files["data.labels"] = (config.labels,)
    elif config.labels:
        found["data.labels"] = config.labels
    return found | {field: _hash(paths, field) for field, paths in files.items() if paths}


def _hash(paths: Iterable[str], field: str) -> str:
    digests = b""
    for path in paths:
        try:
            digests += hashlib.blake2b(read_bytes(path)).digest()
        except (OSError, ValueError) as e:
            reason = getattr(e, "strerror", None) or e
            raise ConfigError(f"{field}={shown(path)} cannot be read: {reason}") from None
    return hashlib.blake2b(digests, digest_size=8).hexdigest()


def check_inputs(before: Inputs | None, now: Inputs, reader: str, remedy: str) -> None:
    """Raise ConfigError if `now` differs from `before`, the hashes of `reader`; None: unknown."""
    if before is None:
        return
    for name in dict.fromkeys((*before, *now)):
        if (was := before.get(name, "none")) != (is_ := now.get(name, "none")):
            raise ConfigError(
                f"{name}: the content has fingerprint {is_}, but {reader} read {was}: {remedy}"
            )


def read_inputs(folder: str | os.PathLike) -> dict[str, str] | None:
    """Hashes that a run stored in its folder; None for a run of a version that stored none.

    Raises ConfigError for a damaged file.
    """
    file = epath.Path(folder) / FILE_NAME
    try:
        found = parse_json(read_bytes(file))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or type(e).__name__
        raise ConfigError(f"{file} cannot be read ({reason}): restore or remove it") from None
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise ConfigError(f"{file} holds no fingerprints: restore or remove it")
    return found


def write_inputs(folder: str | os.PathLike, read: Inputs) -> None:
    """Store the hashes of a run atomically. Raises OSError."""
    file = epath.Path(folder) / FILE_NAME
    temporary = epath.Path(folder) / f"{FILE_NAME}.tmp"
    temporary.write_text(json.dumps(dict(read), indent=1) + "\n")
    temporary.replace(file)
