"""Every part of a chunking system, against slow loops and published values."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from hnet.chunking.config import ChunkingConfig
from hnet.chunking.losses.bce import BCE
from hnet.chunking.part import Positions
from hnet.chunking.predictors.mlp import MLP, relaxed_bernoulli
from hnet.chunking.predictors.rules import Fixed, Whitespace, spacelike
from hnet.nn.context import Context
from tests.chunking_pieces import chunked, dechunked, decided, place
from tests.networks import network, quick_jit, random_params, stage

B, L, D = 2, 13, 3


def two_stages(**chunking):
    return network(
        replace(stage("t1 t1", 26), chunking=ChunkingConfig(**chunking)), stage("t1", 26)
    )


def test_rules_of_bytes():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 256, (3, 401)).astype(np.int32)
    ids[:, ::3] = rng.choice(np.frombuffer(b" ,.aZ09\n", np.uint8), (3, 134))
    segments = np.repeat([[1, 2, 3]], 3, 0).repeat([101, 200, 100], axis=1).astype(np.int32)

    def is_word(byte):
        return bytes([byte]).isalnum() or 0x80 <= byte <= 0xBF

    found = np.asarray(quick_jit(spacelike)(ids, segments))
    for row in range(3):
        for t in range(401):
            first = t in (0, 101, 301)
            before = not first and not is_word(ids[row, t - 1])
            expected = not is_word(ids[row, t]) and not before
            assert found[row, t] == expected, (row, t)
    index = np.concatenate([np.arange(101), np.arange(200), np.arange(100)])
    rows = Positions(None, Context(segments, bytes_BL=ids), None)
    where = place(3, ChunkingConfig(7.0))
    for rule, expected in ((Whitespace, ids == 0x20), (Fixed, np.stack([index % 7 == 0] * 3))):
        assert np.array_equal(rule(rule.Config(), where, rngs=None)(rows).prob, expected)


@st.composite
def rows(draw):
    """Packed rows with padding anywhere, boundaries, states, and a capacity that may be too low."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    segments = np.cumsum(rng.random((B, L)) < draw(st.sampled_from([0.0, 0.2, 0.8])), 1) + 1
    segments = np.where(rng.random((B, L)) < draw(st.sampled_from([0.0, 0.3])), 0, segments)
    runs = np.cumsum(np.diff(segments, axis=1, prepend=-1) != 0, 1) * (segments != 0)
    wanted = rng.random((B, L)) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    x, p = rng.normal(size=(B, L, D)), np.where(wanted, 0.75, 0.25)
    capacity = draw(st.sampled_from([3, 9, 2 * L]))
    return (runs.astype(np.int32), p.astype(np.float32), x.astype(np.float32), capacity)


@partial(quick_jit, static_argnums=4)
def _end(x_BLD, p_BL, segment_ids_BL, null_chunk_D, capacity):
    """Slots of an END stage, pooled by mean and by select, and the former repeated."""
    found = decided(p_BL, segment_ids_BL, capacity, has_null_chunk=True, route_ids=segment_ids_BL)
    mean = chunked(x_BLD, found, capacity, null_chunk_D, "mean")
    last = chunked(x_BLD, found, capacity, null_chunk_D)
    return found, mean, last, dechunked(mean.x_BMD, mean, found, "repeat")


def slow_end(x, p, segments, null, capacity):
    """(slots, what each position reads, wanted slots) of one row, by walking along it."""
    slots, reads, wanted, at, members = [], [], 0, None, []
    for t, segment in enumerate(segments):
        starts = segment != 0 and (t == 0 or segments[t - 1] != segment)
        if starts:
            wanted, members, at = wanted + 1, [], None
            if wanted <= capacity:
                at = len(slots)
                slots.append((null, null, segment, 1.0))
        if segment == 0:
            reads.append(None)
            continue
        members.append(x[t])
        if p[t] > 0.5:
            wanted += 1
            if wanted <= capacity:
                at = len(slots)
                slots.append((np.mean(members, 0), x[t], segment, p[t]))
                members = []
        reads.append(at)
    return slots, reads, wanted


