"""Log-probabilities of given texts, for scoring and multiple choice."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from hnet.config import BOS_ID
from hnet.data.scripts import route_table, script_ids_of_rows
from hnet.decode.by_counts import Done, Fed, Static, forward
from hnet.decode.prompts import encode, pad, row_length
from hnet.decode.token_bytes import TokenBytes
from hnet.errors import ConfigError
from hnet.model import HNetLM


@dataclass(frozen=True)
class Score:
    """One scored text of n bytes; index i of the arrays is byte offset i."""

    data: bytes
    logprobs: np.ndarray
    """natural logarithm of the probability of each byte given the bytes before it, float32 (n,);
    NaN for the first byte without BOS"""
    is_greedy: np.ndarray
    """whether each byte is the most probable byte at its position, bool (n,)"""

    def total(self, start: int = 0, end: int | None = None) -> float:
        """Log-probability of the bytes [start, end) given all bytes before them."""
        return float(np.sum(self.logprobs[start:end], dtype=np.float64))


def _scored(done: Done) -> tuple[jax.Array, jax.Array]:
    """(log-probability, whether it is the most probable) of each byte but the first."""
    logits_BLV, next_BL1 = done.logits_BLV[:, :-1], done.fed.input_ids_BL[:, 1:, None]
    log_probs_BLV = jax.nn.log_softmax(logits_BLV, axis=-1)
    logprob_BL = jnp.take_along_axis(log_probs_BLV, next_BL1, axis=-1)[..., 0]
    return logprob_BL, jnp.argmax(logits_BLV, axis=-1) == next_BL1[..., 0]


def logprobs(
    model: HNetLM, texts: Sequence[str | bytes], *, bos: bool | None = None, batch_size: int = 16
) -> list[Score]:
    """Score every byte of every text.

    bos: whether to prepend byte 254; default: as the model was trained. Texts of similar length are
    batched, `batch_size` at a time. A model of tokens gives exact probabilities of bytes. Raises
    ConfigError for bad arguments.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: use 1 or more")
    if model.tokenizer:
        return _of_tokens(model, [encode(text) for text in texts], bos, batch_size)
    static, params = Static.of(model)
    route_of = route_table(model.config.route_groups, "model.route_groups")
    prefix = bytes([BOS_ID]) if (model.bos if bos is None else bos) else b""
    fed = [prefix + encode(text) for text in texts]
    order = sorted(range(len(fed)), key=lambda i: len(fed[i]))
    scores: dict[int, Score] = {}
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        spare = [b""] * (min(batch_size, len(order)) - len(rows))
        ids_BL, lengths_B = pad([*(fed[i] for i in rows), *spare], row_length(len(fed[rows[-1]])))
        segment_ids_BL = (np.arange(ids_BL.shape[1]) < lengths_B[:, None]).astype(np.int32)
        route_ids_BL = route_of[script_ids_of_rows(ids_BL, segment_ids_BL)[0]]
        batch = Fed(ids_BL, segment_ids_BL, route_ids_BL)
        found = jax.device_get(forward(static, params, batch, _scored))
        for i, logprob_L, is_greedy_L in zip(rows, *found):
            scores[i] = _own_bytes(fed[i], len(prefix), logprob_L, is_greedy_L)
    return [scores[i] for i in range(len(fed))]


def _own_bytes(fed: bytes, prefix: int, logprob_L: np.ndarray, is_greedy_L: np.ndarray) -> Score:
    """Score of a text; logprob_L[t] and is_greedy_L[t] belong to byte t + 1 of fed."""
    predicted = len(fed) - 1 if fed else 0
    unseen = 0 if prefix else min(1, len(fed))
    return Score(
        fed[prefix:],
        np.concatenate([np.full(unseen, np.nan, np.float32), logprob_L[:predicted]]),
        np.concatenate([np.zeros(unseen, bool), is_greedy_L[:predicted]]),
    )


def _of_tokens(model, texts: list[bytes], bos: bool | None, batch_size: int) -> list[Score]:
    if bos is False:
        raise ConfigError("bos=False: a model of tokens scores only texts after BOS")
    found, exact = [], TokenBytes(model, batch_size=batch_size)
    for text in texts:
        table_LV, byte_L = exact.log_probs(text), np.frombuffer(text, np.uint8)
        logprob_L = table_LV[np.arange(len(text)), byte_L].astype(np.float32)
        found.append(Score(text, logprob_L, table_LV.argmax(axis=1) == byte_L))
    return found
