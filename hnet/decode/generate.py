"""Continue prompts of any lengths in batches; returns bytes, text and boundaries."""

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hnet.config import BOS_ID, EOS_ID, HNetConfig
from hnet.decode import utf8
from hnet.decode.decoder import MOST_TICKS, Decoder
from hnet.decode.prompts import encode
from hnet.decode.sampling import DEFAULT, Controls, Sampling
from hnet.decode.token_bytes import TokenDecoder
from hnet.errors import ConfigError
from hnet.model import HNetLM

BLOCK_SECONDS = 0.05  # time between two pieces of a text
MIN_TICKS = 8


@dataclass(frozen=True)
class Generation:
    """One finished continuation of n bytes."""

    prompt: bytes
    data: bytes
    """continuation, without the stop string or EOS that ended it"""
    logprobs: np.ndarray
    """natural logarithm of the probability of each byte under the model, before any filter, (n,)"""
    boundaries: np.ndarray
    """whether the stage has a boundary at the byte, bool (len(prompt) + n, chunking stages)"""
    finish_reason: Literal["length", "stop", "eos"]

    @property
    def text(self) -> str:
        """The continuation as text, with U+FFFD for invalid UTF-8."""
        return self.data.decode("utf-8", "replace")


def chunk_starts(config: HNetConfig, boundaries_TS: np.ndarray) -> list[list[int]]:
    """Byte offsets at which the chunks of each stage start, from `Generation.boundaries`.

    A boundary with alignment "end" closes a chunk, so the next chunk starts at the following byte.
    """
    length, starts = len(boundaries_TS), []
    opens = {t: t for t in range(length)}  # byte of a position's decision -> its first byte
    closes = {t: t + 1 for t in range(length)}  # same key -> offset after its last byte
    for s, stage in enumerate(config.stages[:-1]):
        at_end = stage.chunking.alignment == "end"
        cuts = [t for t in np.flatnonzero(boundaries_TS[:, s]).tolist() if t in opens]
        edges = sorted({0, *((closes if at_end else opens)[t] for t in cuts)} - {length})
        starts.append(edges)
        ends = dict(zip(edges, [*edges[1:], length]))
        before = {end: start for start, end in ends.items()}
        if at_end:
            closes = {t: closes[t] for t in cuts}
            opens = {t: before[end] for t, end in closes.items()}
        else:
            opens = {t: opens[t] for t in cuts}
            closes = {t: ends[start] for t, start in opens.items()}
    return starts


class Piece(NamedTuple):
    """New text of the continuation of one prompt."""

    index: int
    """index of the prompt"""
    text: str
    """newly completed characters, possibly none"""
    finished: Generation | None
    """complete result with the last piece; None before"""


class _Row:
    """State of one continuation on the host."""

    def __init__(self, prompt: bytes, boundaries_PS: np.ndarray, sampling: Sampling):
        self.prompt, self.sampling = prompt, sampling
        self.stops = [s.encode() for s in sampling.stop]
        self.data, self.logprobs, self.boundaries = bytearray(), [], list(boundaries_PS)
        self.text, self.shown = utf8.TextStream(), 0
        self.finish_reason: str | None = None

    def add(self, byte_T: np.ndarray, logprob_T: np.ndarray, boundaries_TS: np.ndarray) -> str:
        """Append new bytes until the text ends. Returns the text that can be shown."""
        for byte, logprob, boundary_S in zip(byte_T, logprob_T, boundaries_TS):
            if self.finish_reason:
                break
            if byte == EOS_ID:
                self.finish_reason = "eos"
                break
            self.data.append(byte)
            self.logprobs.append(logprob)
            self.boundaries.append(boundary_S)
            self._check_end()
        held = 0 if self.finish_reason else self._held_back()
        end = len(self.data) - held
        new, self.shown = bytes(self.data[self.shown : end]), end
        return self.text.feed(new, final=self.finish_reason is not None)

    def _check_end(self) -> None:
        for stop in self.stops:
            if self.data.endswith(stop):
                del self.data[-len(stop) :]
                del self.logprobs[len(self.data) :]
                del self.boundaries[len(self.prompt) + len(self.data) :]
                self.finish_reason = "stop"
                return
        if len(self.data) == self.sampling.max_bytes:
            self.finish_reason = "length"

    def _held_back(self) -> int:
        """Number of bytes at the end that may be the beginning of a stop string."""
        return max(
            (n for stop in self.stops for n in range(1, len(stop)) if self.data.endswith(stop[:n])),
            default=0,
        )

    def result(self) -> Generation:
        num_stages = self.boundaries[0].shape[0] if self.boundaries else 0
        return Generation(
            self.prompt,
            bytes(self.data),
            np.asarray(self.logprobs, np.float32),
            np.asarray(self.boundaries, bool).reshape(len(self.boundaries), num_stages),
            self.finish_reason,
        )


