"""MrT5's network (jkallini/mrt5): our gate, deletion, softmax, losses and controller in a T5.

Ours is decoder-only, so the T5 around them is written here: blocks with relative positions, an
encoder that looks in both directions, a decoder that reads it. Ours has no score regulariser, and
always keeps the first position of a document.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hnet.chunking.boundaries import Boundaries, decide
from hnet.chunking.config import ChunkingConfig
from hnet.chunking.losses.gate_mean import GateMean
from hnet.chunking.part import LossInputs, Place, Positions
from hnet.chunking.predictors.deletion_gate import DeletionGate
from hnet.chunking.rates import rate_counts
from hnet.chunking.slots import open_slots
from hnet.nn.attention import masked_attention
from hnet.nn.context import Context
from tests.golden_data import compare_gradients, load, part, relative_error
from tests.networks import quick_jit

VALUE, GRADIENT = 2e-5, 1e-4
HEADS = 2
KEPT = 0.4  # 1 - delta of the controller, which is not stored
CHUNKING = ChunkingConfig(1 / KEPT, "deletion_gate", losses=("gate_mean",))


def below(w: dict, name: str) -> dict:
    """The parameters below `name.`."""
    return {k.removeprefix(f"{name}."): a for k, a in w.items() if k.startswith(f"{name}.")}


def norm(x, scale):
    squares = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(squares + 1e-6) * scale[None, None]


def relative_bias(table_NH, distance_BLM, *, both: bool, furthest: int = 20):
    """T5's bias (B, H, L, M): buckets of key position - query position."""
    count, first = len(table_NH), 0
    if both:
        count //= 2
        first, distance = jnp.where(distance_BLM > 0, count, 0), jnp.abs(distance_BLM)
    else:
        distance = jnp.maximum(-distance_BLM, 0)
    exact = count // 2
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact)
    ratio = ratio / np.float32(np.log(furthest / exact))
    far = jnp.minimum(exact + (ratio * (count - exact)).astype(jnp.int32), count - 1)
    return jnp.moveaxis(table_NH[first + jnp.where(distance < exact, distance, far)], 3, 1)


def attention(w, x, memory, bias_BHLM, visible_BLM, key_bias_BM=None):
    """(output, excess of scores over 5). Biases per pair are channels of queries and keys here."""
    heads = lambda a, name: (a @ w[f"{name}.weight"].T).reshape(*a.shape[:2], HEADS, -1)
    q, k, v = heads(x, "q"), heads(memory, "k"), heads(memory, "v")
    (B, L), M = x.shape[:2], memory.shape[1]
    bias_BHLM = jnp.broadcast_to(bias_BHLM, (B, HEADS, L, M))
    one_hot = jnp.broadcast_to(jnp.eye(L)[None, :, None], (B, L, HEADS, L))
    wide_q = jnp.concatenate([q, one_hot], axis=-1)
    wide_k = jnp.concatenate([k, jnp.moveaxis(bias_BHLM, 3, 1)], axis=-1)
    out = masked_attention(
        wide_q * np.float32(np.sqrt(wide_q.shape[-1])), wide_k, v, visible_BLM,  # T5 does not scale
        key_bias_BM=key_bias_BM, sink_H=jnp.zeros(HEADS),
    )  # fmt: skip
    scores = jnp.einsum("blhk,bmhk->bhlm", q, k) + bias_BHLM
    excess = jnp.where(visible_BLM[:, None], jnp.maximum(scores - 5, 0.0), 0.0)
    return out.reshape(x.shape) @ w["o.weight"].T, jnp.mean(excess)


def feed_forward(w, x, name):
    own, x = below(w, f"{name}.DenseReluDense"), norm(x, w[f"{name}.layer_norm.weight"])
    gate, y = (x @ own[f"wi_{i}.weight"].T for i in (0, 1))
    return (jax.nn.gelu(gate, approximate=True) * y) @ own["wo.weight"].T


def decisions(w, h, context, capacity: int) -> Boundaries:
    """Gates and decisions of our part."""
    settings = CHUNKING.predictor
    made = DeletionGate(settings, Place(0, h.shape[-1], h.shape[-1], CHUNKING), rngs=nnx.Rngs(0))
    linear = {"kernel": w["feed_forward.weight"].T, "bias": w["feed_forward.bias"]}
    params = {"scale": w["layer_norm.weight"], "feed_forward": linear}
    prediction = nnx.merge(nnx.split(made)[0], params)(Positions(h, context, settings))
    # as if there were a null chunk: otherwise the first position would be kept
    return decide(prediction, context, capacity + 1, has_null_chunk=True)


