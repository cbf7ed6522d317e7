"""Decode throughput by batch size, against a main network at every byte and against one row.

    python -m experiments.benchmarks.decode [--batches 1 8 32] [--bytes-per-chunk 4.5]

A random network samples random bytes and its router reads them, so boundaries fall at different
times in each row; the router's bias is set to give the wanted rate. Four variants run as in
`generate`, interleaved: rows that wait, the same in a plain loop over stacked layers, rows in step,
and a bias that gives a boundary at every byte; each figure is the median over `repeats`. One row in
step is the official algorithm: the main network runs at each boundary.

The main network's weights (453 MB in float32) do not fit into caches, as at all published sizes:
one row is bound by reading the weights, and many rows share one read.
"""

import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from hnet.bounds import Bounds, Repeats, Rows, Share, Width
from hnet.chunking.config import ChunkingConfig
from hnet.chunking.predictors.mlp import MLP
from hnet.command_line import parse, run
from hnet.config import (
    BOS_ID,
    EOS_ID,
    HNetConfig,
    SSMConfig,
    StageConfig,
)
from hnet.config_check import approximate_parameters
from hnet.decode.cache_memory import free_memory
from hnet.decode.decoder import WAIT_SHARE, Decoder
from hnet.decode.sampling import Controls, Sampling
from hnet.errors import ConfigError
from hnet.files import json_text
from hnet.flops_published import published_flops
from hnet.model import HNetLM, abstract, init_params

TICKS = 64  # decoding steps between two checks by the host
MIN_ROWS = 8  # least rows per figure, so that chance does not decide the boundary rate


@dataclass(frozen=True)
class DecodeBenchmark:
    """What to decode and how often."""

    batches: tuple[Rows, ...] = (1, 8, 32)
    """numbers of rows decoded together; 1 is always measured"""
    bytes_per_chunk: Annotated[float, Bounds(1, 1000)] = 4.5
    """mean chunk length"""
    outer_width: Width = 256
    """d_model of the encoder and decoder, one Mamba-2 layer each"""
    main_width: Width = 768
    """d_model of the main network"""
    main_layers: Annotated[int, Bounds(1, 1000)] = 12
    """number of attention layers with MLP in the main network"""
    wait_share: Share = WAIT_SHARE
    """share of the rows that the main network waits for"""
    bytes: Annotated[int, Bounds(1, 1 << 20)] = 64
    """decoded bytes per row on average, from an empty context"""
    repeats: Repeats = 3
    """number of interleaved measurements"""

    def __post_init__(self):
        if not self.batches:
            raise ConfigError("batches=(): give at least one")


@dataclass(frozen=True)
class Command(DecodeBenchmark):
    """What to decode and how often."""

    json: bool = False
    """print one JSON object instead of a table"""


def network(config: DecodeBenchmark) -> HNetConfig:
    """The network to decode. Its router has a bias, unlike the cosine router, and as many
    parameters as the cosine router."""
    chunking = ChunkingConfig(predictor=MLP.Config(width=2 * config.outer_width))
    outer = StageConfig(("m1", "m1"), config.outer_width, chunking=chunking)
    main = StageConfig(
        (f"T{config.main_layers}",), config.main_width, 4 * config.main_width, 8,
        rotary_emb_dim=config.main_width // 16,
    )  # fmt: skip
    return HNetConfig((outer, main), ssm=SSMConfig(d_state=16))


def main_share(config: DecodeBenchmark) -> float:
    """Main network's share of the FLOPs per byte without chunking."""
    lengths = (config.bytes, config.bytes)
    parts = published_flops(network(config), lengths)
    return parts["stage1/main_network"] / sum(parts.values())


def make_models(config: DecodeBenchmark) -> tuple[HNetLM, HNetLM]:
    """(network with its router at the wanted rate, the same with a boundary at every byte)."""
    graph, _ = abstract(network(config))
    needed, free = 4 * approximate_parameters(network(config)), free_memory()
    if free is not None and needed > free:
        raise ConfigError(
            f"outer_width={config.outer_width}, main_width={config.main_width}, main_layers="
            f"{config.main_layers}: these parameters need {needed / 1e9:,.1f} GB, and "
            f"{free / 1e9:,.1f} GB are free: use fewer"
        )
    params = init_params(network(config), jax.random.key(0))
    rng = np.random.default_rng(0)
    ids_BL = rng.integers(0, EOS_ID, (64, 128)).astype(np.int32)
    find = lambda params: nnx.merge(graph, params)(ids_BL)[1][0].boundary_logit_BL
    logits = np.asarray(jax.jit(find)(params))[:, 1:]
    lowered = float(np.quantile(logits, 1 - 1 / config.bytes_per_chunk))

    def raised(amount):
        model = nnx.merge(graph, params)
        output = model.backbone.routing_module.fc2
        output.bias = nnx.Param(output.bias[...] + amount)
        return model

    return raised(-lowered), raised(100.0)