def generate(
    model: HNetLM,
    prompts: Sequence[str | bytes],
    sampling: Sampling = DEFAULT,
    *,
    seeds: Sequence[int] | None = None,
    bos: bool | None = None,
    batch_size: int = 32,
) -> list[Generation]:
    """Continue every prompt; arguments as in `stream_text`."""
    pieces = stream_text(model, prompts, sampling, seeds=seeds, bos=bos, batch_size=batch_size)
    finished = {piece.index: piece.finished for piece in pieces if piece.finished}
    return [finished[i] for i in range(len(prompts))]


def stream_text(
    model: HNetLM,
    prompts: Iterable[str | bytes],
    sampling: Sampling = DEFAULT,
    *,
    seeds: Iterable[int] | None = None,
    bos: bool | None = None,
    batch_size: int = 32,
    block_len: int | None = None,
) -> Iterator[Piece]:
    """Continue every prompt and yield new text after every `block_len` ticks. A row gets one byte
    per tick, or none while it waits for other rows at a boundary.

    block_len: None: as many ticks as take about `BLOCK_SECONDS`.

    prompts, seeds: taken a batch at a time, one seed per prompt (default: sampling.seed + its
    index). bos: whether to prepend byte
    254 (default: as the model was trained); without it the first byte of an empty prompt is drawn
    uniformly. batch_size: number of prompts per batch; the result of a prompt does not depend
    on the other prompts. Raises ConfigError for bad arguments.
    """
    if batch_size < 1 or (block_len is not None and block_len < 1):
        raise ConfigError(f"batch_size={batch_size}, block_len={block_len}: use 1 or more")
    if seeds is None:
        seeds = itertools.count(sampling.seed)
    elif isinstance(prompts, Sized) and isinstance(seeds, Sized) and len(seeds) != len(prompts):
        raise ConfigError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one each")
    if isinstance(prompts, Sequence):
        prompts = [encode(p) for p in prompts]  # raises before any work
    decoder = TokenDecoder(model) if model.tokenizer else Decoder(model)
    bos = model.bos if bos is None else bos
    pairs, first, size = zip(prompts, seeds), 0, 0
    while batch := list(itertools.islice(pairs, batch_size)):
        size = size or len(batch)
        texts, own = [encode(prompt) for prompt, _ in batch], [seed for _, seed in batch]
        for piece in _run(decoder, texts, own, sampling, bos, size, block_len):
            yield piece._replace(index=first + piece.index)
        first += len(batch)


def _run(decoder, texts, seeds, sampling, bos, size, block_len) -> Iterator[Piece]:
    """Continue up to `size` texts as one batch; padding rows are never active."""
    spare = size - len(texts)
    prefix = bytes([BOS_ID]) if bos else b""
    fed = [prefix + text for text in texts] + [b""] * spare
    state, boundaries_BLS = decoder.start(fed, sampling)
    running_B = np.arange(size) < len(texts)
    seed_B = jnp.asarray([*seeds, *[0] * spare], jnp.uint32)
    starts = [boundaries_BLS[i, len(prefix) : len(fed[i])] for i in range(len(texts))]
    rows = [_Row(text, start, sampling) for text, start in zip(texts, starts)]
    controls = Controls.of(sampling)
    num_ticks = block_len or MIN_TICKS
    while running_B.any():
        began = time.perf_counter()
        state = state._replace(running_B=state.running_B & jnp.asarray(running_B))
        state, outputs = decoder.run(state, controls, seed_B, num_ticks)
        byte_TB, logprob_TB, boundaries_TBS, given_TB = jax.device_get(outputs)
        if block_len is None:
            wanted = int(num_ticks * BLOCK_SECONDS / (time.perf_counter() - began))
            num_ticks = max(MIN_TICKS, min(wanted, 2 * num_ticks, MOST_TICKS))
        for i in np.flatnonzero(running_B):
            given_T = given_TB[:, i]
            new = (byte_TB[given_T, i], logprob_TB[given_T, i], boundaries_TBS[given_T, i])
            text = rows[i].add(*new)
            running_B[i] = rows[i].finish_reason is None
            yield Piece(int(i), text, None if running_B[i] else rows[i].result())
