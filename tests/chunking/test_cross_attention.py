"""Cross-attention of BLT against the numbers of its own code, and rows that share a memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hnet.chunking.boundaries import Prediction, decide
from hnet.chunking.config import ChunkingConfig
from hnet.chunking.part import Place, Positions
from hnet.chunking.pools.cross_attention import CrossAttention
from hnet.chunking.slots import open_slots
from hnet.config import HNetConfig, StageConfig
from hnet.nn.context import Context, Memory
from hnet.nn.isotropic import Block
from tests.golden_data import load, part, relative_error
from tests.networks import quick_jit

VALUE, GRADIENT = 2e-5, 1e-4
D, HEADS = 16, 2


def attention_params(found: dict) -> dict:
    """Parameters of our pool or layer from those of BLT's CrossAttention."""
    w = {name: jnp.asarray(found[f"{name}.weight"].T) for name in ("wq", "wk", "wv", "wo")}
    return {
        "Wq": {"kernel": w["wq"]},
        "Wkv": {"kernel": jnp.concatenate([w["wk"], w["wv"]], axis=1)},
        "out_proj": {"kernel": w["wo"]},
    }


def scale(found: dict, name: str) -> dict:
    return {"scale": jnp.asarray(found[f"cross_attn_norm_{name}.weight"])}


def gradients_agree(grads: dict, found: dict):
    for ours, theirs in ((grads["Wq"], ("wq",)), (grads["Wkv"], ("wk", "wv"))):
        theirs = np.concatenate([found[f"{name}.weight"].T for name in theirs], axis=1)
        assert relative_error(ours["kernel"], theirs) < GRADIENT
    assert relative_error(grads["out_proj"]["kernel"], found["wo.weight"].T) < GRADIENT


# --- layers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_a_layer_is_blts_cross_attention(kind):
    """Queries of patches read bytes, bytes read vectors of patches; masks are exact."""
    numbers = load("family/blt_cross_pieces")
    found = part(numbers, "cross/param")
    patch_BL, decoder_BL = numbers["patch_ids_BL"], numbers["decoder_patch_ids_BL"]
    of_query = np.tile(np.repeat(np.arange(6, dtype=np.int32), 2), (2, 1))
    if kind == "encoder":
        x, memory = numbers["encoder_cross/query_BQD"], numbers["hidden_BLD"]
        memory = Memory(memory[:, :, None], of_query, patch_BL)
    else:
        x, memory = numbers["hidden_BLD"], numbers["decoder_cross/kv_BKD"]
        memory = Memory(memory.reshape(2, 6, 2, D), decoder_BL)
        assert np.array_equal(
            decoder_BL[:, :, None] == of_query[:, None], numbers["mask/decoder_windowNone"]
        )
    stage = StageConfig(("t1",), D, num_heads=HEADS, rotary_emb_dim=2)
    block = Block(HNetConfig((stage,)), stage, "x", out_std=1.0, rngs=nnx.Rngs(0))
    graph, _ = nnx.split(block)
    params = {
        "norm1": scale(found, "q"),
        "mixer": {**attention_params(found), "memory_norm": scale(found, "kv")},
    }
    cot = numbers[f"{kind}_cross/cot_" + ("BQD" if kind == "encoder" else "BLD")]

    def scalar(params, x, x_GMND):
        context = Context(jnp.ones(x.shape[:2], jnp.int32), memory=memory._replace(x_GMND=x_GMND))
        out = nnx.merge(graph, params)(x, context)
        return jnp.sum(out * cot), out

    run = quick_jit(jax.value_and_grad(scalar, (0, 1, 2), has_aux=True))
    (_, out), (grads, dx, dmemory) = run(params, x, memory.x_GMND)
    get = lambda name: numbers[f"{kind}_cross/{name}"]
    if kind == "encoder":
        assert relative_error(out, get("out_BQD")) < VALUE
        assert relative_error(dx, get("grad_query_BQD")) < GRADIENT
        assert relative_error(dmemory[:, :, 0], get("grad_hidden_BLD")) < GRADIENT
    else:
        assert relative_error(out, get("out_BLD")) < VALUE
        assert relative_error(dx, get("grad_hidden_BLD")) < GRADIENT
        assert relative_error(dmemory.reshape(2, 12, D), get("grad_kv_BKD")) < GRADIENT
    theirs = part(numbers, f"{kind}_cross/grad_param")
    gradients_agree(grads["mixer"], theirs)
    assert relative_error(grads["norm1"]["scale"], theirs["cross_attn_norm_q.weight"]) < GRADIENT


# --- the pool -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "window"), [("blt_net_cross", 1), ("blt_net_cross_windowed", 3)])
def test_the_pool_is_blts_encoder_of_patches(name, window):
    """k = 2 queries per patch; in the reference a byte's query reads 3 patches if windowed.

    The last patch is not compared: the reference closes it before its last byte, and no position
    reads it.
    """
    numbers, weights = load(f"family/{name}"), load("family/blt_net_cross")
    h_BLD, lengths_BM = numbers["inter/encoder_h_BLD"], numbers["in/patch_lengths_BM"]
    B, L, _ = h_BLD.shape
    M = lengths_BM.shape[1]
    ends_BM = np.cumsum(lengths_BM, axis=1) - 1
    b_BL = np.zeros((B, L), np.float32)
    for row in range(B):
        b_BL[row, ends_BM[row][ends_BM[row] < L]] = 1
    config = CrossAttention.Config(2, HEADS, window=window, reference_doubled_residual=True)
    chunking = ChunkingConfig(
        predictor="external", alignment="end", null="first", pool=config, max_chunk_len=9
    )
    pool = CrossAttention(config, Place(0, D, 2 * D, chunking), rngs=nnx.Rngs(0))
    graph, _ = nnx.split(pool)
    at = "local_encoder.cross_attn_layers.0"
    found = {k.removeprefix(f"{at}."): a for k, a in part(weights, "param").items() if at in k}
    projection = "local_encoder.patch_embedding_projection.weight"
    params = {
        **attention_params(found), "query_norm": scale(found, "q"), "norm": scale(found, "kv"),
        "queries": {"kernel": jnp.asarray(weights[f"param/{projection}"].T)},
    }  # fmt: skip
    context = Context(np.ones((B, L), np.int32))
    boundaries = decide(Prediction(prob=b_BL), context, M)
    slots = open_slots(boundaries, context, M)
    cot_BMX = numbers["intergrad/patch_queries_out_BQD"].reshape(B, M, 2 * D)

    def scalar(params):
        out_BMX = nnx.merge(graph, params)(Positions(h_BLD, context, config), boundaries, slots)
        return jnp.sum(out_BMX * cot_BMX), out_BMX

    (_, out_BMX), grads = quick_jit(jax.value_and_grad(scalar, has_aux=True))(params)
    used_BM = np.asarray(slots.context.segment_ids_BL) != 0
    assert np.array_equal(used_BM.sum(1), (lengths_BM > 0).sum(1) - 1)
    theirs_BMX = numbers["inter/patch_queries_out_BQD"].reshape(B, M, 2 * D)
    assert relative_error(out_BMX[used_BM], theirs_BMX[used_BM]) < VALUE
    theirs = part(numbers, "grad/param")
    own = {k.removeprefix(f"{at}."): a for k, a in theirs.items() if at in k}
    gradients_agree(grads, own)
    assert relative_error(grads["queries"]["kernel"], theirs[projection].T) < GRADIENT
    for norm, key in (("query_norm", "q"), ("norm", "kv")):
        assert relative_error(grads[norm]["scale"], own[f"cross_attn_norm_{key}.weight"]) < GRADIENT