@given(rows())
@settings(max_examples=60)
def test_end_slots_are_those_of_a_walk_along_the_row(case):
    segments, p, x, capacity = case
    null = np.asarray([7.0, -5.0, 3.0], np.float32)
    route, mean, last, out = jax.device_get(_end(x, p, segments, null, capacity))
    for b in range(B):
        slots, reads, wanted = slow_end(x[b], p[b], segments[b], null, capacity)
        assert route.num_slots_G[b] == wanted
        assert route.num_boundaries_B[b] == np.sum((p[b] > 0.5) & (segments[b] != 0))
        used = mean.segment_ids_BM[b] != 0
        assert used.sum() == len(slots) and np.all(used[: len(slots)])
        for m, (mean_D, last_D, segment, prob) in enumerate(slots):
            np.testing.assert_allclose(mean.x_BMD[b, m], mean_D, atol=2e-6)
            assert np.array_equal(last.x_BMD[b, m], last_D)
            assert mean.segment_ids_BM[b, m] == mean.route_ids_BM[b, m] == segment
            assert mean.slots.boundary_prob_BM[b, m] == prob
        for t, at in enumerate(reads):
            expected = np.zeros(D) if at is None else mean.x_BMD[b, at]
            assert np.array_equal(out[b, t], expected), (b, t, at)


def reference_pooling(x_LD, b_L, null_chunk_D, main):
    """DTP's pooling, main network and upsampling of one row, with its continuous relaxation.

    A position belongs to the group s that equals its index g(t), with weight 1 - (s - g(t)) there
    and 0 elsewhere; weights are divided by their sum (arXiv 2211.09761, section 2).
    """
    slots_S = jnp.arange(L, dtype=jnp.float32)[:, None]

    def weights(index_L):
        is_active = jax.lax.stop_gradient(index_L)[None, :] == slots_S
        return jnp.where(is_active, 1 - (slots_S - index_L[None, :]), 0.0)

    into_SL = weights(jnp.cumsum(b_L) - b_L)
    groups_SD = into_SL @ x_LD / (jnp.sum(into_SL, 1, keepdims=True) + 1e-9)
    num_complete = jnp.sum(jax.lax.stop_gradient(b_L))
    groups_SD = jnp.where(slots_S < num_complete, groups_SD, 0.0)
    y_SD = main(jnp.concatenate([null_chunk_D[None], groups_SD[:-1]]))
    out_of_SL = weights(jnp.cumsum(b_L))
    return (out_of_SL / (jnp.sum(out_of_SL, 0, keepdims=True) + 1e-9)).T @ y_SD


def test_gradients_of_dynamic_token_pooling():
    """Equal those of the reference construction; and consequences of these."""
    rng = np.random.default_rng(3)
    x, a, null = (rng.normal(size=s).astype(np.float32) for s in ((L, D), (L, D), (D,)))
    mix = rng.normal(size=(D, D)).astype(np.float32)
    b = np.isin(np.arange(L), (0, 1, 4, 9)).astype(
        np.float32
    )  # groups 0 | 1 | 2-4 | 5-9, rest open
    main = lambda y: jnp.tanh(y @ mix)

    def ours(x_LD, b_L, null_chunk_D):
        segments = jnp.ones((1, L), jnp.int32)
        found = decided(b_L[None], segments, 2 * L, has_null_chunk=True)
        chunks = chunked(x_LD[None], found, 2 * L, null_chunk_D, "mean")
        return jnp.sum(dechunked(main(chunks.x_BMD), chunks, found, "repeat")[0] * a)

    def reference(x_LD, b_L, null_chunk_D):
        return jnp.sum(reference_pooling(x_LD, b_L, null_chunk_D, main) * a)

    both = [quick_jit(jax.value_and_grad(f, (0, 1, 2)))(x, b, null) for f in (ours, reference)]
    (value, (dx, db, dnull)), (value_r, (dx_r, db_r, dnull_r)) = both
    np.testing.assert_allclose(value, value_r, rtol=1e-5)
    for mine, theirs in ((dx, dx_r), (db, db_r), (dnull, dnull_r)):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    closing, open_group = np.flatnonzero(b), np.arange(10, L)
    assert not np.any(np.asarray(db)[closing]), "a boundary that closes a group has no gradient"
    assert not np.any(np.asarray(db)[open_group]) and not np.any(np.asarray(dx)[open_group])
    assert np.all(np.abs(np.asarray(db)[[2, 3, 5, 6, 7, 8]]) > 1e-3)


def test_a_closing_position_already_reads_its_own_group():
    b = np.zeros((1, L), np.float32)
    b[0, 5] = 1
    segments = np.ones((1, L), np.int32)
    x = np.random.default_rng(0).normal(size=(1, L, D)).astype(np.float32)
    _, chunks, _, out = _end(x, b, segments, np.zeros(D, np.float32), 2 * L)
    assert np.array_equal(out[0, 4], np.zeros(D)) and np.array_equal(out[0, 5], chunks.x_BMD[0, 1])
    np.testing.assert_allclose(out[0, 5], x[0, :6].mean(0), atol=1e-6)


