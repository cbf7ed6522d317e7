"""Learn a tokenizer from text, for --data.tokenizer.

    python -m experiments.tokenizer --kind superbpe:4096 --files 'books/*.txt' --out superbpe.json

Kinds are bpe, unigram, superbpe, lib and equal_info; the number is that of the tokens, with the 256
bytes. They are learned from the first MB of the text. equal_info counts bytes, or takes the
probabilities of a trained byte model with --model WORKDIR, and then reads no text.
"""

from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx

from hnet import load
from hnet.bounds import FilePath
from hnet.command_line import parse, run
from hnet.config import BOS_ID
from hnet.data import open_part
from hnet.data.tokenizers import SAMPLE_BYTES, TOKENIZERS, wanted
from hnet.data.tokenizers.equal_info import LONGEST, NextBytes, windows, windows_file
from hnet.data.tokens import read_vocabulary
from hnet.errors import ConfigError
from hnet.model import HNetLM, split
from hnet.outputs import new_file, write_new

ROWS = 64  # prefixes of windows per batch


@dataclass(frozen=True)
class Tokenizer:
    """What to learn, from which text."""

    kind: str
    """kind and number of tokens, such as bpe:2048"""
    out: FilePath
    """new file"""
    files: tuple[str, ...] = ()
    """globs of text, in quotes"""
    model: FilePath | None = None
    """equal_info: work directory of a byte model instead of text"""


def main() -> None:
    config = parse(Tokenizer)
    if not (asked := wanted(config.kind)):
        raise ConfigError(
            f"kind={config.kind!r} is unknown: use one of {', '.join(TOKENIZERS)} and a number of "
            "tokens, such as bpe:2048"
        )
    new_file(config.out, "out")
    if (config.model is not None) == bool(config.files):
        raise ConfigError("give --files, or for equal_info --model, and not both")
    if config.model is not None and asked.kind != "equal_info":
        raise ConfigError(f"model={config.model!r}: only equal_info takes a model: give --files")
    if config.model is not None:
        model = load(config.model)
        if model.tokenizer:
            raise ConfigError(f"model={config.model!r} reads tokens: give a model of bytes")
        content = windows_file(windows(next_bytes(model), asked.size))
    else:
        content = asked.train(open_part(config.files, field="files").beginning(SAMPLE_BYTES))
    write_new(config.out, content, "out")
    print(f"wrote {config.out}: {read_vocabulary(config.out).size:,} tokens")


def next_bytes(model: HNetLM) -> NextBytes:
    """Probabilities of the next byte of a model, after texts of up to LONGEST bytes."""
    graph, params = split(model)
    begin = [BOS_ID] if model.bos else [ord("\n")]

    @jax.jit
    def run_rows(params, ids_BL, segment_ids_BL):
        logits_BLV, _ = nnx.merge(graph, params)(ids_BL, segment_ids_BL)
        return jax.nn.softmax(logits_BLV[..., :256], axis=-1)

    def of(prefixes: list[bytes]) -> np.ndarray:
        found = []
        for first in range(0, len(prefixes), ROWS):
            rows = [[*begin, *prefix] for prefix in prefixes[first : first + ROWS]]
            ids_BL = np.zeros((ROWS, LONGEST + 1), np.int32)
            for r, row in enumerate(rows):
                ids_BL[r, : len(row)] = row
            ends_B = np.array([len(row) for row in rows] + [1] * (ROWS - len(rows)))
            segment_ids_BL = (np.arange(LONGEST + 1) < ends_B[:, None]).astype(np.int32)
            table_BLS = np.asarray(run_rows(params, ids_BL, segment_ids_BL))
            found += [table_BLS[r, len(row) - 1] for r, row in enumerate(rows)]
        return np.stack(found)

    return of


if __name__ == "__main__":
    run(main)
