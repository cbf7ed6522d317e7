"""Comparison with the official model (tests/golden): the whole network, then its parts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hnet.chunking.losses.ratio import ratio_loss
from hnet.chunking.predictors.cosine import half_cosine_distance
from hnet.chunking.rates import boundary_rates
from hnet.interop import from_official, to_official
from hnet.model import split
from hnet.nn.kernels.attention_blocks import attention_blocks
from hnet.nn.kernels.ssd_blocks import ssd_blocks
from hnet.nn.layers import rotary, segment_positions
from tests import golden_data
from tests.chunking_pieces import chunked, dechunked, decided, previous
from tests.golden_data import projections, relative_error
from tests.networks import quick_jit

LOGIT_TOLERANCE = 2e-5
PROB_TOLERANCE = 3e-6
LOSS_TOLERANCE = 5e-6
COLUMNS = slice(None, None, 11)  # the byte values whose logits are stored


def close(ours, theirs, tolerance):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


# --- the whole network --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def official():
    return golden_data.load("a_1stage_m2_T2")


@pytest.fixture(scope="module")
def network(official):
    """(structure, parameters, loss and gradient of a batch as one compiled program)."""
    config = json.loads(str(official["config"]))
    graph, params = split(from_official(config, golden_data.part(official, "param")))

    @jax.jit
    def evaluate(params, ids_BL, mask_BL):
        def loss(params):
            logits, (route,) = nnx.merge(graph, params)(ids_BL, mask_BL.astype(jnp.int32))
            log_prob = jax.nn.log_softmax(logits[:, :-1])
            nll = -jnp.take_along_axis(log_prob, ids_BL[:, 1:, None], axis=-1)[..., 0]
            scored = mask_BL[:, 1:]
            ce = jnp.sum(jnp.where(scored, nll, 0)) / jnp.sum(scored, dtype=jnp.float32)
            ratio = ratio_loss(*boundary_rates(route), 3.0)
            return ce + 0.03 * ratio, (ce, ratio, logits, route)

        return jax.value_and_grad(loss, has_aux=True)(params)

    return graph, params, evaluate


@pytest.mark.parametrize("case", ["full", "pad"])
def test_network(official, network, case):
    graph, params, evaluate = network
    theirs = golden_data.part(official, case)
    mask = theirs["mask"]
    (loss, (ce, ratio, logits, route)), grads = evaluate(params, theirs["input_ids"], mask)

    shown = np.asarray(logits)[..., COLUMNS]
    close(shown[mask], theirs["logits"][mask], LOGIT_TOLERANCE)
    assert np.array_equal(np.asarray(route.boundary_mask_BL)[mask], theirs["boundary_mask"][mask])
    close(np.asarray(route.boundary_prob_BL)[mask], theirs["boundary_prob"][mask], PROB_TOLERANCE)
    close(ce, theirs["ce"], LOSS_TOLERANCE)
    close(ratio, theirs["ratio_loss"], LOSS_TOLERANCE)
    close(loss, theirs["loss_packed"], LOSS_TOLERANCE)

    _, ours = to_official(nnx.merge(graph, grads))
    signs = golden_data.part(official, "signs")
    expected = golden_data.part(theirs, "grad")
    seen, squared_error, squared = set(), 0.0, 0.0
    for name, gradient in ours.items():
        for suffix, projected in projections(gradient, signs).items():
            reference = expected[name + suffix]
            assert relative_error(projected, reference) < 1e-4, name
            squared_error += np.sum((projected - reference) ** 2)
            squared += np.sum(reference.astype(np.float64) ** 2)
            seen.add(name + suffix)
    assert seen == set(expected)
    assert np.sqrt(squared_error / squared) < 5e-6


def test_network_agrees_with_official_decoding(official, network):
    """The official step-by-step logits are our forward pass; its greedy bytes are our argmax."""
    _, params, evaluate = network
    prompt, tokens = official["greedy/prompt"][0], official["greedy/tokens"][0]
    ids = np.zeros((3, 64), np.int32)
    ids[0] = official["step/input_ids"][0]
    ids[1, : len(prompt) + len(tokens)] = np.concatenate([prompt, tokens])
    _, (_, _, logits, route) = evaluate(params, ids, np.ones((3, 64), bool))[0]
    logits = np.asarray(logits)
    close(logits[0, :, COLUMNS], official["step/logits"][0], LOGIT_TOLERANCE)
    close(route.boundary_prob_BL[0], official["step/boundary_prob"], PROB_TOLERANCE)
    chosen_from = logits[1, len(prompt) - 1 : len(prompt) + len(tokens) - 1]
    close(chosen_from[:, COLUMNS], official["greedy/logits"][0], LOGIT_TOLERANCE)
    assert np.array_equal(chosen_from.argmax(-1), tokens)


def test_round_trip_is_bit_exact(official, network):
    config, params = json.loads(str(official["config"])), golden_data.part(official, "param")
    back_config, back = to_official(nnx.merge(*network[:2]))
    assert back_config == config
    assert set(back) == set(params)
    for name, array in params.items():
        assert back[name].dtype == array.dtype and np.array_equal(back[name], array), name


# --- the pieces ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pieces():
    return golden_data.load("pieces")


def test_routing(pieces):
    piece, signs = golden_data.part(pieces, "routing"), golden_data.part(pieces, "signs")
    x_BLD = piece["in/hidden"]
    weights = [piece[f"param/{n}_proj_layer.weight"] for n in "qk"]
    whole_rows = np.ones(x_BLD.shape[:2], np.int32)  # the official scalar includes padding

    def scalar(x_BLD, Wq, Wk):
        q = jnp.einsum("bld,ed->ble", previous(x_BLD), Wq)
        k = jnp.einsum("bld,ed->ble", x_BLD, Wk)
        route = decided(half_cosine_distance(q, k), whole_rows, x_BLD.shape[1])
        p, selected = route.boundary_prob_BL, route.selected_prob_BL
        return jnp.sum(p * piece["in/cot_p"] + selected * piece["in/cot_selected"]), route

    (_, route), grads = quick_jit(jax.value_and_grad(scalar, (0, 1, 2), has_aux=True))(
        x_BLD, *weights
    )
    mask = piece["in/mask"]
    close(route.boundary_prob_BL, piece["out/p"], PROB_TOLERANCE)
    close(route.selected_prob_BL, piece["out/selected"], PROB_TOLERANCE)
    assert np.array_equal(np.asarray(route.boundary_mask_BL) & mask, piece["out/boundary_mask"])
    assert relative_error(grads[0][0], piece["grad/hidden_row0"]) < 5e-5
    for name, grad in zip("qk", grads[1:]):
        for suffix, projected in projections(grad, signs).items():
            expected = piece[f"grad/{name}_proj_layer.weight{suffix}"]
            assert relative_error(projected, expected) < 5e-5

    # the valid positions of the three rows as documents of one row
    lengths = np.diff(piece["packed/cu_seqlens"])
    segments = np.repeat(np.arange(1, 4, dtype=np.int32), lengths)[None]
    packed = np.concatenate([x[m] for x, m in zip(x_BLD, mask)])[None]
    q, k = np.asarray(previous(packed)) @ weights[0].T, packed @ weights[1].T
    route = decided(half_cosine_distance(q, k), segments, packed.shape[1])
    close(route.boundary_prob_BL[0], piece["packed/p"], PROB_TOLERANCE)
    assert np.array_equal(route.boundary_mask_BL[0], piece["packed/boundary_mask"])


def test_routing_of_zero_parallel_and_opposite_vectors(pieces):
    piece = golden_data.part(pieces, "routing/edge")
    segments = np.ones(piece["p"].shape, np.int32)
    p = half_cosine_distance(previous(piece["hidden"]), piece["hidden"])
    route = decided(p, segments, segments.shape[1])
    close(route.boundary_prob_BL, piece["p"], 0)
    assert np.array_equal(route.boundary_mask_BL, piece["boundary_mask"])


def test_chunk(pieces):
    piece = golden_data.part(pieces, "chunk")
    x_BLD = pieces["routing/in/hidden"]
    segments = pieces["routing/in/mask"].astype(np.int32)
    mask, capacity = piece["in/boundary_mask"], piece["out/next_mask"].shape[1]
    chunks = chunked(x_BLD, decided(mask.astype(np.float32), segments, capacity), capacity)
    assert np.array_equal(chunks.segment_ids_BM != 0, piece["out/next_mask"])
    assert np.array_equal(chunks.x_BMD[..., :4], piece["out/next_hidden"])


def test_dechunk(pieces):
    """The gate p comes from all over [0, 1], so the clip to [1e-4, 1 - 1e-4] is part of it."""
    piece = golden_data.part(pieces, "dechunk")
    mask = piece["in/mask"]
    segments, capacity = mask.astype(np.int32), piece["in/next_mask"].shape[1]
    boundaries = piece["in/boundary_mask"].astype(np.float32)

    def scalar(y_BMD, p_BL):
        # the official layer smooths and upsamples; the confidence is multiplied elsewhere
        route = decided(boundaries, segments, capacity)._replace(boundary_prob_BL=p_BL)
        chunks = chunked(y_BMD, route, capacity)
        constant = route._replace(boundary_prob_BL=jax.lax.stop_gradient(p_BL))
        out_BLD = dechunked(y_BMD, chunks, constant)
        return jnp.sum(out_BLD * piece["in/cot"]), out_BLD

    y_BMD, p_BL = piece["in/inner_hidden"], piece["in/p"]
    (_, out_BLD), (grad_y, grad_p) = quick_jit(jax.value_and_grad(scalar, (0, 1), has_aux=True))(
        y_BMD, p_BL
    )
    assert relative_error(np.asarray(out_BLD)[mask], piece["out/hidden"][mask]) < 1e-5
    assert relative_error(grad_y, piece["grad/inner_hidden"]) < 5e-5
    assert relative_error(grad_p, piece["grad/p"]) < 5e-5


@pytest.mark.parametrize("case", ["plain", "seq_idx"])
def test_ssd(pieces, case):
    piece = golden_data.part(pieces, "ssd")
    inputs = golden_data.part(piece, "in")
    expected = golden_data.part(piece, case)
    resets = case == "seq_idx"
    segments = inputs["seq_idx"] + 1 if resets else np.ones_like(inputs["seq_idx"])
    names = ("x", "dt", "A", "B", "C", "D", "dt_bias")

    def scalar(x, dt, A, B, C, D, dt_bias):
        dt = jax.nn.softplus(dt + dt_bias[None, None])
        y = ssd_blocks(x, dt, A, B[:, :, 0], C[:, :, 0], segments, block_len=16)
        y += D[None, None, :, None] * x
        return jnp.sum(y * inputs["cot"]), y

    differentiate = quick_jit(jax.grad(scalar, tuple(range(7)), has_aux=True))
    grads, y = differentiate(*(inputs[n] for n in names))
    assert relative_error(y[: len(expected["out"])], expected["out"]) < 1e-5
    for name, grad in zip(names, grads):
        if (reference := expected.get(f"grad/{name}")) is not None:
            assert relative_error(grad[: len(reference)], reference) < 5e-5, name


def test_rotary(pieces):
    x_BLHK = pieces["rotary/in"]
    positions = np.arange(x_BLHK.shape[1], dtype=np.int32)[None]
    assert relative_error(rotary(x_BLHK, positions, 16), pieces["rotary/out"]) < 1e-5


@pytest.mark.parametrize("block_len", [11, 64])
def test_windowed_attention(pieces, block_len):
    """The attention of a block: 4 heads of 24 channels, 16 rotated, 15 previous keys."""
    piece = golden_data.part(pieces, "attention")
    qkv = (piece["in"] @ piece["Wqkv.weight"].T).reshape(1, 64, 3, 4, 24)
    segments = np.ones((1, 64), np.int32)

    @quick_jit
    def attend(qkv):
        q, k = (rotary(qkv[:, :, i], segment_positions(segments), 16) for i in (0, 1))
        return attention_blocks(q, k, qkv[:, :, 2], segments, window=15, block_len=block_len)

    out = attend(qkv)
    mixed = np.asarray(out).reshape(1, 64, 96) @ piece["out_proj.weight"].T
    assert relative_error(mixed[..., ::5], piece["out"]) < 1e-5