def test_at_boundaries_adds_nothing_elsewhere():
    rng = np.random.default_rng(1)
    p = (rng.random((B, L)) < 0.4).astype(np.float32)
    segments = np.ones((B, L), np.int32)
    x = rng.normal(size=(B, L, D)).astype(np.float32)
    y = rng.normal(size=(B, L, D)).astype(np.float32)

    @quick_jit
    def both(y):
        found = decided(p, segments, L)
        chunks = chunked(x, found, L)
        mask = found.boundary_mask_BL
        return mask, *(dechunked(y, chunks, found, how) for how in ("at_boundaries", "repeat"))

    mask, scattered, repeated = jax.device_get(both(y))
    assert np.array_equal((scattered != both(y + 1)[1]).any(-1), mask)
    assert np.array_equal(scattered, np.where(mask[..., None], repeated, 0))


def test_relaxed_bernoulli_cuts_with_probability_p_and_passes_its_gradient():
    logits = np.linspace(-3, 3, 7, dtype=np.float32)[:, None].repeat(4001, 1)
    tau, key = 0.5, jax.random.key(5)
    soft = np.asarray(relaxed_bernoulli(logits, tau, key))
    p = 1 / (1 + np.exp(-logits[:, 0].astype(np.float64)))
    np.testing.assert_allclose((soft > 0.5).mean(1), p, atol=4 * 0.5 / np.sqrt(4001))
    assert np.array_equal(relaxed_bernoulli(logits, tau, None) > 0.5, logits > 0)

    segments = np.ones_like(logits, np.int32)

    def boundaries(logits):
        soft = relaxed_bernoulli(logits, tau, key)
        route = decided(jax.nn.sigmoid(logits), segments, 9999, has_null_chunk=True, relaxed=soft)
        return jnp.sum(route.boundary_ste_BL)

    b, gradient = quick_jit(jax.value_and_grad(boundaries))(logits)
    assert float(b) == (soft > 0.5).sum()
    np.testing.assert_allclose(gradient, soft * (1 - soft) / tau, atol=1e-5)


def mlp_stage(**chunking):
    """(boundaries and gradient of the pooled states for the predictor, as a function of a key)."""
    config = two_stages(alignment="end", pool="mean", **chunking)
    graph, params = random_params(config)
    x = np.random.default_rng(0).normal(size=(2, 29, 26)).astype(np.float32)
    segments = np.ones((2, 29), np.int32)

    @quick_jit
    def run(key):
        def pooled(predictor):
            backbone = {**params["backbone"], "routing_module": predictor}
            outer = nnx.merge(graph, {**params, "backbone": backbone}).backbone
            context = Context(segments)
            found = outer.boundaries(x, context, 58, key=key)
            chunks, _, _ = outer.chunk(x, context, found, 58)
            return jnp.sum(chunks**2), found.boundary_mask_BL

        predictor = params["backbone"]["routing_module"]
        gradient, mask = jax.grad(pooled, has_aux=True)(predictor)
        return mask, gradient

    return run


def test_noise_comes_only_from_a_key():
    run = mlp_stage(predictor="mlp")
    (first, _), (again, _), (second, _) = (run(jax.random.key(k)) for k in (1, 1, 2))
    quiet, gradient = run(None)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second) and not np.array_equal(first, quiet)
    assert all(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(gradient))
    at_evaluation, _ = mlp_stage(predictor=MLP.Config(reference_noise_at_evaluation=True))(None)
    assert not np.array_equal(at_evaluation, quiet)


def test_predictor_of_labels_draws_nothing_and_gets_no_gradient_through_b():
    run = mlp_stage(predictor=MLP.Config(straight_through=False), losses=(BCE,))
    (with_key, gradient), (without, _) = run(jax.random.key(1)), run(None)
    assert np.array_equal(with_key, without) and 3 < without.sum() < 55
    leaves = jax.tree.leaves(gradient)
    assert len(leaves) == 4 and not any(np.any(leaf) for leaf in leaves)


def test_given_boundaries_are_needed_and_used():
    graph, params = random_params(two_stages(predictor="external", dechunk="repeat", losses=()))
    model = nnx.merge(graph, params)
    ids = np.zeros((1, 11), np.int32)
    with pytest.raises(ValueError, match="give boundaries_BL"):
        model(ids)
    told = np.random.default_rng(2).random((1, 11)) < 0.5
    mask = quick_jit(lambda b: nnx.merge(graph, params)(ids, boundaries_BL=b))(told)[1][0]
    assert np.array_equal(mask.boundary_mask_BL[0, 1:], told[0, 1:]) and mask.boundary_mask_BL[0, 0]
