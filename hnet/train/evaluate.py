"""Bits per byte of a text, in total and per document, and chunk statistics per stage."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from hnet.chunking.slots import bucket
from hnet.data.pipeline import Batch
from hnet.data.scripts import SCRIPTS, of_whole_characters, script_ids_of_rows
from hnet.loss import bits_per_byte

MOST_SLOTS = 1 << 31  # a model has no more slots than positions


@dataclass
class Evaluation:
    """Sums over the scored bytes, in float64 on the host."""

    nats_by_document: dict[int, float] = field(default_factory=dict)
    bytes_by_document: dict[int, int] = field(default_factory=dict)
    positions: float = 0.0
    chunks_by_stage: tuple[float, ...] = ()
    route_names: tuple[str, ...] = ()
    chunks_SR: np.ndarray | float = 0.0
    """number of chunks of each stage (S) and route (R); 0.0 if there is only one route"""
    positions_SR: np.ndarray | float = 0.0
    """number of each stage's own input positions (S) of each route (R)"""
    source_of: Callable[[int], str] | None = None
    """source of a document, given its number; None: sources are not distinguished"""
    nats_Z: np.ndarray = field(default_factory=lambda: np.zeros(len(SCRIPTS)))
    """nats per script; nothing is counted if the model reads tokens"""
    bytes_Z: np.ndarray = field(default_factory=lambda: np.zeros(len(SCRIPTS), np.int64))
    """bytes per script, likewise"""
    nats_V: np.ndarray = field(default_factory=lambda: np.zeros(256))
    """nats per value of a byte, likewise"""
    bytes_V: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    """number of bytes of each value, likewise"""
    _before: tuple[int, int] = (-1, 0)
    """document at the end of the last batch, and the state of its script detection"""

    @property
    def nats(self) -> float:
        return math.fsum(self.nats_by_document.values())

    @property
    def num_bytes(self) -> int:
        return sum(self.bytes_by_document.values())

    @property
    def bpb(self) -> float:
        """Bits per source byte; NaN before anything was scored."""
        return self.nats / (math.log(2) * self.num_bytes) if self.num_bytes else math.nan

    def perplexity(self, alphabet: bytes) -> float:
        """Perplexity per byte with one of these values, such as bases; NaN if there is none."""
        values = sorted(set(alphabet))
        count = self.bytes_V[values].sum()
        return math.exp(self.nats_V[values].sum() / count) if count else math.nan

    def bpb_by_source(self) -> dict[str, float]:
        """Bits per byte of each source that was scored; empty unless there are several."""
        nats, sizes = {}, {}
        for document, own in self.nats_by_document.items() if self.source_of else ():
            source = self.source_of(document)
            nats[source] = nats.get(source, 0.0) + own
            sizes[source] = sizes.get(source, 0) + self.bytes_by_document[document]
        return {name: bits_per_byte(n, sizes[name]) for name, n in nats.items() if len(nats) > 1}

    def bpb_by_script(self) -> dict[str, float]:
        """Bits per byte of each script that was scored; empty unless there are several."""
        (found,) = np.nonzero(self.bytes_Z)
        return {
            SCRIPTS[z]: bits_per_byte(float(self.nats_Z[z]), int(self.bytes_Z[z]))
            for z in (found if len(found) > 1 else ())
        }

    def bytes_per_chunk(self, stage: int) -> float:
        """Positions of stage 0 (source bytes and separators) per chunk of `stage`."""
        return self.positions / max(self.chunks_by_stage[stage], 1.0)

    def positions_per_chunk(self, stage: int) -> dict[str, float]:
        """Positions per chunk of each route that has positions; empty if there is one route."""
        if not np.ndim(self.positions_SR):
            return {}
        own = zip(self.route_names, self.positions_SR[stage], self.chunks_SR[stage])
        return {name: float(n / max(chunks, 1.0)) for name, n, chunks in own if n}

    def metrics(self) -> dict[str, float]:
        """The results as a flat dict, as in metrics.jsonl and TensorBoard."""
        stages = range(len(self.chunks_by_stage))
        return {
            "eval/bpb": self.bpb,
            "eval/bytes": self.num_bytes,
            **{f"eval/source_{name}/bpb": bpb for name, bpb in self.bpb_by_source().items()},
            **{f"eval/script_{name}/bpb": bpb for name, bpb in self.bpb_by_script().items()},
            **{f"eval/stage{s}/bytes_per_chunk": self.bytes_per_chunk(s) for s in stages},
            **{
                f"eval/stage{s}/route_{name}/positions_per_chunk": size
                for s in stages
                for name, size in self.positions_per_chunk(s).items()
            },
        }

    def add(self, batch: Batch, metrics: dict) -> None:
        """Add one batch. metrics: the output of `eval_step`, on the host."""
        scored = np.asarray(batch["loss_mask"])
        documents = np.asarray(batch["document_ids"])[scored]
        sizes = np.asarray(batch.get("byte_lengths", scored), np.int64)[scored]
        nll = np.asarray(metrics["nll_BL"], np.float64)[scored]
        for document in np.unique(documents):
            own, key = documents == document, int(document)
            nats = float(nll[own].sum())
            self.nats_by_document[key] = self.nats_by_document.get(key, 0.0) + nats
            self.bytes_by_document[key] = self.bytes_by_document.get(key, 0) + int(sizes[own].sum())
        if "input_ids" in batch and "byte_lengths" not in batch:
            scripts = self._scripts(batch)[scored]
            self.nats_Z += np.bincount(scripts, nll, minlength=len(SCRIPTS))
            self.bytes_Z += np.bincount(scripts, minlength=len(SCRIPTS))
            values = np.asarray(batch["input_ids"])[scored]
            self.nats_V += np.bincount(values, nll, minlength=256)
            self.bytes_V += np.bincount(values, minlength=256)
        self.positions += float(metrics["positions"])
        if "chunks_SR" in metrics:
            self.chunks_SR = self.chunks_SR + np.asarray(metrics["chunks_SR"], np.float64)
            self.positions_SR = self.positions_SR + np.asarray(metrics["positions_SR"], np.float64)
        chunks = metrics["num_chunks_S"]
        sums = zip(self.chunks_by_stage or (0.0,) * len(chunks), chunks)
        self.chunks_by_stage = tuple(a + float(n) for a, n in sums)

    def _scripts(self, batch: Batch) -> np.ndarray:
        """Script of the character that each byte belongs to, uint8 (rows, L).

        A character without a script, such as a space, gets the script of the text before it in its
        document. So rows are read one after the other, without the token that a row shares with
        the row before. The bytes of a character that continues in the next batch are treated like
        a character without a script.
        """
        ids_BL, documents_BL = batch["input_ids"], batch["document_ids"]
        document, state = self._before
        is_new_BL = np.ones(np.shape(ids_BL), bool)
        is_new_BL[:, 0] = documents_BL[:, 0] != np.append(document, documents_BL[:-1, -1])
        ids_N, documents_N = ids_BL[is_new_BL], documents_BL[is_new_BL]
        state_B = np.array([state if documents_N[0] == document else 0], np.uint32)
        script_BN, state_B = script_ids_of_rows(ids_N[None], documents_N[None] + 1, state_B)
        self._before, script_N = (int(documents_N[-1]), int(state_B[0])), script_BN[0]
        found_BL = np.zeros(np.shape(ids_BL), np.uint8)
        found_BL[is_new_BL] = of_whole_characters(script_N, ids_N, documents_N)
        return found_BL


