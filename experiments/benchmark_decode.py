"""Decode throughput by batch size, beside a main network at every byte and beside one row.

    python -m experiments.benchmark_decode [--batches 1 8 32] [--bytes-per-chunk 4.5]

A random network decodes greedily; where its rows cut is drawn at random, each row for itself, so
that the compression is known. For each batch size the same compiled step runs with these cuts and
with a cut at every byte, in turns; each figure is the median over `repeats`. A batch of 1 is the
official algorithm: one row, the main network at each boundary. On two CPU cores about a minute.
"""

import json
import statistics
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from experiments.command_line import parse, run
from hnet.chunking.config import ChunkingConfig
from hnet.config import ConfigError, HNetConfig, SSMConfig, StageConfig
from hnet.flops import flops_by_part, forward_terms
from hnet.infer import stream
from hnet.model import abstract, init_params


@dataclass(frozen=True)
class DecodeBenchmark:
    """What to decode and how often."""

    batches: tuple[int, ...] = (1, 8, 32)
    """rows decoded together; 1 is always measured"""
    bytes_per_chunk: float = 4.5
    """mean of the random chunk lengths"""
    outer_width: int = 128
    """d_model of the encoder and decoder, one Mamba-2 layer each"""
    main_width: int = 256
    """d_model of the main network"""
    main_layers: int = 6
    """attention layers with MLP in the main network"""
    bytes: int = 128
    """decoded bytes a row, from an empty context"""
    repeats: int = 7
    """measurements of everything, in turns"""
    json: bool = False
    """print one JSON object instead of a table"""

    def __post_init__(self):
        for name in ("outer_width", "main_width", "main_layers", "bytes", "repeats"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"{name}={value}: use 1 or more")
        if self.bytes_per_chunk < 1 or not self.batches or min(self.batches) < 1:
            raise ConfigError(
                f"bytes_per_chunk={self.bytes_per_chunk}, batches={self.batches}: use 1 or more"
            )


def network(config: DecodeBenchmark) -> HNetConfig:
    """The network that is decoded; the router takes its cuts from outside."""
    outer = StageConfig(("m1", "m1"), config.outer_width, chunking=ChunkingConfig(router="given"))
    main = StageConfig(
        (f"T{config.main_layers}",), config.main_width, 4 * config.main_width, 8,
        rotary_emb_dim=config.main_width // 16,
    )  # fmt: skip
    return HNetConfig((outer, main), ssm=SSMConfig(d_state=32))


def main_share(config: DecodeBenchmark) -> float:
    """Share of the main network in the FLOPs that a byte costs without chunking."""
    lengths = (config.bytes, config.bytes)
    parts = flops_by_part(forward_terms(network(config), lengths, "published"))
    return parts["stage1/main_network"] / sum(parts.values())


class _Program:
    """The compiled decoding of one batch size."""

    def __init__(self, config: DecodeBenchmark, params: Any, graph: nnx.GraphDef, batch: int):
        self.params, self.batch, self.length = params, batch, config.bytes
        rng = np.random.default_rng(batch)
        self.cuts_TB = jnp.asarray(rng.random((config.bytes, batch)) < 1 / config.bytes_per_chunk)
        lens = stream.full_lens(network(config), config.bytes)

        @jax.jit
        def start(params):
            empty = jnp.zeros((batch, 1), jnp.int32), jnp.zeros((batch,), jnp.int32)
            no_cuts = jnp.zeros((batch, 1), bool)
            model = nnx.merge(graph, params)
            return stream.prefill(model, *empty, lens, boundaries_BL=no_cuts)[2]

        @partial(jax.jit, donate_argnums=1)
        def decode(params, cache, cuts_TB):
            model = nnx.merge(graph, params)

            def one(carry, cut_B):
                cache, byte_B = carry
                logits_BV, _, cache = stream.step(model, cache, byte_B, boundary_B=cut_B)
                byte_B = jnp.argmax(logits_BV, axis=1).astype(jnp.int32)
                return (cache, byte_B), byte_B

            return jax.lax.scan(one, (cache, jnp.zeros((batch,), jnp.int32)), cuts_TB)

        self._start, self._decode = start, decode

    def bytes_per_second(self, every_byte: bool) -> float:
        cuts_TB = jnp.ones_like(self.cuts_TB) if every_byte else self.cuts_TB
        cache = jax.block_until_ready(self._start(self.params))
        began = time.perf_counter()
        jax.block_until_ready(self._decode(self.params, cache, cuts_TB))
        return self.batch * self.length / (time.perf_counter() - began)


def measure(config: DecodeBenchmark) -> dict[str, Any]:
    """All figures of the benchmark, as plain JSON content; rates are bytes a second, all rows."""
    graph, _ = abstract(network(config))
    params = init_params(network(config), jax.random.key(0))
    batches = sorted({1, *config.batches})
    programs = [_Program(config, params, graph, batch) for batch in batches]
    rates: dict[tuple[int, bool], list[float]] = {}
    for repeat in range(config.repeats + 1):
        for program in programs:
            for every_byte in (False, True):
                rate = program.bytes_per_second(every_byte)
                if repeat:  # the first one compiles
                    rates.setdefault((program.batch, every_byte), []).append(rate)
    median = {key: statistics.median(values) for key, values in rates.items()}
    rows = [
        {
            "batch": batch,
            "bytes_per_sec": median[batch, False],
            "bytes_per_sec_main_at_every_byte": median[batch, True],
            "over_main_at_every_byte": median[batch, False] / median[batch, True],
            "over_batch_1": median[batch, False] / median[1, False],
        }
        for batch in batches
    ]
    cuts = np.concatenate([np.asarray(program.cuts_TB) for program in programs], axis=1)
    cuts[0] = True  # each row begins with a chunk
    return {
        "main_share_of_flops": main_share(config),
        "bytes_per_chunk": cuts.size / int(cuts.sum()),
        "batches": rows,
    }


def main() -> None:
    config = parse(DecodeBenchmark)
    found = measure(config)
    if config.json:
        print(json.dumps(found))
        return
    console = Console(highlight=False)
    console.print(
        f"main network: {found['main_share_of_flops']:.1%} of the FLOPs without chunking; "
        f"{found['bytes_per_chunk']:.2f} bytes a chunk"
    )
    table = Table("rows", "bytes/s", "main at every byte", "over it", "over 1 row", box=None)
    for row in found["batches"]:
        table.add_row(
            str(row["batch"]),
            f"{row['bytes_per_sec']:,.0f}",
            f"{row['bytes_per_sec_main_at_every_byte']:,.0f}",
            f"{row['over_main_at_every_byte']:.2f} x",
            f"{row['over_batch_1']:.2f} x",
        )
    console.print(table)


if __name__ == "__main__":
    run(main)