class Decoding:
    """Rows that are continued together, from a BOS."""

    def __init__(
        self, model: HNetLM, config: DecodeBenchmark, batch: int, wait_share: float, rounds: int,
        layers_apart: bool | None = None,
    ):  # fmt: skip
        self.decoder = Decoder(model, wait_share, layers_apart)
        self.batch, self.bytes, self.rounds = batch, config.bytes, rounds
        # twice the length, so that no row is full when the average row has `bytes`
        self.sampling = Sampling(max_bytes=2 * config.bytes, eos=False)

    def measure(self) -> tuple[float, float]:
        """(bytes per second over all rows, bytes per chunk)."""
        seconds, num_bytes, num_boundaries = 0.0, 0, 0
        for i in range(self.rounds):
            state, _ = self.decoder.start([bytes([BOS_ID])] * self.batch, self.sampling)
            controls = Controls.of(self.sampling)
            seed_B = jnp.arange(self.batch, dtype=jnp.uint32) + jnp.uint32(i * self.batch)
            jax.block_until_ready(state)
            began, wanted = time.perf_counter(), num_bytes + self.batch * self.bytes
            while num_bytes < wanted:
                state, outputs = self.decoder.run(state, controls, seed_B, TICKS)
                _, _, boundaries_TBS, given_TB = jax.device_get(outputs)
                num_bytes += int(given_TB.sum())
                num_boundaries += int(boundaries_TBS[given_TB].sum())
            seconds += time.perf_counter() - began
        return num_bytes / seconds, num_bytes / num_boundaries


def measure(config: DecodeBenchmark) -> dict[str, Any]:
    """All figures as plain JSON content; rates are bytes per second over all rows."""
    cut, every_byte = make_models(config)
    batches = sorted({1, *config.batches})
    decodings = {}
    for batch in batches:
        rounds = max(1, MIN_ROWS // batch)
        decodings[batch, "bytes_per_sec"] = Decoding(cut, config, batch, config.wait_share, rounds)
        decodings[batch, "layers_stacked"] = Decoding(
            cut, config, batch, config.wait_share, rounds, layers_apart=False
        )
        decodings[batch, "in_step"] = Decoding(cut, config, batch, 0.0, rounds)
        decodings[batch, "main_at_every_byte"] = Decoding(every_byte, config, batch, 0.0, 1)
    rates, sizes = defaultdict(list), {}
    for repeat in range(config.repeats + 1):
        for (batch, how), decoding in decodings.items():
            rate, sizes[batch, how] = decoding.measure()
            if repeat:  # the first one compiles
                rates[batch, how].append(rate)
    rows = []
    for batch in batches:
        row = {how: statistics.median(rates[batch, how]) for b, how in decodings if b == batch}
        rate = row["bytes_per_sec"]
        rows.append(
            {
                "batch": batch,
                **row,
                "over_layers_stacked": rate / row["layers_stacked"],
                "over_main_at_every_byte": rate / row["main_at_every_byte"],
                "over_batch_1": rate / statistics.median(rates[1, "in_step"]),
                "bytes_per_chunk": sizes[batch, "bytes_per_sec"],
            }
        )
    return {"main_share_of_flops": main_share(config), "batches": rows}


def show(found: dict[str, Any], console: Console) -> None:
    share = found["main_share_of_flops"]
    console.print(f"decoding; main network {share:.1%} of the FLOPs per byte without chunking")
    table = Table(
        "rows", "bytes/s", "bytes/chunk", "layers stacked", "over it", "rows in step",
        "main at every byte", "over it", "over 1 row", box=None,
    )  # fmt: skip
    for row in found["batches"]:
        table.add_row(
            str(row["batch"]),
            f"{row['bytes_per_sec']:,.0f}",
            f"{row['bytes_per_chunk']:.2f}",
            f"{row['layers_stacked']:,.0f}",
            f"{row['over_layers_stacked']:.2f} x",
            f"{row['in_step']:,.0f}",
            f"{row['main_at_every_byte']:,.0f}",
            f"{row['over_main_at_every_byte']:.2f} x",
            f"{row['over_batch_1']:.2f} x",
        )
    console.print(table)


def main() -> None:
    config = parse(Command)
    found = measure(config)
    if config.json:
        print(json_text(found))
    else:
        show(found, Console(highlight=False))


if __name__ == "__main__":
    run(main)
