"""Rate losses and their gradients against published values, by route, and the controller."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hnet.chunking.boundaries import Prediction
from hnet.chunking.config import ChunkingConfig
from hnet.chunking.losses.bce import BCE, entropy_spikes
from hnet.chunking.losses.binomial import Binomial, binomial_nll
from hnet.chunking.losses.hinge import Hinge, hinge
from hnet.chunking.losses.parity import Parity
from hnet.chunking.losses.ratio import Ratio, ratio_loss
from hnet.chunking.rate_control import LIMIT, exact_offsets, hold_rates, logits_without_offset
from hnet.chunking.rates import SOFT, boundary_rates, route_rates, row_rate_error, target_rate
from tests.chunking_pieces import decided, loss_of
from tests.networks import quick_jit

B, L, R = 3, 29, 4


def test_binomial_values_and_derivatives():
    """512 positions, prior 0.2: table of the published loss, value and slope per position."""
    k = np.asarray([0.0, 102.4, 256.0, 512.0], np.float32)
    loss = lambda k: binomial_nll(k, jnp.float32(512), jnp.float32(0.2)) / 512
    values, slopes = jax.vmap(jax.value_and_grad(loss))(k)
    np.testing.assert_allclose(values, [0.223, 0.0061, 0.230, 1.61], rtol=0.01)
    np.testing.assert_allclose(512 * slopes, [-5.4, 0.0, 1.4, 8.2], atol=0.05)
    exact = -math.log(math.comb(512, 256)) - 256 * (math.log(0.2) + math.log(0.8))
    assert float(values[2] * 512) == pytest.approx(exact, rel=1e-5)


def test_hinge_is_flat_inside_its_band_and_steep_outside():
    rates = np.asarray([0.05, 0.15, 0.18, 0.25], np.float32)
    values, slopes = jax.vmap(jax.value_and_grad(lambda f: hinge(f, 0.2, 0.1)))(rates)
    np.testing.assert_allclose(values, [0.05, 0, 0, 0.05], atol=1e-7)
    assert slopes.tolist() == [-1, 0, 0, 1]


def test_ratio_loss_value_and_its_only_gradient():
    assert float(ratio_loss(1 / 6, 1 / 6, 6.0)) == pytest.approx(1)
    slope_F, slope_G = jax.grad(lambda F, G: ratio_loss(jax.lax.stop_gradient(F), G, 6.0), (0, 1))(
        0.25, 0.3
    )
    assert slope_F == 0 and float(slope_G) == pytest.approx(6 / 5 * (6 * 0.25 - 1))


def entropies_to_logits(entropies):
    """Logits over two bytes whose softmax has these entropies, by bisection."""
    lo, hi = np.zeros_like(entropies), np.full_like(entropies, 0.5)
    for _ in range(60):
        mid = (lo + hi) / 2
        h = -(mid * np.log(mid) + (1 - mid) * np.log1p(-mid))
        lo, hi = np.where(h < entropies, mid, lo), np.where(h < entropies, hi, mid)
    return np.stack([np.log(lo), np.log1p(-lo)], -1).astype(np.float32)


def test_entropy_spikes_exceed_the_two_before_them_in_their_document():
    rng = np.random.default_rng(0)
    entropies = rng.uniform(0.05, 0.65, (B, L))
    segments = np.sort(rng.integers(1, 5, (B, L)), axis=1).astype(np.int32)
    segments[0, :5] = 0
    spikes = quick_jit(entropy_spikes)(entropies_to_logits(entropies), segments)
    for b in range(B):
        for t in range(L):
            before = [s for s in (t - 2, t - 1) if s >= 0 and segments[b, s] == segments[b, t]]
            expected = all(entropies[b, t] > entropies[b, s] for s in before)
            assert spikes[b, t] == (expected and segments[b, t] != 0), (b, t)


def random_route(alignment="end"):
    """A stage of three packed rows whose positions have one of R routes; route 2 is absent."""
    rng = np.random.default_rng(1)
    segments = np.repeat([[1, 2, 0]], B, 0).repeat([11, 13, 5], axis=1).astype(np.int32)
    ids = rng.choice([0, 1, 3], (B, L)).astype(np.int32)
    logits = rng.normal(-0.5, 1.5, (B, L)).astype(np.float32)

    def of(logits):
        return decided(
            jax.nn.sigmoid(logits), segments, 2 * L,
            has_null_chunk=alignment == "end", logit=logits, route_ids=ids,
        )  # fmt: skip

    return of, logits, ids, segments


SIGMAS = (0.05, 0.02, 0.03, 0.01)
LOSSES = {
    "ratio": (Ratio, {}),
    "binomial": (Binomial, {}),
    "hinge": (Hinge, {"band": 0.1}),
    "hinge_sigmas": (Hinge, {"sigmas": SIGMAS, "num_sigmas": 2.0}),
    "bce": (BCE, {"labels": "given"}),
    "double_sigmoid": (BCE, {"labels": "given", "reference_double_sigmoid": True}),
}


def slow_loss(name, r, p, b, labels, target):
    """The loss of one route from lists over rows of its positions."""
    rows = [(np.sum(rb), len(rb)) for rb in b if len(rb)]
    n = sum(size for _, size in rows)
    p, b, labels = (np.concatenate(a).astype(np.float64) for a in (p, b, labels))
    if name == "ratio":
        F, G = b.mean(), p.mean()
        return target / (target - 1) * ((target - 1) * F * G + (1 - F) * (1 - G))
    if name == "binomial":
        nats = [
            -math.log(math.comb(size, int(k)))
            - k * math.log(1 / target)
            - (size - k) * math.log(1 - 1 / target)
            for k, size in rows
        ]
        return sum(nats) / n
    if name.startswith("hinge"):
        high = 1 / target
        low = high - 2 * SIGMAS[r] if name == "hinge_sigmas" else 0.9 * high
        return sum(size * max(k / size - high, low - k / size, 0) for k, size in rows) / n
    q = 1 / (1 + np.exp(-p)) if name == "double_sigmoid" else p
    return np.mean(np.where(labels, -np.log(q), -np.log1p(-q)))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("average", ["positions", "routes"])
def test_losses_by_route(name, average):
    of, logits, ids, segments = random_route()
    part, fields = LOSSES[name]
    labels = np.random.default_rng(2).random((B, L)) < 0.3
    targets = np.asarray([2.0, 3.5, 5.0, 8.0], np.float32)
    loss = lambda z, t: loss_of(part, of(z), t, given=labels, average=average, **fields)
    value, (slope, slope_target) = quick_jit(jax.value_and_grad(loss, (0, 1)))(logits, targets)

    route = of(logits)
    p, b = np.asarray(route.boundary_prob_BL), np.asarray(route.boundary_mask_BL)
    expected, weight = [], []
    for r in (0, 1, 3):
        mine = (ids == r) & (segments != 0)
        rows = [[a[i][mine[i]] for i in range(B)] for a in (p, b, labels)]
        expected.append(slow_loss(name, r, *rows, float(targets[r])))
        weight.append(mine.sum() if average == "positions" else 1)
    assert float(value) == pytest.approx(np.average(expected, weights=weight), rel=1e-4)
    assert np.all(np.isfinite(slope)) and np.all(slope[segments == 0] == 0)
    assert np.any(slope != 0) and np.all(np.isfinite(slope_target)) and slope_target[2] == 0


def test_parity_is_the_spread_of_chunks_per_sentence():
    """Against a walk over the routes; its gradient is that of the spread, with G for F."""
    of, logits, ids, segments = random_route()
    targets = np.asarray([2.0, 3.5, 5.0, 8.0], np.float32)
    loss = lambda z: loss_of(Parity, of(z), targets)
    value, slope = quick_jit(jax.value_and_grad(loss))(logits)
    on = [(ids == r) & (segments != 0) for r in (0, 1, 3)]
    b, N = np.asarray(of(logits).boundary_mask_BL), targets[[0, 1, 3]]
    chunks = np.array([b[mine].mean() for mine in on]) * N
    mean, expected = chunks.mean(), np.zeros((B, L))
    assert float(value) == pytest.approx(np.mean((chunks / mean - 1) ** 2), rel=1e-5)
    for mine, c, n in zip(on, chunks, N):
        p = 1 / (1 + np.exp(-logits[mine]))
        expected[mine] = 2 * (c / mean - 1) * n / mean * p * (1 - p) / mine.sum() / 3
    np.testing.assert_allclose(slope, expected, atol=1e-6)
    one = ChunkingConfig(4.0, losses=("parity",))
    assert "parity with routes=1" in one.problem(stage_idx=0, route_groups=0)


def test_the_error_of_rows_counts_boundaries_softly_in_each_row():
    p = np.array([[0.2, 0.6, 0.4, 0.52, 0.7], [0.2, 0.45, 0.9, 0.3, 0.55], [0.9] * 5])
    segments = np.array([[1, 1, 2, 2, 0], [1, 1, 1, 1, 1], [0] * 5], np.int32)
    errors = []
    for p_L, valid_L, starts in zip(p, segments != 0, [{0, 2}, {0}]):
        soft = [
            1 if t in starts else 1 / (1 + math.exp((0.3 - math.log(p / (1 - p))) / SOFT))
            for t, p in enumerate(p_L[valid_L])
        ]
        errors.append((3 * sum(soft) / len(soft) - 1) ** 2)
    route = decided(jnp.asarray(p, jnp.float32), jnp.asarray(segments), 5)
    error = lambda threshold: row_rate_error(route, jnp.float32(3), threshold)
    found, grad = jax.value_and_grad(error)(jnp.float32(0.3))
    np.testing.assert_allclose(found, sum(errors) / 2, rtol=1e-5)
    assert np.isfinite(grad) and grad != 0


def test_one_route_is_the_official_ratio_loss():
    of, logits, _, segments = random_route("start")

    def both(logits):
        found, target = of(logits), jnp.asarray([6.0])
        return loss_of(Ratio, found, target), ratio_loss(*boundary_rates(found), target[0])

    values = both(logits)
    assert values[0] == values[1]
    ours, official = quick_jit(jax.jacobian(both))(logits)
    np.testing.assert_allclose(ours, official, rtol=1e-6)
    assert np.any(ours != 0)
    F, G = boundary_rates(of(logits))
    valid = segments != 0
    route = of(logits)
    assert float(F) == pytest.approx(np.sum(np.asarray(route.num_boundaries_B)) / valid.sum())
    assert float(G) == pytest.approx(np.asarray(route.boundary_prob_BL)[valid].mean(), rel=1e-6)


@given(st.floats(0.01, 0.99), st.floats(-8, 8))
def test_a_shifted_probability_is_that_of_the_shifted_logit(p, offset):
    expected = 1 / (1 + math.exp(-(math.log(p / (1 - p)) + offset)))
    shifted = lambda p: Prediction(prob=jnp.float32(p)).shifted(offset).probability
    assert float(shifted(p)) == pytest.approx(expected, rel=1e-4)
    assert shifted([0.0, 1.0]).tolist() == [0, 1]


def test_held_rates_come_to_their_targets_and_stay():
    """Probabilities far from their targets; one route is absent sometimes, one always."""
    targets = np.float32([6.0, 3.0, 4.0]), np.float32([2.0, 1.5])
    rng = np.random.default_rng(0)
    logits_SRN = np.asarray([[[1.5], [-2.0], [0.0]], [[0.0], [0.3], [0.0]]])
    logits_SRN = logits_SRN + rng.normal(size=(2, 3, 4000))
    inner = {"boundary_offset": jnp.zeros(2), "q_proj_layer": jnp.ones(2)}
    params = {"backbone": {"boundary_offset": jnp.zeros(3), "main_network": inner}}
    update = quick_jit(hold_rates)

    def offsets():
        outer = params["backbone"]["boundary_offset"]
        inner = params["backbone"]["main_network"]["boundary_offset"]
        return np.stack([outer, np.append(inner, 0)])[..., None]

    rates = lambda: np.mean(logits_SRN + offsets() > 0, axis=-1)
    for step in range(400):
        counts = np.asarray([[100, 100 * (step % 3 == 0), 0]] * 2, np.float32)
        params = update(params, np.float32(rates() * counts), counts, targets, 0.05)
    np.testing.assert_allclose(1 / rates()[:, :2], [t[:2] for t in targets], rtol=0.01)
    assert offsets()[0, 2] == 0
    assert np.all(params["backbone"]["main_network"]["q_proj_layer"] == 1)
    for _ in range(20):  # no further wind-up if the rate does not follow
        params = update(params, *[np.ones((2, 3), np.float32)] * 2, targets, 1.0)
    assert np.all(offsets()[0] == -LIMIT)


def test_held_rate_is_that_of_all_batches_together():
    """Small batches of a route have lower rates than large ones; the total rate is held."""
    targets, offset = np.asarray([[4.0, 4.0]], np.float32), jnp.zeros(2)
    logits_N = np.random.default_rng(1).normal(size=4000)
    update, chunks, positions = quick_jit(hold_rates), 0.0, 0.0
    for step in range(600):
        n = 50.0 if step % 2 else 800.0
        rate = np.mean(logits_N + np.asarray(offset[0]) - 1.5 * (n == 50) > 0)
        counts = np.asarray([[n, 1850 - n]], np.float32)
        made = np.asarray([[rate * n, (1850 - n) / 4]], np.float32)
        offset = update({"boundary_offset": offset}, made, counts, targets, 0.05)["boundary_offset"]
        if step >= 300:
            chunks, positions = chunks + rate * n, positions + n
    assert positions / chunks == pytest.approx(4.0, rel=0.02)


def test_the_target_of_a_batch_is_that_of_its_mix_of_routes():
    of, logits, *_ = random_route()
    route, targets = of(logits), np.asarray([6.0, 3.0, 4.0, 2.0], np.float32)
    n_R = np.asarray(route_rates(route, R)[2])
    assert n_R[2] == 0 and len(set(n_R)) == R
    expected = sum(n / N for n, N in zip(n_R, targets)) / n_R.sum()
    assert float(target_rate(n_R, targets)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("scale", [1.0, 9.0])
def test_exact_offsets_cut_one_position_in_target_ratio(scale):
    """Routes far from their targets, with forced boundaries; the fourth is very rare."""
    rng = np.random.default_rng(0)
    targets = [6.0, 2.0, 11.0, 3.0]
    routes = rng.choice(4, 4001, p=[0.5, 0.3, 0.19, 0.01])
    logits = rng.normal(2 - routes, scale, 4001).astype(np.float32)
    logits[::71] = np.inf
    offsets = exact_offsets(logits, routes, targets)
    assert np.isnan(offsets[3]) and np.all(np.abs(offsets) <= LIMIT, where=~np.isnan(offsets))
    for r, N in enumerate(targets[:3]):
        own = logits[routes == r]
        if abs(offsets[r]) < LIMIT:
            assert abs(np.sum(own + offsets[r] > 0) - len(own) / N) <= 1
    assert np.sum(np.abs(offsets[:3]) < LIMIT) == (3 if scale == 1 else 1)
    assert np.all(exact_offsets(np.full(900, np.inf), np.zeros(900), [3.0]) == -LIMIT)


def test_free_logits_are_those_without_the_offset():
    of, logits, segments, *_ = random_route()
    route = of(logits)
    offsets = jnp.asarray([0.5, -1.0, 9.0, 2.0])
    prediction = Prediction(prob=route.boundary_prob_BL)
    p_BL = prediction.shifted(offsets[route.route_ids_BL]).probability
    params = {"backbone": {"boundary_offset": offsets, "main_network": {}}}
    found = logits_without_offset(params, [route._replace(boundary_prob_BL=p_BL)])
    (logit_BL, ids_BL), valid = found[0], np.asarray(route.segment_ids_BL) != 0
    assert list(found) == [0] and np.array_equal(ids_BL, route.route_ids_BL)
    assert np.array_equal(np.isnan(logit_BL), ~valid)
    p_BL = np.asarray(route.boundary_prob_BL, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.log(p_BL) - np.log1p(-p_BL)
    np.testing.assert_allclose(logit_BL[valid], expected[valid], rtol=2e-5, atol=1e-5)


def test_rates_of_routes_add_up_to_those_of_all():
    of, logits, *_ = random_route()
    route = of(logits)
    F_R, G_R, n_R = jax.device_get(route_rates(route, R))
    F, G = boundary_rates(route)
    assert n_R[2] == F_R[2] == G_R[2] == 0 and n_R.sum() == 24 * B
    np.testing.assert_allclose(np.average(F_R, weights=n_R), F, rtol=1e-6)
    np.testing.assert_allclose(np.average(G_R, weights=n_R), G, rtol=1e-6)
