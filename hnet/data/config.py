"""Configuration of the text and of the batches (``--data.*`` on the command line)."""

import math
from dataclasses import dataclass

from hnet.errors import ConfigError, shown

_MOST_32 = 2**31 - 1


@dataclass(frozen=True)
class DataConfig:
    """The text of a run, its held-out part and the shape of a batch.

    The bytes of batch k depend on these fields, the content of the files, the seed and k, but not
    on ``num_workers``, ``prefetch_batches`` or the number of processes.
    """

    files: tuple[str, ...] = ()
    """quoted globs of text (one document per file), JSON lines with "text", .gz of both, Parquet
    with a column "text", or .array_record; or "python:", "synthetic:latin"; empty = python:, the
    documentation of the installed Python"""
    weights: tuple[float, ...] = ()
    """mixture weights: share of the training rows for each glob in files; each glob has its own
    epochs; empty = all globs are one text, read once per epoch"""
    eval_files: tuple[str, ...] = ()
    """globs of the held-out text; files they match are never trained on; empty = eval_fraction"""
    eval_fraction: float = 0.05
    """share of the bytes to hold out; documents are chosen by a hash of their name; 0 = none"""
    eval_max_bytes: int = 65_536
    """maximum number of bytes held out by eval_fraction (eval_files have no limit)"""
    batch_size: int = 8
    """number of rows per step over all processes"""
    seq_len: int = 512
    """number of positions per row"""
    bos_eos: bool = True
    """whether to put byte 254 before and byte 255 after each document, as the official tokenizer
    does"""
    tokenizer: str = ""
    """tokenizer.json of a byte-level BPE: rows hold its tokens (`model.vocab_size` must be large
    enough), scores stay bits per byte; or a kind and a size, such as "bpe:2048", to be learned from
    the training text (bpe, unigram, superbpe, lib or equal_info; kept in the work directory);
    empty = bytes"""
    labels: str = ""
    """source of the boundary labels of bytes that a loss with labels="given" reads: a
    tokenizer.json, or "unigram:N", a unigram model of N pieces trained on the first 2 MB of the
    text; empty = no labels"""
    num_workers: int = 0
    """number of processes that build batches; 0 = a thread of the main process. They share the
    text, which stays on disk"""
    prefetch_batches: int = 4
    """number of batches built ahead (per worker); bounds the memory of the pipeline"""

    def __post_init__(self):
        for name, least, most in (
            ("batch_size", 1, _MOST_32),
            ("seq_len", 2, _MOST_32),
            ("eval_max_bytes", 1, 1 << 53),
            ("num_workers", 0, 1024),
            ("prefetch_batches", 1, 65536),
        ):
            if (value := getattr(self, name)) < least:
                raise ConfigError(f"data.{name}={value}: use {least} or more")
            if value > most:
                raise ConfigError(f"data.{name}={value}: use at most {most}")
        if not 0 <= self.eval_fraction < 1:
            raise ConfigError(
                f"data.eval_fraction={self.eval_fraction}: use a share from 0 to below 1"
            )
        if self.weights and len(self.weights) != max(1, len(self.files)):
            raise ConfigError(
                f"data.weights={shown(self.weights)} has {len(self.weights)} numbers for "
                f"{len(self.files)} globs in data.files: give one weight per glob"
            )
        if self.labels and self.tokenizer:
            raise ConfigError(
                f"data.labels={self.labels!r} with data.tokenizer={self.tokenizer!r}: labels are "
                "for bytes; leave one of them out"
            )
        if bad := [w for w in self.weights if not (math.isfinite(w) and w > 0)]:
            raise ConfigError(
                f"data.weights={shown(self.weights)}: {bad[0]} is not a share; use positive numbers"
            )
