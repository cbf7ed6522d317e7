"""Find the threshold with which patches of entropy have a wanted mean length on your text (BLT).

    python -m experiments.pretrain blt_bytes --data.files 'text/*.txt'
    python -m experiments.entropy_threshold --checkpoint runs/blt_bytes --bytes_per_patch 4.5
    python -m experiments.pretrain blt_entropy --model.stages.0.chunking.hold_rate False \\
        --model.stages.0.chunking.predictor.theta THETA --data.files 'text/*.txt'

The byte model reads the text, and the threshold is the quantile of the entropies of its next byte
(rule monotonic: of their increases) that gives this many patches. Prints the settings to train
with. A run with hold_rate True finds the threshold during training instead.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import jax
import numpy as np

from hnet import load
from hnet.bounds import Bounds, ChunkBytes, FilePath, Rows
from hnet.command_line import parse, run
from hnet.data import eval_batches, open_corpus, open_part
from hnet.decode.cache_memory import check_rows
from hnet.errors import ConfigError
from hnet.model import HNetLM
from hnet.nn.layers import segment_positions
from hnet.runtime.compile_cache import enable_compilation_cache
from hnet.second_model.entropy import entropy
from hnet.train.workdir import check_text, read_config
from hnet.weights.sources import resolve_run

PREDICTOR = "model.stages.0.chunking.predictor"


@dataclass(frozen=True)
class ThresholdConfig:
    """Which byte model and text, and which patches."""

    checkpoint: FilePath
    """work directory of the byte model"""
    bytes_per_patch: ChunkBytes
    """wanted mean number of bytes per patch"""
    files: tuple[str, ...] = ()
    """globs of text, in quotes; empty = the held-out text of the byte model's run"""
    rule: Literal["global", "monotonic", "both"] = "global"
    """rule of the boundary predictor (both: theta is found for the increase given)"""
    increase: Annotated[float, Bounds(-100, 100)] = 0.0
    """threshold on the increase of the entropy, for the rule both"""
    batch_size: Rows = 8
    """number of rows read together"""


def entropies(model: HNetLM, batches: Iterable) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(entropy after each byte, its increase, index in the document) of the bytes of a text."""

    @jax.jit
    def read(model, ids_BL, segment_ids_BL):
        return entropy(model(ids_BL, segment_ids_BL)[0]), segment_positions(segment_ids_BL)

    found = []
    for batch in batches:
        ids_BL, segments_BL = batch["input_ids"], batch["segment_ids"]
        H_BL, index_BL = jax.device_get(read(model, ids_BL, segments_BL))
        rise_BL = np.diff(H_BL, axis=1, prepend=0)
        found.append([a_BL[segments_BL != 0] for a_BL in (H_BL, rise_BL, index_BL)])
    return tuple(np.concatenate(arrays) for arrays in zip(*found))


def threshold(
    H_N: np.ndarray, rise_N: np.ndarray, index_N: np.ndarray, config: ThresholdConfig
) -> float:
    """Threshold with which N / bytes_per_patch positions end a patch, forced ones included.

    Raises ConfigError if the rule cannot give as many, or forces more.
    """
    match config.rule:
        case "global":
            value_N, num_forced = H_N, 1
        case "monotonic":
            value_N, num_forced = rise_N, 2
        case "both":
            value_N, num_forced = np.where(rise_N > config.increase, H_N, -np.inf), 2
        case other:
            raise ValueError(f"rule={other!r}: use global, monotonic or both")
    never = 2 if config.rule == "both" else -1
    free = np.sort(value_N[(index_N >= num_forced) & (index_N != never)])
    wanted = round(len(H_N) / config.bytes_per_patch) - int(np.sum(index_N < num_forced))
    most = int(np.sum(np.isfinite(free))) - 1
    if not 1 <= wanted <= most:
        raise ConfigError(
            f"bytes_per_patch={config.bytes_per_patch}: rule {config.rule} gives from 1 to {most} "
            f"patches besides those at the beginning of documents, and {max(wanted, 0)} are asked "
            "for: use another number, a smaller increase, or more text"
        )
    return float(free[-wanted - 1 : len(free) - wanted + 1].mean())


def main() -> None:
    config = parse(ThresholdConfig)
    enable_compilation_cache()
    source = resolve_run(config.checkpoint)
    data = replace(read_config(source.path).data, batch_size=config.batch_size)
    corpus = None if config.files else open_corpus(data)
    check_text(source.path, data, corpus, "give it the same content, or other text by --files")
    part = corpus.heldout if corpus else open_part(config.files)
    if not part.num_bytes:
        raise ConfigError(f"checkpoint={config.checkpoint} has no held-out text: give --files")
    model = load(source.path, step=source.step)
    check_rows(data.batch_size, data.seq_len, model.config.vocab_size)
    H_N, rise_N, index_N = entropies(model, eval_batches(part, data))
    found = threshold(H_N, rise_N, index_N, config)
    field = "increase" if config.rule == "monotonic" else "theta"
    print(f"{len(H_N):,} bytes, mean entropy {H_N.mean():.4f} nats")
    words = [f"--{PREDICTOR}.checkpoint {config.checkpoint}", f"--{PREDICTOR}.rule {config.rule}"]
    if config.rule == "both":
        words.append(f"--{PREDICTOR}.increase {config.increase}")
    print(" ".join([*words, f"--{PREDICTOR}.{field} {found:.5f}"]))


if __name__ == "__main__":
    run(main)
