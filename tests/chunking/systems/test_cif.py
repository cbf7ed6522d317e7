"""Continuous integrate-and-fire: predictors and integration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hnet.chunking.boundaries import decide
from hnet.chunking.predictors.convolved import fired
from hnet.nn.context import Context
from tests.chunking.systems.pieces import agree, chunking_of, chunking_stage, gradients_agree
from tests.golden_data import load, part
from tests.networks import quick_jit

CIF_NUMBERS = load("family/cif")


def torch_cif(found) -> dict:
    """Parameters of our predictor from those of CifPredictor."""
    return {
        "taps": jnp.asarray(found["cif_conv1d.weight"][:, 0].T),
        "taps_bias": jnp.asarray(found["cif_conv1d.bias"]),
        "out": {
            "kernel": jnp.asarray(found["cif_output.weight"].T),
            "bias": jnp.asarray(found["cif_output.bias"]),
        },
    }


def test_cif():
    """Weights, fires, chunk vectors, and their gradients by states and all parameters."""
    found = part(CIF_NUMBERS, "CifPredictor_free")
    chunking = chunking_of("cif")
    graph, params = chunking_stage(chunking, 8)
    h_BLD, lengths_B = found["in/hidden_BLD"], found["in/lengths_B"]
    ids_BL = (np.arange(h_BLD.shape[1])[None] < lengths_B[:, None]).astype(np.int32)
    M = found["out/embeds_BMD"].shape[1] + 1  # after the null chunk

    @quick_jit
    def run(predictor, h_BLD):
        def scalar(predictor, h_BLD):
            stage = nnx.merge(graph, params | {"routing_module": predictor})
            own = stage.boundaries(h_BLD, Context(ids_BL), M)
            chunks_BMD, inner, _ = stage.chunk(h_BLD, Context(ids_BL), own, M)
            used_BM1 = (inner.segment_ids_BL != 0)[:, 1:, None]
            vectors_BMD = jnp.where(used_BM1, chunks_BMD[:, 1:], 0.0)
            # its code adds its loss: mean over rows of |sum of weights - target|, above the target
            over = jnp.sum(jnp.where(ids_BL != 0, own.extra.weight, 0.0)) / len(ids_BL)
            return jnp.sum(vectors_BMD * found["in/cot_BMD"]) + over, (own, vectors_BMD)

        return jax.value_and_grad(scalar, (0, 1), has_aux=True)(predictor, h_BLD)

    predictor = torch_cif(part(found, "param"))
    (_, (own, vectors_BMD)), (grads, grad_h_BLD) = run(predictor, h_BLD)
    agree(np.where(ids_BL, own.extra.weight, 0), found["out/alphas_BL"])
    assert np.array_equal(own.boundary_mask_BL, (found["out/fires_BL"] >= 1) & (ids_BL != 0))
    agree(vectors_BMD, found["out/embeds_BMD"])
    gradients_agree(grad_h_BLD, found["grad/hidden_BLD"])
    expected = torch_cif(part(found, "grad/param"))
    jax.tree.map(gradients_agree, grads, expected)


def cif_weights(found: dict, h_BLD, right: jax.Array, scale: jax.Array, tail: jax.Array):
    """Weights as in both versions of its code: `right` positions of right context, scaled to the
    target or not, with a weight after the end or not. h_BLD has room for it."""
    w, target_B = part(found, "param"), found.get("in/target_B", np.ones(3, np.float32))
    L, length_B1 = h_BLD.shape[1], found["in/lengths_B"][:, None]
    is_full = w["cif_conv1d.weight"].shape[1] > 1
    padded = jnp.pad(h_BLD, ((0, 0), (2, 2), (0, 0)))
    taps = [jax.lax.dynamic_slice_in_dim(padded, right + i, L, axis=1) for i in range(3)]
    spec = "bld,ed->ble" if is_full else "bld,d->bld"
    kernel = w["cif_conv1d.weight"] if is_full else w["cif_conv1d.weight"][:, 0]
    convolved = sum(jnp.einsum(spec, x, kernel[..., i]) for i, x in enumerate(taps))
    convolved = convolved + w["cif_conv1d.bias"][None, None] + (0 if is_full else h_BLD)
    out = w["cif_output.weight"][0][None, None]
    weight_BL = jax.nn.sigmoid(
        jnp.sum(jax.nn.relu(convolved) * out, axis=-1) + w["cif_output.bias"][None]
    )
    index_1L = jnp.arange(L, dtype=jnp.int32)[None]
    weight_BL = jnp.where(index_1L < length_B1, weight_BL, 0.0)
    sum_B = jnp.sum(weight_BL, axis=1)
    scaled_BL = weight_BL * (target_B / sum_B)[:, None]
    weight_BL = jnp.where(scale, scaled_BL, weight_BL)
    tail_BL = jnp.where(index_1L == length_B1, CIF_TAIL, 0.0)
    return weight_BL + jnp.where(tail, tail_BL, 0.0), sum_B


CIF_TAIL = 0.45  # threshold of its tail, added after the end


@pytest.mark.few("version", [""], ["", "V2"])
def test_cif_integrates(version):
    """Chunk vectors and gradients of both predictors: free, with a tail, not causal, and scaled to
    a target number of chunks, with which rounding decides whether the last position fires. The
    weights are theirs; ours are causal, not scaled, and have no tail."""
    graph, params = chunking_stage(chunking_of("cif"), 8)
    L, M = 27, 24
    ids_BL = np.ones((3, L), np.int32)
    context = Context(ids_BL)

    @quick_jit
    def run(found, h_BLD, cot_BMD, right, scale, tail):
        def scalar(weights, h_BLD):
            weight_BL, sum_B = cif_weights(found | weights, h_BLD, right, scale, tail)
            own = decide(fired(weight_BL, ids_BL), context, M, has_null_chunk=True)
            chunks_BMD, _, _ = nnx.merge(graph, params).chunk(h_BLD, context, own, M)
            used_BM = jnp.arange(M - 1, dtype=jnp.int32)[None] < own.num_boundaries_B[:, None]
            vectors_BMD = jnp.where(used_BM[..., None], chunks_BMD[:, 1:], 0.0)
            # its code adds |number of chunks - target|, here above the target; floored with a tail
            over = jnp.where(tail, 0.0, jnp.mean(sum_B))
            return jnp.sum(vectors_BMD * cot_BMD) + over, (own, weight_BL, vectors_BMD, sum_B)

        weights = {k: a for k, a in found.items() if k.startswith("param/")}
        return jax.value_and_grad(scalar, (0, 1), has_aux=True)(weights, h_BLD)

    for kind in ("free", "tail", "noncausal", "train"):
        found = part(CIF_NUMBERS, f"CifPredictor{version}_free")  # others have its inputs
        found = {k: a for k, a in found.items() if k.startswith(("in/", "param/"))}
        found |= part(CIF_NUMBERS, f"CifPredictor{version}_{kind}")
        is_scaled, has_tail = kind in ("noncausal", "train"), kind == "tail"
        right = np.int32(kind == "noncausal")
        h_BLD = np.pad(found["in/hidden_BLD"], ((0, 0), (0, L - 26), (0, 0)))
        cot_BMD = np.zeros((3, M - 1, 8), np.float32)
        cot_BMD[:, : found["in/cot_BMD"].shape[1]] = found["in/cot_BMD"]
        inputs = {k: a for k, a in found.items() if k.startswith(("in/len", "in/tar", "param/"))}
        inputs.setdefault("in/target_B", np.ones(3, np.float32))
        (_, out), (grads, grad_h_BLD) = run(
            inputs, h_BLD, cot_BMD, right, np.bool_(is_scaled), np.bool_(has_tail)
        )
        own, weight_BL, vectors_BMD, sum_B = jax.device_get(out)
        more = ((0, 0), (0, L - found["out/alphas_BL"].shape[1]))
        agree(weight_BL, np.pad(found["out/alphas_BL"], more))
        number_B = np.floor(sum_B + CIF_TAIL) if has_tail else sum_B
        agree(number_B, found["out/token_num_B"])
        if is_scaled:
            quantity = np.abs(number_B - found["in/target_B"]).mean()
            agree(quantity, found["out/quantity_loss"])
        fires_BL = np.pad((found["out/fires_BL"] >= 1), more) & (weight_BL > 0)
        for row, fires_L in enumerate(fires_BL):
            end = np.flatnonzero(weight_BL[row])[-1] + (not is_scaled)
            assert np.array_equal(own.boundary_mask_BL[row, :end], fires_L[:end])
            used = fires_L[:end].sum()
            assert used > 4
            agree(vectors_BMD[row, :used], found["out/embeds_BMD"][row, :used])
        gradients_agree(grad_h_BLD[:, :26], found["grad/hidden_BLD"])
        for name, ours in grads.items():
            gradients_agree(ours, found[f"grad/{name}"])


def test_cif_integrators():
    """Both of its integrators, on given weights, with gradients; row 0 fires at exactly 1."""
    found, ids_BL = part(CIF_NUMBERS, "integrate"), np.ones((3, 26), np.int32)
    graph, params = chunking_stage(chunking_of("cif"), 8)
    told = {kind: part(CIF_NUMBERS, f"integrate_{kind}") for kind in ("loop", "prefix_sums")}
    M = told["loop"]["embeds_BMD"].shape[1]

    @quick_jit
    def run(weight_BL, h_BLD, cot_BMD):
        def scalar(weight_BL, h_BLD):
            own = decide(fired(weight_BL, ids_BL), Context(ids_BL), 26, has_null_chunk=True)
            chunks_BMD, _, _ = nnx.merge(graph, params).chunk(h_BLD, Context(ids_BL), own, 26)
            used_BM = jnp.arange(M, dtype=jnp.int32)[None] < own.num_boundaries_B[:, None]
            vectors_BMD = jnp.where(used_BM[..., None], chunks_BMD[:, 1 : M + 1], 0.0)
            return jnp.sum(vectors_BMD * cot_BMD), (own, vectors_BMD)

        return jax.value_and_grad(scalar, (0, 1), has_aux=True)(weight_BL, h_BLD)

    for numbers in told.values():
        inputs = found["alphas_BL"], found["hidden_BLD"], numbers["cot_BMD"]
        (_, (own, vectors_BMD)), (grad_BL, grad_h_BLD) = run(*inputs)
        assert np.array_equal(own.boundary_mask_BL[1:], numbers["fires_BL"][1:] >= 1)
        agree(vectors_BMD[1:], numbers["embeds_BMD"][1:])
        gradients_agree(grad_h_BLD[1:], numbers["grad_hidden_BLD"][1:])
        gradients_agree(grad_BL[1:], numbers["grad_alphas_BL"][1:])