class OfEachRun(tuple):
    """Accumulators, one per run of one program; metrics have a leading axis of runs."""

    @property
    def num_bytes(self) -> int:
        return self[0].num_bytes

    def add(self, batch: Batch, metrics: dict) -> None:
        for r, own in enumerate(self):
            own.add(batch, jax.tree.map(lambda x, r=r: x[r], metrics))


def evaluate(
    batches: Iterable[Batch],
    run_batch: Callable[[Batch, tuple[int | None, ...]], dict],
    capacities: tuple[int | None, ...],
    *,
    route_names: tuple[str, ...] = (),
    source_of: Callable[[int], str] | None = None,
    max_bytes: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    into: Any = None,
) -> Any:
    """Score batches until `max_bytes` source bytes are reached; None if told to stop.

    into: accumulator to add to and return; default: a new Evaluation.
    `run_batch(batch, capacities)` runs `eval_step` on the devices. A batch that overflows the given
    capacities is run again with more slots, as the later batches are, so that evaluation clips
    nothing.
    """
    result = Evaluation(route_names=route_names, source_of=source_of) if into is None else into
    for batch in batches:
        if should_stop():
            return None
        metrics = jax.device_get(run_batch(batch, capacities))
        while any(np.any(lost > 0) for lost in metrics["overflow_S"]):
            capacities = tuple(
                have and max(have, bucket(MOST_SLOTS, int(np.max(needed)), 8))
                for have, needed in zip(capacities, metrics["max_slots_S"])
            )
            metrics = jax.device_get(run_batch(batch, capacities))
        result.add(batch, metrics)
        if max_bytes is not None and result.num_bytes >= max_bytes:
            break
    return result
