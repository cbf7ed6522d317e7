"""Cross-attention of BLT against the numbers of its own code, and rows that share a memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

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
