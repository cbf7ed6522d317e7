"""Initialisation against statistics of the official one; the model's interface."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hnet.config import HNetConfig, SSMConfig, StageConfig
from hnet.model import abstract, init_params
from tests.networks import NETWORKS, quick_jit, random_params

# The network whose official initialisation, init_weights(0.02), was measured
MEASURED = HNetConfig(
    (
        StageConfig(("m2", "m2"), 64, 0, 4, 16),
        StageConfig(("T1m2", "m2T1"), 96, 128, 4, 16),
        StageConfig(("T2",), 128, 128, 4, 16),
    ),
    ssm=SSMConfig(d_state=16),
)
# Standard deviations over all official layers of a kind. Weights that write to the residual stream
# have 0.02 / sqrt(n), with n residual additions in the encoder and decoder of this stage and of the
# stages around it: 4 in stage 0, 12 in stage 1, 16 in the core.
OFFICIAL_STD = {
    "embeddings/embedding": 0.9991,
    "lm_head/kernel": 0.01994,
    "stage0/in_proj/kernel": 0.01997,
    "stage0/conv1d_weight": 0.2887,
    "stage0/conv1d_bias": 0.2775,
    "stage0/out_proj/kernel": 0.00997,
    "stage1/in_proj/kernel": 0.01995,
    "stage1/Wqkv/kernel": 0.02006,
    "stage1/out_proj/kernel": 0.00576,
    "stage1/fc1/kernel": 0.01995,
    "stage1/fc2/kernel": 0.00576,
    "stage2/Wqkv/kernel": 0.02003,
    "stage2/out_proj/kernel": 0.00498,
    "stage2/fc1/kernel": 0.01997,
    "stage2/fc2/kernel": 0.00501,
}


@pytest.fixture(scope="module")
def initial():
    """Arrays by "stage/part/name", with those of the same kind together."""
    params = quick_jit(init_params, static_argnums=0)(MEASURED, jax.random.key(0))
    by_kind = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [str(part.key) for part in path]
        depth = min(names.count("main_network"), MEASURED.num_chunked)
        stage = [f"stage{depth}"] if "backbone" in names else []
        tail = names[-2:] if names[-1] in ("kernel", "embedding", "scale") else names[-1:]
        by_kind.setdefault("/".join(stage + tail), []).append(np.asarray(leaf))
    return by_kind


def flat(arrays):
    return np.concatenate([a.ravel() for a in arrays])


@pytest.mark.parametrize("kind", OFFICIAL_STD)
def test_spread_of_the_initial_weights(initial, kind):
    values = flat(initial[kind])
    # four standard errors of our and of the official estimate
    tolerance = 4 * np.sqrt(2) / np.sqrt(2 * values.size)
    assert values.std() == pytest.approx(OFFICIAL_STD[kind], rel=tolerance)
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(values.size)


def test_initial_constants_and_ranges(initial):
    for kind, arrays in initial.items():
        values, name = flat(arrays), kind.split("/")[-1]
        if name in ("scale", "D"):
            assert np.all(values == 1), kind
        elif name == "pad_dimension" or "residual_proj" in kind or name == "bias":
            assert np.all(values == 0), kind
        elif "q_proj" in kind or "k_proj" in kind:
            assert all(np.array_equal(a, np.eye(len(a))) for a in arrays), kind
        elif name in ("conv1d_weight", "conv1d_bias"):
            assert 0.45 < np.abs(values).max() <= 0.5, kind
        elif name == "A_log":
            assert np.all((values >= 0) & (values <= np.log(16))) and values.std() > 0.3, kind
        elif name == "dt_bias":
            dt = np.log1p(np.exp(values))
            assert np.all((dt > 0.99e-3) & (dt < 0.1001)) and np.log(dt).std() > 0.7, kind
        else:
            assert kind in OFFICIAL_STD, kind
    assert {
        "stage0/residual_proj/kernel",
        "stage1/pad_dimension",
        "stage1/k_proj_layer/kernel",
    } <= (set(initial))


def test_layers_of_a_run_are_drawn_apart(initial):
    for kind in ("stage0/in_proj/kernel", "stage2/Wqkv/kernel", "stage0/A_log"):
        first, second = initial[kind][0]
        assert not np.array_equal(first, second)


def test_abstract_parameters_are_those_of_a_model():
    config = NETWORKS["spacelike_tied"]
    _, shapes = abstract(config)
    made = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), shapes) == jax.tree.map(
        lambda a: (a.shape, a.dtype), made
    )
    assert "lm_head" not in shapes and "lm_head" in abstract(NETWORKS["iso"])[1]
    shapes["backbone"].clear()  # what a caller changes is its own
    assert abstract(config)[1]["backbone"]


def test_direct_call_clips_nothing_and_returns_what_each_stage_decided():
    config = NETWORKS["two_stage"]
    graph, params = random_params(config)
    ids = jnp.zeros((2, 11), jnp.int32)
    logits, routes = jax.eval_shape(lambda p, i: nnx.merge(graph, p)(i), params, ids)
    assert (logits.shape, logits.dtype) == ((2, 11, 256), jnp.float32)
    assert [r.boundary_mask_BL.shape for r in routes] == [(2, 11), (2, 11)]  # capacity L
    few = lambda p, i: nnx.merge(graph, p)(i, capacities=(5, 99))
    _, routes = jax.eval_shape(few, params, ids)
    assert [r.boundary_mask_BL.shape for r in routes] == [(2, 11), (2, 5)]
