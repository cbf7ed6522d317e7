"""Shorter rows for a trained model of tokens: merges per batch, embeddings by a hypernetwork.

    python -m experiments.retokenize --checkpoint WORKDIR --merges 0 16 64

The model (a run over --data.tokenizer, of one stage) stays as it is. In each batch its most
frequent pairs of neighbours within a word become tokens (`hnet.data.batch_merges`), whose
embeddings a hypernetwork makes (`hnet.nn.hypernetwork`). It learns them on the training text of the
run, with the largest number of merges, from the loss of the model. Prints bits per byte of the
held-out text and bytes per position for each number of merges, with means of embeddings and with
the hypernetwork. The merges come from the text that is scored, so a list of them is information
about it: its bits, 2 log2 of the number of tokens per merge, are in the last column.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.table import Table

from hnet import load
from hnet.bounds import Bounds, Count, FilePath
from hnet.command_line import parse, run
from hnet.data import eval_batches, open_corpus, train_batches
from hnet.data.batch_merges import Token, merge_batch
from hnet.data.tokens import LongestMatch, read_vocabulary
from hnet.errors import ConfigError
from hnet.files import json_text
from hnet.model import HNetLM, split
from hnet.nn.context import Context
from hnet.nn.hypernetwork import LONGEST, Hypernetwork
from hnet.runtime.compile_cache import enable_compilation_cache
from hnet.train.workdir import check_text, read_config, tokenizer_of
from hnet.weights.sources import resolve_run


@dataclass(frozen=True)
class Retokenize:
    """Which model, and how many merges."""

    checkpoint: FilePath
    """work directory of a run over tokens"""
    merges: tuple[Annotated[int, Bounds(0, 1 << 12)], ...] = (0, 16, 64)
    """numbers of merges per batch"""
    steps: Annotated[int, Bounds(0, 10_000_000)] = 100
    """updates of the hypernetwork"""
    learning_rate: Annotated[float, Bounds(above=0, most=1000)] = 1e-3
    """learning rate of Adam"""
    batches: Count = 8
    """held-out batches that are scored"""
    seed: Annotated[int, Bounds(0, 2**32 - 1)] = 0
    """seed of the hypernetwork and of the order of the text"""
    json: bool = False
    """print one JSON object instead of a table"""


class Merger:
    """Batches of token ids with merges."""

    def __init__(self, vocabulary, slots: int):
        """slots: new tokens per batch, at most."""
        if isinstance(vocabulary, LongestMatch):
            raise ConfigError(
                f"data.tokenizer={vocabulary.path!r} has no words, inside which tokens are merged: "
                "give a run over bpe, unigram or superbpe"
            )
        self.vocabulary, self.slots = vocabulary, slots
        self.may_merge = lru_cache(maxsize=1 << 16)(self._may_merge)

    def _may_merge(self, left: Token, right: Token) -> bool:
        return self.vocabulary.is_word(b"".join(self.vocabulary.pieces[i] for i in left + right))

    def __call__(self, batch: dict[str, np.ndarray], num_merges: int, base: int) -> dict[str, Any]:
        """The batch with ids from `base` on for new tokens; `spelling_NK`: their old ids, -1 after
        them. Only scored tokens are merged."""
        ids_BL, mask_BL = batch["input_ids"], batch["loss_mask"]
        runs, places = [], []
        for row, (ids_L, mask_L) in enumerate(zip(ids_BL, mask_BL)):
            edges = np.flatnonzero(np.diff(mask_L.astype(np.int8), prepend=0, append=0))
            for start, stop in zip(edges[::2], edges[1::2]):
                places.append((row, start, stop))
                runs.append([(int(i),) for i in ids_L[start:stop]])
        merged, done = merge_batch(runs, num_merges, self.may_merge, LONGEST)
        new = sorted({token for tokens in merged for token in tokens if len(token) > 1})
        number = {token: base + i for i, token in enumerate(new)}
        found = {name: np.zeros_like(batch[name]) for name in ("input_ids", "segment_ids")}
        found |= {"loss_mask": np.zeros_like(mask_BL), "bytes": np.zeros_like(ids_BL)}
        at_B, before_B = np.zeros(len(ids_BL), int), np.zeros(len(ids_BL), int)

        def put(row, ids, segments, scored, sizes):
            place = slice(at_B[row], at_B[row] + len(ids))
            found["input_ids"][row, place], found["segment_ids"][row, place] = ids, segments
            found["loss_mask"][row, place], found["bytes"][row, place] = scored, sizes
            at_B[row] += len(ids)

        def copy(row, stop):
            part = slice(before_B[row], stop)
            put(row, ids_BL[row, part], batch["segment_ids"][row, part], False, 0)

        size_of = lambda token: sum(len(self.vocabulary.pieces[i]) for i in token)
        for (row, start, stop), tokens in zip(places, merged):
            copy(row, start)
            ids = [number.get(token, token[0]) for token in tokens]
            put(row, ids, batch["segment_ids"][row, start], True, [size_of(t) for t in tokens])
            before_B[row] = stop
        for row in range(len(ids_BL)):
            copy(row, ids_BL.shape[1])
        spelling_NK = np.full((self.slots, LONGEST), -1, np.int32)
        for spelling_K, token in zip(spelling_NK, new):
            spelling_K[: len(token)] = token
        return found | {"spelling_NK": spelling_NK, "merges": np.int32(done)}


def total_nats(hyper: Hypernetwork, model: HNetLM, batch: dict[str, Any]) -> jax.Array:
    """Nats of the scored tokens of a batch of `Merger`."""
    spelling_NK = batch["spelling_NK"]
    mask_NK, old_NK = spelling_NK >= 0, jnp.maximum(spelling_NK, 0)
    in_VD = model.embeddings.table_VD
    out_VD = in_VD if model.lm_head is None else model.lm_head.kernel[...].T.astype(jnp.float32)
    exists_N = mask_NK[:, 0]
    mask_NK = mask_NK.at[:, 0].set(True)
    in_ND, out_ND = hyper(in_VD[old_NK], out_VD[old_NK], mask_NK)
    ids_BL, segment_ids_BL = batch["input_ids"], batch["segment_ids"]
    x_BLD = jnp.concatenate([in_VD, in_ND])[ids_BL]
    x_BLD, _ = model.backbone(x_BLD, Context(segment_ids_BL), ())
    new_BLN = jnp.where(
        exists_N[None, None], jnp.dot(x_BLD.astype(jnp.float32), out_ND.T), -jnp.inf
    )
    logits_BLV = jnp.concatenate([model.logits(x_BLD), new_BLN], axis=2)
    nats_BL = optax.losses.softmax_cross_entropy_with_integer_labels(
        logits_BLV[:, :-1], ids_BL[:, 1:]
    )
    return jnp.sum(jnp.where(batch["loss_mask"][:, 1:], nats_BL, 0.0))


def main() -> None:
    config = parse(Retokenize)
    enable_compilation_cache()
    rows = study(config)
    if config.json:
        print(json_text(rows))
        return
    titles = ("merges", "bytes per position", "bpb, means", "bpb, hypernetwork", "+ merges")
    table = Table(*titles, box=None)
    for row in rows:
        merges, *numbers = row.values()
        table.add_row(str(merges), *(f"{x:.4f}" for x in numbers))
    Console().print(table)


def study(config: Retokenize) -> list[dict[str, Any]]:
    """A row for each number of merges."""
    source = resolve_run(config.checkpoint)
    trained = read_config(source.path)
    path = tokenizer_of(source.path, trained.data)
    if not path or trained.model.num_chunked:
        raise ConfigError(f"checkpoint={config.checkpoint} is no run of one stage over tokens")
    data, base = replace(trained.data, tokenizer=path), trained.model.vocab_size
    corpus = open_corpus(data)
    check_text(source.path, data, corpus)
    merger = Merger(read_vocabulary(path), max(1, *config.merges))
    graph, params = split(load(source.path, step=source.step))
    hyper = Hypernetwork(trained.model.stages[0].d_model, rngs=nnx.Rngs(config.seed))
    hyper_graph, weights = nnx.split(hyper)
    optimizer = optax.adam(config.learning_rate)

    def nats(weights, params, batch):
        return total_nats(nnx.merge(hyper_graph, weights), nnx.merge(graph, params), batch)

    @jax.jit
    def update(weights, moments, params, batch):
        count = jnp.maximum(1, jnp.sum(batch["loss_mask"]))
        gradient = jax.grad(lambda w: nats(w, params, batch) / count)(weights)
        change, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(weights, change), moments

    moments, score, first = optimizer.init(weights), jax.jit(nats), weights  # at first: means
    with train_batches(corpus, data, seed=config.seed) as batches:
        for _, batch in zip(range(config.steps), batches):
            weights, moments = update(
                weights, moments, params, merger(batch, max(config.merges), base)
            )
    held = [batch for _, batch in zip(range(config.batches), eval_batches(corpus.heldout, data))]
    found = []
    for num_merges in config.merges:
        merged = [merger(batch, num_merges, base) for batch in held]
        size = sum(int(batch["bytes"].sum()) for batch in merged)
        bits = [sum(float(score(w, params, b)) for b in merged) / size / math.log(2)
                for w in (first, weights)]  # fmt: skip
        positions = sum(int(batch["loss_mask"].sum()) for batch in merged)
        listed = sum(int(batch["merges"]) for batch in merged) * 2 * math.log2(base + num_merges)
        found.append({
            "merges": num_merges, "bytes_per_position": size / positions,
            "bpb_of_means": bits[0], "bpb": bits[1], "list_bits_per_byte": listed / size,
        })  # fmt: skip
    return found


if __name__ == "__main__":
    run(main)
