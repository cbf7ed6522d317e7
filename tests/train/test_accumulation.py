"""Accumulation gives the update and the metrics of one batch, for any content of its rows."""

from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx

from hnet.chunking.losses.ratio import Ratio
from hnet.chunking.predictors.mlp import MLP
from hnet.config import EOS_ID, HNetConfig
from hnet.nn.parameters import describe
from hnet.stage import Numbers
from hnet.train.config import OptimConfig
from hnet.train.optim import Hyperparams
from hnet.train.step import init_state, train_step
from tests.networks import network, quick_jit, random_params, stage

B, L, PARTS = 10, 29, 5
THRESHOLD = MLP.Config(straight_through=False)
LABELLED = {"predictor": THRESHOLD, "losses": ("bce",)}
ENDS = {"predictor": THRESHOLD, "alignment": "end", "pool": "mean"}
NETWORKS = {
    "iso": network(stage("t1", 26)),
    "ratio": network(stage("t1 t1", 26), stage("t1 t1", 26, target_ratio=2.0), stage("t1", 26)),
    "hinge": network(stage("t1 t1", 26, **ENDS, losses=("hinge",)), stage("t1", 26)),
    "labels": network(stage("t1 -", 26, **LABELLED), stage("t1", 26)),
    "routed": network(
        stage("t1 -", 26, routes=3, hold_rate=True, losses=(Ratio.Config(average="routes"),)),
        stage("- t1", 26, routes=3, **ENDS, losses=("binomial",)),
        stage("t1", 26),
    ),
}


def uneven_batch() -> dict[str, np.ndarray]:
    """Rows of several documents, with much padding in some and all in one; route 2 is rare."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 254, (B, L)).astype(np.int32)
    segments = np.sort(rng.integers(1, 4, (B, L)), axis=1).astype(np.int32)
    for row, length in {0: 3, 4: 17, 7: 0, 8: 2}.items():
        segments[row, length:] = 0
    ids[:, 11] = EOS_ID
    mask = (segments != 0) & (rng.random((B, L)) < 0.8)
    mask[:, 0] = False
    routes = rng.choice(3, (B, L), p=[0.5, 0.45, 0.05]).astype(np.int32)
    return {"input_ids": ids, "segment_ids": segments, "loss_mask": mask, "route_ids": routes}


def numbers(model: HNetConfig) -> tuple[Hyperparams, Numbers]:
    stages = len(model.stages)
    return (
        Hyperparams(np.float32(1e-2), np.float32(0), np.ones(stages, np.float32), np.float32(1)),
        model.numbers(),
    )


@pytest.mark.few("name", ["labels"], [*NETWORKS])
def test_micro_batches_make_the_update_and_the_metrics_of_one_batch(name):
    model, optim = NETWORKS[name], OptimConfig(clip_norm=1e-3)
    graph, params = random_params(model)
    infos = describe(nnx.merge(graph, params))
    state = init_state(params, jax.random.key(0), model, optim, infos)
    found = {}
    for accumulate in (1, PARTS):
        step = quick_jit(partial(
            train_step, graph=graph, model=model, optim=optim,
            capacities=(2 * L,) * model.num_chunked, accumulate=accumulate, log_norms=True,
        ))  # fmt: skip
        found[accumulate] = jax.device_get(step(state, uneven_batch(), numbers(model)))
    (state, metrics), (expected_state, expected) = found[PARTS], found[1]
    assert metrics.keys() == expected.keys()
    assert all(expected[f"stage{s}/aux_loss"] > 0 for s in range(model.num_chunked))
    for key, value in expected.items():
        if not key.endswith("max_slots"):  # rows of slots differ
            np.testing.assert_allclose(metrics[key], value, rtol=2e-5, atol=1e-6, err_msg=key)
    moments, expected_moments = state.opt_state[1].mu, expected_state.opt_state[1].mu
    close = partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-9)
    jax.tree.map(close, moments, expected_moments)
    offsets = [
        np.testing.assert_allclose(own, other, rtol=1e-5)
        for (path, own), other in zip(
            jax.tree_util.tree_leaves_with_path(state.params),
            jax.tree.leaves(expected_state.params),
        )
        if "boundary_offset" in str(path)
    ]
    assert len(offsets) == (name == "routed")