def network(w, found, probes, *, hard: bool) -> dict:
    """Everything that is stored of a forward pass. probes: added to the states after each block."""
    ids_BL, targets_BT = found["in/ids_BL"], found["in/labels_BT"]
    (B, L), T = ids_BL.shape, targets_BT.shape[1]
    h, made, excess, states = w["shared.weight"][ids_BL], None, [], []
    positions_BL = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32)[None], (B, L))
    context, bias_BM = Context(found["in/attention_mask_BL"], positions_BL), None
    whole = context
    for i, probe in enumerate(probes):
        block = below(w, f"encoder.block.{i}")
        if gate := below(block, "delete_gate"):
            made = decisions(gate, h, context, found["out/kept_len"] if hard else L)
            bias_BM = made.extra
            if hard:
                slots = open_slots(made, context, found["out/kept_len"])
                h, context, bias_BM = slots.gather(h), slots.context, None
        at_BM, seen_BM = context.positions_BL, context.segment_ids_BL != 0
        table = w["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        bias = relative_bias(table, at_BM[:, None] - at_BM[:, :, None], both=True)
        visible = jnp.broadcast_to(seen_BM[:, None], (B, *h.shape[1:2] * 2))
        x = norm(h, block["layer.0.layer_norm.weight"])
        y, more = attention(below(block, "layer.0.SelfAttention"), x, x, bias, visible, bias_BM)
        h = h + y
        h = h + feed_forward(block, h, "layer.1") + probe
        excess += [more] if made else []
        states.append(h)
    memory = norm(h, w["encoder.final_layer_norm.weight"])

    block, index_T = below(w, "decoder.block.0"), jnp.arange(T, dtype=jnp.int32)
    d = w["shared.weight"][jnp.pad(targets_BT[:, :-1], ((0, 0), (1, 0)))]
    distance = jnp.broadcast_to(index_T[None] - index_T[:, None], (B, T, T))
    own = below(block, "layer.0.SelfAttention")
    bias = relative_bias(own["relative_attention_bias.weight"], distance, both=False)
    x = norm(d, block["layer.0.layer_norm.weight"])
    d = d + attention(own, x, x, bias, distance <= 0)[0]
    x = norm(d, block["layer.1.layer_norm.weight"])
    visible = jnp.broadcast_to(seen_BM[:, None], (B, T, h.shape[1]))
    zero = jnp.zeros((1, 1, 1, 1))
    y, more = attention(below(block, "layer.1.EncDecAttention"), x, memory, zero, visible, bias_BM)
    d = d + y
    d = norm(d + feed_forward(block, d, "layer.2"), w["decoder.final_layer_norm.weight"])
    logits_BTV = d @ w["lm_head.weight"].T

    nll_BTV = -jax.nn.log_softmax(logits_BTV)
    ce = jnp.mean(jnp.take_along_axis(nll_BTV, targets_BT[..., None], -1))
    (settings,), counts = CHUNKING.losses, rate_counts(made, 1)
    ratio_R = np.float32([1 / KEPT])
    gate_mean = GateMean()(LossInputs(made, settings, ratio_R, False, counts, counts))
    P, I, _ = GateMean().next_state(GateMean().init(), counts, ratio_R, settings)
    return {
        "logits_BTV": logits_BTV[:, :, :300:3], "ce": ce,
        "total_loss": ce + gate_mean + 0.5 * sum([*excess, more]) / (len(excess) + 1),
        "coeff_after": jnp.maximum(P + I, 0.0), "gate_BL": made.extra, "seen_BM": seen_BM,
        "encoder_last_BMD": memory, "states": states, "mask_BL": made.boundary_mask_BL,
        "valid_BL": whole.segment_ids_BL != 0,
    }  # fmt: skip


@pytest.mark.few("kind", ["soft"], ["soft", "hard"])
def test_mrt5_network(kind):
    """Logits, losses, gates, the deleted positions, gradients of states and of all parameters."""
    found, stored = load(f"family/mrt5_net_{kind}"), load("family/mrt5_net_soft")
    weights, is_hard = part(stored, "param"), kind == "hard"
    B, L = found["in/ids_BL"].shape
    block = next(int(k.split(".")[2]) for k in weights if "delete_gate" in k)
    num_blocks = len(
        [k for k in weights if "encoder" in k and k.endswith("SelfAttention.q.weight")]
    )
    D, M = weights["shared.weight"].shape[1], int(found["out/kept_len"])
    found["out/kept_len"] = M
    probes = [np.zeros((B, L if i < block else M, D), np.float32) for i in range(num_blocks)]

    @quick_jit
    def run(weights, probes):
        def scalar(weights, probes):
            out = network(weights, found, probes, hard=is_hard)
            return out["total_loss"], out

        return jax.value_and_grad(scalar, (0, 1), has_aux=True)(weights, probes)

    (_, out), (grads, by_state) = jax.device_get(run(weights, probes))
    valid_BL, seen_BM = out["valid_BL"], out["seen_BM"]
    agree = lambda ours, name, tolerance=VALUE: (
        relative_error(ours, found[name]) < tolerance or pytest.fail(name)
    )
    for name in ("logits_BTV", "ce", "total_loss", "coeff_after"):
        agree(out[name], f"out/{name}")
    gate_BL = found["out/gate_BL"]
    assert relative_error(out["gate_BL"][valid_BL], gate_BL[valid_BL]) < VALUE
    kept_BL = (gate_BL > -15) & valid_BL
    assert np.array_equal(out["mask_BL"], kept_BL) and 0 < kept_BL.sum() < valid_BL.sum()
    if is_hard:
        assert kept_BL.sum(1).max() == M
        assert np.array_equal(seen_BM, found["out/gate_mask"] == 0)
    last_BMD = found["out/encoder_last_BMD"]
    assert relative_error(out["encoder_last_BMD"][seen_BM], last_BMD[seen_BM]) < VALUE
    for i in range(num_blocks):
        if (name := f"inter/after_block{i}") in found:
            own_BL = valid_BL if i < block else seen_BM
            assert relative_error(out["states"][i][own_BL], found[name][own_BL]) < VALUE
            agree(by_state[i], f"intergrad/after_block{i}", GRADIENT)
    assert compare_gradients(grads, found, part(stored, "signs")) == set(weights)
