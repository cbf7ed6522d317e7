"""Bits per byte of training batches for each source and each script."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hnet.data.scripts import SCRIPTS
from hnet.inspect.tags import without_folders
from hnet.loss import bits_per_byte, next_byte_nll


def group_sums(
    logits_BLV: jax.Array, batch: Mapping[str, jax.Array], num_sources: int
) -> dict[str, jax.Array]:
    """`source_nats` and `source_bytes` (sources,), `script_nats` and `script_bytes` (scripts,):
    sums over the source bytes of a batch that has `source_ids` and `script_ids`; else {}."""
    found = {}
    for kind, size in (("source", num_sources), ("script", len(SCRIPTS))):
        if (ids_BL := batch.get(f"{kind}_ids")) is None:
            continue
        mask_BL, zeros = batch["loss_mask"], jnp.zeros((size,))
        bytes_BL = jnp.where(mask_BL, batch.get("byte_lengths", 1), 0).astype(jnp.float32)
        nll_BL = jnp.where(mask_BL, next_byte_nll(logits_BLV, batch["input_ids"]), 0.0)
        found[f"{kind}_nats"] = zeros.at[ids_BL].add(nll_BL)
        found[f"{kind}_bytes"] = zeros.at[ids_BL].add(bytes_BL)
    return found


def group_bpb(metrics: Mapping[str, Any], globs: Iterable[str]) -> dict[str, float]:
    """`train/source_NAME/bpb` and `train/script_NAME/bpb` of those that a batch has, from the sums
    on the host; a kind is left out if there is only one. globs: names of the sources."""
    found = {}
    for kind, names in (("source", without_folders(globs).values()), ("script", SCRIPTS)):
        if f"{kind}_nats" not in metrics:
            continue
        own = zip(names, metrics[f"{kind}_nats"], metrics[f"{kind}_bytes"])
        sums = [(name, float(nats), float(n)) for name, nats, n in own if n]
        if len(sums) > 1:
            found |= {f"train/{kind}_{name}/bpb": bits_per_byte(nats, n) for name, nats, n in sums}
    return found
