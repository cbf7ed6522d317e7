"""Models of tokens used as models of bytes: scores of texts and continuations, byte by byte.

The probabilities are exact (`hnet.decode.covers`): a text may go on inside a token. A text of n
bytes needs about as many forward passes, in batches; there is no cache between bytes.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hnet.config import BOS_ID
from hnet.data.tokens import read_vocabulary
from hnet.decode import utf8
from hnet.decode.canonical import Canonical
from hnet.decode.covers import Covers, Ids, Pieces
from hnet.decode.prompts import length_bucket
from hnet.decode.sampling import Controls, Sampling, sample
from hnet.errors import ConfigError
from hnet.model import HNetLM, split

BEGIN = (BOS_ID,)


@partial(jax.jit, static_argnames="graph")
def _next_log_probs(params, input_ids_BL, segment_ids_BL, *, graph):
    logits_BLV, _ = nnx.merge(graph, params)(input_ids_BL, segment_ids_BL)
    return jax.nn.log_softmax(logits_BLV, axis=-1)


_sample = jax.jit(sample)


class TokenBytes:
    """The distribution over bytes of a model that was trained on tokens."""

    def __init__(self, model: HNetLM, *, batch_size: int = 16):
        """Raises ConfigError if the probabilities cannot be computed, or the tokenizer not read."""
        path, vocabulary = model.tokenizer, read_vocabulary(model.tokenizer)
        if not model.bos:
            raise ConfigError(
                f"a model of tokens (data.tokenizer={path!r}) without BOS gives the first token no "
                "probability: train it with data.bos_eos"
            )
        if vocabulary.size > model.config.vocab_size:
            raise ConfigError(
                f"data.tokenizer={path!r} has {vocabulary.size} tokens, the model "
                f"{model.config.vocab_size}: give the tokenizer that it was trained with"
            )
        self.path, self.batch_size, self.size = path, batch_size, vocabulary.size
        self._vocabulary, (self._graph, self._params) = vocabulary, split(model)
        self._pieces = Pieces(vocabulary.pieces)
        self._allowed = Canonical(vocabulary, eos=True)

    def covers(self) -> Covers:
        """The covers of an empty text."""
        return Covers(self._pieces, self._allowed, BEGIN)

    def log_probs(self, text: bytes) -> np.ndarray:
        """Log-probability of each possible byte at each offset of a text, float64 (n, 256)."""
        found, covers = np.zeros((len(text), 256)), self.covers()
        for at, log_prob_S in enumerate(self._walk(covers, text)):
            found[at] = log_prob_S
        return found

    def tokens_log_prob(self, text: bytes) -> float:
        """Log-probability of the tokens of a text: at most that of its bytes."""
        ids = (*BEGIN, *self._vocabulary.encode(text).tolist())
        table = self.after([ids[:k] for k in range(1, len(ids))])
        return float(sum(table[ids[:k]][ids[k]] for k in range(1, len(ids))))

    def read(self, text: bytes) -> Covers:
        """The covers of a text."""
        covers = self.covers()
        for _ in self._walk(covers, text):
            pass
        return covers

    def _walk(self, covers: Covers, text: bytes) -> Iterable[np.ndarray]:
        """Yield the log-probabilities of each next byte, while `covers` reads the text.

        Which sequences matter does not depend on their probabilities, so a first pass finds them.
        """
        dry, needed, nothing = self.covers(), [], np.zeros(self.size)
        for byte in text:
            needed += dry.waiting
            dry.feed([nothing] * len(dry.waiting))
            dry.advance(byte)
        table = self.after(needed)
        for at, byte in enumerate(text):
            covers.feed([table[ids] for ids in covers.waiting])
            log_prob_S = covers.log_probs()
            if not np.isfinite(log_prob_S[byte]):
                raise ConfigError(
                    f"data.tokenizer={self.path!r} spells no text with byte {byte} at offset {at}: "
                    "give texts that are UTF-8"
                )
            yield log_prob_S
            covers.advance(byte)

    def after(self, sequences: Iterable[Ids]) -> dict[Ids, np.ndarray]:
        """Log-probabilities of the token after each sequence, float32 (V,)."""
        rows, place = [], {}
        for ids in sorted(set(sequences), key=len, reverse=True):
            if ids in place:
                continue
            for k in range(len(ids), 0, -1):
                if place.setdefault(ids[:k], (len(rows), k - 1))[0] != len(rows):
                    break
            rows.append(ids)
        wanted = {ids: place[ids] for ids in sequences}
        found: dict[Ids, np.ndarray] = {}
        for first in range(0, len(rows), self.batch_size):
            table_BLV = self._forward(rows[first : first + self.batch_size])
            for ids, (row, at) in wanted.items():
                if first <= row < first + self.batch_size:
                    found[ids] = table_BLV[row - first, at, : self.size].copy()
        return found

    def _forward(self, rows: Sequence[Ids]) -> np.ndarray:
        """Log-probabilities at each position, float32 (rows, L, V)."""
        height, length = 1 << (len(rows) - 1).bit_length(), length_bucket(max(map(len, rows)))
        ids_BL = np.zeros((height, length), np.int32)
        segment_ids_BL = np.zeros_like(ids_BL)
        for r, ids in enumerate(rows):
            ids_BL[r, : len(ids)] = ids
            segment_ids_BL[r, : len(ids)] = 1
        found = _next_log_probs(self._params, ids_BL, segment_ids_BL, graph=self._graph)
        return np.asarray(found)[: len(rows)]


class TokenDecoding(NamedTuple):
    """Rows of continuations between two bytes."""

    covers: list[Covers]
    recent_BW: np.ndarray
    utf8_state_B: jax.Array
    count_B: np.ndarray
    running_B: jax.Array


class TokenDecoder:
    """Draws bytes from a model of tokens; can be used instead of `Decoder`."""

    def __init__(self, model: HNetLM):
        """Raises ConfigError like `TokenBytes`."""
        if model.config.num_chunked:
            raise ConfigError(
                f"a model that chunks tokens (data.tokenizer={model.tokenizer!r}) cannot continue "
                "a text: use a network of one stage"
            )
        self._bytes = TokenBytes(model)

    def start(
        self, prompts: Sequence[bytes], sampling: Sampling
    ) -> tuple[TokenDecoding, np.ndarray]:
        """(state after the prompts, boundaries bool (B, L, 0)); a prompt without BOS is an unused
        row."""
        B, W = len(prompts), sampling.repetition_window
        if any(prompt and prompt[0] != BOS_ID for prompt in prompts):
            raise ConfigError("bos=False: a model of tokens continues only texts after BOS")
        recent_BW = np.full((B, W), -1, np.int32)
        for row, prompt in enumerate(prompts):
            recent_BW[row, max(0, W - len(prompt)) :] = list(prompt[-W:])
        state = TokenDecoding(
            [self._bytes.read(prompt[1:]) for prompt in prompts],
            recent_BW,
            jnp.array([utf8.state_after(prompt) for prompt in prompts], jnp.int32),
            np.zeros(B, np.int32),
            jnp.ones(B, bool),
        )
        return state, np.zeros((B, max(map(len, prompts)), 0), bool)

    def run(
        self, state: TokenDecoding, controls: Controls, seed_B: jax.Array, num_ticks: int
    ) -> tuple[TokenDecoding, tuple[np.ndarray, ...]]:
        """Draw `num_ticks` more bytes for every row that runs: (state, (bytes, log-probabilities,
        boundaries, whether a byte was drawn)), each (T, B)."""
        found = []
        for _ in range(num_ticks):
            state, byte_B, logprob_B = self._draw(state, controls, seed_B)
            found.append((byte_B, logprob_B, np.asarray(state.running_B)))
        byte_TB, logprob_TB, given_TB = map(np.stack, zip(*found))
        return state, (byte_TB, logprob_TB, np.zeros((*byte_TB.shape, 0), bool), given_TB)

    def _draw(self, state, controls, seed_B):
        running = np.flatnonzero(state.running_B)
        table = self._bytes.after([ids for row in running for ids in state.covers[row].waiting])
        logits_BV = np.zeros((len(state.covers), 256), np.float32)
        for row in running:
            covers = state.covers[row]
            covers.feed([table[ids] for ids in covers.waiting])
            logits_BV[row] = covers.log_probs()
        byte_B, logprob_B = _sample(
            logits_BV, controls, seed_B, state.count_B, state.recent_BW, state.utf8_state_B
        )
        drawn_B = np.asarray(byte_B)
        for row in running:
            state.covers[row].advance(int(drawn_B[row]))
        return (
            state._replace(
                recent_BW=np.concatenate([state.recent_BW[:, 1:], drawn_B[:, None]], axis=1),
                utf8_state_B=utf8.advance(state.utf8_state_B, byte_B),
                count_B=state.count_B + 1,
            ),
            drawn_B,
            np.asarray(logprob_B),
        )
